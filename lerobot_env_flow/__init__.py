"""LeRobot's plug-in for the simulators of this project: `--env.type=flow --env.task=metaworld:pick-place-v3`.

Images are those of `common/envs`, which cost a tenth of what the simulators draw by default; LeRobot's
policies and ours see the same. Like the policies' plug-in, it is used in this repository and as a
distribution that carries `common/` inside it (tools/bundle.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from common.envs import EnvConfig as Named
from common.envs import make_environment
from common.errors import UserError

KINDS = ("metaworld", "aloha")


@EnvConfig.register_subclass("flow")
@dataclass
class FlowEnv(EnvConfig):
    """A simulator of `common/envs`.

    Args:
        task: `metaworld:TASK`, `aloha:transfer-cube` or `aloha:insertion`.
        observation_height, observation_width: of the images, in pixels.
        episode_length: control steps after which an episode has failed; default: what the simulator says.
    """

    task: str | None = "metaworld:pick-place-v3"
    observation_height: int = 96
    observation_width: int = 96
    episode_length: int | None = None

    def __post_init__(self):
        environment = self.make()
        self.fps = round(environment.fps)
        size = (self.observation_height, self.observation_width, 3)
        state, action = len(environment.state_names), len(environment.action_names)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (action,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (state,)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        for camera in environment.cameras:
            self.features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, size)
            self.features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"

    def make(self):
        """The environment of `common/envs`; a UserError if none has that name."""
        if (self.task or "").partition(":")[0] not in KINDS:
            raise UserError(
                f"--env.task={self.task}: give metaworld:TASK or aloha:TASK; LeRobot itself has others."
            )
        size = (self.observation_height, self.observation_width)
        return make_environment(Named(env=self.task, max_steps=self.episode_length), size)

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """`n_envs` copies that advance together; one that is over waits for the others."""
        makers = [freeze_after_episode_end(partial(Simulator, self)) for _ in range(n_envs)]
        if use_async_envs and n_envs > 1:
            return {self.type: {0: gymnasium.vector.AsyncVectorEnv(makers, context="forkserver")}}
        return {self.type: {0: gymnasium.vector.SyncVectorEnv(makers)}}


class Simulator(gymnasium.Env):
    """An environment of `common/envs` as a gymnasium environment with LeRobot's names.

    The seed of a reset is the episode's: `lerobot-eval --seed=1000000` acts in the episodes of `evaluate.py`.
    Success is reported at an episode's end, where the simulators score it.
    """

    def __init__(self, config: FlowEnv):
        self.simulator = config.make()
        self.task = self.task_description = self.simulator.task
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": config.fps}
        self.render_mode = "rgb_array"
        self._max_episode_steps = self.simulator.max_steps
        picture = spaces.Box(0, 255, (config.observation_height, config.observation_width, 3), np.uint8)
        pictures = spaces.Dict(dict.fromkeys(self.simulator.cameras, picture))
        state, action = (config.features[key].shape for key in ("agent_pos", ACTION))
        self.observation_space = spaces.Dict(
            {"agent_pos": spaces.Box(-np.inf, np.inf, state, np.float32), "pixels": pictures}
        )
        self.action_space = spaces.Box(-np.inf, np.inf, action, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self.simulator.reset(seed, 0)
        self.steps = 0
        return self._seen(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        over = self.simulator.step(action)
        self.steps += 1
        late = self.steps >= self._max_episode_steps
        success = bool((over or late) and self.simulator.success())
        return self._seen(), float(success), bool(over), late, {"is_success": success}

    def render(self) -> np.ndarray:
        return self.simulator.picture()

    def _seen(self) -> dict:
        return {"agent_pos": self.simulator.state(), "pixels": self.simulator.images()}
