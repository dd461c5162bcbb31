"""Record demonstrations of a simulator's expert as a LeRobot v3 dataset.

    python -m common.envs.record metaworld:pick-place-v3 data/pick-place --episodes 50 --seed 0

The dataset is a function of its options. Episodes in which the expert fails are left out and counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Annotated

import numpy as np
import tyro
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from common.config import UserPath, cli, options
from common.console import say
from common.data.recording import Demonstration, write_dataset
from common.envs import EnvConfig, Environment, answering, make_environment
from common.errors import UserError

RECORDINGS = {"metaworld": 2, "aloha": 4}  # raise one when the same seed gives other episodes or pictures
EPISODES_A_SEED = 10_000  # each seed has its own
PUSH_STEPS = 10  # that a push lasts
MOST_FAILURES = 3  # per wanted episode: an expert that fails more often is useless


@options
class Config:
    """Record demonstrations of a simulator's own expert."""

    env: Annotated[str, tyro.conf.Positional]
    """Environment, such as `metaworld:pick-place-v3` or `aloha:transfer-cube`."""
    out: Annotated[UserPath, tyro.conf.Positional]
    """Folder of the new dataset."""
    episodes: Annotated[int, Field(ge=1, le=EPISODES_A_SEED // (1 + MOST_FAILURES))] = 50
    """Successful episodes to record, at most 2,500: more have another --seed, and are another dataset."""
    seed: Annotated[int, Field(ge=0, lt=100)] = 0
    """Seed of the episodes: n has those from 10,000 n on. `evaluate.py` uses those from 1,000,000 on."""
    hold: NonNegativeInt = 20
    """Steps that the expert continues after success, if success ends an episode: a policy that never saw
    these does not stay at the goal, and one that just misses it drifts away."""
    disturb: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a push begins at a step: for ten steps the hand is driven to a random side, while the
    recorded actions are the expert's. Such demonstrations show how to come back to the way; try 0.03."""
    image_size: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=2)] | None = None
    """Size of the pictures in pixels: one number for a square, or height and width (default: 96)."""


def main(config: Config) -> None:
    if config.out.exists():
        raise UserError(f"{config.out} already exists: give the new dataset another folder.")
    if config.image_size and config.env.startswith("demo"):
        raise UserError(f"--image-size: the pictures of {config.env} have a fixed size.")
    size = config.image_size or (96,)
    environment = make_environment(EnvConfig(env=config.env), (size[0], size[-1]))
    if config.disturb and not environment.pushes:
        raise UserError(f"--disturb: {config.env} does not say how hard its robot may be pushed.")
    unfinished = config.out.with_name(f"{config.out.name}.recording")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_dataset(
        unfinished,
        demonstrate(environment, config.episodes, EPISODES_A_SEED * config.seed, config.hold, config.disturb),
        fps=round(environment.fps),
        state_names=environment.state_names,
        action_names=environment.action_names,
    )
    unfinished.rename(config.out)
    say(f"recorded: {config.out}")


def demonstrate(
    environment: Environment, episodes: int, first: int = 0, hold: int = 0, disturb: float = 0
) -> Iterator[Demonstration]:
    """Successful episodes of an environment's expert, from number `first` on; prints how many failed."""
    number = found = 0
    with tqdm(total=episodes, desc=f"expert of {environment.name}", unit="episode") as bar:
        while found < episodes:
            with answering(environment.name, f"episode {number} of its expert"):
                demonstration = attempt(environment, 0, first + number, hold, disturb)
            number += 1
            if demonstration is not None:
                yield demonstration
                found += 1
                bar.update()
            elif number - found > MOST_FAILURES * episodes:
                raise UserError(
                    f"The expert of {environment.name} succeeded in {found} of {number} episodes."
                )
    rest = ", the others are left out" if found < number else ""
    say(f"{environment.name}: the expert succeeded in {found} of {number} episodes{rest}")


def attempt(
    environment: Environment, seed: int, episode: int, hold: int = 0, disturb: float = 0
) -> Demonstration | None:
    """The expert's demonstration of an episode and `hold` steps beyond its end; None if it fails."""
    environment.reset(seed, episode)
    act = environment.expert()
    if act is None:
        raise UserError(f"{environment.name} has no expert: record demonstrations with LeRobot's tools.")
    pushed = None
    if disturb:
        pushed = pushes(environment.pushes, disturb, np.random.default_rng((seed, episode)))
    found = perform(environment, act, environment.max_steps, hold, pushed)
    return found if environment.success() else None


def pushes(largest: Sequence[float], chance: float, random: np.random.Generator) -> Iterator[np.ndarray]:
    """What disturbs the actions, step by step: mostly nothing, but at each step a push can begin, in a random
    direction and up to the `largest` in each number of an action (as noise in Laskey et al. 2017, "DART").
    """
    strength = np.array(largest, np.float32)
    while True:
        if random.random() >= chance:
            yield np.zeros_like(strength)
            continue
        direction = random.standard_normal(len(strength)) * (strength > 0)
        push = random.random() * strength * direction / np.linalg.norm(direction)
        yield from repeat(push.astype(np.float32), PUSH_STEPS)


def perform(
    environment: Environment,
    act: Callable[[], np.ndarray],
    steps: int,
    hold: int = 0,
    pushed: Iterator[np.ndarray] | None = None,
) -> Demonstration:
    """What happens when `act` gives the actions, from where the environment is to the episode's end, for at
    most so many steps; after success it continues for `hold` more. What `pushed` adds is not recorded.
    """
    states, actions, views = [], [], []
    beyond = 0  # steps since the end
    for _ in range(steps):
        states.append(environment.state())
        views.append({camera: np.array(image) for camera, image in environment.images().items()})  # copies
        actions.append(act())
        taken = actions[-1] if pushed is None else actions[-1] + next(pushed)
        beyond += environment.step(taken) or beyond > 0
        if beyond and (beyond > hold or not environment.success()):
            break
    images = {camera: np.stack([view[camera] for view in views]) for camera in views[0]}
    states, actions = (np.stack(vectors).astype(np.float32) for vectors in (states, actions))
    return Demonstration(states, actions, images, environment.task)


if __name__ == "__main__":
    cli(main, Config)
