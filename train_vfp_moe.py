"""Variational flow-matching policy with a mixture of experts: a latent names the way, a gate picks who acts.

Plain flow matching has one velocity field for all the ways in which a task can be done; near t = 0, where
noise says nothing yet, it points at their average. VFP (Zhai et al. 2025) gives it a latent z, inferred from
the recorded chunk x_1 by a posterior while training and from the observation s alone by a prior when acting,
and E expert decoders v_e, among which a gate g chooses by z. With x_t, t and u = x_1 - x_0 as in plain flow
matching,

    L = sum_e g_e(z) || v_e(x_t, t, s, z) - u ||^2                  z ~ q(z | s, x_1)
        + beta KL(q(z | s, x_1) || p(z | s))                          diagonal normals, free bits, warm-up
        + 0.2 S(x_0 + sum_e g_e v_e(x_0, 0, s, z), x_1)               K-OT: Sinkhorn divergence of clouds
        + 1e-3 (log sum_e exp l_e)^2 + 1e-2 E sum_e f_e mean g_e      l: logits of g, f: shares of top-1

where the clouds are the chunks of one micro-batch on one process (router z-loss: Zoph et al. 2022; load
balance: Fedus et al. 2021). With `--latent vq` a codebook takes the place of the normals, as in
`train_cfg_vqvae.py`. All experts are computed as one batched product. To act, z is drawn from the prior and
dx/dt = v_e is integrated for the expert of the largest g_e alone: E experts cost what one costs.

Differs from `train_cfg_vqvae.py` in: normal latent; gate and experts; no guidance.

    accelerate launch train_vfp_moe.py --lr 2e-3 --schedule schedule-free
    accelerate launch train_vfp_moe.py --dataset me/fold_towel --image-size 224 --num-experts 8
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, flow, losses, vision
from common.codebook import Codebook, end_window
from common.config import Flat, RunConfig, cli, resolve_steps
from common.data import (
    Batch,
    ChunkDataset,
    DataConfig,
    evenly_spaced,
    make_loader,
    open_dataset,
    split_episodes,
)
from common.data.demo import modes
from common.errors import UserError
from common.faults import GradientClipper, Guard, or_nan
from common.launch import check_same_data, create_run_dir, make_accelerator
from common.mutual_information import normalized_mutual_information
from common.normalize import Normalization, Normalizer
from common.pictures import draw_chunks, draw_latents
from common.schedules import (
    AveragedPolicy,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    learning_rates,
    move_average,
)
from common.tracking import Tracker
from common.transformer import (
    ChunkEncoder,
    Context,
    DecoderBlock,
    InfoEmbedder,
    Observation,
    ObservationHead,
    StackedLinear,
    TimeEmbedding,
    take_expert,
)
from common.vision import VisionConfig


@dataclass(frozen=True)
class Config:
    """Train a variational flow-matching policy with a mixture of experts on multi-camera demonstrations."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    run: Flat[RunConfig] = field(default_factory=RunConfig)

    horizon: int = 16
    """Actions predicted per chunk, in control steps."""
    normalization: Normalization = "mean-std"
    """How state and action are scaled: see common/normalize.py."""
    flow_samples: int = 8
    """Draws of (noise, flow time) per observation and step. The encoder runs once for all of them, so with a
    large backbone further draws are nearly free."""
    time_distribution: flow.TimeDistribution = "beta"
    """Distribution of the flow time in training."""
    time_beta: tuple[float, float] = (1.0, 1.5)
    """Parameters of the Beta distribution; the second above the first favours the noisy end."""
    d_model: int = 128
    """Width of encoder and decoder tokens."""
    num_heads: int = 4
    """Attention heads; must divide --d-model."""
    encoder_layers: int = 2
    """Transformer layers that fuse cameras and joint states."""
    decoder_layers: int = 3
    """Transformer layers that predict the velocity."""
    expert_layers: int | None = None
    """How many of these, the last ones, each expert has for itself; all share the others. Default: all."""
    attention: Literal["causal", "full"] = "causal"
    """Self-attention among the actions of a chunk: an action sees earlier ones only, or all."""
    sample_steps: int = 10
    """Integration steps when sampling actions."""
    sample_method: flow.Integrator = "euler"
    """Integrator when sampling actions; midpoint and heun evaluate the network twice a step."""

    num_experts: int = 4
    """E, decoders among which the gate chooses."""
    top_k: int = 0
    """Experts that learn from a sample once the gate has warmed up, the most probable ones; 0 lets all learn,
    weighted by the gate. All are computed either way."""
    gate_noise: float = 0.3
    """Standard deviation of the noise on the gate's logits while training."""
    gate_warmup: float = 0.3
    """Share of training over which the gate's weights take over from equal ones."""
    z_loss_weight: float = 1e-3
    """Weight of the squared log-sum-exp of the gate's logits."""
    balance_weight: float = 1e-2
    """Weight of the load-balancing loss."""
    latent: Literal["gaussian", "vq"] = "gaussian"
    """Latent: normal, or a vector of a codebook with a categorical prior."""
    latent_dim: int = 8
    """Width of the latent."""
    variances: Literal["learned", "unit"] = "learned"
    """Variances of the normal posterior and prior: learned, or all 1."""
    posterior_layers: int = 2
    """Transformer layers that read the latent off a recorded chunk."""
    prior_layers: int = 1
    """Transformer layers that predict the latent from the observation."""
    kl_weight: float = 0.03
    """beta, weight of the KL divergence; of a codebook's prior, of its cross-entropy."""
    kl_warmup: float = 0.2
    """Share of training over which that weight rises from 0."""
    free_bits: float = 0.0
    """Nats of KL divergence in each dimension that cost nothing; of a codebook, of the cross-entropy."""
    transport_weight: float = 0.2
    """Weight of the Sinkhorn divergence between one-step predictions and recorded chunks (K-OT)."""
    transport_blur: float = 0.05
    """Length, in normalized actions, below which that divergence does not look."""

    num_codes: int = 16
    """vq: K, code vectors in the codebook."""
    commitment_weight: float = 0.25
    """vq: weight of the distance between the posterior's output and its code."""
    posterior_decay: float = 0.999
    """vq: decay of the averaged posterior whose codes the prior learns."""
    code_window: int = 100
    """vq: steps over which the use of codes is counted."""
    replace_until: float = 0.5
    """vq: share of training during which a code is replaced that a window used less than a tenth of 1 / K."""


class Gate(nn.Module):
    """Which expert a latent is for.

    Attributes:
        usage: (E,), shares of the samples whose most probable expert each was, over all processes, between
            the last two lines of the log.
        counts: (E,), such samples since then.
    """

    def __init__(self, latent_dim: int, num_experts: int, sharpness: float = 3.0):
        """Make a gate that is decided from the start.

        One that starts undecided stays so: experts that all learn everything give it nothing to choose by. A
        decided one cuts the latents into as many cones; which latent lies in which, the posterior learns.

        Args:
            sharpness: standard deviation of its logits, for latents of unit variance.
        """
        super().__init__()
        self.logits = nn.Linear(latent_dim, num_experts)
        nn.init.normal_(self.logits.weight, std=sharpness / latent_dim**0.5)
        nn.init.zeros_(self.logits.bias)
        self.register_buffer("usage", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("counts", torch.zeros(num_experts))

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, E) of latents (B, latent_dim)."""
        return self.logits(z).float()

    @torch.no_grad()
    def end_window(self) -> dict[str, Tensor]:
        """Look at how experts were used since the last call; nothing waits for the device."""
        self.usage.copy_(self.counts / self.counts.sum().clamp(min=1))
        self.counts.zero_()
        return {
            **{f"experts/use_{e}": use for e, use in enumerate(self.usage)},
            "experts/usage_entropy": torch.special.entr(self.usage).sum(),
            "experts/most_used": self.usage.max(),
            "experts/least_used": self.usage.min(),
        }


class MoEActionDecoder(nn.Module):
    """E decoders, run as one, over one embedding of noisy actions, flow time, summary and latent.

    With fewer layers of its own than there are, an expert's are the last: the first ones belong to the
    embedding, and what is the same in every mode is not learned E times.
    """

    def __init__(self, config: Config, action_dim: int):
        super().__init__()
        d_model, num_experts = config.d_model, config.num_experts

        def linear(features_in: int, features_out: int) -> StackedLinear:
            return StackedLinear(num_experts, features_in, features_out)

        self.causal = config.attention == "causal"
        self.action_in = nn.Linear(action_dim, d_model)
        self.position = nn.Parameter(torch.randn(config.horizon, d_model) * 0.02)
        self.summary_in = nn.Linear(d_model, d_model)
        self.time = TimeEmbedding(d_model)
        self.latent_in = nn.Sequential(
            nn.Linear(config.latent_dim, d_model), nn.SiLU(), nn.Linear(d_model, d_model)
        )
        num_own = config.decoder_layers if config.expert_layers is None else config.expert_layers
        self.shared = nn.ModuleList(
            DecoderBlock(d_model, config.num_heads) for _ in range(config.decoder_layers - num_own)
        )
        self.experts = nn.ModuleList(DecoderBlock(d_model, config.num_heads, linear) for _ in range(num_own))
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.velocity_out = linear(d_model, action_dim)
        nn.init.zeros_(self.velocity_out.weight)
        nn.init.zeros_(self.velocity_out.bias)

    @property
    def num_experts(self) -> int:
        return len(self.velocity_out.weight)

    def context(self, observation: Observation) -> Context:
        """What `forward` needs of B observations: for the shared layers, then for those of all experts."""
        memory = observation.memory
        keys_values = [block.cross_attention.keys_values(memory) for block in self.shared]
        memory = memory.expand(self.num_experts, -1, -1, -1)
        keys_values += [block.cross_attention.keys_values(memory) for block in self.experts]
        return Context(keys_values, self.summary_in(observation.summary).unsqueeze(1))

    def forward(
        self, x_t: Tensor, t: Tensor, context: Context, z: Tensor, is_pad: Tensor | None = None
    ) -> Tensor:
        """Velocity of every expert, (E, B * M, T, A).

        Args:
            x_t, t: points (B * M, T, A) and flow times (B * M,), M draws for each of B observations.
            context: from `context`.
            z: latents (B * M, latent_dim).
            is_pad: (B * M, T), True for steps past the episode's end.
        """
        key_mask = None if is_pad is None or self.causal else ~is_pad
        num_draws = len(x_t) // len(context.summary)
        x = self.action_in(x_t) + self.position + context.summary.repeat_interleave(num_draws, dim=0)
        condition = self.time(t) + self.latent_in(z)
        num_shared = len(self.shared)
        for block, keys_values in zip(self.shared, context.keys_values[:num_shared], strict=True):
            x = block(x, condition, keys_values, key_mask, self.causal)
        x = x.expand(self.num_experts, -1, -1, -1)
        condition = condition.expand(self.num_experts, -1, -1)
        for block, keys_values in zip(self.experts, context.keys_values[num_shared:], strict=True):
            x = block(x, condition, keys_values, key_mask, self.causal)
        return self.velocity_out(self.norm(x))


class Prediction(NamedTuple):
    """What the policy makes of recorded chunks."""

    velocity: Tensor
    """Of every expert, (E, B * M, T, A)."""
    gate: Tensor
    """Logits of the experts, (B * M, E)."""
    latent: Tensor
    """Mean of the posterior, (B, latent_dim); of a codebook, before quantization."""
    divergence: Tensor
    """KL divergence of posterior from prior in each dimension, (B, latent_dim), nats; of a codebook, the
    prior's cross-entropy, (B, 1)."""
    code: Tensor | None
    """Of a codebook: index of the nearest code, (B,)."""
    quantized: Tensor | None
    """Its vector, (B, latent_dim)."""


class Policy(nn.Module):
    """Velocity fields of action chunks given camera images, joint states and a latent, and who of them acts.

    Its children are the components that can be frozen, initialised and rated one by one.
    """

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, pretrained: bool = True):
        """`pretrained` = False leaves the backbone's weights to the checkpoint that is loaded next."""
        super().__init__()
        self.vq, self.unit_variances = config.latent == "vq", config.variances == "unit"
        if not 0 <= config.top_k <= config.num_experts:
            raise UserError(f"--top-k {config.top_k}: there are {config.num_experts} experts.")
        if config.expert_layers is not None and not 1 <= config.expert_layers <= config.decoder_layers:
            raise UserError(
                f"--expert-layers {config.expert_layers}: it must lie between 1 and --decoder-layers "
                f"{config.decoder_layers}."
            )
        self.backbone = vision.build_backbone(
            config.vision.backbone, spec.image_size, pretrained, hf_config=spec.backbone_config
        )
        self.info_embedder = InfoEmbedder(
            [(self.backbone.token_dim, self.backbone.summary_dim)] * len(spec.cameras),
            spec.state_dim,
            spec.proprio_history,
            config.d_model,
            config.num_heads,
            config.encoder_layers,
        )
        parameters = config.latent_dim if self.vq or self.unit_variances else 2 * config.latent_dim
        self.posterior = ChunkEncoder(
            spec.state_dim,
            self.backbone.token_dim,
            spec.action_dim,
            spec.proprio_history + config.horizon,
            config.d_model,
            config.num_heads,
            config.posterior_layers,
            out_dim=parameters,
        )
        self.prior = ObservationHead(
            config.d_model,
            config.num_heads,
            config.prior_layers,
            out_dim=config.num_codes if self.vq else parameters,
        )
        if self.vq:
            self.posterior_average = copy.deepcopy(self.posterior).requires_grad_(False)
            self.codebook = Codebook(config.num_codes, config.latent_dim)
        self.gate = Gate(config.latent_dim, config.num_experts)
        self.moe_action_decoder = MoEActionDecoder(config, spec.action_dim)

    def encode(self, images: Tensor, proprio: Tensor) -> tuple[Tensor, Observation]:
        """Tokens of the head camera (B, L, D_v), and the whole observation, fused.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
        """
        tokens, summary = self.backbone(images.flatten(0, 1))  # all cameras at once, (B * N, ...)
        tokens, summary = (x.unflatten(0, images.shape[:2]).unbind(1) for x in (tokens, summary))
        return tokens[0], self.info_embedder(list(zip(tokens, summary, strict=True)), proprio)

    def normal(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each (B, latent_dim), from what posterior or prior give."""
        if self.unit_variances:
            return parameters, torch.zeros_like(parameters)
        mean, log_var = parameters.chunk(2, dim=-1)
        return mean, 8 * torch.tanh(log_var / 8)  # beyond e^8 is nothing but overflow

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        images: Tensor,
        proprio: Tensor,
        actions: Tensor,
        is_pad: Tensor,
    ) -> Prediction:
        """Predict the velocity for M draws per observation, given the latent of its recorded chunk.

        Args:
            x_t, t: points (B * M, T, A) and flow times (B * M,).
            images, proprio: the observations, as for `encode`.
            actions, is_pad: the recorded chunks (B, T, A), normalized, and their padding (B, T).
        """
        num_draws = len(x_t) // len(images)
        head_tokens, observation = self.encode(images, proprio)
        # Posterior and prior look at what the decoder made the encoder see, and do not change it: an encoder
        # that runs after a moving latent learns late to see what is to be done.
        seen = (proprio, head_tokens.detach(), actions, is_pad)
        prior = self.prior(observation.detach())
        if self.vq:
            z, latent, divergence, code, quantized = self._quantize(seen, prior, num_draws)
        else:
            latent, log_var = self.normal(self.posterior(*seen))
            divergence = losses.gaussian_kl(latent, log_var, *self.normal(prior))
            z, code, quantized = latent.repeat_interleave(num_draws, dim=0), None, None
            if self.training:
                deviation = (0.5 * log_var).exp().repeat_interleave(num_draws, dim=0)
                z = z + deviation * torch.randn_like(z)
        context = self.moe_action_decoder.context(observation)
        velocity = self.moe_action_decoder(x_t, t, context, z, is_pad.repeat_interleave(num_draws, dim=0))
        return Prediction(velocity, self.gate(z), latent, divergence, code, quantized)

    def _quantize(self, seen: tuple[Tensor, ...], prior: Tensor, num_draws: int) -> tuple[Tensor, ...]:
        """Latents (B * M, latent_dim) from the codebook, and the rest of `Prediction`."""
        latent = self.posterior(*seen)
        latent = F.layer_norm(latent, latent.shape[-1:])  # a fixed scale, which no loss can escape from
        code = losses.nearest_code(latent, self.codebook.vectors)
        quantized = self.codebook.vectors[code]
        with torch.no_grad():
            averaged = self.posterior_average(*seen)
            target = losses.nearest_code(F.layer_norm(averaged, averaged.shape[-1:]), self.codebook.vectors)
        divergence = F.cross_entropy(prior, target, reduction="none").unsqueeze(1)
        z = quantized.repeat_interleave(num_draws, dim=0)
        if self.training:
            repeated = latent.repeat_interleave(num_draws, dim=0)
            z = losses.noise_substitution(repeated, z, torch.randn_like(z))
        return z, latent, divergence, code, quantized

    def draw_latent(self, prior: Tensor, noise: Tensor) -> Tensor:
        """Latents (B, latent_dim) from what the prior gives, (B, ...).

        Args:
            noise: (B, latent_dim), standard normal; a codebook looks at the first of each row.
        """
        if self.vq:
            return self.codebook.draw(prior, torch.special.ndtr(noise[:, 0]))
        mean, log_var = self.normal(prior)
        return mean + (0.5 * log_var).exp() * noise


class Loss(NamedTuple):
    """What `compute_loss` returns."""

    total: Tensor
    metrics: dict[str, Tensor]
    """Its parts, and how latent and gate do; scalars."""
    experts: Tensor
    """Samples whose most probable expert each is, (E,)."""
    codes: Tensor | None
    """Of a codebook: samples assigned to each code, (K,)."""


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    progress: float = 1.0,
    draws: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
) -> Loss:
    """Velocity, latent, transport and router losses.

    Args:
        progress: share of training that is done, for the warm-up of gate and KL divergence.
        draws: noise (B * M, T, A) and flow time (B * M,), where they must be the same every time.
        count: real steps to divide by, see `losses.masked_mse`.
    """
    images = vision.augment(batch.images, config.vision) if policy.training else vision.to_float(batch.images)
    proprio = normalizer.proprio(batch.proprio)
    chunks = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    num_draws = config.flow_samples if draws is None else len(draws[0]) // len(images)
    x_1 = chunks.repeat_interleave(num_draws, dim=0)  # (B * M, T, A)
    is_pad = batch.is_pad.repeat_interleave(num_draws, dim=0)  # (B * M, T)
    if draws is None:
        x_0 = torch.randn_like(x_1)
        t = flow.sample_time(len(x_1), x_1.device, config.time_distribution, config.time_beta)  # (B * M,)
    else:
        x_0, t = draws
    x_t, velocity = flow.linear_path(x_0, x_1, t)

    # One draw more for each observation, for the one-step prediction.
    start, x_t, t = flow.prepend_start(x_0, x_t, t, num_draws)  # (B, T, A), (B * (1 + M), ...)
    prediction = policy(x_t, t, images, proprio, chunks, batch.is_pad)

    logits = prediction.gate  # (B * (1 + M), E)
    if policy.training:
        logits = logits + config.gate_noise * torch.randn_like(logits)
    probabilities = gates = logits.softmax(dim=1)
    if config.top_k and config.top_k < config.num_experts:
        least = logits.topk(config.top_k, dim=1).values[:, -1:]
        gates = logits.masked_fill(logits < least, -torch.inf).softmax(dim=1)
    # At first all experts learn alike: while errors are large, the one that happens to be ahead would be
    # given every sample, learn all the more, and never be caught up with.
    trust = min(progress / max(config.gate_warmup, 1e-9), 1.0)
    gates = trust * gates + (1 - trust) / config.num_experts
    predicted = prediction.velocity.unflatten(1, (-1, 1 + num_draws))  # (E, B, 1 + M, T, A)
    per_draw = gates.unflatten(0, (-1, 1 + num_draws))  # (B, 1 + M, E)
    velocity_loss = losses.expert_mse(
        predicted[:, :, 1:].flatten(1, 2),
        velocity,
        ~is_pad,
        per_draw[:, 1:].flatten(0, 1),
        None if count is None else count * num_draws,
    )
    mixed = torch.einsum("be,ebta->bta", per_draw[:, 0], predicted[:, :, 0].float())
    state = proprio[:, -1]
    transport = losses.sinkhorn_divergence(
        losses.transport_points(start + mixed, state),
        losses.transport_points(chunks, state),
        mass=~batch.is_pad.any(dim=1),  # chunks that run past the end of an episode have no mass
        blur=config.transport_blur,
    )
    divergence = prediction.divergence.mean(dim=0)  # of each dimension
    beta = config.kl_weight * min(progress / max(config.kl_warmup, 1e-9), 1.0)
    router_z, balance = losses.router_z_loss(logits), losses.load_balance(probabilities)
    total = (
        velocity_loss
        + beta * divergence.clamp(min=config.free_bits).sum()
        + config.transport_weight * transport.divergence
        + config.z_loss_weight * router_z
        + config.balance_weight * balance
    )
    metrics = {
        "loss/velocity": velocity_loss,
        "loss/kl": divergence.sum(),
        "loss/transport": transport.divergence,
        "loss/router_z": router_z,
        "loss/balance": balance,
        "gate/entropy": torch.special.entr(probabilities).sum(dim=1).mean(),
        "transport/marginal_error": transport.marginal_error,
    }
    codes = None
    if prediction.code is None:
        metrics["latent/active_dims"] = (divergence > 0.05).sum()
    else:
        commitment = (prediction.latent - prediction.quantized.detach()).square().mean()
        total = total + config.commitment_weight * commitment
        metrics["loss/commitment"] = commitment
        codes = F.one_hot(prediction.code, config.num_codes).sum(dim=0)
    experts = F.one_hot(prediction.gate.argmax(dim=1), config.num_experts).sum(dim=0)
    return Loss(total, metrics, experts, codes)


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: torch.Generator | None = None,
    x_0: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample one normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        steps: integration steps, instead of the configured number.
        generator: source of the noise, on the device of the images.
        x_0: the noise itself, (B, T, A).
        noise: that of the latent, (B, latent_dim).

    Returns:
        (B, T, A) float32, unitless: to be un-normalized.
    """
    _, observation = policy.encode(vision.to_float(images), proprio)
    if x_0 is None:
        shape = (len(images), config.horizon, policy.moe_action_decoder.action_in.in_features)
        x_0 = torch.randn(shape, device=images.device, generator=generator)
    if noise is None:
        noise = torch.randn(len(images), config.latent_dim, device=images.device, generator=generator)
    z = policy.draw_latent(policy.prior(observation), noise)
    return integrate_experts(policy, observation, z, policy.gate(z).argmax(dim=1), x_0, config, steps)


def integrate_experts(
    policy: Policy,
    observation: Observation,
    z: Tensor,
    experts: Tensor,
    x_0: Tensor,
    config: Config,
    steps: int | None = None,
) -> Tensor:
    """Chunks (B, T, A) from noise x_0 (B, T, A) and latents z (B, latent_dim), each by its expert (B,).

    Only the experts that are chosen are computed.
    """
    chunks = torch.empty_like(x_0)
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero()[:, 0]
        decoder = take_expert(policy.moe_action_decoder, expert)
        context = decoder.context(Observation(observation.memory[rows], observation.summary[rows]))

        def velocity(x: Tensor, t: Tensor, decoder=decoder, context=context, z=z[rows]) -> Tensor:
            return decoder(x, t, context, z)[0].float()

        chunks[rows] = flow.integrate(velocity, x_0[rows], steps or config.sample_steps, config.sample_method)
    return chunks


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, accelerator
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise and flow times every time.

    `loss_velocity` is given the latent of the recorded chunk itself, `action_mae` is the error of chunks
    whose latent came from the prior. At most `--eval-samples` evenly spaced steps are used, shared out over
    the processes. The training noise is not touched: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    t = flow.sample_time(num, "cpu", config.time_distribution, config.time_beta, generator)
    noise = torch.randn(num, config.latent_dim, generator=generator)
    sums = torch.zeros(5, device=accelerator.device)  # loss, absolute error, real elements; KL, samples
    share = (config.optim.batch_size, accelerator.process_index, accelerator.num_processes)
    for rows, batch in evenly_spaced(dataset, num, *share):
        batch = batch.to(accelerator.device)
        draws = (x_0[rows].to(accelerator.device), t[rows].to(accelerator.device))
        proprio = normalizer.proprio(batch.proprio)
        with accelerator.autocast():
            metrics = compute_loss(policy, batch, normalizer, config, draws=draws).metrics
            sampled = sample_actions(
                policy,
                batch.images,
                proprio,
                config,
                x_0=draws[0],
                noise=noise[rows].to(accelerator.device),
            )
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        real, one = (~batch.is_pad).sum(), torch.ones_like(error)
        sums[:3] += torch.stack([metrics["loss/velocity"], error, one]) * real
        sums[3:] += torch.stack([metrics["loss/kl"], one]) * len(rows)
    loss, error, real, divergence, samples = accelerator.reduce(sums).tolist()
    return {"loss_velocity": loss / real, "loss_kl": divergence / samples, "action_mae": error / real}


@torch.no_grad()
def draw_alternatives(
    policy: Policy,
    dataset: ChunkDataset,
    normalizer: Normalizer,
    config: Config,
    path: Path,
    num_latents: int = 512,
) -> None:
    """Picture of what each expert does at the start of an episode, how often it is chosen there, and at all.

    An expert is shown with the latent, of many from the prior, that the gate finds most its own.
    """
    batch = dataset.__getitems__([0]).to(policy.gate.usage.device)
    proprio = normalizer.proprio(batch.proprio)
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(batch.actions.shape, generator=generator).to(proprio.device)
    noise = torch.randn(num_latents, config.latent_dim, generator=generator).to(proprio.device)
    _, observation = policy.encode(vision.to_float(batch.images), proprio)
    z = policy.draw_latent(policy.prior(observation).expand(num_latents, -1), noise)
    gate = policy.gate(z)
    shares = F.one_hot(gate.argmax(dim=1), config.num_experts).float().mean(dim=0)
    own = gate.log_softmax(dim=1).argmax(dim=0)  # for each expert a latent
    experts = torch.arange(config.num_experts, device=z.device)
    repeated = Observation(*(x.expand(config.num_experts, *x.shape[1:]) for x in observation))
    chunks = integrate_experts(
        policy, repeated, z[own], experts, x_0.expand(config.num_experts, -1, -1), config
    )
    chunks = normalizer.unnormalize_actions(chunks, batch.proprio.expand(len(chunks), -1, -1))
    draw_chunks(
        path,
        chunks.cpu().numpy(),
        recorded=batch.actions[0][~batch.is_pad[0]].cpu().numpy(),
        names=dataset.store.action_names,
        scale=normalizer.action_scale.cpu().numpy(),
        shares={"prior": shares.cpu().numpy(), "usage": policy.gate.usage.cpu().numpy()},
        title=f"the chunk of each of {len(chunks)} experts at the start of a held-out episode",
    )


@torch.no_grad()
def latents_of_episodes(
    policy: Policy, dataset: ChunkDataset, episodes: np.ndarray, normalizer: Normalizer, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means (E, latent_dim) of the chunks with which episodes begin, and their experts (E,)."""
    first = np.searchsorted(dataset.rows, dataset.store.episode_starts[episodes])
    latents = []
    for rows in torch.from_numpy(first).split(config.optim.batch_size):
        batch = dataset.__getitems__(rows.tolist()).to(policy.gate.usage.device)
        proprio = normalizer.proprio(batch.proprio)
        head_tokens, _ = policy.encode(vision.to_float(batch.images), proprio)
        chunks = normalizer.actions(batch.actions, batch.proprio)
        latent = policy.posterior(proprio, head_tokens, chunks, batch.is_pad)
        if policy.vq:
            latent = F.layer_norm(latent, latent.shape[-1:])
            latents.append(policy.codebook.vectors[losses.nearest_code(latent, policy.codebook.vectors)])
        else:
            latents.append(policy.normal(latent)[0])
    z = torch.cat(latents)
    return z.cpu().numpy(), policy.gate(z).argmax(dim=1).cpu().numpy()


def draw_experts(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, path: Path
) -> dict[str, float]:
    """Picture of the latents with which episodes begin, coloured by expert and, if it is known, by mode.

    At most `--eval-samples` episodes are looked at, evenly spaced.

    Returns:
        How much experts and modes say of each other, where modes are known.
    """
    store = dataset.store
    episodes = np.unique(store.episode_of(dataset.rows))  # those that are long enough to have samples
    chosen = np.linspace(0, len(episodes) - 1, min(config.run.eval_samples, len(episodes))).astype(int)
    latents, experts = latents_of_episodes(policy, dataset, episodes[chosen], normalizer, config)
    labels, metrics = {"expert": experts}, {}
    if config.data.dataset == ("demo",):
        spans = [slice(*store.episode_starts[e : e + 2]) for e in episodes[chosen]]
        labels["mode of the demonstration"] = modes([store.state[span] for span in spans])
        metrics["experts/mode_nmi"] = normalized_mutual_information(*labels.values())
    draw_latents(path, latents, labels, "latents of the chunks with which episodes begin")
    return metrics


def report_experts(step: int, usage: dict[str, float], num_experts: int) -> None:
    """Say so when experts are idle: what the gate never chooses learns nothing, and costs time."""
    idle = [e for e in range(num_experts) if usage.get(f"experts/use_{e}", 1.0) < 0.1 / num_experts]
    if idle:
        tqdm.write(
            f"step {step}  experts {', '.join(map(str, idle))} of {num_experts} are hardly used (below "
            f"{10 / num_experts:.1f} %): raise --balance-weight or --gate-noise, or lower --num-experts"
        )


def main(config: Config) -> None:
    # Processes and precision. Weights are initialised alike everywhere, noise differs from rank to rank.
    accelerator = make_accelerator(config.run, config.optim.grad_accumulation)
    set_seed(config.run.seed)

    # Data
    store = open_dataset(config.data)
    check_same_data(config.run, store)
    train_episodes, held_out = split_episodes(store, config.data.val_fraction, config.run.seed)
    history, offset = config.data.proprio_history, config.data.action_offset
    train_set = ChunkDataset(store, train_episodes, config.horizon, history, offset)
    val_set = ChunkDataset(store, held_out, config.horizon, history, offset) if len(held_out) else None
    normalizer = Normalizer.fit(train_set, config.normalization, config.data.relative_actions)
    normalizer.to(accelerator.device)
    global_batch = config.optim.batch_size * config.optim.grad_accumulation * accelerator.num_processes

    # Policy
    spec = checkpoint.PolicySpec.of(train_set, config.run)
    policy = Policy(config, spec, pretrained=not config.run.resume)
    spec = spec.with_backbone(policy.backbone)
    if not config.run.resume:
        checkpoint.initialise(policy, config.run.init_from)
        if policy.vq:
            policy.posterior_average.load_state_dict(policy.posterior.state_dict())
    checkpoint.freeze(policy, config.run.freeze)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        policy = nn.SyncBatchNorm.convert_sync_batchnorm(policy)  # pretrained convolutional backbones have it
    policy.to(accelerator.device)

    # Optimizer, and the weights to export; their average is made before Accelerate patches `forward`
    optimizer = build_optimizer(policy, config.optim)
    averaged = AveragedPolicy(policy, optimizer, config.optim.ema_decay)
    if config.run.compile:
        policy.compile()
    ddp_policy, optimizer = accelerator.prepare(policy, optimizer)

    # Start, or go on where an earlier run left off
    step = samples = 0
    set_seed(config.run.seed, device_specific=True)
    if config.run.resume:
        step, samples = checkpoint.restore(accelerator, config.run.run_dir, averaged)
    total_steps = resolve_steps(
        config.optim.steps, config.optim.epochs, len(train_set), global_batch, step, samples
    )
    scheduler = build_scheduler(optimizer.optimizer, policy, config.optim, total_steps, step)
    loader = make_loader(
        train_set,
        config.optim.batch_size,
        config.run.seed,
        config.data.num_workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start=samples,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    run_dir = create_run_dir(accelerator, config, __file__, store, global_batch, total_steps)
    tracker = Tracker(accelerator, run_dir, config, total_steps, step, samples, loader)
    clip = GradientClipper(policy, optimizer.optimizer, config.optim.grad_clip)
    guard = Guard(accelerator, config.run, tracker)

    # Training
    policy.train()
    for name in config.run.freeze:
        getattr(policy, name).eval()
    while step < total_steps and not guard.stopping:
        with accelerator.accumulate(ddp_policy):
            with tracker.waiting():
                batch = next(batches).to(accelerator.device)
            count = accelerator.reduce((~batch.is_pad).sum().float(), "mean")
            loss = compute_loss(ddp_policy, batch, normalizer, config, step / total_steps, count=count)
            tracker.add({"loss": loss.total, **loss.metrics})
            accelerator.backward(or_nan(loss.total))
            policy.gate.counts += accelerator.reduce(loss.experts)
            if policy.vq:
                error = loss.metrics["loss/commitment"].detach()
                policy.codebook.count(accelerator.reduce(loss.codes), accelerator.reduce(error, "mean"))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()  # fp16 scales them
                tracker.add(clip())
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue  # a step is an optimizer update, not a micro-batch
        rates = learning_rates(optimizer.optimizer)
        scheduler.step()
        if policy.vq:
            posteriors = policy.posterior_average.parameters(), policy.posterior.parameters()
            move_average(*posteriors, step, config.posterior_decay)
        averaged.update()
        step, samples = step + 1, samples + global_batch
        if policy.vq and step % config.code_window == 0:
            early = step <= config.replace_until * total_steps
            tracker.add(
                end_window(policy.codebook, policy.prior.out, averaged, config.run.seed + step, early)
            )

        if step % config.run.log_every == 0 or step == total_steps:
            tracker.add(policy.gate.end_window())
            logged = tracker.log(step, samples, rates)
            if accelerator.is_main_process:
                report_experts(step, logged, config.num_experts)
        clip.remember()
        guard.end_step()
        with tracker.paused():
            if val_set and (step % config.run.eval_every == 0 or step == total_steps):
                metrics = evaluate(averaged.model, val_set, normalizer, config, accelerator)
                if accelerator.is_main_process:
                    model, of_data = averaged.model, (normalizer, config)
                    draw_alternatives(model, val_set, *of_data, run_dir / "alternatives.png")
                    metrics |= draw_experts(model, train_set, *of_data, run_dir / "latents.png")
                tracker.log_validation(step, metrics)
            if step % config.run.save_every == 0 or step == total_steps or guard.stopping:
                checkpoint.save(
                    accelerator, run_dir, step, samples, averaged, normalizer, spec, config, tracker
                )
    tracker.close()
    guard.close(step, total_steps, run_dir)


if __name__ == "__main__":
    cli(main, Config)
