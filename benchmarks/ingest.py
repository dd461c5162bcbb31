"""Camera frames per second of an ingest, beside bare PyAV decoding and resizing the same videos.

    python benchmarks/ingest.py                       # records two episodes at 480x640 first
    python benchmarks/ingest.py --dataset FOLDER      # any LeRobot v3 dataset with video cameras

Both run in turns in one process with one decoding thread, so that frames per second are per core; seconds of
processor time are counted, too, for a machine that does other things meanwhile. A last line has all cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loader import record
from common.data import DataConfig, open_dataset
from common.data.ingest import FRAMES_PER_WORKER, cores


@dataclass(frozen=True)
class Options:
    """Compare an ingest with bare decoding."""

    dataset: Path | None = None
    """LeRobot v3 dataset; without one, a dataset is recorded for the occasion."""
    image_size: tuple[int, ...] = (224,)
    """Size to store, as in the training scripts."""
    steps: int = 600
    """Steps to record, of two cameras at 480x640, in two episodes."""
    rounds: int = 5
    """Measurements of each; the best is printed."""


def bare(root: Path, keys: tuple[str, ...], size: tuple[int, int]) -> int:
    """Decode and resize every frame of these cameras, keep nothing; the number of frames."""
    import av

    count = 0
    for path in sorted(path for key in keys for path in (root / "videos" / key).glob("**/*.mp4")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            for frame in container.decode(stream):
                frame.to_ndarray(format="rgb24", height=size[0], width=size[1])
                count += 1
    return count


def measure(work: Callable[[], int]) -> tuple[float, float]:
    """Frames per second of wall-clock time and per second of this process's processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    count = work()
    return count / (time.perf_counter() - wall), count / (time.process_time() - processor)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cameras = ("observation.images.cam_head", "observation.images.cam_left")
        root = options.dataset or record(Path(folder) / "dataset", cameras, 480, 640, options.steps)
        config = DataConfig((str(root),), image_size=options.image_size, ingest_workers=1)
        runs = 0

        def ingest(config: DataConfig = config) -> int:
            nonlocal runs
            runs += 1
            store = open_dataset(replace(config, cache_dir=Path(folder) / f"cache{runs}"))
            return store.num_steps * len(store.cameras)

        first = open_dataset(replace(config, cache_dir=Path(folder) / "cache"))
        bare(root, first.camera_keys, first.image_size)  # the videos are in memory from here on
        results = {"bare PyAV": [], "ingest": []}
        for _ in range(options.rounds):
            results["bare PyAV"].append(measure(lambda: bare(root, first.camera_keys, first.image_size)))
            results["ingest"].append(measure(ingest))
        best = {name: tuple(map(max, zip(*rates, strict=True))) for name, rates in results.items()}
        print(f"{'one core':12}{'frames/s':>10}{'frames/s of processor time':>30}")
        for name, (wall, processor) in best.items():
            print(f"{name:12}{wall:10.0f}{processor:30.0f}")
        shares = [mine / theirs for mine, theirs in zip(best["ingest"], best["bare PyAV"], strict=True)]
        print(f"{'ratio':12}{shares[0]:10.0%}{shares[1]:30.0%}")
        frames = first.num_steps * len(first.cameras)
        workers = max(1, min(cores(), frames // FRAMES_PER_WORKER))
        wall, _ = measure(lambda: ingest(replace(config, ingest_workers=None)))
        print(f"default ({workers} of {cores()} cores, with the start of workers): {wall:.0f} frames/s")


if __name__ == "__main__":
    main(tyro.cli(Options))
