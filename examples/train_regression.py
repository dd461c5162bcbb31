"""Regression of action chunks: the sceptic's baseline.

A fork of `train_naive_fm.py` without noise. At x_t = 0 and t = 0, the same network predicts the chunk,

    L = mean (f(0, 0, s) - x_1)^2                over actions within the episode, and dimensions

and so learns the mean of the chunks recorded after an observation, while flow matching draws one of them.

    accelerate launch examples/train_regression.py --lr 2e-3
"""

import sys
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import losses, vision
from common.checkpoint import PolicySpec
from common.config import Flat, RunConfig, cli, options
from common.data import Batch, ChunkDataset, DataConfig
from common.instructions import TaskConfig, drop_some
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig
from common.rollout import RolloutConfig, success_rate
from common.run import Run, start_run
from common.transformer import ActionDecoder, Context, InfoEmbedder, Size
from common.vision import VisionConfig


@options
class Config:
    """Train a regression policy on multi-camera demonstrations."""

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
        self.chunk = chunk
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

    def forward(self, images: Tensor, proprio: Tensor, is_pad: Tensor | None, task: Tensor | None) -> Tensor:
        """Chunks (B, T, A)."""
        x_t = torch.zeros(len(images), *self.chunk, device=images.device)
        return self.action_decoder(x_t, x_t[:, 0, 0], self.observe(images, proprio, task), is_pad)


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    train: bool,
    count: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error over the actions within the episode, and its parts to log.

    Args:
        train: augment images, drop instructions.
        count: real actions to divide by: `run.real_actions`. None: those of the batch.
    """
    images = vision.augment(batch.images, config.vision) if train else vision.to_float(batch.images)
    x_1 = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    task = drop_some(batch.task, config.tasks) if train else batch.task
    chunks = policy(images, normalizer.proprio(batch.proprio), batch.is_pad, task)
    loss = losses.masked_mse(chunks, x_1, ~batch.is_pad, count)
    return loss, {"loss/chunk": loss}


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator=None,
    task: Tensor | None = None,
) -> Tensor:
    """One normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        task: the instructions, see `InstructionEmbedder`.
        steps, generator: unused.

    Returns:
        (B, T, A) float32, normalized; undo with `Normalizer.unnormalize_actions`.
    """
    return policy(vision.to_float(images), proprio, None, task).float()


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, run: Run
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes.

    Uses at most `--eval-samples` evenly spaced samples, divided among the processes. Leaves the global random
    state alone: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    sums = torch.zeros(3, device=run.device)  # loss, absolute error, real actions
    for _, batch in run.evenly_spaced(dataset, num):
        with run.autocast():
            loss, _ = compute_loss(policy, batch, normalizer, config, train=False)
            proprio = normalizer.proprio(batch.proprio)
            sampled = sample_actions(policy, batch.images, proprio, config, task=batch.task)
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        sums += torch.stack([loss, error, torch.ones_like(loss)]) * (~batch.is_pad).sum()
    loss, error, count = run.sum(sums).tolist()
    return {"loss/chunk": loss / count, "action_mae": error / count}


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
