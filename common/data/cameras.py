"""Cameras of a dataset: their names, which of them to use, and the size of what is stored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from common.console import say
from common.data.source import Camera
from common.errors import UserError

USUAL_CAMERAS = ("head", "left", "right")


def short_name(key: str) -> str:
    """`observation.images.cam_high`, `observations/images/cam_high` and `obs/high_image` are all `high`.

    Short names are file names and names of network components: letters, digits and underscores.
    """
    name = key.rpartition("/")[2].removeprefix("observation.").removeprefix("images.").removeprefix("image.")
    name = re.sub(r"\W", "_", name)
    return name.removeprefix("cam_").removesuffix("_image").removesuffix("_rgb") or name


def named_cameras(sizes: Mapping[str, Sequence[int]]) -> list[Camera]:
    """Cameras from (H, W) by key, under their short names, or, where two would share one, their full ones."""
    shorts = [short_name(key) for key in sizes]
    return [
        Camera(key, short if shorts.count(short) == 1 else re.sub(r"\W", "_", key), (height, width))
        for short, (key, (height, width)) in zip(shorts, sizes.items(), strict=True)
    ]


def select_cameras(cameras: Sequence[Camera], wanted: Sequence[str], source: str) -> tuple[Camera, ...]:
    """The chosen cameras in their order; by default head, left, right, or else all, and said so."""
    by_name = {camera.short: camera for camera in cameras} | {camera.key: camera for camera in cameras}
    there = ", ".join(camera.short for camera in cameras)
    if wanted:
        for name in wanted:
            if name not in by_name:
                raise UserError(f"{source} has no camera {name}{closest(name, by_name)}: it has {there}.")
        chosen = tuple(by_name[name] for name in wanted)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--cameras {' '.join(wanted)} names a camera twice.")
        return chosen
    usual = set(USUAL_CAMERAS) <= by_name.keys()
    chosen = tuple(by_name[name] for name in USUAL_CAMERAS) if usual else tuple(cameras)
    if len(chosen) < len(cameras) or not usual:
        names, share = " ".join(camera.short for camera in chosen), f"{len(chosen)} of {len(cameras)}"
        share = "all" if len(chosen) == len(cameras) else share
        say(f"cameras: {names} ({share} in {source}; choose others with --cameras)")
    return chosen


def target_size(cameras: Sequence[Camera], image_size: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the stored frames: as recorded, one number for a square, or height and width."""
    if image_size:
        return image_size[0], image_size[-1]
    if len({camera.size for camera in cameras}) > 1:
        sizes = ", ".join(f"{c.short} {c.size[0]}x{c.size[1]}" for c in cameras)
        raise UserError(f"The cameras have different sizes ({sizes}): choose a common one with --image-size.")
    return cameras[0].size


def closest(wanted: str, present: Iterable[str]) -> str:
    """A suggestion for a name that does not exist, or nothing."""
    match = difflib.get_close_matches(wanted, list(present), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
