"""Features of frozen networks, kept with an episode store: computed once for every frame, read like frames.

    <store>/features-<name>-<key>/rows.bin    float16, a row for each row of frames
    <store>/features-<name>-<key>/done.bin    int64, two per row: one more than the checksum of its episode's
                                              frames, and the checksum of its features; zeros: not computed

The key is a hash of what the features depend on: weights, settings, cameras. Several processes divide the
work block by block, and what an interrupted one has computed is kept.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.console import say
from common.data.rows import RawRows
from common.data.store import EpisodeStore, Extra
from common.errors import UserError
from common.files import require_space, writing_below

ROWS, DONE = "rows.bin", "done.bin"
BLOCK = 2048  # rows that one process computes while others compute other blocks


def ensure_features(
    store: EpisodeStore,
    name: str,
    identity: dict[str, Any],
    shape: Sequence[int],
    compute: Callable[[Tensor], Tensor],
    batch_size: int,
    remedy: str,
) -> EpisodeStore:
    """The store with features; those that are missing are computed now.

    Args:
        name: of the features, in `Batch.extras` and for people.
        identity: what they depend on, apart from the images.
        compute: images (B, N, 3, H, W) uint8 to features (B, *shape) float16 on the CPU.
        batch_size: largest number of steps to compute at once; halved when memory runs out.
        remedy: what makes them smaller, for the message if the disk is too small.

    Raises:
        UserError: if the disk is too small, or features are not finite.
    """
    from tqdm import tqdm

    content = json.dumps({**identity, "shape": list(shape), "dtype": "float16"}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    files = tuple(frames.parent / f"features-{name}-{key}" / ROWS for frames in store.frame_files)
    parts, folder = store.part_of(np.arange(store.num_steps)), store.frame_files[0].parent
    features = [_Features(store, part, file, tuple(shape), compute) for part, file in enumerate(files)]
    missing = [one.missing(np.flatnonzero(parts == one.part)) for one in features]
    count, shown = sum(map(len, missing)), os.environ.get("RANK", "0") == "0"
    if count:
        needed = count * features[0].row_bytes
        require_space(folder, needed, f"The {name} features need", remedy)
        say(f"{name} features: {needed / 1e9:.2f} GB in {folder}, computed once")
        with (
            writing_below(folder, remedy, f"another --cache-dir, or --{name}-cache off"),
            tqdm(total=count, desc=f"{name} features", unit="step", disable=not shown) as bar,
        ):
            for one, steps in zip(features, missing, strict=True):
                batch_size = one.fill(steps, batch_size, bar)
    return replace(store, extras={**store.extras, name: Extra(files, tuple(shape))})


@dataclass(frozen=True)
class _Features:
    """The features of one of the datasets in a store, `part`, whose rows are in `file`."""

    store: EpisodeStore
    part: int
    file: Path
    shape: tuple[int, ...]
    compute: Callable[[Tensor], Tensor]

    @property
    def row_bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def missing(self, steps: np.ndarray) -> np.ndarray:
        """The steps whose features are missing, or are of other frames."""
        rows, done, marks = self.store.places(steps), np.zeros(len(steps), np.int64), _marks(self.file.parent)
        there = rows < min(len(marks), _size(self.file) // self.row_bytes)
        done[there] = marks[rows[there], 0]
        return steps[done != self._frames_mark(steps)]

    def _frames_mark(self, steps: np.ndarray) -> np.ndarray:
        """What `done.bin` holds for the frames of these steps once their features are computed."""
        return self.store.episode_checksums[self.store.episode_of(steps)] + 1

    def fill(self, missing: np.ndarray, batch_size: int, bar: Any) -> int:
        """Compute the features of steps; those that other processes work on are left to them.

        Returns the batch size that memory allows.
        """
        from filelock import FileLock, Timeout

        folder, rows = self.file.parent, len(self.store.frames[self.part])
        folder.mkdir(exist_ok=True)
        with (folder / DONE).open("ab") as done:  # rows that were cut off do not count
            done.truncate(min(done.tell(), 16 * (_size(self.file) // self.row_bytes)))
        RawRows.make_room(self.file, rows, self.shape, 2)
        RawRows.make_room(folder / DONE, rows, (2,), 8)
        numbers = self.store.places(missing) // BLOCK
        blocks = {number: missing[numbers == number] for number in np.unique(numbers).tolist()}
        for patient in (False, True):  # first what no other process works on, then wait for the rest
            for number in list(blocks):
                lock = FileLock(folder / f".{number}.lock")
                try:
                    held = lock.acquire(timeout=-1 if patient else 0)
                except Timeout:
                    bar.set_postfix_str("some are being computed by other processes")
                    continue
                with held:
                    steps = blocks.pop(number)
                    left = self.missing(steps)
                    bar.update(len(steps) - len(left))
                    batch_size = self._fill_block(left, batch_size, bar)
        return batch_size

    def _fill_block(self, steps: np.ndarray, batch_size: int, bar: Any) -> int:
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while len(steps):
            here = steps[:batch_size]
            try:
                features = self.compute(self.store.images(here)).numpy()
            except RuntimeError as error:
                if len(here) == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size = len(here) // 2
                clear_device_cache(garbage_collection=True)
                continue
            if not np.isfinite(features).all():
                raise UserError(
                    f"The features of {self.store.source} are not finite: the weights are broken."
                )
            rows = self.store.places(here)
            checksums = [zlib.crc32(np.ascontiguousarray(row)) for row in features]
            _write(self.file, rows, features)  # first, so that nothing is marked that is not on the disk
            _write(self.file.with_name(DONE), rows, np.stack([self._frames_mark(here), checksums], axis=1))
            bar.update(len(here))
            steps = steps[batch_size:]
        return batch_size


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _marks(folder: Path) -> np.ndarray:
    """The content of `done.bin`, (R, 2); no rows if it is not there."""
    count = _size(folder / DONE) // 16
    return (
        np.fromfile(folder / DONE, np.int64, 2 * count).reshape(-1, 2)
        if count
        else np.empty((0, 2), np.int64)
    )


def _write(path: Path, rows: np.ndarray, values: np.ndarray) -> None:
    """Write rows of a file to the disk."""
    with path.open("r+b") as file:
        for row, value in zip(rows.tolist(), values, strict=True):
            file.seek(row * value.nbytes)
            file.write(np.ascontiguousarray(value))
        file.flush()
        os.fsync(file.fileno())


def damaged_rows(folder: Path) -> np.ndarray:
    """Rows whose features in such a folder have changed since they were written."""
    marks, size = _marks(folder), _size(folder / ROWS)
    done = np.flatnonzero(marks[:, 0])
    if len(done) == 0 or size == 0 or size % len(marks):  # nothing there, or it was cut off
        return done
    values = np.memmap(folder / ROWS, np.uint8, "r").reshape(len(marks), -1)
    return np.array([row for row in done.tolist() if zlib.crc32(values[row]) != marks[row, 1]], np.int64)


def forget(folder: Path, rows: np.ndarray) -> None:
    """Mark the features of these rows to be computed again."""
    rows = rows[rows < len(_marks(folder))]
    if len(rows):
        _write(folder / DONE, rows, np.zeros((len(rows), 2), np.int64))
