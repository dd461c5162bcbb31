"""The episode store: one columnar copy of a dataset, read by whole batches.

A store is a folder:

    frames-00000.bin, ...   uint8 rows (N, 3, H, W), one per control step, whole episodes, about 1 GiB a file
    frames-00000.json, ...  which episodes such a file holds, and where
    arrays.safetensors      state, action, timestamps, and the place of every episode
    meta.json               source, fingerprint, cameras, names; written last: with it the store is finished

Reading copies out of memory-mapped files: nothing is decoded while training. `common/data/ingest.py` writes.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError

FORMAT = 1
META, ARRAYS = "meta.json", "arrays.safetensors"


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

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; asynchronous where the memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class EpisodeStore:
    """A finished store, opened read-only.

    Attributes:
        path: its folder.
        source: the dataset it was made from, as a path or hub name.
        fingerprint: hash of that dataset's content.
        cameras, camera_keys: short and full camera names, N of each.
        image_size: (H, W) in pixels.
        fps: control steps per second.
        state_names, action_names: one name per dimension.
        state, action: (S, P) and (S, A) float32.
        timestamps: (S,) float64, seconds since the episode began.
        episode_starts: (E + 1,) int64; episode e is the steps episode_starts[e] to episode_starts[e + 1].
        episode_indices: (E,) int64, the episodes' numbers in the source.
        task: the instruction that all episodes share, if the dataset states one.
        skipped: sentences about the episodes that were left out.
    """

    def __init__(self, path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.path = path
        self.source: str = meta["source"]
        self.fingerprint: str = meta["fingerprint"]
        self.cameras, self.camera_keys = tuple(meta["cameras"]), tuple(meta["camera_keys"])
        self.image_size: tuple[int, int] = tuple(meta["image_size"])
        self.fps: float = meta["fps"]
        self.state_names, self.action_names = tuple(meta["state_names"]), tuple(meta["action_names"])
        self.task: str | None = meta["task"]
        self.skipped: list[str] = meta["skipped"]
        self.state, self.action, self.timestamps = arrays["state"], arrays["action"], arrays["timestamps"]
        self.episode_starts = arrays["episode_starts"]
        self.episode_indices = arrays["episode_indices"]
        self._episode_shard = arrays["episode_shard"]
        self._episode_row = arrays["episode_row"]  # the row in its shard at which an episode begins
        # A plain array over the map: indexing a np.memmap costs several times more a row.
        self._shards = [
            np.asarray(np.memmap(path / shard["file"], np.uint8, "r")).reshape(-1, *self.row_shape)
            for shard in meta["shards"]
        ]

    @classmethod
    def open(cls, path: Path | str) -> EpisodeStore:
        """Open the finished store in the folder `path`.

        Raises:
            UserError: if the store is unfinished, damaged or of another format.
        """
        from safetensors.numpy import load_file

        path = Path(path)
        problem = defect(path)
        if problem:
            raise UserError(
                f"The episode store {path} cannot be read ({problem}): delete it to have it rebuilt."
            )
        return cls(path, json.loads((path / META).read_text()), load_file(path / ARRAYS))

    def __reduce__(self):
        return EpisodeStore.open, (self.path,)  # a worker process maps the files itself

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
    def shared_space(self) -> bool:
        """Whether state and action have the same dimensions, so that "stay where you are" is an action."""
        return self.state_names == self.action_names

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """The episode of each step: int64 of the same shape."""
        return np.searchsorted(self.episode_starts, rows, side="right") - 1

    def images(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Frames of all cameras at the steps `rows`, (B,) int64: (B, N, 3, H, W) uint8.

        One thread copies: on a busy machine several threads wait for each other and are far slower.

        Args:
            out: tensor of that shape to fill, instead of a new one.
        """
        if out is None:
            out = torch.empty(len(rows), *self.row_shape, dtype=torch.uint8)
        frames = out.numpy()
        episodes = self.episode_of(rows)
        places = rows - self.episode_starts[episodes] + self._episode_row[episodes]
        if len(self._shards) == 1:
            np.take(self._shards[0], places, axis=0, out=frames, mode="clip")  # other modes buffer the output
        else:
            shards = self._episode_shard[episodes]
            for slot in np.lexsort((places, shards)).tolist():  # in disk order, for when it is not in memory
                frames[slot] = self._shards[shards[slot]][places[slot]]
        return out


def defect(path: Path) -> str | None:
    """What keeps the folder from being a finished, whole store of this format; None if nothing does."""
    try:
        meta = json.loads((path / META).read_text())
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this program reads {FORMAT}"
        for entry in [*meta["shards"], {"file": ARRAYS, "bytes": meta["arrays_bytes"]}]:
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

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised uint8 tensor."""
        free = [buffer for buffer, loan in self.loans if loan() is None and buffer.shape == shape]
        buffer = free[0] if free else np.empty(shape, np.uint8)
        others = [loan for loan in self.loans if loan[0] is not buffer]
        view = buffer.view()
        self.loans = [*others[1 - self.keep :], (buffer, weakref.ref(view))]
        return torch.from_numpy(view)


class ChunkDataset(Dataset):
    """Every step of some episodes, as the start of an action chunk.

    The chunk of step i is the actions i to i + T - 1; past the episode's end the last action is repeated and
    marked in `is_pad`. History before the episode's start repeats its first state.

    Args:
        store: where the steps are.
        episodes: numbers of the episodes to draw from.
        horizon: T, actions in a chunk.
        proprio_history: K, states in a sample.
    """

    def __init__(self, store: EpisodeStore, episodes: np.ndarray, horizon: int, proprio_history: int = 1):
        for flag, value in (("--horizon", horizon), ("--proprio-history", proprio_history)):
            if value < 1:
                raise UserError(f"{flag} is {value}: it counts control steps and must be at least 1.")
        self.store, self.horizon, self.proprio_history = store, horizon, proprio_history
        self.episodes = np.asarray(episodes, np.int64)
        starts = store.episode_starts
        spans = [np.arange(starts[e], starts[e + 1]) for e in self.episodes]
        self.rows = np.concatenate(spans) if spans else np.empty(0, np.int64)  # step of each sample
        self._recycler = _Recycler()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One sample, without the batch dimension."""
        return Batch(*(tensor[0] for tensor in self.__getitems__([index])))

    def __getitems__(self, indices: list[int] | np.ndarray) -> Batch:
        """The samples at `indices` as one batch, gathered whole."""
        store, rows = self.store, self.rows[np.asarray(indices, np.int64)]
        actions, is_pad = self.chunks(rows)
        return Batch(
            images=store.images(rows, self._recycler.take((len(rows), *store.row_shape))),
            proprio=torch.from_numpy(self.history(rows)),
            actions=torch.from_numpy(actions),
            is_pad=torch.from_numpy(is_pad),
            index=torch.from_numpy(rows),
        )

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (B, T, A) and is_pad (B, T) of the chunks that begin at the steps `rows` of the store."""
        last = self.store.episode_starts[self.store.episode_of(rows) + 1] - 1
        future = rows[:, None] + np.arange(self.horizon)
        return self.store.action[np.minimum(future, last[:, None])], future > last[:, None]

    def history(self, rows: np.ndarray) -> np.ndarray:
        """States (B, K, P) up to and including the steps `rows` of the store."""
        first = self.store.episode_starts[self.store.episode_of(rows)]
        past = rows[:, None] + np.arange(1 - self.proprio_history, 1)
        return self.store.state[np.maximum(past, first[:, None])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recycler": _Recycler()}


class SampleStream(Sampler):
    """Endless batches of sample numbers: one shuffled epoch after the other, without a seam.

    Position p of the stream holds sample `permutation(seed, p // n)[p % n]`, so the order is a function of
    the seed alone and the stream can begin anywhere. Micro-batch k of a rank covers the B positions from
    start + k * B * world + rank * B.

    Args:
        num_samples: n.
        batch_size: B, per rank.
        seed: of the shuffling.
        rank, world: this process and how many there are.
        start: samples that all ranks together have already consumed.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, np.int64)
        position = self.start + self.rank * self.batch_size
        while True:
            batch: list[int] = []
            while len(batch) < self.batch_size:
                wanted, offset = divmod(position + len(batch), self.num_samples)
                if wanted != epoch:
                    epoch, order = wanted, self._permutation(wanted)
                batch += order[offset : offset + self.batch_size - len(batch)].tolist()
            yield batch
            position += self.batch_size * self.world

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)


def split_episodes(num_episodes: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted numbers of the training and the held-out episodes.

    With a positive fraction and more than one episode, at least one is held out; one is always left to train.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction is {val_fraction:g}: it must be at least 0 and below 1.")
    held_out = 0
    if val_fraction > 0 and num_episodes > 1:
        held_out = min(max(1, round(num_episodes * val_fraction)), num_episodes - 1)
    order = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def make_loader(
    dataset: ChunkDataset,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """An endless loader of shuffled batches, this rank's share of the `SampleStream`.

    Args:
        num_workers: processes that gather ahead; 0 gathers in this one.

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
    return DataLoader(
        dataset,
        batch_sampler=SampleStream(len(dataset), batch_size, seed, rank, world, start),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_identity,
        # Starting an iterator draws a number: not from the generator that training noise comes from.
        generator=torch.Generator().manual_seed(seed),
    )


def _identity(batch: Batch) -> Batch:
    return batch
