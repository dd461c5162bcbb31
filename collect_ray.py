"""Collect with several collectors on a Ray cluster, while a run trains.

    python train_vfp.py --run-dir /shared/towel --grow-from /shared/new ...
    python collect_ray.py /shared/towel /shared/new --collectors 4 --env aloha:transfer-cube --budget 2000

Each collector is an actor that does what `collect.py` does, again and again with the newest weights. These
reach it through Ray's object store, once a machine. What is recorded appears in the folder of `--grow-from`,
which all machines see; training does not depend on collectors. All that must outlive a fault is read from
the run folder and that folder, so that the same command continues. More: docs/clusters.md.
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import hashlib
import math
import re
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
from typing import Any, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

import collect
from common.checkpoint import find, newest_undamaged
from common.config import cli, options
from common.console import quiet, say
from common.data.growth import LOG
from common.errors import EXIT_STOPPED, UserError
from common.files import CHECKSUMS, completed_checkpoints, read_json
from common.inference import load_policy
from launch_ray import LOG_SECONDS, NOTICE_SECONDS, RunFolder, connect, ray

ROOT = Path(__file__).resolve().parent
POLL_SECONDS = 0.5
SEEDS = 1_000_000  # of a collector
PATIENCE = 3  # after as many failed rounds, or losses, in a row a collector is given up
HELD = 600.0  # seconds after which a collector that has not recorded what it was granted is thought lost
DONE = "done"
INFO = "meta/info.json"
RESTARTED = {"max_restarts": -1, "max_task_retries": -1}


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
    if config.by != "expert":
        raise UserError("A person corrects on their own machine: use collect.py, with the same folders.")
    if not config.run.is_dir():
        raise UserError(f"{config.run} does not exist: start the run first.")
    # Datasets have the run's real name, also if it was given by a link.
    config = replace(config, run=config.run.resolve(), out=config.out.absolute())
    needs = resources(config)
    room = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0), "resources": needs}
    connect(config.address)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    name = {"name": f"{config.run} {config.out}", "namespace": "collect"}
    board, end = None, time.monotonic() + NOTICE_SECONDS  # an earlier launcher's machine may be lost
    while board is None:
        made = ray.remote(Board).options(num_cpus=0, label_selector=here, **name, **RESTARTED)
        try:
            board = made.remote(config)
        except ValueError:
            if time.monotonic() > end:
                sentence = f"Collectors for {config.run} and {config.out} are at work already."
                raise UserError(sentence) from None
            time.sleep(POLL_SECONDS)
    finished = False
    with marked(config.out) as mark, suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        expected = code()
        made = ray.remote(Collector).options(**room, **RESTARTED)
        collectors = [made.remote(number, config, mark, expected) for number in range(config.collectors)]
        supervise(collectors, board, config)
        finished = True
    steps = ray.get(board.status.remote()).steps
    time.sleep(LOG_SECONDS)
    ray.shutdown()
    say(f"{steps} steps recorded in {config.out}" + ("" if finished else ": the same command continues"))
    sys.exit(0 if finished else EXIT_STOPPED)


def resources(config: Config) -> dict[str, float]:
    """What a collector needs, by name."""
    found = {}
    for need in config.resources:
        name, _, number = need.partition("=")
        if not re.fullmatch(r"0\.\d*[1-9]|[1-9]\d*", number):
            raise UserError(f"--resources {need}: give a whole number, or a part of one, such as GPU=0.25.")
        found[name] = float(number)
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


def supervise(collectors: list, board: Any, config: Config) -> None:
    """Let the collectors work until the budget is used up; Ray restarts those that are lost."""
    working = {collector.work.remote(board): number for number, collector in enumerate(collectors)}
    shown = ""
    with tqdm(total=config.budget, desc="recorded", unit="step") as bar:
        while working:
            ended, _ = ray.wait(list(working), timeout=POLL_SECONDS)
            for task in ended:
                number = working.pop(task)
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    say(f"collector {number} has ended: {cause if isinstance(cause, UserError) else error}")
            status = ray.get(board.status.remote())
            bar.update(status.steps - bar.n)
            if status.waiting == DONE and not status.recording:  # those left were never placed
                return
            few = status.started < len(collectors)
            words = f"{status.started} of {len(collectors)} have started" if few else status.waiting
            bar.set_postfix_str(words, refresh=words != shown)
            shown = words
    raise UserError("No collector is left: their messages above say why.")


class Status(NamedTuple):
    """How far collecting is.

    Attributes:
        steps: recorded steps.
        waiting: why no collector should begin a round now; empty: it should.
        started: collectors that have started.
        recording: collectors that are about to record something.
    """

    steps: int
    waiting: str
    started: int
    recording: int


class Board:
    """An actor on the launcher's machine: newest weights, what has been recorded, and whether to go on.

    If it is lost, Ray starts it again, and it reads what it needs.
    """

    def __init__(self, config: Config):
        self.config, self.folder = config, RunFolder(config.run)
        self.version, self.weights, self.looked_at = "", [], None
        self.datasets: dict[str, int] = {}  # steps
        self.granted: dict[int, tuple[int, float]] = {}  # steps that a collector records, and when it asked
        self.losses: dict[int, int] = {}  # of each collector since its last round
        self.full = False
        self.scan()

    def scan(self) -> None:
        """Look for new datasets."""
        for path in recorded(self.config):
            if path.name not in self.datasets:
                self.datasets[path.name] = int(read_json(path / INFO)["total_frames"])

    def status(self) -> Status:
        steps = sum(self.datasets.values())
        return Status(steps, self.why_wait(), len(self.losses), len(self.held()))

    def held(self) -> dict[int, tuple[int, float]]:
        """What was granted to collectors that are still thought to record it."""
        now = time.monotonic()
        return {number: given for number, given in self.granted.items() if now - given[1] < HELD}

    def left(self) -> float:
        """Steps that may still be recorded."""
        return math.inf if self.config.budget is None else self.config.budget - sum(self.datasets.values())

    def why_wait(self) -> str:
        """See `Status`."""
        try:
            return self._why_wait()
        except (OSError, ValueError) as error:  # a network's disk does not answer, or not whole
            return f"waiting until {self.config.run} can be read ({error})"

    def _why_wait(self) -> str:
        if self.full or self.left() <= 0:
            return DONE
        if not completed_checkpoints(self.config.run):
            return "waiting for the first checkpoint"
        log = self.config.run / LOG
        times = read_json(log) if log.exists() else []
        new = self.datasets.keys() - {entry["name"] for time in times for entry in time["entries"]}
        if len(new) >= self.config.max_waiting:
            return f"waiting until the run has learned from {len(new)} datasets, or has said why it does not"
        self.folder.news()
        behind = self.folder.step - int(find(self.config.run).name.removeprefix("step_"))
        if self.config.max_staleness is not None and behind > self.config.max_staleness:
            return f"waiting for a checkpoint newer than {behind} steps"
        return ""

    def newest(self, version: str) -> tuple[str, list] | None:
        """Name and files of the newest checkpoint's policy, in the object store; None if it is `version`."""
        last = find(self.config.run)
        if last != self.looked_at:
            with suppress(OSError):  # it has just been removed, because there is a newer one
                path = newest_undamaged(self.config.run, "policy/")
                files = [path / CHECKSUMS, *(path / "policy").rglob("*")]
                found = {str(file.relative_to(path)): file for file in files if file.is_file()}
                arrays = {name: np.fromfile(file, np.uint8) for name, file in found.items()}
                self.version, self.weights, self.looked_at = path.name, [ray.put(arrays)], last
        return None if version == self.version else (self.version, self.weights)

    def begin(self, number: int) -> int:
        """A collector starts; returns how many times it was lost since it last finished a round."""
        self.granted.pop(number, None)
        self.scan()  # it may have been lost just after its dataset was complete
        self.losses[number] = self.losses.get(number, -1) + 1
        return self.losses[number]

    def grant(self, number: int, steps: int) -> bool:
        """Whether a collector may record a round of this many steps."""
        others = {n: given for n, given in self.held().items() if n != number}
        self.full |= steps > self.left()
        if steps > self.left() - sum(given for given, _ in others.values()):
            return False
        self.granted = others | {number: (steps, time.monotonic())}
        return True

    def end(self, number: int) -> None:
        """A collector's round is over, with or without a dataset."""
        self.granted.pop(number, None)
        self.losses[number] = 0
        self.scan()


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
        losses = ray.get(board.begin.remote(self.number))
        if losses == PATIENCE:
            raise UserError(f"it was lost {losses} times in a row: the output of its machine says more.")
        if losses:
            print(f"collector {self.number} was lost, with the round that it had begun", flush=True)
        base = self.config.seed + self.number * SEEDS
        had = [seed_of(path) for path in recorded(self.config)]
        last = max((seed for seed in had if base <= seed < base + SEEDS), default=None)
        seed, failed = base if last is None else last + self.config.episodes, 0
        while (waiting := ray.get(board.status.remote()).waiting) != DONE:
            if waiting:
                time.sleep(POLL_SECONDS)
                continue
            try:
                self.update()
                if self.policy is not None:
                    self.round(seed)
                failed = 0
            except ray.exceptions.ObjectLostError:  # the board was lost: it will have the weights again
                continue
            except Exception as error:  # an environment, a disk and a GPU can fail in any way
                failed += 1
                if failed == PATIENCE:
                    raise
                what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                print(f"collector {self.number}: {what}", flush=True)
            seed += self.config.episodes  # an environment may add an episode's number to it

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
                device = None if "GPU" in resources(self.config) else "cpu"
                self.policy = load_policy(folder, device=device, seed=self.config.seed)
        self.version = version

    def round(self, seed: int) -> None:
        """Let the policy act, and record what came of it."""
        total = 0

        def granted(steps: int) -> bool:
            nonlocal total
            total += steps
            return ray.get(self.board.grant.remote(self.number, total))

        try:
            with quiet():
                collect.collect(self.policy, replace(self.config, seed=seed), granted)
        finally:
            ray.get(self.board.end.remote(self.number))


def recorded(config: Config) -> list[Path]:
    """Complete datasets of the run."""
    name = re.compile(rf"{re.escape(config.run.name)}-step_\d+-seed-\d+")
    return [path for path in config.out.glob("*") if name.fullmatch(path.name) and (path / INFO).is_file()]


def seed_of(dataset: Path) -> int:
    return int(dataset.name.rpartition("-")[2])


if __name__ == "__main__":
    import collect_ray  # whose classes Ray can name: it would have to copy those of this module

    cli(collect_ray.main, collect_ray.Config)
