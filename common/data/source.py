"""What a demonstration format must provide; `docs/data.md` shows how to add one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError
from common.files import computed_once, unchanged_while

# A recorder that cannot keep up is a little slow: ALOHA's keeps episodes of 42 Hz and more as 50 Hz. Rates
# that are mistaken for each other, such as 25 and 30 or 50 and 60 Hz, are farther apart.
SLACK = 50 / 42
POINTER = "is a git-lfs pointer, not the file itself (`git lfs pull` fetches it)"


class BadEpisode(Exception):
    """One episode cannot be used; the message, a clause, names it and says why."""


class Camera(NamedTuple):
    """A camera of a dataset: its name there, a short name, and (H, W) as recorded."""

    key: str
    short: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Info:
    """A dataset's description with the options chosen for it; found without decoding a frame.

    Attributes:
        source: the dataset's name in messages, a path or hub name.
        fingerprint: hash of its content: data with the same fingerprint need not be read again.
        tables_fingerprint: the same without video files, for which it does not matter which cameras and tasks
            are chosen; None where that does not matter for the fingerprint either.
        cameras: those in use, in order, the head camera first.
        image_size: (H, W) of the frames that `Source.frames` gives.
        fps: control steps per second.
        choices: other options that change numbers or frames (keys, colour order), JSON-compatible; other
            choices make another store.
    """

    source: str
    fingerprint: str
    cameras: tuple[Camera, ...]
    image_size: tuple[int, int]
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    choices: dict[str, Any]
    tables_fingerprint: str | None = None


@dataclass(frozen=True)
class Episode:
    """Everything in an episode except its frames.

    Attributes:
        index: its number in the dataset.
        state, action: (L, P) and (L, A) float32, in recorded units.
        timestamps: (L,) float64, seconds since its first step.
        origin: where its frames are, for `Source.frames`; JSON-compatible.
        task: the instruction, if the dataset states one; where it changes, each one with its first step.
    """

    index: int
    state: np.ndarray
    action: np.ndarray
    timestamps: np.ndarray
    origin: Any
    task: str | tuple[tuple[int, str], ...] | None = None

    def __len__(self) -> int:
        return len(self.state)

    def digest(self) -> str:
        """Hash of everything here: an episode with the same digest need not be decoded again."""
        sha = hashlib.sha256(repr((self.origin, self.task)).encode())
        for array in (self.state, self.action, self.timestamps):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


class Source(Protocol):
    """A dataset in some format. Small, since it is pickled and sent to the processes that decode."""

    isolated: bool
    """Always read frames in other processes, because damaged files can crash or hang the library."""

    def info(self) -> Info:
        """The dataset's description; raises UserError for any fault in the dataset or the options."""

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        """The usable episodes of those (None: of all) by number, and a clause about each unusable one, which
        begins with "Episode 3".

        Raises UserError if a wanted one does not exist (`existing`).
        """

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        """All frames of one camera in order, each (3, H, W) uint8, RGB, at `Info.image_size`.

        The array may be overwritten by the next frame. Raises BadEpisode.
        """


def refuse_unusable(name: str, episode: Episode, names: dict[str, Sequence[str]]) -> None:
    """Raise BadEpisode for an episode of one step, a NaN or an infinity; `names` are the dimensions'."""
    if len(episode) < 2:
        steps = f"{len(episode)} step{'s' * (len(episode) != 1)}"
        raise BadEpisode(f"{name} has {steps}, but an action chunk needs at least 2")
    for part, values in (("state", episode.state), ("action", episode.action)):
        broken = np.argwhere(~np.isfinite(values))
        if len(broken):
            step, dim = broken[0]
            what = f"{values[step, dim]} in {part}, dimension {names[part][dim]}"
            raise BadEpisode(f"{name} has {what}, at step {step}")


def other_pace(times: np.ndarray, fps: float) -> float | None:
    """Steps a second by an episode's times (L,) in s, if that contradicts `fps`.

    The median counts: neither jitter nor lost steps change it.
    """
    pace = 1 / np.median(np.diff(times)) if len(times) > 1 else fps
    return None if fps / SLACK <= pace <= fps * SLACK else pace


def in_seconds(recorded: np.ndarray) -> np.ndarray | None:
    """Recorded times (L,), in s, ms, us or ns from any origin, in s since the first; None if not times."""
    times = (recorded - recorded[0]).astype(np.float64)
    steps = np.diff(times)
    if not np.isfinite(times).all() or (steps <= 0).any() or (steps == 1).all():  # a count of steps
        return None
    units = [unit for unit in (1, 1e3, 1e6, 1e9) if 0.5 <= unit / np.median(steps) < 500]
    return times / units[0] if units else None


def step_times(
    name: str,
    recorded: np.ndarray | None,
    steps: int,
    fps: float,
    by: str = "--fps says",
    sure: bool = False,
) -> np.ndarray:
    """Times (L,) of an episode's steps, in s since the first: those recorded, if they are times.

    Raises BadEpisode if they contradict the rate, unless that is `sure`; `by` is what says it.
    """
    even = np.arange(steps) / fps
    times = in_seconds(recorded) if recorded is not None and len(recorded) == steps > 1 else None
    pace = None if times is None else other_pace(times, fps)
    if pace is not None and not sure:
        said = f"{pace:.4g} steps a second by its timestamps, but {by} {fps:g}"
        raise BadEpisode(f"{name} has {said} (give the right --fps, or delete wrong timestamps)")
    return even if times is None or pace is not None else times


def hash_ends(path: Path, count: int = 64 * 1024) -> str:
    """Hash of a file's size, head and tail: a cheap way to notice that a large file has changed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(count)
            file.seek(max(0, size - count))
            return hashlib.sha256(size.to_bytes(8, "little") + head + file.read(count)).hexdigest()
    except OSError:
        return "unreadable"  # ingest reports which episode lacks it


def hash_once(root: Path, files: Sequence[Path], kept: Path) -> list[str]:
    """Hashes of files below `root`, kept in the folder `kept` while all of them stay unchanged."""

    def hash_whole(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    file = kept / f"{hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]}.json"
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release the GIL
        return computed_once(file, unchanged_while(files), lambda: list(pool.map(hash_whole, files)))


def is_pointer(path: Path | str) -> bool:
    """Whether a file is git's placeholder for a large file that was not fetched."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(20) == b"version https://git-"
    return False


def existing(wanted: Sequence[int] | None, there: Collection[int], source: str) -> list[int]:
    """The wanted episodes, or all; a UserError if one of them does not exist."""
    absent = sorted(set(wanted or ()) - set(there))
    if absent:
        names = ", ".join(map(str, absent[:5])) + ", ..." * (len(absent) > 5)
        raise UserError(f"{source} has no episode {names}: `python -m common.data.store inspect` lists them.")
    return list(there if wanted is None else wanted)


def spaced(instruction: object) -> str:
    """An instruction with single spaces, so that it is one and the same wherever it comes from."""
    return " ".join(str(instruction).split())


def reason(error: BaseException) -> str:
    """An exception's message, as a clause."""
    said = str(getattr(error, "strerror", None) or error)
    return " ".join(said.split())[:200].rstrip(".") or type(error).__name__
