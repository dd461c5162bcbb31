"""Collect with several collectors on a Ray cluster, while a run trains.

    python train_vfp.py --run-dir /shared/towel --grow-from /shared/new ...
    python collect_ray.py /shared/towel /shared/new --collectors 4 --env aloha:transfer-cube --budget 2000

Each collector is an actor that does what `collect.py` does, again and again with the newest weights. These
reach it through Ray's object store, once a machine. What is recorded appears in the folder of `--grow-from`,
which all machines see; training does not depend on collectors. All that must outlive a fault is read from
the run folder and that folder, so that the same command continues. More: docs/clusters.md.
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import glob
import hashlib
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

import collect
from common.checkpoint import newest_undamaged
from common.config import cli, options
from common.console import quiet, say
from common.data.growth import LOG
from common.errors import EXIT_STOPPED, UserError
from common.files import CHECKSUMS, completed_checkpoints, read_json
from common.inference import load_policy
from launch_ray import RunFolder, connect, ray

ROOT = Path(__file__).resolve().parent
POLL_SECONDS = 0.5
ROUNDS = 1_000_000  # seeds of a collector
PATIENCE = 3  # rounds in a row that may fail, before a collector is given up
DONE = "done"


@options
class Config(collect.Config):
    """Record what a policy should learn from next, with collectors on a Ray cluster."""

    collectors: PositiveInt = 1
    """Collectors that act at the same time."""
    episodes: PositiveInt = 1
    """Episodes of a round, after which a collector looks for newer weights. They become one dataset, and are
    lost if their collector is."""
    resources: tuple[str, ...] = ("CPU=1",)
    """What a collector needs of its machine, as Ray names it: `GPU=0.25`, or `robot=1` for machines that were
    started with `ray start --resources '{"robot": 1}'`."""
    max_waiting: PositiveInt = 20
    """Datasets that the run has not learned from yet, above which collectors wait."""
    max_staleness: NonNegativeInt | None = None
    """Steps that training may be ahead of the newest checkpoint, above which collectors wait. Default: any
    number."""
    address: str | None = None
    """Address of the cluster. Default: RAY_ADDRESS, else one that runs here, else a new one."""


def main(config: Config) -> None:
    if config.checkpoint != "last":
        raise UserError("Collectors act with the newest weights: leave out --checkpoint.")
    if not config.run.is_dir():
        raise UserError(f"{config.run} does not exist: start the run first.")
    config = replace(config, run=config.run.resolve(), out=config.out.resolve())
    needs = {"num_cpus" if name == "CPU" else name: x for name, x in resources(config).items()}
    cpus, gpus = needs.pop("num_cpus", 0), needs.pop("GPU", 0)
    connect(config.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    again = {"max_restarts": -1, "max_task_retries": -1}
    board = ray.remote(Board).options(num_cpus=0, label_selector=here, **again).remote(config)
    made = ray.remote(Collector).options(num_cpus=cpus, num_gpus=gpus, resources=needs, max_restarts=-1)
    with marked(config.out) as mark:
        made = [made.remote(number, config, mark, code()) for number in range(config.collectors)]
        try:
            finished = supervise(made, board, config)
        except KeyboardInterrupt:
            finished = False
    steps = ray.get(board.steps.remote())
    ray.shutdown()
    say(f"{steps} steps recorded in {config.out}" + ("" if finished else ": the same command continues"))
    sys.exit(0 if finished else EXIT_STOPPED)


def resources(config: Config) -> dict[str, float]:
    """What a collector needs, by name."""
    found = {}
    for need in config.resources:
        name, _, number = need.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"--resources {need}: give a name and a number, such as robot=1.") from None
    return found


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """A file in the folder, by which collectors on other machines recognise it."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".collecting-{uuid.uuid4().hex[:8]}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def code() -> str:
    """Hash of the project's code, which must be the same on all machines."""
    sha = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"), *ROOT.glob("examples/*.py")]):
        sha.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


def supervise(collectors: list, board: Any, config: Config) -> bool:
    """Keep the collectors at work until the budget is used up, which returns True."""
    working = {collector.work.remote(board): number for number, collector in enumerate(collectors)}
    waiting = ""
    with tqdm(total=config.budget, desc="recorded", unit="step") as bar:
        while working:
            ended, _ = ray.wait(list(working), timeout=POLL_SECONDS)
            for task in ended:
                number = working.pop(task)
                try:
                    ray.get(task)
                except ray.exceptions.RayActorError:  # Ray starts it again
                    say(f"collector {number} was lost, with the round that it had begun")
                    working[collectors[number].work.remote(board)] = number
                except ray.exceptions.RayTaskError as error:
                    say(f"collector {number} has ended: {error.cause}")
            bar.update(ray.get(board.steps.remote()) - bar.n)
            waiting, before = ray.get(board.why_wait.remote()), waiting
            bar.set_postfix_str(waiting, refresh=waiting != before)
    if waiting != DONE:
        raise UserError("No collector is left: their messages above say why.")
    return True


class Board:
    """An actor on the launcher's machine: newest weights, what has been recorded, and whether to go on.

    If it is lost, Ray starts it again, and it reads what it needs.
    """

    def __init__(self, config: Config):
        self.config, self.folder = config, RunFolder(config.run)
        self.version, self.weights, self.looked_at = "", [], []
        self.datasets = {path.name: steps_of(path) for path in seeds_of(config, "").values()}
        self.granted: dict[int, int] = {}  # steps of the rounds that collectors are about to record
        self.full = False

    def steps(self) -> int:
        """Recorded steps."""
        return sum(self.datasets.values())

    def why_wait(self) -> str:
        """Why no collector should begin a round now; empty: it should."""
        if self.full or self.steps() >= (self.config.budget or float("inf")):
            return DONE
        there = completed_checkpoints(self.config.run)
        if not there:
            return "waiting for the first checkpoint"
        log = self.config.run / LOG
        times = read_json(log) if log.exists() else []
        left = self.datasets.keys() - {entry["name"] for time in times for entry in time["entries"]}
        if len(left) >= self.config.max_waiting:
            return f"waiting until the run has learned from {len(left)} datasets"
        self.folder.news()
        behind = self.folder.step - int(there[-1].name.removeprefix("step_"))
        if self.config.max_staleness is not None and behind > self.config.max_staleness:
            return f"waiting for a checkpoint newer than {behind} steps"
        return ""

    def newest(self, version: str) -> tuple[str, list] | None:
        """Name and files of the newest checkpoint's policy, in the object store; None if it is `version`."""
        newest = completed_checkpoints(self.config.run)[-1:]
        if newest != self.looked_at:
            with suppress(OSError):  # it has just been removed, because there is a newer one
                path = newest_undamaged(self.config.run, "policy/")
                files = [path / CHECKSUMS, *(path / "policy").rglob("*")]
                found = {str(file.relative_to(path)): file for file in files if file.is_file()}
                arrays = {name: np.fromfile(file, np.uint8) for name, file in found.items()}
                self.version, self.weights, self.looked_at = path.name, [ray.put(arrays)], newest
        return None if version == self.version else (self.version, self.weights)

    def grant(self, number: int, steps: int) -> bool:
        """Whether a collector may record a round of this many steps."""
        budget = self.config.budget or float("inf")
        self.full |= steps > budget - self.steps()
        others = sum(granted for other, granted in self.granted.items() if other != number)
        if self.full or steps > budget - self.steps() - others:
            return False
        self.granted[number] = steps
        return True

    def ended(self, number: int, dataset: str | None) -> None:
        """A collector's round is over, and this is what it has recorded."""
        self.granted.pop(number, None)
        if dataset is not None:
            self.datasets[dataset] = steps_of(self.config.out / dataset)


class Collector:
    """An actor that collects, a round after the other."""

    def __init__(self, number: int, config: Config, mark: Path, expected_code: str):
        self.number, self.config, self.mark, self.expected_code = number, config, mark, expected_code
        self.version, self.policy = "", None

    def work(self, board: Any) -> None:
        """Collect until the board says that it is enough."""
        self.board = (
            board  # which the constructor must not get: https://github.com/ray-project/ray/issues/53727
        )
        self.refuse_other_machine()
        base = self.config.seed + self.number * ROUNDS
        mine = range(base, base + ROUNDS)
        seed = max((seed for seed in seeds_of(self.config, "") if seed in mine), default=base - 1) + 1
        for lost, folder in seeds_of(self.config, ".").items():
            if lost in mine:  # half written
                shutil.rmtree(folder)
        ray.get(self.board.ended.remote(self.number, None))
        failed = 0
        while (wait := ray.get(self.board.why_wait.remote())) != DONE:
            if wait:
                time.sleep(POLL_SECONDS)
                continue
            try:
                self.update()
                if self.policy is not None:
                    self.round(seed)
                failed = 0
            except ray.exceptions.ObjectLostError:  # the board was lost: it will have the weights again
                continue
            except UserError as error:
                failed += 1
                if failed == PATIENCE:
                    raise
                print(f"collector {self.number}: {error}", flush=True)
            seed += 1

    def refuse_other_machine(self) -> None:
        machine = socket.gethostname()
        if not self.mark.exists():
            raise UserError(
                f"{self.config.out} on {machine} is not the folder of the launcher's machine: share it there."
            )
        if code() != self.expected_code:
            raise UserError(
                f"{ROOT} on {machine} is another version of the project than the launcher's: update it there."
            )

    def update(self) -> None:
        """Load the newest weights."""
        newest = ray.get(self.board.newest.remote(self.version))
        if newest is None:
            return
        version, (weights,) = newest
        files = ray.get(weights)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, "checkpoints", version, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                content.tofile(path)
            with quiet():
                self.policy = load_policy(folder, seed=self.config.seed)
        self.version = version

    def round(self, seed: int) -> None:
        """Let the policy act, and record what came of it."""
        total = 0

        def granted(steps: int) -> bool:
            nonlocal total
            total += steps
            return ray.get(self.board.grant.remote(self.number, total))

        with quiet():
            path = collect.collect(self.policy, replace(self.config, seed=seed), granted)
        ray.get(self.board.ended.remote(self.number, path and path.name))


def seeds_of(config: Config, prefix: Literal["", "."]) -> dict[int, Path]:
    """Datasets of the run by their seed; with a prefix of ".", those that are half written."""
    paths = config.out.glob(f"{prefix}{glob.escape(config.run.name)}-step_*-seed-*")
    return {int(path.name.rpartition("-")[2]): path for path in paths}


def steps_of(dataset: Path) -> int:
    return int(read_json(dataset / "meta" / "info.json")["total_frames"])


if __name__ == "__main__":
    import collect_ray  # whose classes Ray can name: it would have to copy those of this module

    cli(collect_ray.main, collect_ray.Config)
