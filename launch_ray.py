"""Run a training script on a Ray cluster: a peer of `accelerate launch`.

    python launch_ray.py --num-workers 4 train_vfp.py --run-dir /shared/towel -- --dataset me/fold_towel
    python launch_ray.py --num-workers 1-4 --global-batch 64 train_vfp.py --run-dir /shared/towel -- --lr 1e-4

Ray's trainer places an actor for each process. The actor starts the script as a separate process, in the
launcher's working directory, with `--resume auto`, and the kernel kills it when the actor ends. The run
folder stays the truth: a group that lost a process restarts from its newest complete checkpoint, and Ray is
told what the folder shows. What follows `--` goes to the script. More, and which launcher when:
docs/clusters.md.
"""

import importlib
import json
import logging
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn

import tyro
from pydantic import Field, NonNegativeFloat, PositiveInt

from common.config import AbsolutePath, cli, options, parse
from common.console import say
from common.errors import EXIT_HUNG, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, UserError
from common.files import completed_checkpoints, hold, writing_below

# Read when Ray starts. A group may import for minutes and is checked every second (Ray's defaults: one
# minute, 2 s); Ray runs workers at nice 15 by default; metrics for a dashboard are a part of ray[default].
SETTINGS = {"TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", "TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
SETTINGS |= {"worker_niceness": "0", "TRAIN_METRICS_ENABLED": "0"}
for name, value in SETTINGS.items():
    os.environ.setdefault(f"RAY_{name}", value)

try:
    import pyarrow.fs
    import ray
    import ray.train
    import ray.train.collective
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
except ImportError as error:
    raise SystemExit(
        f"error: {error.name} is missing: pip install -r requirements-ray.txt, which launch_ray.py needs."
    ) from None

FINAL = (1, 2, EXIT_OUT_OF_MEMORY)  # exit codes of a script that another attempt would only repeat
POLL_SECONDS = 1.0
ABSENT_SECONDS = 30.0  # a group that has not asked for this long is not running
LEAVE_SECONDS = 120.0  # from the end of the first process to that of the others
SAME_REQUEST_SECONDS = 2.0  # as in common/watch.py
NOTICE_SECONDS = 40.0  # in which Ray notices that a machine is lost,
COORDINATOR_SECONDS = 25.0  # and after that its coordinator of resources, which looks every 20 s
LOG_SECONDS = 2.0  # until Ray has printed what an actor wrote
TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: holds across exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Becomes another program, which the kernel kills when the thread that started it ends."""


@options
class Config:
    """Run a training script on a Ray cluster. What follows `--` goes to the script."""

    script: Annotated[AbsolutePath, tyro.conf.Positional]
    """The training script."""
    run_dir: AbsolutePath
    """Run folder, which all machines must see: started, or resumed if it holds a checkpoint."""
    num_workers: str = "1"
    """Processes: a number, or the fewest and the most (`1-4`), for a cluster that grows and shrinks."""
    global_batch: PositiveInt | None = None
    """Samples per optimizer step, whatever the number of processes; the script's --batch-size is then the
    most that a process takes at once. Workers that cannot get an equal share stay idle. Default: the script's
    own --batch-size in each process."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How many times a group that lost a process, an actor or a machine restarts; -1: always."""
    address: str | None = None
    """Address of the cluster. Default: RAY_ADDRESS, else one that runs here, else a new one."""
    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs per process. Default: 1 if the cluster has any."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Environment variable to pass on to the scripts, such as WANDB_API_KEY; may be given several times. All
    others come from Ray's own environment on each machine."""
    resize_every: NonNegativeFloat = 60.0
    """Seconds between checks for new machines; a group that grows restarts."""


def main(config: Config, flags: Sequence[str]) -> None:
    """Train until the run is done, stopped, or fails for good; `flags` are the script's."""
    refuse_senseless(config, flags)
    most = batch_size(config, flags) if config.global_batch else 0
    with writing_below(config.run_dir.parent, elsewhere="another --run-dir"):
        config.run_dir.parent.mkdir(parents=True, exist_ok=True)
    held = hold(config.run_dir.with_name(f".{config.run_dir.name}.ray.lock"), config.run_dir)
    connect(config.address)
    stopped: list[float] = []

    def ask_to_stop(number: int, frame: Any) -> None:
        if stopped and time.monotonic() - stopped[0] > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        stopped.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, ask_to_stop)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    restarted = {"max_restarts": -1, "max_task_retries": -1}
    board = ray.remote(StopBoard).options(num_cpus=0, label_selector=here, **restarted).remote()
    command = [str(config.script), *flags, "--run-dir", str(config.run_dir), "--resume", "auto"]
    job = {"command": command, "run_dir": str(config.run_dir), "cwd": os.getcwd(), "board": board}
    job |= {"global_batch": config.global_batch, "most": most}
    job |= {"env": {name: os.environ[name] for name in config.env}}
    code = supervise(config, job, stopped)
    time.sleep(LOG_SECONDS)
    ray.shutdown()
    held.close()
    sys.exit(code)


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one."""
    last = None if address or "RAY_ADDRESS" in os.environ else last_cluster()
    if last and not answers(last):
        say(f"the last cluster here, {last}, does not answer: starting a new one")
        address = "local"
    try:
        ray.init(address, logging_level="WARNING")
    except Exception as error:
        raise UserError(
            f"Ray cannot be reached or started ({brief(error)}): check --address, and that "
            f"~/.ray/auth_token is that of the cluster."
        ) from None


def last_cluster() -> str | None:
    """The address of the cluster that was started last on this machine, which Ray would wait for."""
    from ray._private.utils import read_ray_address

    return read_ray_address()


def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def refuse_senseless(config: Config, flags: Sequence[str]) -> None:
    """Refuse options that would only fail on the cluster or change what is trained."""
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", config.num_workers) or operator.gt(*workers(config)):
        raise UserError(
            f"--num-workers is {config.num_workers}: give a number, or the fewest and most, such as 1-4."
        )
    low, high = workers(config)
    if low < high and config.global_batch is None:
        raise UserError(
            f"--num-workers {config.num_workers}: the samples of a step would change with the number of "
            f"processes: give --global-batch."
        )
    if not config.script.is_file():
        raise UserError(f"{config.script} does not exist: give a training script.")
    for name in ("run-dir", "resume", *(["grad-accumulation"] if config.global_batch else [])):
        if flag(flags, name) is not None:
            raise UserError(f"--{name} after the -- is set by launch_ray.py itself: leave it out there.")
    beside = of_ray(config)
    if any((beside / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints")):
        raise UserError(f"{beside}, where Ray would keep its files, is a run: choose another --run-dir.")
    for name in config.env:
        if name not in os.environ:
            raise UserError(f"--env {name}: there is no such variable here: set it, or leave it out.")


def of_ray(config: Config) -> Path:
    """Ray's own folder, next to the run folder, which must be empty for a new run."""
    return config.run_dir.with_name(f"{config.run_dir.name}.ray")


def workers(config: Config) -> tuple[int, int]:
    """The fewest and the most processes."""
    low, _, high = config.num_workers.partition("-")
    return int(low), int(high or low)


def flag(flags: Sequence[str], name: str) -> str | None:
    """The last value that a script's command line gives a flag; None if it does not give it."""
    found = None
    for word, after in zip(flags, [*flags[1:], ""], strict=False):
        given, equals, value = word.partition("=")
        if given.replace("_", "-") == f"--{name}":
            found = value if equals else after
    return found


def batch_size(config: Config, flags: Sequence[str]) -> int:
    """The script's --batch-size, from its flags, its --config, or its default."""
    return parse(load(config.script).Config, list(flags), config.script.name).optim.batch_size


def load(script: Path) -> ModuleType:
    """Import a script."""
    sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem)


def divide(global_batch: int | None, most: int, world: int) -> tuple[int, list[str]]:
    """How many of the workers train, and with which flags, so that a step has `global_batch` samples.

    `most` is how many samples a process takes at once.
    """
    if global_batch is None:
        return world, []
    active = max(n for n in range(1, world + 1) if global_batch % n == 0)
    each = global_batch // active
    parts = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= most)
    return active, ["--batch-size", str(each // parts), "--grad-accumulation", str(parts)]


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# The launcher's side


class StopBoard:
    """An actor on the launcher's machine, where workers ask whether to stop; Ray replaces a lost one."""

    def __init__(self):
        self.stopping, self.asked = False, time.monotonic()

    def ask(self) -> bool:
        self.asked = time.monotonic()
        return self.stopping

    def stop(self) -> float:
        """Tell the workers to stop; returns the seconds since they last asked."""
        self.stopping = True
        return time.monotonic() - self.asked


class Sharing(BackendConfig):
    """Each process sees all GPUs that the group has on its machine, as LOCAL_RANK expects."""

    backend_cls = type("SharedGpus", (Backend,), {"share_cuda_visible_devices": True})


class Trainer(DataParallelTrainer):
    """Without the actor that needs the dashboard of ray[default]: it would print a warning every second."""

    def _create_default_callbacks(self) -> list:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def trainer(config: Config, job: dict) -> Trainer:
    cluster, gpus = ray.cluster_resources(), config.gpus_per_worker
    gpus = int(cluster.get("GPU", 0) > 0) if gpus is None else gpus
    need = {"CPU": 1} | ({"GPU": 1} if gpus else {})
    low, high = workers(config)
    room = int(min(cluster.get(name, 0) for name in need))
    if room < low:
        say(f"The cluster has room for {room} of {low} workers: waiting for more machines.")
    scaling = ray.train.ScalingConfig(
        num_workers=low if low == high else (low, high),
        use_gpu=bool(gpus),
        resources_per_worker=need,
        elastic_resize_monitor_interval_s=config.resize_every,
    )
    shutil.rmtree(of_ray(config), ignore_errors=True)  # Ray cannot read what it half wrote
    run = ray.train.RunConfig(
        name=of_ray(config).name,
        storage_path=str(config.run_dir.parent),
        storage_filesystem=pyarrow.fs.LocalFileSystem(),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
        logging_config=ray.train.LoggingConfig("WARNING"),
    )
    options = {"backend_config": Sharing(), "scaling_config": scaling, "run_config": run}
    return Trainer(run_worker, train_loop_config=job, **options)


def supervise(config: Config, job: dict, stopped: list[float]) -> int:
    """Train, restarting a group that lost something; returns the exit code."""
    failures, pool = 0, ThreadPoolExecutor(1)  # in the main thread, Ray takes SIGINT over
    while True:
        group: Future = pool.submit(trainer(config, job).fit)
        while not wait([group], POLL_SECONDS).done:
            if stopped and ray.get(job["board"].stop.remote()) > ABSENT_SECONDS:
                return EXIT_STOPPED  # nothing runs: it waits for machines
        if group.exception() is None:
            return group.result().return_value
        code, what = judge(group.exception())
        if code is not None or stopped:
            return code or EXIT_STOPPED
        failures += 1
        if failures > config.max_failures >= 0:
            print(f"error: {what}: failure {failures} of {config.max_failures} allowed.", file=sys.stderr)
            return EXIT_HUNG
        say(f"{what}: starting again from the newest checkpoint (failure {failures})")
        ends = getattr(group.exception(), "worker_failures", {}).values()
        if operator.lt(*workers(config)) and not all(isinstance(end, SystemExit) for end in ends):
            wait_for_notice()


def wait_for_notice() -> None:
    """Wait until Ray has noticed that a machine is lost, if one is: it would plan an elastic group with it,
    and then wait for it.
    """
    alive = lambda: {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # noqa: E731
    had, end = alive(), time.monotonic() + NOTICE_SECONDS
    while had <= alive() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    time.sleep(COORDINATOR_SECONDS)


def judge(error: BaseException) -> tuple[int | None, str]:
    """The exit code of a group that failed, or None if another attempt may help; and what happened."""
    if isinstance(error, ray.exceptions.RayActorError):
        return None, "Ray's controller of the group was lost"
    failures = getattr(error, "worker_failures", {})
    if not failures and not hasattr(error, "preemption_info"):
        raise UserError(f"Ray cannot run the scripts ({brief(error)}): see docs/clusters.md.")
    codes = {rank: end.code for rank, end in failures.items() if isinstance(end, SystemExit)}
    what = [f"process {rank} ended with code {code}" for rank, code in codes.items()]
    for rank in failures.keys() - codes.keys():  # Ray wraps the loss of an actor, at length
        end = getattr(failures[rank], "health_check_failure", failures[rank])
        what.append(f"worker {rank} was lost ({type(end).__name__})")
    killed = len(codes) < len(failures) or any(code < 0 for code in codes.values())
    final = [code for code in codes.values() if code in FINAL]  # or a result of another's loss
    return (final[0] if final and not killed else None), "; ".join(what) or "a machine was taken away"


# The workers' side


def run_worker(job: dict) -> int:
    """Start a process of the run and watch it; returns 0 or 75, any other code ends the whole group."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray would print each report
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    active, flags = divide(job["global_batch"], job["most"], world)
    store = None
    if rank == 0 and active > 1:
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)  # as torchrun's agent keeps one
    place = ray.train.collective.broadcast_from_rank_zero(store and (host, store.port))
    process = start_script(job, flags, active, place) if rank < active else None
    if rank == active:
        print(f"{job['global_batch']} samples cannot be divided among {world}: {active} train", flush=True)
    folder, told = RunFolder(Path(job["run_dir"])), False
    while True:
        code = process.poll() if process else 0
        if code not in (None, 0, EXIT_STOPPED):
            leave(code)
        news, mine = {}, None
        if rank == 0:
            news = folder.news()
            mine = code, bool(news), ray.get(job["board"].ask.remote())
        ended, reporting, stop = ray.train.collective.broadcast_from_rank_zero(mine)
        stop = ray.train.get_preemption_info() is not None or stop  # all workers ask, each time
        if stop and not told and process:
            process.terminate()
            told = True
        if reporting:
            report(news)
        if ended is not None:
            code = process.wait(LEAVE_SECONDS) if process else ended
            return code if code in (0, EXIT_STOPPED) else leave(code)
        time.sleep(POLL_SECONDS)


def leave(code: int) -> NoReturn:
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # no traceback: the script has said why
    sys.exit(code)


def start_script(job: dict, flags: list[str], active: int, place: tuple[str, int] | None) -> subprocess.Popen:
    context = ray.train.get_context()
    rank, local = context.get_world_rank(), context.get_local_rank()
    told: dict[str, Any] = {}
    if place is not None:
        here = min(context.get_local_world_size(), active - (rank - local))
        told = {"RANK": rank, "WORLD_SIZE": active, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}
        told |= {"MASTER_ADDR": place[0], "MASTER_PORT": place[1]}
        told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    if rank == 0 and os.getpriority(os.PRIO_PROCESS, 0) >= 15:
        print("warning: Ray gives the scripts low priority: start it with RAY_worker_niceness=0", flush=True)
    environment = os.environ | job["env"] | {name: str(value) for name, value in told.items()}
    command = [sys.executable, "-c", TIED, str(os.getpid()), *job["command"], *flags]
    return subprocess.Popen(command, cwd=job["cwd"], env=environment)


class RunFolder:
    """What is new in a run folder since the last look; `step` is that of the newest metrics."""

    def __init__(self, folder: Path):
        self.folder, self.at, self.checkpoints, self.step = folder, 0, [], 0
        self.news()

    def news(self) -> dict[str, Any]:
        """The newest metrics, such as `train/loss`, with their `step`, and the path of a new `checkpoint`."""
        found: dict[str, Any] = {}
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            self.at = min(self.at, file.seek(0, os.SEEK_END))  # resuming drops lines
            file.seek(self.at)
            lines = file.read().splitlines(keepends=True)
            for line in (line for line in lines if line.endswith(b"\n")):
                self.at += len(line)
                with suppress(ValueError):
                    row = json.loads(line)
                    self.step, split = row.pop("step"), row.pop("split")
                    found["step"] = self.step
                    found |= {f"{split}/{name}": value for name, value in row.items()}
        before, self.checkpoints = self.checkpoints, completed_checkpoints(self.folder)[-1:]
        if self.checkpoints and self.checkpoints != before:
            found["checkpoint"] = str(self.checkpoints[0])
        return found


def report(news: dict[str, Any]) -> None:
    """Tell Ray; all workers call this. Ray stores only the path of our checkpoint: it is not copied."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if "checkpoint" in news:
            Path(folder, "checkpoint.json").write_text(json.dumps(news))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(news, checkpoint)


def train_func(config: dict) -> None:
    """Run a script's `main` in a Ray worker's own thread, for a TorchTrainer of your own.

        TorchTrainer(train_func, train_loop_config={"script": "/shared/train_vfp.py", "flags": [...]}, ...)

    Training is the same, bit for bit. But signals do not reach it: nothing is saved when the worker is
    stopped. Ray has changed the working directory: give absolute paths. Ray treats every end but success as a
    failure and tries again, even after an error that the user must fix, and after code 75. Lines are printed
    twice, and nothing is reported to Ray.
    """
    script = Path(config["script"])
    module = load(script)
    module.main(parse(module.Config, [str(flag) for flag in config["flags"]], script.name))


if __name__ == "__main__":
    dashes = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    cli(lambda config: main(config, sys.argv[dashes + 1 :]), Config, sys.argv[1:dashes])
