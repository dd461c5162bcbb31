"""What experts cost: a training step and a chunk of `train_vfp_moe.py` with one, two, four and eight.

    python benchmarks/experts.py
    python benchmarks/experts.py --mixed-precision bf16 --d-model 512 --num-heads 8 --batch-size 64

All loops run in one process, in turns, so that a machine that is busy with other work slows all alike; ratios
are medians over turns. The arithmetic is counted by PyTorch: a step may grow as it does, not faster.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.faults import GradientClipper
from common.launch import make_accelerator
from common.schedules import build_optimizer

import train_vfp_moe
from common import checkpoint
from common.config import Flat, cli
from common.data import ChunkDataset, open_dataset
from common.normalize import Normalizer


@dataclass(frozen=True)
class Config:
    """Measure what experts cost."""

    script: Flat[train_vfp_moe.Config] = field(default_factory=train_vfp_moe.Config)
    experts: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of experts."""
    rounds: int = 10
    """Turns of each loop."""
    turn_steps: int = 3
    """Steps a turn; ten times as many chunks."""


def main(config: Config) -> None:
    script = config.script
    accelerator = make_accelerator(script.run)
    device = accelerator.device
    store = open_dataset(script.data)
    data = ChunkDataset(store, range(store.num_episodes), script.horizon)
    normalizer = Normalizer.fit(data).to(device)
    batch = data.__getitems__(list(range(script.optim.batch_size))).to(device)
    loops, gflops, times = {}, {}, {}
    for num in config.experts:
        options = replace(script, num_experts=num)
        torch.manual_seed(0)
        policy = train_vfp_moe.Policy(options, checkpoint.PolicySpec.of(data)).to(device)
        loops[num] = (
            steps(policy, options, batch, normalizer, accelerator),
            chunks(policy, options, batch, accelerator),
        )
        # Fused attention on a CPU is not counted: while counting, it is written out.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            next(loops[num][0])
        gflops[num] = counter.get_total_flops() / 1e9
        times[num] = ([], [])
    for turn in range(config.rounds + 1):
        for num, pair in loops.items():
            for loop, kept, count in zip(
                pair, times[num], (config.turn_steps, 10 * config.turn_steps), strict=True
            ):
                synchronize(device)
                start = time.perf_counter()
                for _ in range(count):
                    next(loop)
                synchronize(device)
                if turn:  # the first turn warms up
                    kept.append((time.perf_counter() - start) / count * 1000)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{name}, batch {script.optim.batch_size}, {script.decoder_layers} layers an expert, width "
        f"{script.d_model}, {accelerator.mixed_precision}; chunks one at a time, {script.sample_steps} steps"
    )
    print("experts   ms a step  of one   GFLOP  of one   ms a chunk  of one")
    first = config.experts[0]
    for num in config.experts:
        step, chunk = times[num]
        print(
            f"{num:7d} {statistics.median(step):11.1f} {ratio(step, times[first][0]):7.2f} "
            f"{gflops[num]:7.1f} {gflops[num] / gflops[first]:7.2f} {statistics.median(chunk):12.2f} "
            f"{ratio(chunk, times[first][1]):7.3f}"
        )


def ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def steps(policy, config, batch, normalizer, accelerator):
    """Training steps on one batch; yields after each."""
    optimizer = build_optimizer(policy, config.optim)
    clip = GradientClipper(policy, optimizer, config.optim.grad_clip)
    while True:
        policy.train()
        with accelerator.autocast():
            loss = train_vfp_moe.compute_loss(policy, batch, normalizer, config)
        loss.total.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        yield


def chunks(policy, config, batch, accelerator):
    """Chunks for one observation, as on a robot; yields after each."""
    while True:
        policy.eval()
        with accelerator.autocast():
            train_vfp_moe.sample_actions(policy, batch.images[:1], batch.proprio[:1], config)
        yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli(main, Config)
