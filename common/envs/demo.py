"""The built-in task as an environment to act in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.data.demo import (
    CAMERAS,
    EXPERT_RADIUS,
    FPS,
    MAX_STEPS,
    NAMES,
    OBSTACLES,
    TASK,
    Simulator,
    expert_action,
    render,
)
from common.data.demo_tasks import TASKS, TasksSimulator
from common.envs import one_of
from common.errors import UserError

SIDES = {-1: "left", 1: "right"}


class DemoEnvironment:
    """One episode of `common/data/demo.py`; see `common.envs.Environment`."""

    name, fps, task, state_names, action_names = "demo", FPS, TASK, NAMES, NAMES
    kind: type[Simulator] = Simulator
    pushes = ()

    def __init__(self, max_steps: int | None = None):
        self.max_steps = max_steps or MAX_STEPS
        if self.max_steps > MAX_STEPS:
            raise UserError(
                f"--max-steps {max_steps}: an episode of {self.name} ends after {MAX_STEPS} steps."
            )

    def reset(self, seed: int, episode: int) -> None:
        self.simulator, self._success = self.kind(1, seed, first=episode), False
        self._random = np.random.default_rng((seed, episode, 3))

    def state(self) -> np.ndarray:
        return self.simulator.state[0]

    def images(self) -> dict[str, np.ndarray]:
        return dict(zip(CAMERAS, self.simulator.images()[0], strict=True))

    def picture(self) -> np.ndarray:
        return render(self.simulator.hands, self.simulator.drawn, 144, self.simulator.colors)[0, 0]

    def step(self, action: np.ndarray) -> bool:
        self.simulator.step(action[None])
        over = self._success or bool(self.simulator.done[0])
        self._success |= bool(self.simulator.success[0])
        self.simulator.success[:] = False  # a demonstration goes on, to the target's centre
        return over

    def success(self) -> bool:
        return self._success

    def facts(self) -> dict[str, bool | str]:
        collided = bool(self.simulator.collided[0])
        facts = {"collision": collided, "timeout": not collided and not self.success()}
        sides = self.simulator.sides[0].tolist()
        return facts if 0 in sides else {**facts, "mode": "-".join(SIDES[side] for side in sides)}

    def expert(self) -> Callable[[], np.ndarray]:
        """An expert that passes each obstacle on a random side, or on that where the hand clearly is."""
        beside = self.simulator.hands[..., 0] - OBSTACLES[:, 0]
        chosen = self._random.choice([-1, 1], (1, 2))
        sides = np.where(np.abs(beside) > EXPERT_RADIUS / 2, np.sign(beside), chosen)
        return lambda: expert_action(self.simulator.hands, self.simulator.aim(), sides)[0]


class TasksEnvironment(DemoEnvironment):
    """One episode of `common/data/demo_tasks.py`: with an instruction of its own, or always the same one."""

    name, kind = "demo-tasks", TasksSimulator

    def __init__(self, task: str | None = None, max_steps: int | None = None):
        super().__init__(max_steps)
        self._only = None if task is None else TASKS.index(one_of(task, list(TASKS), self.name))

    def reset(self, seed: int, episode: int) -> None:
        super().reset(seed, episode if self._only is None else len(TASKS) * episode + self._only)
        self.task = self.simulator.tasks[0]

    def facts(self) -> dict[str, bool | str]:
        facts, wrong = super().facts(), bool(self.simulator.wrong[0])
        return {**facts, "timeout": facts["timeout"] and not wrong, "wrong_target": wrong}
