"""Acting in closed loop: several episodes at once, with one forward pass for all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import nn

from common.checkpoint import PolicySpec
from common.config import Flat, MayChange, options
from common.console import say
from common.data.rotation import Rotations
from common.data.source import spaced
from common.data.tasks import listed
from common.envs import EnvConfig, Environment, answering, make_environment
from common.errors import UserError
from common.film import shrunk, side_by_side, write_gif
from common.inference import Controller, Join, RobotPolicy

if TYPE_CHECKING:
    from common.run import Data, Run

FILM_FPS = 20  # pictures a second of a film, at most
AT_ONCE = 10  # episodes that act together while training
FILMED = 4  # of these, those that the main process films
ROLLOUT_SEED = 2_000_000  # `evaluate.py` uses 1,000,000, and experts record from 0 on
GREY = 128
Eyes = Literal["own", "grey", "other"]
"""What a policy sees: its own images or, to test how much it uses them, grey ones or another episode's."""


@options
class RolloutConfig:
    """Acting in closed loop while training."""

    rollout_every: MayChange[PositiveInt | None] = None
    """Steps between rollouts, whose success rate goes to metrics.jsonl (default: no rollouts). Their episodes
    differ from those of `evaluate.py`."""
    rollout_episodes: MayChange[PositiveInt] = 20
    """Episodes of a rollout, divided among the processes."""
    rollout_task: MayChange[str | None] = None
    """Instruction in rollouts, for a policy of several tasks. Default: the environment's."""
    simulator: MayChange[Flat[EnvConfig]] = field(default_factory=EnvConfig)

    def __post_init__(self):
        if self.rollout_every is not None and self.simulator.env is None:
            raise UserError(
                "--rollout-every needs --env, the environment to act in, for instance --env demo."
            )


@dataclass
class Episode:
    """What happened in an episode.

    Attributes:
        number: with the seed, it repeats the episode.
        task: the environment's instruction.
        film_fps: pictures a second of its film.
        steps: control steps until it was over.
        states: (steps + 1, P), recorded units.
        actions: (steps, A), recorded units.
        sources: (steps,), the chunk that each came from, see `Controller.source`.
        facts: what else the environment reports.
        frames: pictures for people, (H, W, 3) uint8, at most 256 pixels a side, if requested.
    """

    number: int
    film_fps: float
    task: str = ""
    success: bool = False
    steps: int = 0
    states: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    sources: list[int | None] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)


def roll_out(
    policy: RobotPolicy,
    environments: Sequence[Environment],
    numbers: Sequence[int],
    seed: int,
    sample_steps: int | None = None,
    execute_steps: int | None = None,
    eyes: Eyes = "own",
    film: int = 0,
    progress: Callable[[int], None] = lambda finished: None,
    delay: int = 0,
    join: Join = "naive",
    say_task: Callable[[Episode], str] = lambda episode: episode.task,
) -> list[Episode]:
    """Act in the episodes with these numbers, as many at once as there are environments.

    Each episode has its own noise: its outcome does not depend on how many others run at once.

    Args:
        execute_steps: actions of a chunk that are executed before the next is sampled.
        film: keep the pictures of episodes whose number is below this.
        progress: called with the number of episodes that are over.
        delay, join: control steps from an observation to its chunk, and how chunks join; see `Controller`.
            Time is simulated: this machine's speed does not matter.
        say_task: returns the instruction to give the policy in an episode, if it takes any.

    Raises:
        UserError: if an environment fails, asks for a task that the policy does not know, gives a state that
            is not finite, or ends every episode at once.
    """
    if not len(numbers):  # a process without a share
        return []
    ours, its = policy.spec.fps, environments[0].fps
    if abs(its / ours - 1) > 0.01:
        say(
            f"warning: --env {environments[0].name} runs at {its:g} Hz, the policy was trained at {ours:g} Hz"
        )
    acting = {"sample_steps": sample_steps, "execute_steps": execute_steps, "delay": delay, "join": join}
    groups, done = math.ceil(len(numbers) / len(environments)), []
    for together in np.array_split(np.asarray(numbers), groups):
        group = [Episode(int(number), its / _film_stride(environments[0])) for number in together]
        if eyes == "other" and len(group) == 1:
            raise ValueError(
                "pictures of another episode need one that runs at the same time: use three environments"
            )
        _roll_out_together(policy, environments, group, seed, acting, eyes, film, say_task)
        done += group
        progress(len(done))
    if all(episode.steps <= 1 and not episode.success for episode in done):
        raise UserError(f"--env {environments[0].name} ends every episode after its first step.")
    return done


@cache
def make_environments(config: EnvConfig, image_size: tuple[int, int], num: int) -> list[Environment]:
    """Environments that act at once; making them takes seconds, so they are kept."""
    return [make_environment(config, image_size) for _ in range(num)]


def require_environments(config: Any, data: "Data", run: "Run") -> None:
    """Make this process's environments for `--rollout-every`: what does not fit is known before training.

    Raises:
        UserError: if they cannot be made, have other cameras, states or actions than the policy, or give an
            instruction that it does not know.
    """
    options, known = config.rollout, data.spec.tasks
    if options.rollout_task and known is None:
        raise UserError("--rollout-task: the policy will be told no instruction, see --task-encoder.")
    numbers, environments = (), ()
    if options.rollout_every is not None:
        numbers, environments = _share(config, data, run)
    if not environments:
        return
    asked = first_tasks(data.spec, environments if known else environments[:1], ROLLOUT_SEED, numbers)
    told = [options.rollout_task] if options.rollout_task else asked
    unknown = [task for task in told if known is not None and spaced(task) not in known.sentences]
    if unknown and known.encoder == "index":
        raise UserError(
            f'--rollout-every: the policy will not know "{unknown[0]}", the instruction of --env '
            f"{environments[0].name}: choose one of {listed(known.sentences)} with --rollout-task."
        )


def first_tasks(
    spec: PolicySpec, environments: Sequence[Environment], seed: int, numbers: Sequence[int]
) -> list[str]:
    """Reset environments to the first of the episodes `numbers`, and return these episodes' instructions.

    A UserError if images, state or actions do not fit the policy.
    """
    for environment, number in zip(environments, numbers, strict=False):
        with answering(environment.name, "its first reset"):
            environment.reset(seed, number)
    with answering(environments[0].name, "drawing"):
        _fitting_cameras(spec, environments[0])
    return [environment.task for environment in environments]


def refuse_unknown(policy: RobotPolicy, environment: Environment, sentences: Sequence[str | None]) -> None:
    """Raise a UserError if the policy, which is told instructions, cannot be told these."""
    try:
        policy.told(sentences)
    except ValueError as error:
        raise UserError(
            f"--env {environment.name}: {error}; give another as --task or --rollout-task."
        ) from None


def _share(config: Any, data: "Data", run: "Run") -> tuple[range, list[Environment]]:
    """The numbers of a process's episodes in a rollout, and its environments."""
    numbers = range(config.rollout.rollout_episodes)[run.rank :: run.world]
    most = min(len(numbers), AT_ONCE)
    return numbers, make_environments(config.rollout.simulator, data.spec.image_size, most)


def success_rate(
    model: nn.Module, sample_actions: Callable, data: "Data", config: Any, run: "Run"
) -> dict[str, float]:
    """Success in `--rollout-episodes`, to log; a script calls it in its loop, on all processes.

    A film of some of the episodes replaces `rollouts.gif` in the run folder.

    It does not touch the training noise, and its episodes are not those of `evaluate.py`: if you choose a
    checkpoint by this rate, `evaluate.py` is still a fair test.

    Args:
        model: the policy to try, in eval mode.
        sample_actions: the script's function.
        config: the script's, with the groups `rollout` and `data`.

    Returns:
        Metrics; none, with a warning, if an environment of any process failed.
    """
    options = config.rollout
    numbers, environments = _share(config, data, run)
    script = SimpleNamespace(sample_actions=sample_actions)
    policy = RobotPolicy(model, data.normalizer, config, data.spec, script, run.device)
    mark, phase = run.progress_mark

    def progress(finished: int) -> None:
        run.progress_mark = mark + finished, "rollouts"

    episodes = []
    devices = [run.device] if run.device.type == "cuda" else []
    try:
        with run.autocast(), torch.random.fork_rng(devices):  # a simulator may draw from it, or seed it
            film = FILMED * run.world if run.is_main else 0  # every run.world-th episode is this process's
            say_task = lambda episode: options.rollout_task or episode.task  # noqa: E731
            given = {"film": film, "progress": progress, "say_task": say_task}
            episodes = roll_out(policy, environments, numbers, ROLLOUT_SEED, **given)
    except UserError as error:  # the environment's, which must not cost the run
        print(f"warning: no success rate at step {run.step}: {error}", flush=True)
    run.progress_mark = mark + options.rollout_episodes, phase  # the same in all processes
    if run.is_main and episodes:
        films, outcomes = zip(*[(e.frames, e.success) for e in episodes if e.frames], strict=True)
        write_gif(run.folder / "rollouts.gif", side_by_side(films, outcomes), episodes[0].film_fps)
    sums = [len(episodes), *(sum(getattr(e, name) for e in episodes) for name in ("success", "steps"))]
    count, wins, steps = run.sum(torch.tensor(sums, device=run.device)).tolist()
    if count < options.rollout_episodes:
        return {}
    return {"rollout/success": wins / count, "rollout/steps": steps / count}


def _roll_out_together(
    policy: RobotPolicy,
    environments: Sequence[Environment],
    group: list[Episode],
    seed: int,
    acting: dict[str, Any],
    eyes: Eyes,
    film: int,
    say_task: Callable[[Episode], str],
) -> None:
    first = environments[0]
    seeds = [seed + episode.number for episode in group]
    controller = Controller(policy, seeds, **acting)
    for environment, episode in zip(environments, group, strict=False):
        with answering(first.name, f"the reset of episode {episode.number}"):
            environment.reset(seed, episode.number)
        episode.states.append(_state(environment, episode))
        episode.task = environment.task
    said = None if policy.spec.tasks is None else [say_task(episode) for episode in group]
    if said is not None:
        refuse_unknown(policy, first, said)
    with answering(first.name, "drawing"):
        running, cameras = np.arange(len(group)), _fitting_cameras(policy.spec, first)

    def look(which: np.ndarray) -> list[dict[str, np.ndarray]]:
        with answering(first.name, "drawing"):
            shown = (which + 1) % len(group) if eyes == "other" else which
            views = [environments[e].images() for e in shown]
        views = [{camera: view[camera] for camera in cameras} for view in views]
        if eyes == "grey":
            views = [{camera: np.full_like(x, GREY) for camera, x in view.items()} for view in views]
        return views

    for step in range(first.max_steps):
        states = np.stack([group[e].states[-1] for e in running])
        actions = controller.next_actions(running, states, look, said and [said[e] for e in running])
        over = np.zeros(len(running), bool)
        for i, e in enumerate(running):
            environment, episode = environments[e], group[e]
            with answering(first.name, f"step {step} of episode {episode.number}"):
                over[i] = environment.step(actions[i])
                if episode.number < film and step % _film_stride(environment) == 0:
                    episode.frames.append(shrunk(environment.picture()))
            episode.states.append(_state(environment, episode))
            episode.actions.append(actions[i])
            episode.sources.append(controller.source)
            episode.steps = step + 1
        for e in running[over] if step + 1 < first.max_steps else running:
            group[e].success, group[e].facts = environments[e].success(), environments[e].facts()
        running = running[~over]
        if not len(running):
            break


def _film_stride(environment: Environment) -> int:
    """Steps between two pictures of a film: at 80 Hz, drawing every step costs more than acting."""
    return max(math.ceil(environment.fps / FILM_FPS), 1)


def _fitting_cameras(spec: PolicySpec, environment: Environment) -> list[str]:
    """The environment's cameras that the policy sees; a UserError if images, state or action do not fit."""
    images, state = environment.images(), environment.state()
    names: dict[str, str] = {}
    for name in sorted(images, key=lambda name: name not in spec.cameras):  # a name that is the same wins
        camera = spec.camera(name)
        if camera in spec.cameras and names.setdefault(camera, name) not in (name, camera):
            raise UserError(
                f"--env {environment.name} has two cameras that can be the policy's {camera}, "
                f"{names[camera]} and {name}: choose with --env-map {camera}={name}."
            )
    if not set(spec.cameras) <= names.keys():
        raise UserError(
            f"--env {environment.name} has the cameras {', '.join(images)}, and the policy sees "
            f"{', '.join(spec.cameras)}: say which is which, for instance "
            f"--env-map {spec.cameras[0]}={next(iter(images))}."
        )
    states, actions = spec.recorded_names
    if len(state) != len(states):
        there = ", ".join(environment.state_names) or f"{len(state)} numbers"
        raise UserError(
            f"--env {environment.name} has the state {there}, and the policy was trained on "
            f"{', '.join(states)}: choose others with --env-map state=KEY."
        )
    there = environment.action_names  # empty if the environment does not give them
    if there and len(there) != len(actions):
        raise UserError(
            f"--env {environment.name} takes the actions {', '.join(there)}, and the policy gives "
            f"{', '.join(actions)}: it was trained for another robot."
        )
    named = {"state": environment.state_names, "actions": there}
    for (what, those), ours in zip(named.items(), spec.recorded_names, strict=True):
        if sorted(those) == sorted(ours) and list(those) != list(ours):
            raise UserError(
                f"--env {environment.name} has the {what} {', '.join(those)}, and the policy was trained on "
                f"{', '.join(ours)}: record or train in the order of the environment."
            )
    for name in (names[camera] for camera in spec.cameras):
        image = images[name]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f"--env {environment.name}: the pictures of {name} are {image.dtype} {image.shape}, and a "
                f"policy sees (H, W, 3) uint8: convert them in the environment."
            )
    return [names[camera] for camera in spec.cameras]


def _state(environment: Environment, episode: Episode) -> np.ndarray:
    state = environment.state()
    if not np.isfinite(state).all():
        raise UserError(
            f"--env {environment.name} gave a state that is not finite, at step {episode.steps} of episode "
            f"{episode.number}: its simulation has become unstable."
        )
    return state


def rates(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success with its 95 % interval; each episode's outcome, 1 or 0, for paired comparisons; the share of
    episodes in which each fact is true or, if a fact is a word, each word's share of the successes; with
    several tasks, the same for each task.
    """
    from scipy.stats import binomtest

    count, wins = len(episodes), [episode for episode in episodes if episode.success]
    interval = binomtest(len(wins), count).proportion_ci(method="exact")
    found: dict[str, Any] = {"success": len(wins) / count, "low": interval.low, "high": interval.high}
    found["episodes"] = count
    found["outcomes"] = "".join(str(int(e.success)) for e in sorted(episodes, key=lambda e: e.number))
    found["steps"] = float(np.mean([episode.steps for episode in episodes]))
    for name in dict.fromkeys(name for episode in episodes for name in episode.facts):
        values = [episode.facts[name] for episode in episodes if name in episode.facts]
        if all(isinstance(value, bool) for value in values):
            found[f"{name}s"] = sum(values) / count
        else:
            won = [episode.facts[name] for episode in wins if name in episode.facts]
            found[f"{name}s"] = {word: won.count(word) / max(len(won), 1) for word in sorted(set(values))}
    tasks = sorted({episode.task for episode in episodes})
    if len(tasks) > 1:
        found["tasks"] = {task: rates([e for e in episodes if e.task == task]) for task in tasks}
    return found


def velocity_changes(
    episodes: Sequence[Episode], scale: np.ndarray, rotations: Rotations | None = None
) -> dict[str, dict[str, float | None]]:
    """How much the velocity of the actions changes from one control step to the next: mean, 99th percentile.

    A change is a_{i+1} - 2 a_i + a_{i-1}, each dimension divided by its `scale` (A,), as the root mean square
    over the dimensions, after `rotations` have been re-expressed. It is `inside` a chunk if all three actions
    come from the same one, and otherwise at a `seam`: where chunks join, and where a waiting robot stops and
    starts. None if there is no such step.
    """
    found: dict[str, list[np.ndarray]] = {"seam": [], "inside": []}
    for episode in (episode for episode in episodes if episode.steps > 2):
        actions = np.stack(episode.actions)
        actions = (rotations.encode(actions) if rotations else actions) / scale
        change = np.sqrt((np.diff(actions, n=2, axis=0) ** 2).mean(axis=1))
        sources = np.array([np.nan if source is None else source for source in episode.sources])
        three = np.stack([sources[:-2], sources[1:-1], sources[2:]])
        inside, waiting = (three == three[0]).all(axis=0), np.isnan(three).all(axis=0)
        found["inside"].append(change[inside])
        found["seam"].append(change[~inside & ~waiting])
    return {name: _mean_and_tail(np.concatenate(parts or [[]])) for name, parts in found.items()}


def _mean_and_tail(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "p99": None}
    return {"mean": float(values.mean()), "p99": float(np.quantile(values, 0.99))}
