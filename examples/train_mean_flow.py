"""MeanFlow over action chunks: one step without a latent and without a teacher.

A fork of `train_naive_fm.py`. The network learns the average velocity u between two flow times t <= r, with
which one step leads from x_t to x_r. It obeys u = v + (r - t) du/dt along the path; forward-mode
differentiation computes the derivative. With v = x_1 - x_0, and r = t in three of four draws,

    L = mean (u(x_t, t, r, s) - sg(v + (r - t) du/dt))^2

(Geng et al. 2025; their time runs the other way, and they weight each sample by its error).

    accelerate launch examples/train_mean_flow.py --lr 2e-3
"""

import sys
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import flow, losses, vision
from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, RunConfig, Share, cli, options
from common.data import Batch, ChunkDataset, DataConfig
from common.instructions import TaskConfig, drop_some
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import ActionDecoder, Context, InfoEmbedder, Size, TimeEmbedding
from common.vision import VisionConfig


@options
class Config:
    """Train a MeanFlow policy on multi-camera demonstrations."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=lambda: OptimConfig(schedule="schedule-free"))
    run: Flat[RunConfig] = field(default_factory=RunConfig)
    rollout: Flat[RolloutConfig] = field(default_factory=RolloutConfig)
    tasks: Flat[TaskConfig] = field(default_factory=TaskConfig)

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
    interval_share: Share = 0.25
    """Share of draws with r > t; in the others u is the velocity itself."""
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


jvp = torch.compiler.disable(torch.func.jvp)  # --compile leaves the decoder out: layer norm fails in it


class Policy(nn.Module):
    """Average velocity of action chunks given camera images and joint states.

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
        causal = config.attention == "causal"
        self.action_decoder = ActionDecoder(chunk, size, config.decoder_layers, causal, latent_dim=1)
        # In t, the derivative of an embedding with high frequencies would drown everything else.
        self.action_decoder.time = TimeEmbedding(config.d_model, max_frequency=10.0)

    def observe(self, images: Tensor, proprio: Tensor, task: Tensor | None = None) -> Context:
        """What the decoder needs from an observation; computed once, however often the decoder runs.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
            task: the instructions, see `InstructionEmbedder`.
        """
        views = vision.look([self.backbone], images, self.info_embedder.film(task))  # all cameras at once
        return self.action_decoder.context(self.info_embedder(views, proprio, task=task))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        velocity: Tensor,
        images: Tensor,
        proprio: Tensor,
        is_pad: Tensor | None = None,
        task: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Average velocity (B * M, T, A) from t to r, and its derivative in t along the path."""
        context = self.observe(images, proprio, task)

        def average(x: Tensor, t: Tensor) -> Tensor:
            return self.action_decoder(x, t, context, is_pad, latent=(r - t).unsqueeze(1))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            return jvp(average, (x_t, t), (velocity, torch.ones_like(t)))


def sample_times(num: int, device, config: Config, generator=None) -> tuple[Tensor, Tensor]:
    """Flow times t <= r, (num,) each."""
    draw = (num, device, config.time_distribution, config.time_beta, generator)
    t, r = flow.sample_time(*draw), flow.sample_time(*draw)
    apart = torch.rand(num, device=device, generator=generator) < config.interval_share
    return torch.where(apart, torch.minimum(t, r), t), torch.where(apart, torch.maximum(t, r), t)


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    train: bool,
    count: Tensor | None = None,
    x_0: Tensor | None = None,
    t: Tensor | None = None,
    r: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MeanFlow loss over the actions within the episode, and its parts to log.

    Args:
        train: augment images, drop instructions.
        count: number of real actions to divide by, before the M draws: `run.real_actions`. None: the batch's.
        x_0, t, r: noise (B * M, T, A), flow times (B * M,), M per sample; give all, or none to draw them.
    """
    images = vision.augment(batch.images, config.vision) if train else vision.to_float(batch.images)
    flow_samples = config.flow_samples if x_0 is None else len(x_0) // len(images)
    x_1 = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    x_1 = x_1.repeat_interleave(flow_samples, dim=0)  # (B * M, T, A)
    is_pad = batch.is_pad.repeat_interleave(flow_samples, dim=0)  # (B * M, T)
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
        t, r = sample_times(len(x_1), x_1.device, config)  # (B * M,) each
    x_t, velocity = flow.linear_path(x_0, x_1, t)
    task = drop_some(batch.task, config.tasks) if train else batch.task
    proprio = normalizer.proprio(batch.proprio)
    average, derivative = policy(x_t, t, r, velocity, images, proprio, is_pad, task)
    target = velocity + (r - t)[:, None, None] * derivative.detach()
    count = None if count is None else count * flow_samples
    loss = losses.masked_mse(average, target, ~is_pad, count)
    return loss, {"loss/velocity": loss}


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: flow.Generators = None,
    x_0: Tensor | None = None,
    task: Tensor | None = None,
) -> Tensor:
    """Sample one normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        task: the instructions, see `InstructionEmbedder`.
        steps: equal steps from noise to data, instead of the configured number.
        generator: source of the noise, on the images' device; or one generator per observation.
        x_0: the noise itself, (B, T, A).

    Returns:
        (B, T, A) float32, normalized; undo with `Normalizer.unnormalize_actions`.
    """
    decoder = policy.action_decoder
    context = policy.observe(vision.to_float(images), proprio, task)
    shape = (len(images), config.horizon, decoder.action_in.in_features)
    if x_0 is None:
        x_0 = flow.noise(shape, images.device, generator)
    h = torch.full((len(images), 1), 1 / (steps or config.sample_steps), device=images.device)
    for i in range(steps or config.sample_steps):
        x_0 = x_0 + h[0] * decoder(x_0, i * h[:, 0], context, latent=h).float()
    return x_0


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, run: Run
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise and flow times every time.

    Uses at most `--eval-samples` evenly spaced samples, divided among the processes. Leaves the global random
    state alone: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    t, r = sample_times(num, "cpu", config, generator)
    sums = torch.zeros(3, device=run.device)  # loss, absolute error, real actions
    for picked, batch in run.evenly_spaced(dataset, num):
        noise, *times = (drawn[picked].to(run.device) for drawn in (x_0, t, r))
        with run.autocast():
            loss, _ = compute_loss(policy, batch, normalizer, config, False, None, noise, *times)
            proprio = normalizer.proprio(batch.proprio)
            sampled = sample_actions(policy, batch.images, proprio, config, x_0=noise, task=batch.task)
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        sums += torch.stack([loss, error, torch.ones_like(loss)]) * (~batch.is_pad).sum()
    loss, error, count = run.sum(sums).tolist()
    return {"loss/velocity": loss / count, "action_mae": error / count}


def main(config: Config) -> None:
    run = start_run(config, __file__)
    data = run.load_data(config.horizon, config.normalization, config.tasks, vision=config.vision)
    policy = Policy(config, data.spec, pretrained=not run.resuming)
    optimizer, scheduler, average = run.prepare(policy, data)  # run.model: the policy under DDP and autocast
    objective = run.compiled(compute_loss)

    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():  # of one step; sets run.real_actions
            loss, metrics = objective(
                run.model, batch, data.normalizer, config, train=True, count=run.real_actions
            )
            run.backward(loss)
            run.log(metrics)
        run.log(run.clip_gradients())  # gradients are complete only here
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update()
        run.end_step()

        if data.val is not None and run.due(config.run.eval_every):
            run.log_validation(evaluate(average.model, data.val, data.normalizer, config, run))
        if run.due(config.rollout.rollout_every):
            run.log_validation(success_rate(average.model, sample_actions, data, config, run))
        if run.due(config.run.save_every) or run.stopping:
            run.save()
    run.close()


if __name__ == "__main__":
    cli(main, Config)
