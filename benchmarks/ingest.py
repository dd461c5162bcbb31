"""Camera frames per second of an ingest, compared with bare PyAV decoding and resizing; on one core and all.

    python benchmarks/ingest.py                       # records two episodes at 480x640 first
    python benchmarks/ingest.py --dataset FOLDER      # any LeRobot v3 dataset with video cameras

The first table is for one process with one decoding thread, which takes turns with bare decoding, so frames
per second are per core. It also counts processor time, in case the machine does other work. The second table
compares one worker process with one for every core, taking turns, without the seconds that processes take to
start.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loader import record, write_hdf5
from common.data import DataConfig, open_dataset
from common.data.store import EpisodeStore
from common.data.workers import cores, guarded_map, kept_pool


@dataclass(frozen=True)
class Options:
    """Compare an ingest with bare decoding."""

    dataset: Path | None = None
    """LeRobot v3 dataset; by default, one is recorded for this benchmark."""
    image_size: tuple[int, ...] = (224,)
    """Size of the stored frames, as in the training scripts."""
    steps: int = 600
    """Steps to record, of two cameras at 480x640, in two episodes."""
    rounds: int = 5
    """Measurements of each; the best is printed."""
    copies: int = 6
    """Copies of the recording that form the dataset of the second table."""


def bare(root: Path, keys: tuple[str, ...], size: tuple[int, int]) -> int:
    """Decode and resize every frame of these cameras, keeping nothing; returns the number of frames."""
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
        bare(root, first.camera_keys, first.image_size)  # brings the videos into memory
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
        print_scaling(options, root, first, Path(folder))


def print_scaling(options: Options, video: Path, store: EpisodeStore, folder: Path) -> None:
    """Frames per second with one worker process and with one for every core."""
    hdf5 = write_hdf5(folder / "hdf5", store)
    for copy in range(1, options.copies):
        for e in range(store.num_episodes):
            shutil.copy(hdf5 / f"episode_{e}.hdf5", hdf5 / f"episode_{copy * store.num_episodes + e}.hdf5")
    sources = {
        "video to raw": DataConfig((str(video),), image_size=options.image_size),
        "HDF5 to raw": DataConfig((str(hdf5),)),
        "HDF5 to JPEG": DataConfig((str(hdf5),), store="jpeg"),
    }
    print(f"\n{'frames/s':14}{'1 process':>12}{f'{cores()} processes':>14}{'ratio':>8}")
    runs = 0
    for name, config in sources.items():
        rates: dict[int, list[float]] = {1: [], cores(): []}
        for _ in range(options.rounds):
            for workers in rates:
                runs += 1
                rates[workers].append(timed_ingest(config, workers, folder / f"scaling{runs}"))
        one, all_cores = (max(found) for found in rates.values())
        print(f"{name:14}{one:12.0f}{all_cores:14.0f}{all_cores / one:8.2f}")


def timed_ingest(config: DataConfig, workers: int, cache: Path) -> float:
    """Frames per second, once the processes have started."""
    config = replace(config, cache_dir=cache, ingest_workers=workers)
    with kept_pool():
        list(guarded_map(time.sleep, [(1.0,)] * workers, workers))  # starts all of them
        begin = time.perf_counter()
        store = open_dataset(config)
        seconds = time.perf_counter() - begin
    frames = store.num_steps * len(store.cameras)
    del store
    shutil.rmtree(cache)
    return frames / seconds


if __name__ == "__main__":
    main(tyro.cli(Options))
