"""Mutual information of paired samples, in nats, and what each sample contributes to it.

Consecutive steps of an episode are always near each other, and an estimator mistakes that for shared
information: two independent smooth episodes seem to share several nats. Hence every set of samples that are
compared with each other holds at most one step of each episode.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn
from torch.special import digamma
from torchvision.ops import MLP
from tqdm import tqdm

from common.errors import UserError

MEMORY_BYTES = 5e8  # for the distances kept at a time


class Estimate(NamedTuple):
    """Mutual information in nats: the mean of the episodes' means."""

    value: float
    pointwise: Tensor
    """(N,), contributions of the samples; NaN for samples that were not used."""

    def interval(self, episodes: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the mean over episodes, each a mean over its samples (Efron 1979)."""
        means = episode_means(self.pointwise, episodes)[1].numpy()
        options = {"n_resamples": 1000, "method": "percentile", "rng": seed}
        found = bootstrap((means[~np.isnan(means)],), np.mean, confidence_level=confidence, **options)
        return tuple(float(end) for end in found.confidence_interval)


def _mean_at(places: Tensor, values: Tensor, num: int) -> Tensor:
    """Mean of the values at each of `num` places, in float64; NaN where there are no values."""
    sums = torch.zeros(num, dtype=torch.float64).index_add_(0, places, values.double())
    return sums / torch.bincount(places, minlength=num)  # 0 / 0 is NaN


def episode_means(pointwise: Tensor, episodes: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the episodes, ascending, and the mean of each one's contributions, ignoring NaN."""
    numbers, place = episodes.unique(return_inverse=True)
    used = ~pointwise.isnan()
    return numbers, _mean_at(place[used], pointwise[used], len(numbers))


def _estimate(found: list[tuple[Tensor, Tensor]], episodes: Tensor) -> Estimate:
    """Build an estimate from sets of samples and their contributions, which have the same shape."""
    places = torch.cat([samples.flatten() for samples, _ in found]).cpu()
    values = torch.cat([contributions.flatten() for _, contributions in found]).cpu()
    pointwise = _mean_at(places, values, len(episodes))
    return Estimate(episode_means(pointwise, episodes)[1].nanmean().item(), pointwise)


def require_episodes(num: int, neighbours: Sequence[int] | None, of: str = "") -> None:
    """Refuse too few episodes for `ksg` with these neighbours or, without neighbours, for `infonce`.

    `of` says which ones they are if there are others, such as ' of "fold"'.
    """
    others = ", or name only the others with --task" if of else ""
    if neighbours is None and num < 4:
        raise UserError(
            f"{num} episodes{of} are too few: half of them train a critic that scores the others; give 4"
            f"{others}."
        )
    if neighbours is not None and num <= max(neighbours) + 1:
        raise UserError(
            f"{num} episodes{of} are too few for {max(neighbours)} nearest neighbours, which lie in "
            f"different episodes: give at least {max(neighbours) + 2}, or a smaller k{others}."
        )


def within_tasks(
    estimate: Callable[[Tensor, Tensor, Tensor], Estimate],
    x: Tensor,
    y: Tensor,
    episodes: Tensor,
    tasks: Tensor,
) -> Estimate:
    """Mutual information estimated within each task, then combined.

    Across tasks, embeddings would share the task's identity, whatever the quality of each demonstration.

    Args:
        estimate: of x, y and episodes.
        tasks: (N,), the task of each sample; an episode has one.
    """
    numbers = tasks.unique().tolist()
    if len(numbers) == 1:
        return estimate(x, y, episodes)
    pointwise = torch.full((len(x),), torch.nan, dtype=torch.float64)
    for number in numbers:
        own = tasks == number
        pointwise[own] = estimate(x[own.to(x.device)], y[own.to(y.device)], episodes[own]).pointwise
    return Estimate(episode_means(pointwise, episodes)[1].nanmean().item(), pointwise)


def without_outliers(pointwise: Tensor, tasks: Tensor, share: float = 0.01) -> Tensor:
    """Contributions (N,), those of each task clipped at its quantiles `share` and 1 - `share`.

    The quantiles of all tasks together would flatten a task whose contributions are smaller than theirs.
    """
    clipped = pointwise.clone()
    for number in tasks.unique().tolist():
        own = pointwise[tasks == number]
        if len(known := own[~own.isnan()]):
            ends = known.quantile(torch.tensor([share, 1 - share], dtype=own.dtype))
            clipped[tasks == number] = own.clamp(*ends.tolist())
    return clipped


def standardise(x: Tensor) -> Tensor:
    """The variables of (N, D) that vary, standardised in float64, returned as float32."""
    if not torch.isfinite(x).all():
        raise UserError("The samples hold NaN or infinity: mutual information needs finite ones.")
    x = x.double()
    deviation = x.std(dim=0)
    varies = deviation > 1e-9 * x.abs().amax(dim=0).clamp(min=1e-300)
    if not varies.any():
        raise UserError("The samples are all the same: they have no mutual information to estimate.")
    return ((x[:, varies] - x[:, varies].mean(dim=0)) / deviation[varies]).float()


def episode_sets(episodes: Tensor, repeats: int, seed: int) -> Tensor:
    """Random sets of samples with one of every episode: (R, E), R is `repeats` times the longest episode."""
    generator = torch.Generator().manual_seed(seed)
    members = [(episodes == number).nonzero()[:, 0] for number in episodes.unique().tolist()]
    total = repeats * max(map(len, members))
    columns = []
    for own in members:  # each episode cycles through permutations of its own samples
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-total // len(own)))]
        columns.append(torch.cat(rounds)[:total])
    return torch.stack(columns, dim=1)


# Nearest neighbours


def ksg(
    x: Tensor,
    y: Tensor,
    episodes: Tensor | None = None,
    neighbours: Sequence[int] = (5, 6, 7),
    repeats: int = 4,
    seed: int = 0,
    memory_bytes: float = MEMORY_BYTES,
    progress: bool = False,
) -> Estimate:
    """Mutual information by nearest neighbours: estimator 1 of Kraskov et al. (2004), averaged over k.

    Distances are Euclidean among the variables of x and of y, each standardised; the joint distance is the
    larger of the two. Samples that coincide are counted as in Gao et al. (2017), so that discrete and mixed
    variables work.

    Args:
        x, y: (N, D_x) and (N, D_y), on any device.
        episodes: (N,), the episode of each sample; None: every sample is its own episode.
        neighbours: values of k.
        repeats: passes over the steps of the longest episode.
        memory_bytes: for the distances kept at a time; nothing is approximated.
    """
    x, y = standardise(x), standardise(y)
    episodes, repeats = (torch.arange(len(x)), 1) if episodes is None else (episodes.cpu(), repeats)
    require_episodes(len(episodes.unique()), neighbours)
    sets = episode_sets(episodes, repeats, seed)  # (R, E)
    found, num = [], sets.shape[1]
    at_once = max(1, int(memory_bytes / (5 * 4 * num**2)))
    rows = max(1, int(memory_bytes / (5 * 4 * num)))  # of a set that is too large to process at once
    parts = sets.to(x.device).split(at_once)
    for chosen in tqdm(parts, "nearest neighbours", unit="set", unit_scale=at_once, disable=not progress):
        for own in chosen.split(rows, dim=1):
            # Computed exactly: the rounding of matrix products would break ties.
            mode = "donot_use_mm_for_euclid_dist"
            distances = [torch.cdist(v[own], v[chosen], compute_mode=mode) for v in (x, y)]
            found.append((own, _ksg_pointwise(*distances, neighbours)))
    return _estimate(found, episodes)


def _ksg_pointwise(x: Tensor, y: Tensor, neighbours: Sequence[int]) -> Tensor:
    """Contributions (..., I) from distances (..., I, J) of I of the J samples to all, themselves included."""
    joint, num = torch.maximum(x, y), x.shape[-1]
    # The sample itself is the nearest of all, at distance 0.
    nearest = joint.topk(max(neighbours) + 1, dim=-1, largest=False).values
    total = torch.zeros(joint.shape[:-1], dtype=torch.float64, device=x.device)
    for k in neighbours:
        radius = nearest[..., k : k + 1]
        tied = radius == 0
        count = torch.where(tied[..., 0], (joint == 0).sum(dim=-1) - 1, k)
        # Others strictly within the radius, and the sample itself; at radius 0, all in the same place.
        in_x, in_y = (torch.where(tied, d == 0, d < radius).sum(dim=-1) for d in (x, y))
        total += digamma(count.double()) - digamma(in_x.double()) - digamma(in_y.double())
    return total / len(neighbours) + digamma(torch.tensor(num, dtype=torch.float64)).item()


# A trained critic


class Critic(nn.Module):
    """Score of pairs (x, y), high if they belong together: a product of embeddings."""

    def __init__(self, x_dim: int, y_dim: int):
        super().__init__()
        tower = partial(MLP, activation_layer=nn.SiLU)
        self.x_tower, self.y_tower = (tower(dim, [128, 128, 32]) for dim in (x_dim, y_dim))
        self.x_bias, self.y_bias = (tower(dim, [128, 1]) for dim in (x_dim, y_dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., B, D_x), (..., B, D_y) -> (..., B, B): entry i, j is the score of x_i with y_j."""
        return self.x_tower(x) @ self.y_tower(y).mT + self.x_bias(x) + self.y_bias(y).mT


def infonce(
    x: Tensor,
    y: Tensor,
    episodes: Tensor | None = None,
    steps: int = 1500,
    batch_size: int = 256,
    lr: float = 1e-3,
    repeats: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """InfoNCE, a lower bound: a critic learns to tell a pair from pairs across episodes (Oord et al. 2018).

    A critic is trained on each half of the episodes and scores the other half, which it has not seen.
    The bound cannot exceed the logarithm of the number of samples that are compared.

    Args:
        x, y: (N, D_x) and (N, D_y).
        episodes: (N,), the episode of each sample; None: every sample is its own episode.
        steps, batch_size, lr: of the critic's training; a batch holds at most one sample per episode.
        repeats: passes over the samples of the longest episode when estimating.
        seed: of everything random; the global generators are not touched.
    """
    x, y = standardise(x), standardise(y)
    episodes = torch.arange(len(x)) if episodes is None else episodes.cpu()
    numbers = episodes.unique()
    require_episodes(len(numbers), None)
    found = []
    bar = tqdm(total=2 * steps, desc="critics", unit="step", disable=not progress)
    with bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = numbers[torch.randperm(len(numbers))].tensor_split([len(numbers) // 2])
        halves = [torch.isin(episodes, half).nonzero()[:, 0] for half in order]
        halves = [half[episode_sets(episodes[half], repeats, seed)].to(x.device) for half in halves]
        for learned, scored in (halves, halves[::-1]):
            critic = Critic(x.shape[1], y.shape[1]).to(x.device)
            _train(critic, x, y, learned, steps, batch_size, lr, bar)
            # Blocks of equal size and random episodes, since the bound grows with the number compared.
            blocks = -(-scored.shape[1] // (2 * batch_size))
            shuffled = scored[:, torch.randperm(scored.shape[1])]
            for rows in shuffled.split(256):
                for chosen in rows.tensor_split(blocks, dim=1):
                    with torch.no_grad():
                        found.append((chosen, _infonce_pointwise(critic(x[chosen], y[chosen]))))
    return _estimate(found, episodes)


def _train(critic, x, y, sets: Tensor, steps: int, batch_size: int, lr: float, bar: tqdm) -> None:
    """Maximise the bound on random parts of random sets, with a cosine schedule."""
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for row in torch.randint(len(sets), (steps,)).tolist():
        chosen = sets[row, torch.randperm(sets.shape[1])[:batch_size]]
        (-_infonce_pointwise(critic(x[chosen], y[chosen])).mean()).backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.update()


def _infonce_pointwise(scores: Tensor) -> Tensor:
    """(..., B, B) -> (..., B), the mean of both directions."""
    own, num = scores.diagonal(dim1=-2, dim2=-1), scores.shape[-1]
    return own - (scores.logsumexp(dim=-1) + scores.logsumexp(dim=-2)) / 2 + math.log(num)
