"""Formats that leave the layout to the recorder: which arrays are the state, the action and the cameras."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.console import say
from common.data.cameras import closest, named_cameras, select_cameras, target_size
from common.data.frames import CHANNELS
from common.data.source import Camera, Info
from common.errors import UserError

if TYPE_CHECKING:
    from common.data import DataConfig

READ_BYTES = 2**24  # images are read in blocks of about this size


class Array(NamedTuple):
    """An array that has a row for every step.

    Attributes:
        kind: numbers, pixels, encoded (one JPEG or PNG a step), or other.
        shape: (L, ...).
        dtype: its name.
        size: (H, W) of images.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    size: tuple[int, ...] = ()

    @property
    def is_image(self) -> bool:
        return self.kind in ("pixels", "encoded")

    @property
    def width(self) -> int:
        """Numbers a step."""
        return math.prod(self.shape[1:])


def describe(shape: Sequence[int], dtype: np.dtype) -> Array:
    """An array of that shape: pixels if it is uint8 (L, H, W, C) or (L, C, H, W), numbers if it can be."""
    shape = tuple(shape)
    if len(shape) == 4 and dtype == np.uint8 and {shape[1], shape[3]} & set(CHANNELS) and 0 not in shape[1:]:
        return Array("pixels", shape, str(dtype), shape[1:3] if shape[3] in CHANNELS else shape[2:])
    return Array("numbers" if dtype.kind in "fiub" and 1 <= len(shape) <= 4 else "other", shape, str(dtype))


def listing(arrays: Mapping[str, Array]) -> str:
    """What there is, for a message."""
    found = [f"{key} {'x'.join(map(str, array.shape))} {array.dtype}" for key, array in arrays.items()]
    return ", ".join(found[:40]) or "nothing"


class Known(NamedTuple):
    """A layout that is recognised: its name, and which arrays make up state and action."""

    name: str
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]


def numbered(key: str, width: int) -> list[str]:
    """Names of an array's dimensions."""
    return [key] if width == 1 else [f"{key}.{i}" for i in range(width)]


@dataclass(frozen=True)
class Layout:
    """What is used of a dataset, small enough to be sent to other processes.

    Attributes:
        name: of the layout.
        keys: of `state` and `action`, which arrays, one after the other.
        names: likewise, of their dimensions.
        arrays: those that are used, as an episode should have them.
        cameras: those to read.
        size: (H, W) of the frames.
    """

    name: str
    keys: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, ...]]
    arrays: dict[str, Array]
    cameras: tuple[Camera, ...]
    size: tuple[int, int]

    def info(self, source: str, fingerprint: str, fps: float, color_order: str, what: str) -> Info:
        """What the dataset is; also prints which dimension is which array, below a line that says `what`."""
        say(f"{source}: {what}, {fps:g} Hz")
        for part, keys in self.keys.items():
            first = 0
            for key in keys:
                last = first + self.arrays[key].width
                say(f"  {part}[{first}:{last}]".ljust(18) + key)
                first = last
        for key, short, (height, width) in self.cameras:
            array = self.arrays[key]
            kind = "JPEG or PNG" if array.kind == "encoded" else array.dtype
            say(f"  {short}".ljust(18) + f"{key}, {height}x{width}, {kind}")
        chosen = {f"{part}_keys": keys for part, keys in self.keys.items()} | {"color_order": color_order}
        names, size = self.names, self.size
        return Info(source, fingerprint, self.cameras, size, fps, names["state"], names["action"], chosen)


def choose_layout(
    arrays: Mapping[str, Array],
    known: Known | None,
    config: DataConfig,
    source: str,
    place: str,
    names: Callable[[str, int], Sequence[str]] = numbered,
) -> Layout:
    """What to use: flags before what is recognised.

    Args:
        place: which part of the source `arrays` are of, for messages.
        names: gives those of an array's dimensions from its key and width.

    Raises:
        UserError: if it is neither recognised nor given, or a key does not exist; lists those that do.
    """
    images = tuple(key for key, array in arrays.items() if array.is_image)
    keys = {}
    for part, default in (
        ("state", known and known.state_keys),
        ("action", known and known.action_keys),
        ("camera", images),
    ):
        flag, is_image = f"--{part}-keys", part == "camera"
        keys[part] = tuple(key.strip("/") for key in getattr(config, f"{part}_keys")) or default
        if not keys[part]:
            raise UserError(
                f"The layout of {source} is not one of those known: say with {flag} which arrays to use; "
                f"{place} has {listing(arrays)}."
            )
        for key in keys[part]:
            if key not in arrays:
                raise UserError(
                    f"{flag} {key} is not there{closest(key, arrays)}: {place} has {listing(arrays)}."
                )
            if arrays[key].is_image != is_image or arrays[key].kind == "other":
                what = "images" if is_image else "numbers"
                raise UserError(f"{flag} {key} holds no {what}: {place} has {listing(arrays)}.")
    cameras = named_cameras({key: arrays[key].size for key in keys.pop("camera")})
    cameras = select_cameras(cameras, config.cameras, source)
    used = [*keys["state"], *keys["action"], *(camera.key for camera in cameras)]
    return Layout(
        known.name if known else "given",
        keys,
        {part: tuple(n for key in keys[part] for n in names(key, arrays[key].width)) for part in keys},
        {key: arrays[key] for key in used},
        cameras,
        target_size(cameras, config.image_size),
    )


def rows_of(array: Any, first: int, last: int) -> Iterator[Any]:
    """Rows of an HDF5 or zarr array, read in blocks of whole chunks: none is decompressed twice.

    Args:
        first, last: as in a slice.
    """
    chunk = array.chunks or (1, *array.shape[1:])
    size = max(1, array.dtype.itemsize * math.prod(chunk))  # bytes
    step = chunk[0] * max(1, READ_BYTES // size)
    while first < last:
        end = min(last, first - first % step + step)
        yield from array[first:end]
        first = end
