"""Closed-loop tasks: the built-in one, public simulators, and any gymnasium environment."""

import faulthandler
import importlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
from pydantic import PositiveInt

from common.config import MayChange, options
from common.data.cameras import closest
from common.data.source import reason
from common.errors import EXIT_HUNG, UserError

HANG_SECONDS = 120.0
IMPORT_SECONDS = 600.0  # from a network's disk, a simulator takes minutes
NO_DISPLAY = "set MUJOCO_GL=egl or MUJOCO_GL=osmesa, and install libegl1 or libosmesa6"
# Files in the traceback of an error that comes from a missing display.
DRAWING = r"OpenGL|mujoco.(rendering|gl_context|egl|osmesa|glfw)|dm_control._render"

# MuJoCo looks at this when it is imported, and crashes later if it finds no display.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

SIM_PACKAGES = ("metaworld", "gym_aloha", "gym_pusht", "mujoco", "dm_control", "pymunk", "pygame", "cv2")
SIMULATORS = ("demo", "demo-tasks", "metaworld:TASK", "aloha:TASK", "pusht", "gymnasium:ID", "module:factory")


class Environment(Protocol):
    """One copy of a task.

    Attributes:
        name: used in messages.
        fps: control steps per second, for videos; a policy acts at the rate it was trained at.
        max_steps: an episode ends after this many.
        state_names, action_names: names of the dimensions; empty if the simulator does not give them.
        task: the instruction; if the environment has several, that of the current episode.
        pushes: how much a push can add to each number of an action, see `record.pushes`; empty if unknown.
    """

    name: str
    fps: float
    max_steps: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    task: str
    pushes: tuple[float, ...]

    def reset(self, seed: int, episode: int) -> None:
        """Start an episode; the same numbers always give the same one."""

    def state(self) -> np.ndarray:
        """(P,) float32."""

    def images(self) -> dict[str, np.ndarray]:
        """What each camera sees now, (H, W, 3) uint8; rendered only when this is called."""

    def picture(self) -> np.ndarray:
        """(H, W, 3) uint8, a view for people."""

    def step(self, action: np.ndarray) -> bool:
        """Take one control step; returns whether the episode is over, not counting `max_steps`."""

    def success(self) -> bool:
        """Whether the task is solved, now or, if the simulator counts that, earlier in the episode."""

    def facts(self) -> dict[str, bool | str]:
        """More about a finished episode, such as how it failed."""

    def expert(self) -> Callable[[], np.ndarray] | None:
        """An expert that returns the next action, from where the episode is now if it can; or None."""


@options
class EnvConfig:
    """Where to act."""

    env: MayChange[str | None] = None
    """Environment to act in: `demo`, `demo-tasks`, `demo-tasks:INSTRUCTION`, `metaworld:pick-place-v3`,
    `aloha:transfer-cube`, `pusht`, `gymnasium:ID`, or `module:factory`, a function of yours that returns a
    gymnasium environment. Default in `evaluate.py`: the built-in task, if the run was trained on it."""
    env_map: MayChange[tuple[str, ...]] = ()
    """Which observations of the environment become the policy's cameras and state, such as
    `head=pixels/top state=agent_pos`; `head=render` is the environment's own view for people. Join several
    into the state with `state=agent_pos+object`. Default: matched by name;
    if one camera is mapped, map all that the policy sees."""
    max_steps: MayChange[PositiveInt | None] = None
    """Steps after which an episode counts as failed. Default: the environment's own limit."""
    success_reward: MayChange[float | None] = None
    """An episode succeeds when a step's reward reaches this, in environments that do not report success."""

    def mapping(self) -> dict[str, str]:
        """`env_map` as a dictionary from the policy's names to the environment's keys."""
        found = {}
        for entry in self.env_map:
            name, equals, key = entry.partition("=")
            if not (name and equals and key):
                raise UserError(
                    f"--env-map {entry}: write NAME=KEY, such as head=pixels/top or state=agent_pos."
                )
            found[name] = key
        return found

    def in_place_of_demo(self, dataset: tuple[str, ...]) -> "EnvConfig":
        """The same, with the built-in task as `env` if none is given and the dataset is the built-in one."""
        ours = self.env is None and dataset in (("demo",), ("demo-tasks",))
        return replace(self, env=dataset[0]) if ours else self


@contextmanager
def answering(name: str, what: str, seconds: float | None = None) -> Iterator[None]:
    """If environment `name` raises inside, raise a UserError; if it hangs, end the program with code 70."""
    seconds = seconds or HANG_SECONDS

    def give_up() -> None:
        os.write(2, f"error: --env {name} hangs in {what}, for {seconds:g} s.\n".encode())
        faulthandler.dump_traceback(sys.__stderr__.fileno())
        os._exit(EXIT_HUNG)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an environment can raise anything
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        way = f": {NO_DISPLAY}" if any(re.search(DRAWING, file) for file in files) else ""
        raise UserError(f"--env {name} failed in {what} ({reason(error)}){way}.") from error
    finally:
        timer.cancel()


def make_environment(config: EnvConfig, image_size: tuple[int, int]) -> Environment:
    """Make the environment; `image_size` (H, W) is for simulators that can render any size.

    Raises:
        UserError: if it does not exist, is not installed, or cannot be made.
    """
    with answering(config.env, "its construction", IMPORT_SECONDS):
        return _make_environment(config, image_size)


def _make_environment(config: EnvConfig, image_size: tuple[int, int]) -> Environment:
    kind, _, task = config.env.partition(":")
    try:
        if config.env == "demo":
            from common.envs.demo import DemoEnvironment

            environment = DemoEnvironment(config.max_steps)
        elif kind == "demo-tasks":
            from common.envs.demo import TasksEnvironment

            environment = TasksEnvironment(task or None, config.max_steps)
        elif kind == "metaworld":
            from common.envs.metaworld import MetaworldEnvironment

            environment = MetaworldEnvironment(task, image_size, config.max_steps)
        elif kind == "aloha":
            from common.envs.aloha import AlohaEnvironment

            environment = AlohaEnvironment(task, image_size, config.max_steps)
        else:  # maps its observations itself
            from common.envs.gym import GymEnvironment, factory

            return GymEnvironment(config, factory(config.env, image_size, config.max_steps))
    except ModuleNotFoundError as error:
        way = "install it"
        if error.name and error.name.partition(".")[0] in SIM_PACKAGES:
            way = "pip install -r requirements-sim.txt, or `make sim`"
        raise UserError(f"--env {config.env} needs {error.name}, which is not installed: {way}.") from None
    return Renamed(environment, config.mapping()) if config.env_map else environment


class Renamed:
    """An environment with renamed cameras; `names` maps new names to its own."""

    def __init__(self, environment: Environment, names: dict[str, str]):
        self._environment, self._names = environment, names
        if "state" in names:
            raise UserError(f"--env-map state: the state of {environment.name} is fixed; map cameras only.")

    def __getattr__(self, name: str):
        return getattr(self._environment, name)

    def images(self) -> dict[str, np.ndarray]:
        images = self._environment.images()
        for key in self._names.values():
            if key not in images:
                raise UserError(
                    f"--env-map {key}: {self.name} has no such camera; it has {', '.join(images)}."
                )
        return {name: images[key] for name, key in self._names.items()}


def one_of(name: str, known: list[str], what: str) -> str:
    """Return the name if it is known; otherwise raise a UserError that suggests the closest one."""
    if name in known:
        return name
    there = ", ".join(known[:60])
    raise UserError(f"{what} has no task {name or 'without a name'}{closest(name, known)}: it has {there}.")


def import_factory(place: str, flag: str = "--env", others: Sequence[str] = SIMULATORS) -> Callable:
    """Import the function `module:factory`, from the working directory or an installed package."""
    module, _, name = place.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise UserError(
            f"{flag} {place} is none of {', '.join(others)}, and there is no module {module} here or "
            f"installed."
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UserError(f"{flag} {place}: {module} has no function {name or 'without a name'}.")
    return found
