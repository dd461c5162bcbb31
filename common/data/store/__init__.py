"""The episode store: one columnar copy of a dataset, read by whole batches.

A store is a folder:

    frames-00000.bin, ...   frames of whole episodes, about 1 GiB of pixels a file, see common/data/shards.py
    frames-00000.json, ...  which episodes such a file holds, and where, and its checksum
    arrays.safetensors      state, action, timestamps, and the place of every episode
    features-*/             features of frozen networks, see common/data/features.py
    meta.json               source, fingerprint, cameras, names; written last: with it the store is finished

Reading copies out of memory-mapped files: nothing is decoded while training, unless the store was made with
`--store jpeg`. `common/data/ingest.py` writes. What there is, whether it is whole, and how to be rid of it:

    python -m common.data.store inspect DATASET
    python -m common.data.store verify DATASET
    python -m common.data.store prune
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.shards import SHARDS, RawShard, Storage
from common.data.workers import cores
from common.errors import UserError
from common.faults import SIGNALS
from common.files import read_json

if TYPE_CHECKING:
    from common.data.rotation import Rotations

FORMAT = 2
META, ARRAYS = "meta.json", "arrays.safetensors"
MEMORY_SPEED = 2e9  # bytes a second: slower gathers have waited for a disk
FETCH_AHEAD = 50  # so many gathers after one that has waited ask for their rows before they copy


class Batch(NamedTuple):
    """What a policy learns from: B chunks and what was seen when they began."""

    images: Tensor
    """(B, N, 3, H, W) uint8, RGB; N cameras in the order of the store."""
    proprio: Tensor
    """(B, K, P) float32, the last K states, the present one last; in the units of the recording."""
    actions: Tensor
    """(B, T, A) float32, the present step's action and the T - 1 after it; in the units of the recording."""
    is_pad: Tensor
    """(B, T) bool, true where the action lies past the episode's end (there the last action is repeated)."""
    index: Tensor
    """(B,) int64, the step's number in the store."""
    features: Tensor | None = None
    """(B, ...) float16, features of a frozen network, where the store has them."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; asynchronous where the memory is pinned."""
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))


@dataclass(frozen=True)
class EpisodeStore:
    """Recorded episodes, opened read-only: one store on disk, some episodes of it, or several stores.

    Attributes:
        path: folder of the (first) store.
        source: the dataset it was made from, as a path or hub name; several are joined by " + ".
        fingerprint: hash of the content of the datasets, and of the choice of their episodes.
        cameras, camera_keys: short and full camera names, N of each.
        image_size: (H, W) in pixels.
        fps: control steps per second.
        state_names, action_names: one name per dimension.
        task: the instruction that all episodes share, if the dataset states one.
        skipped: sentences about the episodes that were left out.
        storage: how frames are kept.
        state, action: (S, P) and (S, A) float32.
        timestamps: (S,) float64, seconds since the episode began.
        episode_starts: (E + 1,) int64; episode e is the steps episode_starts[e] to episode_starts[e + 1].
        episode_indices: (E,) int64, the episodes' numbers in their source.
        episode_shard, episode_row: (E,) int64, the shard of an episode and its first row there.
        shard_files: every shard's file.
        part_episodes: episodes of each dataset, in order.
        part_weights: how often samples of each dataset are drawn, relative to each other; None: as often as
            they are there.
        state_rotations, action_rotations: what `re_express` has changed in the recorded vectors.
        feature_files, feature_shape: file of features for each of `shard_files`, and the shape of a step's
            features; empty if there are none.
    """

    path: Path
    source: str
    fingerprint: str
    cameras: tuple[str, ...]
    camera_keys: tuple[str, ...]
    image_size: tuple[int, int]
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    task: str | None
    skipped: tuple[str, ...]
    storage: Storage
    state: np.ndarray
    action: np.ndarray
    timestamps: np.ndarray
    episode_starts: np.ndarray
    episode_indices: np.ndarray
    episode_shard: np.ndarray
    episode_row: np.ndarray
    shard_files: tuple[Path, ...]
    part_episodes: tuple[int, ...]
    part_weights: tuple[float, ...] | None = None
    state_rotations: Rotations | None = None
    action_rotations: Rotations | None = None
    feature_files: tuple[Path, ...] = ()
    feature_shape: tuple[int, ...] = ()

    def __post_init__(self):
        shards = [SHARDS[self.storage](file, self.row_shape) for file in self.shard_files]
        features = {
            number: RawShard(self.feature_files[number], self.feature_shape, np.float16)
            for number in (np.unique(self.episode_shard).tolist() if self.feature_files else ())
        }
        # _ahead: gathers that shall ask for their rows first
        self.__dict__.update(_shards=shards, _features=features, _ahead=0)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_shards", "_features")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a worker process maps the files itself

    @classmethod
    def open(cls, path: Path | str) -> EpisodeStore:
        """Open the finished store in the folder `path`.

        Raises:
            UserError: if the store is unfinished, damaged or of another format.
        """
        from safetensors.numpy import load

        path = Path(path)
        problem = defect(path)
        if problem is None:
            meta, payload = read_json(path / META), (path / ARRAYS).read_bytes()
            if zlib.crc32(payload) != meta["arrays"]["crc32"]:
                problem = f"{ARRAYS} is not what was written"
        if problem:
            raise UserError(
                f"The episode store {path} cannot be read ({problem}): delete it to have it rebuilt."
            )
        arrays = load(payload)
        names = ("cameras", "camera_keys", "image_size", "state_names", "action_names", "skipped")
        return cls(
            path=path,
            **{name: meta[name] for name in ("source", "fingerprint", "fps", "task", "storage")},
            **{name: tuple(meta[name]) for name in names},
            **arrays,
            shard_files=tuple(path / shard["file"] for shard in meta["shards"]),
            part_episodes=(len(arrays["episode_indices"]),),
        )

    def select(self, episodes: Sequence[int]) -> EpisodeStore:
        """The store with these of its episodes only, numbered as in the source."""
        kept = np.flatnonzero(np.isin(self.episode_indices, np.asarray(episodes, np.int64)))
        starts, lengths = self.episode_starts[kept], np.diff(self.episode_starts)[kept]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        names = ("episode_indices", "episode_shard", "episode_row")
        chosen = json.dumps([self.fingerprint, self.episode_indices[kept].tolist()])
        return replace(
            self,
            fingerprint=hashlib.sha256(chosen.encode()).hexdigest(),
            **{name: getattr(self, name)[rows] for name in ("state", "action", "timestamps")},
            **{name: getattr(self, name)[kept] for name in names},
            episode_starts=np.cumsum([0, *lengths], dtype=np.int64),
            part_episodes=(len(kept),),
        )

    @classmethod
    def concatenate(
        cls, stores: Sequence[EpisodeStore], weights: Sequence[float] | None = None
    ) -> EpisodeStore:
        """Several datasets as one, in their order.

        Args:
            weights: see `part_weights`.

        Raises:
            UserError: if they differ in cameras, image size, dimensions or control rate.
        """
        first = stores[0]
        for other in stores[1:]:
            for what, name, show in (
                ("cameras", "cameras", " ".join),
                ("image sizes (choose one with --image-size)", "image_size", "{0[0]}x{0[1]}".format),
                ("dimensions of the state", "state_names", _brief),
                ("dimensions of the action", "action_names", _brief),
                ("control rates", "fps", "{:g} Hz".format),
                ("stores (choose one with --store)", "storage", str),
            ):
                mine, its = getattr(first, name), getattr(other, name)
                if mine != its:
                    raise UserError(
                        f"{first.source} and {other.source} have different {what}, {show(mine)} and "
                        f"{show(its)}: one run learns from datasets that agree in them."
                    )
        names = ("state", "action", "timestamps", "episode_indices", "episode_row")
        arrays = {name: np.concatenate([getattr(store, name) for store in stores]) for name in names}
        shards = np.cumsum([0, *(len(store.shard_files) for store in stores)])
        shard = [store.episode_shard + n for store, n in zip(stores, shards, strict=False)]
        lengths = np.concatenate([np.diff(store.episode_starts) for store in stores])
        tasks = {store.task for store in stores}
        parts = json.dumps([store.fingerprint for store in stores])
        return replace(
            first,
            source=" + ".join(store.source for store in stores),
            fingerprint=hashlib.sha256(parts.encode()).hexdigest(),
            task=tasks.pop() if len(tasks) == 1 else None,
            skipped=tuple(reason for store in stores for reason in store.skipped),
            **arrays,
            episode_starts=np.cumsum([0, *lengths], dtype=np.int64),
            episode_shard=np.concatenate(shard),
            shard_files=tuple(file for store in stores for file in store.shard_files),
            feature_files=(),
            part_episodes=tuple(store.num_episodes for store in stores),
            part_weights=None if weights is None else tuple(weights),
        )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W): what one step's frames are."""
        return (len(self.cameras), 3, *self.image_size)

    @property
    def num_steps(self) -> int:
        return len(self.state)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_starts) - 1

    @property
    def source_fingerprint(self) -> str:
        """Hash of the content of the (first) dataset, whatever is chosen of it."""
        return read_json(self.path / META)["fingerprint"]

    @property
    def shared_space(self) -> bool:
        """Whether state and action have the same dimensions, so that "stay where you are" is an action."""
        return self.state_names == self.action_names

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """The episode of each step: int64 of the same shape."""
        return np.searchsorted(self.episode_starts, rows, side="right") - 1

    def images(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Frames of all cameras at the steps `rows`, (B,) int64: (B, N, 3, H, W) uint8.

        One thread copies: on a busy machine several threads wait for each other and are far slower. A gather
        that had to wait for the disk makes the next ones ask for all their rows before they copy, which reads
        many times faster than meeting missing pages one by one; where nothing is missing, asking would only
        cost time.

        Args:
            out: tensor of that shape to fill, instead of a new one.
        """
        if out is None:
            out = torch.empty(len(rows), *self.row_shape, dtype=torch.uint8)
        return self._gather(self._shards, rows, out)

    def features(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Features at the steps `rows`, (B, *feature_shape) float16, of a store that has some.

        Args:
            out: tensor of that shape to fill, instead of a new one.
        """
        if out is None:
            out = torch.empty(len(rows), *self.feature_shape, dtype=torch.float16)
        return self._gather(self._features, rows, out)

    def _gather(self, files: Any, rows: np.ndarray, out: Tensor) -> Tensor:
        """Copy the steps `rows` from the shards `files`, by number, to `out`."""
        if len(rows) == 0:
            return out
        began = time.perf_counter()
        episodes = self.episode_of(rows)
        places = rows - self.episode_starts[episodes] + self.episode_row[episodes]
        shards = self.episode_shard[episodes]
        order = np.lexsort((places, shards)) if len(files) > 1 else np.arange(len(rows))  # disk order
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1)).tolist()
        parts = [order[first:last] for first, last in zip(edges, [*edges[1:], len(order)], strict=True)]
        if self._ahead:
            for slots in parts:
                files[shards[slots[0]]].fetch(places[slots])
        for slots in parts:
            files[shards[slots[0]]].read(places[slots], out.numpy(), slots)
        waited = out.nbytes / (time.perf_counter() - began) < MEMORY_SPEED
        self.__dict__["_ahead"] = FETCH_AHEAD if waited else max(self._ahead - 1, 0)
        return out


def _brief(names: Sequence[str]) -> str:
    """A list of names in a sentence."""
    return (
        f"{len(names)} ({', '.join(names)})"
        if len(names) <= 20
        else f"{len(names)} ({', '.join(names[:20])}, ...)"
    )


def defect(path: Path) -> str | None:
    """What keeps the folder from being a finished, whole store of this format; None if nothing does."""
    try:
        meta = read_json(path / META)
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this program reads {FORMAT}"
        for entry in [*meta["shards"], meta["arrays"]]:
            size = (path / entry["file"]).stat().st_size
            if size != entry["bytes"]:
                return f"{entry['file']} has {size} bytes instead of {entry['bytes']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META} is damaged: {type(error).__name__}"
    return None


class _Recycler:
    """Image buffers that are used again once nobody holds the tensor made from them.

    A fresh batch above some 32 MB comes as untouched pages from the system, whose first touch costs up to ten
    times the copy itself. A tensor made by `torch.from_numpy` keeps its array alive as long as any view of it
    lives: each loan is such an array, watched by a weak reference.
    """

    def __init__(self, keep: int = 4):
        self.keep = keep
        self.loans: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
        """An uninitialised tensor."""
        shape = (*shape[:-1], shape[-1] * dtype.itemsize)
        free = [buffer for buffer, loan in self.loans if loan() is None and buffer.shape == shape]
        # PyTorch aligns to 64 bytes and NumPy to 16, with which copying takes half as long again.
        buffer = free[0] if free else torch.empty(shape, dtype=torch.uint8).numpy()
        others = [loan for loan in self.loans if loan[0] is not buffer]
        view = buffer.view()
        self.loans = [*others[1 - self.keep :], (buffer, weakref.ref(view))]
        return torch.from_numpy(view).view(dtype)


class ChunkDataset(Dataset):
    """Every step of some episodes, as the start of an action chunk.

    The chunk of step i is the actions i + offset to i + offset + T - 1; past the episode's end the last
    action is repeated and marked in `is_pad`. History before the episode's start repeats its first state.
    A step whose chunk would lie wholly past the end is no sample.

    Args:
        store: where the steps are.
        episodes: numbers of the episodes to draw from, counted in the store.
        horizon: T, actions in a chunk.
        proprio_history: K, states in a sample.
        action_offset: control steps from an observation to the first action of its chunk.
    """

    def __init__(
        self,
        store: EpisodeStore,
        episodes: Sequence[int] | np.ndarray,
        horizon: int,
        proprio_history: int = 1,
        action_offset: int = 0,
    ):
        for flag, value, least in (
            ("--horizon", horizon, 1),
            ("--proprio-history", proprio_history, 1),
            ("--action-offset", action_offset, 0),
        ):
            if value < least:
                raise UserError(f"{flag} is {value}: it counts control steps and must be at least {least}.")
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
        self._recycler, self._feature_recycler = _Recycler(), _Recycler()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One sample, without the batch dimension."""
        return Batch(*(None if x is None else x[0] for x in self.__getitems__([index])))

    def __getitems__(self, indices: list[int] | np.ndarray) -> Batch:
        """The samples at `indices` as one batch, gathered whole."""
        store, rows = self.store, self.rows[np.asarray(indices, np.int64)]
        actions, is_pad = self.chunks(rows)
        features = None
        if store.feature_files:
            out = self._feature_recycler.take((len(rows), *store.feature_shape), torch.float16)
            features = store.features(rows, out)
        return Batch(
            images=store.images(rows, self._recycler.take((len(rows), *store.row_shape))),
            proprio=torch.from_numpy(self.history(rows)),
            actions=torch.from_numpy(actions),
            is_pad=torch.from_numpy(is_pad),
            index=torch.from_numpy(rows),
            features=features,
        )

    def on(self, store: EpisodeStore) -> ChunkDataset:
        """The same samples of a store that holds the same steps, with features for instance."""
        return ChunkDataset(store, self.episodes, self.horizon, self.proprio_history, self.action_offset)

    def chunks(self, rows: np.ndarray, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, T, A) and is_pad (B, T) of the chunks that begin at the steps `rows` of the store.

        Args:
            dim: give this dimension of the actions only, (B, T).
        """
        last = self.store.episode_starts[self.store.episode_of(rows) + 1] - 1
        future = rows[:, None] + np.arange(self.action_offset, self.action_offset + self.horizon)
        action = self.store.action if dim is None else self.store.action[:, dim]
        return action[np.minimum(future, last[:, None])], future > last[:, None]

    def history(self, rows: np.ndarray) -> np.ndarray:
        """States (B, K, P) up to and including the steps `rows` of the store."""
        first = self.store.episode_starts[self.store.episode_of(rows)]
        past = rows[:, None] + np.arange(1 - self.proprio_history, 1)
        return self.store.state[np.maximum(past, first[:, None])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recycler": _Recycler(), "_feature_recycler": _Recycler()}


class SampleStream(Sampler):
    """Endless batches of sample numbers: one shuffled epoch after the other, without a seam.

    Position p of the stream holds sample p % n of epoch p // n, so the order is a function of the seed alone
    and the stream can begin anywhere. Micro-batch k of a rank covers the B positions from
    start + k * B * world + rank * B.

    An epoch of one dataset is a permutation of its n samples. Of several with weights, it holds each in
    proportion to its weight, and each goes through its own permutations from epoch to epoch.

    Args:
        num_samples: samples of each dataset; n in all.
        batch_size: B, per rank.
        seed: of the shuffling.
        rank, world: this process and how many there are.
        start: samples that all ranks together have already consumed.
        weights: one per dataset; None draws every sample once an epoch.
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
    ):
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
        """The samples at `count` positions of the stream from `first` on, whatever this one's share."""
        whole = copy.copy(self)
        whole.start, whole.batch_size, whole.rank = first, count, 0
        return next(iter(whole))

    def _epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, in order."""
        if len(self.parts) == 1:
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
        return np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(drawn).astype(np.int64))


def split_episodes(store: EpisodeStore, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted numbers of the training and the held-out episodes, split dataset by dataset.

    With a positive fraction and more than one episode, at least one of a dataset is held out; one is always
    left to train.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction is {val_fraction:g}: it must be at least 0 and below 1.")
    train, val, first = [], [], 0
    for count in store.part_episodes:
        held_out = 0
        if val_fraction > 0 and count > 1:
            held_out = min(max(1, round(count * val_fraction)), count - 1)
        order = first + np.random.default_rng(seed).permutation(count)
        train.append(order[held_out:])
        val.append(order[:held_out])
        first += count
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def evenly_spaced(
    dataset: ChunkDataset, num: int, batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Batch]]:
    """Batches of `num` samples spread evenly over a dataset, for evaluation: the same ones every time.

    Args:
        dataset: to take them from.
        num: of all processes together, at most the size of the dataset.
        batch_size: at most so many in a batch.
        rank, world: this process and their number; each sample is seen by one of them, and one that has no
            share sees none.

    Yields:
        Which of the `num` samples these are, (B,), and their batch.
    """
    chosen = torch.linspace(0, len(dataset) - 1, num).long()
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

    Args:
        num_workers: processes that gather ahead; 0 gathers in this one. None: as many as are worth it.

    Raises:
        UserError: if one step of all ranks takes more samples than there are.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: it must be at least 1.")
    if batch_size * world > len(dataset):
        raise UserError(
            f"A batch of {batch_size * world} samples ({batch_size} a process, {world} process"
            f"{'es' * (world > 1)}) is larger than the {len(dataset)} training samples: "
            f"lower --batch-size to at most {len(dataset) // world}."
        )
    if num_workers is None:  # copying is faster than handing over, decoding is not
        num_workers = min(8, max(1, cores() // world)) if dataset.store.storage == "jpeg" else 0
    weights = dataset.store.part_weights
    return DataLoader(
        dataset,
        batch_sampler=SampleStream(dataset.part_samples, batch_size, seed, rank, world, start, weights),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_identity,
        worker_init_fn=_ignore_signals,
        # Starting an iterator draws a number: not from the generator that training noise comes from.
        generator=torch.Generator().manual_seed(seed),
    )


def _ignore_signals(worker: int) -> None:
    """Signals that end a run are for the training process, which needs its workers for the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _identity(batch: Batch) -> Batch:
    return batch
