"""Features of frozen networks, kept beside an episode store: computed once for every frame, read like frames.

    <store>/features-<name>-<key>/frames-00000.bin    float16, a row for each row of that file of frames
    <store>/features-<name>-<key>/frames-00000.json   what they were made from; with it the file is finished

The key is a hash of what the features follow from: weights, settings, cameras. A file is filled under a
temporary name and renamed when it is complete and on the disk; after an interruption the next process goes on
where it was. Several processes at once, as of a distributed run, share the files out among themselves.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.ingest import report
from common.data.store import META, EpisodeStore
from common.errors import UserError
from common.files import write_whole

SAVE_EVERY = 20.0  # seconds of work that an interruption may cost
Compute = Callable[[Tensor], Tensor]


def ensure_features(
    store: EpisodeStore,
    name: str,
    identity: dict[str, Any],
    shape: Sequence[int],
    compute: Compute,
    batch_size: int,
    remedy: str,
) -> EpisodeStore:
    """The store with features, which are computed now as far as they are not there.

    Args:
        store: any selection or joining of stores; features are kept with each of them.
        name: of the features, for people.
        identity: what they follow from, apart from the images.
        shape: of one step's features.
        compute: images (B, N, 3, H, W) uint8 to features (B, *shape) float16 on the CPU.
        batch_size: largest number of steps to compute at once; halved while memory does not suffice.
        remedy: what makes them smaller, for the message about a disk that is too small.

    Raises:
        UserError: if the disk is too small, or features are not finite.
    """
    identity = {**identity, "shape": list(shape), "dtype": "float16"}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    used = sorted({store.shard_files[s] for s in np.unique(store.episode_shard).tolist()})
    files = {frames: Features.of(frames, name, key, identity) for frames in used}
    pending = [file for file in files.values() if not file.finished()]
    if pending:
        _fill_all(pending, name, tuple(shape), compute, batch_size, remedy)
    paths = tuple(files[frames].path if frames in files else frames for frames in store.shard_files)
    return replace(store, feature_files=paths, feature_shape=tuple(shape))


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one file of frames.

    Attributes:
        frames: that file.
        path: where they are, or shall be.
        identity: what they follow from.
        source: checksum and size of the frames: others have other features.
    """

    frames: Path
    path: Path
    identity: dict[str, Any]
    source: dict[str, int]

    @classmethod
    def of(cls, frames: Path, name: str, key: str, identity: dict[str, Any]) -> Features:
        meta = json.loads((frames.parent / META).read_text())
        entry = next(entry for entry in meta["shards"] if entry["file"] == frames.name)
        source = {"crc32": entry["crc32"], "bytes": entry["bytes"]}
        return cls(frames, frames.parent / f"features-{name}-{key}" / frames.name, identity, source)

    @property
    def note(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def part(self) -> Path:
        return self.path.with_suffix(".bin.part")

    def begun_bytes(self) -> int:
        """What is on the disk already."""
        return sum(path.stat().st_size for path in (self.path, self.part) if path.exists())

    @property
    def row_bytes(self) -> int:
        return 2 * int(np.prod(self.identity["shape"]))

    def finished(self) -> bool:
        """Whether they are there, whole, and of these frames and this network."""
        try:
            note = json.loads(self.note.read_text())
            same = note["identity"] == self.identity and note["source"] == self.source
            return same and self.path.stat().st_size == note["bytes"] > 0
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def adopt(self) -> bool:
        """Take them, by a hard link, from an earlier store that shares the frames: a dataset has grown.

        Only under the file's lock.
        """
        for path in self.frames.parent.parent.glob(f"*/{self.path.parent.name}/{self.path.name}"):
            other = replace(self, path=path)
            if path != self.path and other.finished():
                self.path.parent.mkdir(exist_ok=True)
                try:
                    self.path.unlink(missing_ok=True)
                    os.link(path, self.path)
                except OSError:  # another disk, or a file system without links
                    return False
                write_whole(self.note, other.note.read_bytes())
                return True
        return False


def _fill_all(
    pending: list[Features],
    name: str,
    shape: tuple[int, ...],
    compute: Compute,
    batch_size: int,
    remedy: str,
) -> None:
    """Compute all that are missing, those that other processes work on left to them."""
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    stores = {folder: EpisodeStore.open(folder) for folder in {file.frames.parent for file in pending}}
    readers = {file: _Frames(stores[file.frames.parent], file.frames) for file in pending}
    needed = sum(readers[file].rows * file.row_bytes - file.begun_bytes() for file in pending)
    folder = pending[0].frames.parent
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise UserError(
            f"The {name} features need {needed / 1e9:.2f} GB and the disk of {folder} has "
            f"{free / 1e9:.2f} GB free: free some, move --cache-dir, or choose {remedy}."
        )
    report(f"{name} features: {needed / 1e9:.2f} GB beside {folder}, computed once")
    steps = sum(len(readers[file].steps) for file in pending)
    try:
        shown = os.environ.get("RANK", "0") == "0"
        with tqdm(total=steps, desc=f"{name} features", unit="step", disable=not shown) as bar:
            waiting = False  # first what nobody works on, then wait for what others do
            while pending:
                for file in list(pending):
                    file.path.parent.mkdir(exist_ok=True)
                    lock = FileLock(file.path.with_name(f".{file.path.stem}.lock"))
                    try:
                        lock.acquire(timeout=-1 if waiting else 0)
                    except Timeout:
                        continue
                    try:
                        if not file.finished() and not file.adopt():
                            batch_size = _fill(file, readers[file], shape, compute, batch_size, bar)
                        else:
                            bar.update(len(readers[file].steps))
                    finally:
                        lock.release()
                    pending.remove(file)
                if pending and not waiting:
                    bar.set_postfix_str("the rest is being computed by other processes")
                waiting = True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"The {name} features cannot be written to {folder} ({error.strerror}): choose another "
                f"--cache-dir, or --{name}-cache off."
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The disk of {folder} is full: free some, move --cache-dir, or choose {remedy}."
        ) from error


class _Frames:
    """The frames of one file, by row."""

    def __init__(self, store: EpisodeStore, frames: Path):
        self.store = store
        number = self.store.shard_files.index(frames)
        spans = [
            (int(self.store.episode_row[e]), int(self.store.episode_starts[e]), int(n))
            for e, n in enumerate(np.diff(self.store.episode_starts))
            if self.store.episode_shard[e] == number
        ]
        self.rows = max(row + n for row, _, n in spans)
        self.steps = np.concatenate([np.arange(start, start + n) for _, start, n in sorted(spans)])
        self.at = np.concatenate([np.arange(row, row + n) for row, _, n in sorted(spans)])


def _fill(
    file: Features, frames: _Frames, shape: tuple[int, ...], compute: Compute, batch_size: int, bar
) -> int:
    """Compute one file, zeros where no episode is; returns the batch size that there is memory for."""
    from accelerate.utils import find_executable_batch_size

    progress = file.path.with_suffix(".progress")
    done, crc = _progress(file, progress)
    if done == 0:
        progress.unlink(missing_ok=True)  # of a file that is gone: it must not vouch for this one
    bar.update(int(np.searchsorted(frames.at, done)))
    with file.part.open("r+b" if done else "wb") as out:
        out.truncate(done * file.row_bytes)
        out.seek(done * file.row_bytes)
        saved = time.monotonic()

        def halve() -> int:
            nonlocal batch_size
            batch_size //= 2
            return batch_size

        @find_executable_batch_size(starting_batch_size=batch_size, reduce_batch_size_fn=halve)
        def fill(size: int) -> None:
            nonlocal done, crc, saved
            while done < frames.rows:
                rows = np.zeros((min(size, frames.rows - done), *shape), np.float16)
                here = np.searchsorted(frames.at, [done, done + len(rows)])
                if here[1] > here[0]:
                    features = compute(frames.store.images(frames.steps[here[0] : here[1]]))
                    if not torch.isfinite(features).all():
                        raise UserError(
                            f"The features of {file.frames} are not finite: the network or its weights are "
                            f"broken."
                        )
                    rows[frames.at[here[0] : here[1]] - done] = features.numpy()
                out.write(rows.data)
                done, crc = done + len(rows), zlib.crc32(rows.data, crc)
                bar.update(int(here[1] - here[0]))
                if time.monotonic() - saved > SAVE_EVERY:
                    out.flush()
                    os.fsync(out.fileno())
                    write_whole(progress, json.dumps([done, crc, file.identity, file.source]).encode())
                    saved = time.monotonic()

        fill()
        out.flush()
        os.fsync(out.fileno())
    file.part.replace(file.path)
    note = {"bytes": frames.rows * file.row_bytes, "crc32": crc}
    note |= {"identity": file.identity, "source": file.source}
    write_whole(file.note, json.dumps(note).encode())
    progress.unlink(missing_ok=True)
    return batch_size


def _progress(file: Features, progress: Path) -> tuple[int, int]:
    """Rows that an interrupted process has left on the disk, and their checksum."""
    try:
        done, crc, identity, source = json.loads(progress.read_text())
        known = identity == file.identity and source == file.source
        if known and file.part.stat().st_size >= done * file.row_bytes:
            return int(done), int(crc)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, 0
