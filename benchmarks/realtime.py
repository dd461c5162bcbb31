"""Inference that takes time: success, collisions and jerks on the built-in task, by delay and --join.

    python benchmarks/realtime.py                          # both methods, seeds 0 1 2; hours on two cores
    python benchmarks/realtime.py --methods train_naive_fm --seeds 0 --delays 0 4 --episodes 50 --out /tmp

Each method is trained with `configs/METHOD/demo.json`, for chunks that block, overlap or are averaged, and
for as many steps with `configs/METHOD/delay.json`, for chunks that continue a prefix. Time is simulated: the
speed of the machine does not matter. Finished runs are not repeated (those with demo.json are the ones of
`benchmarks/methods.py`); interrupted runs and measurements resume. Tables and a figure are written to
`docs/`; text around them stays.
"""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
from benchmarks.methods import ROOT, folder_of, insert, label, train
from common.config import cli, options
from common.data.workers import cores
from common.files import read_json, write_json
from common.inference import load_policy

TRAINED = ":delay"  # suffix of a method's name: its configuration with prefixes
WAYS = {  # which run, and how chunks are joined
    "blocking": ("", "blocking"),
    "naive overlap": ("", "naive"),
    "temporal ensembling": ("", "ensemble"),
    "prefix": (TRAINED, "prefix"),
    "trained for prefixes, naive overlap": (TRAINED, "naive"),
}


@options
class Config:
    """Compare ways of acting while the next chunk is computed."""

    methods: tuple[str, ...] = ("train_naive_fm", "train_vfp_moe")
    """Training scripts, without .py; each has a demo.json and a delay.json in configs/METHOD."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    delays: tuple[NonNegativeInt, ...] = (0, 1, 2, 4, 6)
    """Control steps from an observation to its chunk."""
    episodes: PositiveInt = 200
    """Fresh episodes for each run, delay and way of joining; the same for all."""
    jobs: int | None = None
    """Runs at once, sharing the cores (default: one per core)."""
    runs: Path = ROOT / "runs" / "methods"
    """Folder of the runs."""
    out: Path = ROOT / "docs"
    """Folder for chunks.md and realtime.png."""


def main(config: Config) -> None:
    wanted = [
        (method + trained, seed)
        for seed, method, trained in product(config.seeds, config.methods, ("", TRAINED))
    ]
    jobs = min(config.jobs or cores(), len(wanted))
    with ThreadPoolExecutor(jobs) as pool:
        folders = list(pool.map(lambda run: train(*run, config.runs, cores() // jobs), wanted))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (max(cores() // jobs, 1),)) as pool:
        ways = [joins_of(method) for method, _ in wanted]
        list(pool.map(measure, folders, ways, [config.delays] * len(wanted), [config.episodes] * len(wanted)))
    results = {method: collect(method, config) for method in config.methods}
    config.out.mkdir(parents=True, exist_ok=True)
    text = tables(results, config)
    print(text)
    figure = "![success, collisions and changes of velocity by delay](realtime.png)"
    insert(config.out / "chunks.md", f"{text}\n\n{figure}")
    draw(results, config.delays, config.out / "realtime.png")
    print(f"{config.out / 'chunks.md'}\n{config.out / 'realtime.png'}")


def joins_of(method: str) -> list[str]:
    """Ways of joining to measure with a run of this method."""
    return [join for trained, join in WAYS.values() if (trained == TRAINED) == method.endswith(TRAINED)]


def measure(folder: Path, joins: list[str], delays: tuple[int, ...], episodes: int) -> None:
    """Roll out a run with each delay and way of joining, skipping what is finished."""
    policy = load_policy(folder)
    config = evaluate.Config(folder, episodes=episodes, sample_steps=(10,))
    simulator = config.simulator.in_place_of_demo(policy.config.data.dataset)
    config = evaluate.replace(config, simulator=simulator)
    path = results_file(folder)
    path.parent.mkdir(exist_ok=True)
    found = read_json(path) if path.is_file() else {}
    made_with = {"checkpoint": policy.checkpoint.name, "episodes": episodes}
    if {name: found.get(name) for name in made_with} != made_with:
        found = made_with
    for delay, join in product(delays, joins):
        join = join if delay or join == "ensemble" else "naive"  # without a delay, the others equal naive
        if join not in found.setdefault(str(delay), {}):
            found[str(delay)][join] = evaluate.act_with_delay(policy, config, delay, join)
            write_json(path, found)
            print(f"{folder.name}: delay {delay}, {join}, done", flush=True)


def results_file(folder: Path) -> Path:
    return folder / "evaluation" / "delay.json"


def collect(method: str, config: Config) -> dict[str, dict[int, list[dict]]]:
    """For each way of joining and delay, the results of each seed."""
    results: dict[str, dict[int, list[dict]]] = {}
    for way, (trained, join) in WAYS.items():
        runs = [
            json.loads(results_file(folder_of(config.runs, method + trained, seed)).read_text())
            for seed in config.seeds
        ]
        results[way] = {
            delay: [run[str(delay)][join if delay or join == "ensemble" else "naive"] for run in runs]
            for delay in config.delays
        }
    return results


def tables(results: dict[str, dict], config: Config) -> str:
    """Markdown: success, collisions, and changes of velocity; a row for each way, a column for each delay."""
    head = "| | " + " | ".join(f"delay {delay}" for delay in config.delays) + " |"
    rule = "| --- " * (len(config.delays) + 1) + "|"
    seeds = ", ".join(map(str, config.seeds))
    lines = [
        f"{len(config.seeds)} seeds ({seeds}), {config.episodes} fresh episodes each, the same for all; ten "
        "sampling steps. Delays are in control steps. Changes of velocity are in standard deviations of the "
        "action, with multiples of those inside chunks in brackets."
    ]
    parts = {
        "success in percent, mean and each seed": success,
        "collisions in percent, mean": lambda runs: f"{mean_of(runs, 'collisions'):.1f}",
        "change of velocity at seams, mean / 99th percentile": seams,
    }
    for method, ways in results.items():
        for what, cell in parts.items():
            lines += ["", f"{label(method)}: {what}", "", head, rule]
            lines += [
                f"| {way} | " + " | ".join(cell(runs) for runs in delays.values()) + " |"
                for way, delays in ways.items()
            ]
    return "\n".join(lines)


def mean_of(runs: list[dict], name: str) -> float:
    return 100 * float(np.mean([run[name] for run in runs]))


def success(runs: list[dict]) -> str:
    return f"{mean_of(runs, 'success'):.1f} ({', '.join(f'{100 * run["success"]:.1f}' for run in runs)})"


def velocity_change(runs: list[dict], where: str, name: str) -> float:
    """Mean over runs; NaN if none of them has such a step."""
    values = [run["velocity_change"][where][name] for run in runs]
    return float(np.mean([np.nan if value is None else value for value in values]))


def seams(runs: list[dict]) -> str:
    at = [velocity_change(runs, "seam", name) for name in ("mean", "p99")]
    if np.isnan(at).any():
        return "no seams"
    inside = [velocity_change(runs, "inside", name) for name in ("mean", "p99")]
    ratios = [f"{x / y:.2f}" for x, y in zip(at, inside, strict=True) if y > 0]
    words = " / ".join(f"{x:.2f}" for x in at)
    return f"{words} ({' / '.join(ratios)})" if ratios else words


def draw(results: dict[str, dict], delays: tuple[int, ...], path: Path) -> None:
    """Success, collisions and the 99th percentile of changes of velocity at seams, by delay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), 3, figsize=(14, 4 * len(results)), squeeze=False)
    panels = {
        "success, %": lambda runs: mean_of(runs, "success"),
        "collisions, %": lambda runs: mean_of(runs, "collisions"),
        "velocity change at seams, p99": lambda runs: velocity_change(runs, "seam", "p99"),
    }
    for row, (method, ways) in zip(axes, results.items(), strict=True):
        for axis, (title, value) in zip(row, panels.items(), strict=True):
            for way, by_delay in ways.items():
                axis.plot(delays, [value(by_delay[delay]) for delay in delays], marker="o", label=way)
            axis.set(xlabel="delay, control steps", title=f"{label(method).strip('`')}: {title}")
            axis.set_ylim(bottom=0, top=102 if title.startswith("success") else None)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cli(main, Config)
