"""A robot on paper: two joints that go where they are sent, and a camera that draws them.

`log` names a file to which every observation and every action is written as a line of JSON.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

JOINTS = ("shoulder.pos", "elbow.pos")
SIZE = 48


def draw(joints: dict[str, float]) -> np.ndarray:
    """Two bars, as long as the joints are bent."""
    picture = np.full((SIZE, SIZE, 3), 40, np.uint8)
    for row, joint in enumerate(JOINTS):
        length = int(np.clip((joints[joint] + 1) / 2, 0, 1) * SIZE)
        picture[8 + 20 * row : 20 + 20 * row, :length, row] = 220
    return picture


@RobotConfig.register_subclass("paper")
@dataclass(kw_only=True)
class PaperConfig(RobotConfig):
    log: str | None = None


class Paper(Robot):
    config_class, name = PaperConfig, "paper"
    is_connected, is_calibrated = False, True

    def __init__(self, config: PaperConfig):
        super().__init__(config)
        self.log = Path(config.log) if config.log else None
        self.joints = dict.fromkeys(JOINTS, 0.0)
        self.cameras = {"front": None}

    @property
    def observation_features(self) -> dict:
        return {**dict.fromkeys(JOINTS, float), "front": (SIZE, SIZE, 3)}

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(JOINTS, float)

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict:
        self._write("state", self.joints)
        return {**self.joints, "front": draw(self.joints)}

    def send_action(self, action: dict) -> dict:
        self.joints = {joint: float(action[joint]) for joint in JOINTS}
        self._write("action", self.joints)
        return self.joints

    def _write(self, kind: str, joints: dict[str, float]) -> None:
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps([kind, *joints.values()]) + "\n")


@TeleoperatorConfig.register_subclass("paper_leader")
@dataclass(kw_only=True)
class PaperLeaderConfig(TeleoperatorConfig):
    pass


class PaperLeader(Teleoperator):
    """Draws circles, once in two seconds."""

    config_class, name = PaperLeaderConfig, "paper_leader"
    is_connected, is_calibrated = False, True

    @property
    def action_features(self) -> dict:
        return dict.fromkeys(JOINTS, float)

    @property
    def feedback_features(self) -> dict:
        return {}

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_action(self) -> dict:
        angle = math.pi * time.perf_counter()
        return dict(zip(JOINTS, (0.8 * math.sin(angle), 0.8 * math.cos(angle)), strict=True))

    def send_feedback(self, feedback: dict) -> None: ...
