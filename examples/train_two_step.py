"""Two-step regression of action chunks: flow matching without a distribution to learn.

A fork of `train_naive_fm.py`. The network predicts the chunk, first from nothing, then from a noisy chunk.
With tau = 0.9 and x_0 ~ N(0, 1),

    L = mean ((f(0, 0, s) - x_1) / tau)^2
        + mean ((f(x_1 + (1 - tau) x_0, tau, s) - x_1) / (1 - tau))^2

(minimal iterative policy, Pan et al. 2025, arXiv 2512.01809, with the weights of their code). To act, the
first prediction is fed back: f(f(0, 0, s), tau, s). With `--sample-steps 1` the first one is used.

    accelerate launch examples/train_two_step.py --lr 2e-3
"""

import sys
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import flow, losses, vision
from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, RunConfig, cli, options
from common.data import Batch, ChunkDataset, DataConfig
from common.instructions import TaskConfig, drop_some
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import ActionDecoder, Context, InfoEmbedder, Size
from common.vision import VisionConfig

TAU = 0.9  # flow time of the second step


@options
class Config:
    """Train a policy by two-step regression on multi-camera demonstrations."""

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
    d_model: PositiveInt = 128
    """Width of encoder and decoder tokens."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide --d-model."""
    encoder_layers: PositiveInt = 2
    """Transformer layers that fuse cameras and joint states."""
    decoder_layers: PositiveInt = 3
    """Transformer layers that predict the chunk."""
    attention: Literal["causal", "full"] = "causal"
    """Self-attention within a chunk: each action attends to itself and earlier ones, or to all."""
    sample_steps: MayChange[Literal[1, 2]] = 2
    """Steps when acting."""


class Policy(nn.Module):
    """Action chunks given camera images and joint states.

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
        self.action_decoder = ActionDecoder(chunk, size, config.decoder_layers, causal)

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
        images: Tensor,
        proprio: Tensor,
        is_pad: Tensor | None = None,
        task: Tensor | None = None,
    ) -> Tensor:
        """Chunks (B * M, T, A) from x_t (B * M, T, A), t (B * M,), for M draws per observation."""
        return self.action_decoder(x_t, t, self.observe(images, proprio, task), is_pad)


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    train: bool,
    count: Tensor | None = None,
    x_0: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared errors of both steps over the actions within the episode, and their parts to log.

    Args:
        train: augment images, drop instructions.
        count: real actions to divide by: `run.real_actions`. None: those of the batch.
        x_0: noise (B, T, A); None to draw it.
    """
    images = vision.augment(batch.images, config.vision) if train else vision.to_float(batch.images)
    x_1 = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    x_0 = torch.randn_like(x_1) if x_0 is None else x_0
    # An observation's two steps count as two draws, so the encoder runs once.
    x_t = torch.stack([torch.zeros_like(x_1), x_1 + (1 - TAU) * x_0], dim=1).flatten(0, 1)  # (2 B, T, A)
    t = torch.tensor([0, TAU], device=x_1.device).repeat(len(x_1))
    scale = torch.tensor([TAU, 1 - TAU], device=x_1.device).repeat(len(x_1))[:, None, None]
    is_pad = batch.is_pad.repeat_interleave(2, dim=0)
    task = drop_some(batch.task, config.tasks) if train else batch.task
    chunks = policy(x_t, t, images, normalizer.proprio(batch.proprio), is_pad, task)
    error = (chunks - x_1.repeat_interleave(2, dim=0)) / scale
    first, second = error.unflatten(0, (-1, 2)).unbind(1)
    parts = {
        "loss/first": losses.masked_mse(first, torch.zeros_like(first), ~batch.is_pad, count),
        "loss/second": losses.masked_mse(second, torch.zeros_like(second), ~batch.is_pad, count),
    }
    return parts["loss/first"] + parts["loss/second"], parts


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: flow.Generators = None,
    task: Tensor | None = None,
) -> Tensor:
    """One normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        task: the instructions, see `InstructionEmbedder`.
        steps: 1 or 2, instead of the configured number.
        generator: unused.

    Returns:
        (B, T, A) float32, normalized; undo with `Normalizer.unnormalize_actions`.
    """
    decoder = policy.action_decoder
    context = policy.observe(vision.to_float(images), proprio, task)
    start = torch.zeros(len(images), config.horizon, decoder.action_in.in_features, device=images.device)
    chunk = decoder(start, start[:, 0, 0], context).float()
    if (steps or config.sample_steps) == 1:
        return chunk
    return decoder(chunk, start[:, 0, 0] + TAU, context).float()


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, run: Run
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise every time.

    Uses at most `--eval-samples` evenly spaced samples, divided among the processes. Leaves the global random
    state alone: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    sums = torch.zeros(3, device=run.device)  # loss, absolute error, real actions
    for picked, batch in run.evenly_spaced(dataset, num):
        noise = x_0[picked].to(run.device)
        with run.autocast():
            loss, _ = compute_loss(policy, batch, normalizer, config, train=False, x_0=noise)
            proprio = normalizer.proprio(batch.proprio)
            sampled = sample_actions(policy, batch.images, proprio, config, task=batch.task)
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        sums += torch.stack([loss, error, torch.ones_like(loss)]) * (~batch.is_pad).sum()
    loss, error, count = run.sum(sums).tolist()
    return {"loss": loss / count, "action_mae": error / count}


def main(config: Config) -> None:
    run = start_run(config, __file__)
    data = run.load_data(config.horizon, config.normalization, config.tasks, vision=config.vision)
    policy = Policy(config, data.spec, pretrained=not run.resuming)
    optimizer, scheduler, average = run.prepare(policy, data)  # run.model: the policy under DDP and autocast

    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():  # of one step; sets run.real_actions
            loss, metrics = compute_loss(
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
