"""One HDF5 file of demonstrations: what it holds, its numbers, its frames. Runs in worker processes.

A damaged file can crash or hang the HDF5 library; `common/data/workers.py` makes sure that only this file is
lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.frames import image_frame, pixel_frame
from common.data.layout import Array, Layout, describe, exact_pixels, rows_of
from common.data.source import POINTER, BadEpisode, is_pointer, reason, spaced

if TYPE_CHECKING:
    import h5py

SCAN = 5  # version of what `scan_file` returns; a change invalidates earlier scans
EPISODE_GROUP = re.compile(r"(demo|episode|ep|traj|trajectory)([_-]?\d+)+", re.IGNORECASE)
RATE_ATTRIBUTES = ("fps", "frequency", "hz", "control_freq", "control_frequency", "frame_rate")
TASK_ATTRIBUTES = ("language_instruction", "instruction", "task_description", "task", "problem_info")
LATER_TASK_ATTRIBUTES = ("lang", "ep_meta")  # added later: used only if none of those above is there
ENVIRONMENT = "env_args"  # robomimic's: names the task in datasets without instructions
INSIDE = {"problem_info": "language_instruction", "ep_meta": "lang", ENVIRONMENT: "env_name"}  # JSON
LONGEST_TEXT = 1000  # characters: longer texts, such as a simulator's model, are not instructions
UNREGISTERED = re.compile(r"/plugin|not registered")  # in HDF5's message about a missing compression filter
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def open_file(path: Path | str) -> h5py.File:
    """An HDF5 file opened for reading; without a lock if the file system has none."""
    import h5py

    with suppress(ImportError):
        import hdf5plugin  # noqa: F401  registers Blosc and others
    return h5py.File(path, "r", locking="best-effort")


def natural(path: str) -> list:
    """Sort key that puts episode_2 before episode_10."""
    return [
        [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
        for name in path.split("/")
    ]


def no_scan(problem: str | None = None) -> dict[str, Any]:
    """The scan of a file that was not read."""
    return {"sha256": None, "problem": problem, "fps": None, "texts": {}, "episodes": [], "beside": {}}


def scan_file(path: str, name: str) -> dict[str, Any]:
    """What a file holds, without reading all of it: its `sha256`; `problem`, if it is unusable; `fps`, if
    stated; `texts`, short ones that may be instructions, by group and name; `episodes`, the arrays by key of
    each group; and `beside`, the arrays outside them.
    """
    import h5py

    scan = no_scan()
    try:
        with open(path, "rb") as file:
            scan["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            if file.tell() == 0:
                raise BadEpisode("is empty")
            if is_pointer(path):
                raise BadEpisode(POINTER)
        if not h5py.is_hdf5(path):
            raise BadEpisode("is not an HDF5 file")
        with open_file(path) as file:
            items = dict(walk(file))
            found = {key: describe_dataset(item) for key, item in items.items() if item is not None}
            scan["fps"], scan["texts"] = _attribute_rate(file), _texts(file, items)
        episodes: dict[str, dict[str, Array]] = {group: {} for group in episode_groups(found)}
        for key, array in found.items():
            group = next((group for group in groups_of(key) if group in episodes), None)
            (scan["beside"] if group is None else episodes[group])[key[len(group or "") :]] = array
        scan["episodes"] = list(episodes.items())
        scan["beside"] |= {key: Array("other", (), "link") for key, item in items.items() if item is None}
        if not found:
            raise BadEpisode("holds no datasets")
    except BadEpisode as error:
        scan["problem"] = f"{name} {error}"
    except Exception as error:  # for a damaged file, h5py raises a dozen classes
        scan["problem"] = f"{name} cannot be read ({reason(error)})"
    return scan


def walk(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset | None]]:
    """Every dataset by its path, in natural order, and None for soft links, which are not followed.

    Raises:
        BadEpisode: for links to other files, since this file's hash would not show their changes.
    """
    import h5py

    links: dict[str, Any] = {}
    file.visititems_links(links.__setitem__)  # visits each group once, through hard links only
    for key in sorted(links, key=natural):
        if isinstance(links[key], h5py.ExternalLink):
            raise BadEpisode(f"links to another file at {key}, which a dataset must not do")
        item = file[key] if isinstance(links[key], h5py.HardLink) else None
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                raise BadEpisode(f"keeps {key} in another file, which a dataset must not do")
            yield key, item
        elif isinstance(links[key], h5py.SoftLink):
            yield key, None


def groups_of(path: str) -> list[str]:
    """The groups that a path is in, such as data/demo_0/ and data/; innermost first, last the file itself."""
    return [*(path[: n + 1] for n in reversed(range(len(path))) if path[n] == "/"), ""]


def episode_groups(keys: Collection[str]) -> list[str]:
    """Where the episodes of a file are: groups like data/demo_0/, or the file itself.

    Raises:
        BadEpisode: if another group also holds an episode but is not named like one.
    """
    inside: dict[str, set[str]] = {}  # keys below each group, two levels deep
    for key in keys:
        for depth in (1, 2):
            parts = key.split("/", depth)
            if len(parts) > depth:
                inside.setdefault("/".join(parts[:depth]) + "/", set()).add(parts[depth])
    named = {group for group in inside if EPISODE_GROUP.fullmatch(group.split("/")[-2])}
    groups = [group for group in inside if group in named and named.isdisjoint(groups_of(group)[1:])]
    if not groups:
        return [""] if keys else []
    episodes = set(groups)
    for group, found in inside.items():
        beside = group.count("/") == groups[0].count("/") and group not in episodes
        if beside and any(inside[episode] <= found for episode in groups):
            raise BadEpisode(f"holds an episode in {group}, which is not named like {groups[0]}")
    return groups


def describe_dataset(item: h5py.Dataset) -> Array:
    array = describe(item.shape or (), item.dtype, lambda: item[0])
    if array.kind != "pixels" and _may_hold_encoded(item) and len(item) > 0:
        cells = (_encoded(item[i]) for i in range(min(len(item), 30)))
        first = next((cell for cell in cells if cell.strip(b"\0")), b"")  # a camera may start late
        if first.startswith(MAGIC):
            return array._replace(**_encoded_image(first))
    return array


def _may_hold_encoded(item: h5py.Dataset) -> bool:
    import h5py

    shape = item.shape or ()
    if len(shape) == 2:
        return item.dtype == np.uint8 and shape[1] >= 64
    variable = h5py.check_vlen_dtype(item.dtype) == np.uint8 or h5py.check_string_dtype(item.dtype)
    return len(shape) == 1 and bool(variable or item.dtype.kind in "SV")


def _encoded(cell: Any) -> bytes:
    """A cell of an image dataset, as the bytes of an image file."""
    return cell.tobytes() if isinstance(cell, np.ndarray | np.void) else bytes(cell)


def _encoded_image(encoded: bytes) -> dict[str, Any]:
    """Kind, dtype and size of an array of such images; the kind differs if they are not 8-bit colour."""
    from PIL import Image, ImageOps

    deep = encoded.startswith(MAGIC[1]) and encoded[24:25] > b"\x08"  # bits; Pillow drops half of 16
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            upright = ImageOps.exif_transpose(image)
            colour = image.mode in ("RGB", "RGBA", "P") and not deep
            what = image.format if colour else f"{'16-bit ' if deep else ''}{image.mode} {image.format}"
        return {"kind": "encoded" if colour else "other", "dtype": what, "size": upright.size[::-1]}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {"kind": "encoded", "size": (0, 0)}  # ingest reports which frame cannot be decoded


def _attribute_rate(file: h5py.File) -> float | None:
    """Control steps per second, if the attributes of the file or of its `data` group say so."""

    places = [file, *([file["data"]] if "data" in file else [])]
    names = (*RATE_ATTRIBUTES, "env_args")
    attributes = {name: _plain(at.attrs[name]) for at in places for name in names if name in at.attrs}
    for name in RATE_ATTRIBUTES:
        with suppress(TypeError, ValueError):
            rate = float(attributes.get(name, np.nan))
            if 0.01 <= rate <= 100_000 and not isinstance(attributes[name], bool):
                return rate
    try:
        return float(json.loads(attributes["env_args"])["env_kwargs"]["control_freq"])
    except (KeyError, TypeError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """A single value, bare or in an array; bytes become text."""
    value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _texts(file: h5py.File, items: dict[str, h5py.Dataset | None]) -> dict[str, dict[str, str]]:
    """Texts by group ("", data/demo_0/, ...) and name: attributes, and, as "/name", arrays of one element."""
    import h5py

    found: dict[str, dict[str, str]] = {}

    def keep(group: str, name: str, said: Any) -> None:
        said = said[0] if isinstance(said, list) and len(said) == 1 else said
        if name in INSIDE:
            with suppress(ValueError, TypeError, KeyError):
                said = json.loads(said)[INSIDE[name]]
                said = said[0] if isinstance(said, list) and len(said) == 1 else said
        if isinstance(said, str) and said.strip() and len(said) <= LONGEST_TEXT and said.lstrip()[0] != "{":
            said = said.encode(errors="surrogateescape").decode(errors="replace")  # as h5py gives other codes
            found.setdefault(group, {})[name] = spaced(said.strip().strip('"'))

    def look(group: h5py.Group) -> None:
        for name in group.attrs:
            with suppress(OSError, TypeError, ValueError):  # attribute types that h5py does not know
                keep(f"{group.name.strip('/')}/".lstrip("/"), name, _plain(group.attrs[name]))

    look(file)
    file.visititems(lambda _, item: look(item) if isinstance(item, h5py.Group) else None)
    for key, item in items.items():
        is_text = item is not None and (item.dtype.kind == "S" or h5py.check_string_dtype(item.dtype))
        if is_text and item.size == 1:
            folder, _, name = key.rpartition("/")
            keep(f"{folder}/".lstrip("/"), f"/{name}", _plain(item[()]))
    return found


def stated_task(texts: dict[str, dict[str, str]], group: str, key: str | None) -> tuple[str, str] | None:
    """The instruction of the episode in a group, and the name of what states it; None without one.

    Attributes that can only mean an instruction come before others; of the same ones, the innermost group's
    counts. `key` is `--task-key`, below the episode's group.
    """
    folder, _, name = (key or "").strip("/").rpartition("/")
    below = f"{folder}/" if folder else ""
    usual = (TASK_ATTRIBUTES, LATER_TASK_ATTRIBUTES, (ENVIRONMENT,))
    for names in [(name, f"/{name}")] if key else usual:
        for at in (at for at in groups_of(f"{group}{below}") if at in texts):
            by = next((n for n in names if n in texts[at]), None)
            if by and at.endswith(below):
                return texts[at][by], by
    return None


def hole(item: h5py.Dataset) -> range | None:
    """The first rows that were never written, though later ones were; HDF5 reads them as zeros."""
    if item.chunks is None:
        return None
    bands, *others = (-(-side // part) for side, part in zip(item.shape, item.chunks, strict=True))
    if item.id.get_num_chunks() == bands * math.prod(others):
        return None
    written: Counter[int] = Counter()
    item.id.chunk_iter(lambda chunk: written.update([chunk.chunk_offset[0] // item.chunks[0]]))
    missing = [band for band in range(max(written, default=0)) if written[band] < math.prod(others)]
    return range(missing[0] * item.chunks[0], (missing[0] + 1) * item.chunks[0]) if missing else None


def read_numbers(
    index: int, path: Path, group: str, steps: int, times: str | None, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | str:
    """State (L, P), action (L, A) and times (L,), if recorded, for L `steps`; or what is wrong."""

    try:
        with open_file(path) as file:
            for key in layout.arrays:
                if rows := hole(file[group + key]):
                    return f"steps {rows[0]} to {rows[-1]} of {key} were never written"
            state, action = layout.vectors(lambda key: file[group + key][:steps])
            return state, action, file[group + times][:steps] if times else None
    except Exception as error:  # see scan_file
        return f"its numbers cannot be read ({explained(error)})"


def explained(error: Exception) -> str:
    """An h5py error as text, with how to install a missing compression filter."""
    said = reason(error)
    return f"{said}; `pip install hdf5plugin` reads Blosc and others" if UNREGISTERED.search(said) else said


def read_frames(
    path: Path, key: str, steps: int, recorded: tuple[int, int], size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """The frames of a dataset, each (3, H, W) uint8 of `size`; raises whatever h5py raises."""

    with open_file(path) as file:
        item = file[key]
        encoded = _may_hold_encoded(item)
        for cell in rows_of(item, 0, steps):
            if encoded:
                yield image_frame(_encoded(cell), recorded, size)
            else:
                yield pixel_frame(exact_pixels(cell), recorded, size)
