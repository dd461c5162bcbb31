"""A gymnasium environment for policies of the tests' dataset, like one in a lab's own module."""

import gymnasium
import numpy as np


class Arm(gymnasium.Env):
    """Three joints that follow commands exactly; an episode is done after six steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-10, 10, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.joints, self.steps = self.np_random.normal(size=3), 0
        return self._see(), {}

    def step(self, action):
        self.joints, self.steps = np.asarray(action, float), self.steps + 1
        return self._see(), 0.0, self.steps == 6, False, {"is_success": self.steps == 6}

    def _see(self):
        frame = np.full((32, 32, 3), 40 + 10 * self.steps, np.uint8)
        return {"images": dict.fromkeys(("cam_head", "cam_left", "cam_right"), frame), "state": self.joints}

    def render(self):
        return self._see()["images"]["cam_head"]


def make():
    return Arm()
