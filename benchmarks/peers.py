"""Compare training with LeRobot's: samples per second, time to the first step, memory, on the same data.

    python benchmarks/peers.py                                     # 70 minutes on two idle cores
    python benchmarks/peers.py --rounds 1 --steps 8 --warm-up 2 --episodes 2 --length 40 --out /tmp

`lerobot-train` with ACT, diffusion and multi-task DiT (flow matching) and our scripts take turns, each in its
own process. All learn from one LeRobot dataset, recorded here by LeRobot's own writer: three cameras at
480x640 as video. Networks see 96x128 (CLIP, which takes squares: 112x112) and one observation, and predict
16 actions. Sizes are matched, see `benchmarks/matched.py`; the table lists parameters and arithmetic. Each
turn starts twice: cold, with nothing cached of the dataset, so that ours decode all of it once; then warm.
Speeds are those of the second start.

Needs the packages of requirements-bench.txt. Finished turns are not repeated: delete the results to start
over. Medians over rounds are written to `docs/performance.md`. Nothing else should run on the machine.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import NonNegativeInt, PositiveInt

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import matched
from benchmarks.loader import record
from benchmarks.matched import CAMERAS, PARTNERS, Group
from benchmarks.methods import config_file, insert, label, script_of
from common.config import UserPath, cli, options
from common.data.workers import cores
from common.errors import UserError
from common.files import write_json

ROOT = Path(__file__).parents[1]
RECORDED, SEEN = (480, 640), (96, 128)
NAMES = {"act": "ACT", "diffusion": "diffusion", "multi_task_dit": "multi-task DiT"}
OFFLINE = "--policy.push_to_hub=false --policy.device=cpu --wandb.enable=false"


@options
class Config:
    """Train with LeRobot and with our scripts, taking turns, and compare the costs."""

    groups: tuple[Group, ...] = get_args(Group)
    """Sizes to compare: see benchmarks/matched.py."""
    methods: tuple[str, ...] = ("train_naive_fm", "train_vfp", "train_vfp_moe")
    """Our scripts, without .py."""
    peers: tuple[str, ...] = tuple(PARTNERS)
    """LeRobot's policies."""
    rounds: PositiveInt = 3
    """Turns of each."""
    steps: PositiveInt = 60
    """Training steps of a turn."""
    warm_up: NonNegativeInt = 10
    """First steps that do not count for the speed."""
    batch_size: PositiveInt = 8
    """Samples per step; LeRobot's default."""
    workers: PositiveInt = cores()
    """Loading processes of LeRobot (its own default is 4); ours gather in the training process."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """LeRobot's decoder; its own default is torchcodec where the system has FFmpeg for it."""
    episodes: PositiveInt = 8
    """Recorded episodes."""
    length: PositiveInt = 150
    """Steps of an episode."""
    runs: UserPath = ROOT / "runs" / "peers"
    """Folder of the dataset, the turns and their results."""
    out: UserPath = ROOT / "docs"
    """Folder of performance.md."""


class Turn(NamedTuple):
    """Measurements of one process."""

    first: float
    """Seconds from launch to the end of the first step."""
    last: float
    """Seconds from launch to the end of the last step."""
    steps: list[tuple[float, float]]
    """Per step, from the program's own log: its seconds, and the seconds of them spent waiting for data."""
    largest_gib: float
    """Peak resident memory of the largest process."""
    all_gib: float
    """Peak memory of all processes together, without mapped files, which they can share."""


def main(config: Config) -> None:
    if config.warm_up >= config.steps:
        raise UserError(f"--warm-up {config.warm_up} leaves none of {config.steps} --steps: raise --steps.")
    data = config.runs / f"data-{config.episodes}-{config.length}"
    if not data.is_dir():
        unfinished = data.with_suffix(".recording")
        shutil.rmtree(unfinished, ignore_errors=True)
        record(unfinished, CAMERAS, *RECORDED, config.episodes * config.length, config.episodes).rename(data)
    path = config.runs / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for group in config.groups:
        for name in (*config.peers, *config.methods):
            if f"{group}:{name}" not in results:
                results[f"{group}:{name}"] = describe(group, name, config)
                write_json(path, results)
    for setting in settings(config):
        for key, found in results.items():
            group, name = key.split(":")
            wanted = group in config.groups and name in (*config.peers, *config.methods)
            if wanted and setting not in found["turns"]:
                found["turns"][setting] = take_turn(group, name, found["options"], data, config)
                write_json(path, results)
                print(f"{key}, {setting}: {found['turns'][setting]}", flush=True)
    text = report(results, config)
    print(text)
    insert(config.out / "performance.md", text, "Compared with LeRobot")


def settings(config: Config) -> list[str]:
    """Names of the rounds, with the options that affect results: turns with other options are not reused."""
    asked = (config.steps, config.warm_up, config.batch_size, config.episodes, config.length)
    asked += (config.workers, config.decoder)
    return [":".join(map(str, (number, *asked))) for number in range(config.rounds)]


def describe(group: Group, name: str, config: Config) -> dict:
    """Parameters, arithmetic per sample, and LeRobot's options for a policy of that size."""
    clips = config.runs / "clip"
    if name in PARTNERS:
        target = matched.parameters(matched.ours(PARTNERS[name], group, SEEN).model)
        chosen = matched.match(name, group, target, SEEN, clips)
        found = matched.peer(name, chosen, SEEN)
        model, step = found.model, matched.their_step(found, name, SEEN, config.batch_size)
    else:
        policy, chosen = matched.ours(name, group, SEEN), {}
        model, step = policy.model, matched.our_step(policy, config.batch_size)
    flops = matched.flops(step) / config.batch_size
    return {"parameters": matched.parameters(model), "flops": flops, "options": chosen, "turns": {}}


def command(group: Group, name: str, chosen: dict, data: Path, run: Path, steps: int, config: Config) -> list:
    """The command with which a user would train it."""
    if name not in PARTNERS:
        file = config_file(name)
        return [
            *(sys.executable, script_of(name), "--config", file, "--dataset", data, "--backbone", group),
            *("--image-size", *SEEN, "--val-fraction", 0, "--batch-size", config.batch_size),
            *("--steps", steps, "--save-every", steps, "--log-every", 1, "--run-dir", run),
        ]
    height, width = matched.seen(name, SEEN)
    # Resizing in the loading processes is cheapest.
    resize = {"weight": 1.0, "type": "Resize", "kwargs": {"size": [height, width]}}
    told = {"dataset.image_transforms.enable": True, "dataset.image_transforms.tfs": {"resize": resize}}
    told |= {"dataset.repo_id": "local/peers", "dataset.root": data, "output_dir": run, "steps": steps}
    told |= {"batch_size": config.batch_size, "num_workers": config.workers, "log_freq": 1}
    told["dataset.video_backend"] = config.decoder
    told |= {"policy.type": name, **{f"policy.{key}": value for key, value in chosen.items()}}
    flags = [f"--{key}={as_flag(value)}" for key, value in told.items()]
    return [Path(sys.executable).parent / "lerobot-train", *OFFLINE.split(), *flags]


def as_flag(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool | None) else str(value)


def take_turn(group: Group, name: str, chosen: dict, data: Path, config: Config) -> dict:
    """Start a training twice, cold for one step and warm for all steps; returns the measurements."""
    folder = config.runs / "turn"
    shutil.rmtree(folder, ignore_errors=True)
    runs, caches = [folder / "cold", folder / "warm"], folder / "cache"
    environment = os.environ | {"OMP_NUM_THREADS": str(cores()), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(caches), "HF_HOME": str(caches / "hf")}
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # loading processes need the cores, too
    turns = []
    for run, steps in zip(runs, (1, config.steps), strict=True):
        turns.append(watch(command(group, name, chosen, data, run, steps, config), run, environment, steps))
    cold, warm = turns
    shutil.rmtree(folder)
    counted = warm.steps[config.warm_up :]
    seconds, waited = (sum(part) for part in zip(*counted, strict=True))
    return {
        "samples_per_s": config.batch_size * len(counted) / seconds,
        "with_start": config.batch_size * config.steps / warm.last,
        "cold": cold.first,
        "warm": warm.first,
        "waits": waited / seconds,
        "largest_gib": max(cold.largest_gib, warm.largest_gib),
        "all_gib": max(cold.all_gib, warm.all_gib),
    }


# Watching a process


def watch(words: list, run: Path, environment: dict, steps: int) -> Turn:
    """Run a training to its end and measure it."""
    start, ends, said, peaks = time.perf_counter(), [], [], [0.0, 0.0]
    process = subprocess.Popen(
        list(map(str, words)),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    sampling = threading.Thread(target=sample_memory, args=(process, peaks))
    sampling.start()
    try:
        for line in process.stdout:
            said.append(line)
            if step_ended(line):
                ends.append(time.perf_counter() - start)
    except BaseException:  # if interrupted, end the training too
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        code = process.wait()
        sampling.join()
    if code or len(ends) != steps:
        raise UserError(f"{words[1]} failed after {len(ends)} steps: {''.join(said)[-1500:].strip()}")
    metrics = run / "metrics.jsonl"
    found = read_ours(metrics.read_text()) if metrics.is_file() else read_lerobot(said)
    return Turn(ends[0], ends[-1], found, *peaks)


def step_ended(line: str) -> bool:
    """Whether a program writes this line of output after a step."""
    return bool(LEROBOT_LINE.search(line) or OUR_LINE.match(line))


LEROBOT_LINE = re.compile(r"\bstep:\S+ .*\bupdt_s:(?P<update>[\d.]+) data_s:(?P<data>[\d.]+)")
OUR_LINE = re.compile(r"step \d+/\d+  loss ")


def read_lerobot(lines: Iterable[str]) -> list[tuple[float, float]]:
    """Seconds of each step in the output of `lerobot-train`, and the seconds of them spent on data.

    Data are loaded, converted and normalized before the network runs.
    """
    found = filter(None, map(LEROBOT_LINE.search, lines))
    times = ((float(match["update"]), float(match["data"])) for match in found)
    return [(update + data, data) for update, data in times]


def read_ours(metrics: str) -> list[tuple[float, float]]:
    """The same from the `metrics.jsonl` of a run that logged every step."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    return [(1 / line["steps_per_s"], line["data_wait_share"] / line["steps_per_s"]) for line in train]


def sample_memory(process: subprocess.Popen, peaks: list[float]) -> None:
    """Watch a process and its descendants until it ends; peaks in GiB: the largest, and all together."""
    while process.poll() is None:
        together = 0.0
        for pid in family(process.pid):
            with suppress(OSError):  # it may have ended
                status = Path(f"/proc/{pid}/status").read_text()
                peaks[0] = max(peaks[0], in_gib(status, "VmHWM"))
                together += in_gib(status, "RssAnon") + in_gib(status, "RssShmem")
        peaks[1] = max(peaks[1], together)
        time.sleep(0.5)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:  # the list grows
        with suppress(OSError):
            threads = Path(f"/proc/{one}/task").iterdir()
            found += [int(child) for task in threads for child in (task / "children").read_text().split()]
    return found


def in_gib(status: str, name: str) -> float:
    """A value that the kernel reports in kB, in GiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


# The table


def report(results: dict, config: Config) -> str:
    """Markdown: the setting, and a table for each group."""
    setting = (
        f"{cores()} CPU cores, batches of {config.batch_size}, {config.rounds} rounds of "
        f"{config.steps} steps, of which the first {config.warm_up} do not count for the speed; "
        f"{config.episodes * config.length} recorded steps; {config.workers} loading processes for LeRobot, "
        f"which decode with {config.decoder}. Medians."
    )
    parts = [setting]
    for group in config.groups:
        parts += [f"**{TITLES[group]}**", group_table(group, results, config)]
    return "\n\n".join(parts)


TITLES = {
    "resnet18": "A ResNet-18 in all but DiT, whose CLIP is about as large",
    "conv": "Ours with their own small network, LeRobot's as small as possible",
}
COLUMNS = ("samples_per_s", "with_start", "cold", "warm", "waits", "largest_gib", "all_gib")


def group_table(group: Group, results: dict, config: Config) -> str:
    turns = {}  # for each policy, figures by column, in the order of the rounds
    for name in (*config.peers, *config.methods):
        measured = [results[f"{group}:{name}"]["turns"][setting] for setting in settings(config)]
        turns[name] = {column: [turn[column] for turn in measured] for column in COLUMNS}
    lines = [
        "| | parameters | GFLOP a sample | samples/s | / best peer | with the start | first step, "
        "cold | warm | / fastest peer | waits for data | memory | all processes |",
        "|" + " --- |" * 12,
    ]
    for name, figures in turns.items():
        fact = results[f"{group}:{name}"]
        middle = {column: statistics.median(values) for column, values in figures.items()}
        of_speed, of_start = (
            against(figures[column], [turns[peer][column] for peer in config.peers], best)
            for column, best in (("samples_per_s", max), ("warm", min))
        )
        cells = [label(name) if name not in NAMES else f"LeRobot {NAMES[name]}"]
        cells += [f"{fact['parameters'] / 1e6:.1f} M", f"{fact['flops'] / 1e9:.1f}"]
        cells += [f"{middle['samples_per_s']:.1f}", f"{of_speed:.2f}", f"{middle['with_start']:.1f}"]
        cells += [f"{middle['cold']:.1f} s", f"{middle['warm']:.1f} s", f"{of_start:.2f}"]
        cells += [
            f"{middle['waits']:.1%}",
            f"{middle['largest_gib']:.2f} GiB",
            f"{middle['all_gib']:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against(values: list[float], others: list[list[float]], best) -> float:
    """Median over rounds of the ratio to the best of the others in the same round."""
    return statistics.median(value / best(them) for value, *them in zip(values, *others, strict=True))


if __name__ == "__main__":
    cli(main, Config)
