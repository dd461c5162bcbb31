"""How costs grow: with the dataset's length, the batch, the horizon, cameras, experts and processes.

    python benchmarks/scale.py
    python benchmarks/scale.py --episodes 10 100 --sizes 1 2 --rounds 1     # quick

Costs are seconds of processor time, the least of several rounds, so that other work on the machine disturbs
them little. An exponent p means that a cost grows as x^p: the slope in a log-log plot between the two largest
sizes, where constant costs matter least. The exponent of a training step is compared with that of its
arithmetic (PyTorch's count of floating-point operations): the step must not grow faster. With --publish, the
tables are written to docs/performance.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_naive_fm
import train_vfp_moe
from benchmarks.methods import insert
from benchmarks.start import DOCS, make_up, memory
from common.checkpoint import PolicySpec
from common.data import ChunkDataset, DataConfig, make_loader, open_dataset, open_source
from common.data.motion import copies
from common.data.store import EpisodeStore
from common.normalize import Normalizer

FAST = 0.3
"""A step grows faster than its arithmetic if its exponent is larger by more than this."""


@dataclass(frozen=True)
class Options:
    """Measure how costs grow."""

    episodes: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    """Lengths of datasets in episodes; an episode has 20 steps."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of cameras, experts and processes; batch sizes are 8 times, horizons 4 times these."""
    rounds: int = 3
    publish: bool = False
    """Write the tables to docs/performance.md."""
    child: Path | None = None
    """Used internally, for the processes that this one starts."""


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds per call, the least of several rounds; short calls are repeated."""
    found = []
    for _ in range(rounds):
        began, calls = time.process_time(), 0
        while calls == 0 or time.process_time() - began < 0.05:
            work()
            calls += 1
        found.append((time.process_time() - began) / calls)
    return min(found)


def slope(sizes: list[int], costs: list[float]) -> float:
    """The exponent between the two largest sizes."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def of_dataset(dataset: Path, store_path: Path, rounds: int) -> dict[str, float]:
    """Costs of a start and of a batch with one dataset."""
    config = DataConfig((str(dataset),), cache_dir=dataset.parent)
    store = EpisodeStore.open(store_path)
    samples = ChunkDataset(store, np.arange(store.num_episodes), 16)
    Normalizer.fit_once(samples, "mean-std")
    picked = np.random.default_rng(0).integers(0, len(samples), 32)
    return {
        "reading the dataset's metadata": seconds(lambda: open_source(str(dataset), config).info(), rounds),
        "opening the store": seconds(lambda: EpisodeStore.open(store_path), rounds),
        "looking for copies": seconds(lambda: copies(store), rounds),
        "statistics, computed": seconds(lambda: Normalizer.fit(samples, "mean-std"), 1),
        "statistics, cached": seconds(lambda: Normalizer.fit_once(samples, "mean-std"), rounds),
        "first batch of a new loader": seconds(lambda: first_batch(store), rounds),
        "a batch of 32": seconds(lambda: samples.__getitems__(picked), rounds),
    }


def first_batch(store: EpisodeStore) -> object:
    samples = ChunkDataset(store, np.arange(store.num_episodes), 16)
    return next(iter(make_loader(samples, 32, 0)))


def step_of(script, store: EpisodeStore, batch_size: int, **options) -> Callable[[], None]:
    """A training step of a script on one batch, without the update."""
    config = replace(script.Config(), flow_samples=1, **options)
    samples = ChunkDataset(store, np.arange(store.num_episodes), config.horizon)
    policy = script.Policy(config, PolicySpec.of(samples)).train()
    normalizer = Normalizer.fit_once(samples, "mean-std")
    batch = samples.__getitems__(np.arange(batch_size))

    def step() -> None:
        loss, _ = script.compute_loss(policy, batch, normalizer, config, train=True)
        loss.backward()
        policy.zero_grad()

    return step


def of_step(step: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Processor seconds and floating-point operations of a step."""
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return seconds(step, rounds), counter.get_total_flops()


def of_processes(dataset: Path, count: int) -> dict[str, float]:
    """Costs of processes that start at once on new data, summed over the processes."""
    for kept in dataset.parent.rglob("statistics-*.json"):
        kept.unlink()
    command = [sys.executable, __file__, "--child", str(dataset)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    computed = sum(one["fits"] for one in found)
    return {
        "processes that compute": computed,
        **{n: sum(one[n] for one in found) for n in ("cpu", "own")},
    }


def child(dataset: Path) -> dict[str, float]:
    """Open a dataset and its statistics; returns whether this process computed them, its processor seconds
    and its own GB.
    """
    fit, fits = Normalizer.fit, []
    Normalizer.fit = lambda *args, **named: fits.append(1) or fit(*args, **named)
    before, began = memory()["own"], time.process_time()
    store = open_dataset(DataConfig((str(dataset),), cache_dir=dataset.parent))
    Normalizer.fit_once(ChunkDataset(store, np.arange(store.num_episodes), 16), "mean-std")
    used = memory()["own"] - before
    return {"fits": len(fits), "cpu": time.process_time() - began, "own": used}


def table(head: str, sizes: tuple[int, ...], rows: dict[str, list[float]], unit: str) -> str:
    """Markdown: costs by size, and their exponents."""
    lines = [f"| {head} | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |"]
    lines.append("| --- |" + " ---: |" * (len(sizes) + 1))
    for name, costs in rows.items():
        cells = [*(f"{cost:.3g}" for cost in costs), f"{slope(sizes, costs):.2f}"]
        lines.append(f"| {name}{unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    if options.child is not None:
        print(json.dumps(child(options.child)))
        return
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), {}
        for episodes in options.episodes:
            dataset = folder / f"of{episodes}" / "dataset"
            path = make_up(dataset, dataset.parent, episodes * 20, 20)
            for what, cost in of_dataset(dataset, path, options.rounds).items():
                rows.setdefault(what, []).append(1000 * cost)
        tables.append(table("episodes of 20 steps", options.episodes, rows, ", ms"))

        stores = {}
        for cameras in options.sizes:
            root = folder / f"cameras{cameras}"
            stores[cameras] = EpisodeStore.open(make_up(root / "dataset", root, 4_000, 100, 64, cameras))
        one = stores[options.sizes[0]]
        axes = {
            "batch": ((8, one), lambda n, s: step_of(train_naive_fm, s, n)),
            "horizon": ((4, one), lambda n, s: step_of(train_naive_fm, s, 8, horizon=n)),
            "cameras": ((1, None), lambda n, s: step_of(train_naive_fm, s, 8)),
            "experts": ((1, one), lambda n, s: step_of(train_vfp_moe, s, 8, num_experts=n)),
        }
        for axis, ((factor, store), make) in axes.items():
            sizes = tuple(factor * size for size in options.sizes)
            costs = [of_step(make(size, store or stores[size]), options.rounds) for size in sizes]
            rows = {"step, ms": [1000 * s for s, _ in costs], "step, GFLOP": [f / 1e9 for _, f in costs]}
            tables.append(table(axis, sizes, rows, ""))
            if slope(sizes, rows["step, ms"]) > slope(sizes, rows["step, GFLOP"]) + FAST:
                print(f"{axis}: a step grows faster than its arithmetic")

        found = [of_processes(dataset, count) for count in options.sizes]
        rows = {what: [one[what] for one in found] for what in found[0]}
        tables.append(table(f"processes, {options.episodes[-1]:,} episodes", options.sizes, rows, ""))
    text = "\n\n".join(tables)
    print(text)
    if options.publish:
        insert(DOCS, text, "How costs grow")


if __name__ == "__main__":
    main(tyro.cli(Options))
