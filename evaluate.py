"""Evaluate a finished run: held-out error, closed-loop success, latency, pictures.

    python evaluate.py runs/vfp-20260301-101500
    python evaluate.py runs/vfp-20260301-101500 --sample-steps 1 2 10 --episodes 500
    python evaluate.py runs/cfg-vqvae-20260301-101500 --guidance 0 1 2 4
    python evaluate.py runs/vfp-20260301-101500 --delay 0 2 4

On held-out episodes, it measures the mean absolute error of sampled action chunks (normalized actions, so
that dimensions can be averaged) and of predictors that need no network. With `--env`, and on the built-in
task, the policy also acts in closed loop. Everything is written to RUN/evaluation: `results.json`,
`heldout.png`, films of the closed loop (`rollouts.mp4`, `rollouts.gif`), for the built-in task
`rollouts.png`, for a policy with codes or experts `alternatives.png`, for a sweep `guidance.png`. An earlier
evaluation is moved to `earlier-1` there, the next one to `earlier-2`. Until all is measured, what has been
measured is in `unfinished.json`.
"""

import common  # isort: skip  # noqa: F401  (before PyTorch, whose threads it sets up)
import math
import time
from collections.abc import Iterator
from dataclasses import field, replace
from itertools import count, product
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import tyro
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from common import exported, plots
from common.config import Flat, UserPath, cli, options
from common.data import ChunkDataset, EpisodeStore, open_dataset, split_episodes
from common.data.source import spaced
from common.data.tasks import listed
from common.envs import EnvConfig
from common.errors import UserError
from common.files import read_json, write_json
from common.film import side_by_side, write_gif, write_mp4
from common.inference import Controller, Join, RobotPolicy, load_policy
from common.rollout import (
    Episode,
    Eyes,
    first_tasks,
    make_environments,
    rates,
    refuse_unknown,
    roll_out,
    velocity_changes,
)

WRITTEN = ("results.json", "unfinished.json", "heldout.png", "alternatives.png", "guidance.png")
WRITTEN += ("rollouts.mp4", "rollouts.gif", "rollouts.png")
FILMED = 16  # episodes to choose the films from
LISTED = 50  # tasks, of those in results.json
UNDRAWN = ("mae", "low", "high", "steps")  # results that are not shares of episodes


@options
class Config:
    """Evaluate a trained policy: held-out error, closed-loop success, latency."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder."""
    checkpoint: str = "last"
    """`last`, or the number of a saved step."""
    simulator: Flat[EnvConfig] = field(default_factory=EnvConfig)
    episodes: PositiveInt = 200
    """Episodes to act in, for each number of sampling steps."""
    blind_episodes: PositiveInt | None = None
    """Episodes to act in with grey pictures, and with another episode's pictures (default: --episodes)."""
    parallel: PositiveInt = 20
    """Episodes that run at once, in one forward pass."""
    sample_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 2, 1)
    """Numbers of integration steps to evaluate; the first is used for held-out error and pictures."""
    guidance: tuple[float, ...] = ()
    """Guidance scales to compare, with the first number of steps; for policies trained with guidance."""
    delay: tuple[NonNegativeInt, ...] = ()
    """Inference delays to compare, with the first number of sampling steps: control steps between an
    observation and its chunk. Time is simulated: this machine's speed does not matter."""
    join: tuple[Join, ...] = ()
    """With --delay: how chunks join, see docs/chunks.md. Default: all ways the policy was trained for."""
    task: str | None = None
    """Instruction for a policy of several tasks. Default: the environment's."""
    execute_steps: PositiveInt | None = None
    """Actions of a chunk to execute before the next is sampled (default: half the chunk, minus --delay)."""
    seed: NonNegativeInt = 1_000_000
    """Seed of episodes and noise. The same seed gives every policy the same episodes, far from those that
    `common/envs/record.py` records. Episode n has the seed plus n: other episodes need
    a seed that is further away than --episodes."""
    heldout_samples: PositiveInt = 2000
    """Evaluate on at most this many held-out steps, evenly spaced."""
    batch_size: PositiveInt = 64
    """Observations per forward pass."""
    dataset: tuple[str, ...] = ()
    """Where the run's dataset is now, if it has moved."""
    cache_dir: UserPath | None = None
    """Folder of decoded copies of datasets, if it is not the run's."""


def main(config: Config) -> None:
    if exported.find(config.run):
        raise UserError(
            f"{config.run} is an export, which does not name its data: evaluate its run folder, or act with "
            f"lerobot-eval."
        )
    policy = load_policy(config.run, config.checkpoint, seed=config.seed)
    if config.guidance and not hasattr(policy.config, "guidance"):
        raise UserError(f"{policy.script.__name__} trains no guidance: leave --guidance out.")
    if set(config.guidance) - {1} and not policy.config.cfg_dropout:
        raise UserError("--guidance: the policy was trained with --cfg-dropout 0, so never without a latent.")
    config = replace(config, simulator=config.simulator.in_place_of_demo(policy.config.data.dataset))
    for flag in ("delay", "task", "execute_steps"):
        if getattr(config, flag) and not config.simulator.env:
            raise UserError(f"--{flag.replace('_', '-')} needs --env, the environment to act in.")
    if config.join and not config.delay:
        raise UserError("--join needs --delay, the delays at which to compare how chunks join.")
    if config.task and policy.spec.tasks is None:
        raise UserError("--task: the policy was not told instructions in training, so it takes none.")
    if config.execute_steps is not None:
        try:
            Controller(policy, 1, config.execute_steps)
        except ValueError as error:
            raise UserError(f"--execute-steps: {error}.") from None
    delays = possible_delays(policy, config)
    moved = {"dataset": config.dataset or None, "cache_dir": config.cache_dir}
    data = replace(policy.config.data, **{name: value for name, value in moved.items() if value is not None})
    policy.config = replace(policy.config, data=data)
    folder = config.run / "evaluation"
    folder.mkdir(exist_ok=True)
    results = {"checkpoint": policy.checkpoint.name, "step": policy.trained_steps, "seed": config.seed}
    results["device"] = str(policy.device)
    print(f"{config.run}, {policy.checkpoint.name}, on {policy.device}")

    if config.simulator.env:  # first, to report what is missing before minutes of other work
        num = min(config.parallel, config.episodes)
        environments = make_environments(config.simulator, policy.spec.image_size, num)
        first, told = environments[0], policy.spec.tasks is not None
        asked = first_tasks(policy.spec, environments if told else environments[:1], config.seed, range(num))
        if told:
            refuse_unknown(policy, first, [config.task] if config.task else asked)
        results |= {"env": config.simulator.env, "max_steps": first.max_steps}
        results |= {"env_map": config.simulator.env_map, "success_reward": config.simulator.success_reward}
        results |= {"execute_steps": config.execute_steps, "task": config.task}
    set_aside(folder)
    results["heldout"] = evaluate_heldout(policy, config, folder)
    results["latency_ms"] = measure_latency(policy, config)
    unfinished = folder / "unfinished.json"
    write_json(unfinished, results)
    for place, found in evaluate_closed_loop(policy, config, folder) if config.simulator.env else ():
        results.setdefault("closed_loop", {})[place] = found
        write_json(unfinished, results)
    for place, found in sweep_guidance(policy, config, folder) if config.guidance else ():
        results.setdefault("guidance", {})[place] = found
        write_json(unfinished, results)
    for delay, join in delays:
        found = act_with_delay(policy, config, delay, join)
        results.setdefault("delay", {}).setdefault(str(delay), {})[join] = found
        write_json(unfinished, results)
    unfinished.rename(folder / "results.json")
    report(results, folder)


def set_aside(folder: Path) -> None:
    """Move an earlier evaluation to a folder of its own: with other options it has other pictures."""
    earlier = [folder / name for name in WRITTEN if (folder / name).exists()]
    if earlier:
        aside = next(path for n in count(1) if not (path := folder / f"earlier-{n}").exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"the earlier evaluation is now in {aside}")


# Held-out episodes


def evaluate_heldout(policy: RobotPolicy, config: Config, folder: Path) -> dict | None:
    """Error of sampled chunks on episodes the run did not train on, and of predictors without a network.

    Each predictor gives a chunk (T, A) for a held-out step; its `mae` is the mean absolute error of the
    normalized actions over the steps that exist, `per_dimension` the same for each action dimension in
    recorded units.

    - mean: the mean action of the training episodes.
    - hold: the current state, if state and action share a space.
    - linear: ridge regression of the chunk on the state.
    - nearest: the chunk that followed the training state nearest to the current one.
    - mismatched: the policy, given another held-out step's images; shows how much it uses its images.
    - misled: with several tasks, the policy, told another one; shows how much it uses its instruction.

    With several tasks, also the policy's error on each.
    """
    data = held_out_data(policy, config)
    if data is None:
        print("no held-out episodes (--val-fraction 0, or a single episode): skipping the held-out error")
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
    if policy.spec.tasks is not None and len(policy.spec.tasks.sentences) > 1:
        predictions["misled"] = sample_chunks(policy, val_set, chosen, config, misled=True)
    episodes = np.unique(store.episode_of(val_set.rows))
    results = {"steps": len(chosen), "episodes": len(episodes), "sample_steps": config.sample_steps[0]}
    for name, chunks in predictions.items():
        error, per_dimension = chunk_error(chunks, val_set, rows, policy)
        results[name] = {"mae": error, "per_dimension": per_dimension}
    tasks = store.episode_task_numbers[store.episode_of(rows)]
    if len(store.instructions) > 1:
        results["tasks"] = {}
        for number in np.unique(tasks[tasks >= 0]).tolist():
            own = tasks == number
            error, _ = chunk_error(predictions["policy"][own], val_set, rows[own], policy)
            results["tasks"][store.instructions[number]] = {"mae": error, "steps": int(own.sum())}
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
        chosen = f", or {data.episodes_file}," if data.episodes_file else ""
        raise UserError(
            f"{store.source}{chosen} has changed since {config.run} was trained on it: restore it to "
            f"evaluate."
        )
    told = policy.spec.tasks is not None
    if told and policy.spec.tasks.sentences != store.instructions:
        raise UserError(
            f"{config.run} was trained on datasets with other names "
            f"({listed(policy.spec.tasks.sentences)}): use these names again to evaluate."
        )
    train_episodes, held_out = split_episodes(store, data.val_fraction, policy.config.run.seed)
    if len(held_out) == 0:
        return None
    train_set, val_set = (samples_of(policy, store, part) for part in (train_episodes, held_out))
    num = min(config.heldout_samples, len(val_set))
    return store, train_set, val_set, np.linspace(0, len(val_set) - 1, num).astype(int)


def samples_of(policy: RobotPolicy, store: EpisodeStore, episodes: np.ndarray) -> ChunkDataset:
    """Samples of some episodes, in the form that the policy was trained on."""
    data, told = policy.config.data, policy.spec.tasks is not None
    shape = (policy.horizon, data.proprio_history, data.action_offset)
    return ChunkDataset(store, episodes, *shape, told, data.image_history, data.image_stride)


def chunk_error(
    chunks: Tensor, dataset: ChunkDataset, rows: np.ndarray, policy: RobotPolicy
) -> tuple[float, dict[str, float]]:
    """Mean absolute error of chunks in recorded units: of normalized actions; by dimension, in units."""
    recorded, is_pad = dataset.chunks(rows)
    in_units = (chunks - torch.from_numpy(recorded)).abs()[torch.from_numpy(~is_pad)]  # (real steps, A)
    error = (in_units / policy.normalizer.action_scale.cpu()).mean().item()
    return error, dict(zip(policy.spec.action_names, in_units.mean(0).tolist(), strict=True))


def sample_chunks(
    policy: RobotPolicy,
    dataset: ChunkDataset,
    chosen: np.ndarray,
    config: Config,
    images_from=None,
    misled: bool = False,
) -> Tensor:
    """Chunks (len(chosen), T, A) in recorded units; `images_from` takes the images from other steps.

    A `misled` policy is told another instruction.
    """
    policy.reset(0)
    chunks = []
    images_from = chosen if images_from is None else images_from
    splits = range(0, len(chosen), config.batch_size)
    for start in tqdm(splits, desc="held-out chunks", unit="batch", leave=False):
        part = slice(start, start + config.batch_size)
        batch = dataset.__getitems__(chosen[part].tolist())
        images = dataset.__getitems__(images_from[part].tolist()).images
        task = (batch.task + 1) % len(policy.spec.tasks.sentences) if misled else batch.task
        chunks.append(policy.sample(images, batch.proprio, config.sample_steps[0], task=task).cpu())
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
    """Draw one held-out episode: each action dimension as recorded, and chunks sampled along the way."""
    dataset = samples_of(policy, store, np.array([episode]))
    starts = np.arange(0, len(dataset), max(policy.horizon // 2, 1))
    chunks = sample_chunks(policy, dataset, starts, config).numpy()
    recorded = store.action[dataset.rows + dataset.action_offset]
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
    number = store.episode_indices[episode]
    plots.save_figure(figure, path, f"held-out episode {number}, {config.sample_steps[0]} sampling steps")


# Closed loop


def evaluate_closed_loop(policy: RobotPolicy, config: Config, folder: Path) -> Iterator[tuple[str, dict]]:
    """Yields success in fresh episodes for each number of sampling steps, and with wrong inputs:

    - grey: the policy sees grey pictures. A task that succeeds then does not test vision.
    - mismatched: it sees another episode's pictures.
    - misled: with several tasks, it is told another one than the environment's.
    """
    for index, steps in enumerate(config.sample_steps):
        episodes = act(policy, config, steps, film=0 if index else FILMED)
        yield str(steps), rates(episodes)
        if index == 0:
            film(episodes, config, folder)
            if config.simulator.env == "demo":
                draw_rollouts(episodes, rates(episodes), config.seed, folder / "rollouts.png")
    blind = replace(config, episodes=config.blind_episodes or config.episodes)
    for name, eyes in {"grey": "grey", "mismatched": "other"}.items():
        if eyes == "grey" or blind.episodes > 1:
            yield name, rates(act(policy, blind, config.sample_steps[0], eyes))
    tasks = policy.spec.tasks
    if tasks is not None and len(tasks.sentences) > 1 and config.task is None:
        yield "misled", rates(act(policy, blind, config.sample_steps[0], misled=True))


def act(
    policy: RobotPolicy,
    config: Config,
    sample_steps: int,
    eyes: Eyes = "own",
    film: int = 0,
    delay: int = 0,
    join: Join = "naive",
    misled: bool = False,
) -> list[Episode]:
    """Roll out all episodes; see `common/rollout.py`. A `misled` policy is told each other task in turn."""

    def say_task(episode: Episode) -> str:
        if not misled:
            return config.task or episode.task
        others = [sentence for sentence in policy.spec.tasks.sentences if sentence != spaced(episode.task)]
        return others[episode.number % len(others)]

    at_once = max(config.parallel, 3) if eyes == "other" else config.parallel  # no episode may be alone
    num = min(at_once, config.episodes)
    environments = make_environments(config.simulator, policy.spec.image_size, num)
    seen = {"own": f"{sample_steps} sampling steps", "grey": "grey pictures", "other": "pictures of another"}
    what = "another task" if misled else seen[eyes] + (f", delay {delay}, {join}" if delay else "")
    with tqdm(total=config.episodes, desc=f"episodes, {what}", unit="episode", leave=False) as bar:
        options = (range(config.episodes), config.seed, sample_steps, config.execute_steps, eyes, film)
        progress = lambda done: bar.update(done - bar.n)  # noqa: E731
        return roll_out(policy, environments, *options, progress, delay, join, say_task)


def film(episodes: list[Episode], config: Config, folder: Path) -> None:
    """Write a film of some episodes side by side, failures first."""
    shown = sorted((e for e in episodes if e.frames), key=lambda episode: episode.success)[:8]
    frames, fps = side_by_side([e.frames for e in shown], [e.success for e in shown]), shown[0].film_fps
    write_mp4(folder / "rollouts.mp4", frames, fps)
    write_gif(folder / "rollouts.gif", frames, fps)


def draw_rollouts(episodes: list[Episode], summary: dict, seed: int, path: Path) -> None:
    """Draw the paths of all hands in the built-in task, one panel for each outcome."""
    from matplotlib.patches import Circle

    from common.data.demo import OBSTACLE_RADIUS, OBSTACLES, Simulator

    targets = Simulator(len(episodes), seed).targets
    figure, axes = plots.grid(2, 2, (5.5, 5.2))
    drawn = {
        f"{summary['success']:.1%} of {summary['episodes']} episodes succeed": True,
        f"{summary['collisions']:.1%} collide, {summary['timeouts']:.1%} time out": False,
    }
    for axis, (title, success) in zip(axes.flat, drawn.items(), strict=True):
        for centre in OBSTACLES:
            axis.add_patch(Circle(centre, OBSTACLE_RADIUS, color="0.35"))
        for episode in (episode for episode in episodes if episode.success == success):
            ways = np.stack(episode.states).reshape(-1, 2, 2)  # (steps + 1, arm, xy)
            for arm, color in enumerate(("tab:red", "tab:blue")):
                axis.plot(*ways[:, arm].T, color=color, lw=0.6, alpha=0.6)
                axis.plot(*targets[episode.number, arm], "x", color=color, ms=4)
        axis.set(xlim=(-1.1, 1.1), ylim=(-1, 1), aspect="equal", title=title)
    plots.save_figure(figure, path)


# Guidance


def sweep_guidance(policy: RobotPolicy, config: Config, folder: Path) -> Iterator[tuple[str, dict]]:
    """Yields held-out error and, with an environment, closed-loop rates for each guidance scale."""
    data, results, trained = held_out_data(policy, config), {}, policy.config
    for scale in config.guidance:
        policy.config = replace(trained, guidance=scale)
        result = {}
        if data:
            _, _, val_set, chosen = data
            chunks = sample_chunks(policy, val_set, chosen, config)
            result["mae"] = chunk_error(chunks, val_set, val_set.rows[chosen], policy)[0]
        if config.simulator.env:
            result |= rates(act(policy, config, config.sample_steps[0]))
        results[f"{scale:g}"] = result
        yield f"{scale:g}", result
    policy.config = trained
    draw_guidance(results, folder / "guidance.png")


def draw_guidance(results: dict[str, dict], path: Path) -> None:
    """Draw error, success, collisions and shares of the modes against the guidance scale."""
    scales = [float(scale) for scale in results]
    panels = {"held-out error": {"mae": [result.get("mae", math.nan) for result in results.values()]}}
    first = next(iter(results.values()))
    shares = [name for name, value in first.items() if isinstance(value, float) and name not in UNDRAWN]
    if shares:
        panels["episodes"] = {name: [result[name] for result in results.values()] for name in shares}
    for words in (name for name, value in first.items() if isinstance(value, dict) and name != "tasks"):
        panels[f"{words} among successes"] = {
            word: [result[words].get(word, 0.0) for result in results.values()] for word in first[words]
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


# Delay


def possible_delays(policy: RobotPolicy, config: Config) -> list[tuple[int, Join]]:
    """The pairs of `--delay` and `--join`; without `--join`, all ways that the policy was trained for.

    Raises:
        UserError: if chunks are too short for a delay, or the policy was not trained for what is asked.
    """
    found = []
    for delay, join in product(config.delay, config.join or get_args(Join)):
        try:
            Controller(policy, 1, config.execute_steps, delay=delay, join=join)
        except ValueError as error:
            raise UserError(f"--delay {delay}, --join {join}: {error}: change --execute-steps.") from None
        except UserError:
            if config.join or join != "prefix":
                raise
        else:
            found.append((delay, join))
    return found


def act_with_delay(policy: RobotPolicy, config: Config, delay: int, join: Join) -> dict:
    """With a delay: closed-loop rates, and how much velocity changes at seams and inside chunks."""
    episodes = act(policy, config, config.sample_steps[0], delay=delay, join=join)
    scale, rotations = policy.normalizer.action_scale.cpu().numpy(), policy.spec.action_rotations
    return {**rates(episodes), "velocity_change": velocity_changes(episodes, scale, rotations)}


# Latency and report


def measure_latency(policy: RobotPolicy, config: Config, repeats: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds from one raw observation to one chunk, for each number of sampling steps."""
    observation = policy.blank_observation()
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


def in_words(found: dict) -> str:
    """Rates of `common.rollout.rates` in one line."""
    parts = [
        f"{found['success']:.1%} [{found['low']:.1%}, {found['high']:.1%}] of {found['episodes']} episodes"
    ]
    for name, value in found.items():
        if name == "tasks":
            continue
        if isinstance(value, dict):
            parts.append(f"{name} " + ", ".join(f"{word} {share:.0%}" for word, share in value.items()))
        elif isinstance(value, float) and name not in UNDRAWN and name != "success":
            parts.append(f"{name} {value:.1%}")
    return ", ".join(parts)


def report(results: dict, folder: Path) -> None:
    """Print the main results."""
    heldout = results["heldout"]
    if heldout:
        print(f"held-out error of action chunks (normalized, {heldout['steps']} steps):")
        for name in ("policy", "mean", "hold", "linear", "nearest", "mismatched", "misled"):
            if name in heldout:
                print(f"  {name:<11} {heldout[name]['mae']:.4f}")
        each = list(heldout.get("tasks", {}).items())
        for task, found in each[:LISTED]:
            print(f"  {found['mae']:.4f} in {found['steps']} steps: {task}")
        if len(each) > LISTED:
            print(f"  and {len(each) - LISTED} more tasks")
    for steps, latency in results["latency_ms"].items():
        print(
            f"latency, {steps:>2} sampling steps: {latency['median']:.1f} ms (95 %: {latency['p95']:.1f} ms)"
        )
    blind = {"grey": "grey pictures", "mismatched": "pictures of another episode", "misled": "another task"}
    for steps, found in results.get("closed_loop", {}).items():
        print(f"success, {blind.get(steps, f'{steps:>2} sampling steps')}: {in_words(found)}")
        for task, own in found.get("tasks", {}).items() if steps.isdigit() else ():
            print(f"  {own['success']:.1%} of {own['episodes']}: {task}")
    for scale, found in results.get("guidance", {}).items():
        error = f"held-out error {found['mae']:.4f}  " if "mae" in found else ""
        print(f"guidance {scale:>4}: {error}{in_words(found) if 'success' in found else ''}")
    for delay, ways in results.get("delay", {}).items():
        for join, found in ways.items():
            changes = found.pop("velocity_change").items()
            print(f"delay {delay:>2}, {join:<8}: {in_words(found)}")
            parts = [
                f"{at} {x['mean']:.3f} (99 %: {x['p99']:.3f})" for at, x in changes if x["mean"] is not None
            ]
            print(f"  change of velocity: {', '.join(parts)}")
    for path in sorted([*folder.glob("*.png"), *folder.glob("rollouts.[gm]*"), *folder.parent.glob("*.png")]):
        print(f"picture: {path}")
    print(f"numbers: {folder / 'results.json'}")


if __name__ == "__main__":
    cli(main, Config)
