"""Policies of this project and of LeRobot on public simulators, with equal demonstrations and compute.

    python benchmarks/simulators.py                                   # the whole plan, or what is left of it
    python benchmarks/simulators.py --only pick-place:train_vfp_moe:0 push
    python benchmarks/simulators.py --report                          # only the table and the figure

Every run gets the same 50 demonstrations of a simulator's expert, the same images, and the same training time
on one core. The last checkpoint acts in the same 100 fresh episodes, in the same loop. Results are kept in
`docs/simulators.json`, so several machines or processes can share the plan, at once or in parts. The table
and the figure in `docs/benchmarks.md` are made from that file, without runs whose settings, demonstrations or
number of steps are no longer those of the plan.

Time is counted in steps. The cost of a step is measured once for all methods, in processor time of one
thread, with the methods taking turns in one process. Nothing else should run then.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import PositiveInt

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import lerobot_acts
from benchmarks.methods import count_parameters, measure_steps, training_steps
from benchmarks.simulators_report import write_report
from common.checkpoint import find
from common.config import cli, options
from common.envs.record import RECORDINGS
from common.errors import UserError
from common.files import read_json, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "simulators.json"
BUDGET = 20 * 60  # seconds of one core to train
DEMONSTRATIONS, EPISODES, BLIND = 50, 100, 40
FIRST_SEED = 3_000_000  # of the episodes: none were seen when settings were chosen; each training has its own
MAX_STEPS = {"metaworld": 300}  # several times what an expert needs; ALOHA's default is 400

TASKS = {
    "pick-place": "metaworld:pick-place-v3",
    "push": "metaworld:push-v3",
    "assembly": "metaworld:assembly-v3",
    "peg-insert-side": "metaworld:peg-insert-side-v3",
    "shelf-place": "metaworld:shelf-place-v3",
    "stick-pull": "metaworld:stick-pull-v3",
    "transfer-cube": "aloha:transfer-cube",
}
FORKS = ("train_regression", "train_two_step", "train_mean_flow")
FAST = {"optimizer_lr": 1e-4, "optimizer_lr_backbone": 1e-4}  # LeRobot's 1e-5 is for 100,000 steps
LEROBOT = {
    "act": FAST,
    "act-slow": {},
    "act-100": {"chunk_size": 100, "n_action_steps": 100, **FAST},
}  # options of LeRobot's policies that are not its defaults
DISTURBED = {"metaworld": ("--disturb", "0.03")}  # how its demonstrations are recorded
CHUNKS = {"aloha": 64}  # actions in a chunk: at 50 Hz, 16 are a third of a second
SAMPLE_STEPS = {"train_regression": (1,), "train_two_step": (2, 1)} | dict.fromkeys(LEROBOT, (1,))
OFFLINE = "--batch_size=8 --policy.push_to_hub=false --wandb.enable=false --num_workers=0 --log_freq=100000"


class Job(NamedTuple):
    """One run of the plan."""

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return ":".join(map(str, self))


def plan() -> list[Job]:
    """All runs of the benchmark, the most informative first."""
    main = ("train_naive_fm", "train_vfp_moe", "act", "train_cfg_vqvae", "train_regression")
    jobs = [Job(task, method, 0) for task in ("pick-place", "push") for method in main]
    jobs += [Job(task, method, 0) for task in list(TASKS)[2:] for method in main[:3]]
    others = ("train_vfp", "train_two_step", "train_mean_flow", "act-slow", "act-100")
    jobs += [Job("pick-place", method, 0) for method in others]
    return jobs + [Job(task, m, seed) for seed in (1, 2) for task in ("pick-place", "push") for m in main]


@options
class Config:
    """Train and evaluate the missing runs of the plan, and write the report."""

    only: tuple[str, ...] = ()
    """Runs to make, as TASK:METHOD:SEED or its first parts, in this order; default: the whole plan."""
    jobs: PositiveInt = 1
    """Runs at once, each on one core."""
    report: bool = False
    """Only write the report, from existing results."""
    measure: bool = False
    """Measure again the cost of each method's step. Results with other numbers of steps no longer count."""
    runs: Path = ROOT / "runs" / "simulators"
    """Folder of demonstrations and runs."""


def main(config: Config) -> None:
    jobs = [job for prefix in config.only or ("",) for job in plan() if is_part(prefix, job)]
    jobs = list(dict.fromkeys(jobs))
    if not jobs:
        raise UserError(f"--only {' '.join(config.only)} names no run of the plan, such as {plan()[0].name}.")
    if config.report:
        return report(config.runs)
    for task in dict.fromkeys(job.task for job in jobs):
        record(task, config.runs)
    measure(list(dict.fromkeys(map(kind_of, jobs))), config.runs, again=config.measure)
    pool = ThreadPoolExecutor(config.jobs)
    waiting = [pool.submit(make, job, config.runs) for job in jobs]
    try:
        for done in as_completed(waiting):
            done.result()
    finally:  # after an error or Ctrl-C, what has begun ends, and nothing else begins
        pool.shutdown(cancel_futures=True)
        report(config.runs)


def report(runs: Path) -> None:
    """Write the report from the results that were made with the present settings."""
    results, current = read(), {}
    for name, found in results["runs"].items():
        job = next((job for job in plan() if job.name == name), None)
        if job is not None and found["made_with"] == settings(job, runs, found["made_with"]):
            current[name] = found
    if outdated := sorted(results["runs"].keys() - current.keys()):
        print(f"left out, made with other settings: {', '.join(outdated)}", flush=True)
    write_report(results | {"runs": current}, plan(), ROOT / "docs")


def is_part(prefix: str, job: Job) -> bool:
    return not prefix or f"{job.name}:".startswith(f"{prefix}:")


def kind_of(job: Job) -> str:
    """What a step's cost depends on: the method and the simulator, which sets the number of cameras."""
    return f"{simulator_of(job.task)}:{job.method}"


def simulator_of(task: str) -> str:
    return TASKS[task].partition(":")[0]


def recording(task: str) -> int:
    return RECORDINGS[simulator_of(task)]


def disturbed(task: str) -> list[str]:
    """Flags of common/envs/record.py."""
    return list(DISTURBED.get(simulator_of(task), ()))


def flags_of(simulator: str) -> list[str]:
    """Flags of our scripts that a simulator needs beside configs/METHOD/simulators.json."""
    # Longer chunks cost more, hence fewer draws of the flow time.
    return ["--horizon", str(CHUNKS[simulator]), "--flow-samples", "2"] if simulator in CHUNKS else []


def lerobot_options(method: str, simulator: str) -> dict:
    """Options of one of LeRobot's policies; its chunks are as ours where it does not say otherwise."""
    chunk = CHUNKS.get(simulator, 16)
    return {"chunk_size": chunk, "n_action_steps": chunk // 2, **LEROBOT[method]}


# Results, shared by several processes


def read() -> dict:
    if not RESULTS.is_file():
        return {"seconds": {}, "runs": {}}
    return json.loads(RESULTS.read_text())


@contextmanager
def changing() -> Iterator[dict]:
    """The results, locked so that one process at a time changes them."""
    with open(RESULTS.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read()
        yield results
        write_json(RESULTS, results)


# Demonstrations, training, acting


def record(task: str, runs: Path) -> None:
    """Record the demonstrations of a task; they depend only on the seed."""
    folder = data_of(task, runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(runs / "data" / f"{task}.lock"):
        if not (folder / "meta" / "info.json").is_file():
            own = [TASKS[task], folder, "--episodes", DEMONSTRATIONS, *disturbed(task)]
            call([sys.executable, "-m", "common.envs.record", *own])


def data_of(task: str, runs: Path) -> Path:
    return runs / "data" / f"{task}-{recording(task)}{''.join(disturbed(task))}"


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[int]:
    """Keep other processes from holding the same file; gives its descriptor, for children that hold it, too.

    Raises BlockingIOError without `wait`, if another process holds it.
    """
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield lock.fileno()


def train_command(job: Job, runs: Path, folder: Path, steps: int) -> list:
    data = data_of(job.task, runs)
    if job.method in LEROBOT:
        return [
            Path(sys.executable).parent / "lerobot-train",
            f"--policy.path={folder.with_name(f'{folder.name}-begun')}",
            f"--dataset.repo_id=local/{job.task}",
            f"--dataset.root={data}",
            f"--output_dir={folder}",
            f"--steps={steps}",
            f"--save_freq={steps}",
            f"--seed={job.seed}",
            *OFFLINE.split(),
        ]
    place = "examples/" if job.method in FORKS else ""
    return [
        sys.executable,
        f"{place}{job.method}.py",
        *("--config", f"configs/{job.method}/simulators.json"),
        *flags_of(simulator_of(job.task)),
        *("--dataset", data, "--run-dir", folder, "--steps", steps, "--seed", job.seed),
        *("--eval-every", steps, "--save-every", 1000),
    ]


def measure(kinds: list[str], runs: Path, again: bool = False) -> None:
    """Processor seconds of a training step of each kind that is missing, or, `again`, of all known ones, too.

    The kinds take turns. Missing ones are measured beside a known one and scaled by what that one costs now:
    what is known stays, since runs were made with it.
    """
    with changing() as results:
        known = results["seconds"]
        missing = [kind for kind in kinds if kind not in known]
        beside = next(iter(known), None)
        kinds = list(dict.fromkeys([*kinds, *known])) if again else [*missing, *([beside] if beside else [])]
        if again or missing:
            loops = {}
            for kind in kinds:
                simulator, method = kind.split(":")
                task = next(task for task, env in TASKS.items() if env.startswith(simulator))
                record(task, runs)
                data = data_of(task, runs)
                if method in LEROBOT:
                    loops[kind] = lerobot_acts.training_steps(data, lerobot_options(method, simulator))
                else:
                    flags = ["--dataset", str(data), *flags_of(simulator)]
                    loops[kind] = training_steps(f"{method}:simulators", *flags)
            found = measure_steps(loops)
            scale = 1 if again or not beside else known[beside] / found[beside]
            known |= {kind: scale * seconds for kind, seconds in found.items()}
            print(f"seconds a step: {known}", flush=True)


def settings(job: Job, runs: Path, known: dict | None = None) -> dict:
    """All that a result depends on, but the code and the machine.

    Where the demonstrations are not on this machine, they are those of the `known` settings.
    """
    ours = ROOT / "configs" / job.method / "simulators.json"
    simulator, own = simulator_of(job.task), {}
    if job.method in LEROBOT:
        config = lerobot_options(job.method, simulator)
    else:
        config = json.loads(ours.read_text())
        own = {"flags": flags_of(simulator)} if simulator in CHUNKS else {}
    if simulator in DISTURBED:
        own["recorded"] = disturbed(job.task)
    data = data_of(job.task, runs)
    seconds = read()["seconds"].get(kind_of(job))
    frames = (known or {}).get("demonstrations", [0])[0]
    if data.exists():
        frames = read_json(data / "meta" / "info.json")["total_frames"]
    found = {
        "config": config,
        "env": TASKS[job.task],
        "demonstrations": [frames, recording(job.task)],
        "steps": seconds and int(BUDGET / seconds),
        "episodes": [EPISODES, BLIND],
        "first_episode": FIRST_SEED + 1000 * job.seed,
        "max_steps": MAX_STEPS.get(simulator),
        **own,
    }
    return json.loads(json.dumps(found))


def make(job: Job, runs: Path) -> None:
    """Train and evaluate a run, unless there is a result with these settings, or another process does it.

    If interrupted, our runs resume; LeRobot's start again.
    """
    made_with = settings(job, runs)
    number = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:8]
    folder = runs / f"{job.name.replace(':', '-')}-{number}"  # what other settings made is never taken up
    try:
        with held(folder.with_suffix(".lock"), wait=False) as lock:
            if read()["runs"].get(job.name, {}).get("made_with") != made_with:
                make_alone(job, runs, folder, made_with, lock)
    except BlockingIOError:
        print(f"{job.name}: another process makes it", flush=True)


def make_alone(job: Job, runs: Path, folder: Path, made_with: dict, lock: int) -> None:
    """Train and evaluate a run; its processes hold the `lock` as long as they live."""
    steps, data, started = made_with["steps"], data_of(job.task, runs), time.time()
    command = train_command(job, runs, folder, steps)
    if job.method in LEROBOT:
        ours = [sys.executable, __file__.replace("simulators.py", "lerobot_acts.py")]
        last = folder / "checkpoints" / "last"
        if not (last.exists() and int(last.resolve().name) == steps):
            shutil.rmtree(folder, ignore_errors=True)  # saves only at its end, refuses an existing folder
            begun = folder.with_name(f"{folder.name}-begun")
            shutil.rmtree(begun, ignore_errors=True)
            lerobot_acts.begin(data, made_with["config"], job.seed, begun)
            call(command, lock)
        command = [*ours, folder, "--dataset", data]
    else:
        call([*command, "--resume", "auto"], lock)
        command = [sys.executable, "evaluate.py", folder]
    sample_steps = SAMPLE_STEPS.get(job.method, (10, 2, 1))
    flags = ["--env", TASKS[job.task], "--episodes", EPISODES, "--blind-episodes", BLIND]
    flags += ["--seed", made_with["first_episode"]]
    if most := made_with["max_steps"]:
        flags += ["--max-steps", most]
    call([*command, *flags, "--sample-steps", *sample_steps], lock)
    found = json.loads((folder / "evaluation" / "results.json").read_text())
    parameters = found["parameters"] if job.method in LEROBOT else count_parameters(find(folder) / "policy")
    with changing() as results:
        results["runs"][job.name] = {
            "made_with": made_with,
            "steps": steps,
            "seconds_a_step": results["seconds"][kind_of(job)],
            "parameters": parameters,
            "closed_loop": found["closed_loop"],
        }
    print(f"{job.name}: {steps} steps, {(time.time() - started) / 60:.0f} min", flush=True)


def call(command: list, lock: int | None = None) -> None:
    """Run a command on one core, which holds a lock, too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": ROOT, "env": environment, "pass_fds": () if lock is None else (lock,)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command[1:4]))} failed: {done.stderr.strip()[-1500:]}")


if __name__ == "__main__":
    cli(main, Config)
