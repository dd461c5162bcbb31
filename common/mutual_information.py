"""Mutual information of paired samples, in nats, and what each sample contributes to it.

Three estimators: k nearest neighbours (KSG, Kraskov et al. 2004), and two variational lower bounds with a
trained critic, InfoNCE (Oord et al. 2018) and MINE (Belghazi et al. 2018). Each gives pointwise
contributions, whose mean is the estimate.

Consecutive steps of an episode are near each other whatever states and actions have in common, and an
estimator takes that for information: two independent smooth episodes seem to share several nats. Hence every
set of samples that are compared with each other holds one step of an episode at most.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError

MEMORY_BYTES = 5e8  # for the distances that are kept at a time


class Estimate(NamedTuple):
    """Mutual information in nats."""

    value: float
    pointwise: Tensor
    """(N,), contributions of the samples; NaN for samples that were not used. The value is their mean, or the
    mean of the episodes' means where there are episodes."""

    def interval(
        self, episodes: Tensor, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean over episodes, each a mean over its samples (Efron 1979).

        Args:
            episodes: (N,), the episode of each sample.
        """
        means = episode_means(self.pointwise, episodes)[1]
        means = means[~means.isnan()]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(means), (resamples, len(means)), generator=generator)
        levels = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=means.dtype)
        low, high = means[drawn].mean(dim=1).quantile(levels).tolist()
        return low, high


def episode_means(pointwise: Tensor, episodes: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the episodes, ascending, and the mean of their samples' contributions, NaN left out."""
    numbers, place = episodes.unique(return_inverse=True)
    used = ~pointwise.isnan()
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, place[used], pointwise[used].double())
    counts = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, place[used], used[used].double())
    return numbers, sums / counts  # 0 / 0 is NaN


def require_episodes(num: int, neighbours: Sequence[int] | None) -> None:
    """Refuse too few episodes, before time is spent on them.

    Args:
        num: number of episodes.
        neighbours: values of k; None for a bound, whose critics need two halves.

    Raises:
        UserError: if they are too few.
    """
    if neighbours is not None and (not neighbours or min(neighbours) < 1):
        raise UserError(f"--neighbours {' '.join(map(str, neighbours))}: give numbers from 1 on.")
    if neighbours is not None and num <= max(neighbours) + 1:
        raise UserError(
            f"{num} episodes are too few for {max(neighbours)} nearest neighbours, which lie in different "
            f"episodes: give at least {max(neighbours) + 2}, or a smaller k."
        )
    if neighbours is None and num < 4:
        raise UserError(
            f"{num} episodes are too few: half of them train a critic, the other half is scored; give 4."
        )


def standardise(x: Tensor) -> Tensor:
    """Every variable to mean 0 and variance 1, in float64; (N, D).

    Raises:
        UserError: if a value is not finite, or no variable varies.
    """
    if not torch.isfinite(x).all():
        raise UserError("The samples hold NaN or infinity: mutual information needs finite ones.")
    x = x.double()
    deviation = x.std(dim=0)
    varies = deviation > 1e-9 * x.abs().amax(dim=0).clamp(min=1e-300)
    if not varies.any():
        raise UserError("The samples are all the same: they have no mutual information to estimate.")
    return (x[:, varies] - x[:, varies].mean(dim=0)) / deviation[varies]


def ksg(
    x: Tensor,
    y: Tensor,
    neighbours: Sequence[int] = (5, 6, 7),
    memory_bytes: float = MEMORY_BYTES,
    progress: bool = False,
) -> Estimate:
    """Mutual information by nearest neighbours: estimator 1 of Kraskov et al. (2004), averaged over k.

    Distances are Euclidean among the variables of x and of y, each standardised; the joint distance is the
    larger of the two. Samples that coincide are counted as in Gao et al. (2017), so that discrete and mixed
    variables work.

    Args:
        x, y: (N, D_x) and (N, D_y), on any device.
        neighbours: values of k.
        memory_bytes: for the distances that are kept at a time; all are computed, none are approximated.
        progress: show a bar.

    Raises:
        UserError: with too few samples for k, constant samples, or values that are not finite.
    """
    num = len(x)
    if num <= max(neighbours) + 1:
        raise UserError(
            f"{num} samples are too few for {max(neighbours)} nearest neighbours: give more episodes, or a "
            f"smaller k."
        )
    x, y = (standardise(v).float() for v in (x, y))
    rows = max(1, int(memory_bytes / (5 * 4 * num)))
    pointwise = []
    for first in tqdm(
        range(0, num, rows), desc="nearest neighbours", unit_scale=rows, unit="sample", disable=not progress
    ):
        part = slice(first, first + rows)
        pointwise.append(_ksg_pointwise(_distances(x[part], x), _distances(y[part], y), neighbours))
    values = torch.cat(pointwise)
    return Estimate(values.mean().item(), values)


def ksg_of_episodes(
    x: Tensor,
    y: Tensor,
    episodes: Tensor,
    neighbours: Sequence[int] = (5, 6, 7),
    repeats: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """KSG over sets that hold one step of every episode, until every step has been in some `repeats` sets.

    Args:
        x, y: (N, D_x) and (N, D_y).
        episodes: (N,), the episode of each sample.
        repeats: passes over the steps of the longest episode.
        seed: of the choice of sets.

    Raises:
        UserError: as `ksg`; an episode counts once.
    """
    x, y = (standardise(v).float() for v in (x, y))
    numbers = episodes.unique().cpu()
    require_episodes(len(numbers), neighbours)
    sets = episode_sets(episodes.cpu(), repeats, seed).to(x.device)  # (R, E)
    sums, counts = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    at_once = max(1, int(MEMORY_BYTES / (5 * 4 * len(numbers) ** 2)))
    rows = max(1, int(MEMORY_BYTES / (5 * 4 * len(numbers))))  # of a set that is too large to be done at once
    for chosen in tqdm(
        sets.split(at_once), desc="nearest neighbours", unit_scale=at_once, unit="set", disable=not progress
    ):
        for own in chosen.split(rows, dim=1):
            values = _ksg_pointwise(_distances(x[own], x[chosen]), _distances(y[own], y[chosen]), neighbours)
            sums.index_add_(0, own.flatten().cpu(), values.flatten().cpu().double())
            counts += torch.bincount(own.flatten().cpu(), minlength=len(x))
    pointwise = sums / counts  # NaN for a step that no set holds
    value = episode_means(pointwise, episodes.cpu())[1].mean().item()
    return Estimate(value, pointwise)


def episode_sets(episodes: Tensor, repeats: int, seed: int) -> Tensor:
    """Random sets of samples with one of every episode: (R, E), R is `repeats` times the longest episode.

    Each episode goes through permutations of its own samples, one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(episodes == number).nonzero()[:, 0] for number in episodes.unique().tolist()]
    total = repeats * max(map(len, members))
    columns = []
    for own in members:
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-total // len(own)))]
        columns.append(torch.cat(rounds)[:total])
    return torch.stack(columns, dim=1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., I, D), (..., J, D) -> (..., I, J), exact: no matrix products, whose rounding ties would feel."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
        # Others strictly within the radius, and the sample itself; at radius 0, all that are in its place.
        in_x, in_y = (torch.where(tied, d == 0, d < radius).sum(dim=-1) for d in (x, y))
        digamma = torch.special.digamma
        total += digamma(count.double()) - digamma(in_x.double()) - digamma(in_y.double())
    return (
        total / len(neighbours) + torch.special.digamma(torch.tensor(float(num), dtype=torch.float64)).item()
    )


class Critic(nn.Module):
    """Score of pairs (x, y), high where they belong together: a product of embeddings."""

    def __init__(self, x_dim: int, y_dim: int, hidden_dim: int = 128, embedding_dim: int = 32):
        super().__init__()

        def tower(dim: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(dim, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, embedding_dim),
            )

        self.x_tower, self.y_tower = tower(x_dim), tower(y_dim)
        self.x_bias, self.y_bias = (
            nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1))
            for dim in (x_dim, y_dim)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., B, D_x), (..., B, D_y) -> (..., B, B): entry i, j is the score of x_i with y_j."""
        return self.x_tower(x) @ self.y_tower(y).mT + self.x_bias(x) + self.y_bias(y).mT


def infonce(x: Tensor, y: Tensor, episodes: Tensor | None = None, **options) -> Estimate:
    """Lower bound by telling a pair from pairs of other episodes (Oord et al. 2018).

    The bound cannot exceed the logarithm of the number of samples that are compared. It is that of samples
    that the critic has not learned from.

    Args:
        x, y: (N, D_x) and (N, D_y).
        episodes: (N,), the episode of each sample; None takes every sample for one of its own.
        options: see `_cross_fit`.
    """

    def loss(scores: Tensor) -> Tensor:
        return -_infonce_pointwise(scores).mean()

    return _cross_fit(x, y, episodes, lambda: loss, _infonce_pointwise, **options)


def _infonce_pointwise(scores: Tensor) -> Tensor:
    """(..., B, B) -> (..., B), the mean of both directions."""
    own, num = scores.diagonal(dim1=-2, dim2=-1), scores.shape[-1]
    return own - (scores.logsumexp(dim=-1) + scores.logsumexp(dim=-2)) / 2 + math.log(num)


def mine(x: Tensor, y: Tensor, episodes: Tensor | None = None, decay: float = 0.99, **options) -> Estimate:
    """Lower bound of Donsker and Varadhan, with a trained critic (MINE, Belghazi et al. 2018).

    Args:
        x, y, episodes, options: as for `infonce`.
        decay: of the moving average by which the gradient of the second term is divided: with the average
            of a batch alone it would be biased.
    """

    def make_loss() -> Callable[[Tensor], Tensor]:
        average: Tensor | None = None  # logarithm of the moving average

        def loss(scores: Tensor) -> Tensor:
            nonlocal average
            log_mean = _log_mean_of_others(scores)
            now = log_mean.detach()
            if average is None:
                average = now
            average = torch.logaddexp(average + math.log(decay), now + math.log(1 - decay))
            return -(scores.diagonal().mean() - (log_mean - average).exp())

        return loss

    def pointwise(scores: Tensor) -> Tensor:
        return scores.diagonal(dim1=-2, dim2=-1) - _log_mean_of_others(scores)[..., None]

    return _cross_fit(x, y, episodes, make_loss, pointwise, **options)


def _log_mean_of_others(scores: Tensor) -> Tensor:
    """log of the mean of exp over pairs of different samples: (..., B, B) -> (...)."""
    num = scores.shape[-1]
    others = scores.masked_fill(torch.eye(num, dtype=torch.bool, device=scores.device), -torch.inf)
    return others.flatten(-2).logsumexp(dim=-1) - math.log(num * (num - 1))


def _cross_fit(
    x: Tensor,
    y: Tensor,
    episodes: Tensor | None,
    make_loss: Callable[[], Callable[[Tensor], Tensor]],
    pointwise: Callable[[Tensor], Tensor],
    steps: int = 1500,
    batch_size: int = 256,
    lr: float = 1e-3,
    repeats: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """Train a critic on each half of the episodes, and estimate on the other half.

    Args:
        make_loss: makes a function of scores (B, B) to be minimised, for each critic anew.
        pointwise: contributions (..., B) from scores (..., B, B).
        steps, batch_size, lr: of the critic's training; a batch holds one sample an episode at most.
        repeats: passes over the samples of the longest episode when estimating.
        seed: of everything random; the global generators are left alone.
        progress: show a bar.

    Raises:
        UserError: with fewer than four episodes, constant samples, or values that are not finite.
    """
    device = x.device
    x, y = (standardise(v).float() for v in (x, y))
    episodes = torch.arange(len(x)) if episodes is None else episodes.cpu()
    numbers = episodes.unique()
    require_episodes(len(numbers), None)
    generator = torch.Generator().manual_seed(seed)
    order = numbers[torch.randperm(len(numbers), generator=generator)]
    halves = [order[: len(order) // 2], order[len(order) // 2 :]]
    sums, counts = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    with tqdm(total=2 * steps, desc="critics", unit="step", disable=not progress) as bar:
        for mine_, other in (halves, halves[::-1]):
            members = torch.isin(episodes, mine_).nonzero()[:, 0]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                critic = Critic(x.shape[1], y.shape[1]).to(device)
            optimizer, loss = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=1e-3), make_loss()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            batches = _one_step_an_episode(members, episodes[members], batch_size, generator)
            for _, chosen in zip(range(steps), batches, strict=False):
                chosen = chosen.to(device)
                loss(critic(x[chosen], y[chosen])).backward()
                nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
            members = torch.isin(episodes, other).nonzero()[:, 0]
            sets = members[episode_sets(episodes[members], repeats, seed)]
            # Blocks of one size and of random episodes: the bound grows with the number that is compared.
            blocks = -(-sets.shape[1] // (2 * batch_size))
            sets = sets[:, torch.randperm(sets.shape[1], generator=generator)]
            with torch.no_grad():
                for wide in sets.split(256):
                    for chosen in wide.tensor_split(blocks, dim=1):
                        values = pointwise(critic(x[chosen.to(device)], y[chosen.to(device)])).cpu()
                        sums.index_add_(0, chosen.flatten(), values.flatten().double())
                        counts += torch.bincount(chosen.flatten(), minlength=len(x))
    values = sums / counts
    return Estimate(episode_means(values, episodes)[1].nanmean().item(), values)


def _one_step_an_episode(members: Tensor, episodes: Tensor, batch_size: int, generator: torch.Generator):
    """Endless batches of samples, each of another episode."""
    numbers, counts = episodes.unique(return_counts=True)
    order = members[episodes.argsort(stable=True)]
    starts = counts.cumsum(0) - counts
    while True:
        chosen = torch.randperm(len(numbers), generator=generator)[:batch_size]
        offsets = (torch.rand(len(chosen), generator=generator) * counts[chosen]).long()
        yield order[starts[chosen] + offsets]


def normalized_mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two labellings, divided by the mean of their entropies.

    Args:
        first, second: (N,), labels of the same N things.

    Returns:
        0 if they say nothing of each other, 1 if each follows from the other; 1, too, if both know one label.
    """
    table = np.zeros((len(np.unique(first)), len(np.unique(second))))
    np.add.at(table, (np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]), 1)
    joint = table / len(first)
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    entropies = [-np.sum(p * np.log(p)) for p in (rows, columns)]
    if sum(entropies) == 0:
        return 1.0
    known = joint > 0
    information = np.sum(joint[known] * np.log(joint[known] / np.outer(rows, columns)[known]))
    return float(2 * information / sum(entropies))
