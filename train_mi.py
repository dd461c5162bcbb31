"""Mutual information of demonstrations: how far observations determine actions, episode by episode.

Two autoencoders compress states s (head camera and joint states) and action chunks a to a few numbers each.
The script estimates the mutual information I(S; A) between these embeddings, and each episode's contribution
to it: an episode whose actions do not follow from its observations like the others' (noise, delays, mistakes)
scores low, and the best ones can be chosen for training (DemInf: Hejna et al. 2025, "Robot Data
Curation with Mutual Information Estimators"). With z = f(s) and n, n' standard normal, the objective is

    L = 0.005 | image - g_image(z_s + n) |^2 + 10 | state - g_state(z_s + n) |^2 + 0.01 | z_s |^2
      + 10 | a - g_action(z_a + n') |^2 + 0.01 | z_a |^2

with sums over pixels, joints, and actions that exist, all normalized. The noise sets the
embedding's scale: details not worth rising above it are not encoded (with means in place of sums, nothing
would be). Chunks are short, because the question is whether the next actions follow from the observation. A
long chunk averages noise away and overlaps with its neighbours. With several tasks, each is estimated alone.

    accelerate launch train_mi.py --dataset me/fold_towel --image-size 128 --backbone resnet18
    python train_mi.py --estimate-only runs/mi-20260301-101500 --estimator infonce
    accelerate launch train_vfp.py --dataset me/fold_towel \\
        --episodes-file runs/mi-20260301-101500/episodes_top80.json
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import json
import math
import os
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint, vision
from common.checkpoint import PolicySpec
from common.config import Flat, RunConfig, Share, UserPath, cli, from_dict, options
from common.console import say
from common.data import Batch, ChunkDataset, DataConfig, EpisodeStore, evenly_spaced, open_dataset
from common.errors import UserError
from common.files import read_json, write_json, write_whole
from common.mutual_information import (
    episode_means,
    infonce,
    ksg,
    require_episodes,
    within_tasks,
    without_outliers,
)
from common.normalize import Normalization, Normalizer
from common.optim import OptimConfig
from common.plots import draw_reconstructions, draw_scores
from common.run import Run, start_run
from common.transformer import Encoder, Size
from common.vision import VisionConfig

LARGEST_SIDE = 128  # pixels, of the encoded images


@options
class Config:
    """Train autoencoders of states and action chunks, and estimate their mutual information."""

    data: Flat[DataConfig] = field(default_factory=DataConfig)
    vision: Flat[VisionConfig] = field(default_factory=VisionConfig)
    optim: Flat[OptimConfig] = field(default_factory=OptimConfig)
    run: Flat[RunConfig] = field(default_factory=RunConfig)

    horizon: PositiveInt = 2
    """Actions in a chunk, in control steps."""
    normalization: Normalization = "mean-std"
    """How state and action are scaled: see common/normalize.py."""
    state_latent_dim: PositiveInt = 8
    """Width of a state's embedding."""
    action_latent_dim: PositiveInt = 8
    """Width of a chunk's embedding."""
    d_model: PositiveInt = 128
    """Width of the networks around the embeddings."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide --d-model."""
    encoder_layers: PositiveInt = 2
    """Transformer layers that read a chunk."""
    image_weight: NonNegativeFloat = 0.005
    """Weight of the squared error of images, summed over pixels."""
    vector_weight: NonNegativeFloat = 10.0
    """Weight of the squared errors of states and of chunks, summed over dimensions."""
    embedding_weight: NonNegativeFloat = 0.01
    """Weight of the squared length of embeddings."""

    estimator: Literal["ksg", "infonce"] = "ksg"
    """Estimator of mutual information: nearest neighbours, or a lower bound with a trained critic."""
    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5, 6, 7)
    """ksg: numbers of neighbours, averaged over."""
    repeats: PositiveInt = 4
    """How many times each step of the longest episode is compared with steps of the others."""
    best: tuple[Share, ...] = (0.5, 0.8)
    """Shares of the episodes, best first by score, to list in episodes_topNN.json."""
    estimate_only: UserPath | None = None
    """Estimate again with the autoencoders of this run, instead of training, and replace its scores and
    lists. Then only the options from --estimator on, --dataset (where the data are now) and --cache-dir have
    an effect."""


class StateEncoder(nn.Module):
    """Image of the head camera and joint states -> embedding."""

    def __init__(self, config: Config, spec: PolicySpec, size: tuple[int, int], pretrained: bool):
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

    def __init__(self, config: Config, spec: PolicySpec, size: tuple[int, int]):
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
        # The average image is given: learning it would drown everything else for hundreds of steps.
        self.register_buffer("average", torch.zeros(3, *size))
        self.proprio_out = mlp(config.state_latent_dim, config.d_model, spec.proprio_history * spec.state_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, state_latent_dim) -> standardised image (B, 3, H, W), normalized joint states (B, K * P)."""
        image = self.image_out(self.image_in(z).unflatten(1, (-1, *self.grid)))
        return image[..., : self.size[0], : self.size[1]] + self.average, self.proprio_out(z)


class ActionEncoder(nn.Module):
    """Action chunk -> embedding: a transformer over its actions, read at an extra token."""

    def __init__(self, config: Config, spec: PolicySpec):
        super().__init__()
        self.readout = nn.Parameter(torch.randn(1, config.d_model) * 0.02)
        self.action_in = nn.Linear(spec.action_dim, config.d_model)
        self.position = nn.Parameter(torch.randn(config.horizon, config.d_model) * 0.02)
        self.encoder = Encoder(Size(config.d_model, config.num_heads), config.encoder_layers)
        self.out = nn.Linear(config.d_model, config.action_latent_dim)

    def forward(self, actions: Tensor, is_pad: Tensor) -> Tensor:
        """(B, T, A) normalized, (B, T) -> (B, action_latent_dim); padded steps are masked."""
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
    """Embeddings of states and of action chunks, and their reconstructions.

    Its children are the components. Each one can be frozen, initialised and given its own learning rate.
    """

    def __init__(self, config: Config, spec: PolicySpec, pretrained: bool = True):
        """`pretrained`: load the backbone's weights; False if a checkpoint is loaded next."""
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
        """Set the decoder's average image from evenly spaced steps, the same in all processes."""
        batches = evenly_spaced(dataset, min(num, len(dataset)), 32)
        total = sum(self.view(vision.to_float(batch.images[:, :1])).sum(dim=0) for _, batch in batches)
        average = total / min(num, len(dataset))
        self.state_decoder.average.copy_((average - self.mean) / self.std)

    def view(self, images: Tensor) -> Tensor:
        """The first camera's image from (B, N, 3, H, W) in [0, 1], at the encoded size: (B, 3, H', W')."""
        head = images[:, 0]
        if head.shape[-2:] == self.size:
            return head
        return F.interpolate(head, self.size, mode="bilinear", antialias=True)

    def forward(
        self, images: Tensor, proprio: Tensor, actions: Tensor, is_pad: Tensor, noisy: bool = False
    ) -> "Reconstruction":
        """Embed and reconstruct, with noise on the embeddings if `noisy`.

        Args:
            images: (B, N, 3, H, W) in [0, 1].
            proprio, actions: (B, K, P) and (B, T, A), normalized.
            is_pad: (B, T).
        """
        image = self.view(images)
        z_s, z_a = self.state_encoder(image, proprio), self.action_encoder(actions, is_pad)
        told_s, told_a = (z + torch.randn_like(z) if noisy else z for z in (z_s, z_a))
        image_out, states = self.state_decoder(told_s)
        chunk = self.action_decoder(told_a).unflatten(1, (self.horizon, -1))
        return Reconstruction(z_s, z_a, (image - self.mean) / self.std, image_out, states, chunk)


class Reconstruction(NamedTuple):
    """The autoencoders' outputs for samples."""

    state_embedding: Tensor
    """(B, state_latent_dim), without noise."""
    action_embedding: Tensor
    """(B, action_latent_dim), without noise."""
    target: Tensor
    """The image to reconstruct, standardised, (B, 3, H', W')."""
    image: Tensor
    """Its reconstruction."""
    proprio: Tensor
    """Reconstructed joint states, (B, K * P), normalized."""
    actions: Tensor
    """Reconstructed chunk, (B, T, A), normalized."""


def compute_loss(
    model: nn.Module, batch: Batch, normalizer: Normalizer, config: Config, train: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Errors of the reconstructions, summed over elements, and lengths of the embeddings; means over samples.

    Args:
        train: augment images, and add noise to the embeddings.

    Returns:
        The loss, and its parts before weighting.
    """
    head = batch.images[:, :1]
    images = vision.augment(head, config.vision) if train else vision.to_float(head)
    proprio, chunk = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
    out = model(images, proprio, chunk, batch.is_pad, noisy=train)
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
    model: Autoencoders, dataset: ChunkDataset, normalizer: Normalizer, config: Config, run: Run
) -> dict[str, float]:
    """Loss and its parts, without noise, on at most `--eval-samples` held-out steps."""
    num = min(config.run.eval_samples, len(dataset))
    names = ["loss", "error/image", "error/state", "error/action", "embedding/state", "embedding/action"]
    sums = torch.zeros(len(names), device=run.device)
    for picked, batch in run.evenly_spaced(dataset, num):
        with run.autocast():
            loss, metrics = compute_loss(model, batch, normalizer, config, train=False)
        sums += torch.stack([loss, *(metrics[name] for name in names[1:])]) * len(picked)
    return dict(zip(names, (run.sum(sums) / num).tolist(), strict=True))


@torch.no_grad()
def draw_examples(
    model: Autoencoders, dataset: ChunkDataset, normalizer: Normalizer, path: Path, num: int = 8
) -> None:
    """Draw images and chunks of some steps next to their reconstructions."""
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
    for rows in tqdm(torch.arange(len(dataset)).split(batch_size), "embeddings", unit="batch", leave=False):
        batch = dataset.__getitems__(rows.numpy()).to(model.mean.device)
        proprio, chunk = normalizer.proprio(batch.proprio), normalizer.actions(batch.actions, batch.proprio)
        image = model.view(vision.to_float(batch.images[:, :1]))
        states.append(model.state_encoder(image, proprio).float().cpu())
        actions.append(model.action_encoder(chunk, batch.is_pad).float().cpu())
    return torch.cat(states), torch.cat(actions)


def refuse_few(store: EpisodeStore, config: Config) -> None:
    """Refuse a task with too few episodes to be estimated, before anything is trained or embedded."""
    numbers, counts = np.unique(store.episode_task_numbers, return_counts=True)
    names = [*(f' of "{task}"' for task in store.instructions), " without an instruction"]  # number -1
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        neighbours = config.neighbours if config.estimator == "ksg" else None
        require_episodes(count, neighbours, names[number] if len(counts) > 1 else "")


def estimate(
    model: Autoencoders, store: EpisodeStore, normalizer: Normalizer, config: Config, folder: Path
) -> None:
    """Estimate the mutual information of all episodes and write each one's contribution.

    Writes `mutual_information.json`; `episode_scores.csv`, the mean contribution of each episode's steps,
    clipped at the 1st and 99th percentile of its task; `episode_scores.png`; and for each of `--best` the
    `episodes_topNN.json` that every script takes as `--episodes-file`.
    """
    history, offset = config.data.proprio_history, config.data.action_offset
    hold = config.data.hold
    dataset = ChunkDataset(store, range(store.num_episodes), config.horizon, history, offset, hold=hold)
    device = model.mean.device if model.mean.device.type == "cuda" else "cpu"  # MPS has no float64
    x, y = (z.to(device) for z in embed_all(model.eval(), dataset, normalizer, 256))
    episodes = torch.from_numpy(store.episode_of(dataset.rows))
    settings = {"repeats": config.repeats, "seed": config.run.seed, "progress": True}
    estimator = partial(infonce, **settings)
    if config.estimator == "ksg":
        estimator = partial(ksg, neighbours=config.neighbours, **settings)
    tasks = torch.from_numpy(store.episode_task_numbers)
    result = within_tasks(estimator, x, y, episodes, tasks[episodes])
    low, high = result.interval(episodes, seed=config.run.seed)
    clipped = without_outliers(result.pointwise, tasks[episodes])
    numbers, scores = (x.numpy() for x in episode_means(clipped, episodes))
    order = np.argsort(-scores, kind="stable")

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
    write_json(folder / "mutual_information.json", report)
    say(f"mutual information: {result.value:.3f} nats [{low:.3f}, {high:.3f}] ({config.estimator})")
    write_scores(store, numbers, scores, config.best, folder)
    ends = order if len(order) < 8 else np.concatenate([order[:4], order[-4:]])
    first = store.images(store.episode_starts[numbers[ends]])[:, 0].numpy()
    titles = [f"{store.episode_indices[numbers[e]]}: {scores[e]:.2f}" for e in ends]
    draw_scores(folder / "episode_scores.png", clipped.numpy(), scores, dict(zip(titles, first, strict=True)))
    say(f"picture: {folder / 'episode_scores.png'}")


def write_scores(
    store: EpisodeStore, episodes: np.ndarray, scores: np.ndarray, best: tuple[float, ...], folder: Path
) -> None:
    """Write the scores of episodes, and for each share in `best` the episodes of each task to train on.

    An episode that was cut where its task changes counts as recorded, since `--episodes-file` chooses all of
    it: with the mean over its steps, and among the episodes of the same tasks.

    Args:
        episodes: indices in the store.
        scores: of these episodes, nats.
    """
    datasets = np.repeat(np.arange(len(store.part_episodes)), store.part_episodes)
    recorded = np.stack([datasets, store.episode_indices])[:, episodes]
    (_, names), part = np.unique(recorded, axis=1, return_inverse=True)
    lengths = np.diff(store.episode_starts)[episodes]
    steps = np.bincount(part, lengths)
    scores = np.bincount(part, lengths * scores) / steps
    holds = np.zeros((len(names), len(store.instructions) + 1), bool)
    holds[part, store.episode_task_numbers[episodes]] = True  # the last column: none stated
    tasks = np.unique(holds, axis=0, return_inverse=True)[1]
    order = np.argsort(-scores, kind="stable")
    names, steps, scores, tasks = (x[order] for x in (names, steps.astype(int), scores, tasks))
    rows = zip(names, steps, scores, strict=True)
    lines = ["episode,steps,score_nats", *(f"{name},{length},{score:.6f}" for name, length, score in rows)]
    write_whole(folder / "episode_scores.csv", ("\n".join(lines) + "\n").encode())
    own = [names[tasks == task] for task in np.unique(tasks)]  # scores of different tasks are not comparable
    for share in best:
        chosen = np.unique(np.concatenate([few[: max(round(share * len(few)), 1)] for few in own])).tolist()
        path = folder / f"episodes_top{100 * share:.0f}.json"
        content = {"fingerprint": store.source_fingerprint, "dataset": store.source, "episodes": chosen}
        write_whole(path, (json.dumps(content) + "\n").encode())
        say(f"the best {len(chosen)} of {len(names)} episodes: --episodes-file {path}")


def estimate_again(config: Config) -> None:
    """`--estimate-only`: load a run's autoencoders and estimate with other options."""
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
    given = {name: getattr(config.data, name) for name in ("dataset", "cache_dir")}
    moved = {name: place for name, place in given.items() if place != getattr(DataConfig(), name)}
    store = open_dataset(replace(trained.data, **moved))
    checkpoint.refuse_damaged(path, "policy/")
    about = path.parents[1] / "config.json"
    if not about.is_file() or read_json(about).get("fingerprint") != store.fingerprint:
        raise UserError(
            f"{config.estimate_only} has lost its config.json, or was trained on data that have changed "
            f"since: train again."
        )
    refuse_few(store, trained)
    model = Autoencoders(trained, PolicySpec.from_json(settings["spec"]), pretrained=False)
    checkpoint.load_components(model, path / "policy")
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    normalizer = Normalizer.load(path / "policy" / "stats.safetensors", trained.normalization)
    estimate(model, store, normalizer.to(model.mean.device), trained, config.estimate_only)


def main(config: Config) -> None:
    if config.data.image_history > 1:
        raise UserError("train_mi.py looks at single frames: leave out --image-history.")
    if config.estimate_only is not None:
        if os.environ.get("RANK", "0") == "0":
            estimate_again(config)
        return
    if len(config.data.dataset) > 1:
        raise UserError("Episodes are scored within one dataset: give a single --dataset.")
    run = start_run(config, __file__)
    data = run.load_data(config.horizon, config.normalization)
    refuse_few(data.store, config)
    model = Autoencoders(config, data.spec, pretrained=not run.resuming)
    if not run.resuming:
        model.fit_average(data.train)
    optimizer, scheduler, average = run.prepare(model, data)
    objective = run.compiled(compute_loss)

    while run.step < run.total_steps and not run.stopping:
        for batch in run.micro_batches():  # of one step; sets run.real_actions
            loss, metrics = objective(run.model, batch, data.normalizer, config, train=True)
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
            if run.is_main:
                draw_examples(average.model, data.val, data.normalizer, run.folder / "reconstructions.png")
        if run.due(config.run.save_every) or run.stopping:
            run.save()
    run.close()
    if run.is_main:
        estimate(average.model, data.store, data.normalizer, config, run.folder)


if __name__ == "__main__":
    cli(main, Config)
