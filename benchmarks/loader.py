"""Samples per second from an episode store, beside `LeRobotDataset` with a DataLoader on the same data.

    python benchmarks/loader.py                       # records 3 cameras at 224x224 first
    python benchmarks/loader.py --dataset FOLDER      # any LeRobot v3 dataset

The store is warm (its pages are in memory). `memcpy` is one thread copying as many bytes out of an equally
large array into a buffer that is used again: the most that a gather could reach.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import ChunkDataset, DataConfig, make_loader, open_dataset

CAMERAS = ("observation.images.cam_head", "observation.images.cam_left", "observation.images.cam_right")


@dataclass(frozen=True)
class Options:
    """Compare ways to load training samples."""

    dataset: Path | None = None
    """LeRobot v3 dataset; without one, a dataset is recorded for the occasion."""
    size: int = 224
    """Side of the recorded images, in pixels."""
    steps: int = 600
    """Steps to record, in two episodes."""
    batch_size: int = 32
    horizon: int = 40
    seconds: float = 3.0
    """How long to measure each way, at least."""
    rounds: int = 5
    """Measurements of each way; the best and the median are printed."""


def record(
    root: Path, cameras: tuple[str, ...], height: int, width: int, steps: int, episodes: int = 2
) -> Path:
    """Write a dataset of soft moving shapes with LeRobot's own writer and default video encoder."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from PIL import Image

    names = [f"joint_{i}" for i in range(14)]
    vectors = {
        key: {"dtype": "float32", "shape": (14,), "names": names} for key in ("observation.state", "action")
    }
    images = {
        key: {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
        for key in cameras
    }
    dataset = LeRobotDataset.create("bench/mark", 30, features={**vectors, **images}, root=root)
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    scene = np.asarray(shapes.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))  # to move over
    for _ in range(episodes):
        for step in range(steps // episodes):
            frame = {"observation.state": rng.normal(size=14).astype(np.float32), "task": "measure"}
            frame["action"] = frame["observation.state"]
            for number, key in enumerate(cameras):
                y, x = step * (1 + number) // 2 % height, step % width
                frame[key] = scene[y : y + height, x : x + width].copy()
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root


def rate(draw: Callable[[], int], seconds: float) -> float:
    """Samples per second of repeated `draw()`, which says how many it drew."""
    draw()
    begin, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        count += draw()
    return count / elapsed


def memcpy(row_bytes: int, batch_size: int, rows: int) -> Callable[[], int]:
    """Copies a batch worth of bytes a call, from ever other places of an array of the store's size."""
    source = np.ones((max(rows, 2 * batch_size), row_bytes), np.uint8)
    target, place = np.empty((batch_size, row_bytes), np.uint8), 0

    def draw() -> int:
        nonlocal place
        np.copyto(target, source[place : place + batch_size])
        place = (place + batch_size) % (len(source) - batch_size)
        return batch_size

    return draw


def lerobot_loader(root: Path, horizon: int, batch_size: int, workers: int) -> Callable[[], int]:
    """Batches of chunks through LeRobot's own dataset, decoded with PyAV."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    fps = LeRobotDataset("bench/mark", root=root).fps
    chunk = {"action": [step / fps for step in range(horizon)]}
    dataset = LeRobotDataset("bench/mark", root=root, delta_timestamps=chunk, video_backend="pyav")
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True
    )

    def forever():
        while True:
            yield from loader

    batches = forever()
    return lambda: len(next(batches)["action"])


def main(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.dataset or record(
            Path(folder) / "dataset", CAMERAS, options.size, options.size, options.steps
        )
        store = open_dataset(DataConfig((str(root),), cache_dir=Path(folder) / "cache"))
        dataset = ChunkDataset(store, range(store.num_episodes), options.horizon)
        store.images(np.arange(store.num_steps))  # every page in memory
        row_bytes = int(np.prod(store.row_shape))
        size = "x".join(map(str, store.image_size))
        print(
            f"{store.num_steps} steps, {len(store.cameras)} cameras at {size}, batch {options.batch_size}, "
            f"chunk {options.horizon}: {row_bytes * options.batch_size / 1e6:.1f} MB of pixels a batch"
        )

        def gather(workers: int) -> Callable[[], int]:
            batches = iter(make_loader(dataset, options.batch_size, seed=0, num_workers=workers))
            return lambda: len(next(batches).index)

        ways = {
            "memcpy": memcpy(row_bytes, options.batch_size, store.num_steps),
            "episode store": gather(0),
            "episode store, 2 workers": gather(2),
            "LeRobotDataset": lerobot_loader(root, options.horizon, options.batch_size, 0),
            "LeRobotDataset, 2 workers": lerobot_loader(root, options.horizon, options.batch_size, 2),
        }
        limit = None
        print(f"{'':28}{'samples/s':>10}{'median':>10}{'GB/s':>8}{'of memcpy':>11}")
        for name, draw in ways.items():
            rates = [rate(draw, options.seconds / options.rounds) for _ in range(options.rounds)]
            best, median = max(rates), statistics.median(rates)
            limit = limit or median
            print(f"{name:28}{best:10.0f}{median:10.0f}{median * row_bytes / 1e9:8.2f}{median / limit:11.1%}")


if __name__ == "__main__":
    main(tyro.cli(Options))
