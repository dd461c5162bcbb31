"""The cost of experts: a training step and a chunk of `train_vfp_moe.py` with one, two, four and eight.

    python benchmarks/experts.py
    python benchmarks/experts.py --mixed-precision bf16 --d-model 512 --num-heads 8 --batch-size 64
    python benchmarks/experts.py --trained runs/methods/train_vfp_moe-0     # what each expert does, instead

All loops take turns in one process, so that other work on the machine slows all of them equally; ratios are
medians over turns. PyTorch counts the arithmetic: the time of a step may grow as fast as it, not faster.
"""

import statistics
import sys
import time
from dataclasses import field, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveInt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_vfp_moe
from common import plots
from common.config import Flat, UserPath, cli, options
from common.data import ChunkDataset, open_dataset, split_episodes
from common.data.demo import OBSTACLES
from common.errors import UserError
from common.inference import load_policy
from common.latent import first_latents
from common.optim import GradientClipper, build_optimizer
from common.run import start_run


@options
class Config:
    """Measure the cost of experts, or what the experts of a trained run do."""

    script: Flat[train_vfp_moe.Config] = field(default_factory=train_vfp_moe.Config)
    experts: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of experts."""
    rounds: PositiveInt = 10
    """Turns of each loop."""
    turn_steps: PositiveInt = 3
    """Steps per turn; chunks are ten times as many."""
    trained: UserPath | None = None
    """A run on the built-in task: compare its experts with the modes of the demonstrations, and draw both."""


def main(config: Config) -> None:
    if config.trained is not None:
        return compare_with_modes(config.trained)
    script = config.script
    run = start_run(script, train_vfp_moe.__file__)
    data = run.load_data(script.horizon, script.normalization)
    batch = data.train.__getitems__(list(range(script.optim.batch_size))).to(run.device)
    loops, gflops, times = {}, {}, {}
    for num in config.experts:
        chosen = replace(script, num_experts=num)
        torch.manual_seed(0)
        policy = train_vfp_moe.Policy(chosen, data.spec).to(run.device)
        loops[num] = steps(policy, chosen, batch, data.normalizer, run), chunks(policy, chosen, batch, run)
        # PyTorch does not count fused attention on a CPU, so counting uses the plain kernels.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            next(loops[num][0])
        gflops[num] = counter.get_total_flops() / 1e9
        times[num] = ([], [])
    counts = config.turn_steps, 10 * config.turn_steps
    for turn in range(config.rounds + 1):
        for num, pair in loops.items():
            for loop, kept, count in zip(pair, times[num], counts, strict=True):
                synchronize(run.device)
                start = time.perf_counter()
                for _ in range(count):
                    next(loop)
                synchronize(run.device)
                if turn:  # the first turn is a warm-up
                    kept.append((time.perf_counter() - start) / count * 1000)
    cuda = run.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, batch {script.optim.batch_size}, {script.decoder_layers} layers per expert, width "
        f"{script.d_model}, {run.accelerator.mixed_precision}; chunks one at a time, {script.sample_steps} "
        "steps"
    )
    print("experts   ms / step   ratio   GFLOP   ratio   ms / chunk   ratio")
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


def steps(policy, config, batch, normalizer, run):
    """Training steps on one batch; yields after each."""
    optimizer = build_optimizer(policy, config.optim)
    clip = GradientClipper(policy, optimizer, config.optim.grad_clip)
    while True:
        policy.train()
        clip.begin_step()
        with run.autocast():
            loss, _ = train_vfp_moe.compute_loss(policy, batch, normalizer, config, train=True)
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        yield


def chunks(policy, config, batch, run):
    """Chunks for one observation, as on a robot; yields after each."""
    while True:
        policy.eval()
        with run.autocast():
            train_vfp_moe.sample_actions(policy, batch.images[:1], batch.proprio[:1], config)
        yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def modes(states: list[np.ndarray]) -> np.ndarray:
    """How each episode, given by its states (L, 4), passes the obstacles.

    (E,), from 0 to 3: 2 if the left hand passes on the right, plus 1 if the right hand does.
    """
    sides = np.zeros((len(states), 2), int)
    for episode, state in enumerate(states):
        hands = state.reshape(-1, 2, 2)
        crossing = np.argmax(hands[..., 1] >= 0, axis=0)  # of each hand
        sides[episode] = hands[crossing, [0, 1], 0] > OBSTACLES[:, 0]
    return sides @ [2, 1]


def compare_with_modes(folder: Path) -> None:
    """Print the mutual information of experts and modes at the starts of episodes; draw latents by both."""
    from sklearn.metrics import normalized_mutual_info_score

    policy = load_policy(folder)
    if policy.script.__name__ != "train_vfp_moe":
        raise UserError(f"{folder} has no experts: give a run of train_vfp_moe.py.")
    config = policy.config
    store = open_dataset(config.data)
    episodes, _ = split_episodes(store, config.data.val_fraction, config.run.seed)
    spec = policy.spec
    data = ChunkDataset(store, episodes, config.horizon, spec.proprio_history, spec.action_offset)
    z, first = first_latents(policy.model, data, policy.normalizer, config.run.eval_samples)
    starts = store.episode_starts
    states = [store.state[starts[e] : starts[e + 1]] for e in store.episode_of(first.cpu().numpy())]
    labels = {"expert": policy.model.gate(z).argmax(dim=1), "mode": torch.from_numpy(modes(states))}
    plots.draw_latents(folder / "modes.png", z, labels)
    score = normalized_mutual_info_score(*(values.cpu().numpy() for values in labels.values()))
    print(f"{len(z)} episodes: normalized mutual information of experts and modes {score:.3f}")
    print(f"picture: {folder / 'modes.png'}")


if __name__ == "__main__":
    cli(main, Config)
