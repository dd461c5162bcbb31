"""Samples for training: chunks of actions and what was seen when they began, in shuffled, resumable order."""

from __future__ import annotations

import copy
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.store import EpisodeStore
from common.data.tasks import draw_shares
from common.data.workers import cores
from common.errors import UserError
from common.watch import SIGNALS


class Batch(NamedTuple):
    """What a policy learns from: B chunks and what was seen when they began."""

    images: Tensor
    """(B, N, 3, H, W) uint8, RGB; N cameras in the order of the store. With an image history of F frames
    (B, N, F, 3, H, W), the present one last."""
    proprio: Tensor
    """(B, K, P) float32, the last K states, the present one last; in the units of the recording."""
    actions: Tensor
    """(B, T, A) float32, the present step's action and the T - 1 after it; in the units of the recording."""
    is_pad: Tensor
    """(B, T) bool, true where the action lies past the episode's end (there the last action is repeated)."""
    index: Tensor
    """(B,) int64, the step's number in the store."""
    extras: Mapping[str, Tensor] = MappingProxyType({})
    """(B, ...) each: what caches have added to the store, and `task`."""

    @property
    def task(self) -> Tensor | None:
        """(B,) int64, indices in `EpisodeStore.instructions`, -1 for none; None if the policy is not told."""
        return self.extras.get("task")

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to all of its tensors."""
        return Batch(*map(function, self[:-1]), {name: function(x) for name, x in self.extras.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; asynchronous where the memory is pinned."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


class _Recycler:
    """Memory for batches, reused once no view of it is left: touching fresh pages is ten times slower.

    `torch.from_numpy` keeps its array alive as long as a view of the tensor lives: a weak reference shows it.
    """

    def __init__(self, keep: int = 4):
        self.keep, self._lock = keep, Lock()  # `Ahead` and evaluation may gather at once
        self.loans: list[tuple[np.ndarray, weakref.ref]] = []

    def __reduce__(self):
        return _Recycler, (self.keep,)  # loans stay in their process

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        shape = (*shape[:-1], shape[-1] * dtype.itemsize)
        with self._lock:
            free = [buffer for buffer, loan in self.loans if loan() is None and buffer.shape == shape]
            # PyTorch aligns to 64 bytes, NumPy to 16, which makes copying take 50 % longer.
            buffer = free[0] if free else torch.empty(shape, dtype=torch.uint8).numpy()
            others = [loan for loan in self.loans if loan[0] is not buffer]
            view = buffer.view()
            self.loans = [*others[1 - self.keep :], (buffer, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype)


class ChunkDataset(Dataset):
    """Every step of some episodes, as the start of an action chunk.

    The chunk of step i is the `horizon` actions from i + `action_offset` on; past the episode's end the last
    action is repeated and, after `hold` steps, marked in `is_pad`. The `proprio_history` states end with that
    of step i; before the episode's start the first one is repeated. So are the `image_history` frames of each
    camera, `image_stride` steps apart. A step whose chunk lies wholly past the end is no sample.
    `episodes` are indices in the store. With `told`, batches have the instruction's number, `Batch.task`.
    """

    def __init__(
        self,
        store: EpisodeStore,
        episodes: Sequence[int] | np.ndarray,
        horizon: int,
        proprio_history: int = 1,
        action_offset: int = 0,
        told: bool = False,
        image_history: int = 1,
        image_stride: int = 1,
        hold: int = 0,
    ):
        self.told, self.image_history, self.image_stride = told, image_history, image_stride
        self.hold = hold
        self.store, self.horizon = store, horizon
        self.proprio_history, self.action_offset = proprio_history, action_offset
        self.episodes = np.asarray(episodes, np.int64)
        starts = store.episode_starts
        spans = [np.arange(starts[e], starts[e + 1] - action_offset) for e in self.episodes]
        self.rows = np.concatenate(spans) if spans else np.empty(0, np.int64)  # step of each sample
        if spans and not len(self.rows):
            raise UserError(f"--action-offset {action_offset} is longer than every episode: lower it.")
        parts = np.repeat(np.arange(len(store.part_episodes)), store.part_episodes)
        sample_parts = np.repeat(parts[self.episodes], [len(span) for span in spans])
        self.part_samples = np.bincount(sample_parts, minlength=len(store.part_episodes))  # of each dataset
        self._buffers = {name: _Recycler() for name in ("images", *store.extras)}

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self) -> dict[str, Any]:
        """The groups of samples and the weights with which they are drawn, as arguments of `SampleStream`."""
        store = self.store
        if store.task_weights is None and not store.task_balance:
            return {"num_samples": self.part_samples, "weights": store.part_weights}
        tasks = store.episode_task_numbers[store.episode_of(self.rows)] + 1  # 0 where none is stated
        shape = len(self.part_samples), len(store.instructions) + 1
        cells = store.part_of(self.rows) * shape[1] + tasks
        counts = np.bincount(cells, minlength=shape[0] * shape[1])
        samples = counts.reshape(shape).astype(float)
        if store.part_weights is not None:
            samples *= (np.array(store.part_weights) / np.maximum(samples.sum(1), 1))[:, None]
        wanted = None if store.task_weights is None else np.array([0.0, *store.task_weights])
        weights = draw_shares(samples, wanted, store.task_balance).reshape(-1)
        return {"num_samples": counts, "weights": weights, "order": np.argsort(cells, kind="stable")}

    def __getitem__(self, index: int) -> Batch:
        """One sample, without the batch dimension."""
        return self.__getitems__([index]).each(lambda tensor: tensor[0])

    def __getitems__(self, indices: list[int] | np.ndarray) -> Batch:
        """The samples at `indices` as one batch, gathered at once."""
        store, rows = self.store, self.rows[np.asarray(indices, np.int64)]
        actions, is_pad = self.chunks(rows)

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return self._buffers[name].take(shape, dtype)

        extras = {
            name: store.extra(name, rows, buffer(name, (len(rows), *extra.shape), torch.float16))
            for name, extra in store.extras.items()
        }
        if self.told:
            extras["task"] = torch.from_numpy(store.episode_task_numbers[store.episode_of(rows)])
        seen = self.before(rows, self.image_history, self.image_stride).flatten()
        images = store.images(seen, buffer("images", (len(seen), *store.row_shape), torch.uint8))
        if self.image_history > 1:
            images = images.unflatten(0, (len(rows), -1)).transpose(1, 2)  # (B, N, F, 3, H, W)
        return Batch(images, *map(torch.from_numpy, (self.history(rows), actions, is_pad, rows)), extras)

    def on(self, store: EpisodeStore) -> ChunkDataset:
        """The same samples from a store that holds the same steps, for example with extras."""
        shape = (self.horizon, self.proprio_history, self.action_offset)
        frames = (self.image_history, self.image_stride)
        return ChunkDataset(store, self.episodes, *shape, self.told, *frames, self.hold)

    def chunks(self, rows: np.ndarray, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, T, A) and is_pad (B, T) of the chunks that begin at the steps `rows` of the store.

        With `dim`, that dimension of the actions only, (B, T).
        """
        last = self.store.episode_starts[self.store.episode_of(rows) + 1] - 1
        future = rows[:, None] + np.arange(self.action_offset, self.action_offset + self.horizon)
        action = self.store.action if dim is None else self.store.action[:, dim]
        return action[np.minimum(future, last[:, None])], future > last[:, None] + self.hold

    def history(self, rows: np.ndarray) -> np.ndarray:
        """States (B, K, P) up to and including the steps `rows` of the store."""
        return self.store.state[self.before(rows, self.proprio_history)]

    def before(self, rows: np.ndarray, count: int, stride: int = 1) -> np.ndarray:
        """Steps (B, count), `stride` apart, that end with `rows`; the episode's first where it is shorter."""
        first = self.store.episode_starts[self.store.episode_of(rows)]
        return np.maximum(rows[:, None] + stride * np.arange(1 - count, 1), first[:, None])


class SampleStream(Sampler):
    """Endless batches of sample numbers: one shuffled epoch after another; batches may span two of them.

    Position p of the stream holds sample p % n of epoch p // n, so the order depends only on the seed, and
    the stream can begin anywhere. Micro-batch k of a rank covers the B positions from
    start + k * B * world + rank * B.

    An epoch without weights is a permutation of all samples. With weights between groups of samples, such as
    datasets or tasks, it holds each group in proportion to its weight, and each goes through its own
    permutations from epoch to epoch.

    Args:
        num_samples: samples of each group; n in all.
        batch_size: B, per rank.
        start: samples that all ranks together have already consumed.
        weights: one per group; None draws every sample once an epoch.
        order: (n,), the samples group by group; None: their numbers are in that order.
    """

    def __init__(
        self,
        num_samples: Sequence[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        weights: Sequence[float] | None = None,
        order: np.ndarray | None = None,
    ):
        self.order = order
        self.total, self.batch_size, self.seed = int(sum(num_samples)), batch_size, seed
        self.rank, self.world, self.start = rank, world, start
        self.parts = [self.total] if weights is None else list(map(int, num_samples))
        shares = np.array([1.0] if weights is None else weights, float) * (np.array(self.parts) > 0)
        ends = np.rint(np.cumsum(shares) / shares.sum() * self.total).astype(int)
        self.quotas = np.diff(ends, prepend=0).tolist()  # samples of each dataset in an epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, np.int64)
        position = self.start + self.rank * self.batch_size
        while True:
            batch: list[int] = []
            while len(batch) < self.batch_size:
                wanted, offset = divmod(position + len(batch), self.total)
                if wanted != epoch:
                    epoch, order = wanted, self._epoch(wanted)
                batch += order[offset : offset + self.batch_size - len(batch)].tolist()
            yield batch
            position += self.batch_size * self.world

    def samples(self, first: int, count: int) -> list[int]:
        """The samples at `count` positions of the stream from `first` on, whatever this rank's share."""
        whole = copy.copy(self)
        whole.start, whole.batch_size, whole.rank = first, count, 0
        return next(iter(whole))

    def _epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, in order."""
        if len(self.parts) == 1 and self.order is None:
            return np.random.default_rng((self.seed, epoch)).permutation(self.total)
        drawn, first = [], 0
        for part, (size, quota) in enumerate(zip(self.parts, self.quotas, strict=True)):
            rounds, offset = divmod(epoch * quota, max(size, 1))
            orders = [
                np.random.default_rng((self.seed, rounds + k, part)).permutation(size)
                for k in range(-(-(offset + quota) // max(size, 1)))
            ]
            drawn.append(first + np.concatenate([np.empty(0, np.int64), *orders])[offset : offset + quota])
            first += size
        drawn = np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(drawn).astype(np.int64))
        return drawn if self.order is None else self.order[drawn]


def split_episodes(store: EpisodeStore, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted numbers of the training and the held-out episodes, split dataset by dataset.

    With a positive fraction, at least one episode of each dataset that has several is held out; one is always
    left for training, and of each instruction, too, as far as the others suffice. The parts of an episode
    that was cut stay together.
    """
    train, val, first = [], [], 0
    tasks = store.episode_task_numbers
    for length in store.part_episodes:
        numbers = store.episode_indices[first : first + length]
        recorded = np.cumsum(np.diff(numbers, prepend=numbers[:1]) != 0)  # which recorded episode each is of
        count = recorded[-1] + 1 if length else 0
        held_out = 0
        if val_fraction > 0 and count > 1:
            held_out = min(max(1, round(count * val_fraction)), count - 1)
        order = np.random.default_rng(seed).permutation(count)
        # Of each instruction, the episode that comes last in this order is held out after all others.
        places = np.unique(np.stack([tasks[first : first + length], np.argsort(order)[recorded]]), axis=1)
        last = places[1, (np.diff(places[0], append=-2) != 0) & (places[0] >= 0)]
        order = np.concatenate([np.delete(order, last), order[np.unique(last)]])
        chosen = np.isin(recorded, order[:held_out])
        train.append(first + np.flatnonzero(~chosen))
        val.append(first + np.flatnonzero(chosen))
        first += length
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def evenly_spaced(
    dataset: ChunkDataset, num: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Batch]]:
    """Batches of `num` samples spread evenly over a dataset, for evaluation: the same ones every time.

    Each process gets its share of the samples, which may be empty. Yields which of the `num` samples these
    are, (B,), at most `batch_size` at once, and their batch.
    """
    chosen = torch.linspace(0, len(dataset) - 1, num, dtype=torch.float64).long()
    mine = torch.arange(num)[rank::world]
    for rows in mine.split(batch_size) if len(mine) else ():
        yield rows, dataset.__getitems__(chosen[rows].tolist())


def make_loader(
    dataset: ChunkDataset,
    batch_size: int,
    seed: int,
    num_workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """An endless loader of shuffled batches, this rank's share of the `SampleStream`.

    `num_workers` processes gather ahead; 0 gathers in this one, None uses as many as help.

    Raises:
        UserError: if one batch of all ranks has more samples than there are.
    """
    if batch_size * world > len(dataset):
        raise UserError(
            f"A batch of {batch_size * world} samples ({batch_size} a process, {world} process"
            f"{'es' * (world > 1)}) is larger than the {len(dataset)} training samples: "
            f"lower --batch-size to at most {len(dataset) // world}."
        )
    if num_workers is None:  # passing a batch on takes longer than copying it, but not than decoding
        num_workers = min(8, max(1, cores() // world)) if dataset.store.storage == "jpeg" else 0
    return DataLoader(
        dataset,
        batch_sampler=SampleStream(
            batch_size=batch_size, seed=seed, rank=rank, world=world, start=start, **dataset.groups()
        ),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        # Starting an iterator draws a number: it must not come from the generator of the training noise.
        generator=torch.Generator().manual_seed(seed),
    )


class Ahead:
    """An endless iterator that computes the next item in a thread, while the last one is in use.

    Args:
        prepare: what the thread does first.
    """

    def __init__(self, items: Iterator, prepare: Callable[[], None] | None = None):
        self._items, self._thread = items, ThreadPoolExecutor(1, "loading", prepare)
        self._next = self._thread.submit(next, items)

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        item = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return item


def _ignore_signals(worker: int) -> None:
    """Signals that end a run are for the training process, which needs its workers for the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _identity(batch: Batch) -> Batch:
    return batch
