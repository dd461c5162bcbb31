"""Do a run and its collectors on Ray survive faults, and how long do episodes and weights take between them?

    python benchmarks/collecting.py            # about a quarter of an hour on two cores
    python benchmarks/collecting.py --kills 1  # quick check that it runs

A small run trains on the built-in task while two collectors record corrections (`collect_ray.py`). One part
is killed again and again, at random moments after something new was learned: a collector, the actor that
counts, the training script, or the collectors' launcher. All must recover on their own; only the launcher is
started again, with the same command. Then everything is stopped.

*Lost* are finished datasets that are gone or that the run has not learned from. *Different* is a run that,
resumed from the middle without disturbance, does not end with the same weights and metrics. Needs the
packages of requirements-ray.txt.
"""

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from pydantic import PositiveInt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_naive_fm
from benchmarks.faults import (
    SMALL,
    Machines,
    actors,
    command,
    equal,
    launcher,
    load_file,
    machines,
    metrics,
    scripts_of,
)
from common.config import cli, options
from common.data import demo
from common.data.growth import LOG
from common.errors import EXIT_STOPPED, UserError
from common.files import completed_checkpoints, read_json

ROOT = Path(__file__).parents[1]
Part = Literal["collector", "board", "script", "launcher"]
LOG_EVERY, SAVE_EVERY = 50, 200


@options
class Config:
    """Disturb a run that learns from collectors, and check whether anything is lost."""

    parts: tuple[Part, ...] = get_args(Part)
    """What is killed."""
    kills: PositiveInt = 10
    """Times that each of them is killed."""
    seed: int = 0
    """Seed of what happens when."""


def main(config: Config) -> None:
    random.seed(config.seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    counted = ("datasets", "lost", "different", "other exit codes")
    print(f"| killed | times | {' | '.join(counted)} | episode to use, s | weights to episode, s |")
    print("| --- " * 8 + "|", flush=True)
    with tempfile.TemporaryDirectory(prefix="collecting-") as folder, machines() as nodes:
        folder = Path(folder)
        data = demo.record(folder / "data", demo.demonstrate(10, seed=1))
        flags = ["--dataset", data, "--cache-dir", folder / "cache", *SMALL, "--schedule", "constant"]
        flags += ["--warmup-steps", 0]  # else it depends on --steps
        flags += ["--log-every", LOG_EVERY, "--save-every", SAVE_EVERY, "--keep", 10**6]
        flags += ["--eval-every", 10**7, "--hang-timeout", 60]
        for part in config.parts:
            found, waits = disturbed(part, nodes, config, folder / part, flags)
            times = " | ".join(spread(seconds) for seconds in waits)
            cells = [part, config.kills, *(found[name] for name in counted)]
            print(f"| {' | '.join(map(str, cells))} | {times} |", flush=True)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f}, at most {max(seconds):.1f}" if seconds else ""


class Arrivals:
    """When datasets were finished, and when they and checkpoints were first used."""

    def __init__(self, run_dir: Path, new: Path):
        self.run_dir, self.new = run_dir, new
        self.datasets: dict[str, float] = {}
        self.learned: dict[str, float] = {}
        self.checkpoints: dict[str, float] = {}

    def look(self) -> None:
        now, log = time.monotonic(), self.run_dir / LOG
        for path in self.new.glob("[!.]*"):
            self.datasets.setdefault(path.name, now)
        for entry in (entry for at in (read_json(log) if log.exists() else []) for entry in at["entries"]):
            self.learned.setdefault(entry["name"], now)
        for path in completed_checkpoints(self.run_dir):
            self.checkpoints.setdefault(path.name, now)

    def wait(self, what, seconds: float = 600.0) -> None:
        """Look until something is so."""
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise UserError(f"{self.run_dir} has not recovered: see the .log file next to it.")
            self.look()
            time.sleep(0.02)

    def seconds(self) -> tuple[list[float], list[float]]:
        """From a dataset to its use, and from a checkpoint to the first dataset that was recorded with it."""
        used = [self.learned[name] - at for name, at in self.datasets.items() if name in self.learned]
        first: dict[str, float] = {}
        for name, at in self.datasets.items():
            step = f"step_{name.partition('-step_')[2].partition('-')[0]}"
            first[step] = min(first.get(step, at), at)
        return used, [at - self.checkpoints[step] for step, at in first.items() if step in self.checkpoints]


def disturbed(
    part: Part, nodes: Machines, config: Config, folder: Path, flags: list
) -> tuple[Counter, tuple[list[float], list[float]]]:
    """Train and collect while one part is killed; returns what was lost, and the seconds of `Arrivals`."""
    folder.mkdir()
    run_dir, new, found = folder / "run", folder / "new", Counter(lost=0, different=0)
    seen = Arrivals(run_dir, new)
    own = command(train_naive_fm, run_dir, [*flags, "--grow-from", new, "--steps", 10**7])[:-4]
    training = launcher(nodes.address, 1, ROOT / "train_naive_fm.py", run_dir, own, "--max-failures", -1)
    collecting = [sys.executable, ROOT / "collect_ray.py", run_dir, new, "--address", nodes.address]
    collecting += ["--env", "demo", "--collectors", 2, "--resources", "CPU=0.5", "--max-waiting", 1000]
    nodes.have(2)
    with (folder / "run.log").open("w") as log:
        start = lambda words: subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)  # noqa: E731
        trainer, collector = start(training), None
        try:
            seen.wait(lambda: seen.checkpoints)
            collector = start(collecting)
            for _ in tqdm(range(config.kills), desc=f"{part} killed", unit="kill"):
                had = len(seen.learned)
                seen.wait(lambda had=had: len(seen.learned) > had)
                pause = time.monotonic() + random.uniform(0, 5)
                seen.wait(lambda pause=pause: time.monotonic() > pause)
                if part == "launcher":
                    collector.kill()
                    collector.wait()
                    collector = start(collecting)
                    continue
                running: list[int] = []
                while not running:  # it has been killed before, and starts again
                    listed = {"collector": actors("Collector"), "board": actors("Board")}
                    running = scripts_of(run_dir) if part == "script" else listed[part]
                os.kill(random.choice(running), signal.SIGKILL)
            had = len(seen.datasets)
            seen.wait(lambda: len(seen.datasets) > had)
            collector.terminate()
            found["other exit codes"] += collector.wait(120) != EXIT_STOPPED
            seen.look()
            seen.wait(lambda: seen.datasets.keys() <= seen.learned.keys())
            trainer.terminate()
            found["other exit codes"] += trainer.wait(120) != EXIT_STOPPED
        finally:
            for process in (trainer, collector):
                if process is not None:
                    process.kill()
    found["datasets"] = len(seen.datasets)
    found["lost"] += len(seen.datasets.keys() - {path.name for path in new.glob("[!.]*")})
    found["different"] += not repeats(run_dir, folder / "again", own)
    return found, seen.seconds()


def repeats(run_dir: Path, again: Path, flags: list) -> bool:
    """Whether the run, resumed from the middle, ends as it did."""
    shutil.copytree(run_dir, again, symlinks=True)
    there = completed_checkpoints(again)
    for path in there[len(there) // 2 :]:
        shutil.rmtree(path)
    last = there[-1].name
    command = [sys.executable, ROOT / "train_naive_fm.py", *flags, "--steps", int(last.removeprefix("step_"))]
    subprocess.run(
        list(map(str, [*command, "--run-dir", again, "--resume", "auto"])), check=True, capture_output=True
    )
    place = Path("checkpoints", last, "state", "model.safetensors")
    logged = [
        [row for row in metrics(folder) if row["split"] == "train" and row["step"] % LOG_EVERY == 0]
        for folder in (run_dir, again)
    ]
    return equal(load_file(run_dir / place), load_file(again / place)) and logged[0] == logged[1]


if __name__ == "__main__":
    cli(main, Config)
