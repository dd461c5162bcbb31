"""The built-in task with sixteen instructions: a sentence picks one of four coloured targets for each hand.

Table, arms, obstacles and cameras are those of `common/data/demo.py`. The four targets of a side lie next to
each other, in a different order in each episode. An episode ends as soon as each hand is on any target, so a
policy has one attempt. Without the instruction it is right once in sixteen.
"""

from pathlib import Path

import numpy as np

from common.data import demo
from common.data.demo import OBSTACLES, SUCCESS_DISTANCE, TARGET_Y, TARGET_Y_SPREAD, Simulator

COLORS = {"red": (214, 48, 49), "blue": (39, 86, 205), "green": (34, 120, 48), "white": (250, 250, 250)}
TASKS = tuple(f"left to {left}, right to {right}" for left in COLORS for right in COLORS)
SLOTS = np.array([-0.3, -0.1, 0.1, 0.3])  # of the targets, side by side, within TARGET_X_SPREAD
APPROACH_Y = 0.5  # the demonstrator approaches from straight below, so as not to touch another target
NUM_DEMONSTRATIONS = 1600  # 100 per instruction


class TasksSimulator(Simulator):
    """Many independent copies of the task; episode i has the instruction TASKS[i % 16].

    Attributes:
        wrong: (E,), both hands reached a target, but at least one was not the one asked for.
    """

    colors = (*COLORS.values(), *COLORS.values())  # of the left hand's, then of the right hand's

    def __init__(self, num_envs: int, seed: int, first: int = 0):
        super().__init__(num_envs, seed, first)
        numbers, count = np.arange(first, first + num_envs), len(COLORS)
        rngs = [np.random.default_rng((seed, i, 2)) for i in numbers.tolist()]
        slots = np.stack([[rng.permutation(count) for _ in OBSTACLES] for rng in rngs])  # (E, 2, 4)
        heights = np.stack([rng.uniform(-1, 1, (2, count)) for rng in rngs])
        x, y = OBSTACLES[:, :1] + SLOTS[slots], TARGET_Y + TARGET_Y_SPREAD * heights
        self._places = np.stack([x, y], -1)  # (E, 2, 4, 2), by colour
        self.drawn = self._places.reshape(num_envs, -1, 2)
        tasks = numbers % len(TASKS)
        self.tasks = [TASKS[task] for task in tasks]
        asked = np.stack([tasks // count, tasks % count], 1)  # (E, 2), the colours
        self.targets = np.take_along_axis(self._places, asked[:, :, None, None], 2)[:, :, 0]
        self.wrong = np.zeros(num_envs, bool)

    @property
    def done(self) -> np.ndarray:
        return super().done | self.wrong

    def step(self, actions: np.ndarray) -> None:
        active = ~self.done
        super().step(actions)
        away = np.linalg.norm(self.hands[:, :, None] - self._places, axis=-1)  # (E, 2, 4)
        arrived = (away < SUCCESS_DISTANCE).any(-1).all(-1)
        self.wrong |= active & arrived & ~self.success & ~self.collided

    def aim(self) -> np.ndarray:
        below = self.targets * [1, 0] + [0, APPROACH_Y]
        offset = self.hands - below
        there = (np.abs(offset[..., 0]) < 0.03) & (offset[..., 1] > -0.03)
        return np.where(there[..., None], self.targets, below)


def ensure_recorded(cache_dir: Path) -> Path:
    """See `demo.ensure_recorded`."""
    return demo.ensure_recorded(cache_dir, "demo-tasks", NUM_DEMONSTRATIONS, TasksSimulator)
