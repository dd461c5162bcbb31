"""Cameras of a dataset: their names, which of them to use, and the size of what is stored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from common.data.ingest import report
from common.errors import UserError

USUAL_CAMERAS = ("head", "left", "right")
MAX_IMAGE_SIDE = 4096


class Camera(NamedTuple):
    """A camera of the dataset: its name there, a short name, (H, W) as recorded, and how it is stored."""

    key: str
    short: str
    size: tuple[int, int]
    is_video: bool = False


def short_name(key: str) -> str:
    """`observation.images.cam_high`, `observations/images/cam_high` and `obs/high_image` are all `high`.

    Short names are file names and names of network components: letters, digits and underscores.
    """
    name = key.rpartition("/")[2].removeprefix("observation.").removeprefix("images.").removeprefix("image.")
    name = re.sub(r"\W", "_", name)
    return name.removeprefix("cam_").removesuffix("_image").removesuffix("_rgb") or name


def with_short_names(cameras: Iterable[Camera]) -> list[Camera]:
    """The cameras under their short names, or, where two would share one, under their full ones."""
    cameras = [camera._replace(short=short_name(camera.key)) for camera in cameras]
    shorts = [camera.short for camera in cameras]
    return [c._replace(short=re.sub(r"\W", "_", c.key)) if shorts.count(c.short) > 1 else c for c in cameras]


def select_cameras(
    cameras: Sequence[Camera], wanted: Sequence[str], source: str, quiet: bool = False
) -> tuple[Camera, ...]:
    """The chosen cameras in their order; by default head, left, right, or else all, and said so."""
    by_name = {camera.short: camera for camera in cameras} | {camera.key: camera for camera in cameras}
    there = ", ".join(camera.short for camera in cameras) or "none"
    if not cameras:
        raise UserError(f"{source} has no colour camera: a policy here needs at least one.")
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
    if not quiet and (len(chosen) < len(cameras) or not usual):
        names, share = " ".join(camera.short for camera in chosen), f"{len(chosen)} of {len(cameras)}"
        share = "all" if len(chosen) == len(cameras) else share
        report(f"cameras: {names} ({share} in {source}; choose others with --cameras)")
    return chosen


def target_size(cameras: Sequence[Camera], image_size: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the stored frames: as recorded, one number for a square, or height and width."""
    given = " ".join(map(str, image_size))
    if len(image_size) > 2 or not all(0 < side <= MAX_IMAGE_SIDE for side in image_size):
        raise UserError(
            f"--image-size {given} is no size: give one side, or height and width, of 1 to {MAX_IMAGE_SIDE}."
        )
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
