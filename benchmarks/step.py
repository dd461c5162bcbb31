"""The cost of the training loop, compared with a bare PyTorch loop over the same policy and batches.

    python benchmarks/step.py
    python benchmarks/step.py --mixed-precision bf16 --batch-size 64 --backbone resnet18

Both loops take turns in one process, so that other work on the machine slows them equally. The bare loop does
only what training needs: gather a batch, loss, backward, clip, step, average the weights. The script's loop
adds what Accelerate does, the count of real elements over processes, gradient norms by component, skipping
of bad steps, the schedule, metrics and progress. The result is the median over turns of the ratio.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import field, replace
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_vfp
from common.config import Flat, cli, options
from common.data import make_loader
from common.run import Data, Run, start_run


@options
class Config:
    """Compare the training loop with a bare one."""

    script: Flat[train_vfp.Config] = field(default_factory=train_vfp.Config)
    rounds: PositiveInt = 12
    """Turns of each loop."""
    turn_steps: PositiveInt = 10
    """Steps per turn."""


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folders = replace(config.script.run, run_dir=Path(folder) / "run")
        script = replace(config.script, run=folders, optim=replace(config.script.optim, steps=10**6))
        run = start_run(script, train_vfp.__file__)
        data = run.load_data(script.horizon, script.normalization)
        loops = {"bare": bare_loop(script, run, data), "script": script_loop(script, run, data)}
        times = {name: [] for name in loops}
        for turn in range(config.rounds + 1):
            for name, loop in loops.items():
                synchronize(run.device)
                start = time.perf_counter()
                for _ in range(config.turn_steps):
                    next(loop)
                synchronize(run.device)
                if turn:  # the first turn is a warm-up
                    times[name].append((time.perf_counter() - start) / config.turn_steps * 1000)
        for loop in loops.values():
            loop.close()
    ratios = [s / b for s, b in zip(times["script"], times["bare"], strict=True)]
    device = (
        torch.cuda.get_device_name()
        if run.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    precision = run.accelerator.mixed_precision
    print(f"{device}, batch {script.optim.batch_size}, {script.vision.backbone}, {precision}")
    for name, values in times.items():
        print(f"{name:>7}: {statistics.median(values):7.2f} ms per step (median of {len(values)} turns)")
    print(f"  ratio: {statistics.median(ratios):7.4f}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_loop(script: train_vfp.Config, run: Run, data: Data):
    """A loop as in a tutorial; yields after every step."""
    torch.manual_seed(0)
    policy = train_vfp.Policy(script, data.spec).to(run.device).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=script.optim.lr, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        policy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(script.optim.ema_decay)
    )
    pin = run.device.type == "cuda"
    loader = make_loader(data.train, script.optim.batch_size, 0, script.data.num_workers, pin_memory=pin)
    for batch in loader:
        batch = batch.to(run.device)
        with run.autocast():
            loss, _ = train_vfp.compute_loss(policy, batch, data.normalizer, script, train=True)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), script.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(policy)
        yield


def script_loop(script: train_vfp.Config, run: Run, data: Data):
    """The loop of train_vfp.py, without evaluation and checkpoints; yields after every step."""
    policy = train_vfp.Policy(script, data.spec)
    optimizer, scheduler, average = run.prepare(policy, data)
    while True:
        for batch in run.micro_batches():
            loss, metrics = train_vfp.compute_loss(
                run.model, batch, data.normalizer, script, train=True, count=run.real_actions
            )
            run.backward(loss)
            run.log(metrics)
        run.log(run.clip_gradients())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update()
        run.end_step()
        yield


if __name__ == "__main__":
    cli(main, Config)
