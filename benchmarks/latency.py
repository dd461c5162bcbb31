"""Milliseconds to compute a chunk, ours and LeRobot's, eager and compiled, on one thread or a GPU.

    python benchmarks/latency.py                       # half an hour on a CPU, most of it compiling
    python benchmarks/latency.py --sizes 96x128 --groups conv --rounds 2 --no-compile --out /tmp

The time from three camera frames (uint8, at the networks' image size) and a state to actions in recorded
units, with each project's own pre- and postprocessing. All policies are in one process and take turns. Their
sizes are matched, see `benchmarks/matched.py`. Weights are random: the cost of a chunk does not depend on
them. LeRobot's diffusion is also measured with DDIM in 10 steps, and its DiT with 10 steps instead of its
default of 100.

*Compiled* are the networks, of both. `load_policy(compile=True)` also compiles all integration steps as
one graph, which takes a minute or more for each number of steps; on a CPU a chunk of ten then took 0.87 of
the time.

Needs the packages of requirements-bench.txt. Finished tables are not measured again: delete the results to
start over. Tables are written to `docs/performance.md`. Nothing else should run on the machine.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from pydantic import PositiveInt
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import matched
from benchmarks.matched import CAMERAS, DIM, PARTNERS, Group, Peer
from benchmarks.methods import insert, label
from benchmarks.peers import NAMES, TITLES, against
from common.config import UserPath, cli, options
from common.files import write_json
from common.inference import RobotPolicy

ROOT = Path(__file__).parents[1]
OUR_STEPS = (1, 2, 10)
SAMPLERS = {
    "act": {"": {}},
    "diffusion": {
        "DDPM 100": {},
        "DDIM 10": {"noise_scheduler_type": "DDIM", "num_inference_steps": 10},
    },
    "multi_task_dit": {"Euler 100": {}, "Euler 10": {"num_integration_steps": 10}},
}
"""Samplers of LeRobot's policies; the first is the policy's default."""
COMPILED = {
    "act": ("model",),
    "diffusion": ("diffusion.rgb_encoder", "diffusion.unet"),
    "multi_task_dit": (
        "observation_encoder.vision_encoder",
        "observation_encoder.text_encoder",
        "noise_predictor",
    ),
}
"""Networks of LeRobot's policies that are compiled."""
Times = dict[str, list[float]]


@options
class Config:
    """Measure the latency of a chunk."""

    groups: tuple[Group, ...] = get_args(Group)
    """Sizes of the networks: see benchmarks/matched.py."""
    sizes: tuple[str, ...] = ("224x224", "96x128")
    """Height and width of the frames."""
    methods: tuple[str, ...] = (
        "train_naive_fm",
        "train_vfp",
        "train_vfp_depth",
        "train_cfg_vqvae",
        "train_vfp_moe",
    )
    """Our scripts, without .py."""
    rounds: PositiveInt = 15
    """Turns of each."""
    compile: bool = True
    """Also measure the compiled networks."""
    device: str = "cpu"
    """`cpu` (one thread) or `cuda`."""
    runs: UserPath = ROOT / "runs" / "latency"
    """Folder of the results."""
    out: UserPath = ROOT / "docs"
    """Folder of performance.md."""


def main(config: Config) -> None:
    torch.set_num_threads(1)
    where = "one thread of a CPU" if config.device == "cpu" else torch.cuda.get_device_name()
    path = config.runs / f"{config.device}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    parts = [f"One observation at a time, {where}, {config.rounds} rounds. Medians."]
    for group in config.groups:
        for size in config.sizes:
            key = f"{group}:{size}:{config.rounds}:{config.compile}:{' '.join(config.methods)}"
            if key not in results:
                results[key] = measure(group, tuple(map(int, size.split("x"))), config)
                config.runs.mkdir(parents=True, exist_ok=True)
                write_json(path, results)
            parts += [f"**{TITLES[group]}; frames of {size}**", table(**results[key])]
            print("\n\n".join(parts[-2:]), flush=True)
    insert(config.out / "performance.md", "\n\n".join(parts), "Latency of a chunk")


def measure(group: Group, size: tuple[int, int], config: Config) -> dict:
    """Parameters of every policy, and milliseconds of each way to act, eager and compiled, taking turns."""
    counts: dict[str, int] = {}
    ways: dict[str, Callable[[], np.ndarray]] = {}
    frames = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    for compiled in (False, True) if config.compile else (False,):
        mark = ", compiled" if compiled else ""
        for method in config.methods:
            policy = matched.ours(method, group, size, config.device)
            counts[label(method)] = sum(p.numel() for p in policy.model.parameters())
            if compiled:
                for component in policy.model.children():
                    component.compile(dynamic=False)  # not the integration: see above
            for steps in OUR_STEPS:
                ways[f"{label(method)}, {steps}{mark}"] = our_way(policy, frames, steps)
        for kind, samplers in SAMPLERS.items():
            target = counts.get(label(PARTNERS[kind])) or matched.parameters(
                matched.ours(PARTNERS[kind], group, size).model
            )
            chosen = matched.match(kind, group, target, size, config.runs / "clip")
            for name, more in samplers.items():
                found = matched.peer(kind, chosen | more, size, config.device)
                shown = f"LeRobot {NAMES[kind]}" + (f", {name}" if name else "")
                counts[shown] = sum(p.numel() for p in found.model.parameters())
                for network in networks(kind, found) if compiled else ():
                    network.compile(dynamic=False)
                ways[f"{shown}{mark}"] = their_way(found, matched.seen(kind, size))
    for name, act in ways.items():  # warm up and compile
        start = time.perf_counter()
        act()
        print(f"{name}: first chunk after {time.perf_counter() - start:.1f} s", flush=True)
    return {"counts": counts, "times": by_turns(ways, config.rounds)}


def networks(kind: str, found: Peer) -> list[nn.Module]:
    """The networks of a LeRobot policy to compile."""
    parts = [found.model.get_submodule(place) for place in COMPILED[kind]]
    return [part for one in parts for part in (one if isinstance(one, nn.ModuleList) else [one])]


def our_way(policy: RobotPolicy, frames: np.ndarray, steps: int) -> Callable[[], np.ndarray]:
    observation = {"images": dict.fromkeys(policy.spec.cameras, frames), "state": np.zeros(DIM, np.float32)}
    return lambda: policy.act(observation, steps)


def their_way(found: Peer, size: tuple[int, int]) -> Callable[[], np.ndarray]:
    """What LeRobot's loops do when a new chunk is due; they return its first action."""
    frame = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    found.model.eval()

    @torch.no_grad()
    def act() -> np.ndarray:
        seen = {key: torch.from_numpy(frame).permute(2, 0, 1).float() / 255 for key in CAMERAS}
        seen |= {"observation.state": torch.zeros(DIM), "task": "measure"}
        found.model.reset()
        return found.after(found.model.select_action(found.before(seen))).numpy()

    return act


def by_turns(ways: dict[str, Callable[[], np.ndarray]], rounds: int, least: float = 0.2) -> Times:
    """Milliseconds per call of each way in each round, averaged over the calls within `least` seconds."""
    times: Times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, act in ways.items():
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < least:
                act()
                calls += 1
            if number:  # the first round is a warm-up
                times[name].append(1000 * (time.perf_counter() - start) / calls)
    return times


def table(counts: dict[str, int], times: Times) -> str:
    """Markdown: milliseconds, and medians over rounds of the ratios to LeRobot's policies."""
    act, diffusion = "LeRobot ACT", "LeRobot diffusion, DDPM 100"
    others = [name for name in times if name in counts and name.startswith("LeRobot") and name != act]
    lines = [
        "| | parameters | ms, 1 / 2 / 10 steps | compiled | 1 step / ACT | / fastest other | "
        "10 steps / diffusion | / diffusion, DDIM 10 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, count in counts.items():
        ways = [name] if name in times else [f"{name}, {steps}" for steps in OUR_STEPS]
        cells = [f"{name} | {count / 1e6:.1f} M", medians(times, ways)]
        cells.append(medians(times, [f"{way}, compiled" for way in ways]))
        if name in times:
            cells += [""] * 4
        else:
            one, ten = times[ways[0]], times[ways[-1]]
            cells += [
                f"{against(one, [times[act]], min):.2f}",
                f"{against(one, [times[other] for other in others], min):.2f}",
                f"{against(ten, [times[diffusion]], min):.2f}",
                f"{against(ten, [times['LeRobot diffusion, DDIM 10']], min):.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def medians(times: Times, ways: list[str]) -> str:
    return " / ".join(f"{statistics.median(times[way]):.1f}" for way in ways if way in times)


if __name__ == "__main__":
    cli(main, Config)
