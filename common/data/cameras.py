"""Cameras of a dataset: their names, which to use, and the size of the stored frames."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

from common.console import say
from common.data.source import Camera
from common.errors import UserError

USUAL_CAMERAS = ("head", "left", "right")
PIXELS = ("rgb", "color", "colour", "image", "images", "data")  # last parts of keys such as `<camera>/rgb`


def distinct[T: Hashable](candidates: Sequence[Sequence[T]], taken: Collection[T] = ()) -> list[T]:
    """A name for each thing: the first of its candidates that is unique and not `taken`.

    All that share a name move on to their next one, so order does not matter. Raises a UserError if none is
    left.
    """
    place = [0] * len(candidates)
    while True:
        names = [own[i] for own, i in zip(candidates, place, strict=True)]
        owners = Counter([*names, *taken])
        shared = [n for n, name in enumerate(names) if owners[name] > 1]
        if not shared:
            return names
        if all(place[n] == len(candidates[n]) - 1 for n in shared):
            raise UserError(f"Two things would both be called {names[shared[0]]}: rename one of them.")
        for n in shared:
            place[n] = min(place[n] + 1, len(candidates[n]) - 1)


def short_name(key: str) -> str:
    """`observation.images.cam_high`, `observations/images/cam_high` and `obs/high_image` are all `high`;
    `sensor_data/base_camera/rgb` is `base_camera`.

    Short names are names of network components: letters, digits and underscores.
    """
    parts = key.split("/")
    name = parts[-2] if len(parts) > 1 and parts[-1].lower() in PIXELS else parts[-1]
    name = name.removeprefix("observation.").removeprefix("images.").removeprefix("image.")
    name = _full_name(name)
    return name.removeprefix("cam_").removesuffix("_image").removesuffix("_rgb") or name


def last_part(key: str) -> str:
    return re.split(r"[/.]", key)[-1]


def _full_name(key: str) -> str:
    return re.sub(r"\W", "_", key)


def known_name(key: str, known: Collection[str]) -> str:
    """A camera's name among the `known` ones, from its key, short name or full name."""
    return next((name for name in (key, _full_name(key)) if name in known), short_name(key))


def named_cameras(
    sizes: Mapping[str, Sequence[int]], plain: Collection[str], earlier: Sequence[Camera] = ()
) -> list[Camera]:
    """Cameras from (H, W) by key, each with a unique name, also if case is ignored.

    Args:
        plain: keys that may get short names; others get their full ones.
        earlier: cameras whose names are already taken.
    """
    candidates = []
    for key in sizes:
        full = _full_name(key)
        hashed = f"{full}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        short = short_name(key)
        candidates.append([short, full, hashed] if key in plain else [full, hashed][full == short :])
    lower = [[name.casefold() for name in own] for own in candidates]
    chosen = distinct(lower, [camera.short.casefold() for camera in earlier])
    return [
        Camera(key, own[folded.index(name)], (height, width))
        for (key, (height, width)), own, folded, name in zip(
            sizes.items(), candidates, lower, chosen, strict=True
        )
    ]


def select_cameras(
    cameras: Sequence[Camera], wanted: Sequence[str], source: str, others: Sequence[Camera] = ()
) -> tuple[Camera, ...]:
    """The chosen cameras in order; by default head, left, right, or else all; prints which.

    Args:
        others: cameras that are used only if named.
    """
    there = ", ".join(camera.short for camera in cameras) or "none"
    if wanted:
        chosen = tuple(find_camera(name.strip("/"), cameras, others, source) for name in wanted)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--cameras {' '.join(wanted)} names a camera twice.")
        return chosen
    by_name = {camera.short: camera for camera in cameras}
    usual = set(USUAL_CAMERAS) <= by_name.keys()
    chosen = tuple(by_name[name] for name in USUAL_CAMERAS) if usual else tuple(cameras)
    if len(chosen) < len(cameras) or not usual:
        names, share = " ".join(camera.short for camera in chosen), f"{len(chosen)} of {len(cameras)}"
        share = "all" if len(chosen) == len(cameras) else f"{share}: {there}"
        say(f"cameras: {names} ({share} in {source}; choose others with --cameras)")
    return chosen


def find_camera(name: str, cameras: Sequence[Camera], others: Sequence[Camera], source: str) -> Camera:
    """The camera with that full or short name."""
    everywhere = [*cameras, *others]
    found = [camera for camera in everywhere if name == camera.key]
    found = found or [camera for camera in everywhere if name == camera.short]
    for group in (cameras, others):
        found = found or [camera for camera in group if name == last_part(camera.key)]
        found = found or [camera for camera in group if name == short_name(camera.key)]
    if len(found) > 1:
        keys = " and ".join(camera.key for camera in found)
        raise UserError(f"--cameras {name} could be {keys} of {source}: give the full name.")
    if not found:
        names = [name for camera in everywhere for name in (camera.short, camera.key)]
        there = ", ".join(camera.short for camera in cameras) or "none"
        raise UserError(f"{source} has no camera {name}{closest(name, names)}: it has {there}.")
    return found[0]


def target_size(cameras: Sequence[Camera], image_size: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the stored frames: as recorded, one number for a square, or height and width."""
    if image_size:
        return image_size[0], image_size[-1]
    if len({camera.size for camera in cameras}) > 1:
        sizes = ", ".join(f"{c.short} {c.size[0]}x{c.size[1]}" for c in cameras)
        raise UserError(f"The cameras have different sizes ({sizes}): choose a common one with --image-size.")
    return cameras[0].size


def closest(wanted: str, present: Iterable[str]) -> str:
    """A suggestion in place of a name that does not exist, or an empty text."""
    match = difflib.get_close_matches(wanted, list(present), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
