"""Training samples per second from every kind of source, compared in one run.

    python benchmarks/loader.py                       # records 3 cameras at 224x224 first
    python benchmarks/loader.py --dataset FOLDER      # any LeRobot v3 dataset with video cameras

A LeRobot video dataset is decoded once, and the same pixels are written as a LeRobot image dataset, as HDF5
(one uncompressed array per camera, as ALOHA records it), and into episode stores: all sources except JPEG
deliver the same bytes. Each sample is one step of all cameras with its chunk of actions, in shuffled order.

`memcpy` is one thread that copies as many bytes from an equally large array into a reused buffer: the upper
bound for a gather. Warm: the files are in memory. Cold: they were evicted just before, and every sample is
read once. The last line reads a store larger than the memory, from a sparse file: nothing waits for a disk,
but memory must be freed for every page.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import ChunkDataset, DataConfig, make_loader, open_dataset
from common.data.store import EpisodeStore

CAMERAS = ("observation.images.cam_head", "observation.images.cam_left", "observation.images.cam_right")


@dataclass(frozen=True)
class Options:
    """Compare ways to load training samples."""

    dataset: Path | None = None
    """LeRobot v3 dataset; by default, one is recorded for this benchmark."""
    size: int = 224
    """Side of the recorded images, in pixels."""
    steps: int = 600
    """Steps to record, in two episodes."""
    batch_size: int = 32
    horizon: int = 40
    seconds: float = 3.0
    """Least time to measure each way."""
    rounds: int = 6
    """Measurements of each way; their median is printed."""
    beyond_memory: float = 1.25
    """Size of the sparse store, as a multiple of the machine's memory; 0 skips it."""


def record(
    root: Path, cameras: tuple[str, ...], height: int, width: int, steps: int, episodes: int = 2
) -> Path:
    """Write a dataset of blurred moving shapes with LeRobot's own writer and default video encoder."""
    from PIL import Image

    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    scene = np.asarray(shapes.resize((2 * width, 2 * height), Image.Resampling.BICUBIC))  # to move over

    def frames(step: int) -> Iterator[np.ndarray]:
        for number in range(len(cameras)):
            y, x = step * (1 + number) // 2 % height, step % width
            yield scene[y : y + height, x : x + width].copy()

    lengths = [steps // episodes] * episodes
    state = rng.normal(size=(sum(lengths), 14)).astype(np.float32)
    within = np.concatenate([np.arange(length) for length in lengths])
    return write_lerobot(
        root, cameras, (height, width), lengths, state, lambda row: frames(int(within[row])), True
    )


def write_lerobot(root, cameras, size, lengths, state, frames, video: bool) -> Path:
    """Write a LeRobot dataset; `frames(row)` gives the images (H, W, 3) of all cameras at a step."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = [f"joint_{i}" for i in range(state.shape[1])]
    features = {
        key: {"dtype": "float32", "shape": (len(names),), "names": names}
        for key in ("observation.state", "action")
    }
    kind = {
        "dtype": "video" if video else "image",
        "shape": (*size, 3),
        "names": ["height", "width", "channels"],
    }
    features |= dict.fromkeys(cameras, kind)
    dataset = LeRobotDataset.create("bench/mark", 30, features=features, root=root, use_videos=video)
    row = 0
    for length in lengths:
        for _ in range(length):
            step = {"observation.state": state[row], "action": state[row], "task": "measure"}
            dataset.add_frame(step | dict(zip(cameras, frames(row), strict=True)))
            row += 1
        dataset.save_episode()
    dataset.finalize()
    return root


def write_hdf5(root: Path, store: EpisodeStore) -> Path:
    """Write each episode of a store as an HDF5 file in ALOHA's layout."""
    import h5py

    root.mkdir()
    for e in range(store.num_episodes):
        rows = np.arange(store.episode_starts[e], store.episode_starts[e + 1])
        images = store.images(rows).permute(1, 0, 3, 4, 2).numpy()  # (N, L, H, W, 3)
        with h5py.File(root / f"episode_{e}.hdf5", "w") as file:
            file["observations/qpos"], file["action"] = store.state[rows], store.action[rows]
            for camera, stack in zip(store.cameras, images, strict=True):
                shape = (1, *stack.shape[1:])
                file.create_dataset(f"observations/images/cam_{camera}", data=stack, chunks=shape)
            file.attrs["fps"] = store.fps
    return root


class Hdf5Samples(Dataset):
    """HDF5 as it is usually read: one sample at a time, directly from the file."""

    def __init__(self, root: Path, horizon: int):
        import h5py

        self.horizon, self.files = horizon, None
        self.paths = sorted(root.glob("*.hdf5"))
        self.index = []
        for number, path in enumerate(self.paths):
            with h5py.File(path) as file:
                self.index += [(number, step) for step in range(len(file["action"]))]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        import h5py

        if self.files is None:  # opened in the process that reads
            self.files = [h5py.File(path) for path in self.paths]
        number, step = self.index[sample]
        file = self.files[number]
        cameras = file["observations/images"]
        images = np.stack([cameras[name][step].transpose(2, 0, 1) for name in cameras])
        action = file["action"][step : step + self.horizon]
        action = np.pad(action, ((0, self.horizon - len(action)), (0, 0)), mode="edge")
        parts = {"images": images, "state": file["observations/qpos"][step], "action": action}
        return {name: torch.from_numpy(value) for name, value in parts.items()}


def rate(draw: Callable[[], int], seconds: float) -> float:
    """Samples per second of repeated `draw()`, which returns how many it drew."""
    draw()
    begin, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        count += draw()
    return count / elapsed


def memcpy(row_bytes: int, batch_size: int, rows: int) -> Callable[[], int]:
    """Each call copies the bytes of a batch, from changing places of an array as large as the store."""
    source = np.ones((max(rows, 2 * batch_size), row_bytes), np.uint8)
    target, place = (
        torch.empty(batch_size, row_bytes, dtype=torch.uint8).numpy(),
        0,
    )  # aligned, as the store's

    def draw() -> int:
        nonlocal place
        np.copyto(target, source[place : place + batch_size])
        place = (place + batch_size) % (len(source) - batch_size)
        return batch_size

    return draw


def sample_wise(dataset: Dataset, batch_size: int, workers: int) -> Callable[[], int]:
    """Batches of a dataset that returns one sample at a time, collated by PyTorch."""
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)

    def forever():
        while True:
            yield from loader

    batches = forever()
    return lambda: len(next(batches)["action"])


def lerobot_samples(root: Path, horizon: int) -> Dataset:
    """LeRobot's own dataset, decoding with PyAV."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    fps = LeRobotDataset("bench/mark", root=root).fps
    chunk = {"action": [step / fps for step in range(horizon)]}
    return LeRobotDataset("bench/mark", root=root, delta_timestamps=chunk, video_backend="pyav")


def evict(files: list[Path]) -> None:
    """Drop files from memory."""
    gc.collect()  # mapped pages would stay in memory
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_rate(files: list[Path], total: int, make: Callable[[], Callable[[], int]]) -> tuple[float, float]:
    """Samples per second of one pass over evicted files, and the share of their bytes read from the disk."""
    evict(files)
    draw = make()
    before, begin, count = _disk_bytes(), time.perf_counter(), 0
    while count < total * 0.9:
        count += draw()
    seconds = time.perf_counter() - begin
    return count / seconds, (_disk_bytes() - before) / sum(file.stat().st_size for file in files)


def _disk_bytes() -> int:
    """Bytes read from this machine's disks so far."""
    lines = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return sum(512 * int(fields[5]) for fields in lines if not fields[2].startswith(("loop", "ram")))


def larger_than_memory(store: EpisodeStore, share: float, folder: Path) -> EpisodeStore:
    """A store of `share` times the memory's size, in a sparse file."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    row_bytes = int(np.prod(store.row_shape))
    steps = 2**30 // row_bytes  # per episode
    episodes = int(share * memory / (steps * row_bytes)) + 1
    with (folder / "sparse.bin").open("wb") as file:
        file.truncate(episodes * steps * row_bytes)
    vectors = np.zeros((steps * episodes, store.state.shape[1]), np.float32)
    return replace(
        store,
        storage="raw",
        state=vectors,
        action=vectors,
        timestamps=np.zeros(len(vectors)),
        episode_starts=np.arange(episodes + 1) * steps,
        episode_indices=np.arange(episodes),
        episode_tasks=(store.task,) * episodes,
        episode_rows=np.arange(episodes) * steps,
        episode_checksums=np.zeros(episodes, np.int64),
        frame_files=(folder / "sparse.bin",),
        part_episodes=(episodes,),
    )


class Sources(NamedTuple):
    """The same recording in every format; only paths, so that nothing keeps files in memory."""

    video: Path
    images: Path
    hdf5: Path
    raw: Path
    jpeg: Path
    steps: int
    row_bytes: int


def prepare(options: Options, folder: Path) -> Sources:
    """Record, decode and convert."""
    root = options.dataset or record(folder / "video", CAMERAS, options.size, options.size, options.steps)
    config = DataConfig((str(root),), cache_dir=folder / "cache")
    store, jpeg = open_dataset(config), open_dataset(replace(config, store="jpeg"))
    lengths = np.diff(store.episode_starts).tolist()

    def frames(row: int) -> np.ndarray:
        return store.images(np.array([row]))[0].permute(0, 2, 3, 1).numpy()

    size, keys = store.image_size, store.camera_keys
    images = write_lerobot(folder / "images", keys, size, lengths, store.action, frames, False)
    hdf5 = write_hdf5(folder / "hdf5", store)
    same, rows = open_dataset(replace(config, dataset=(str(hdf5),))), np.arange(0, store.num_steps, 7)
    assert torch.equal(same.images(rows), store.images(rows))
    row_bytes = int(np.prod(store.row_shape))
    print(
        f"{store.num_steps} steps, {len(keys)} cameras at {size[0]}x{size[1]}, batch {options.batch_size}, "
        f"chunk {options.horizon}: {row_bytes * options.batch_size / 1e6:.1f} MB of pixels per batch"
    )
    for form, one in (("raw", store), ("JPEG", jpeg)):
        print(f"{form} store: {sum(file.stat().st_size for file in one.frame_files) / 1e6:.0f} MB")
    return Sources(root, images, hdf5, store.path, jpeg.path, store.num_steps, row_bytes)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        sources = prepare(options, folder)
        print_warm(options, sources)
        print_cold(options, sources)
        if options.beyond_memory:
            print_large(options, sources, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def gather(options: Options, path: Path, workers: int) -> Callable[[], int]:
    """Batches from an episode store."""
    store = EpisodeStore.open(path)
    dataset = ChunkDataset(store, range(store.num_episodes), options.horizon)
    batches = iter(make_loader(dataset, options.batch_size, seed=0, num_workers=workers))
    return lambda: len(next(batches).index)


def print_warm(options: Options, sources: Sources) -> None:
    """Measure with all files in memory."""
    batch, horizon = options.batch_size, options.horizon

    def samples(make: Callable[..., Dataset], path: Path, workers: int) -> Callable[[], Callable[[], int]]:
        return lambda: sample_wise(make(path, horizon), batch, workers)

    ways = {
        "memcpy": lambda: memcpy(sources.row_bytes, batch, sources.steps),
        "raw store": lambda: gather(options, sources.raw, 0),
        "raw store, 2 workers": lambda: gather(options, sources.raw, 2),
        "JPEG store": lambda: gather(options, sources.jpeg, 0),
        "JPEG store, 2 workers": lambda: gather(options, sources.jpeg, 2),
        "HDF5 by samples": samples(Hdf5Samples, sources.hdf5, 0),
        "HDF5 by samples, 2 workers": samples(Hdf5Samples, sources.hdf5, 2),
        "LeRobot images": samples(lerobot_samples, sources.images, 0),
        "LeRobot images, 2 workers": samples(lerobot_samples, sources.images, 2),
        "LeRobot video": samples(lerobot_samples, sources.video, 0),
        "LeRobot video, 2 workers": samples(lerobot_samples, sources.video, 2),
    }
    results = {}
    for group in (("memcpy", "raw store"), *((name,) for name in list(ways)[2:])):  # workers work ahead
        draws, rates = {name: ways[name]() for name in group}, {name: [] for name in group}
        for _ in range(options.rounds):  # taking turns, because the machine's speed varies
            for name in group:
                rates[name].append(rate(draws[name], options.seconds / options.rounds))
        results |= {name: statistics.median(found) for name, found in rates.items()}
        del draws
        gc.collect()
    video = max(value for name, value in results.items() if name.startswith("LeRobot video"))
    print(f"\n{'warm':28}{'samples/s':>10}{'GB/s':>8}{'/ memcpy':>11}{'/ best LeRobot video':>24}")
    for name, value in results.items():
        share, speed = value / results["memcpy"], value * sources.row_bytes / 1e9
        print(f"{name:28}{value:10.0f}{speed:8.2f}{share:11.1%}{value / video:23.1f}x")


def print_cold(options: Options, sources: Sources) -> None:
    """Measure one pass over files that were evicted just before."""

    def store(path: Path, workers: int) -> Callable[[], Callable[[], int]]:
        return lambda: gather(options, path, workers)

    def hdf5() -> Callable[[], int]:
        return sample_wise(Hdf5Samples(sources.hdf5, options.horizon), options.batch_size, 0)

    ways = {
        "raw store": (sources.raw, store(sources.raw, 0)),
        "JPEG store, 2 workers": (sources.jpeg, store(sources.jpeg, 2)),
        "HDF5 by samples": (sources.hdf5, hdf5),
    }
    print(f"\n{'cold, one pass':28}{'samples/s':>10}{'GB/s':>8}{'read from disk':>16}")
    for name, (path, make) in ways.items():
        value, from_disk = cold_rate(sorted(path.iterdir()), sources.steps, make)
        print(f"{name:28}{value:10.0f}{value * sources.row_bytes / 1e9:8.2f}{from_disk:16.0%}")


def print_large(options: Options, sources: Sources, folder: Path) -> None:
    """Measure a store that is larger than the memory."""
    store = larger_than_memory(EpisodeStore.open(sources.raw), options.beyond_memory, folder)
    dataset = ChunkDataset(store, range(store.num_episodes), options.horizon)
    batches = iter(make_loader(dataset, options.batch_size, seed=0, num_workers=0))
    value = rate(lambda: len(next(batches).index), 4 * options.seconds)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    print(
        f"\n{store.num_steps * sources.row_bytes / 1e9:.0f} GB in {memory:.0f} GB of memory: {value:.0f} "
        f"samples/s, {value * sources.row_bytes / 1e9:.2f} GB/s"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
