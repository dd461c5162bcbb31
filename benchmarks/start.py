"""Seconds and memory from launch to the first step of `train_naive_fm.py`, by phase.

    python benchmarks/start.py                                # the built-in task
    python benchmarks/start.py --dataset FOLDER
    python benchmarks/start.py --steps 1_000_000 10_000_000   # also synthetic datasets with as many steps

Each start is a separate process. The first one fills the caches that the others read. For synthetic datasets,
which take 300 bytes of disk per step, it has its own table. Processor seconds are those of the whole process
and hardly depend on other work on the machine; wall-clock seconds are how long a user waits. `own` is memory
that no file backs; `resident` includes pages of mapped files, which processes share; `peak` is the largest
`resident` so far. With --publish, the medians are written to docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.methods import insert

DIMS = 14
MADE_OF = 500_000  # steps generated at once
DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


@dataclass(frozen=True)
class Options:
    """Measure each phase of a start."""

    dataset: str = "demo"
    """Dataset to start with."""
    steps: tuple[int, ...] = ()
    """Also start with synthetic datasets of this many steps, with states and actions of 14 dimensions."""
    length: int = 300
    """Steps of their episodes."""
    rounds: int = 3
    """Warm starts; their median is printed."""
    batch_size: int = 16
    publish: bool = False
    """Write the tables to docs/performance.md."""
    child: str | None = None
    """Used internally, for the processes that this one starts."""


def make_up(root: Path, cache: Path, steps: int, length: int, size: int = 16, cameras: int = 1) -> Path:
    """Write a synthetic LeRobot dataset without videos, and its store with a sparse file of frames.

    Returns:
        The folder of the store.
    """
    from safetensors.numpy import save

    from common.data import DataConfig, request_store, stores_folder
    from common.data.rows import RawRows
    from common.data.store import ARRAYS, FORMAT, FRAMES, META
    from common.files import checksum

    episodes = steps // length
    state, action = (np.empty((episodes * length, DIMS), np.float32) for _ in range(2))
    rng, each = np.random.default_rng(0), max(1, MADE_OF // length)
    for first in range(0, episodes, each):  # actions are random walks, and states follow them
        rows = slice(first * length, min(first + each, episodes) * length)
        walk = rng.normal(size=((rows.stop - rows.start) // length, length, DIMS)).cumsum(1)
        action[rows] = walk.reshape(-1, DIMS)
        state[rows] = action[rows] + 0.05 * rng.normal(size=action[rows].shape)
    write_dataset(root, state, action, length, size, cameras)
    config = DataConfig((str(root),), cache_dir=cache)
    request = request_store(str(root), config)
    path = request.folder(stores_folder(config))
    path.mkdir(parents=True)
    numbers = np.arange(episodes)
    places = {"episode_indices": numbers, "episode_rows": numbers * length, "episode_checksums": numbers * 0}
    arrays = {"state": state, "action": action, "timestamps": np.arange(len(state)) % length / 30, **places}
    (path / ARRAYS).write_bytes(save({**arrays, "episode_starts": np.arange(episodes + 1) * length}))
    RawRows.make_room(path / FRAMES, len(state), request.row_shape)
    meta = {"format": FORMAT, **asdict(request.info), "storage": "raw", "choices": request.choices()}
    meta |= {"skipped": [], "episode_tasks": ["measure"] * episodes}
    meta["bytes"] = {name: (path / name).stat().st_size for name in (ARRAYS, FRAMES)}
    (path / META).write_text(json.dumps({**meta, "arrays_crc32": checksum(path / ARRAYS)}))
    time.sleep(3)  # checksums of recently written files are not cached
    return path


def write_dataset(root: Path, state: np.ndarray, action: np.ndarray, length: int, size: int, cameras: int):
    """Write a LeRobot dataset without its videos."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, columns: dict[str, Any]) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / name, compression="none", use_dictionary=False)

    keys = [f"observation.images.cam_{number}" for number in range(cameras)]
    vector = {"dtype": "float32", "shape": [DIMS], "names": [f"joint_{n}" for n in range(DIMS)]}
    features = {"observation.state": vector, "action": vector}
    axes = ["height", "width", "channels"]
    features |= {key: {"dtype": "video", "shape": [size, size, 3], "names": axes} for key in keys}
    number = np.arange(len(state) // length)
    info = {"codebase_version": "v3.0", "fps": 30, "features": features, "total_episodes": len(number)}
    root.mkdir(parents=True)
    write("meta/tasks.parquet", {"task_index": [0], "task": ["measure"]})
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rows = {"episode_index": number, "length": np.full(len(number), length)}
    rows |= {"tasks": [["measure"]] * len(number), "dataset_from_index": number * length}
    rows["dataset_to_index"] = (number + 1) * length
    for key in (f"videos/{key}/" for key in keys):
        rows |= {f"{key}chunk_index": number * 0, f"{key}file_index": number // 100}
        rows |= {
            f"{key}{end}_timestamp": (number % 100 + k) * length / 30 for k, end in enumerate(("from", "to"))
        }
    write("meta/episodes/chunk-000/file-000.parquet", rows)
    for file, first in enumerate(range(0, len(state), MADE_OF)):
        index = np.arange(first, min(first + MADE_OF, len(state)))
        parts = {"observation.state": state[index], "action": action[index]}
        columns = {
            key: pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), DIMS) for key, x in parts.items()
        }
        columns |= {"timestamp": (index % length / 30).astype(np.float32), "frame_index": index % length}
        columns |= {"episode_index": index // length, "index": index, "task_index": index * 0}
        write(f"data/chunk-000/file-{file:03d}.parquet", columns)


class Phases:
    """Records the time and the memory of each phase of a process."""

    def __init__(self):
        self.done: dict[str, dict[str, float]] = {}
        self._since = time.perf_counter() - age(), 0.0  # both from the process's start

    def end(self, name: str) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.done[name] = {"wall": wall - self._since[0], "cpu": processor - self._since[1], **memory()}
        self._since = time.perf_counter(), time.process_time()


def age() -> float:
    """Seconds since this process started."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # starttime, see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, float]:
    """Memory of this process in GB: see the module's docstring."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    lines += [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    found = {"own": "Anonymous", "resident": "Rss", "peak": "VmHWM"}
    return {name: kilobytes[key] / 1e6 for name, key in found.items()}


def start(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Do what `train_naive_fm.py` does until the end of its first step; returns the phases."""
    phases = Phases()
    import torch  # noqa: F401

    phases.end("import of torch")
    import common.run
    import train_naive_fm as script
    from common.config import parse

    phases.end("other imports")
    config = parse(script.Config, arguments, "train_naive_fm.py")
    run = common.run.start_run(config, script.__file__)
    phases.end("command line, Accelerate")
    opened = common.run.open_dataset

    def open_dataset(options: Any):
        store = opened(options)
        phases.end("opening the store")
        return store

    common.run.open_dataset = open_dataset
    data = run.load_data(config.horizon, config.normalization, config.tasks, config.delay)
    phases.end("statistics")
    policy = script.Policy(config, data.spec)
    phases.end("network")
    optimizer, scheduler, average = run.prepare(policy, data)
    phases.end("optimizer, run folder")
    for batch in run.micro_batches():
        loss, _ = script.compute_loss(
            run.model, batch, data.normalizer, config, train=True, count=run.real_actions
        )
        run.backward(loss)
    run.clip_gradients()
    optimizer.step(), optimizer.zero_grad(), scheduler.step(), average.update(), run.end_step()
    phases.end("first step")
    return phases.done


def launch(arguments: list[str]) -> dict[str, dict[str, float]]:
    """The phases of a start in a separate process, and their total."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--child",
            json.dumps([*arguments, "--run-dir", f"{folder}/run"]),
        ]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        whole = time.perf_counter() - began
    phases = json.loads(done.stdout.splitlines()[-1])
    cpu = sum(phase["cpu"] for phase in phases.values())
    phases["launch to first step"] = {**list(phases.values())[-1], "wall": whole, "cpu": cpu}
    return phases


def table(title: str, starts: list[dict]) -> str:
    """Markdown: medians of several starts."""
    lines = [
        f"| {title} | wall s | processor s | own GB | resident GB | peak GB |",
        "| --- |" + " ---: |" * 5,
    ]
    for name in starts[0]:
        values = [
            statistics.median(start[name][what] for start in starts)
            for what in ("wall", "cpu", "own", "resident", "peak")
        ]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    if options.child is not None:
        print(json.dumps(start(json.loads(options.child))))
        return
    flags = ["--steps", "1000", "--batch-size", str(options.batch_size), "--dataset"]
    launch([*flags, options.dataset])
    warm = [launch([*flags, options.dataset]) for _ in range(options.rounds)]
    tables = [table(f"{Path(options.dataset).name}, warm", warm)]
    for steps in options.steps:
        with tempfile.TemporaryDirectory() as folder:
            make_up(Path(folder) / "dataset", Path(folder), steps, options.length)
            made = [*flags, f"{folder}/dataset", "--cache-dir", folder]
            tables.append(table(f"{steps:,} steps, first start", [launch(made)]))
            tables.append(table(f"{steps:,} steps, warm", [launch(made) for _ in range(options.rounds)]))
    text = "\n\n".join(tables)
    print(text)
    if options.publish:
        insert(DOCS, text, "From launch to the first step")


if __name__ == "__main__":
    main(tyro.cli(Options))
