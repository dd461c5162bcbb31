"""Evaluate a finished run: held-out error, closed-loop success, latency, pictures.

    python evaluate.py runs/vfp-20260301-101500
    python evaluate.py runs/vfp-20260301-101500 --sample-steps 1 2 10 --episodes 500
    python evaluate.py runs/cfg-vqvae-20260301-101500 --guidance 0 1 2 4

Held-out episodes: the mean absolute error of sampled action chunks (normalized actions, so that dimensions
can be averaged) beside predictors that need no network. A run on the built-in task is rolled out in closed
loop as well, all episodes in one batch. Everything lands in RUN/evaluation: `results.json`, `heldout.png`,
for the built-in task `rollouts.png` and `rollouts.gif`, for a policy with codes or experts
`alternatives.png`, and `guidance.png` if a sweep was asked for.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from common import plots
from common.config import UserPath, cli, options
from common.data import ChunkDataset, open_dataset, split_episodes
from common.errors import UserError
from common.files import read_json
from common.inference import RobotPolicy, load_policy


@options
class Config:
    """Evaluate a trained policy: held-out error, closed-loop success on the built-in task, latency."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "last"
    """`last`, or the number of a saved step."""
    episodes: PositiveInt = 200
    """Closed-loop episodes; only for runs on the built-in task."""
    sample_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 2, 1)
    """Numbers of integration steps to evaluate; the first is used for held-out error and pictures."""
    guidance: tuple[float, ...] = ()
    """Guidance scales to compare, with the first number of steps; for policies trained with guidance."""
    execute_steps: PositiveInt | None = None
    """Actions of a chunk that are executed before the next is sampled (default: half of it)."""
    seed: NonNegativeInt = 1_000_000
    """Seed of episodes and noise. The same seed gives every policy the same episodes."""
    heldout_samples: PositiveInt = 2000
    """At most this many held-out steps, evenly spaced, are compared."""
    batch_size: PositiveInt = 64
    """Observations per forward pass."""
    dataset: tuple[str, ...] = ()
    """Where the run's dataset is now, if it has moved."""
    cache_dir: UserPath | None = None
    """Folder of decoded copies of datasets, if it is not the run's."""


def main(config: Config) -> None:
    policy = load_policy(config.run, config.checkpoint, seed=config.seed)
    if config.guidance and not hasattr(policy.config, "guidance"):
        raise UserError(f"{policy.script.__name__} trains no guidance: leave --guidance out.")
    is_demo = policy.config.data.dataset == ("demo",)
    moved = {"dataset": config.dataset or None, "cache_dir": config.cache_dir}
    data = replace(policy.config.data, **{name: value for name, value in moved.items() if value is not None})
    policy.config = replace(policy.config, data=data)
    folder = config.run / "evaluation"
    folder.mkdir(exist_ok=True)
    results = {"checkpoint": policy.checkpoint.name, "step": policy.trained_steps, "seed": config.seed}
    results["device"] = str(policy.device)
    print(f"{config.run}, {policy.checkpoint.name}, on {policy.device}")

    results["heldout"] = evaluate_heldout(policy, config, folder)
    if is_demo:
        results["closed_loop"] = evaluate_closed_loop(policy, config, folder)
    results["latency_ms"] = measure_latency(policy, config)
    if config.guidance:
        results["guidance"] = sweep_guidance(policy, config, folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    report(results, folder)


# Held-out episodes


def evaluate_heldout(policy: RobotPolicy, config: Config, folder: Path) -> dict | None:
    """Error of sampled chunks on episodes the run did not train on, beside predictors without a network.

    Each predictor gives a chunk (T, A) for a held-out step; its `mae` is the mean absolute error of the
    normalized actions over the steps that exist, `per_dimension` the same for each action dimension in
    recorded units.

    - mean: the mean action of the training episodes.
    - hold: the present state, where state and action share a space.
    - linear: ridge regression of the chunk on the state.
    - nearest: the chunk that followed the training state nearest to the present one.
    - mismatched: the policy itself, shown the images of another held-out step; how much it uses its eyes.
    """
    data = held_out_data(policy, config)
    if data is None:
        print("no held-out episodes (--val-fraction 0): skipping the held-out error")
        return None
    store, train_set, val_set, chosen = data
    rows = val_set.rows[chosen]
    predictions = {
        "policy": sample_chunks(policy, val_set, chosen, config),
        "mismatched": sample_chunks(
            policy, val_set, chosen, config, images_from=np.roll(chosen, len(chosen) // 2)
        ),
        **trivial_predictions(store, train_set, rows, policy),
    }
    episodes = np.unique(store.episode_of(val_set.rows))
    results = {"steps": len(chosen), "episodes": len(episodes), "sample_steps": config.sample_steps[0]}
    for name, chunks in predictions.items():
        error, per_dimension = chunk_error(chunks, val_set, rows, policy)
        results[name] = {"mae": error, "per_dimension": per_dimension}
    draw_heldout(policy, store, episodes[0], config, folder / "heldout.png")
    if hasattr(policy.script, "draw_alternatives"):
        draw = policy.script.draw_alternatives
        draw(policy.model, val_set, policy.normalizer, policy.config, folder / "alternatives.png")
    return results


def held_out_data(policy: RobotPolicy, config: Config) -> tuple | None:
    """The store, its training set, its held-out set, and which of that set's samples are compared."""
    data = policy.config.data
    store = open_dataset(data)
    try:
        saved = read_json(config.run / "config.json")["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{config.run} has no config.json that names its data: copy the whole run folder to evaluate it."
        ) from None
    if saved != store.fingerprint:
        raise UserError(
            f"{store.source} has changed since {config.run} was trained on it: restore it to evaluate."
        )
    train_episodes, held_out = split_episodes(store, data.val_fraction, policy.config.run.seed)
    if len(held_out) == 0:
        return None
    chunking = (policy.horizon, data.proprio_history, data.action_offset)
    train_set = ChunkDataset(store, train_episodes, *chunking)
    val_set = ChunkDataset(store, held_out, *chunking)
    num = min(config.heldout_samples, len(val_set))
    return store, train_set, val_set, np.linspace(0, len(val_set) - 1, num).astype(int)


def chunk_error(
    chunks: Tensor, dataset: ChunkDataset, rows: np.ndarray, policy: RobotPolicy
) -> tuple[float, dict[str, float]]:
    """Mean absolute error of chunks in recorded units: of normalized actions; by dimension, in units."""
    recorded, is_pad = dataset.chunks(rows)
    in_units = (chunks - torch.from_numpy(recorded)).abs()[torch.from_numpy(~is_pad)]  # (real steps, A)
    error = (in_units / policy.normalizer.action_scale.cpu()).mean().item()
    return error, dict(zip(policy.spec.action_names, in_units.mean(0).tolist(), strict=True))


def sample_chunks(
    policy: RobotPolicy, dataset: ChunkDataset, chosen: np.ndarray, config: Config, images_from=None
) -> Tensor:
    """Chunks (len(chosen), T, A) in recorded units; `images_from` takes the images from other steps."""
    policy.reset()
    chunks = []
    images_from = chosen if images_from is None else images_from
    splits = range(0, len(chosen), config.batch_size)
    for start in tqdm(splits, desc="held-out chunks", unit="batch", leave=False):
        part = slice(start, start + config.batch_size)
        proprio = dataset.__getitems__(chosen[part].tolist()).proprio
        images = dataset.__getitems__(images_from[part].tolist()).images
        chunks.append(policy.sample(images, proprio, config.sample_steps[0]).cpu())
    return torch.cat(chunks)


def trivial_predictions(
    store, train_set: ChunkDataset, rows: np.ndarray, policy: RobotPolicy
) -> dict[str, Tensor]:
    """Predictors that need no network; see `evaluate_heldout`. (V, T, A) each, in recorded units."""
    horizon, action_dim = policy.horizon, store.action.shape[1]
    state, train_state = store.state[rows], store.state[train_set.rows]
    train_chunks, _ = train_set.chunks(train_set.rows)  # (S, T, A)
    predictions = {
        "mean": np.broadcast_to(store.action[train_set.rows].mean(0), (len(rows), horizon, action_dim)).copy()
    }
    if store.shared_space:
        predictions["hold"] = np.repeat(state[:, None], horizon, axis=1)

    mean, scale = train_state.mean(0), train_state.std(0) + 1e-6
    x, x_train = (state - mean) / scale, (train_state - mean) / scale
    design = np.concatenate([x_train, np.ones((len(x_train), 1))], 1).astype(np.float64)
    gram = design.T @ design + 1e-3 * len(design) * np.eye(design.shape[1]) / 100
    weights = np.linalg.solve(gram, design.T @ train_chunks.reshape(len(design), -1))
    linear = np.concatenate([x, np.ones((len(x), 1))], 1) @ weights
    predictions["linear"] = linear.reshape(-1, horizon, action_dim).astype(np.float32)

    nearest = torch.cat(
        [torch.cdist(part, torch.from_numpy(x_train)).argmin(1) for part in torch.from_numpy(x).split(256)]
    )
    predictions["nearest"] = train_chunks[nearest.numpy()]
    return {name: torch.from_numpy(chunks) for name, chunks in predictions.items()}


def draw_heldout(policy: RobotPolicy, store, episode: int, config: Config, path: Path) -> None:
    """One held-out episode: every action dimension as recorded, and the chunks sampled along the way."""
    data = policy.config.data
    dataset = ChunkDataset(
        store, np.array([episode]), policy.horizon, data.proprio_history, data.action_offset
    )
    starts = np.arange(0, len(dataset), max(policy.horizon // 2, 1))
    chunks = sample_chunks(policy, dataset, starts, config).numpy()
    recorded = store.action[dataset.rows + data.action_offset]
    names = policy.spec.action_names
    figure, axes = plots.grid(len(names), min(4, len(names)), (4, 2.3))
    seconds = np.arange(len(recorded)) / store.fps
    for d, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        axis.plot(seconds, recorded[:, d], color="black", lw=1.5, label="recorded")
        for start, chunk in zip(starts, chunks, strict=True):
            label = "sampled chunks" if start == 0 else None
            part = seconds[start : start + policy.horizon]
            axis.plot(part, chunk[: len(part), d], color="tab:blue", lw=1, alpha=0.7, label=label)
        axis.set_title(name, fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("seconds", fontsize=9)
    plots.save_figure(figure, path, f"held-out episode {episode}, {config.sample_steps[0]} sampling steps")


# Closed loop, built-in task


def evaluate_closed_loop(policy: RobotPolicy, config: Config, folder: Path) -> dict[str, dict]:
    """Success over fresh episodes of the built-in task for each number of sampling steps."""
    results = {}
    for index, steps in enumerate(config.sample_steps):
        simulator, trace = roll_out(policy, config, steps)
        results[str(steps)] = summarize(simulator)
        if index == 0:
            draw_rollouts(simulator, trace, results[str(steps)], folder / "rollouts.png")
            save_gif(simulator, trace, folder / "rollouts.gif")
    simulator, _ = roll_out(policy, config, config.sample_steps[0], mismatched=True)
    results["mismatched"] = summarize(simulator)
    return results


def roll_out(policy: RobotPolicy, config: Config, sample_steps: int, mismatched: bool = False):
    """Roll out all episodes together.

    Args:
        mismatched: show the policy the images of another episode: what it achieves without its eyes.

    Returns:
        The simulator at the end, and the hands' positions (steps + 1, E, 2, 2).
    """
    from common.data.demo import MAX_STEPS, Simulator

    simulator = Simulator(config.episodes, config.seed)
    policy.reset()
    history, offset = policy.spec.proprio_history, policy.spec.action_offset
    execute = config.execute_steps or max(policy.horizon // 2, 1)
    execute = max(min(execute, policy.horizon - offset), 1)
    trace, states = [simulator.hands.copy()], [simulator.state] * history
    latest: np.ndarray | None = None  # the chunks being executed (E, T, A)
    with tqdm(
        total=MAX_STEPS, desc=f"rollouts, {sample_steps} sampling steps", unit="step", leave=False
    ) as bar:
        while not simulator.done.all():
            images = torch.from_numpy(simulator.images()).permute(0, 1, 4, 2, 3)  # (E, 3, 3, H, W)
            images = images.roll(1, dims=0) if mismatched else images
            proprio = torch.from_numpy(np.stack(states[-history:], axis=1))  # (E, K, P)
            parts = zip(images.split(config.batch_size), proprio.split(config.batch_size), strict=True)
            chunks = torch.cat([policy.sample(i, p, sample_steps).cpu() for i, p in parts]).numpy()
            # A chunk begins `offset` steps from now; until then the one before it is still due.
            before = chunks[:, :1].repeat(offset, 1) if latest is None else latest[:, execute:][:, :offset]
            latest = chunks
            for actions in np.concatenate([before, chunks], axis=1).swapaxes(0, 1)[:execute]:
                simulator.step(actions)
                trace.append(simulator.hands.copy())
                states.append(simulator.state)
                bar.update()
    return simulator, np.stack(trace)


def summarize(simulator) -> dict:
    """Rates over episodes; `modes` are the shares of the four ways past the obstacles among successes."""
    episodes, success = len(simulator.success), float(simulator.success.mean())
    low, high = wilson_interval(int(simulator.success.sum()), episodes)
    sides = simulator.sides[simulator.success]
    modes = {
        f"{left}-{right}": float(((sides[:, 0] == a) & (sides[:, 1] == b)).mean()) if len(sides) else 0.0
        for left, a in (("left", -1), ("right", 1))
        for right, b in (("left", -1), ("right", 1))
    }
    timeouts = ~simulator.success & ~simulator.collided
    return {
        "success": success,
        "low": low,
        "high": high,
        "collisions": float(simulator.collided.mean()),
        "timeouts": float(timeouts.mean()),
        "modes": modes,
        "episodes": episodes,
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927): right for small numbers and near 0 and 1."""
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def draw_rollouts(simulator, trace: np.ndarray, summary: dict, path: Path) -> None:
    """The ways of all hands, coloured by outcome."""
    from matplotlib.patches import Circle

    from common.data.demo import OBSTACLE_RADIUS, OBSTACLES

    figure, axes = plots.grid(2, 2, (5.5, 5.2))
    drawn = {
        f"{summary['success']:.1%} of {summary['episodes']} episodes succeed": simulator.success,
        f"{summary['collisions']:.1%} collide, {summary['timeouts']:.1%} time out": ~simulator.success,
    }
    for axis, (title, wanted) in zip(axes.flat, drawn.items(), strict=True):
        for centre in OBSTACLES:
            axis.add_patch(Circle(centre, OBSTACLE_RADIUS, color="0.35"))
        for episode in np.flatnonzero(wanted):
            for arm, color in enumerate(("tab:red", "tab:blue")):
                way = trace[: simulator.steps[episode] + 1, episode, arm]
                axis.plot(*way.T, color=color, lw=0.6, alpha=0.6)
                axis.plot(*simulator.targets[episode, arm], "x", color=color, ms=4)
        axis.set(xlim=(-1.1, 1.1), ylim=(-1, 1), aspect="equal", title=title)
    plots.save_figure(figure, path)


def save_gif(
    simulator, trace: np.ndarray, path: Path, columns: int = 4, rows: int = 2, size: int = 144
) -> None:
    """The first episodes as the head camera sees them, side by side; ended ones stand still."""
    from PIL import Image

    from common.data.demo import FPS, render

    num = min(columns * rows, trace.shape[1])
    length = min(int(simulator.steps[:num].max()) + 8, len(trace))
    frames = []
    for hands in trace[:length]:
        views = render(hands[:num], simulator.targets[:num], size)[:, 0]
        views = np.pad(views, ((0, columns * rows - num), (2, 2), (2, 2), (0, 0)), constant_values=255)
        grid = views.reshape(rows, columns, *views.shape[1:]).swapaxes(1, 2)
        frames.append(Image.fromarray(grid.reshape(rows * (size + 4), columns * (size + 4), 3)).quantize(32))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)


# Guidance


def sweep_guidance(policy: RobotPolicy, config: Config, folder: Path) -> dict[str, dict]:
    """Held-out error and, on the built-in task, closed-loop rates for each guidance scale."""
    data, results, trained = held_out_data(policy, config), {}, policy.config
    for scale in config.guidance:
        policy.config = replace(trained, guidance=scale)
        result = {}
        if data:
            _, _, val_set, chosen = data
            chunks = sample_chunks(policy, val_set, chosen, config)
            result["mae"] = chunk_error(chunks, val_set, val_set.rows[chosen], policy)[0]
        if trained.data.dataset == ("demo",):
            result |= summarize(roll_out(policy, config, config.sample_steps[0])[0])
        results[f"{scale:g}"] = result
    policy.config = trained
    draw_guidance(results, folder / "guidance.png")
    return results


def draw_guidance(results: dict[str, dict], path: Path) -> None:
    """What grows and falls with the guidance scale: error, success, collisions, shares of the modes."""
    scales = [float(scale) for scale in results]
    panels = {"held-out error": {"mae": [result.get("mae", math.nan) for result in results.values()]}}
    if all("success" in result for result in results.values()):
        panels["episodes"] = {
            name: [result[name] for result in results.values()]
            for name in ("success", "collisions", "timeouts")
        }
        panels["modes among successes"] = {
            mode: [result["modes"][mode] for result in results.values()]
            for mode in next(iter(results.values()))["modes"]
        }
    figure, axes = plots.grid(len(panels), len(panels), (4.5, 3.6))
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(scales, values, marker="o", label=name)
        axis.set(title=title, xlabel="guidance scale")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    plots.save_figure(figure, path)


# Latency and report


def measure_latency(policy: RobotPolicy, config: Config, repeats: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds from one raw observation to one chunk, for each number of sampling steps."""
    frame = np.zeros((*policy.spec.image_size, 3), np.uint8)
    state = policy.normalizer.state_offset.cpu().numpy()
    if policy.spec.state_rotations:
        state = policy.spec.state_rotations.decode(state)
    state = np.stack([state] * policy.spec.proprio_history)
    observation = {"images": dict.fromkeys(policy.spec.cameras, frame), "state": state}
    results = {}
    for steps in config.sample_steps:
        times = []
        for _ in range(repeats + 3):
            start = time.perf_counter()
            policy.act(observation, steps)
            times.append(1000 * (time.perf_counter() - start))
        results[str(steps)] = {
            "median": float(np.median(times[3:])),
            "p95": float(np.quantile(times[3:], 0.95)),
        }
    return results


def report(results: dict, folder: Path) -> None:
    """Print what a person wants to know."""
    heldout = results["heldout"]
    if heldout:
        print(f"held-out error of action chunks (normalized, {heldout['steps']} steps):")
        for name in ("policy", "mean", "hold", "linear", "nearest", "mismatched"):
            if name in heldout:
                print(f"  {name:<11} {heldout[name]['mae']:.4f}")
    for steps, latency in results["latency_ms"].items():
        print(
            f"latency, {steps:>2} sampling steps: {latency['median']:.1f} ms (95 %: {latency['p95']:.1f} ms)"
        )
    for steps, rates in results.get("closed_loop", {}).items():
        name = "images of another episode" if steps == "mismatched" else f"{steps:>2} sampling steps"
        modes = ", ".join(f"{100 * share:.0f}" for share in rates["modes"].values())
        print(
            f"success, {name}: {rates['success']:.1%} [{rates['low']:.1%}, {rates['high']:.1%}] of "
            f"{rates['episodes']} episodes, collisions {rates['collisions']:.1%}, modes {modes} %"
        )
    for scale, rates in results.get("guidance", {}).items():
        error = f"held-out error {rates['mae']:.4f}  " if "mae" in rates else ""
        success = (
            f"success {rates['success']:.1%}, collisions {rates['collisions']:.1%}"
            if "success" in rates
            else ""
        )
        print(f"guidance {scale:>4}: {error}{success}")
    for path in sorted([*folder.glob("*.png"), *folder.glob("*.gif"), *folder.parent.glob("*.png")]):
        print(f"picture: {path}")
    print(f"numbers: {folder / 'results.json'}")


if __name__ == "__main__":
    cli(main, Config)
