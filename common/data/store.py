"""The episode store: one columnar copy of a dataset, read by whole batches.

A store is a folder:

    frames-00000.bin, ...   frames of whole episodes, about 1 GiB of pixels a file, see common/data/shards.py
    frames-00000.json, ...  which episodes such a file holds, and where, and its checksum
    arrays.safetensors      state, action, timestamps, and the place of every episode
    features-*/             features of frozen networks, see common/data/features.py
    meta.json               source, fingerprint, cameras, names, tasks; written last: then it is finished

Reading copies out of memory-mapped files, or decodes JPEG. `python -m common.data.store` inspects, verifies
and deletes stores.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.data.rotation import Rotations, parse
from common.data.shards import SHARDS, RawShard, Storage
from common.errors import UserError
from common.files import read_json

# The package imports this module before `python -m common.data.store` runs it, which Python would remark on.
warnings.filterwarnings("ignore", "'common.data.store' found in sys.modules")

FORMAT = 3
META, ARRAYS = "meta.json", "arrays.safetensors"
MEMORY_SPEED = 2e9  # bytes a second: slower gathers have waited for a disk
FETCH_AHEAD = 50  # so many gathers after one that has waited ask for their rows before they copy


class Extra(NamedTuple):
    """What a cache keeps for every step beside the frames, float16: one file for each of `shard_files`.

    Files of episodes that are not chosen need not exist. `shape` is that of one step's values.
    """

    files: tuple[Path, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EpisodeStore:
    """Recorded episodes, opened read-only: one store on disk, some episodes of it, or several stores.

    Attributes:
        path: folder of the (first) store.
        source: the dataset it was made from, as a path or hub name; several are joined by " + ".
        fingerprint: hash of the content of the datasets, and of the choice of their episodes.
        source_fingerprint: hash of the content of the (first) dataset, whatever is chosen of it.
        skipped: sentences about the episodes that were left out.
        state, action: (S, P) and (S, A) float32, in recorded units.
        timestamps: (S,) float64, seconds since the episode began.
        episode_starts: (E + 1,) int64; episode e is the steps episode_starts[e] to episode_starts[e + 1].
        episode_indices: (E,) int64, the episodes' numbers in their source.
        episode_shard, episode_row: (E,) int64, the file in `shard_files` and the first row there.
        part_episodes, part_weights: of each dataset, how many episodes it has, and how often its samples are
            drawn, relative to the others; None: as often as they are there.
        state_rotations, action_rotations: what `re_express` has changed in the recorded vectors.
        extras: what caches have added, by its name in `Batch.extras`.
    """

    path: Path
    source: str
    fingerprint: str
    source_fingerprint: str
    cameras: tuple[str, ...]
    camera_keys: tuple[str, ...]
    image_size: tuple[int, int]
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    skipped: tuple[str, ...]
    storage: Storage
    state: np.ndarray
    action: np.ndarray
    timestamps: np.ndarray
    episode_starts: np.ndarray
    episode_indices: np.ndarray
    episode_tasks: tuple[str | None, ...]
    episode_shard: np.ndarray
    episode_row: np.ndarray
    shard_files: tuple[Path, ...]
    part_episodes: tuple[int, ...]
    part_weights: tuple[float, ...] | None = None
    state_rotations: Rotations | None = None
    action_rotations: Rotations | None = None
    extras: dict[str, Extra] = field(default_factory=dict)

    def __post_init__(self):
        used = np.unique(self.episode_shard).tolist()
        frames = {n: SHARDS[self.storage](self.shard_files[n], self.row_shape) for n in used}
        extras = {
            name: {n: RawShard(extra.files[n], extra.shape, np.float16) for n in used}
            for name, extra in self.extras.items()
        }
        # _ahead: gathers that shall ask for their rows first
        self.__dict__.update(_frame_shards=frames, _extra_shards=extras, _ahead=0)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_frame_shards", "_extra_shards")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a worker process maps the files itself

    @classmethod
    def open(cls, path: Path | str) -> EpisodeStore:
        """Open the store in the folder `path`; a UserError if it is unfinished or damaged."""
        from safetensors.numpy import load

        path = Path(path)
        problem = defect(path)
        if problem is None:
            meta, payload = read_json(path / META), (path / ARRAYS).read_bytes()
            if zlib.crc32(payload) != meta["arrays"]["crc32"]:
                problem = f"{ARRAYS} is not what was written"
        if problem:
            raise UserError(f"The episode store {path} cannot be read ({problem}): delete it to rebuild it.")
        arrays = load(payload)
        names = ("image_size", "state_names", "action_names", "episode_tasks", "skipped")
        return cls(
            path=path,
            source_fingerprint=meta["fingerprint"],
            cameras=tuple(short for _, short, _ in meta["cameras"]),
            camera_keys=tuple(key for key, _, _ in meta["cameras"]),
            **{name: meta[name] for name in ("source", "fingerprint", "fps", "storage")},
            **{name: tuple(meta[name]) for name in names},
            **arrays,
            shard_files=tuple(path / shard["file"] for shard in meta["shards"]),
            part_episodes=(len(arrays["episode_indices"]),),
        )

    def select(self, episodes: Sequence[int]) -> EpisodeStore:
        """The store with these of its episodes only, numbered as in the source."""
        kept = np.flatnonzero(np.isin(self.episode_indices, np.asarray(episodes, np.int64)))
        return self.cut(kept, self.episode_starts[kept], self.episode_starts[kept + 1])

    def cut(self, kept: np.ndarray, first: np.ndarray, last: np.ndarray) -> EpisodeStore:
        """The store with the episodes `kept` only, and of each the steps from `first` on, before `last`."""
        rows = np.concatenate([np.arange(*span) for span in zip(first, last, strict=True)])
        skipped = first - self.episode_starts[kept]  # steps of each episode
        chosen = [self.fingerprint, self.episode_indices[kept].tolist()]
        if skipped.any() or (last != self.episode_starts[kept + 1]).any():
            chosen += [skipped.tolist(), (last - first).tolist()]
        return replace(
            self,
            fingerprint=hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
            state=self.state[rows],
            action=self.action[rows],
            timestamps=self.timestamps[rows],
            episode_starts=np.cumsum([0, *(last - first)], dtype=np.int64),
            episode_indices=self.episode_indices[kept],
            episode_tasks=tuple(self.episode_tasks[e] for e in kept),
            episode_shard=self.episode_shard[kept],
            episode_row=self.episode_row[kept] + skipped,
            part_episodes=(len(kept),),
        )

    @classmethod
    def concatenate(
        cls, stores: Sequence[EpisodeStore], weights: Sequence[float] | None = None
    ) -> EpisodeStore:
        """Several datasets as one, in their order; a UserError if they do not fit."""
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
        names = ("episode_tasks", "shard_files", "skipped")
        tuples = {name: tuple(x for store in stores for x in getattr(store, name)) for name in names}
        shards = np.cumsum([0, *(len(store.shard_files) for store in stores)])
        shard = [store.episode_shard + n for store, n in zip(stores, shards, strict=False)]
        lengths = np.concatenate([np.diff(store.episode_starts) for store in stores])
        parts = json.dumps([store.fingerprint for store in stores])
        return replace(
            first,
            source=" + ".join(store.source for store in stores),
            fingerprint=hashlib.sha256(parts.encode()).hexdigest(),
            **arrays,
            **tuples,
            episode_starts=np.cumsum([0, *lengths], dtype=np.int64),
            episode_shard=np.concatenate(shard),
            extras={},
            part_episodes=tuple(store.num_episodes for store in stores),
            part_weights=None if weights is None else tuple(weights),
        )

    def re_express(self, option: str) -> EpisodeStore:
        """The store with rotations as `--rotation` says; a UserError if it has none, or one of four zeros."""
        pattern, kind = parse(option)
        state = Rotations.find(self.state_names, kind, pattern)
        action = Rotations.find(self.action_names, kind, pattern)
        if not state.starts and not action.starts:
            raise UserError(
                f"--rotation {option}: no dimension of {self.source} is named like one: the state has "
                f"{', '.join(self.state_names)}; the action {', '.join(self.action_names)}."
            )
        zeros = np.concatenate([state.zeros(self.state), action.zeros(self.action)])
        if len(zeros):
            raise UserError(
                f"--rotation {option}: episode {self.episode_indices[self.episode_of(zeros[0])]} of "
                f"{self.source} holds a quaternion of four zeros: choose others with --episodes."
            )
        return replace(
            self,
            state=state.encode(self.state),
            action=action.encode(self.action),
            state_names=state.names(),
            action_names=action.names(),
            state_rotations=state,
            action_rotations=action,
        )

    @property
    def task(self) -> str | None:
        """The instruction that all episodes share, if there is one."""
        return self.episode_tasks[0] if len(set(self.episode_tasks)) == 1 else None

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

        One thread copies: on a busy machine several threads wait for each other and are far slower. A gather
        that had to wait for the disk makes the next ones ask for all their rows before they copy, which reads
        many times faster than meeting missing pages one by one; where nothing is missing, asking would only
        cost time. `out` is a tensor to fill, instead of a new one.
        """
        if out is None:
            out = torch.empty(len(rows), *self.row_shape, dtype=torch.uint8)
        return self._gather(self._frame_shards, rows, out)

    def extra(self, name: str, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """What the cache `name` has for the steps `rows`: (B, *shape) float16; `out` as for `images`."""
        if out is None:
            out = torch.empty(len(rows), *self.extras[name].shape, dtype=torch.float16)
        return self._gather(self._extra_shards[name], rows, out)

    def _gather(self, shards: dict[int, Any], rows: np.ndarray, out: Tensor) -> Tensor:
        """Copy the steps `rows` out of files by number."""
        if len(rows) == 0:
            return out
        began = time.perf_counter()
        episodes = self.episode_of(rows)
        places = rows - self.episode_starts[episodes] + self.episode_row[episodes]
        numbers = self.episode_shard[episodes]
        order = np.lexsort((places, numbers)) if len(shards) > 1 else np.arange(len(rows))  # disk order
        edges = np.flatnonzero(np.diff(numbers[order], prepend=-1)).tolist()
        parts = [order[first:last] for first, last in zip(edges, [*edges[1:], len(order)], strict=True)]
        if self._ahead:
            for slots in parts:
                shards[numbers[slots[0]]].fetch(places[slots])
        for slots in parts:
            shards[numbers[slots[0]]].read(places[slots], out.numpy(), slots)
        waited = out.nbytes / (time.perf_counter() - began) < MEMORY_SPEED
        self.__dict__["_ahead"] = FETCH_AHEAD if waited else max(self._ahead - 1, 0)
        return out


def _brief(names: Sequence[str]) -> str:
    """A list of names in a sentence."""
    return f"{len(names)} ({', '.join(names[:20])}{', ...' * (len(names) > 20)})"


def defect(path: Path) -> str | None:
    """What keeps the folder from being a finished, whole store of this format; None if nothing does."""
    try:
        meta = read_json(path / META)
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this program reads {FORMAT}"
        faults = ((entry["file"], wrong_size(path, entry)) for entry in [*meta["shards"], meta["arrays"]])
        return next((f"{name} {fault}" for name, fault in faults if fault), None)
    except FileNotFoundError:
        return f"{META} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META} is damaged: {type(error).__name__}"


def wrong_size(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of the store `path`, apart from its content, as a clause without its name."""
    try:
        size = (path / entry["file"]).stat().st_size
    except FileNotFoundError:
        return "is missing"
    return f"has {size} bytes instead of {entry['bytes']}" if size != entry["bytes"] else None


if __name__ == "__main__":
    from common.data.inspect import main

    main()
