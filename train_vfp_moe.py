"""Variational flow matching with a mixture of experts: a latent names the way, a gate picks the decoder.

Plain flow matching has one velocity field for all the ways to do a task; near t = 0, where x_t is still
noise, it points at their average. Here a latent z names the way. In training, a posterior infers it from
the recorded chunk x_1; a prior predicts it from the observation s alone. With x_t, t and u = x_1 - x_0 as
in plain flow matching, and a gate g that chooses by z among E decoders v_e (VFP, Zhai et al. 2025),

    L = sum_e w_e mean (v_e(x_t, t, s, z) - u)^2                       z ~ q = q(z | sg(s), x_1)
        + 0.2 S(x_0 + sum_e w_e v_e(x_0, 0, s, z), x_1)                K-OT: Sinkhorn divergence of clouds
        + beta KL(q || sg(p)) + 0.1 KL(sg(q) || p)                     diagonal normals; p = p(z | s)
        + 1e-3 (log sum_e exp l_e)^2 + 1e-2 E sum_e f_e mean g_e       l: noisy logits, g = softmax(l)

where sg stops the gradient and the clouds are the chunks of a process's micro-batch, each with its state.
w moves from 1 / E to g over the gate's warm-up, and f_e is the share of samples for which g_e is the largest.

The two divergences are one number with two gradients (KL balancing, Hafner et al. 2021). The first, whose
weight beta is warmed up, keeps q near p. The second teaches p and the encoder what q infers. Without it z
may tell the decoder what s need not show then, such as where an object is, and p never finds out.

The last line keeps logits small (Zoph et al. 2022) and experts in use (Fedus et al. 2021). To act, we draw z
from the prior and integrate dx/dt = v_e of the expert with the largest l_e: E experts cost as much as one.

Differs from `train_cfg_vqvae.py` in: a normal latent (or codes, `--latent vq`), whose divergence from the
prior has a weight, warm-up and free bits; a prior that trains the encoder; experts, a gate and its losses in
place of null token and guidance; a warning about idle experts; pictures of experts and latents.

    accelerate launch train_vfp_moe.py --lr 2e-3 --schedule schedule-free
    accelerate launch train_vfp_moe.py --dataset me/fold_towel --image-size 224 --num-experts 8
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common import flow, losses, plots, vision
from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, RunConfig, Share, cli, options
from common.console import say
from common.data import Batch, ChunkDataset, DataConfig
from common.errors import UserError
from common.instructions import TaskConfig, drop_some
from common.latent import CodebookLatent, Inferred, NormalLatent, Usage, first_latents
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig, ramp
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import (
    ChunkEncoder,
    Context,
    DecoderBlock,
    InfoEmbedder,
    Observation,
    ObservationHead,
    Size,
    StackedLinear,
    TimeEmbedding,
    mlp,
    take_expert,
    zeroed,
)
from common.vision import VisionConfig


@options
class Config:
    """Train a flow-matching policy with a latent and a mixture of experts on multi-camera demonstrations."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    run: Flat[RunConfig] = field(default_factory=RunConfig)
    rollout: Flat[RolloutConfig] = field(default_factory=RolloutConfig)
    tasks: Flat[TaskConfig] = field(default_factory=TaskConfig)
    delay: Flat[flow.DelayConfig] = field(default_factory=flow.DelayConfig)

    horizon: PositiveInt = 16
    """Actions predicted per chunk, in control steps."""
    normalization: Normalization = "mean-std"
    """How state and action are scaled: see common/normalize.py."""
    flow_samples: PositiveInt = 8
    """M: draws of (noise, flow time) per observation and step. The encoder runs once for all of them, so with
    a large backbone more draws are nearly free."""
    time_distribution: flow.TimeDistribution = "beta"
    """Distribution of the flow time in training."""
    time_beta: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.5)
    """(a, b) of the Beta distribution; b > a favours the noisy end, t = 0."""
    d_model: PositiveInt = 128
    """Width of encoder and decoder tokens."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide --d-model."""
    encoder_layers: PositiveInt = 2
    """Transformer layers that fuse cameras and joint states."""
    decoder_layers: PositiveInt = 3
    """Transformer layers that predict the velocity."""
    attention: Literal["causal", "full"] = "causal"
    """Self-attention within a chunk: each action attends to itself and earlier ones, or to all."""
    sample_steps: MayChange[PositiveInt] = 10
    """Integration steps when sampling actions."""
    sample_method: MayChange[flow.Integrator] = "euler"
    """Integrator when sampling actions; midpoint and heun evaluate the network twice per step."""
    transport_weight: NonNegativeFloat = 0.2
    """Weight of the Sinkhorn divergence between one-step predictions and recorded chunks (K-OT)."""
    transport_blur: PositiveFloat = 0.05
    """Length, in normalized actions, below which differences are blurred."""
    posterior_layers: PositiveInt = 2
    """Transformer layers that infer the latent from a recorded chunk."""
    prior_layers: PositiveInt = 1
    """Transformer layers that predict the latent from the observation."""

    num_experts: PositiveInt = 4
    """E, decoders that the gate chooses among."""
    expert_layers: PositiveInt | None = None
    """Decoder layers, counted from the last, of which each expert has its own. Default: all."""
    gate_noise: NonNegativeFloat = 0.3
    """Standard deviation of the noise on the gate's logits while training."""
    gate_warmup: Share = 0.3
    """Share of training over which the experts' weights change from equal to the gate's."""
    z_loss_weight: NonNegativeFloat = 1e-3
    """Weight of the squared log-sum-exp of the gate's logits."""
    balance_weight: NonNegativeFloat = 1e-2
    """Weight of the load-balancing loss."""
    kl_weight: NonNegativeFloat = 0.03
    """beta: weight of the KL divergence that keeps a normal posterior near the prior; codes have none."""
    kl_warmup: Share = 0.2
    """Share of training over which --kl-weight rises from 0."""
    free_bits: NonNegativeFloat = 0.0
    """Nats of the KL divergence that cost the posterior nothing in each dimension."""
    prior_weight: PositiveFloat = 0.1
    """Weight of the loss by which the prior, and with it the encoder, learns what the posterior infers."""

    latent: Literal["gaussian", "vq"] = "gaussian"
    """Kind of latent: normal, or a vector of a codebook. The options from --num-codes on apply to vq."""
    variances: Literal["learned", "unit"] = "learned"
    """Variances of the normal posterior and prior: learned, or all 1."""
    latent_dim: PositiveInt = 8
    """Width of the latent."""
    num_codes: PositiveInt = 16
    """K, code vectors in the codebook."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the distance between the posterior's output and its code."""
    posterior_decay: Share = 0.999
    """Decay of the averaged posterior whose codes the prior learns."""
    code_window: PositiveInt = 100
    """Steps over which the use of codes is counted."""
    replace_until: Share = 0.5
    """For this first share of training, replace codes that a window used less than a tenth of 1 / K."""


class Gate(nn.Module):
    """Which expert a latent goes to: a linear map whose initial weights are large, so that it is decided.

    An undecided gate stays undecided: if all experts learn everything, it has nothing to choose by. A
    decided one divides the latents into E cones, and the posterior learns which chunk goes into which.
    `usage` counts, between two lines of the log, for how many samples each expert is the most probable.
    """

    def __init__(self, latent_dim: int, num_experts: int):
        super().__init__()
        self.logits = nn.Linear(latent_dim, num_experts)
        nn.init.normal_(self.logits.weight, std=3 / latent_dim**0.5)  # logits ~ N(0, 9)
        nn.init.zeros_(self.logits.bias)
        self.usage = Usage(num_experts)

    def forward(self, z: Tensor) -> Tensor:
        """Logits (B, E) of latents (B, latent_dim)."""
        return self.logits(z).float()

    def end_window(self) -> dict[str, Tensor]:
        """How experts were used since the last call, to log; does not wait for the device."""
        shares, _ = self.usage.end_window()
        return {
            **{f"experts/use_{e}": share for e, share in enumerate(shares)},
            "experts/usage_entropy": torch.special.entr(shares).sum(),
            "experts/most_used": shares.max(),
            "experts/least_used": shares.min(),
        }


class MoEActionDecoder(nn.Module):
    """E decoders, run as one, over one embedding of noisy actions, flow time, summary and latent.

    Each expert has its own last `--expert-layers` blocks. The blocks before learn what all modes share.
    """

    def __init__(self, config: Config, action_dim: int):
        super().__init__()
        d_model, num_heads = config.d_model, config.num_heads
        self.causal = config.attention == "causal"
        num_own = config.expert_layers or config.decoder_layers
        linear = partial(StackedLinear, config.num_experts)
        self.action_in = nn.Linear(action_dim, d_model)
        self.position = nn.Parameter(torch.randn(config.horizon, d_model) * 0.02)
        self.summary_in = nn.Linear(d_model, d_model)
        self.time = TimeEmbedding(d_model)
        self.latent_in = mlp(config.latent_dim, d_model, d_model)
        self.shared = nn.ModuleList(
            DecoderBlock(d_model, num_heads) for _ in range(config.decoder_layers - num_own)
        )
        self.experts = nn.ModuleList(DecoderBlock(d_model, num_heads, linear) for _ in range(num_own))
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.velocity_out = zeroed(linear(d_model, action_dim))

    def context(self, observation: Observation) -> Context:
        """What `forward` needs from B observations: for the shared layers, then for those of all experts."""
        memory = observation.memory
        shared = [block.cross_attention.keys_values(memory) for block in self.shared]
        memory = memory.expand(len(self.velocity_out.weight), -1, -1, -1)
        own = [block.cross_attention.keys_values(memory) for block in self.experts]
        return Context(shared + own, self.summary_in(observation.summary).unsqueeze(1))

    def forward(self, x_t: Tensor, t: Tensor, context: Context, is_pad: Tensor | None, z: Tensor) -> Tensor:
        """Velocity of every expert, (E, B * M, T, A); arguments as for `ActionDecoder`."""
        mask = None if is_pad is None or self.causal else ~is_pad
        flow_samples = len(x_t) // len(context.summary)
        x = self.action_in(x_t) + self.position + context.summary.repeat_interleave(flow_samples, dim=0)
        condition, given = self.time.condition(t, self.latent_in(z))
        keys_values = iter(context.keys_values)
        for block in self.shared:
            x = block(x, condition, next(keys_values), mask, self.causal, given)
        num_experts = len(self.velocity_out.weight)  # one, if `take_expert` has chosen it
        x, condition = (part.expand(num_experts, *part.shape) for part in (x, condition))
        for block in self.experts:
            x = block(x, condition, next(keys_values), mask, self.causal, given)
        return self.velocity_out(self.norm(x))


class Policy(nn.Module):
    """Velocity field of action chunks given camera images, joint states and a latent.

    Its children are the components. Each one can be frozen, initialised and given its own learning rate.
    """

    def __init__(self, config: Config, spec: PolicySpec, pretrained: bool = True):
        """`pretrained`: load the backbone's weights; False if a checkpoint is loaded next."""
        super().__init__()
        if (config.expert_layers or 0) > config.decoder_layers:
            raise UserError(f"--expert-layers must be at most --decoder-layers, {config.decoder_layers}.")
        self.backbone = vision.build_backbone(
            config.vision.backbone, spec.image_size, pretrained, hf_config=spec.backbone_config
        )
        widths = [(self.backbone.token_dim, self.backbone.summary_dim)] * spec.views
        size = Size(config.d_model, config.num_heads)
        proprio, chunk = (spec.proprio_history, spec.state_dim), (config.horizon, spec.action_dim)
        told = {"tasks": spec.tasks, "film_dims": [self.backbone.film_dim]}
        self.info_embedder = InfoEmbedder(widths, proprio, size, config.encoder_layers, **told)
        if config.latent == "vq":
            posterior_dim, prior_dim = config.latent_dim, config.num_codes
        else:  # means, and the logarithms of variances
            posterior_dim = prior_dim = (2 if config.variances == "learned" else 1) * config.latent_dim
        self.posterior = ChunkEncoder(
            proprio, self.backbone.token_dim, chunk, size, config.posterior_layers, posterior_dim
        )
        given = (config.delay.max_delay, spec.action_dim)
        self.prior = ObservationHead(size, config.prior_layers, prior_dim, given)
        if config.latent == "vq":
            self.latent = CodebookLatent(config.num_codes, config.latent_dim, self.posterior)
        else:
            self.latent = NormalLatent(config.variances == "unit")
        self.gate = Gate(config.latent_dim, config.num_experts)
        self.action_decoder = MoEActionDecoder(config, spec.action_dim)

    def encode(self, images: Tensor, proprio: Tensor, task=None) -> tuple[Tensor, Observation]:
        """Tokens of the head camera (B, L, D_v), and the whole observation, fused.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
            task: the instructions, see `InstructionEmbedder`.
        """
        views = vision.look([self.backbone], images, self.info_embedder.film(task))  # all cameras at once
        return views[0][0], self.info_embedder(views, proprio, task=task)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        images: Tensor,
        proprio: Tensor,
        actions: Tensor,
        is_pad: Tensor,
        train: bool,
        task: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Inferred]:
        """Velocity of every expert (E, B * M, T, A), the gate's logits (B * M, E), and the chunks' latents.

        Args:
            x_t, t: points (B * M, T, A) and flow times, (B * M,) or (B * M, T).
            images, proprio, task: the observations, as for `encode`.
            actions, is_pad: the recorded chunks (B, T, A), normalized, and their padding (B, T).
            train: draw the latents, instead of taking the most probable.
        """
        flow_samples = len(x_t) // len(images)  # including the draw of `flow.prepend_start`
        head_tokens, observation = self.encode(images, proprio, task)
        # The posterior reads the encoder's features but does not train them: they must not serve a network
        # that is absent when acting.
        seen = (proprio, head_tokens.detach(), actions, is_pad)
        prefix = flow.prefix_in_training(actions, t)  # the robot is on its way: not all ways fit
        posterior, prior = self.posterior(*seen), self.prior(observation, prefix)
        latent = self.latent.infer(posterior, prior, seen, flow_samples, train)
        context = self.action_decoder.context(observation)
        is_pad = is_pad.repeat_interleave(flow_samples, dim=0)
        return self.action_decoder(x_t, t, context, is_pad, latent.z), self.gate(latent.z), latent


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    progress: float | Tensor = 1.0,
    *,
    train: bool,
    count: Tensor | None = None,
    x_0: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective above, and what to log: scalars, and counts to sum over all processes.

    Args:
        progress: share of training that is done, for the ramps.
        train: augment images, drop instructions, draw latents, add the gate's noise.
        count: number of real actions to divide by, before the M draws: `run.real_actions`. None: the batch's.
        x_0, t: noise (B * M, T, A), flow times (B * M,), M per sample; give both, or neither to draw them.
    """
    images = vision.augment(batch.images, config.vision) if train else vision.to_float(batch.images)
    flow_samples = config.flow_samples if x_0 is None else len(x_0) // len(images)
    proprio = normalizer.proprio(batch.proprio)
    chunks = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    x_1 = chunks.repeat_interleave(flow_samples, dim=0)  # (B * M, T, A)
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
        t = flow.sample_time(len(x_1), x_1.device, config.time_distribution, config.time_beta)  # (B * M,)
        t = flow.random_prefix(t, config.horizon, config.delay)  # or (B * M, T)
    x_t, velocity = flow.linear_path(x_0, x_1, t)
    real = ~batch.is_pad.repeat_interleave(flow_samples, dim=0) & flow.to_predict(t)  # (B * M, T)
    task = drop_some(batch.task, config.tasks) if train else batch.task
    # One more draw for each observation, for the one-step prediction.
    start, x_t, t = flow.prepend_start(x_0, x_t, t, flow_samples)  # (B, T, A), (B * (1 + M), ...)

    velocity_pred, logits, latent = policy(x_t, t, images, proprio, chunks, batch.is_pad, train, task)
    velocity_pred = velocity_pred.unflatten(1, (-1, 1 + flow_samples))  # (E, B, 1 + M, T, A)
    gates, gate_loss, gate_metrics = weigh_experts(logits, config, progress, train)
    gates = gates.unflatten(0, (-1, 1 + flow_samples))  # (B, 1 + M, E)

    count = None if count is None else count * flow_samples
    velocity_loss = losses.expert_mse(
        velocity_pred[:, :, 1:].flatten(1, 2), velocity, real, gates[:, 1:].flatten(0, 1), count
    )
    one_step = start + torch.einsum("be,ebta->bta", gates[:, 0], velocity_pred[:, :, 0].float())  # (B, T, A)
    transport = losses.chunk_transport(one_step, chunks, proprio[:, -1], batch.is_pad, config.transport_blur)
    divergence = latent.divergence.mean(dim=0)  # of each dimension
    beta = (config.kl_weight * ramp(progress, config.kl_warmup)).float()
    loss = (
        velocity_loss
        + beta * divergence.clamp(min=config.free_bits).sum()
        + config.prior_weight * latent.prior_loss
        + config.commitment_weight * latent.commitment
        + config.transport_weight * transport.divergence
        + gate_loss
    )
    return loss, {
        "loss/velocity": velocity_loss,
        "loss/kl": latent.prior_loss,
        "loss/transport": transport.divergence,
        "transport/marginal_error": transport.marginal_error,
        **latent.metrics,
        **gate_metrics,
        "latent": latent.counted,
    }


def weigh_experts(
    logits: Tensor, config: Config, progress: float | Tensor, train: bool
) -> tuple[Tensor, Tensor, dict]:
    """How much each expert learns from a sample, (B, E); the gate's own losses; what to log.

    At first all experts learn from every sample. Otherwise, while errors are large, an expert that happened
    to be ahead would get all samples, learn even faster, and stay ahead.
    """
    noisy = logits + config.gate_noise * torch.randn_like(logits) if train else logits
    probabilities = noisy.softmax(dim=1)
    trust = ramp(progress, config.gate_warmup)
    weights = trust * probabilities + (1 - trust) / config.num_experts
    z_loss, balance = losses.router_z_loss(noisy), losses.load_balance(probabilities)
    metrics = {
        "loss/router_z": z_loss,
        "loss/balance": balance,
        "gate/entropy": torch.special.entr(probabilities).sum(dim=1).mean(),
        "experts": F.one_hot(logits.argmax(dim=1), config.num_experts).sum(dim=0),
    }
    return weights, config.z_loss_weight * z_loss + config.balance_weight * balance, metrics


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: flow.Generators = None,
    x_0: Tensor | None = None,
    noise: Tensor | None = None,
    task: Tensor | None = None,
    prefix: flow.Prefix | None = None,
) -> Tensor:
    """Sample one normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        task: the instructions, see `InstructionEmbedder`.
        steps: integration steps, instead of the configured number.
        generator: source of the noise, on the images' device; or one generator per observation.
        x_0: the noise itself, (B, T, A).
        noise: noise of the latent, (B, latent_dim).
        prefix: actions that the chunks begin with.

    Returns:
        (B, T, A) float32, normalized; undo with `Normalizer.unnormalize_actions`.
    """
    _, observation = policy.encode(vision.to_float(images), proprio, task)
    if x_0 is None:
        shape = (len(images), config.horizon, policy.action_decoder.action_in.in_features)
        x_0 = flow.noise(shape, images.device, generator)
    if noise is None:
        noise = flow.episode_noise((len(images), config.latent_dim), images.device, generator)
    z = policy.latent.draw(policy.prior(observation, prefix), noise)
    return integrate(policy, observation, z, x_0, config, steps, prefix=prefix)


def integrate(
    policy: Policy,
    observation: Observation,
    z: Tensor,
    x_0: Tensor,
    config: Config,
    steps: int | None = None,
    experts: Tensor | None = None,
    prefix: flow.Prefix | None = None,
) -> Tensor:
    """Chunks (B, T, A) from noise x_0 (B, T, A) and latents z (B, latent_dim), each by its expert.

    `experts` (B,) are by default those that the gate finds most probable. No others are computed.
    """
    experts = policy.gate(z).argmax(dim=1) if experts is None else experts
    chunks = torch.empty_like(x_0)
    alone = len(experts) == 1 and experts.device.type != "cpu"  # then the CPU need not wait for its number
    for expert in [experts] if alone else experts.unique().tolist():
        rows = slice(None) if alone else (experts == expert).nonzero()[:, 0]
        decoder = take_expert(policy.action_decoder, expert)
        context = decoder.context(Observation(observation.memory[rows], observation.summary[rows]))

        def velocity(x: Tensor, t: Tensor, decoder=decoder, context=context, z=z[rows]) -> Tensor:
            return decoder(x, t, context, None, z)[0].float()

        options = steps or config.sample_steps, config.sample_method, prefix and prefix.of(rows)
        chunks[rows] = flow.integrate(velocity, x_0[rows], *options)
    return chunks


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, run: Run
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise and flow times every time.

    `loss/velocity` uses the latent of the recorded chunk; `action_mae` is the error of chunks whose latent
    came from the prior. Uses at most `--eval-samples` evenly spaced samples, divided among the processes.
    Leaves the global random state alone: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    t = flow.sample_time(num, "cpu", config.time_distribution, config.time_beta, generator)
    noise = torch.randn(num, config.latent_dim, generator=generator)
    sums = torch.zeros(5, device=run.device)  # loss, absolute error, real actions; KL divergence, samples
    for picked, batch in run.evenly_spaced(dataset, num):
        x, times, z_noise = (draws[picked].to(run.device) for draws in (x_0, t, noise))
        proprio = normalizer.proprio(batch.proprio)
        with run.autocast():
            _, metrics = compute_loss(policy, batch, normalizer, config, train=False, x_0=x, t=times)
            options = {"x_0": x, "noise": z_noise, "task": batch.task}
            sampled = sample_actions(policy, batch.images, proprio, config, **options)
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        real, one = (~batch.is_pad).sum(), torch.ones_like(error)
        sums[:3] += torch.stack([metrics["loss/velocity"], error, one]) * real
        sums[3:] += torch.stack([metrics["loss/kl"], one]) * len(picked)
    loss, error, real, divergence, samples = run.sum(sums).tolist()
    return {"loss/velocity": loss / real, "loss/kl": divergence / samples, "action_mae": error / real}


@torch.no_grad()
def draw_alternatives(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, path: Path
) -> None:
    """Draw each expert's chunk at the start of an episode, how often it is chosen there, and overall.

    Each expert gets, of 512 latents from the prior, the one for which the gate finds it most probable.
    """
    batch = dataset.__getitems__([0]).to(normalizer.action_scale.device)
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(batch.actions.shape, generator=generator).to(batch.proprio.device)
    proprio = normalizer.proprio(batch.proprio)
    _, observation = policy.encode(vision.to_float(batch.images), proprio, batch.task)
    noise = torch.randn(512, config.latent_dim, generator=generator).to(x_0.device)
    z = policy.latent.draw(policy.prior(observation).expand(512, -1), noise)
    log_gates = policy.gate(z).log_softmax(dim=1)  # (512, E)
    z, chosen, num = z[log_gates.argmax(dim=0)], log_gates.argmax(dim=1), config.num_experts
    observation = Observation(*(part.expand(num, *part.shape[1:]) for part in observation))
    experts = torch.arange(num, device=z.device)
    chunks = integrate(policy, observation, z, x_0.expand(num, -1, -1), config, experts=experts)
    shares = {"prior": F.one_hot(chosen, num).float().mean(dim=0), "usage": policy.gate.usage.shares}
    plots.draw_chunks(path, batch, chunks, normalizer, dataset.store.action_names, shares, "experts")


def report_idle_experts(step: int, logged: dict[str, float], num_experts: int) -> None:
    """Warn if the gate hardly chooses an expert, according to a new line of the log: it only costs time."""
    idle = [str(e) for e in range(num_experts) if logged.get(f"experts/use_{e}", 1.0) < 0.1 / num_experts]
    if idle:
        which = f"experts {', '.join(idle)} of {num_experts} are hardly used"
        say(f"step {step}  {which}: raise --balance-weight or --gate-noise, or lower --num-experts")


def main(config: Config) -> None:
    run = start_run(config, __file__)
    data = run.load_data(config.horizon, config.normalization, config.tasks, config.delay, config.vision)
    policy = Policy(config, data.spec, pretrained=not run.resuming)
    optimizer, scheduler, average = run.prepare(policy, data)  # run.model: the policy under DDP and autocast
    objective = run.compiled(compute_loss)

    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():  # of one step; sets run.real_actions
            loss, metrics = objective(
                run.model, batch, data.normalizer, config, run.progress, train=True, count=run.real_actions
            )
            run.backward(loss)
            counted = run.sum(torch.cat([metrics.pop("latent"), metrics.pop("experts")]))
            policy.latent.count(counted[: -config.num_experts])
            policy.gate.usage.counts += counted[-config.num_experts :]
            run.log(metrics)
        run.log(run.clip_gradients())  # gradients are complete only here
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        policy.latent.follow(policy.posterior, run.step - 1, config.posterior_decay)  # updates before this
        if run.step % config.code_window == 0:
            early = run.step <= config.replace_until * run.total_steps
            run.log(policy.latent.end_window(policy.prior.out, average, config.run.seed + run.step, early))
        if run.due(config.run.log_every):
            run.log(policy.gate.end_window())
        average.update()  # last: it also copies the counts
        logged = run.end_step()
        report_idle_experts(run.step, logged, config.num_experts)

        if data.val is not None and run.due(config.run.eval_every):
            model = average.model
            run.log_validation(evaluate(model, data.val, data.normalizer, config, run))
            if run.is_main:
                draw_alternatives(model, data.val, data.normalizer, config, run.folder / "alternatives.png")
                z, _ = first_latents(model, data.train, data.normalizer, config.run.eval_samples)
                experts = model.gate(z).argmax(dim=1)
                plots.draw_latents(run.folder / "latents.png", z, {"expert": experts})
        if run.due(config.rollout.rollout_every):
            run.log_validation(success_rate(average.model, sample_actions, data, config, run))
        if run.due(config.run.save_every) or run.stopping:
            run.save()
    run.close()


if __name__ == "__main__":
    cli(main, Config)
