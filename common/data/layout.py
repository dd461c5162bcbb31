"""Which arrays of a dataset are the state, the action and the cameras: recognised, or given by flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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
    """An array that has a row for every step: numbers, pixels, encoded (one JPEG or PNG a step), or other.

    `shape` is (L, ...), and `size` (H, W) of images.
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
        keys, names: of `state` and `action`, the arrays, one after the other, and the dimensions' names.
        arrays: those that are used, as an episode should have them.
        size: (H, W) of the frames.
    """

    name: str
    keys: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, ...]]
    arrays: dict[str, Array]
    cameras: tuple[Camera, ...]
    size: tuple[int, int]
    color_order: str

    def info(self, source: str, fingerprint: str, fps: float, **choices: Any) -> Info:
        """What the dataset is."""
        choices |= {"keys": self.keys, "color_order": self.color_order}
        state_names, action_names = self.names.values()
        return Info(source, fingerprint, self.cameras, self.size, fps, state_names, action_names, choices)

    def vectors(self, read: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """State and action, (L, P) and (L, A), of arrays (L, ...) that `read` gives by key."""

        def flat(key: str) -> np.ndarray:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.asarray(read(key)).astype(np.float32, copy=False)
            return values.reshape(len(values), -1)

        state, action = (np.concatenate([flat(k) for k in keys], axis=1) for keys in self.keys.values())
        return state, action

    def say(self, head: str) -> None:
        """Print which dimension is which array."""
        say(head)
        for part, keys in self.keys.items():
            edges = accumulate((self.arrays[key].width for key in keys), initial=0)
            for key, (first, last) in zip(keys, pairwise(edges), strict=True):
                say(f"  {part}[{first}:{last}]".ljust(18) + key)
        for key, short, (height, width) in self.cameras:
            array = self.arrays[key]
            kind = "JPEG or PNG" if array.kind == "encoded" else array.dtype
            say(f"  {short}".ljust(18) + f"{key}, {height}x{width}, {kind}")


def choose_layout(
    arrays: Mapping[str, Array],
    known: Known | None,
    config: DataConfig,
    source: str,
    place: str,
    names_of: Callable[[str, int], Sequence[str]] = numbered,
) -> Layout:
    """What to use: flags before what is recognised.

    Args:
        place: which part of the source `arrays` are of, for messages.
        names_of: gives the names of an array's dimensions from its key and width.
    """
    there = f"{place} has {listing(arrays)}."
    keys: dict[str, tuple[str, ...]] = {}
    for part, default in (
        ("state", known and known.state_keys),
        ("action", known and known.action_keys),
        ("camera", [key for key, array in arrays.items() if array.is_image]),
    ):
        flag, is_image = f"--{part}-keys", part == "camera"
        keys[part] = tuple(key.strip("/") for key in getattr(config, f"{part}_keys") or default or ())
        if not keys[part] and is_image:
            raise UserError(f"{source} has no colour camera, and a policy here needs one: {there}")
        if not keys[part]:
            unknown = f"The layout of {source} is not one of those known"
            raise UserError(f"{unknown}: say with {flag} which arrays to use; {there}")
        for key in keys[part]:
            if key not in arrays:
                raise UserError(f"{source} has no {flag} {key}{closest(key, arrays)}: {there}")
            if arrays[key].is_image != is_image or arrays[key].kind == "other":
                what = "images" if is_image else "numbers"
                raise UserError(f"{flag} {key} holds no {what}: {there}")
    cameras = named_cameras({key: arrays[key].size for key in keys.pop("camera")})
    cameras = select_cameras(cameras, config.cameras, source)
    names: dict[str, list[str]] = {"state": [], "action": []}
    for part, found in names.items():
        for key in keys[part]:
            own = names_of(key, arrays[key].width)
            found += [f"{key}.{name}" if name in found else name for name in own]
    return Layout(
        name=known.name if known else "given",
        keys=keys,
        names={part: tuple(found) for part, found in names.items()},
        arrays={key: arrays[key] for key in (*keys["state"], *keys["action"], *(c.key for c in cameras))},
        cameras=cameras,
        size=target_size(cameras, config.image_size),
        color_order=config.color_order,
    )


def rows_of(array: Any, first: int, last: int) -> Iterator[Any]:
    """Rows `first:last` of an HDF5 or zarr array, in blocks of whole chunks: none is decompressed twice."""
    chunk = array.chunks or (1, *array.shape[1:])
    size = max(1, array.dtype.itemsize * math.prod(chunk))  # bytes
    step = chunk[0] * max(1, READ_BYTES // size)
    while first < last:
        end = min(last, first - first % step + step)
        yield from array[first:end]
        first = end
