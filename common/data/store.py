"""The episode store: one columnar copy of a dataset, from which whole batches are read at once.

A store is a folder:

    frames.bin              frames of all episodes, raw or as JPEG, see common/data/rows.py
    episodes.jsonl          where each episode's frames lie, and their checksum, see common/data/ingest.py
    arrays.safetensors      state, action, timestamps, and the place of every episode
    features-*/             features of frozen networks, see common/data/features.py
    statistics-*.json       statistics for normalization, see common/normalize.py
    checked.json            the arrays' checksum when they were last checked
    meta.json               source, fingerprint, cameras, names, tasks; written last, marks it as finished

`python -m common.data.store` inspects, verifies and deletes stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.console import say
from common.data.rotation import Rotations, parse
from common.data.rows import ROWS, RawRows, Storage
from common.errors import UserError
from common.files import checksum, computed_once, read_json, unchanged_while

# The package imports this module before `python -m common.data.store` runs it, which Python would warn about.
warnings.filterwarnings("ignore", "'common.data.store' found in sys.modules")

FORMAT = 4
META, ARRAYS, FRAMES = "meta.json", "arrays.safetensors", "frames.bin"
CHECKED = "checked.json"
OF_STEPS = ("state", "action", "timestamps")
OF_EPISODES = ("episode_indices", "episode_rows", "episode_checksums")


class Extra(NamedTuple):
    """What a cache adds to every step's frames, float16: rows in a file for each of `frame_files`.

    `shape` is that of one step's values. Rows of episodes that are not chosen may be empty.
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
        source_fingerprint: hash of the content of the (first) dataset, whichever episodes, cameras and tasks
            are chosen.
        skipped: sentences about the episodes that were left out.
        state, action: (S, P) and (S, A) float32, in recorded units.
        timestamps: (S,) float64, seconds since the episode began.
        episode_starts: (E + 1,) int64; episode e is the steps episode_starts[e] to episode_starts[e + 1].
        episode_indices: (E,) int64, the episodes' numbers in their source.
        episode_rows, episode_checksums: (E,) int64, the first row in the dataset's file of frames, and the
            CRC-32 of all the episode's rows there.
        arrays_checksums: CRC-32 of each dataset's arrays, all of them.
        frame_files: one for each dataset.
        episode_tasks: the instruction of each episode, None where none is stated. Before `cut_at_tasks`, one
            that changes is a list of parts, each a first step and an instruction.
        part_episodes, part_weights: of each dataset, how many episodes it has, and how often its samples are
            drawn, relative to the others; None: in proportion to their number.
        task_weights, task_balance: how often samples of each of the `instructions` are drawn, relative to the
            others; or how evenly, see `draw_shares`.
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
    episode_rows: np.ndarray
    episode_checksums: np.ndarray
    frame_files: tuple[Path, ...]
    arrays_checksums: tuple[int, ...]
    part_episodes: tuple[int, ...]
    part_weights: tuple[float, ...] | None = None
    task_weights: tuple[float, ...] | None = None
    task_balance: float = 0.0
    state_rotations: Rotations | None = None
    action_rotations: Rotations | None = None
    extras: dict[str, Extra] = field(default_factory=dict)

    def __post_init__(self):
        frames = [ROWS[self.storage](file, self.row_shape) for file in self.frame_files]
        extras = {
            name: [RawRows(file, extra.shape, np.float16) for file in extra.files]
            for name, extra in self.extras.items()
        }
        self.__dict__.update(frames=frames, _extras=extras)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a worker process maps the files itself

    @classmethod
    def open(cls, path: Path | str) -> EpisodeStore:
        """Open the store in the folder `path`; a UserError if it is unfinished or damaged.

        The arrays are read as they are needed, and all processes of a machine share their memory. Their
        checksum is verified once, as long as their file does not change.
        """
        from safetensors.torch import load_file

        path = Path(path)
        problem = defect(path)
        if problem is None:
            meta, file = read_json(path / META), path / ARRAYS
            found = computed_once(path / CHECKED, unchanged_while([file]), lambda: checksum(file))
            if found != meta["arrays_crc32"]:
                problem = f"{ARRAYS} is not what was written"
        if problem:
            raise UserError(f"The episode store {path} cannot be read ({problem}): delete it to rebuild it.")
        with suppress(OSError):  # in a cache that cannot be written
            os.utime(path / META)  # for `prune`: many disks do not record when a file was read
        arrays = {name: tensor.numpy() for name, tensor in load_file(file).items()}
        names = ("image_size", "state_names", "action_names", "episode_tasks", "skipped")
        content = meta["fingerprint"]
        if meta["skipped"]:  # another machine may be able to read these
            kept = json.dumps([content, arrays["episode_indices"].tolist()])
            content = hashlib.sha256(kept.encode()).hexdigest()
        return cls(
            path=path,
            source_fingerprint=meta["fingerprint"],
            cameras=tuple(short for _, short, _ in meta["cameras"]),
            camera_keys=tuple(key for key, _, _ in meta["cameras"]),
            fingerprint=content,
            **{name: meta[name] for name in ("source", "fps", "storage")},
            **{name: tuple(meta[name]) for name in names},
            **arrays,
            frame_files=(path / FRAMES,),
            arrays_checksums=(meta["arrays_crc32"],),
            part_episodes=(len(arrays["episode_indices"]),),
        )

    def select(self, episodes: Sequence[int]) -> EpisodeStore:
        """The store of one dataset with these of its episodes only, numbered as in the source."""
        kept = np.flatnonzero(np.isin(self.episode_indices, np.asarray(episodes, np.int64)))
        return self.cut(kept, self.episode_starts[kept], self.episode_starts[kept + 1])

    def cut(self, kept: np.ndarray, first: np.ndarray, last: np.ndarray) -> EpisodeStore:
        """The store with only the episodes `kept`, and of each only the steps `first` to `last` - 1."""
        spans = [np.arange(*span) for span in zip(first, last, strict=True)]
        steps = np.concatenate([np.empty(0, np.int64), *spans])
        skipped = first - self.episode_starts[kept]  # steps of each episode
        chosen = [self.fingerprint, self.episode_indices[kept].tolist()]
        if skipped.any() or (last != self.episode_starts[kept + 1]).any():
            chosen += [skipped.tolist(), (last - first).tolist()]
        return replace(
            self,
            fingerprint=hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
            **{name: getattr(self, name)[steps] for name in OF_STEPS},
            **{name: getattr(self, name)[kept] for name in OF_EPISODES if name != "episode_rows"},
            episode_rows=self.episode_rows[kept] + skipped,
            episode_starts=np.cumsum([0, *(last - first)], dtype=np.int64),
            episode_tasks=tuple(self.episode_tasks[e] for e in kept),
            part_episodes=(len(kept),),
        )

    @classmethod
    def concatenate(
        cls, stores: Sequence[EpisodeStore], weights: Sequence[float] | None = None
    ) -> EpisodeStore:
        """Several datasets as one, in their order; a UserError if they do not fit."""
        first = stores[0]
        for other in stores[1:]:
            first.refuse_unlike(other)
        arrays = {n: np.concatenate([getattr(s, n) for s in stores]) for n in (*OF_STEPS, *OF_EPISODES)}
        names = ("episode_tasks", "frame_files", "arrays_checksums", "part_episodes", "skipped")
        tuples = {name: tuple(x for store in stores for x in getattr(store, name)) for name in names}
        lengths = np.concatenate([np.diff(store.episode_starts) for store in stores])
        parts = json.dumps([store.fingerprint for store in stores])
        return replace(
            first,
            source=" + ".join(store.source for store in stores),
            fingerprint=hashlib.sha256(parts.encode()).hexdigest(),
            **arrays,
            **tuples,
            episode_starts=np.cumsum([0, *lengths], dtype=np.int64),
            extras={},
            part_weights=None if weights is None else tuple(weights),
        )

    def refuse_unlike(self, other: EpisodeStore) -> None:
        """Raise a UserError if one policy cannot learn from both stores."""
        for what, name, show in (
            ("cameras", "cameras", " ".join),
            ("image sizes (choose one with --image-size)", "image_size", "{0[0]}x{0[1]}".format),
            ("dimensions of the state", "state_names", _brief),
            ("dimensions of the action", "action_names", _brief),
            ("control rates", "fps", "{:g} Hz".format),
            ("stores (choose one with --store)", "storage", str),
        ):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise UserError(
                    f"{self.source} and {other.source} have different {what}, {show(mine)} and "
                    f"{show(its)}: one run learns from datasets that agree in them."
                )

    def re_express(self, option: str) -> EpisodeStore:
        """The store with rotations as `--rotation` says; a UserError if it has none or bad ones."""
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
        large = np.concatenate([state.turns(self.state), action.turns(self.action)])
        if len(large):
            raise UserError(
                f"--rotation {option}: episode {self.episode_indices[self.episode_of(large[0])]} of "
                f"{self.source} holds angles of more than 2 pi: convert what is in degrees, or counts turns, "
                f"to radians from -pi to pi."
            )
        bent = np.concatenate([state.bent(self.state), action.bent(self.action)])
        if len(bent) and pattern is None:
            raise UserError(
                f"--rotation {option}: episode {self.episode_indices[self.episode_of(bent[0])]} of "
                f"{self.source} has a pitch of more than pi / 2, which would be returned as other angles "
                f"({state.listed() or action.listed()}): name the rotations, such as --rotation "
                f"eef_rpy:{option}."
            )
        for part, found in (("state", state), ("action", action)):
            if found.starts:
                say(f"{part}: {found.listed()} are rotations, by --rotation {option}")
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

    @cached_property
    def instructions(self) -> tuple[str, ...]:
        """The instructions of its episodes, each once, in alphabetical order."""
        return tuple(sorted({task for task in self.episode_tasks if task and task.strip()}))

    @cached_property
    def episode_task_numbers(self) -> np.ndarray:
        """(E,) int64, the index of each episode's instruction in `instructions`; -1 where none is stated."""
        place = {task: number for number, task in enumerate(self.instructions)}
        return np.array([place.get(task, -1) for task in self.episode_tasks], np.int64)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W), the shape of one step's frames."""
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

    def places(self, rows: np.ndarray) -> np.ndarray:
        """The row of each step in its dataset's file: int64 of the same shape."""
        episodes = self.episode_of(rows)
        return rows + (self.episode_rows[episodes] - self.episode_starts[episodes])

    def images(self, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """Frames of all cameras at the steps `rows`, (B,) int64: (B, N, 3, H, W) uint8.

        `out` is a tensor to fill, instead of a new one.
        """
        if out is None:
            out = torch.empty(len(rows), *self.row_shape, dtype=torch.uint8)
        return self._gather(self.frames, rows, out)

    def extra(self, name: str, rows: np.ndarray, out: Tensor | None = None) -> Tensor:
        """What the cache `name` has for the steps `rows`: (B, *shape) float16; `out` as for `images`."""
        if out is None:
            out = torch.empty(len(rows), *self.extras[name].shape, dtype=torch.float16)
        return self._gather(self._extras[name], rows, out)

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """The dataset of each step: int64 of the same shape."""
        return np.searchsorted(self.episode_starts[np.cumsum(self.part_episodes)], rows, side="right")

    def _gather(self, files: Sequence[RawRows], rows: np.ndarray, out: Tensor) -> Tensor:
        """Copy the steps `rows` out of the files of the datasets."""
        places, parts = self.places(rows), self.part_of(rows)
        for part in np.unique(parts).tolist():
            slots = np.flatnonzero(parts == part)
            files[part].read(places[slots], out.numpy(), slots)
        return out


def _brief(names: Sequence[str]) -> str:
    """A list of names in a sentence."""
    return f"{len(names)} ({', '.join(names[:20])}{', ...' * (len(names) > 20)})"


def defect(path: Path) -> str | None:
    """Why the folder is not a finished, undamaged store of this format; None if it is one."""
    try:
        meta = read_json(path / META)
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this program reads {FORMAT}"
        for name, size in meta["bytes"].items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return f"{META} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{META} is damaged: {type(error).__name__}"
    return None


if __name__ == "__main__":
    from common.data.inspect import main

    main()
