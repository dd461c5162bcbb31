"""What the training loop costs beside a bare PyTorch loop over the same policy and batches.

    python benchmarks/step.py
    python benchmarks/step.py --mixed-precision bf16 --batch-size 64 --backbone resnet18

Both loops run in one process on the same machine, in turns, so that a machine that is busy with other work
slows both alike. The bare loop does what no training can do without: gather a batch, loss, backward, clip,
step, average the weights. The script's loop adds what Accelerate does, the count of real elements over
processes, gradient norms by component, skipping of bad steps, the schedule, metrics and progress. The result
is the median over turns of the ratio.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_vfp
from common import checkpoint
from common.config import Flat, cli
from common.data import ChunkDataset, make_loader, open_dataset
from common.faults import GradientClipper, Guard, or_nan
from common.launch import make_accelerator
from common.normalize import Normalizer
from common.schedules import AveragedPolicy, build_optimizer, build_scheduler, learning_rates
from common.tracking import Tracker


@dataclass(frozen=True)
class Config:
    """Compare the training loop with a bare one."""

    script: Flat[train_vfp.Config] = field(default_factory=train_vfp.Config)
    rounds: int = 12
    """Turns of each loop."""
    turn_steps: int = 10
    """Steps a turn."""


def main(config: Config) -> None:
    script = config.script
    accelerator = make_accelerator(script.run)
    store = open_dataset(script.data)
    data = ChunkDataset(store, range(store.num_episodes), script.horizon)
    normalizer = Normalizer.fit(data).to(accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "bare": bare_loop(script, accelerator, data, normalizer),
            "script": script_loop(script, accelerator, data, normalizer, Path(folder)),
        }
        times = {name: [] for name in loops}
        for turn in range(config.rounds + 1):
            for name, loop in loops.items():
                synchronize(accelerator.device)
                start = time.perf_counter()
                for _ in range(config.turn_steps):
                    next(loop)
                synchronize(accelerator.device)
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - start) / config.turn_steps * 1000)
        for loop in loops.values():
            loop.close()
    ratios = [s / b for s, b in zip(times["script"], times["bare"], strict=True)]
    device = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}, batch {script.optim.batch_size}, {script.vision.backbone}, {accelerator.mixed_precision}"
    )
    for name, values in times.items():
        print(f"{name:>7}: {statistics.median(values):7.2f} ms a step (median of {len(values)} turns)")
    print(f"  ratio: {statistics.median(ratios):7.4f}")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_loop(script, accelerator, data, normalizer):
    """A loop as a tutorial writes it; yields after every step."""
    torch.manual_seed(0)
    policy = train_vfp.Policy(script, checkpoint.PolicySpec.of(data)).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=script.optim.lr, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        policy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(script.optim.ema_decay)
    )
    batches = iter(loader(script, accelerator, data))
    while True:
        batch = next(batches).to(accelerator.device)
        with accelerator.autocast():
            loss = train_vfp.compute_loss(policy, batch, normalizer, script)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), script.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(policy)
        yield


def script_loop(script, accelerator, data, normalizer, folder: Path):
    """The loop of train_vfp.py, without evaluation and checkpoints; yields after every step."""
    torch.manual_seed(0)
    policy = train_vfp.Policy(script, checkpoint.PolicySpec.of(data)).to(accelerator.device)
    optimizer = build_optimizer(policy, script.optim)
    averaged = AveragedPolicy(policy, optimizer, script.optim.ema_decay)
    ddp_policy, optimizer = accelerator.prepare(policy, optimizer)
    scheduler = build_scheduler(optimizer.optimizer, policy, script.optim, 10**6, 0)
    batches = iter(loader(script, accelerator, data))
    quiet = replace(script, run=replace(script.run, tracker="none"))
    tracker = Tracker(accelerator, folder, quiet, 10**6)
    clip = GradientClipper(policy, optimizer.optimizer, script.optim.grad_clip)
    guard = Guard(accelerator, quiet.run, tracker)
    policy.train()
    step = samples = 0
    while True:
        with accelerator.accumulate(ddp_policy):
            with tracker.waiting():
                batch = next(batches).to(accelerator.device)
            count = accelerator.reduce((~batch.is_pad).sum().float(), "mean")
            loss = train_vfp.compute_loss(ddp_policy, batch, normalizer, script, count=count)
            tracker.add({"loss": loss})
            accelerator.backward(or_nan(loss))
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                tracker.add(clip())
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        averaged.update()
        step, samples = step + 1, samples + script.optim.batch_size
        if step % script.run.log_every == 0:
            tracker.log(step, samples, learning_rates(optimizer.optimizer))
        clip.remember()
        guard.end_step()
        yield


def loader(script, accelerator, data):
    pin = accelerator.device.type == "cuda"
    return make_loader(data, script.optim.batch_size, 0, script.data.num_workers, pin_memory=pin)


if __name__ == "__main__":
    cli(main, Config)
