"""Discrete latent with classifier-free guidance: flow matching whose velocity is told which mode to take.

Plain flow matching has one velocity field for all the ways to do a task; near t = 0, where x_t is still
noise, it points at their average. Here a latent z names the way. In training, a posterior infers it from
the recorded chunk x_1; a prior predicts it from the observation s alone. With x_t, t and u = x_1 - x_0 as
in plain flow matching, z_e the posterior's output, q the nearest of K code vectors and n normal noise,

    z = z_e + |z_e - q| n / |n|                                        (NSVQ, Vali & Backstrom 2022)
    L = mean (v(x_t, t, s, z) - u)^2                                   z sometimes replaced by a null token
        + 0.2 S(x_0 + v(x_0, 0, s, z), x_1)                            K-OT: Sinkhorn divergence of clouds
        - log p(k | sg(s)) + 0.25 |z_e - sg(q)|^2 / d_z                prior; commitment

where sg stops the gradient and the clouds are the chunks of a process's micro-batch, each with its state.
The prior learns the code k that a slowly moving average of the posterior assigns. It is a distribution over
codes because regressing the latent would average the very modes that the codebook separates. The commitment
is a mean over the d_z dimensions, so that its weight means the same for every width. To act, we draw a code
from the prior and integrate dx/dt = v_null + w (v_z - v_null) (Ho & Salimans 2022). Early in training,
perturbed copies of popular codes replace codes that are hardly used.

Differs from `train_naive_fm.py` in: posterior, prior, codebook and their losses; the decoder takes a latent,
which is sometimes dropped; optimal transport of one-step predictions; guidance; AdamW by default.

    accelerate launch train_cfg_vqvae.py --lr 2e-3 --schedule schedule-free
    accelerate launch train_cfg_vqvae.py --dataset me/fold_towel --image-size 224 --num-codes 64
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common import flow, losses, plots, vision
from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, RunConfig, Share, cli, options
from common.data import Batch, ChunkDataset, DataConfig
from common.errors import UserError
from common.instructions import TaskConfig, drop_some
from common.latent import CodebookLatent, Inferred
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig, ramp
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import (
    ActionDecoder,
    ChunkEncoder,
    InfoEmbedder,
    Observation,
    ObservationHead,
    Size,
)
from common.vision import VisionConfig


@options
class Config:
    """Train a flow-matching policy with a discrete latent on multi-camera demonstrations."""

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

    cfg_dropout: Share = 0.5
    """Share of the draws whose latent is replaced by the null token, after the ramp."""
    cfg_ramp: Share = 0.1
    """Share of training over which --cfg-dropout rises from 0."""
    guidance: MayChange[float] = 1.0
    """Guidance scale w when sampling actions; unless 1, the decoder runs with and without the latent."""

    latent_dim: PositiveInt = 16
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


class Policy(nn.Module):
    """Velocity field of action chunks given camera images, joint states and a latent.

    Its children are the components. Each one can be frozen, initialised and given its own learning rate.
    """

    def __init__(self, config: Config, spec: PolicySpec, pretrained: bool = True):
        """`pretrained`: load the backbone's weights; False if a checkpoint is loaded next."""
        super().__init__()
        self.backbone = vision.build_backbone(
            config.vision.backbone, spec.image_size, pretrained, hf_config=spec.backbone_config
        )
        widths = [(self.backbone.token_dim, self.backbone.summary_dim)] * spec.views
        size = Size(config.d_model, config.num_heads)
        proprio, chunk = (spec.proprio_history, spec.state_dim), (config.horizon, spec.action_dim)
        told = {"tasks": spec.tasks, "film_dims": [self.backbone.film_dim]}
        self.info_embedder = InfoEmbedder(widths, proprio, size, config.encoder_layers, **told)
        posterior_dim, prior_dim = config.latent_dim, config.num_codes
        self.posterior = ChunkEncoder(
            proprio, self.backbone.token_dim, chunk, size, config.posterior_layers, posterior_dim
        )
        given = (config.delay.max_delay, spec.action_dim)
        self.prior = ObservationHead(size, config.prior_layers, prior_dim, given)
        self.latent = CodebookLatent(config.num_codes, config.latent_dim, self.posterior, null=True)
        causal = config.attention == "causal"
        self.action_decoder = ActionDecoder(chunk, size, config.decoder_layers, causal, config.latent_dim)

    def encode(
        self, images: Tensor, proprio: Tensor, task: Tensor | None = None
    ) -> tuple[Tensor, Observation]:
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
        dropped: Tensor | None = None,
        task: Tensor | None = None,
    ) -> tuple[Tensor, Inferred]:
        """Velocity (B * M, T, A) for M draws per observation, and the latents of its recorded chunk.

        Args:
            x_t, t: points (B * M, T, A) and flow times, (B * M,) or (B * M, T).
            images, proprio, task: the observations, as for `encode`.
            actions, is_pad: the recorded chunks (B, T, A), normalized, and their padding (B, T).
            train: draw the latents, instead of taking the most probable.
            dropped: (B * M,), True where the null token replaces the latent.
        """
        flow_samples = len(x_t) // len(images)  # including the draw of `flow.prepend_start`
        head_tokens, observation = self.encode(images, proprio, task)
        # Posterior and prior read the encoder's features but do not train it: an encoder that also has to
        # follow a moving latent is slow to learn what the task needs.
        seen = (proprio, head_tokens.detach(), actions, is_pad)
        prefix = flow.prefix_in_training(actions, t)  # the robot is on its way: not all ways fit
        posterior, prior = self.posterior(*seen), self.prior(observation.detach(), prefix)
        latent = self.latent.infer(posterior, prior, seen, flow_samples, train)
        if dropped is not None:
            latent = latent._replace(z=torch.where(dropped[:, None], self.latent.null, latent.z))
        context = self.action_decoder.context(observation)
        is_pad = is_pad.repeat_interleave(flow_samples, dim=0)
        return self.action_decoder(x_t, t, context, is_pad, latent.z), latent


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
        train: augment images, draw latents, drop some latents and instructions.
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

    dropped = None
    if train:
        share = config.cfg_dropout * ramp(progress, config.cfg_ramp)
        dropped = torch.rand(len(images), flow_samples, device=images.device) < share
        dropped = F.pad(dropped, (1, 0)).flatten()  # the one-step prediction keeps its latent
    velocity_pred, latent = policy(x_t, t, images, proprio, chunks, batch.is_pad, train, dropped, task)
    velocity_pred = velocity_pred.unflatten(0, (-1, 1 + flow_samples))  # (B, 1 + M, T, A)

    count = None if count is None else count * flow_samples
    velocity_loss = losses.masked_mse(velocity_pred[:, 1:].flatten(0, 1), velocity, real, count)
    one_step = start + velocity_pred[:, 0].float()  # (B, T, A)
    transport = losses.chunk_transport(one_step, chunks, proprio[:, -1], batch.is_pad, config.transport_blur)
    loss = (
        velocity_loss
        + latent.prior_loss
        + config.commitment_weight * latent.commitment
        + config.transport_weight * transport.divergence
    )
    return loss, {
        "loss/velocity": velocity_loss,
        "loss/kl": latent.prior_loss,
        "loss/transport": transport.divergence,
        "transport/marginal_error": transport.marginal_error,
        **latent.metrics,
        "latent": latent.counted,
    }


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
    return integrate(policy, observation, z, x_0, config, steps, prefix)


def integrate(
    policy: Policy,
    observation: Observation,
    z: Tensor,
    x_0: Tensor,
    config: Config,
    steps: int | None = None,
    prefix: flow.Prefix | None = None,
) -> Tensor:
    """Chunks (B * M, T, A) from noise x_0 (B * M, T, A) and latents z (B * M, latent_dim)."""
    decoder = policy.action_decoder
    context = decoder.context(observation)
    # Both velocities in one call: every draw becomes two, one with the latent and one with the null token.
    both = torch.stack([z, policy.latent.null.expand_as(z)], dim=1).flatten(0, 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if config.guidance == 1:
            return decoder(x, t, context, latent=z).float()
        pair = decoder(x.repeat_interleave(2, dim=0), t.repeat_interleave(2, dim=0), context, latent=both)
        conditional, unconditional = pair.float().unflatten(0, (-1, 2)).unbind(1)
        return flow.guide(conditional, unconditional, config.guidance)

    return flow.integrate(velocity, x_0, steps or config.sample_steps, config.sample_method, prefix)


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
    """Draw each code's chunk at the start of an episode, its probability there, and its use in training."""
    batch = dataset.__getitems__([0]).to(normalizer.action_scale.device)
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(batch.actions.shape, generator=generator).to(batch.proprio.device)
    proprio = normalizer.proprio(batch.proprio)
    _, observation = policy.encode(vision.to_float(batch.images), proprio, batch.task)
    prior, z = policy.prior(observation), policy.latent.vectors
    chunks = integrate(policy, observation, z, x_0.expand(len(z), -1, -1), config)
    shares = {"prior": prior[0].softmax(dim=0), "usage": policy.latent.usage.shares}
    plots.draw_chunks(path, batch, chunks, normalizer, dataset.store.action_names, shares, "codes")


def main(config: Config) -> None:
    if config.guidance != 1 and not config.cfg_dropout:
        raise UserError("--guidance needs --cfg-dropout: with 0, nothing trains the policy without a latent.")
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
            policy.latent.count(run.sum(metrics.pop("latent")))
            run.log(metrics)
        run.log(run.clip_gradients())  # gradients are complete only here
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        policy.latent.follow(policy.posterior, run.step - 1, config.posterior_decay)  # updates before this
        if run.step % config.code_window == 0:
            early = run.step <= config.replace_until * run.total_steps
            run.log(policy.latent.end_window(policy.prior.out, average, config.run.seed + run.step, early))
        average.update()  # last: it also copies the counts
        run.end_step()

        if data.val is not None and run.due(config.run.eval_every):
            model = average.model
            run.log_validation(evaluate(model, data.val, data.normalizer, config, run))
            if run.is_main:
                draw_alternatives(model, data.val, data.normalizer, config, run.folder / "alternatives.png")
        if run.due(config.rollout.rollout_every):
            run.log_validation(success_rate(average.model, sample_actions, data, config, run))
        if run.due(config.run.save_every) or run.stopping:
            run.save()
    run.close()


if __name__ == "__main__":
    cli(main, Config)
