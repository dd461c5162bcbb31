"""Meta-World's tasks (Yu et al. 2020); state, cameras and success match LeRobot's environment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.envs import one_of
from common.envs.mujoco import Renderer


class MetaworldEnvironment:
    """A task such as `pick-place-v3`; see `common.envs.Environment`.

    The state is the gripper's position and opening, the first four numbers of Meta-World's observation: only
    the images show where the object and the goal are. Cameras are `corner2`, moved and turned as in LeRobot,
    and `gripper`.
    """

    fps = 80.0
    state_names = ("x", "y", "z", "gripper")
    action_names = ("dx", "dy", "dz", "gripper")
    cameras = ("corner2", "gripper")
    pushes = (1.0, 1.0, 1.0, 0.0)  # as much as the expert can give, but no letting go

    def __init__(self, task: str, image_size: tuple[int, int], max_steps: int | None = None):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        one_of(task, sorted(ALL_V3_ENVIRONMENTS), "metaworld")
        self.name, self.image_size = f"metaworld:{task}", image_size
        self.task = task.removesuffix("-v3").replace("-", " ")
        self._task, self._env, self._renderer = task, None, None
        self.max_steps = max_steps or 500

    def _make(self) -> None:
        import metaworld

        tasks = metaworld.MT1(self._task, seed=42)
        self._env = tasks.train_classes[self._task]()
        self._env.set_task(tasks.train_tasks[0])
        self._env.reset()
        self._env.max_path_length = self.max_steps  # it would end an episode after 500
        self._env._freeze_rand_vec = False  # every episode has its own object and goal,
        self._env.seeded_rand_vec = True  # set by its seed
        self._env.model.camera("corner2").pos[:] = (0.75, 0.075, 0.7)
        self._renderer = Renderer(self._env.model, self._env.data, self.image_size)

    def reset(self, seed: int, episode: int) -> None:
        import mujoco

        if self._env is None:
            self._make()
        self._env.seed(seed + episode)
        self._raw, _ = self._env.reset(seed=seed + episode)
        # It places the goal last: until the next step, pictures would show that of another episode.
        mujoco.mj_forward(self._env.model, self._env.data)
        self._success = False

    def state(self) -> np.ndarray:
        return self._raw[:4].astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {"corner2": self.picture(), "gripper": self._renderer("gripperPOV")}

    def picture(self) -> np.ndarray:
        upright = self._renderer("corner2")[::-1, ::-1]  # that camera is mounted upside down
        return np.ascontiguousarray(upright)

    def step(self, action: np.ndarray) -> bool:
        self._raw, _, terminated, truncated, info = self._env.step(np.clip(action, -1, 1))
        self._success |= bool(info["success"])
        return self._success or terminated or truncated

    def success(self) -> bool:
        return self._success

    def facts(self) -> dict[str, bool | str]:
        return {}

    def expert(self) -> Callable[[], np.ndarray]:
        """Meta-World's scripted policy for the task."""
        from metaworld.policies import ENV_POLICY_MAP

        policy = ENV_POLICY_MAP[self._task]()
        return lambda: np.clip(policy.get_action(self._raw), -1, 1).astype(np.float32)
