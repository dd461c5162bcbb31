"""Which arrays of a dataset are the state, the action and the cameras: recognised, or given by flags."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.console import say
from common.data.cameras import (
    closest,
    distinct,
    last_part,
    named_cameras,
    select_cameras,
    short_name,
    target_size,
)
from common.data.frames import CHANNELS
from common.data.source import Camera, Info
from common.errors import UserError

if TYPE_CHECKING:
    from common.data import DataConfig

READ_BYTES = 2**24  # images are read in blocks of about this size
MOST_COMPRESSED = 2**18  # bytes of a compressed image, assumed to read a few at once
GROUPS = re.compile(r"^(observations?|obs|actions?)[/.]")  # prefixes left out of dimension names

FUTURE, OUTCOME, NO_COLOUR = "the future", "no observation", "no 8-bit colour image"
ROLES = {  # arrays left out by default: what a part of the key must match
    FUTURE: r"(next|future|goal|subgoal)s?(_.*)?|.*_next",
    OUTCOME: r"(rewards?|dones?|terminals?|terminat(ed|ions?)|truncat(ed|ions?)|timeouts?|success|fail|"
    r"discounts?|is_(first|last|terminal)|infos?|(env|sim)_states?|datagen_info|sensor_param)",
    NO_COLOUR: r".*(depth|dispari|segm|infra).*|(.*_)?(seg|mask|normal|semantic|instance|ir|flow)s?\d*(_.*)?",
    "times": r".*timestamps?",
}


class Array(NamedTuple):
    """An array with a row for every step: numbers, pixels, encoded (one JPEG or PNG a step), or other.

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
        """Numbers per step."""
        return math.prod(self.shape[1:])

    @property
    def channels(self) -> int:
        """Channels of an image; an encoded one always has three."""
        if self.kind == "encoded" or len(self.shape) != 4:
            return 3
        return self.shape[3] if self.shape[3] in CHANNELS else self.shape[1]


def describe(shape: Sequence[int], dtype: np.dtype, first: Callable[[], np.ndarray] | None = None) -> Array:
    """Describe an array from its shape and `first` row: pixels if rows are 8-bit (H, W, C) or (C, H, W).

    Wider numbers are pixels, too, if the first row holds only whole ones from 0 to 255.
    """
    shape = tuple(shape)
    array = Array("numbers" if dtype.kind in "fiub" and 1 <= len(shape) <= 4 else "other", shape, str(dtype))
    if len(shape) != 4 or 0 in shape[1:] or array.kind == "other":
        return array
    if (shape[1] in CHANNELS) == (shape[3] in CHANNELS):  # neither, or ambiguous
        return array
    if dtype != np.uint8:
        try:
            if exact_pixels(first()).max() == 0:  # a black image proves nothing
                return array
        except Exception:  # no image, or a damaged one: each library has its own errors
            return array
    return array._replace(kind="pixels", size=shape[1:3] if shape[3] in CHANNELS else shape[2:])


def exact_pixels(row: np.ndarray) -> np.ndarray:
    """An image (H, W, C) or (C, H, W) as uint8 (H, W, 3), without a fourth channel.

    Raises:
        ValueError: if its numbers are not 8-bit values.
    """
    pixels = row
    if row.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            pixels = row.astype(np.uint8)
        if not np.array_equal(pixels, row) or row.max() == 1:  # 1 may be white
            raise ValueError(f"its pixels, {row.dtype}, are not whole numbers from 0 to 255")
    if pixels.shape[2] not in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]


def role(key: str) -> str | None:
    """Why an array with that name is left out by default, if it is."""
    if re.match(r"states(/|$)", key):  # the simulator's, in robomimic's files
        return OUTCOME
    for reason, pattern in ROLES.items():
        if any(re.fullmatch(pattern, part.lower()) for part in re.split(r"[/.]", key)):
            return reason
    return None


def listing(arrays: Mapping[str, Array]) -> str:
    """The arrays as text for a message."""
    found = [f"{key} {'x'.join(map(str, array.shape))} {array.dtype}" for key, array in arrays.items()]
    return ", ".join(found[:40]) or "nothing"


class Known(NamedTuple):
    """A recognised layout: its name, and which arrays make up state and action."""

    name: str
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]


def numbered(key: str, width: int) -> list[str]:
    """Names of an array's dimensions."""
    return [key] if width == 1 else [f"{key}.{i}" for i in range(width)]


@dataclass(frozen=True)
class Layout:
    """The parts of a dataset that are used, small enough to send to other processes.

    Attributes:
        keys, names: arrays of `state` and `action`, in order, and the names of their dimensions.
        arrays: the used ones, as every episode should have them.
        size: (H, W) of the frames.
        unused: lines that say which arrays are not used, and why.
    """

    name: str
    keys: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, ...]]
    arrays: dict[str, Array]
    cameras: tuple[Camera, ...]
    size: tuple[int, int]
    color_order: str
    unused: tuple[str, ...] = ()

    def info(self, source: str, fingerprint: str, fps: float, **choices: Any) -> Info:
        """The dataset's description."""
        choices |= {"keys": self.keys, "color_order": self.color_order}
        state_names, action_names = self.names.values()
        return Info(source, fingerprint, self.cameras, self.size, fps, state_names, action_names, choices)

    def vectors(self, read: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """State and action, (L, P) and (L, A), from arrays (L, ...) that `read` returns by key."""

        def flat(key: str) -> np.ndarray:
            with np.errstate(over="ignore", invalid="ignore"):
                values = np.asarray(read(key)).astype(np.float32, copy=False)
            return values.reshape(len(values), -1)

        state, action = (np.concatenate([flat(k) for k in keys], axis=1) for keys in self.keys.values())
        return state, action

    def say(self, head: str) -> None:
        """Print which dimensions come from which array, and what is not used."""
        say(head)
        for part, keys in self.keys.items():
            edges = accumulate((self.arrays[key].width for key in keys), initial=0)
            for key, (first, last) in zip(keys, pairwise(edges), strict=True):
                say(f"  {part}[{first}:{last}]".ljust(18) + key)
        for key, short, (height, width) in self.cameras:
            array = self.arrays[key]
            kind = array.dtype + ", fourth channel not used" * (array.channels == 4)
            say(f"  {short} ".ljust(18) + f"{key}, {height}x{width}, {kind}")
        for line in self.unused:
            say("  not used".ljust(18) + line)


def choose_layout(
    arrays: Mapping[str, Array],
    known: Known | None,
    config: DataConfig,
    source: str,
    place: str,
    names_of: Callable[[str, int], Sequence[str]] = numbered,
) -> Layout:
    """Choose what to use: flags first, then the recognised layout.

    Args:
        place: the part of the source that `arrays` are from, for messages.
        names_of: returns the names of an array's dimensions for its key and width.
    """
    there = f"{place} has {listing(arrays)}."
    defaults = {"state": known and known.state_keys, "action": known and known.action_keys}
    keys: dict[str, tuple[str, ...]] = {}
    for part, default in defaults.items():
        keys[part] = tuple(key.strip("/") for key in getattr(config, f"{part}_keys")) or tuple(default or ())
        _check_keys(part, keys[part], arrays, source, there)
    beside = (*keys["state"], *(defaults["state"] or ()))
    cameras = choose_cameras(arrays, beside, config, source, there)
    chosen = (*keys["state"], *keys["action"], *(camera.key for camera in cameras))
    return Layout(
        name=known.name if known else "given",
        keys=keys,
        names={part: dimension_names(keys[part], arrays, names_of) for part in keys},
        arrays={key: arrays[key] for key in chosen},
        cameras=cameras,
        size=target_size(cameras, config.image_size),
        color_order=config.color_order,
        unused=tuple(not_used(arrays, chosen, keys["action"])),
    )


def choose_cameras(
    arrays: Mapping[str, Array], state_keys: Sequence[str], config: DataConfig, source: str, there: str
) -> tuple[Camera, ...]:
    """The cameras to use: by default the colour images next to the state if that is below obs/ or similar."""
    images = {key: array for key, array in arrays.items() if array.is_image}
    plain = [key for key, array in images.items() if not role(key) and array.channels > 1]
    groups = [group[0] for key in state_keys if (group := re.match(r"(observations?|obs)/", key))]
    plain = [key for key in plain if not groups or key.startswith(tuple(groups))]
    given = [key.strip("/") for key in config.camera_keys]
    keys = given or plain or (list(images) if config.cameras else [])
    _check_keys("camera", keys, arrays, source, there)
    for name in config.cameras:
        called = [key for key in arrays if name.strip("/") in (key, last_part(key), short_name(key))]
        if called and not any(key in images for key in called):
            what = f"{called[0]}, which is {NO_COLOUR} but {arrays[called[0]].dtype}"
            raise UserError(f"--cameras {name} names {what}: choose other cameras of {source}.")

    def named(keys: Sequence[str], earlier: Sequence[Camera] = ()) -> list[Camera]:
        sizes = {key: arrays[key].size for key in keys}
        return named_cameras(sizes, [key for key in keys if not role(key)], earlier)

    cameras = named(keys)
    others = [] if given else named([key for key in images if key not in keys], cameras)
    return select_cameras(cameras, config.cameras, source, others)


def _check_keys(part: str, keys: Sequence[str], arrays: Mapping[str, Array], source: str, there: str) -> None:
    """Refuse keys of the state, action or cameras that do not exist or hold something else."""
    flag = f"--{part}-keys"
    if not keys and part == "camera":
        rest = [key for key, array in arrays.items() if array.is_image and not role(key)]
        way = f" (--cameras {' '.join(rest)} takes the others)" if rest else ""
        raise UserError(f"{source} has no colour camera, but a policy needs one{way}: {there}")
    if not keys:
        unknown = f"The layout of {source} is unknown"
        raise UserError(f"{unknown}: say with {flag} which arrays to use; {there}")
    for key in keys:
        if key not in arrays:
            raise UserError(f"{source} has no {flag} {key}{closest(key, arrays)}: {there}")
        array = arrays[key]
        if array.is_image != (part == "camera") or array.kind == "other":
            what = "images of 8 bits a colour" if part == "camera" else "numbers"
            raise UserError(f"{flag} {key} holds no {what}: {there}")
        if array.width == 0 and not array.is_image:
            raise UserError(f"{flag} {key} has no numbers in a step: {there}")
    if len(set(keys)) < len(keys):
        raise UserError(f"{flag} {' '.join(keys)} names an array twice.")


def dimension_names(
    keys: Sequence[str], arrays: Mapping[str, Array], names_of: Callable[[str, int], Sequence[str]]
) -> tuple[str, ...]:
    """Unique names for the dimensions of these arrays."""
    candidates = []
    for key in keys:
        for i, name in enumerate(names_of(key, arrays[key].width)):
            candidates.append([name, f"{GROUPS.sub('', key)}.{name}", f"{key}.{name}", f"{key}[{i}]"])
    return tuple(distinct(candidates))


def not_used(arrays: Mapping[str, Array], used: Sequence[str], action: Sequence[str]) -> Iterator[str]:
    """Lines about the arrays that are not `used`, grouped by reason."""
    reasons: dict[str, dict[str, None]] = {}
    for key in [key for key in arrays if key not in used]:
        array, reason, name = arrays[key], role(key), f"{key} ({arrays[key].width})"
        if reason:  # name a group once, not each array in it
            parts = re.split(r"([/.])", key)
            last = next(i for i in range(0, len(parts), 2) if role(parts[i]) == reason)
            name = "".join(parts[: last + 2]) + "*" * (last + 1 < len(parts))
        elif array.is_image and array.channels > 1:
            reason, name = "cameras that are not chosen, or outside the observations", key
        elif array.size or _is_picture(array):
            reason, name = NO_COLOUR, f"{key} ({'grey' if array.is_image else array.dtype})"
        elif array.kind == "other":
            reason, name = "neither numbers nor images of a known kind", f"{key} ({array.dtype})"
        elif abs(array.shape[0] - arrays[action[0]].shape[0]) > 1:
            reason = "not one row a step"
        elif re.search(r"(^|[/._])actions?($|[/._])", key):
            reason = "take it with --action-keys"
        else:
            reason = "take it with --state-keys"
        reasons.setdefault(reason, {})[name] = None
    for reason, names in reasons.items():
        yield f"{', '.join(names)}: {reason}"


def _is_picture(array: Array) -> bool:
    """Whether an array of numbers is probably pictures, which cannot be used as cameras."""
    return len(array.shape) > 2 and (array.dtype == "uint8" or sorted(array.shape[1:])[-2] >= 8)


def rows_of(array: Any, first: int, last: int) -> Iterator[Any]:
    """Rows `first:last` of an HDF5 or zarr array, in blocks of whole chunks, so that none is read twice."""
    chunk = array.chunks or (1, *array.shape[1:])
    # Of compressed images, only pointers have a known size.
    row = MOST_COMPRESSED if array.dtype.kind == "O" else array.dtype.itemsize
    step = chunk[0] * max(1, READ_BYTES // max(1, row * math.prod(chunk)))
    while first < last:
        end = min(last, first - first % step + step)
        yield from array[first:end]
        first = end
