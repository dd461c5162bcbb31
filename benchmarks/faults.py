"""Do runs survive faults? Runs are killed, stopped, starved of disk space and damaged, then compared.

    python benchmarks/faults.py                                # about a quarter of an hour on two cores
    python benchmarks/faults.py --kills 3 --stops 2 --damages 10 --full-disks 2

Every run is resumed with its original command line (`--resume auto`) until it is done. Then its weights,
averages, optimizer, random generators and metrics must equal those of an undisturbed run, bit for bit. A run
counts as lost if it cannot be finished this way, and as different if it ends with other results. Children
are forked from one process that has imported everything, so that faults hit training, not imports.
"""

import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_cfg_vqvae
import train_mi
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common import checkpoint
from common.config import cli, flat_options, options
from common.data import demo
from common.errors import EXIT_HUNG, EXIT_STOPPED
from common.files import completed_checkpoints

ROOT = Path(__file__).parents[1]
CLOCKS = ("samples_per_s", "steps_per_s", "data_wait_share", "memory_gb", "elapsed_s", "eta_s")
SMALL = [
    *("--horizon", 4, "--d-model", 16, "--num-heads", 2, "--encoder-layers", 1, "--decoder-layers", 1),
    *("--flow-samples", 2, "--batch-size", 4, "--num-codes", 4, "--latent-dim", 4, "--posterior-layers", 1),
    *("--code-window", 3, "--ingest-workers", 1, "--eval-samples", 8, "--sample-steps", 2),
    *("--depth-weights", "random", "--depth-model", "small", "--num-experts", 2),
]
UNLIKE = ("checksums.json", "policy.json")  # differ: the second names the run's folder
RHYTHM = ["--save-every", 4, "--log-every", 3, "--eval-every", 25, "--hang-timeout", 60]


@options
class Config:
    """Disturb runs and check whether anything is lost."""

    kills: int = 50
    """Times that a run is killed (SIGKILL), a third of them while it saves."""
    stops: int = 20
    """Times that a run of two processes is stopped (SIGTERM)."""
    damages: int = 200
    """Times that a file of the newest checkpoint is truncated or changed."""
    full_disks: int = 20
    """Times that the disk is full for a while."""
    ray_kills: int = 10
    """Times that a script, an actor and a machine of a group on Ray are killed; skipped without Ray."""
    steps: int = 120
    """Steps of a run."""
    seed: int = 0
    """Seed of what happens when."""


def main(config: Config) -> None:
    warnings.filterwarnings("ignore", message=".*use of fork.*")  # its threads hold no lock a child needs
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    random.seed(config.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        folder = Path(folder)
        demo.record(folder / "data", demo.demonstrate(10, seed=1))
        flags = ["--dataset", folder / "data", "--cache-dir", folder / "cache", *SMALL, *RHYTHM]
        flags += ["--steps", config.steps]
        table = [
            ("killed (SIGKILL)", config.kills, killed(config, folder, flags)),
            ("two processes stopped (SIGTERM)", config.stops, stopped(config, folder, flags)),
            ("every script, two processes, stopped", 6, every_script(folder, flags)),
            ("file damaged", config.damages, damaged(config, folder, flags)),
            ("disk full", config.full_disks, full_disk(config, folder, flags)),
            ("one of two processes killed", 3, process_lost(folder, flags)),
            ("loading process killed", 3, worker_lost(folder, flags)),
            ("loss not finite", 3, bad_numbers(folder, flags)),
            ("clock jumps", 1, clock_jumps(folder, flags)),
        ]
        if config.ray_kills and importlib.util.find_spec("ray"):
            with machines() as nodes:
                for what in ("script", "actor", "machine"):
                    found = killed_on_ray(what, nodes, config, folder, flags)
                    table.append((f"two workers on Ray, {what} killed", config.ray_kills, found))
    print("\n| what happens | times | runs | lost | different | |\n| --- | --- | --- | --- | --- | --- |")
    for what, times, found in table:
        rest = found.keys() - {"runs", "lost", "different"}
        more = ", ".join(f"{name}: {found[name]}" for name in sorted(rest))
        print(f"| {what} | {times} | {found['runs']} | {found['lost']} | {found['different']} | {more} |")


# -- running


def fork(
    script, flags: list, rank: int = 0, world: int = 1, port: int = 0, before: Callable | None = None
) -> int:
    """Start a script in a child process; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = flags[flags.index("--run-dir") + 1].with_suffix(f".{rank}.log")
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in told.items()}
        if before is not None:
            before()
        cli(script.main, script.Config, list(map(str, flags)))
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def command(script, run_dir: Path, flags: list) -> list:
    """The flags of a run, without those that its script does not know."""
    known, kept = flat_options(script.Config()).keys(), []
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        if name[2:].replace("-", "_") in known:
            kept += [name, value]
    return [*kept, "--run-dir", run_dir, "--resume", "auto"]


def wait(child: int, seconds: float = 300.0) -> int:
    """Exit code of a child, negative for a signal; kills it if it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def alive(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def undisturbed(script, folder: Path, flags: list, world: int = 1) -> Path:
    """The folder of a run that nothing disturbs."""
    run_dir = folder / f"alone-{script.__name__}-{world}"
    if not run_dir.exists():
        codes = together(script, command(script, run_dir, flags), world)
        if any(codes):
            sys.exit(f"an undisturbed run failed: {run_dir.with_suffix('.0.log').read_text()[-2000:]}")
    return run_dir


def together(
    script, flags: list, world: int, meanwhile: Callable[[list[int]], None] | None = None
) -> list[int]:
    """Run a script in `world` processes; returns their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = [fork(script, flags, rank, world, port) for rank in range(world)]
    if meanwhile is not None:
        meanwhile(children)
    return [wait(child) for child in children]


# -- comparing


def same(one: Path, other: Path, steps: int) -> bool:
    """Whether two runs ended the same: everything that is saved, and every line of metrics."""
    name = f"checkpoints/step_{steps:07d}"
    files = [path for path in sorted((other / name).rglob("*")) if path.is_file()]
    return metrics(one) == metrics(other) and all(
        same_file(path, one / path.relative_to(other)) for path in files if path.name not in UNLIKE
    )


def same_file(file: Path, twin: Path) -> bool:
    if file.suffix == ".safetensors":
        return equal(load_file(file), load_file(twin))
    if file.suffix in (".bin", ".pkl"):  # written by these runs themselves
        return equal(*(torch.load(path, weights_only=False) for path in (file, twin)))
    return file.read_bytes() == twin.read_bytes()


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics, without those that depend on a clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def judge(found: Counter, run_dir: Path, alone: Path, steps: int) -> None:
    found["runs"] += 1
    if not (run_dir / "checkpoints" / f"step_{steps:07d}").is_dir():
        found["lost"] += 1
        print(run_dir.with_suffix(".0.log").read_text()[-1500:])
    elif not same(run_dir, alone, steps):
        found["different"] += 1


# -- what happens


def killed(config: Config, folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    scripts = [train_vfp, train_cfg_vqvae]
    kills = 0
    while kills < config.kills:
        script = scripts[found["runs"] % 2]
        alone = undisturbed(script, folder, flags)
        run_dir = folder / f"killed-{found['runs']}"
        for _ in range(1000):
            child = fork(script, command(script, run_dir, flags))
            if kills < config.kills and kill_at_random(child, run_dir, found, saving=kills % 3 == 0):
                kills += 1
            code = wait(child)
            if code != -signal.SIGKILL:
                break
        judge(found, run_dir, alone, config.steps)
        print(f"{kills} of {config.kills} kills, {dict(found)}", flush=True)
    return found


def kill_at_random(child: int, run_dir: Path, found: Counter, saving: bool) -> bool:
    """Kill a process at a random moment, or while it saves; returns whether it was still alive."""
    if saving:
        pause = random.uniform(0, 0.05)
        checkpoints = run_dir / "checkpoints"
        had = set(checkpoints.glob(".*.unfinished"))
        skip = random.randrange(3)  # checkpoints to let pass first
        while alive(child):
            now = set(checkpoints.glob(".*.unfinished"))
            if now - had:
                if skip == 0:
                    time.sleep(pause)
                    break
                skip -= 1
            had = now
    else:
        end = time.monotonic() + random.uniform(0, 4)
        while alive(child) and time.monotonic() < end:
            time.sleep(0.002)
    if not alive(child):
        return False
    os.kill(child, signal.SIGKILL)
    found["while saving"] += bool(list((run_dir / "checkpoints").glob(".*.unfinished")))
    return True


def stopped(config: Config, folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags, world=2)
    stops = 0

    def stop(children: list[int]) -> None:
        nonlocal stops
        # Wait for the first step: before it, a process ends at once, having done nothing.
        lines = run_dir / "metrics.jsonl"
        size = lines.stat().st_size if lines.exists() else 0
        while all(map(alive, children)) and (not lines.exists() or lines.stat().st_size <= size):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        if all(map(alive, children)):
            for child in random.sample(children, 2):
                os.kill(child, signal.SIGTERM)
                time.sleep(random.choice([0.0, 0.2]))
            stops += 1

    while stops < config.stops:
        run_dir = folder / f"stopped-{found['runs']}"
        for _ in range(1000):
            meanwhile = stop if stops < config.stops else None
            codes = together(train_vfp, command(train_vfp, run_dir, flags), 2, meanwhile)
            if not any(codes):
                break
            found["saved and exited with code 75"] += set(codes) == {EXIT_STOPPED}
        judge(found, run_dir, alone, config.steps)
        print(f"{stops} of {config.stops} stops, {dict(found)}", flush=True)
    return found


def every_script(folder: Path, flags: list) -> Counter:
    """Each of the six scripts, in two processes: stopped once, then resumed."""
    found = Counter(runs=0, lost=0, different=0)
    steps = 30
    flags = [*flags, "--steps", steps]  # of two, the later one counts
    for script in (train_naive_fm, train_vfp, train_vfp_depth, train_cfg_vqvae, train_vfp_moe, train_mi):
        home = folder / "every"
        home.mkdir(exist_ok=True)
        alone, run_dir = undisturbed(script, home, flags, world=2), home / f"stopped-{script.__name__}"

        def stop(children: list[int], run_dir=run_dir) -> None:
            while all(map(alive, children)) and not (run_dir / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            for child in filter(alive, children):
                os.kill(child, signal.SIGTERM)

        codes = together(script, command(script, run_dir, flags), 2, stop)
        found["saved and exited with code 75"] += set(codes) == {EXIT_STOPPED}
        together(script, command(script, run_dir, flags), 2)
        judge(found, run_dir, alone, steps)
        print(f"{script.__name__}, two processes: {dict(found)}", flush=True)
    return found


def damaged(config: Config, folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags)
    steps = flags[flags.index("--steps") + 1]
    ends = [checkpoint.find(alone, str(step)).name for step in (steps - 4, steps)]
    for n in range(config.damages):
        run_dir = folder / f"damaged-{n}"
        shutil.copytree(alone, run_dir, symlinks=True)
        newest = run_dir / "checkpoints" / ends[1]
        file = random.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
        content = bytearray(file.read_bytes())
        if random.random() < 0.5:
            content = content[: random.randrange(len(content))]
        else:
            for _ in range(random.choice([1, 1, 8])):
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
        found["found by checksum"] += checkpoint.damage(newest) is not None
        code = wait(fork(train_vfp, command(train_vfp, run_dir, flags)))
        if code:
            shutil.rmtree(newest)
        judge(found, run_dir, alone, config.steps)
        shutil.rmtree(run_dir)
        if n % 20 == 19:
            print(f"{n + 1} of {config.damages} damages, {dict(found)}", flush=True)
    return found


def full_disk(config: Config, folder: Path, flags: list) -> Counter:
    """Fill a small file system for a while; where none can be mounted, limit file sizes instead."""
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags)
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", small]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    print("a file system is filled" if mounted else "file sizes are limited")
    times = 0
    try:
        while times < config.full_disks:
            run_dir = small / f"full-{found['runs']}"
            child = fork(train_vfp, [*command(train_vfp, run_dir, flags)])
            while times < config.full_disks and alive(child):
                time.sleep(random.uniform(0.3, 1.2))
                if not (run_dir / "metrics.jsonl").exists():
                    continue  # a run that cannot even start says so; that is not tested here
                if mounted:
                    filler = small / "filler"
                    with suppress(OSError), filler.open("wb", buffering=0) as file:
                        while file.write(bytes(2**16)):
                            pass
                    time.sleep(random.uniform(0.1, 0.8))
                    filler.unlink(missing_ok=True)
                else:
                    limits = resource.prlimit(child, resource.RLIMIT_FSIZE)
                    resource.prlimit(child, resource.RLIMIT_FSIZE, (4096, limits[1]))
                    time.sleep(random.uniform(0.1, 0.8))
                    resource.prlimit(child, resource.RLIMIT_FSIZE, limits)
                times += 1
            for _ in range(3):
                if wait(child) == 0:
                    break
                child = fork(train_vfp, command(train_vfp, run_dir, flags))  # disk was full at its last step
            log = run_dir.with_suffix(".0.log")
            found["checkpoints skipped"] += log.read_text().count("is not saved (")
            judge(found, run_dir, alone, config.steps)
            shutil.rmtree(run_dir)
            print(f"{times} of {config.full_disks} full disks, {dict(found)}", flush=True)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", small], check=False)
    return found


def process_lost(folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags, world=2)
    for n in range(3):
        run_dir = folder / f"lost-{n}"

        def kill_one(children: list[int], run_dir=run_dir) -> None:
            while all(map(alive, children)) and not (run_dir / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1.5))
            os.kill(children[1], signal.SIGKILL)

        started = time.monotonic()
        codes = together(train_vfp, command(train_vfp, run_dir, flags), 2, kill_one)
        found["the other exited with code 70"] += codes[0] == EXIT_HUNG
        found["seconds, the slowest"] = max(found["seconds, the slowest"], round(time.monotonic() - started))
        together(train_vfp, command(train_vfp, run_dir, flags), 2)
        judge(found, run_dir, alone, flags[flags.index("--steps") + 1])
    return found


def worker_lost(folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags)
    for n in range(3):
        run_dir = folder / f"worker-{n}"
        child = fork(train_vfp, command(train_vfp, run_dir, [*flags, "--num-workers", 1]))
        while alive(child) and not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1))
        for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        found["exited with code 70"] += wait(child) == EXIT_HUNG
        wait(fork(train_vfp, command(train_vfp, run_dir, [*flags, "--num-workers", 1])))
        judge(found, run_dir, alone, flags[flags.index("--steps") + 1])
    return found


def bad_numbers(folder: Path, flags: list) -> Counter:
    """The loss is NaN in ten random steps: the run must end with finite weights and have counted all ten."""
    found = Counter(runs=0, lost=0, different=0)
    steps = flags[flags.index("--steps") + 1]
    for n in range(3):
        run_dir = folder / f"bad-{n}"
        bad = set(random.sample(range(steps), 10))

        def spoil(bad=bad) -> None:
            original, seen = train_vfp.compute_loss, [-1]

            def compute_loss(*args, train, **options):
                loss, parts = original(*args, train=train, **options)
                seen[0] += train
                return loss * (math.nan if train and seen[0] in bad else 1.0), parts

            train_vfp.compute_loss = compute_loss

        code = wait(fork(train_vfp, command(train_vfp, run_dir, flags), before=spoil))
        found["runs"] += 1
        found["lost"] += code != 0
        counted = sum(row.get("bad_steps", 0) for row in metrics(run_dir))
        weights = load_file(run_dir / "checkpoints" / "last" / "state" / "model.safetensors")
        found["different"] += counted != 10 or not all(value.isfinite().all() for value in weights.values())
        found["steps skipped"] += counted
    return found


def clock_jumps(folder: Path, flags: list) -> Counter:
    found = Counter(runs=0, lost=0, different=0)
    alone = undisturbed(train_vfp, folder, flags)
    run_dir = folder / "clock"

    def jump() -> None:
        original = time.time
        time.time = lambda: original() + random.choice([-1e8, -3600, 0, 3600, 1e8])

    wait(fork(train_vfp, command(train_vfp, run_dir, flags), before=jump))
    judge(found, run_dir, alone, flags[flags.index("--steps") + 1])
    return found


# -- on Ray


class Machines:
    """A Ray cluster of virtual machines with one processor each; the first has none and runs the launcher."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster, self.nodes = Cluster(initialize_head=True, head_node_args=head), []
        self.address = self.cluster.address

    def have(self, number: int) -> None:
        """Add machines, or kill the newest ones, until there are `number`."""
        while len(self.nodes) < number:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        while len(self.nodes) > number:
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def settle(self) -> None:
        """Wait until Ray knows which machines there are: the loss of one takes it up to half a minute."""
        self.cluster.wait_for_nodes(120)


@contextmanager
def machines() -> Iterator[Machines]:
    """A cluster that is shut down afterwards. Ray's time limits are raised, for busy machines."""
    patient = {"raylet_start_wait_time_s": 600, "agent_register_timeout_ms": 600_000, "worker_niceness": 0}
    os.environ.update({f"RAY_{name}": str(value) for name, value in patient.items()})
    made = Machines()
    try:
        yield made
    finally:
        made.cluster.shutdown()


def launcher(address: str, workers: int | str, script: Path, run_dir: Path | str, flags: list, *more) -> list:
    """Command line that runs a script on Ray; `more` are options for the launcher."""
    own = ["--address", address, "--num-workers", workers, *more, script, "--run-dir", run_dir]
    return list(map(str, [sys.executable, ROOT / "launch_ray.py", *own, "--", *flags]))


def scripts_of(run_dir: Path) -> list[int]:
    """Ids of the processes that Ray's actors started for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(run_dir).encode() in words and not any(word.endswith(b"_ray.py") for word in words):
                found.append(int(path.parent.name))
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


RAY_SECONDS = 1800.0  # more than any of these runs takes


def killed_on_ray(what: str, nodes: Machines, config: Config, folder: Path, flags: list) -> Counter:
    """A group of two loses a script, an actor or a machine at random moments, and must recover on its own."""
    found = Counter(runs=0, lost=0, different=0)
    alone, kills = undisturbed(train_vfp, folder, flags, world=2), 0
    while kills < config.ray_kills:
        run_dir = folder / f"ray-{what}-{found['runs']}"
        own = command(train_vfp, run_dir, flags)[:-4]  # the launcher adds --run-dir and --resume
        start = launcher(nodes.address, 2, ROOT / "train_vfp.py", run_dir, own, "--max-failures", -1)
        nodes.have(2)
        with run_dir.with_suffix(".0.log").open("w") as log:
            process = subprocess.Popen(start, stdout=log, stderr=log)
        used, end = None, time.monotonic() + RAY_SECONDS
        while process.poll() is None:
            children, newest = scripts_of(run_dir), completed_checkpoints(run_dir)[-1:]
            if kills < config.ray_kills and len(children) == 2 and newest not in ([], used):
                time.sleep(random.uniform(0, 2))
                killed = kill_part(what, nodes, children, found)
                kills, used = kills + killed, newest if killed else used
                nodes.have(2)
            time.sleep(0.2)
            if time.monotonic() > end:
                process.kill()
                process.wait()
        found["ended with code 0"] += process.returncode == 0
        judge(found, run_dir, alone, config.steps)
        print(f"{what} on Ray: {kills} of {config.ray_kills} kills, {dict(found)}", flush=True)
    return found


def kill_part(what: str, nodes: Machines, children: list[int], found: Counter) -> bool:
    """Kill one of two scripts, its actor, or its machine; returns whether it was still there."""
    child = random.choice(children)
    try:
        parents = {child: parent(child) for child in children}
        if what == "machine":
            nodes.have(1)
        else:
            os.kill(parent(child) if what == "actor" else child, signal.SIGKILL)
    except OSError:
        return False
    time.sleep(2)
    found["scripts that outlived it by 2 s"] += len(orphans(parents))
    return True


def orphans(parents: dict[int, int]) -> list[int]:
    """Those of these processes, with the ids of their parents, that have outlived them."""
    found = []
    for process, had in parents.items():
        with suppress(OSError):
            dead = not Path(f"/proc/{process}/cmdline").read_bytes()  # but nobody has asked how it ended
            if not dead and parent(process) != had:
                found.append(process)
    return found


def actors(name: str) -> list[int]:
    """Ids of the processes of Ray's actors of a class."""
    found = subprocess.run(["pgrep", "-f", f"^ray::{name}"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


if __name__ == "__main__":
    cli(main, Config)
