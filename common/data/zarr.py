"""Zarr replay buffers as written by UMI and diffusion_policy: a folder or a .zarr.zip.

data/<key>          all steps of all episodes, one after the other: (S, ...)
meta/episode_ends   (E,), where each episode ends

UMI's and pushT's names are recognised; for others, give `--state-keys` and the like.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from common.console import say
from common.data.frames import as_rgb, pixel_frame
from common.data.layout import Known, Layout, choose_layout, describe, exact_pixels, rows_of
from common.data.source import (
    BadEpisode,
    Episode,
    Info,
    existing,
    hash_once,
    reason,
    refuse_unusable,
    step_times,
)
from common.errors import UserError
from common.files import walk

if TYPE_CHECKING:
    from common.data import DataConfig

FOREIGN = re.compile(r"(^|/)(\.(?!z)[^/]*|Thumbs\.db|desktop\.ini|__MACOSX/.*)$")  # from file managers
TIMES = ("timestamp", "timestamps")
UMI = ("robot{}_eef_pos", "robot{}_eef_rot_axis_angle", "robot{}_gripper_width")


def is_zarr(path: Path) -> bool:
    marks = (path / ".zgroup", path / "zarr.json")
    return path.name.lower().endswith(".zarr.zip") or any(mark.is_file() for mark in marks)


@dataclass(frozen=True)
class ZarrSource:
    """A replay buffer with the options chosen for it (see `Source`)."""

    path: Path
    name: str
    config: DataConfig

    isolated: ClassVar[bool] = False

    @cached_property
    def layout(self) -> Layout:
        found = arrays_below(open_group(self.path, self.name)["data"])
        arrays = {key: describe(a.shape, a.dtype, lambda a=a: a[0]) for key, a in found}
        umi = tuple(name.format(robot) for robot in range(10) for name in UMI if name.format(robot) in arrays)
        if umi and "action" not in arrays and not self.config.action_keys:
            raise UserError(
                f"{self.name} records no action: to learn the robot's own motion, give --action-keys "
                f"{' '.join(umi)} --action-offset 1."
            )
        known = Known("UMI", umi, ("action",)) if umi else None
        if not umi and {"img", "state", "action"} <= arrays.keys():
            known = Known("pushT", ("state",), ("action",))
        return choose_layout(arrays, known, self.config, self.name, "data")

    def info(self) -> Info:
        layout, fps = self.layout, self.config.fps
        if fps is None:
            raise UserError(f"{self.name} does not state its control rate: give --fps.")
        layout.say(f"{self.name}: zarr, {layout.name} layout, {fps:g} Hz")
        for line in absent_chunks(self.path, open_group(self.path, self.name), layout.arrays):
            say(f"  {line}")
        return layout.info(self.name, fingerprint(self.path, self.config.cache_dir / "hashes"), fps)

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        group, layout, episodes, bad = open_group(self.path, self.name), self.layout, [], []
        ends = group["meta/episode_ends"][:].tolist()
        for key, (_, (steps, *_), _, _) in layout.arrays.items():
            if [steps] != ends[-1:] or sorted({0, *ends}) != [0, *ends]:
                ends = f"{ends[:5]} ... {ends[-5:]}" if len(ends) > 10 else ends
                raise UserError(f"{self.name} has {steps} steps in data/{key}, and episodes end at {ends}.")
        spans = list(pairwise([0, *ends]))
        state, action = layout.vectors(lambda key: group[f"data/{key}"][:])
        times = (array for key, array in arrays_below(group["data"]) if key in TIMES)
        recorded = next((t[:] for t in times if t.shape == (ends[-1],) and t.dtype.kind in "iuf"), None)
        for index in existing(wanted, range(len(spans)), self.name):
            first, last = spans[index]
            try:
                own = None if recorded is None else recorded[first:last]
                times = step_times(f"Episode {index}", own, last - first, self.config.fps)
                episode = Episode(index, state[first:last], action[first:last], times, [first, last])
                refuse_unusable(f"Episode {index}", episode, layout.names)
                episodes.append(episode)
            except BadEpisode as error:
                bad.append(str(error))
        return episodes, bad

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        key, _, recorded = self.layout.cameras[camera]
        try:
            group = _opened(self.path, self.name, self.path.stat().st_mtime_ns, os.getpid())
            for cell in rows_of(group[f"data/{key}"], *episode.origin):
                frame = pixel_frame(exact_pixels(cell), recorded, self.layout.size)
                yield as_rgb(frame, self.layout.color_order)
        except Exception as error:  # each codec raises its own
            said = f"Episode {episode.index} cannot be decoded from {key} ({reason(error)})"
            raise BadEpisode(said) from None


def open_group(path: Path, name: str) -> Any:
    """Open the buffer read-only."""
    try:
        import zarr
    except ImportError:
        raise UserError(f"{name} needs zarr: pip install -r requirements-zarr.txt.") from None
    with suppress(ImportError):
        from imagecodecs.numcodecs import register_codecs

        register_codecs(verbose=False)
    try:
        group = zarr.open_group(zarr.storage.ZipStore(path, mode="r") if path.is_file() else path, mode="r")
        group["meta/episode_ends"], arrays_below(group["data"])
    except Exception as error:  # zarr and its stores raise classes of their own
        if codec := re.search(r"codec '?([\w.-]+)'?.*not available", str(error)):
            raise UserError(f"{name} is compressed with {codec[1]}: pip install imagecodecs.") from None
        if inside := _folder_inside(path):
            said = f"{name} holds the buffer in a folder, {inside}/: zip its contents, not the folder."
            raise UserError(said) from None
        raise UserError(f"{name} is not a readable replay buffer ({reason(error)}).") from None
    return group


@lru_cache(maxsize=1)
def _opened(path: Path, name: str, mtime: int, process: int) -> Any:
    """`open_group`, once a process: a zip file can list hundreds of thousands of files."""
    return open_group(path, name)


def _folder_inside(path: Path) -> str | None:
    """The one folder of a zip file that contains everything else, if any."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        names = {name.partition("/")[0] for name in file.namelist() if not FOREIGN.search(name)}
        return names.pop() if len(names) == 1 else None
    return None


def absent_chunks(path: Path, group: Any, keys: Collection[str]) -> Iterator[str]:
    """Lines about arrays with missing chunks, which zarr reads as the fill value.

    This may be no error: a chunk that holds only that value need not be written. zarr could count them, too,
    but takes minutes for the hundred thousands of files of some buffers.
    """
    if path.is_file():
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    else:
        names = [file.relative_to(path).as_posix() for file in files_of(path)]
    chunks = [name for name in names if not name.endswith((".zarray", ".zattrs", "zarr.json", "/"))]
    for key in keys:
        array, below = group[f"data/{key}"], f"data/{key}/"
        shapes = zip(array.shape, array.shards or array.chunks, strict=True)
        count = math.prod(math.ceil(size / part) for size, part in shapes)
        absent = count - sum(name.startswith(below) for name in chunks)
        if absent:
            share = f"{absent} of {count} chunks are missing and read as {array.fill_value:g}"
            yield f"data/{key}: {share}: copy the buffer again unless this value was recorded"


def arrays_below(group: Any) -> list[tuple[str, Any]]:
    """The arrays in a group and the groups in it, by key."""
    with warnings.catch_warnings(action="ignore"):  # about files that are not zarr's
        return sorted((key, item) for key, item in group.members(max_depth=None) if hasattr(item, "shape"))


def files_of(path: Path) -> list[Path]:
    """A buffer's files in a folder, in order."""
    files = [folder / name for folder, _, names in walk(path) for name in names]
    files = [file for file in files if file.is_file()]
    return sorted(file for file in files if not FOREIGN.search(file.relative_to(path).as_posix()))


def fingerprint(path: Path, kept: Path) -> str:
    """Hash of the content: a zip file's checksums, or those of all files in a folder (see `hash_once`)."""
    if path.is_file():
        with zipfile.ZipFile(path) as file:
            found = [(entry.filename, entry.file_size, entry.CRC) for entry in file.infolist()]
        content = sorted(entry for entry in found if not FOREIGN.search(entry[0]))
    else:
        files = files_of(path)
        names = [file.relative_to(path).as_posix() for file in files]
        content = [*zip(names, hash_once(path, files, kept), strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
