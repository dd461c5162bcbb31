"""Plain flow matching over action chunks: the baseline, and the script to read first.

One backbone looks at all cameras in one batched forward. A transformer encoder fuses the camera tokens and
joint states into a memory and a summary; a transformer decoder, conditioned on flow time, turns a noisy
action chunk into the velocity that carries it to the demonstrated one. With x_t = (1 - t) x_0 + t x_1,
x_0 ~ N(0, 1), t ~ Beta(1.0, 1.5), and x_1 the normalized chunk recorded after observation s, the objective is

    L = E || v(x_t, t, s) - (x_1 - x_0) ||^2      over actions that exist, not past an episode's end

(Lipman et al. 2023; Liu et al. 2023; time distribution as in pi0, Black et al. 2024). The optimizer is
schedule-free RAdam (Defazio et al. 2024): no learning-rate schedule, no separate average of the weights. To
act, dx/dt = v is integrated from noise at t = 0 to actions at t = 1.

    accelerate launch train_naive_fm.py --lr 2e-3
    accelerate launch train_naive_fm.py --dataset me/fold_towel --image-size 224 --backbone resnet18
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from common import checkpoint, flow, losses, vision
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
from common.schedules import (
    AveragedPolicy,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    learning_rates,
)
from common.tracking import Tracker
from common.transformer import ActionDecoder, Context, InfoEmbedder
from common.vision import VisionConfig


@dataclass(frozen=True)
class Config:
    """Train a plain flow-matching policy on multi-camera demonstrations."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=lambda: OptimConfig(schedule="schedule-free"))
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


class Policy(nn.Module):
    """Velocity field of action chunks given camera images and joint states.

    Its children are the components that can be frozen, initialised and rated one by one.
    """

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, pretrained: bool = True):
        """`pretrained` = False leaves the backbone's weights to the checkpoint that is loaded next."""
        super().__init__()
        self.backbone = vision.build_backbone(
            config.vision.backbone, spec.image_size, pretrained, hf_config=spec.backbone_config
        )
        widths = [(self.backbone.token_dim, self.backbone.summary_dim)] * len(spec.cameras)
        self.info_embedder = InfoEmbedder(
            widths,
            spec.state_dim,
            spec.proprio_history,
            config.d_model,
            config.num_heads,
            config.encoder_layers,
        )
        self.action_decoder = ActionDecoder(
            spec.action_dim,
            config.horizon,
            config.d_model,
            config.num_heads,
            config.decoder_layers,
            causal=config.attention == "causal",
        )

    def observe(self, images: Tensor, proprio: Tensor) -> Context:
        """What the decoder needs of an observation, computed once however often the decoder runs.

        Args:
            images: (B, N, 3, H, W) float in [0, 1].
            proprio: (B, K, P), normalized.
        """
        tokens, summary = self.backbone(images.flatten(0, 1))  # all cameras at once, (B * N, ...)
        tokens, summary = (x.unflatten(0, images.shape[:2]).unbind(1) for x in (tokens, summary))
        views = list(zip(tokens, summary, strict=True))
        return self.action_decoder.context(self.info_embedder(views, proprio))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        images: Tensor,
        proprio: Tensor,
        is_pad: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B * M, T, A) at x_t (B * M, T, A), t (B * M,), for M draws per observation."""
        return self.action_decoder(x_t, t, self.observe(images, proprio), is_pad)


def compute_loss(
    policy: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    config: Config,
    draws: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Conditional flow-matching loss over the actions that exist.

    Args:
        draws: noise (B * M, T, A) and flow time (B * M,), where they must be the same every time.
        count: real steps to divide by, see `losses.masked_mse`.
    """
    images = vision.augment(batch.images, config.vision) if policy.training else vision.to_float(batch.images)
    num_draws = config.flow_samples if draws is None else len(draws[0]) // len(images)
    x_1 = normalizer.actions(batch.actions, batch.proprio)  # (B, T, A)
    x_1 = x_1.repeat_interleave(num_draws, dim=0)  # (B * M, T, A)
    is_pad = batch.is_pad.repeat_interleave(num_draws, dim=0)  # (B * M, T)
    if draws is None:
        x_0 = torch.randn_like(x_1)
        t = flow.sample_time(len(x_1), x_1.device, config.time_distribution, config.time_beta)  # (B * M,)
    else:
        x_0, t = draws
    x_t, velocity = flow.linear_path(x_0, x_1, t)
    velocity_pred = policy(x_t, t, images, normalizer.proprio(batch.proprio), is_pad)
    return losses.masked_mse(velocity_pred, velocity, ~is_pad, None if count is None else count * num_draws)


@torch.no_grad()
def sample_actions(
    policy: Policy,
    images: Tensor,
    proprio: Tensor,
    config: Config,
    steps: int | None = None,
    generator: torch.Generator | None = None,
    x_0: Tensor | None = None,
) -> Tensor:
    """Sample one normalized action chunk per observation.

    Args:
        images: (B, N, 3, H, W) uint8.
        proprio: (B, K, P), normalized.
        steps: integration steps, instead of the configured number.
        generator: source of the noise, on the device of the images.
        x_0: the noise itself, (B, T, A).

    Returns:
        (B, T, A) float32, unitless: to be un-normalized.
    """
    decoder = policy.action_decoder
    context = policy.observe(vision.to_float(images), proprio)
    shape = (len(images), config.horizon, decoder.action_in.in_features)
    if x_0 is None:
        x_0 = torch.randn(shape, device=images.device, generator=generator)
    return flow.integrate(
        lambda x, t: decoder(x, t, context).float(), x_0, steps or config.sample_steps, config.sample_method
    )


@torch.no_grad()
def evaluate(
    policy: Policy, dataset: ChunkDataset, normalizer: Normalizer, config: Config, accelerator
) -> dict[str, float]:
    """Loss and error of sampled chunks on held-out episodes, with the same noise and flow times every time.

    At most `--eval-samples` evenly spaced steps are used, shared out over the processes. The training
    noise is not touched: evaluating more or less often changes nothing else.
    """
    num = min(config.run.eval_samples, len(dataset))
    generator = torch.Generator().manual_seed(config.run.seed)
    x_0 = torch.randn(num, config.horizon, dataset.store.action.shape[1], generator=generator)
    t = flow.sample_time(num, "cpu", config.time_distribution, config.time_beta, generator)
    sums = torch.zeros(3, device=accelerator.device)  # loss, absolute error, real elements
    share = (config.optim.batch_size, accelerator.process_index, accelerator.num_processes)
    for rows, batch in evenly_spaced(dataset, num, *share):
        batch = batch.to(accelerator.device)
        draws = (x_0[rows].to(accelerator.device), t[rows].to(accelerator.device))
        proprio = normalizer.proprio(batch.proprio)
        with accelerator.autocast():
            loss = compute_loss(policy, batch, normalizer, config, draws)
            sampled = sample_actions(policy, batch.images, proprio, config, x_0=draws[0])
        target = normalizer.actions(batch.actions, batch.proprio)
        error = losses.masked_l1(sampled, target, ~batch.is_pad)
        sums += torch.stack([loss, error, torch.ones_like(loss)]) * (~batch.is_pad).sum()
    loss, error, count = accelerator.reduce(sums).tolist()
    return {"loss": loss / count, "action_mae": error / count}


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
            loss = compute_loss(ddp_policy, batch, normalizer, config, count=count)
            tracker.add({"loss": loss})
            accelerator.backward(or_nan(loss))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()  # fp16 scales them
                tracker.add(clip())
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue  # a step is an optimizer update, not a micro-batch
        rates = learning_rates(optimizer.optimizer)
        scheduler.step()
        averaged.update()
        step, samples = step + 1, samples + global_batch

        if step % config.run.log_every == 0 or step == total_steps:
            tracker.log(step, samples, rates)
        clip.remember()
        guard.end_step()
        with tracker.paused():
            if val_set and (step % config.run.eval_every == 0 or step == total_steps):
                tracker.log_validation(
                    step, evaluate(averaged.model, val_set, normalizer, config, accelerator)
                )
            if step % config.run.save_every == 0 or step == total_steps or guard.stopping:
                checkpoint.save(
                    accelerator, run_dir, step, samples, averaged, normalizer, spec, config, tracker
                )
    tracker.close()
    guard.close(step, total_steps, run_dir)


if __name__ == "__main__":
    cli(main, Config)
