"""One HDF5 file of demonstrations: what it holds, its numbers, its frames. Runs in worker processes.

A damaged file can crash the HDF5 library or keep it busy for ever; `common/data/workers.py` sees to it that
this costs the file and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.cameras import MAX_IMAGE_SIDE, Camera
from common.data.frames import FrameError, image_frame, resize_rgb
from common.data.ingest import BadEpisode

if TYPE_CHECKING:
    import h5py

SCAN = 1  # what `scan_file` says; a change makes earlier scans void
EPISODE_GROUP = re.compile(r"(demo|episode|ep|traj|trajectory)[_-]?\d+", re.IGNORECASE)
RATE_ATTRIBUTES = ("fps", "frequency", "hz", "control_freq", "control_frequency", "frame_rate")
MAX_OBJECTS, MAX_DEPTH = 100_000, 16
MAX_BYTES = 2**31  # that one dataset of numbers, or one read of images, may take
READ_BYTES = 2**24  # images are read in blocks of about this size
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def natural(name: str) -> list:
    """Sorting key that puts episode_2 before episode_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def scan_file(path: str, name: str) -> dict[str, Any]:
    """What a file holds, without reading it all; runs in a worker.

    Returns:
        `sha256` of the file; `problem`, a clause, if it cannot be used at all; `fps`, if it says; and
        `episodes`: for each its `group`, and its `datasets` by key, as `describe_dataset` gives them, or a
        `problem`.
    """
    import h5py

    scan: dict[str, Any] = {"sha256": None, "episodes": []}
    try:
        with open(path, "rb") as file:
            scan["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        return {**scan, "problem": f"{name} cannot be read ({error.strerror})"}
    if size == 0:
        return {**scan, "problem": f"{name} is empty"}
    if not h5py.is_hdf5(path):
        return {**scan, "problem": f"{name} is not an HDF5 file"}
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            found = dict(walk(file))
            scan["fps"] = _attribute_rate(file)
            for group in episode_groups(found):
                inside = {key[len(group) :]: item for key, item in found.items() if key.startswith(group)}
                datasets = {key: describe_dataset(item) for key, item in inside.items()}
                scan["episodes"].append({"group": group, "datasets": datasets})
    except BadEpisode as error:
        return {**scan, "problem": f"{name} {error}"}
    except Exception as error:  # of a damaged file, h5py raises a dozen classes
        return {**scan, "problem": f"{name} cannot be read ({reason(error)})"}
    return scan if scan["episodes"] else {**scan, "problem": f"{name} holds no datasets"}


def reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def walk(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset below a group, by its path, in natural order. Soft links are left out.

    Raises:
        BadEpisode: for what reads other files, and for a tree that has no end.
    """
    import h5py

    pending, seen = [("", file, 0)], 0
    while pending:
        prefix, group, depth = pending.pop()
        below = []
        for name in sorted(group, key=natural):
            link, key, seen = group.get(name, getlink=True), prefix + name, seen + 1
            if isinstance(link, h5py.ExternalLink):
                raise BadEpisode(
                    f"has a link to another file at {key}, and a dataset must not read other files"
                )
            if link is None:  # the name is listed, but leads nowhere
                raise BadEpisode(f"is damaged at {key}")
            if not isinstance(link, h5py.HardLink):
                continue
            item = group[name]
            if seen > MAX_OBJECTS or depth > MAX_DEPTH:
                raise BadEpisode(
                    f"has more than {MAX_OBJECTS} objects, or groups inside each other without end"
                )
            if isinstance(item, h5py.Group):
                below.append((key + "/", item, depth + 1))
            elif isinstance(item, h5py.Dataset):
                if item.is_virtual or item.external:
                    raise BadEpisode(f"keeps {key} in another file, and a dataset must not read other files")
                yield key, item
        pending += reversed(below)


def episode_groups(keys: Collection[str]) -> list[str]:
    """Where the episodes of a file are: groups like data/demo_0/, or the file itself.

    Raises:
        BadEpisode: if a group beside them holds an episode, too, but is not named like one.
    """
    inside: dict[str, set[str]] = {}  # keys below each group, two levels deep
    for key in keys:
        for depth in (1, 2):
            parts = key.split("/", depth)
            if len(parts) > depth:
                inside.setdefault("/".join(parts[:depth]) + "/", set()).add(parts[depth])
    groups = [group for group in inside if EPISODE_GROUP.fullmatch(group.split("/")[-2])]
    groups = [group for group in groups if not any(g != group and group.startswith(g) for g in groups)]
    if not groups:
        return [""] if keys else []
    for group, found in inside.items():
        beside = group.count("/") == groups[0].count("/") and group not in groups
        if beside and any(inside[episode] <= found for episode in groups):
            raise BadEpisode(f"holds an episode in {group}, which is not named like {groups[0]}")
    return groups


def describe_dataset(item: h5py.Dataset) -> dict[str, Any]:
    """Shape and dtype of a dataset, its `kind` (numbers, pixels, encoded, other), and image size (H, W)."""
    shape, dtype = item.shape or (), item.dtype
    about = {"shape": list(shape), "dtype": str(dtype), "kind": "other"}
    if len(shape) == 4 and dtype == np.uint8 and {shape[1], shape[3]} & {1, 3, 4}:
        height, width = shape[1:3] if shape[3] in (1, 3, 4) else shape[2:]
        if 0 < height <= MAX_IMAGE_SIDE and 0 < width <= MAX_IMAGE_SIDE:
            return {**about, "kind": "pixels", "size": [height, width]}
    elif _may_hold_encoded(item) and shape[0] > 0:
        affordable_chunk(item)
        first = _encoded(item[0])
        if first.startswith(MAGIC):
            return {**about, "kind": "encoded", "size": _encoded_size(first)}
    if dtype.kind in "fiub" and 1 <= len(shape) <= 4:
        about["kind"] = "numbers"
    return about


def _may_hold_encoded(item: h5py.Dataset) -> bool:
    import h5py

    shape = item.shape or ()
    if len(shape) == 2:
        return item.dtype == np.uint8 and 64 <= shape[1] <= MAX_BYTES
    variable = (
        h5py.check_vlen_dtype(item.dtype) == np.uint8 or h5py.check_string_dtype(item.dtype) is not None
    )
    return len(shape) == 1 and (variable or item.dtype.kind in "SV")


def _encoded(cell: Any) -> bytes:
    """A cell of an image dataset as the bytes of a file."""
    return cell.tobytes() if isinstance(cell, np.ndarray | np.void) else bytes(cell)


def _encoded_size(encoded: bytes) -> list[int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return [image.height, image.width]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return [0, 0]  # the ingest says which frame cannot be decoded


def _attribute_rate(file: h5py.File) -> float | None:
    """Control steps per second, if the attributes of the file or of its `data` group say so."""
    import h5py

    attributes = dict(file.attrs)
    if isinstance(file.get("data", getlink=True), h5py.HardLink):
        attributes |= dict(file["data"].attrs)
    for name in RATE_ATTRIBUTES:
        value = np.asarray(attributes.get(name, np.nan))
        if value.dtype.kind in "fiu" and value.size == 1 and 0.01 <= float(value.ravel()[0]) <= 100_000:
            return float(value.ravel()[0])
    try:
        return float(json.loads(attributes["env_args"])["env_kwargs"]["control_freq"])
    except (KeyError, TypeError, ValueError):
        return None


def read_numbers(
    path: str,
    episodes: Sequence[tuple[str, str | None]],
    state_keys: Sequence[str],
    action_keys: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None] | str]:
    """State (L, P), action (L, A) and recorded times (L,) of episodes of a file; runs in a worker.

    Args:
        episodes: the group of each, and the key of its times, if it has any.

    Returns:
        For each episode these three, or a clause that says what is wrong.
    """
    import h5py

    found: list[Any] = []
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            for group, times in episodes:
                try:
                    parts = [
                        np.concatenate([_matrix(file[group + key]) for key in keys], axis=1)
                        for keys in (state_keys, action_keys)
                    ]
                    found.append((*parts, file[group + times][:] if times else None))
                except Exception as error:  # see scan_file
                    found.append(f"its numbers cannot be read ({reason(error)})")
    except Exception as error:
        return [f"it cannot be read ({reason(error)})"] * len(episodes)
    return found


def _matrix(item: h5py.Dataset) -> np.ndarray:
    affordable_chunk(item)
    with np.errstate(over="ignore", invalid="ignore"):
        values = item[:].astype(np.float32)
    return values.reshape(len(values), -1)


@dataclass(frozen=True)
class Hdf5Reader:
    """Frames of the dataset's cameras (see `FrameReader`).

    Attributes:
        root: the dataset's folder.
        cameras: those to read.
        size: (H, W) of the result.
        color_order: of the recorded pixels.
        places: file, group and steps of each episode.
    """

    isolated = True

    root: Path
    cameras: tuple[Camera, ...]
    size: tuple[int, int]
    color_order: str
    places: dict[int, tuple[str, str, int]]

    def only(self, episode: int) -> Hdf5Reader:
        return Hdf5Reader(
            self.root, self.cameras, self.size, self.color_order, {episode: self.places[episode]}
        )

    def frames(self, episode: int, camera: int) -> Iterator[np.ndarray]:
        import h5py

        file, group, steps = self.places[episode]
        view = self.cameras[camera]
        count = 0
        try:
            with h5py.File(self.root / file, "r", locking="best-effort") as opened:
                for frame in self._read(opened[group + view.key], view, steps):
                    yield frame if self.color_order == "rgb" else np.ascontiguousarray(frame[::-1])
                    count += 1
        except Exception as error:  # see scan_file
            raise BadEpisode(
                f"Episode {episode} ({file}) cannot be decoded: {view.key}, step {count} ({reason(error)})"
            ) from None

    def _read(self, item: h5py.Dataset, camera: Camera, steps: int) -> Iterator[np.ndarray]:
        encoded = _may_hold_encoded(item)
        for block in blocks(item, steps):
            for cell in block:
                if encoded:
                    yield image_frame(_encoded(cell), camera.size, self.size)
                else:
                    if cell.shape[-1] not in (1, 3, 4):  # channels first
                        cell = cell.transpose(1, 2, 0)
                    if cell.shape[:2] != camera.size:
                        raise FrameError(f"it is {cell.shape[0]}x{cell.shape[1]}")
                    rgb = np.repeat(cell, 3, axis=2) if cell.shape[2] == 1 else cell[:, :, :3]
                    resized = resize_rgb(np.ascontiguousarray(rgb), self.size)
                    yield np.ascontiguousarray(resized.transpose(2, 0, 1))


def blocks(item: h5py.Dataset, steps: int) -> Iterator[np.ndarray]:
    """The rows of a dataset in blocks of whole chunks, so that no chunk is decompressed twice."""
    rows = (item.chunks[0] if item.chunks else 1) * max(1, READ_BYTES // affordable_chunk(item))
    for first in range(0, steps, rows):
        yield item[first : min(first + rows, steps)]


def affordable_chunk(item: h5py.Dataset) -> int:
    """Bytes that must be in memory to read one row.

    Raises:
        FrameError: if they are more than any recording needs.
    """
    size = item.dtype.itemsize * math.prod(item.chunks or item.shape[1:])
    if size > MAX_BYTES:
        raise FrameError(f"one chunk of it takes {size / 1e9:.1f} GB")
    return max(size, 1)
