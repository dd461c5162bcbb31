"""Discrete latent with classifier-free guidance: flow matching whose velocity is told which mode to take.

Plain flow matching has one velocity field for all the ways in which a task can be done; near t = 0, where
noise says nothing yet, it points at their average. Here a latent names the way. A posterior reads a code off
the recorded chunk x_1, a prior predicts the code from the observation s alone, and the decoder's velocity is
conditioned on it. With z_e the posterior's output, q the nearest of K code vectors, n normal noise, and x_t,
t and u = x_1 - x_0 as in plain flow matching,

    z = z_e + |z_e - q| n / |n|                                        (NSVQ, Vali & Backstrom 2022)
    L = E || v(x_t, t, s, z) - u ||^2                                  z replaced by a null token at times
        + 0.2 S(x_0 + v(x_0, 0, s, z), x_1)                            K-OT: Sinkhorn divergence of clouds
        + 0.25 |z_e - sg(q)|^2 / d_z - log p(k | sg(s))                commitment; prior

where sg stops the gradient, the clouds are the chunks of one micro-batch on one process, and k is the code
that a slowly moving average of the posterior assigns (cross-entropy over codes: regressing the latent would
average the very modes that the codebook separates). The commitment is a mean over the d_z dimensions, so that
its weight means the same for every width of the latent. To act, a code is sampled
from the prior and dx/dt = v_null + w (v_z - v_null) is integrated (Ho & Salimans 2022). Codes that are hardly
used are replaced by perturbed copies of popular ones early in training.

Differs from `train_naive_fm.py` in: posterior, prior, codebook and their losses; the decoder takes a latent;
AdamW by default.

    accelerate launch train_cfg_vqvae.py --lr 2e-3 --schedule schedule-free
    accelerate launch train_cfg_vqvae.py --dataset me/fold_towel --image-size 224 --num-codes 64
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

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
from common.faults import GradientClipper, Guard, or_nan
from common.launch import check_same_data, create_run_dir, make_accelerator
from common.normalize import Normalization, Normalizer
from common.pictures import draw_chunks
from common.schedules import (
    AveragedPolicy,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    learning_rates,
    move_average,
)
from common.tracking import Tracker
from common.transformer import ActionDecoder, ChunkEncoder, InfoEmbedder, Observation, ObservationHead
from common.vision import VisionConfig


@dataclass(frozen=True)
class Config:
    """Train a flow-matching policy with a discrete latent on multi-camera demonstrations."""

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
    attention: Literal["causal", "full"] = "causal"
    """Self-attention among the actions of a chunk: an action sees earlier ones only, or all."""
    sample_steps: int = 10
    """Integration steps when sampling actions."""
    sample_method: flow.Integrator = "euler"
    """Integrator when sampling actions; midpoint and heun evaluate the network twice a step."""

    num_codes: int = 16
    """K, code vectors in the codebook."""
    latent_dim: int = 16
    """Width of a code vector."""
    posterior_layers: int = 2
    """Transformer layers that read the code off a recorded chunk."""
    prior_layers: int = 1
    """Transformer layers that predict the code from the observation."""
    prior: Literal["categorical", "regression"] = "categorical"
    """What the prior predicts: a distribution over the codes, or the code vector itself (averages modes)."""
    posterior_decay: float = 0.999
    """Decay of the averaged posterior whose codes the prior learns."""
    commitment_weight: float = 0.25
    """Weight of the distance between the posterior's output and its code."""
    cfg_dropout: float = 0.5
    """Share of the draws whose latent is replaced by the null token, once the ramp is over."""
    cfg_ramp: float = 0.1
    """Share of training over which that share rises from 0."""
    guidance: float = 1.0
    """Guidance scale w when sampling actions; other than 1 the decoder runs with and without the latent."""
    transport_weight: float = 0.2
    """Weight of the Sinkhorn divergence between one-step predictions and recorded chunks (K-OT)."""
    transport_blur: float = 0.05
    """Length, in normalized actions, below which that divergence does not look."""
    code_window: int = 100
    """Steps over which the use of codes is counted."""
    replace_until: float = 0.5
    """Share of training during which a code is replaced that a window used less than a tenth of 1 / K."""


class Prediction(NamedTuple):
    """What the policy makes of recorded chunks."""

    velocity: Tensor
    """(B * M, T, A)."""
    latent: Tensor
    """z_e, (B, latent_dim), before quantization."""
    code: Tensor
    """Index of the nearest code, (B,)."""
    quantized: Tensor
    """q, its vector, (B, latent_dim)."""
    prior: Tensor
    """Output of the prior, (B, K) logits or (B, latent_dim)."""
    target: Tensor
    """Target of the prior: the code that the averaged posterior assigns, (B,), or its vector."""


class Policy(nn.Module):
    """Velocity field of action chunks given camera images, joint states and a code.

    Its children are the components that can be frozen, initialised and rated one by one.
    """

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, pretrained: bool = True):
        """`pretrained` = False leaves the backbone's weights to the checkpoint that is loaded next."""
        super().__init__()
        self.regression = config.prior == "regression"
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
        self.posterior = ChunkEncoder(
            spec.state_dim,
            self.backbone.token_dim,
            spec.action_dim,
            spec.proprio_history + config.horizon,
            config.d_model,
            config.num_heads,
            config.posterior_layers,
            out_dim=config.latent_dim,
        )
        self.posterior_average = copy.deepcopy(self.posterior).requires_grad_(False)
        self.prior = ObservationHead(
            config.d_model,
            config.num_heads,
            config.prior_layers,
            out_dim=config.latent_dim if self.regression else config.num_codes,
        )
        self.codebook = Codebook(config.num_codes, config.latent_dim, null=True)
        self.action_decoder = ActionDecoder(
            spec.action_dim,
            config.horizon,
            config.d_model,
            config.num_heads,
            config.decoder_layers,
            causal=config.attention == "causal",
            latent_dim=config.latent_dim,
        )

    def encode(self, images: Tensor, proprio: Tensor) -> tuple[Tensor, Observation]:
        """Tokens of the head camera (B, L, D_v), and the whole observation, fused.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
        """
        tokens, summary = self.backbone(images.flatten(0, 1))  # all cameras at once, (B * N, ...)
        tokens, summary = (x.unflatten(0, images.shape[:2]).unbind(1) for x in (tokens, summary))
        return tokens[0], self.info_embedder(list(zip(tokens, summary, strict=True)), proprio)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        images: Tensor,
        proprio: Tensor,
        actions: Tensor,
        is_pad: Tensor,
        dropped: Tensor | None = None,
    ) -> Prediction:
        """Predict the velocity for M draws per observation, given the code of its recorded chunk.

        Args:
            x_t, t: points (B * M, T, A) and flow times (B * M,).
            images, proprio: the observations, as for `encode`.
            actions, is_pad: the recorded chunks (B, T, A), normalized, and their padding (B, T).
            dropped: (B * M,), True where the null token takes the latent's place.
        """
        num_draws = len(x_t) // len(images)
        head_tokens, observation = self.encode(images, proprio)
        # Posterior and prior look at what the decoder made the encoder see, and do not change it: codes move
        # while they are found, and an encoder that runs after them learns late to see what is to be done.
        head_tokens = head_tokens.detach()
        # With a fixed scale, neither the noise of NSVQ nor the commitment loss can be escaped by growing or
        # shrinking.
        latent = self.posterior(proprio, head_tokens, actions, is_pad)
        latent = F.layer_norm(latent, latent.shape[-1:])
        with torch.no_grad():
            averaged = self.posterior_average(proprio, head_tokens, actions, is_pad)
            averaged = F.layer_norm(averaged, averaged.shape[-1:])
            target = losses.nearest_code(averaged, self.codebook.vectors)
            target = self.codebook.vectors[target] if self.regression else target
        code = losses.nearest_code(latent, self.codebook.vectors)
        quantized = self.codebook.vectors[code]
        z = quantized.repeat_interleave(num_draws, dim=0)
        if self.training:
            repeated = latent.repeat_interleave(num_draws, dim=0)
            z = losses.noise_substitution(repeated, z, torch.randn_like(z))
        if dropped is not None:
            z = torch.where(dropped[:, None], self.codebook.null, z)
        context = self.action_decoder.context(observation)
        velocity = self.action_decoder(x_t, t, context, is_pad.repeat_interleave(num_draws, dim=0), z)
        return Prediction(velocity, latent, code, quantized, self.prior(observation.detach()), target)

    def draw_latent(self, observation: Observation, uniform: Tensor) -> Tensor:
        """Latent of each observation, from the prior: (B, latent_dim).

        Args:
            observation: of B samples.
            uniform: (B,), uniform in [0, 1), picks the code; a regression prior leaves no choice.
        """
        prior = self.prior(observation.detach())
        return prior if self.regression else self.codebook.draw(prior, uniform)


class Loss(NamedTuple):
    """What `compute_loss` returns."""

    total: Tensor
    metrics: dict[str, Tensor]
    """Its parts, and how well the prior does; scalars."""
    codes: Tensor
    """Samples assigned to each code, (K,)."""


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    progress: float = 1.0,
    draws: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
) -> Loss:
    """Velocity, transport, commitment and prior losses.

    Args:
        progress: share of training that is done, for the ramp of the latent's dropout.
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
    dropped = None
    if policy.training:
        share = config.cfg_dropout * min(progress / max(config.cfg_ramp, 1e-9), 1.0)
        dropped = F.pad(torch.rand(len(images), num_draws, device=images.device) < share, (1, 0)).flatten()
    prediction = policy(x_t, t, images, proprio, chunks, batch.is_pad, dropped)

    predicted = prediction.velocity.unflatten(0, (-1, 1 + num_draws))  # (B, 1 + M, T, A)
    velocity_loss = losses.masked_mse(
        predicted[:, 1:].flatten(0, 1), velocity, ~is_pad, None if count is None else count * num_draws
    )
    state = proprio[:, -1]
    transport = losses.sinkhorn_divergence(
        losses.transport_points(start + predicted[:, 0].float(), state),
        losses.transport_points(chunks, state),
        mass=~batch.is_pad.any(dim=1),  # chunks that run past the end of an episode have no mass
        blur=config.transport_blur,
    )
    commitment = (prediction.latent - prediction.quantized.detach()).square().mean()
    if config.prior == "categorical":
        prior = F.cross_entropy(prediction.prior, prediction.target)
        probabilities = prediction.prior.detach().softmax(dim=1)
        diagnosis = {
            "prior/accuracy": (probabilities.argmax(dim=1) == prediction.target).float().mean(),
            "prior/entropy": torch.special.entr(probabilities).sum(dim=1).mean(),
        }
    else:
        prior, diagnosis = F.mse_loss(prediction.prior, prediction.target), {}
    total = (
        velocity_loss
        + config.transport_weight * transport.divergence
        + config.commitment_weight * commitment
        + prior
    )
    metrics = {
        "loss/velocity": velocity_loss,
        "loss/transport": transport.divergence,
        "loss/commitment": commitment,
        "loss/prior": prior,
        "transport/marginal_error": transport.marginal_error,
        **diagnosis,
    }
    return Loss(total, metrics, F.one_hot(prediction.code, config.num_codes).sum(dim=0))


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: torch.Generator | None = None,
    x_0: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Sample one normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        steps: integration steps, instead of the configured number.
        generator: source of the noise and of the choice of a code, on the device of the images.
        x_0: the noise itself, (B, T, A).
        uniform: what chooses the code, (B,) in [0, 1).

    Returns:
        (B, T, A) float32, unitless: to be un-normalized.
    """
    _, observation = policy.encode(vision.to_float(images), proprio)
    if x_0 is None:
        shape = (len(images), config.horizon, policy.action_decoder.action_in.in_features)
        x_0 = torch.randn(shape, device=images.device, generator=generator)
    if uniform is None:
        uniform = torch.rand(len(images), device=images.device, generator=generator)
    return integrate_guided(policy, observation, policy.draw_latent(observation, uniform), x_0, config, steps)


def integrate_guided(
    policy: Policy, observation: Observation, z: Tensor, x_0: Tensor, config: Config, steps: int | None = None
) -> Tensor:
    """Chunks (B * M, T, A) from noise x_0 (B * M, T, A) and latents z (B * M, latent_dim)."""
    decoder = policy.action_decoder
    context = decoder.context(observation)
    # Both velocities in one call: every draw becomes two, one with the latent and one with the null token.
    both = torch.stack([z, policy.codebook.null.expand_as(z)], dim=1).flatten(0, 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if config.guidance == 1:
            return decoder(x, t, context, latent=z).float()
        x, t = x.repeat_interleave(2, dim=0), t.repeat_interleave(2)
        conditional, unconditional = (
            decoder(x, t, context, latent=both).float().unflatten(0, (-1, 2)).unbind(1)
        )
        return flow.guide(conditional, unconditional, config.guidance)

    return flow.integrate(velocity, x_0, steps or config.sample_steps, config.sample_method)


@torch.no_grad()
def sample_alternatives(
    policy: Policy, images: Tensor, proprio: Tensor, config: Config, x_0: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunk of every code for one observation, all from the same noise, and how probable each is.

    Args:
        images: (1, N, 3, H, W) uint8.
        proprio: (1, K, P), normalized.
        x_0: noise, (1, T, A).

    Returns:
        Chunks (K, T, A), normalized, and the prior's probabilities (K,); of a regression prior, 1 at the code
        that is nearest to what it predicts.
    """
    _, observation = policy.encode(vision.to_float(images), proprio)
    vectors, prior = policy.codebook.vectors, policy.prior(observation)
    if policy.regression:
        probabilities = F.one_hot(losses.nearest_code(prior, vectors)[0], len(vectors)).float()
    else:
        probabilities = prior[0].softmax(dim=0)
    return integrate_guided(
        policy, observation, vectors, x_0.expand(len(vectors), -1, -1), config
    ), probabilities


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, accelerator
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise and flow times every time.

    `loss_velocity` is given the code of the recorded chunk itself, `action_mae` is the error of chunks whose
    code came from the prior. At most `--eval-samples` evenly spaced steps are used, shared out over the
    processes. The training noise is not touched: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    t = flow.sample_time(num, "cpu", config.time_distribution, config.time_beta, generator)
    uniform = torch.rand(num, generator=generator)
    sums = torch.zeros(5, device=accelerator.device)  # loss, absolute error, real elements; prior, samples
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
                uniform=uniform[rows].to(accelerator.device),
            )
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        real, one = (~batch.is_pad).sum(), torch.ones_like(error)
        sums[:3] += torch.stack([metrics["loss/velocity"], error, one]) * real
        sums[3:] += torch.stack([metrics["loss/prior"], one]) * len(rows)
    loss, error, real, prior, samples = accelerator.reduce(sums).tolist()
    return {"loss_velocity": loss / real, "loss_prior": prior / samples, "action_mae": error / real}


def draw_alternatives(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, path: Path
) -> None:
    """Picture of what each code does at the start of an episode, how probable it is there, and how used."""
    batch = dataset.__getitems__([0]).to(policy.codebook.usage.device)
    proprio = normalizer.proprio(batch.proprio)
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(batch.actions.shape, generator=generator).to(proprio.device)
    chunks, probabilities = sample_alternatives(policy, batch.images, proprio, config, x_0)
    chunks = normalizer.unnormalize_actions(chunks, batch.proprio.expand(len(chunks), -1, -1))
    draw_chunks(
        path,
        chunks.cpu().numpy(),
        recorded=batch.actions[0][~batch.is_pad[0]].cpu().numpy(),
        names=dataset.store.action_names,
        scale=normalizer.action_scale.cpu().numpy(),
        shares={"prior": probabilities.cpu().numpy(), "usage": policy.codebook.usage.cpu().numpy()},
        title=f"the chunk of each of {len(chunks)} codes at the start of a held-out episode",
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
        posteriors = policy.posterior_average.parameters(), policy.posterior.parameters()
        move_average(*posteriors, step, config.posterior_decay)
        averaged.update()
        step, samples = step + 1, samples + global_batch
        if step % config.code_window == 0:
            prior_out = None if policy.regression else policy.prior.out
            early = step <= config.replace_until * total_steps
            tracker.add(end_window(policy.codebook, prior_out, averaged, config.run.seed + step, early))

        if step % config.run.log_every == 0 or step == total_steps:
            tracker.log(step, samples, rates)
        clip.remember()
        guard.end_step()
        with tracker.paused():
            if val_set and (step % config.run.eval_every == 0 or step == total_steps):
                tracker.log_validation(
                    step, evaluate(averaged.model, val_set, normalizer, config, accelerator)
                )
                if accelerator.is_main_process:
                    draw_alternatives(
                        averaged.model, val_set, normalizer, config, run_dir / "alternatives.png"
                    )
            if step % config.run.save_every == 0 or step == total_steps or guard.stopping:
                checkpoint.save(
                    accelerator, run_dir, step, samples, averaged, normalizer, spec, config, tracker
                )
    tracker.close()
    guard.close(step, total_steps, run_dir)


if __name__ == "__main__":
    cli(main, Config)
