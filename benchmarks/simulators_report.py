"""Writes the table and the figure of `benchmarks/simulators.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.methods import insert
from common.compare import compare

COLUMNS = ("10", "2", "1")  # sampling steps
COMPARED = (
    (("train_vfp_moe", "10"), ("act", "1")),
    (("train_naive_fm", "10"), ("act", "1")),
    (("train_vfp_moe", "1"), ("train_naive_fm", "10")),
    (("train_cfg_vqvae", "1"), ("train_naive_fm", "10")),
    (("train_naive_fm", "10"), ("train_regression", "1")),
    (("train_vfp_moe", "10"), ("train_naive_fm", "10")),
)
LABELS = {
    "act": "LeRobot ACT, chunk as ours",
    "act-slow": "LeRobot ACT, chunk as ours, its own learning rate",
    "act-100": "LeRobot ACT, chunk 100",
}
SEES_NOTHING = 0.1  # success with grey pictures from which a task does not test vision


def write_report(results: dict, plan: Sequence, folder: Path) -> None:
    """Write the tables between the markers of `folder/benchmarks.md`, and `folder/benchmarks.png`."""
    done = [job for job in plan if job.name in results["runs"]]
    found: dict[str, dict[str, list[dict]]] = {}
    for job in sorted(done, key=lambda job: job.seed):
        found.setdefault(job.task, {}).setdefault(job.method, []).append(
            results["runs"][job.name] | {"seed": job.seed}
        )
    text = f"{len(done)} of {len(plan)} planned runs are done.\n\n" + success_table(found)
    text += "\n\n" + comparisons({task: runs for task, runs in found.items() if counts(runs)})
    insert(folder / "benchmarks.md", text + "\n\n![success with 95 % intervals](benchmarks.png)")
    if found:
        draw(found, folder / "benchmarks.png")
    print(text)


def label(method: str) -> str:
    return LABELS.get(method, f"`{method}.py`")


def interval(runs: list[dict], steps: str) -> tuple[float, float, float]:
    """Success over all episodes of all seeds, with its exact 95 % interval, in percent."""
    from scipy.stats import binomtest

    outcomes = "".join(run["closed_loop"][steps]["outcomes"] for run in runs)
    low, high = binomtest(outcomes.count("1"), len(outcomes)).proportion_ci(method="exact")
    return 100 * outcomes.count("1") / len(outcomes), 100 * low, 100 * high


def success_table(found: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: a row for each task and method; if there are several seeds, they follow in brackets."""
    lines = [
        "| task | method | 10 steps, % | 2 steps | 1 step | grey | mismatched | seeds | parameters | steps "
        "| s a step |",
        f"|{' --- |' * 11}",
    ]
    for task, methods in found.items():
        for method, runs in sorted(methods.items(), key=lambda item: -best(item[1])):
            cells = [cell(runs, steps) for steps in COLUMNS]
            for name in ("grey", "mismatched"):
                cells.append(f"{np.mean([100 * run['closed_loop'][name]['success'] for run in runs]):.0f}")
            first = runs[0]
            lines.append(
                f"| {task} | {label(method)} | {' | '.join(cells)} | {len(runs)} | "
                f"{first['parameters'] / 1e6:.1f} M | {first['steps']} | {first['seconds_a_step']:.2f} |"
            )
    for task in (task for task, methods in found.items() if not counts(methods)):
        lines.append(f"\n{task} does not count: a policy that sees nothing succeeds in more than 10 %.")
    return "\n".join(lines)


def counts(methods: dict[str, list[dict]]) -> bool:
    """Whether a task tests vision: every policy fails if its pictures are grey."""
    runs = [run for each in methods.values() for run in each]
    return all(run["closed_loop"]["grey"]["success"] <= SEES_NOTHING for run in runs)


def best(runs: list[dict]) -> float:
    return max(interval(runs, steps)[0] for steps in COLUMNS if steps in runs[0]["closed_loop"])


def cell(runs: list[dict], steps: str) -> str:
    if steps not in runs[0]["closed_loop"]:
        return ""
    mean, low, high = interval(runs, steps)
    text = f"{mean:.1f} [{low:.0f}, {high:.0f}]"
    if len(runs) > 1:
        text += f" ({', '.join(f'{100 * run["closed_loop"][steps]["success"]:.0f}' for run in runs)})"
    return text


def comparisons(found: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: differences on the same episodes, with exact paired tests corrected for their number."""
    rows = []
    for task, methods in found.items():
        for (one, its), (other, others) in COMPARED:
            if one in methods and other in methods:
                pairs = [(x, y) for x in methods[one] for y in methods[other] if x["seed"] == y["seed"]]
                a = "".join(run["closed_loop"][its]["outcomes"] for run, _ in pairs)
                b = "".join(run["closed_loop"][others]["outcomes"] for _, run in pairs)
                names = f"{label(one)}, {its} | {label(other)}, {others}"
                if pairs:
                    rows.append((f"{task} | {names}", (a, b)))
    if not rows:
        return "No two policies to compare yet."
    lines = [
        "| task | policy, sampling steps | other | difference, points | p, corrected | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    differences = compare([outcomes for _, outcomes in rows])
    for (names, _), found in zip(rows, differences, strict=True):
        lines.append(f"| {names} | {found.points:+.1f} | {found.p:.2g} | {found.verdict} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """A panel for each task: success with its interval, by method and sampling steps."""
    from common import plots

    figure, axes = plots.grid(len(found), min(len(found), 3), (5, 3.2))
    methods = list(dict.fromkeys(method for task in found.values() for method in task))[::-1]
    for axis, (task, runs) in zip(axes.flat, found.items(), strict=False):
        for n, steps in enumerate(COLUMNS):
            there = [m for m in methods if m in runs and steps in runs[m][0]["closed_loop"]]
            if not there:
                continue
            rates = np.array([interval(runs[m], steps) for m in there])
            y = np.array([methods.index(m) for m in there]) - 0.22 * (n - 1)
            spread = np.abs(rates[:, :1] - rates[:, 1:]).T
            name = "1 step" if steps == "1" else f"{steps} steps"
            axis.errorbar(rates[:, 0], y, xerr=spread, fmt="o", ms=4, capsize=2, label=name)
        axis.set_yticks(range(len(methods)), [label(m).strip("`") for m in methods], fontsize=7)
        axis.set(xlim=(-2, 102), title=f"{task}, success in %")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    plots.save_figure(figure, path)
