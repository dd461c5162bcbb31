"""Compare the methods on the built-in task: success, collisions, modes, cost.

    python benchmarks/methods.py                        # every method, seeds 0 1 2; hours on two cores
    python benchmarks/methods.py --methods train_naive_fm train_vfp --seeds 0 --out /tmp

Each method is trained with `configs/METHOD/demo.json`, or METHOD:NAME with `configs/METHOD/NAME.json`, and
evaluated on the same fresh episodes. Finished runs are not repeated and interrupted ones resume, so the
comparison can be made in parts. The cost of a training step is measured afterwards: the methods take turns
in one process on one thread, so that other work on the machine slows all of them equally, but nothing else
should run then. The table and the figure are written to `docs/`; text around them stays.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.checkpoint import find
from common.config import cli, options
from common.data.workers import cores
from common.errors import UserError

ROOT = Path(__file__).parents[1]
STEPS = ("10", "2", "1")  # sampling steps
MODES = ("left-left", "left-right", "right-left", "right-right")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@options
class Config:
    """Train and evaluate methods on the built-in task, and compare them."""

    methods: tuple[str, ...] = (
        "train_naive_fm",
        "train_vfp",
        "train_cfg_vqvae",
        "train_vfp_moe",
    )
    """Training scripts, without .py. Each uses configs/METHOD/demo.json; METHOD:NAME uses NAME.json."""
    ablations: tuple[str, ...] = (
        "train_vfp_moe:no_transport",
        "train_vfp_moe:one_expert",
        "train_vfp_moe:no_latent",
    )
    """More runs, with the first seed only."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    jobs: int | None = None
    """Runs at once, sharing the cores (default: one per core)."""
    runs: Path = ROOT / "runs" / "methods"
    """Folder of the runs."""
    out: Path = ROOT / "docs"
    """Folder for methods.md and methods.png."""


def main(config: Config) -> None:
    for method in (*config.methods, *config.ablations):
        if not config_file(method).is_file():
            raise UserError(f"There is no {config_file(method)}: choose other --methods.")
    wanted = [(method, seed) for seed in config.seeds for method in config.methods]
    wanted += [(method, config.seeds[0]) for method in config.ablations]
    jobs = min(config.jobs or cores(), len(wanted))
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, method, seed, config.runs, cores() // jobs) for method, seed in wanted]
        for future in futures:
            future.result()
    results = {
        method: [collect(folder_of(config.runs, method, seed)) for seed in config.seeds]
        for method in config.methods
    }
    seconds = measure_steps({method: training_steps(method) for method in config.methods})
    ablations = {
        method: [collect(folder_of(config.runs, method, config.seeds[0]))] for method in config.ablations
    }
    text = table(results, seconds, config.seeds)
    if ablations:
        text += "\n\n" + ablation_table(results, ablations, config.seeds[0])
    print(text)
    insert(config.out / "methods.md", text + "\n\n![success, collisions, modes](methods.png)")
    draw(results, config.out / "methods.png")
    print(f"{config.out / 'methods.md'}\n{config.out / 'methods.png'}")


def script_of(method: str) -> str:
    """`train_x:name` -> `train_x.py`."""
    return method.partition(":")[0] + ".py"


def config_file(method: str) -> Path:
    script, _, name = method.partition(":")
    return ROOT / "configs" / script / f"{name or 'demo'}.json"


def folder_of(runs: Path, method: str, seed: int) -> Path:
    return runs / f"{method.replace(':', '-')}-{seed}"


def label(method: str) -> str:
    """A method's name in tables and figures."""
    name = method.partition(":")[2].replace("_", " ")
    return f"`{script_of(method)}`" + (f", {name}" if name else "")


def train(method: str, seed: int, runs: Path, threads: int) -> Path:
    """Train one run, unless it is finished; returns its folder."""
    folder, config = folder_of(runs, method, seed), config_file(method)
    wanted = json.loads(config.read_text())["config"]
    steps = wanted["optim"]["steps"]
    if (folder / "config.json").is_file():
        refuse_other_settings(folder, json.loads((folder / "config.json").read_text())["config"], wanted)
    if not (folder / "checkpoints" / f"step_{steps:07d}").is_dir():
        flags = ["--config", config, "--run-dir", folder, "--seed", seed, "--resume", "auto"]
        call([script_of(method), *flags], threads, folder)
    return folder


def run(method: str, seed: int, runs: Path, threads: int) -> None:
    """Train and evaluate one run, skipping what is finished."""
    folder = train(method, seed, runs, threads)
    results = folder / "evaluation" / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {"checkpoint": None, "closed_loop": {}}
    if found["checkpoint"] != find(folder).name or not set(STEPS) <= set(found["closed_loop"]):
        call(["evaluate.py", folder, "--sample-steps", *STEPS], threads, folder)


def refuse_other_settings(folder: Path, had: dict, wanted: dict) -> None:
    """Refuse old runs that were made with another configuration."""
    for name, value in wanted.items():
        if isinstance(value, dict):
            refuse_other_settings(folder, had.get(name, {}), value)
        elif had.get(name) != value:
            raise UserError(
                f"{folder} was made with {name} {had.get(name)}, now it is {value}: move it away."
            )


def call(command: list, threads: int, folder: Path) -> None:
    """Run a script of this project; if it fails, show the end of its output."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(threads, 1))}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{folder}: {command[0]} failed: {done.stderr.strip()[-1500:]}")
    print(f"{folder.name}: {command[0]} took {(time.perf_counter() - started) / 60:.1f} min", flush=True)


def measure_steps(
    loops: dict[str, Iterator[None]], rounds: int = 15, turn_steps: int = 2
) -> dict[str, float]:
    """Processor seconds of a training step of each loop, on one thread."""
    import torch

    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name, loop in loops.items():
            start = time.process_time()
            for _ in range(turn_steps):
                next(loop)
            if turn:  # the first turn is a warm-up
                times[name].append((time.process_time() - start) / turn_steps)
    return {name: statistics.median(values) for name, values in times.items()}


def training_steps(method: str, *flags: str) -> Iterator[None]:
    """A script's training steps, without what Accelerate adds; yields after every step."""
    import torch

    from common.checkpoint import PolicySpec
    from common.config import parse
    from common.data import ChunkDataset, make_loader, open_dataset
    from common.inference import load_script
    from common.normalize import Normalizer
    from common.optim import AveragedPolicy, GradientClipper, build_optimizer

    script = load_script(script_of(method))
    config = parse(script.Config, ["--config", str(config_file(method)), *flags], script_of(method))
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    normalizer = Normalizer.fit(data)
    torch.manual_seed(0)
    policy = script.Policy(config, PolicySpec.of(data)).train()
    optimizer = build_optimizer(policy, config.optim)
    clip = GradientClipper(policy, optimizer, config.optim.grad_clip)
    averaged = AveragedPolicy(policy, optimizer, config.optim.ema_decay)
    for batch in make_loader(data, config.optim.batch_size, seed=0):
        clip.begin_step()
        script.compute_loss(policy, batch, normalizer, config, train=True)[0].backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()
        yield


def collect(folder: Path) -> dict:
    """The results of one run that are compared."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    closed_loop = json.loads((folder / "evaluation" / "results.json").read_text())["closed_loop"]
    codes = [line for line in train if "codes/in_use" in line]
    return {
        "closed_loop": closed_loop,
        "steps": train[-1]["step"],
        "parameters": count_parameters(find(folder) / "policy"),
        "codes": (codes[-1]["codes/in_use"], codes[-1]["codes/perplexity"]) if codes else None,
    }


GIVEN = r"_average\.|instruction\.(names|centre|scale)$"  # weights that are not trained


def count_parameters(policy: Path) -> int:
    """Trained parameters of an exported policy; averages of other parameters are not counted."""
    from safetensors import safe_open

    total = 0
    for file in policy.glob("*.safetensors"):
        if file.stem != "stats":
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if not re.search(GIVEN, name)]  # noqa: SIM118 (no dict)
                if "instruction.project.weight" in names:  # then the table is a text encoder's
                    names.remove("instruction.table")
                total += sum(np.prod(tensors.get_slice(name).get_shape(), dtype=int) for name in names)
    return int(total)


def table(results: dict[str, list[dict]], seconds: dict[str, float], seeds: tuple[int, ...]) -> str:
    """Markdown: a row for each method, with means over seeds and each seed's figure."""

    def rates(runs: list[dict], steps: str, name: str) -> str:
        values = [100 * run["closed_loop"][steps][name] for run in runs]
        return f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"

    episodes = next(iter(results.values()))[0]["closed_loop"][STEPS[0]]["episodes"]
    fastest = min(seconds.values())
    lines = [
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {episodes} fresh episodes each, the same for "
        "all. Means in percent, with each seed in brackets.",
        "",
        "| | success, 10 steps | 2 steps | 1 step | collisions, 10 steps | 2 steps | 1 step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, runs in results.items():
        cells = [rates(runs, steps, name) for name in ("success", "collisions") for steps in STEPS]
        lines.append(f"| {label(method)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| | rarest mode, 10 / 2 / 1 steps | parameters | s per step | / fastest | steps | training | "
        "codes in use |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, runs in results.items():
        rarest = [
            min(100 * run["closed_loop"][steps]["modes"].get(mode, 0.0) for run in runs for mode in MODES)
            for steps in STEPS
        ]
        step = seconds[method]
        codes = ", ".join(f"{run['codes'][0]:.0f}" for run in runs) if runs[0]["codes"] else ""
        lines.append(
            f"| {label(method)} | {' / '.join(f'{share:.0f} %' for share in rarest)} | "
            f"{runs[0]['parameters'] / 1e6:.2f} M | {step:.3f} | {step / fastest:.2f} | {runs[0]['steps']} | "
            f"{step * runs[0]['steps'] / 60:.1f} min | {codes} |"
        )
    lines += [
        "",
        "All trained parameters are counted. Seconds are those of one thread; training time is seconds per "
        "step times steps. The rarest mode is the smallest share of any of the four "
        "modes among the successes of any seed.",
    ]
    return "\n".join(lines)


def ablation_table(results: dict[str, list[dict]], ablations: dict[str, list[dict]], seed: int) -> str:
    """Markdown: results of runs with a part left out, for the seed that all of them have."""
    lines = [
        f"With parts left out, seed {seed}:",
        "",
        "| | success, 10 steps | 2 steps | 1 step | rarest mode, 1 step |",
        "| --- | --- | --- | --- | --- |",
    ]
    whole = dict.fromkeys(method.partition(":")[0] for method in ablations)
    for method, runs in [*((m, results[m]) for m in whole if m in results), *ablations.items()]:
        closed_loop = runs[0]["closed_loop"]
        cells = [f"{100 * closed_loop[steps]['success']:.1f}" for steps in STEPS]
        cells.append(f"{100 * min(closed_loop['1']['modes'].get(mode, 0.0) for mode in MODES):.0f} %")
        lines.append(f"| {label(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(path: Path, text: str, section: str | None = None) -> None:
    """Replace the text between a page's markers; what people wrote around them stays.

    On a page with several pairs of markers, `section` is the heading above the pair to use.
    """
    heading = f"\n## {section}\n" if section else ""
    old = path.read_text() if path.exists() else ""
    if not old or heading not in old:
        old += f"{heading}\n{BEGIN}\n{END}\n".removeprefix("\n" * (not heading))
    at = old.index(heading)
    before, _, rest = old[at:].partition(BEGIN)
    after = rest.partition(END)[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{old[:at]}{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Success and collisions by sampling steps, and the shares of the modes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    colors = [f"C{n}" for n in range(len(results))]
    at = np.arange(len(STEPS))
    for axis, name in zip(axes, ("success", "collisions"), strict=False):
        for n, (method, runs) in enumerate(results.items()):
            values = np.array([[100 * run["closed_loop"][s][name] for s in STEPS] for run in runs])
            shifted = at + 0.08 * (n - (len(results) - 1) / 2)
            axis.plot(
                shifted, values.mean(0), color=colors[n], marker="o", label=label(method).replace("`", "")
            )
            axis.plot(shifted, values.T, ".", color=colors[n], alpha=0.5)
        axis.set_xticks(at, STEPS)
        axis.set(xlabel="sampling steps", title=f"{name}, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(top=100)
    axes[0].legend(fontsize=8)
    width = 0.8 / len(STEPS)
    labels = list(results)
    for s, steps in enumerate(STEPS):
        bottom = np.zeros(len(labels))
        x = np.arange(len(labels)) + (s - 1) * width
        for m, mode in enumerate(MODES):
            share = [
                100 * np.mean([run["closed_loop"][steps]["modes"].get(mode, 0.0) for run in results[method]])
                for method in labels
            ]
            axes[2].bar(
                x, share, width * 0.92, bottom=bottom, color=f"C{m + 4}", label=mode if s == 0 else None
            )
            bottom += share
    axes[2].set_xticks(
        np.arange(len(labels)), [method.removeprefix("train_").replace(":", "\n") for method in labels]
    )
    axes[2].set(title=f"modes among successes, % ({', '.join(STEPS)} steps)")
    axes[2].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cli(main, Config)
