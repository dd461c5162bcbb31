"""Variational-flow-policy family, single expert, with depth: flow matching from cameras and Depth Anything 3.

Every camera has its own backbone. During training, a sample may lose one camera, so that the policy does not
rely on a single view. A transformer encoder fuses the camera tokens and joint states into a memory and a
summary; a transformer decoder, conditioned on flow time, turns a noisy action chunk into the velocity that
carries it to the demonstrated one. With x_t = (1 - t) x_0 + t x_1, x_0 ~ N(0, 1), t ~ Beta(1.0, 1.5), and x_1
the normalized chunk that begins at observation s, the objective is

    L = mean | v(x_t, t, s) - (x_1 - x_0) |      over draws, actions within the episode, and dimensions

(Lipman et al. 2023; Liu et al. 2023; time distribution as in pi0, Black et al. 2024). To act, dx/dt = v is
integrated from noise at t = 0 to actions at t = 1.

The head camera, or each of `--depth-cameras`, has a second visual stream: features of the frozen Depth
Anything 3 network (Lin et al. 2025), which has seen more shapes and distances than any set of demonstrations.
A sample that loses a camera also loses its depth.

Differs from `train_vfp.py` in: depth features, computed once for every frame or again in each step; the L1
loss; a picture of the features.

    accelerate launch train_vfp_depth.py --dataset me/fold_towel --image-size 224 --depth-model base
    accelerate launch train_vfp_depth.py --depth-weights random     # to try it without a download
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from common import flow, losses, vision
from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, RunConfig, Share, cli, options
from common.data import Batch, ChunkDataset, DataConfig
from common.depth import DepthBackbone, DepthConfig, cached, camera_numbers
from common.errors import UserError
from common.instructions import TaskConfig, drop_some
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig
from common.plots import draw_features
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import ActionDecoder, Context, InfoEmbedder, Size
from common.vision import VisionConfig


@options
class Config:
    """Train a single-expert flow-matching policy with depth features on multi-camera demonstrations."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    depth: Flat[DepthConfig] = field(default_factory=DepthConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    run: Flat[RunConfig] = field(default_factory=RunConfig)
    rollout: Flat[RolloutConfig] = field(default_factory=RolloutConfig)
    tasks: Flat[TaskConfig] = field(default_factory=TaskConfig)
    delay: Flat[flow.DelayConfig] = field(default_factory=flow.DelayConfig)

    horizon: PositiveInt = 16
    """Actions predicted per chunk, in control steps."""
    normalization: Normalization = "mean-std"
    """How state and action are scaled: see common/normalize.py."""
    camera_dropout: Share = 0.15
    """Probability that a training sample loses one camera; a single camera is never lost."""
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

    def __post_init__(self):
        if self.data.grow_from is not None and self.depth.depth_cache == "on":
            raise UserError(
                "--grow-from needs --depth-cache off: the cache is made of all frames before training."
            )


class Policy(nn.Module):
    """Velocity field of action chunks given camera images, their depth features, and joint states.

    Its children are the components. Each one can be frozen, initialised and given its own learning rate.
    """

    def __init__(self, config: Config, spec: PolicySpec, pretrained: bool = True):
        """`pretrained`: load the backbones' weights; False if a checkpoint is loaded next."""
        super().__init__()
        if spec.image_history > 1:
            raise UserError("train_vfp_depth.py sees one frame of a camera: leave out --image-history.")
        self.cameras, widths = spec.cameras, []
        for camera in spec.cameras:
            backbone = vision.build_backbone(
                config.vision.backbone, spec.image_size, pretrained, hf_config=spec.backbone_config
            )
            self.add_module(f"{camera}_backbone", backbone)
            widths.append((backbone.token_dim, backbone.summary_dim))
        self.depth_backbone = DepthBackbone(config.depth, spec.image_size, pretrained)
        self.depth_cameras = camera_numbers(config.depth, spec.cameras)
        widths += [(self.depth_backbone.token_dim,) * 2] * len(self.depth_cameras)
        size, layers = Size(config.d_model, config.num_heads), config.encoder_layers
        proprio, chunk = (spec.proprio_history, spec.state_dim), (config.horizon, spec.action_dim)
        told = {"tasks": spec.tasks, "film_dims": [b.film_dim for b in vision.backbones_of(self)]}
        self.info_embedder = InfoEmbedder(widths, proprio, size, layers, droppable=True, **told)
        causal = config.attention == "causal"
        self.action_decoder = ActionDecoder(chunk, size, config.decoder_layers, causal)

    def depth_features(self, images: Tensor) -> Tensor:
        """Features (B, C, L, D_f) of the C cameras with depth in images (B, N, 3, H, W) uint8."""
        return self.depth_backbone.of_cameras(images, self.depth_cameras)

    def observe(
        self,
        images: Tensor,
        proprio: Tensor,
        depth: Tensor,
        dropped: Tensor | None = None,
        task: Tensor | None = None,
    ) -> Context:
        """What the decoder needs from an observation; computed once, however often the decoder runs.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
            depth: (B, C, L, D_f), from `depth_features` or the cache; of images without augmentation.
            dropped: (B, N), True where a sample has lost a camera and its depth.
            task: the instructions, see `InstructionEmbedder`.
        """
        backbones = [getattr(self, f"{camera}_backbone") for camera in self.cameras]
        views = vision.look(backbones, images, self.info_embedder.film(task))
        views += [(tokens, tokens.mean(dim=1)) for tokens in depth.float().unbind(1)]
        if dropped is not None:
            depth_dropped = [dropped[:, n : n + 1] for n in self.depth_cameras]
            dropped = torch.cat([dropped, *depth_dropped], dim=1)
        return self.action_decoder.context(self.info_embedder(views, proprio, dropped, task))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        images: Tensor,
        proprio: Tensor,
        depth: Tensor,
        dropped: Tensor | None = None,
        is_pad: Tensor | None = None,
        task: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B * M, T, A) at x_t (B * M, T, A), t (B * M,), for M draws per observation."""
        return self.action_decoder(x_t, t, self.observe(images, proprio, depth, dropped, task), is_pad)


def with_depth(batch: Batch, policy: Policy) -> Batch:
    """The batch with depth features: from the cache, or computed now and rounded like cached ones."""
    if "depth" in batch.extras:
        return batch
    return batch._replace(extras={**batch.extras, "depth": policy.depth_features(batch.images).half()})


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    train: bool,
    count: Tensor | None = None,
    x_0: Tensor | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Conditional flow-matching loss over the actions within the episode, and its parts to log.

    Args:
        batch: with depth features.
        train: augment images, drop cameras and instructions.
        count: number of real actions to divide by, before the M draws: `run.real_actions`. None: the batch's.
        x_0, t: noise (B * M, T, A), flow times (B * M,), M per sample; give both, or neither to draw them.
    """
    if train:
        images = vision.augment(batch.images, config.vision)
        dropped = vision.random_camera_dropout(*images.shape[:2], config.camera_dropout, images.device)
    else:
        images, dropped = vision.to_float(batch.images), None
    flow_samples = config.flow_samples if x_0 is None else len(x_0) // len(images)
    x_1 = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    x_1 = x_1.repeat_interleave(flow_samples, dim=0)  # (B * M, T, A)
    is_pad = batch.is_pad.repeat_interleave(flow_samples, dim=0)  # (B * M, T)
    if x_0 is None:
        x_0 = torch.randn_like(x_1)
        t = flow.sample_time(len(x_1), x_1.device, config.time_distribution, config.time_beta)  # (B * M,)
        t = flow.random_prefix(t, config.horizon, config.delay)  # or (B * M, T)
    x_t, velocity = flow.linear_path(x_0, x_1, t)
    proprio, depth = normalizer.proprio(batch.proprio), batch.extras["depth"]
    task = drop_some(batch.task, config.tasks) if train else batch.task
    velocity_pred = policy(x_t, t, images, proprio, depth, dropped, is_pad, task)
    count = None if count is None else count * flow_samples
    loss = losses.masked_l1(velocity_pred, velocity, ~is_pad & flow.to_predict(t), count)
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
    depth: Tensor | None = None,
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
        depth: features of the images, (B, C, L, D_f), if already known.
        prefix: actions that the chunks begin with.

    Returns:
        (B, T, A) float32, normalized; undo with `Normalizer.unnormalize_actions`.
    """
    decoder = policy.action_decoder
    depth = policy.depth_features(images) if depth is None else depth
    context = policy.observe(vision.to_float(images), proprio, depth, task=task)
    shape = (len(images), config.horizon, decoder.action_in.in_features)
    if x_0 is None:
        x_0 = flow.noise(shape, images.device, generator)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return decoder(x, t, context).float()

    return flow.integrate(velocity, x_0, steps or config.sample_steps, config.sample_method, prefix)


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
    t = flow.sample_time(num, "cpu", config.time_distribution, config.time_beta, generator)
    sums = torch.zeros(3, device=run.device)  # loss, absolute error, real actions
    for picked, batch in run.evenly_spaced(dataset, num):
        batch = with_depth(batch, policy)
        noise, times = x_0[picked].to(run.device), t[picked].to(run.device)
        with run.autocast():
            loss, _ = compute_loss(policy, batch, normalizer, config, train=False, x_0=noise, t=times)
            proprio, depth = normalizer.proprio(batch.proprio), batch.extras["depth"]
            options = {"x_0": noise, "depth": depth, "task": batch.task}
            sampled = sample_actions(policy, batch.images, proprio, config, **options)
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        sums += torch.stack([loss, error, torch.ones_like(loss)]) * (~batch.is_pad).sum()
    loss, error, count = run.sum(sums).tolist()
    return {"loss/velocity": loss / count, "action_mae": error / count}


def draw_depth(policy: Policy, dataset: ChunkDataset, path: Path, num: int = 6) -> None:
    """Draw the depth features at some steps next to what the camera saw."""
    rows = torch.linspace(0, len(dataset) - 1, num, dtype=torch.float64).long().tolist()
    batch = with_depth(dataset.__getitems__(rows).to(policy.depth_backbone.mean.device), policy)
    features = batch.extras["depth"][:, 0].float().cpu().numpy()
    images = batch.images[:, policy.depth_cameras[0]].cpu().numpy()
    draw_features(path, images, features, policy.depth_backbone.feature_grid, "features of Depth Anything 3")


def main(config: Config) -> None:
    run = start_run(config, __file__)
    data = run.load_data(config.horizon, config.normalization, config.tasks, config.delay, config.vision)
    policy = Policy(config, data.spec, pretrained=not run.resuming)
    if config.depth.depth_cache == "on":
        run.load_weights(policy)  # the features depend on them
        data = data.on(cached(data.store, policy.depth_backbone, policy.depth_cameras, run.device))
    optimizer, scheduler, average = run.prepare(policy, data)
    if run.is_main:
        draw_depth(policy, data.train, run.folder / "depth.png")
    objective = run.compiled(compute_loss)

    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():  # of one step; sets run.real_actions
            batch = with_depth(batch, policy)
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
