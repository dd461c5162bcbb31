"""Are corrections worth more than demonstrations of as many steps?

    python benchmarks/corrections.py                                        # about two hours on two cores
    python benchmarks/corrections.py --seeds 0 --steps 20 --episodes 16     # quick check that it runs

`train_naive_fm.py` with the demo's configuration on the built-in task, in two ways that need the expert for
equally many steps:

- demonstrations: all of `--demonstrations`.
- corrections: the first half of these. At two moments before half-time, `collect.py` lets the policy act and
  records corrections in its `--grow-from` folder, until they have as many steps as the other half.

Each is evaluated in the same fresh episodes. Finished runs are not repeated and interrupted ones resume. The
table is printed. A run learns from new corrections from the step on at which it continues: all is repeatable.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from pydantic import PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from methods import ROOT, call

from common.config import UserPath, cli, options
from common.data import demo
from common.data.workers import cores
from common.errors import UserError
from common.files import read_json

CONFIG = ROOT / "configs" / "train_naive_fm" / "demo.json"
SAMPLE_STEPS = ("10", "1")


@options
class Config:
    """Compare corrections with demonstrations."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of demonstrations, runs and collecting."""
    demonstrations: PositiveInt = 40
    """Demonstrations of a seed."""
    steps: PositiveInt = 1250
    """Training steps."""
    moments: tuple[float, ...] = (0.25, 0.45)
    """Shares of the training after which corrections are collected, equally many steps each time."""
    rewind: PositiveInt = 10
    """Steps before a failure at which a correction begins."""
    weight: PositiveFloat = 1.0
    """How often corrections are drawn, relative to demonstrations."""
    episodes: PositiveInt = 200
    """Episodes of each evaluation."""
    runs: UserPath = ROOT / "runs" / "corrections"
    """Folder of the runs."""


def main(config: Config) -> None:
    results = {"demonstrations": [], "corrections": []}
    common = f"{config.demonstrations}-{config.steps}-{config.episodes}"
    own = {"demonstrations": common}
    moments = "-".join(f"{share:g}" for share in config.moments)
    own["corrections"] = f"{common}-{config.rewind}-{config.weight:g}-at-{moments}"
    for seed in config.seeds:
        dataset = config.runs / f"demonstrations-{config.demonstrations}-{seed}"
        if not dataset.exists():
            unfinished = dataset.with_suffix(".recording")
            demo.record(unfinished, demo.demonstrate(config.demonstrations, seed), config.demonstrations)
            unfinished.rename(dataset)
        lengths = lengths_of(dataset)
        for way, found in results.items():
            folder = config.runs / f"{way}-{seed}-{own[way]}"
            if way == "demonstrations":
                train(config, folder, seed, config.steps, "--dataset", dataset)
                labels = sum(lengths)
            else:
                labels = sum(lengths[: len(lengths) // 2])
                labels += correct(config, folder, seed, dataset, sum(lengths) - labels)
            found.append({**evaluate(config, folder), "labels": labels})
    print(table(results, config))


def correct(config: Config, folder: Path, seed: int, dataset: Path, budget: int) -> int:
    """Train on the first half, collecting corrections on the way; returns their steps."""
    new, half = folder.with_name(f"{folder.name}-new"), config.demonstrations // 2
    new.mkdir(parents=True, exist_ok=True)
    data = ["--dataset", dataset, "--episodes", f"0-{half - 1}", "--grow-from", new]
    data += ["--grow-weight", config.weight]
    for number, share in enumerate(config.moments, 1):
        at = round(share * config.steps)
        train(config, folder, seed, at, *data)
        taken = sum(sum(lengths_of(path)) for path in collected(new))
        if len(collected(new)) < number and taken < budget:
            left = (budget - taken) // (len(config.moments) - number + 1)
            own = [folder, new, "--env", "demo", "--checkpoint", at, "--budget", left]
            own += ["--rewind", config.rewind, "--seed", 3_000_000 + 1000 * seed + number]
            call(["collect.py", *own, "--episodes", 4 * config.demonstrations], cores(), folder)
    train(config, folder, seed, config.steps, *data)
    learned = [entry["name"] for time in read_json(folder / "growth.json") for entry in time["entries"]]
    if sorted(learned) != [path.name for path in collected(new)]:
        raise UserError(f"{folder} has not learned from all of {new}: give it more --steps.")
    return sum(sum(lengths_of(path)) for path in collected(new))


def collected(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*"))


def train(config: Config, folder: Path, seed: int, steps: int, *flags: object) -> None:
    """Train until this many steps, unless it has come so far; the schedule does not depend on the end."""
    saved = sorted((folder / "checkpoints").glob("step_*"))
    if not saved or int(saved[-1].name.removeprefix("step_")) < steps:
        own = ["--config", CONFIG, "--run-dir", folder, "--seed", seed, "--steps", steps, "--resume", "auto"]
        call(["train_naive_fm.py", *own, "--val-fraction", 0, *flags], cores(), folder)


def evaluate(config: Config, folder: Path) -> dict:
    """The run's results in closed loop."""
    results = folder / "evaluation" / "results.json"
    if not results.is_file():
        own = ["evaluate.py", folder, "--env", "demo", "--sample-steps", *SAMPLE_STEPS]
        call([*own, "--episodes", config.episodes], cores(), folder)
    return json.loads(results.read_text())["closed_loop"]


def lengths_of(dataset: Path) -> list[int]:
    """Steps of each episode of a LeRobot dataset, in order."""
    import pyarrow.parquet

    files = sorted((dataset / "meta" / "episodes").glob("**/*.parquet"))
    return [n for file in files for n in pyarrow.parquet.read_table(file)["length"].to_pylist()]


def table(results: dict[str, list[dict]], config: Config) -> str:
    """Markdown: a row for each way, means over seeds and each seed's figure, and the paired difference."""
    lines = [
        f"Seeds {', '.join(map(str, config.seeds))}, {config.steps} steps of training, "
        f"{config.episodes} fresh episodes each, the same for all.",
        "",
        "| | steps by the expert | success, 10 sampling steps | 1 step |",
        "| --- | --- | --- | --- |",
    ]
    rates = {}
    for way, runs in results.items():
        rates[way] = {n: np.array([100 * run[n]["success"] for run in runs]) for n in SAMPLE_STEPS}
        cells = [f"{statistics.mean(run['labels'] for run in runs):.0f}"]
        cells += [f"{x.mean():.1f} ({', '.join(f'{value:.1f}' for value in x)})" for x in rates[way].values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    cells = []
    for n in SAMPLE_STEPS:
        gains = rates["corrections"][n] - rates["demonstrations"][n]
        error = f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
        cells.append(f"{gains.mean():+.1f}{error}")
    lines.append(f"| difference, ± its standard error | | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main, Config)
