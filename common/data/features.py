"""Features of frozen networks, kept beside an episode store: computed once for every frame, read like frames.

    <store>/features-<name>-<key>/frames-00000.bin    float16, a row for each row of that file of frames
    <store>/features-<name>-<key>/frames-00000.json   what they were made from; with it the file is finished

The key is a hash of what the features follow from: weights, settings, cameras. Rows are appended to a file
whose name holds the checksum of the frames, and which is renamed when it is complete: an interrupted process
leaves its rows to the next one. Several processes share the files out among themselves.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.console import say
from common.data.store import META, EpisodeStore, Extra
from common.errors import UserError
from common.files import checksum, read_json, require_space, sync_one, write_whole, writing_below

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
        name: of the features, in `Batch.extras` and for people.
        identity: what they follow from, apart from the images.
        compute: images (B, N, 3, H, W) uint8 to features (B, *shape) float16 on the CPU.
        batch_size: largest number of steps to compute at once; halved while memory does not suffice.
        remedy: what makes them smaller, for the message about a disk that is too small.

    Raises:
        UserError: if the disk is too small, or features are not finite.
    """
    identity = {**identity, "shape": list(shape), "dtype": "float16"}
    used = sorted({store.shard_files[s] for s in np.unique(store.episode_shard).tolist()})
    files = {frames: _File.of(frames, name, identity) for frames in used}
    pending = [file for file in files.values() if not file.finished()]
    if pending:
        _fill_all(pending, name, compute, batch_size, remedy)
    paths = tuple(files[frames].path if frames in files else frames for frames in store.shard_files)
    return replace(store, extras={**store.extras, name: Extra(paths, tuple(shape))})


@dataclass(frozen=True, eq=False)
class _File:
    """The features of one file of frames: `path` once they are finished, `part` until then."""

    frames: Path
    path: Path
    part: Path
    made_from: dict[str, Any]  # the network's identity, and size and checksum of the frames

    @classmethod
    def of(cls, frames: Path, name: str, identity: dict[str, Any]) -> "_File":
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        shards = read_json(frames.parent / META)["shards"]
        entry = next(entry for entry in shards if entry["file"] == frames.name)
        path = frames.parent / f"features-{name}-{key}" / frames.name
        source = {"crc32": entry["crc32"], "bytes": entry["bytes"]}
        part = path.with_name(f"{path.stem}-{entry['crc32']:08x}.part")
        return cls(frames, path, part, {"identity": identity, "source": source})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.made_from["identity"]["shape"])

    @property
    def row_bytes(self) -> int:
        return 2 * math.prod(self.shape)

    def finished(self) -> bool:
        """Whether they are there, whole, and of these frames and this network."""
        try:
            note = read_json(self.path.with_suffix(".json"))
            return note == {**note, **self.made_from} and self.path.stat().st_size == note["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def finish(self) -> None:
        """Make the complete part permanent."""
        sync_one(self.part)
        note = {**self.made_from, "bytes": self.part.stat().st_size, "crc32": checksum(self.part)}
        self.part.replace(self.path)
        write_whole(self.path.with_suffix(".json"), json.dumps(note).encode())


def _fill_all(pending: list[_File], name: str, compute: Compute, batch_size: int, remedy: str) -> None:
    """Compute all that are missing, those that other processes work on left to them."""
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    folder = pending[0].frames.parent
    stores = {path: EpisodeStore.open(path) for path in {file.frames.parent for file in pending}}
    steps = {file: _steps_by_row(stores[file.frames.parent], file.frames) for file in pending}
    begun = sum(p.stat().st_size for file in pending for p in (file.path, file.part) if p.exists())
    needed = sum(len(rows) * file.row_bytes for file, rows in steps.items()) - begun
    require_space(folder, needed, f"The {name} features need", remedy)
    say(f"{name} features: {needed / 1e9:.2f} GB beside {folder}, computed once")
    total, shown = sum(map(_count, steps.values())), os.environ.get("RANK", "0") == "0"
    with (
        writing_below(folder, remedy, f"another --cache-dir, or --{name}-cache off"),
        tqdm(total=total, desc=f"{name} features", unit="step", disable=not shown) as bar,
    ):
        waiting = False  # first what nobody works on, then wait for what others do
        while pending:
            for file in list(pending):
                file.path.parent.mkdir(exist_ok=True)
                lock = FileLock(file.path.with_name(f".{file.path.stem}.lock"))
                try:
                    held = lock.acquire(timeout=-1 if waiting else 0)
                except Timeout:
                    continue
                with held:
                    if file.finished():
                        bar.update(_count(steps[file]))
                    else:
                        images = stores[file.frames.parent].images
                        batch_size = _fill(file, steps[file], images, compute, batch_size, bar)
                pending.remove(file)
            if pending and not waiting:
                bar.set_postfix_str("the rest is being computed by other processes")
            waiting = True


def _steps_by_row(store: EpisodeStore, frames: Path) -> np.ndarray:
    """The step of the store in each row of a file of frames, -1 where no episode is: (R,) int64."""
    number, lengths = store.shard_files.index(frames), np.diff(store.episode_starts)
    here = np.flatnonzero(store.episode_shard == number)
    steps = np.full((store.episode_row[here] + lengths[here]).max(), -1)
    for e in here:
        row = store.episode_row[e]
        steps[row : row + lengths[e]] = np.arange(store.episode_starts[e], store.episode_starts[e + 1])
    return steps


def _count(steps: np.ndarray) -> int:
    return int((steps >= 0).sum())


def _fill(
    file: _File,
    steps: np.ndarray,
    images: Callable[[np.ndarray], Tensor],
    compute: Compute,
    batch_size: int,
    bar: Any,
) -> int:
    """Compute what a file lacks, zeros where no episode is; returns the batch size that memory allows."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    for stale in set(file.path.parent.glob(f"{file.path.stem}-*.part")) - {file.part}:
        stale.unlink()
    with file.part.open("ab") as out:
        done = out.tell() // file.row_bytes
        out.truncate(done * file.row_bytes)
        bar.update(_count(steps[:done]))
        while done < len(steps):
            here = steps[done : done + batch_size]
            rows = np.zeros((len(here), *file.shape), np.float16)
            try:
                if _count(here):
                    rows[here >= 0] = compute(images(here[here >= 0])).numpy()
            except RuntimeError as error:
                if len(here) == 1 or not should_reduce_batch_size(error):
                    raise
                batch_size = len(here) // 2
                clear_device_cache(garbage_collection=True)
                continue
            if not np.isfinite(rows).all():
                raise UserError(f"The features of {file.frames} are not finite: the weights are broken.")
            out.write(rows.data)
            out.flush()
            os.fsync(out.fileno())
            done += len(here)
            bar.update(_count(here))
    file.finish()
    return batch_size
