"""Tiny HDF5 datasets whose frames encode their step, in every supported layout."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from lerobot_factory import action_of, draw, state_of
from PIL import Image

LAYOUTS = ("aloha", "grouped", "robomimic")


def encode(picture: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, **({"quality": 95} if format == "JPEG" else {}))
    return file.getvalue()


def write_images(
    group: h5py.Group,
    key: str,
    pictures: Sequence[np.ndarray],
    kind: Literal["array", "gzip", "channels first", "padded", "variable", "bytes"] = "array",
    format: str = "PNG",
) -> None:
    """Store (H, W, 3) pictures as one of the kinds of image dataset that are in use."""
    stack = np.stack(pictures)
    if kind == "array":
        group[key] = stack
    elif kind == "gzip":
        group.create_dataset(key, data=stack, chunks=(2, *stack.shape[1:]), compression="gzip")
    elif kind == "channels first":
        group[key] = stack.transpose(0, 3, 1, 2)
    else:
        files = [encode(picture, format) for picture in pictures]
        if kind == "padded":
            width = max(map(len, files)) + 5
            group[key] = np.stack([np.frombuffer(file.ljust(width, b"\0"), np.uint8) for file in files])
        elif kind == "bytes":
            group[key] = np.array(files)
        else:
            item = group.create_dataset(key, (len(files),), h5py.vlen_dtype(np.uint8))
            for i, file in enumerate(files):
                item[i] = np.frombuffer(file, np.uint8)


def write_episode(
    group: h5py.Group,
    layout: str,
    steps: np.ndarray,
    cameras: Mapping[str, tuple[int, int]],
    dims: tuple[int, int] = (3, 3),
    images: str = "array",
    dtype: type = np.float64,
) -> None:
    """Write the steps of one episode; step i of a dataset is drawn as number i in every camera."""
    state, action = state_of(steps, dims[0]).astype(dtype), action_of(steps, dims[1]).astype(dtype)
    if layout == "aloha":
        group["observations/qpos"], group["action"], place = state, action, "observations/images/cam_"
    elif layout == "grouped":  # joints of two arms and a hand, dims divided among them
        for part, vector in (("observation", state), ("action", action)):
            group[f"{part}/joint_pos/left"] = vector[:, :1]
            group[f"{part}/joint_pos/right"] = vector[:, 1:2]
            group[f"{part}/hand_joint_pos/left"] = vector[:, 2:]
        group["observation/force"], place = np.zeros((len(steps), 2)), "observation/images/"
    else:
        group["obs/robot0_eef_pos"], group["actions"], place = state, action, "obs/"
    for number, (name, size) in enumerate(cameras.items()):
        key = place + name + ("_image" if layout == "robomimic" else "")
        write_images(group, key, [draw(int(step), number, size) for step in steps], images)


def make_hdf5(
    root: Path,
    lengths: Sequence[int] = (12, 9, 15),
    cameras: Mapping[str, tuple[int, int]] | Sequence[str] = ("high",),
    layout: str = "aloha",
    *,
    fps: float | None = 10.0,
    **options,
) -> Path:
    """Write a dataset as `make_dataset` does: the same numbers, the same pictures.

    Args:
        root: folder to create.
        options: see `write_episode`.
    """
    sizes = dict(cameras) if isinstance(cameras, Mapping) else dict.fromkeys(cameras, (32, 48))
    root.mkdir(parents=True)
    starts = np.cumsum([0, *lengths])
    for episode, (first, last) in enumerate(pairwise(starts)):
        name = "demos.hdf5" if layout == "robomimic" else f"day_{episode % 2}/episode_{episode}.hdf5"
        (root / name).parent.mkdir(exist_ok=True)
        with h5py.File(root / name, "a") as file:
            if fps is not None:
                file.attrs["fps"] = fps
            group = file.create_group(f"data/demo_{episode}") if layout == "robomimic" else file
            write_episode(group, layout, np.arange(first, last), sizes, **options)
    return root
