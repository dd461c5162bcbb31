"""Mutual information of demonstrations: how much actions follow from what was seen, and where they do not.

Two autoencoders compress states s (head camera and joint states) and action chunks a to a few numbers each.
Between these embeddings the mutual information I(S; A) is estimated, and what every episode contributes to
it: an episode whose actions do not follow from its observations as those of the others do (noise, delays,
mistakes) scores low, and the best ones can be chosen for training (DemInf: Hejna et al. 2025, "Robot Data
Curation with Mutual Information Estimators"). With z = f(s) and n, n' standard normal, the objective is

    L = 0.005 | image - g_image(z_s + n) |^2 + 10 | state - g_state(z_s + n) |^2 + 0.01 | z_s |^2
      + 10 | a - g_action(z_a + n') |^2 + 0.01 | z_a |^2

with sums over pixels, joints, and actions that exist, all normalized. The noise gives an embedding its
scale: what is not worth standing out from it is not encoded (means in place of the sums would leave nothing
that is). Chunks are short: what is asked is whether the next actions follow from what is seen. A long chunk
averages noise away and shares its course with its neighbours.

    accelerate launch train_mi.py --dataset me/fold_towel --image-size 128 --backbone resnet18
    python train_mi.py --estimate-only runs/mi-20260301-101500 --estimator infonce
    accelerate launch train_vfp.py --dataset me/fold_towel \\
        --episodes-file runs/mi-20260301-101500/episodes_top80.json
"""

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, mutual_information, vision
from common.config import Flat, RunConfig, cli, from_dict, resolve_steps
from common.data import (
    Batch,
    ChunkDataset,
    DataConfig,
    EpisodeStore,
    evenly_spaced,
    make_loader,
    open_dataset,
    split_episodes,
)
from common.errors import UserError
from common.faults import GradientClipper, Guard, or_nan
from common.files import read_json, write_json, write_whole
from common.launch import check_same_data, create_run_dir, make_accelerator
from common.normalize import Normalization, Normalizer
from common.pictures import draw_reconstructions, draw_scores
from common.schedules import (
    AveragedPolicy,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    learning_rates,
)
from common.tracking import Tracker
from common.transformer import Encoder
from common.vision import VisionConfig

LARGEST_SIDE = 128  # pixels: of the images that are encoded


@dataclass(frozen=True)
class Config:
    """Train autoencoders of states and action chunks, and estimate what these have in common."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    run: Flat[RunConfig] = field(default_factory=RunConfig)

    horizon: int = 2
    """Actions in a chunk, in control steps."""
    normalization: Normalization = "mean-std"
    """How state and action are scaled: see common/normalize.py."""
    state_latent_dim: int = 8
    """Width of a state's embedding."""
    action_latent_dim: int = 8
    """Width of a chunk's embedding."""
    d_model: int = 128
    """Width of the networks around the embeddings."""
    num_heads: int = 4
    """Attention heads; must divide --d-model."""
    encoder_layers: int = 2
    """Transformer layers that read a chunk."""
    image_weight: float = 0.005
    """Weight of the squared error of images, summed over pixels."""
    vector_weight: float = 10.0
    """Weight of the squared errors of states and of chunks, summed over dimensions."""
    embedding_weight: float = 0.01
    """Weight of the squared length of embeddings."""

    estimator: Literal["ksg", "infonce", "mine"] = "ksg"
    """Estimator of mutual information: nearest neighbours, or a lower bound with a trained critic."""
    neighbours: tuple[int, ...] = (5, 6, 7)
    """ksg: numbers of neighbours, averaged over."""
    repeats: int = 4
    """Times that every step of the longest episode is compared with steps of the others."""
    best: tuple[float, ...] = (0.5, 0.8)
    """Shares of the episodes, the best by score, to list in episodes_topNN.json."""
    estimate_only: Path | None = None
    """Run whose autoencoders to estimate with again, instead of training. Of the other options, only those
    from --estimator on, and --cache-dir, are heeded then."""


class StateEncoder(nn.Module):
    """Image of the head camera and joint states -> embedding."""

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, size: tuple[int, int], pretrained: bool):
        super().__init__()
        self.backbone = vision.build_backbone(
            config.vision.backbone, size, pretrained, hf_config=spec.backbone_config
        )
        width = self.backbone.token_dim + self.backbone.summary_dim + spec.proprio_history * spec.state_dim
        self.out = mlp(width, config.d_model, config.state_latent_dim)

    def forward(self, image: Tensor, proprio: Tensor) -> Tensor:
        """image (B, 3, H, W) in [0, 1], proprio (B, K, P) normalized -> (B, state_latent_dim)."""
        tokens, summary = self.backbone(image)
        return self.out(torch.cat([tokens.mean(dim=1), summary, proprio.flatten(1)], dim=1))


class StateDecoder(nn.Module):
    """Embedding -> image and joint states."""

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, size: tuple[int, int]):
        super().__init__()
        self.size, channels = size, config.d_model
        self.grid = tuple(math.ceil(side / 16) for side in size)
        self.image_in = mlp(config.state_latent_dim, config.d_model, channels * math.prod(self.grid))
        stages = []
        for _ in range(4):
            narrower = max(channels // 2, 16)
            stages += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(channels, narrower, 3, padding=1),
                nn.GroupNorm(math.gcd(narrower, 8), narrower),
                nn.SiLU(),
            ]
            channels = narrower
        self.image_out = nn.Sequential(*stages, nn.Conv2d(channels, 3, 3, padding=1))
        # What is the same in all images is given: to learn it would drown all else for hundreds of steps.
        self.register_buffer("average", torch.zeros(3, *size))
        self.proprio_out = mlp(config.state_latent_dim, config.d_model, spec.proprio_history * spec.state_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, state_latent_dim) -> standardised image (B, 3, H, W), normalized joint states (B, K * P)."""
        image = self.image_out(self.image_in(z).unflatten(1, (-1, *self.grid)))
        return image[..., : self.size[0], : self.size[1]] + self.average, self.proprio_out(z)


class ActionEncoder(nn.Module):
    """Action chunk -> embedding: a transformer over its actions, read at a token of its own."""

    def __init__(self, config: Config, spec: checkpoint.PolicySpec):
        super().__init__()
        self.readout = nn.Parameter(torch.randn(1, config.d_model) * 0.02)
        self.action_in = nn.Linear(spec.action_dim, config.d_model)
        self.position = nn.Parameter(torch.randn(config.horizon, config.d_model) * 0.02)
        self.encoder = Encoder(config.d_model, config.num_heads, config.encoder_layers)
        self.out = nn.Linear(config.d_model, config.action_latent_dim)

    def forward(self, actions: Tensor, is_pad: Tensor) -> Tensor:
        """(B, T, A) normalized, (B, T) -> (B, action_latent_dim); steps that do not exist are not seen."""
        x = self.action_in(actions) + self.position
        x = torch.cat([self.readout.expand(len(x), 1, -1), x], dim=1)
        return self.out(self.encoder(x, F.pad(~is_pad, (1, 0), value=True))[:, 0])


def mlp(features_in: int, hidden: int, features_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features_in, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, features_out),
    )


class Autoencoders(nn.Module):
    """Embeddings of states and of action chunks, and what can be told from them.

    Its children are the components that can be frozen, initialised and rated one by one.
    """

    def __init__(self, config: Config, spec: checkpoint.PolicySpec, pretrained: bool = True):
        """`pretrained` = False leaves the backbone's weights to the checkpoint that is loaded next."""
        super().__init__()
        scale = min(1.0, LARGEST_SIDE / max(spec.image_size))
        self.size = tuple(max(round(side * scale), 16) for side in spec.image_size)
        self.horizon = config.horizon
        self.state_encoder = StateEncoder(config, spec, self.size, pretrained)
        self.state_decoder = StateDecoder(config, spec, self.size)
        self.action_encoder = ActionEncoder(config, spec)
        self.action_decoder = mlp(config.action_latent_dim, config.d_model, config.horizon * spec.action_dim)
        self.register_buffer("mean", torch.tensor(vision.IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vision.IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def fit_average(self, dataset: ChunkDataset, num: int = 256) -> None:
        """Give the decoder the average image of evenly spaced steps, the same in every process."""
        batches = evenly_spaced(dataset, min(num, len(dataset)), 32)
        total = sum(self.view(vision.to_float(batch.images[:, :1])).sum(dim=0) for _, batch in batches)
        average = total / min(num, len(dataset))
        self.state_decoder.average.copy_((average - self.mean) / self.std)

    def view(self, images: Tensor) -> Tensor:
        """The first of cameras (B, N, 3, H, W) in [0, 1], at the size that is encoded: (B, 3, H', W')."""
        head = images[:, 0]
        if head.shape[-2:] == self.size:
            return head
        return F.interpolate(head, self.size, mode="bilinear", antialias=True)

    def forward(self, images: Tensor, proprio: Tensor, actions: Tensor, is_pad: Tensor) -> "Reconstruction":
        """Embed and reconstruct, with noise on the embeddings while training.

        Args:
            images: (B, N, 3, H, W) in [0, 1].
            proprio, actions: (B, K, P) and (B, T, A), normalized.
            is_pad: (B, T).
        """
        image = self.view(images)
        z_s, z_a = self.state_encoder(image, proprio), self.action_encoder(actions, is_pad)
        noisy = [z + torch.randn_like(z) if self.training else z for z in (z_s, z_a)]
        image_out, states = self.state_decoder(noisy[0])
        chunk = self.action_decoder(noisy[1]).unflatten(1, (self.horizon, -1))
        return Reconstruction(z_s, z_a, (image - self.mean) / self.std, image_out, states, chunk)


class Reconstruction(NamedTuple):
    """What the autoencoders make of samples."""

    state_embedding: Tensor
    """(B, state_latent_dim), without noise."""
    action_embedding: Tensor
    """(B, action_latent_dim), without noise."""
    target: Tensor
    """The image that is to be reconstructed, standardised, (B, 3, H', W')."""
    image: Tensor
    """Its reconstruction."""
    proprio: Tensor
    """Reconstructed joint states, (B, K * P), normalized."""
    actions: Tensor
    """Reconstructed chunk, (B, T, A), normalized."""


def compute_loss(
    model: nn.Module, batch: Batch, normalizer: Normalizer, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of the reconstructions, summed over elements, and lengths of the embeddings; means over samples.

    Returns:
        The loss, and its parts before they are weighted.
    """
    images = (
        vision.augment(batch.images[:, :1], config.vision)
        if model.training
        else vision.to_float(batch.images[:, :1])
    )
    proprio, chunk = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
    out = model(images, proprio, chunk, batch.is_pad)
    real = (~batch.is_pad).unsqueeze(-1)
    parts = {
        "error/image": (config.image_weight, out.image.float() - out.target),
        "error/state": (config.vector_weight, out.proprio.float() - proprio.flatten(1)),
        "error/action": (config.vector_weight, torch.where(real, out.actions.float() - chunk, 0.0)),
        "embedding/state": (config.embedding_weight, out.state_embedding.float()),
        "embedding/action": (config.embedding_weight, out.action_embedding.float()),
    }
    metrics = {name: x.square().flatten(1).sum(dim=1).mean() for name, (_, x) in parts.items()}
    return sum(weight * metrics[name] for name, (weight, _) in parts.items()), metrics


@torch.no_grad()
def evaluate(
    model: Autoencoders, dataset: ChunkDataset, normalizer: Normalizer, config: Config, accelerator
) -> dict[str, float]:
    """Loss and its parts, without noise, on at most `--eval-samples` held-out steps."""
    num = min(config.run.eval_samples, len(dataset))
    sums: dict[str, Tensor] = {}
    share = (config.optim.batch_size, accelerator.process_index, accelerator.num_processes)
    for rows, batch in evenly_spaced(dataset, num, *share):
        with accelerator.autocast():
            loss, metrics = compute_loss(model, batch.to(accelerator.device), normalizer, config)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value * len(rows)
    names = ["loss", "error/image", "error/state", "error/action", "embedding/state", "embedding/action"]
    zero = torch.zeros((), device=accelerator.device)  # of a process that has no share
    totals = accelerator.reduce(torch.stack([sums.get(name, zero) for name in names]))
    return dict(zip(names, (totals / num).tolist(), strict=True))


@torch.no_grad()
def draw_examples(
    model: Autoencoders, dataset: ChunkDataset, normalizer: Normalizer, path: Path, num: int = 8
) -> None:
    """Picture of images and chunks of some steps, and of what is left of them after the embedding."""
    _, batch = next(evenly_spaced(dataset, min(num, len(dataset)), num))
    batch = batch.to(model.mean.device)
    proprio, chunk = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
    out = model(vision.to_float(batch.images[:, :1]), proprio, chunk, batch.is_pad)
    images, decoded = ((x.float() * model.std + model.mean).clamp(0, 1) for x in (out.target, out.image))
    real = [
        chunks.float().masked_fill(batch.is_pad.unsqueeze(-1), torch.nan) for chunks in (chunk, out.actions)
    ]
    draw_reconstructions(path, *(x.cpu().numpy() for x in (images, decoded, *real)))


@torch.no_grad()
def embed_all(
    model: Autoencoders, dataset: ChunkDataset, normalizer: Normalizer, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Embeddings of all steps, (N, state_latent_dim) and (N, action_latent_dim), on the CPU."""
    states, actions = [], []
    batches = range(0, len(dataset), batch_size)
    for first in tqdm(batches, desc="embeddings", unit="batch", leave=False):
        rows = np.arange(first, min(first + batch_size, len(dataset)))
        batch = dataset.__getitems__(rows).to(model.mean.device)
        proprio, chunk = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
        states.append(
            model.state_encoder(model.view(vision.to_float(batch.images[:, :1])), proprio).float().cpu()
        )
        actions.append(model.action_encoder(chunk, batch.is_pad).float().cpu())
    return torch.cat(states), torch.cat(actions)


def estimate(
    model: Autoencoders, store: EpisodeStore, normalizer: Normalizer, config: Config, run_dir: Path
) -> None:
    """Estimate the mutual information of all episodes and write down what each contributes.

    Writes `mutual_information.json`; `episode_scores.csv`, the mean contribution of each episode's steps,
    these clipped at the 1st and 99th percentile; `episode_scores.png`; and for each of `--best` the
    `episodes_topNN.json` that every script takes as `--episodes-file`.
    """
    history, offset = config.data.proprio_history, config.data.action_offset
    dataset = ChunkDataset(store, range(store.num_episodes), config.horizon, history, offset)
    x, y = embed_all(model.eval(), dataset, normalizer, 256)
    episodes = torch.from_numpy(store.episode_of(dataset.rows))
    device = model.mean.device if model.mean.device.type == "cuda" else "cpu"  # float64 is not everywhere
    options = {"repeats": config.repeats, "seed": config.run.seed, "progress": True}
    if config.estimator == "ksg":
        result = mutual_information.ksg_of_episodes(
            x.to(device), y.to(device), episodes, config.neighbours, **options
        )
    else:
        bound = getattr(mutual_information, config.estimator)
        result = bound(x.to(device), y.to(device), episodes, **options)
    low, high = result.interval(episodes, seed=config.run.seed)
    known = result.pointwise[~result.pointwise.isnan()]
    clipped = result.pointwise.clamp(*known.quantile(torch.tensor([0.01, 0.99], dtype=known.dtype)).tolist())
    numbers, scores = mutual_information.episode_means(clipped, episodes)
    names, lengths = store.episode_indices[numbers.numpy()], np.diff(store.episode_starts)[numbers.numpy()]
    order = np.argsort(-scores.numpy(), kind="stable")

    report = {
        "estimator": config.estimator,
        "nats": result.value,
        "interval_95": [low, high],
        "steps": len(dataset),
        "episodes": len(numbers),
        "dataset": store.source,
        "fingerprint": store.source_fingerprint,
        "neighbours": list(config.neighbours) if config.estimator == "ksg" else None,
        "repeats": config.repeats,
        "seed": config.run.seed,
    }
    write_json(run_dir / "mutual_information.json", report)
    lines = ["episode,steps,score_nats"]
    lines += [f"{names[e]},{lengths[e]},{scores[e]:.6f}" for e in order]
    write_whole(run_dir / "episode_scores.csv", ("\n".join(lines) + "\n").encode())
    print(f"mutual information: {result.value:.3f} nats [{low:.3f}, {high:.3f}] ({config.estimator})")
    for share in config.best:
        best = np.sort(names[order[: max(round(share * len(order)), 1)]]).tolist()
        path = run_dir / f"episodes_top{100 * share:.0f}.json"
        content = {"fingerprint": store.source_fingerprint, "dataset": store.source, "episodes": best}
        write_whole(path, (json.dumps(content) + "\n").encode())
        print(f"the best {len(best)} of {len(order)} episodes: --episodes-file {path}")
    ends = [order[0], order[-1]] if len(order) < 8 else [*order[:4], *order[-4:]]
    first = store.images(store.episode_starts[numbers.numpy()[ends]])[:, 0].numpy()
    draw_scores(
        run_dir / "episode_scores.png",
        clipped.numpy(),
        scores.numpy(),
        {f"{names[e]}: {scores[e]:.2f}": image for e, image in zip(ends, first, strict=True)},
    )
    print(f"picture: {run_dir / 'episode_scores.png'}")


def estimate_again(config: Config) -> None:
    """`--estimate-only`: load a run's autoencoders, and estimate with other options."""
    path = checkpoint.find(config.estimate_only)
    settings = checkpoint.read_settings(path)
    if settings["script"] != Path(__file__).name:
        raise UserError(
            f"{config.estimate_only} was trained by {settings['script']}: give a run of "
            f"{Path(__file__).name}."
        )
    trained = from_dict(Config, settings["config"])
    chosen = {name: getattr(config, name) for name in ("estimator", "neighbours", "repeats", "best")}
    trained = replace(trained, **chosen)
    moved = {} if config.data.cache_dir == DataConfig().cache_dir else {"cache_dir": config.data.cache_dir}
    store = open_dataset(replace(trained.data, **moved))
    saved = read_json(path.parents[1] / "config.json")["fingerprint"]
    if saved != store.fingerprint:
        raise UserError(f"{config.estimate_only} was trained on data that have changed since: train anew.")
    model = Autoencoders(trained, checkpoint.PolicySpec.from_json(settings["spec"]), pretrained=False)
    checkpoint.load_components(model, path / "policy")
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    normalizer = Normalizer.load(path / "policy" / "stats.safetensors", trained.normalization)
    estimate(model, store, normalizer.to(model.mean.device), trained, config.estimate_only)


def main(config: Config) -> None:
    if config.estimate_only is not None:
        if os.environ.get("RANK", "0") == "0":
            estimate_again(config)
        return
    if len(config.data.dataset) > 1:
        raise UserError("Episodes are scored within one dataset: give a single --dataset.")

    # Processes and precision. Weights are initialised alike everywhere, noise differs from rank to rank.
    accelerator = make_accelerator(config.run, config.optim.grad_accumulation)
    set_seed(config.run.seed)

    # Data
    store = open_dataset(config.data)
    check_same_data(config.run, store)
    mutual_information.require_episodes(
        store.num_episodes, config.neighbours if config.estimator == "ksg" else None
    )
    train_episodes, held_out = split_episodes(store, config.data.val_fraction, config.run.seed)
    history, offset = config.data.proprio_history, config.data.action_offset
    train_set = ChunkDataset(store, train_episodes, config.horizon, history, offset)
    val_set = ChunkDataset(store, held_out, config.horizon, history, offset) if len(held_out) else None
    normalizer = Normalizer.fit(train_set, config.normalization, config.data.relative_actions)
    normalizer.to(accelerator.device)
    global_batch = config.optim.batch_size * config.optim.grad_accumulation * accelerator.num_processes

    # Autoencoders
    spec = checkpoint.PolicySpec.of(train_set, config.run)
    model = Autoencoders(config, spec, pretrained=not config.run.resume)
    spec = spec.with_backbone(model.state_encoder.backbone)
    if not config.run.resume:
        model.fit_average(train_set)
        checkpoint.initialise(model, config.run.init_from)
    checkpoint.freeze(model, config.run.freeze)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # pretrained convolutional backbones have it
    model.to(accelerator.device)

    # Optimizer, and the weights to export; their average is made before Accelerate patches `forward`
    optimizer = build_optimizer(model, config.optim)
    averaged = AveragedPolicy(model, optimizer, config.optim.ema_decay)
    if config.run.compile:
        model.compile()
    ddp_model, optimizer = accelerator.prepare(model, optimizer)

    # Start, or go on where an earlier run left off
    step = samples = 0
    set_seed(config.run.seed, device_specific=True)
    if config.run.resume:
        step, samples = checkpoint.restore(accelerator, config.run.run_dir, averaged)
    total_steps = resolve_steps(
        config.optim.steps, config.optim.epochs, len(train_set), global_batch, step, samples
    )
    scheduler = build_scheduler(optimizer.optimizer, model, config.optim, total_steps, step)
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
    clip = GradientClipper(model, optimizer.optimizer, config.optim.grad_clip)
    guard = Guard(accelerator, config.run, tracker)

    # Training
    model.train()
    for name in config.run.freeze:
        getattr(model, name).eval()
    while step < total_steps and not guard.stopping:
        with accelerator.accumulate(ddp_model):
            with tracker.waiting():
                batch = next(batches).to(accelerator.device)
            loss, metrics = compute_loss(ddp_model, batch, normalizer, config)
            tracker.add({"loss": loss, **metrics})
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
                if accelerator.is_main_process:
                    draw_examples(averaged.model, val_set, normalizer, run_dir / "reconstructions.png")
            if step % config.run.save_every == 0 or step == total_steps or guard.stopping:
                checkpoint.save(
                    accelerator, run_dir, step, samples, averaged, normalizer, spec, config, tracker
                )
    tracker.close()
    guard.close(step, total_steps, run_dir)

    # Estimation
    if accelerator.is_main_process:
        estimate(averaged.model, store, normalizer, config, run_dir)


if __name__ == "__main__":
    cli(main, Config)
