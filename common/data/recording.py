"""Writing demonstrations as a LeRobot v3 dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Demonstration(NamedTuple):
    """One demonstrated episode of L steps."""

    state: np.ndarray
    """(L, P) float32."""
    action: np.ndarray
    """(L, A) float32."""
    images: Mapping[str, np.ndarray]
    """(L, H, W, 3) uint8, by camera."""
    task: str
    """The instruction."""


def write_dataset(
    root: Path,
    demonstrations: Iterable[Demonstration],
    *,
    fps: int,
    state_names: Iterable[str],
    action_names: Iterable[str],
    camera_info: Mapping[str, str] | None = None,
) -> Path:
    """Write at least one demonstration as a dataset at `root`, which must not exist yet.

    Frames are stored as PNG images: compressing small ones to video costs more time than it saves, and the
    pixels would differ from those that a policy sees in closed loop. `camera_info` is what info.json shall
    say about each camera.
    """
    import datasets

    logging.getLogger("lerobot").setLevel(logging.ERROR)  # it warns at length that it found no FFmpeg
    datasets.disable_progress_bars()
    from lerobot.datasets import LeRobotDataset

    def vector(names: Iterable[str]) -> dict:
        names = list(names)
        return {"dtype": "float32", "shape": (len(names),), "names": names}

    dataset = None
    for demonstration in demonstrations:
        keys = {camera: f"observation.images.{camera}" for camera in demonstration.images}
        if dataset is None:
            features = {"observation.state": vector(state_names), "action": vector(action_names)}
            for camera, frames in demonstration.images.items():
                axes = ["height", "width", "channels"]
                features[keys[camera]] = {"dtype": "image", "shape": frames.shape[1:], "names": axes}
                if camera_info:
                    features[keys[camera]]["info"] = dict(camera_info)
            name = f"local/{root.name}"
            dataset = LeRobotDataset.create(name, fps, features, root=root, use_videos=False)
        for step, (state, action) in enumerate(zip(demonstration.state, demonstration.action, strict=True)):
            frames = {keys[camera]: views[step] for camera, views in demonstration.images.items()}
            dataset.add_frame(
                {"observation.state": state, "action": action, "task": demonstration.task, **frames}
            )
        dataset.save_episode()
    dataset.finalize()
    return root
