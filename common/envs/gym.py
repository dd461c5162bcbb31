"""Acting in any gymnasium environment."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import gymnasium
import numpy as np

from common.console import say
from common.data.cameras import closest
from common.envs import EnvConfig, import_factory
from common.errors import UserError

STATES = ("state", "agent_pos", "observation.state", "qpos", "proprio")
SUCCESS = ("is_success", "success")


def factory(
    name: str, image_size: tuple[int, int], max_steps: int | None = None
) -> Callable[[], gymnasium.Env]:
    """The function that makes the environment `pusht`, `gymnasium:ID` or `module:factory`.

    gymnasium's own limit of steps becomes `max_steps`, if given: it would end an episode before.
    """
    kind, _, rest = name.partition(":")
    limit = {} if max_steps is None else {"max_episode_steps": max_steps}
    if name == "pusht":
        importlib.import_module("gym_pusht")
        height, width = image_size
        size = {"observation_height": height, "observation_width": width, **limit}
        return lambda: gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", **size)
    if kind != "gymnasium":
        return import_factory(name)
    if ":" in rest:  # module:ID: gymnasium imports the module
        return lambda: gymnasium.make(rest, render_mode="rgb_array", **limit)
    if rest not in gymnasium.registry:
        raise UserError(
            f"gymnasium knows no environment {rest or 'without a name'}{closest(rest, gymnasium.registry)}: "
            f"give `gymnasium:module:ID` for one that a package registers on import."
        )
    return lambda: gymnasium.make(rest, render_mode="rgb_array", **limit)


class GymEnvironment:
    """An environment whose observations are mapped to cameras and state; see `common.envs.Environment`."""

    state_names: tuple[str, ...] = ()
    pushes = ()

    def __init__(self, config: EnvConfig, make: Callable[[], gymnasium.Env]):
        self.name, self._reward = config.env, config.success_reward
        self._map = config.mapping()
        self._env = make()
        if not isinstance(self._env, gymnasium.Env):
            raise UserError(f"--env {self.name} makes a {type(self._env).__name__}, not a gymnasium.Env.")
        self.fps = float((self._env.metadata or {}).get("render_fps") or 30)
        limit = getattr(self._env.spec, "max_episode_steps", None)
        if not (limit or config.max_steps):
            raise UserError(f"--env {self.name} sets no limit of steps: give --max-steps.")
        self.max_steps = config.max_steps or limit
        shape = self._env.action_space.shape or ()
        self.action_names = tuple(map(str, range(shape[0]))) if len(shape) == 1 else ()
        self._read_task()

    def reset(self, seed: int, episode: int) -> None:
        observation, _ = self._env.reset(seed=seed + episode)
        self._read_task()
        self._seen = dict(_flat(observation))
        self._won = self._told = False
        self._steps = 0

    def _read_task(self) -> None:
        self.task = getattr(self._env.unwrapped, "task_description", None) or self.name  # as LIBERO has it

    def step(self, action: np.ndarray) -> bool:
        space = self._env.action_space
        if isinstance(space, gymnasium.spaces.Box):
            if space.shape != action.shape:
                raise UserError(
                    f"--env {self.name} takes actions of shape {space.shape}, but the policy gives "
                    f"{action.shape}: it was trained for another robot."
                )
            action = action.astype(space.dtype)
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._seen = dict(_flat(observation))
        if self._reward is not None:
            self._won |= float(reward) >= self._reward
        else:
            self._won |= self._reported(info)
            self._steps += 1
            if (terminated or truncated or self._steps == self.max_steps) and not self._told:
                _warn_of_silence(self.name, ", ".join(info) or "nothing")
        return self._won or terminated or truncated

    def _reported(self, info: dict[str, Any]) -> bool:
        """Whether a step was a success; some environments say it only at an episode's end."""
        key = next((key for key in SUCCESS if key in info), None)
        if key is None:
            return False
        self._told = True
        value = np.asarray(info[key])
        if value.size != 1 or value.dtype.kind not in "biuf" or value.item() not in (0, 1):
            raise UserError(
                f"--env {self.name} reports {key} as {str(info[key])[:100]}, not as true or false: give "
                f"--success-reward, the reward at which an episode counts as a success."
            )
        return bool(value.item())

    def state(self) -> np.ndarray:
        vectors = [key for key, value in self._seen.items() if value.ndim == 1 and value.dtype.kind in "fiub"]
        keys = self._map.get("state")
        if keys is None:
            named = [key for key in vectors if key.rpartition("/")[2] in STATES]
            if len(named) != 1 and len(vectors) != 1:
                raise UserError(
                    f"--env {self.name} has several vectors ({self._listed()}): choose with "
                    f"--env-map state=KEY which one is the policy's state."
                )
            keys = (named if len(named) == 1 else vectors)[0]
        return np.concatenate([self._get(key).reshape(-1) for key in keys.split("+")]).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        named = {name: key for name, key in self._map.items() if name != "state"}
        if not named:
            pictures = [k for k, v in self._seen.items() if v.ndim == 3 and v.dtype == np.uint8]
            named = {key: key for key in pictures} or {"render": "render"}
        return {
            name: self._env.render() if key == "render" else self._get(key) for name, key in named.items()
        }

    def picture(self) -> np.ndarray:
        drawn = None
        with suppress(NotImplementedError):
            drawn = self._env.render()
        drawn = np.asarray(drawn)
        if drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] in (3, 4):
            return drawn[..., :3]
        return next(iter(self.images().values()))  # it draws nothing, or something else

    def _get(self, key: str) -> np.ndarray:
        if key not in self._seen:
            raise UserError(
                f"--env-map {key}: --env {self.name} has no such observation"
                f"{closest(key, self._seen)}, it has {self._listed()}."
            )
        return self._seen[key]

    def _listed(self) -> str:
        return ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in self._seen.items())

    def success(self) -> bool:
        return self._won

    def facts(self) -> dict[str, bool | str]:
        return {}

    def expert(self) -> None:
        return None


@cache  # once for each environment
def _warn_of_silence(name: str, keys: str) -> None:
    say(
        f"warning: --env {name} ended an episode without reporting success (info has {keys}), so it counts "
        f"as failed: if no episode reports any, give --success-reward, the reward at which one is a success"
    )


def _flat(observation: Any, place: str = ""):
    """Yield (path, array) for every array in nested dictionaries."""
    if isinstance(observation, dict):
        for key, value in observation.items():
            yield from _flat(value, f"{place}/{key}" if place else str(key))
    else:
        yield place or "observation", np.asarray(observation)
