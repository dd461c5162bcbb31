"""The robots of docs/robots.md, run as printed there."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.checkpoint import PolicySpec
from common.control import ControlLoop
from common.data.rotation import Rotations

lerobot = pytest.importorskip("lerobot.robots")
DOC = (Path(__file__).parents[1] / "docs" / "robots.md").read_text()
MOTORS = ("shoulder_pan.pos", "elbow_flex.pos", "gripper.pos")
CAMERA = "observation.images.cam_head"  # what LeRobot calls the robot's camera cam_head


def documented(name):
    """The definitions of a code block in the documentation."""
    (block,) = (
        text for text in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if f"class {name}" in text
    )
    scope = {}
    exec(compile(block, "docs/robots.md", "exec"), scope)
    return scope[name], block


class Motors(lerobot.Robot):
    """LeRobot's interface, with motors that move half of the way to their goal in each observation."""

    name = "motors"

    def __init__(self, folder):
        super().__init__(lerobot.RobotConfig(id="test", calibration_dir=folder))
        self.place, self.goals, self.connected = dict.fromkeys(MOTORS, 0.0), [], False

    @property
    def observation_features(self):
        return dict.fromkeys(MOTORS, float) | {"cam_head": (32, 48, 3)}

    @property
    def action_features(self):
        return dict.fromkeys(MOTORS, float)

    @property
    def is_connected(self):
        return self.connected

    def connect(self, calibrate=True):
        self.connected = True

    @property
    def is_calibrated(self):
        return True

    def calibrate(self): ...

    def configure(self): ...

    def get_observation(self):
        goal = self.goals[-1] if self.goals else self.place
        self.place = {name: (x + goal[name]) / 2 for name, x in self.place.items()}
        return self.place | {"cam_head": np.zeros((32, 48, 3), np.uint8)}

    def send_action(self, action):
        assert self.connected
        assert set(action) == set(MOTORS)
        assert all(type(value) is float for value in action.values())
        self.goals.append(action)
        return action

    def disconnect(self):
        self.connected = False


def test_a_robot_of_lerobot_is_driven(tmp_path):
    arm_class, block = documented("LeRobotArm")
    assert block.rstrip().count("\n") <= 32
    spec = PolicySpec(("head",), (32, 48), MOTORS, MOTORS, 50, (CAMERA,))
    seen = []

    def act(observation):
        seen.append(observation)
        return observation["state"] + np.outer(np.arange(8), [0.1, -0.1, 0.0]).astype(np.float32)

    policy = SimpleNamespace(horizon=8, spec=spec, act=act, reset=lambda: None)
    motors = Motors(tmp_path)
    arm = arm_class(motors, spec, start=np.array([1.0, 2.0, 3.0]))
    report = ControlLoop(policy, arm, rate=50, max_velocity=20).run(0.5)
    assert motors.connected
    assert motors.goals[0] == dict(zip(MOTORS, (1.0, 2.0, 3.0), strict=True))
    assert len(motors.goals) == report.cycles + 1
    assert seen[0]["images"][CAMERA].shape == (32, 48, 3)
    np.testing.assert_allclose(
        seen[0]["state"], [0.5, 1.0, 1.5]
    )  # halfway to the start, in the order of the names
    assert motors.goals[-1]["shoulder_pan.pos"] > 1
    assert motors.goals[-1]["elbow_flex.pos"] < 1
    motors.disconnect()


def test_a_robot_of_lerobot_goes_by_recorded_names(tmp_path):
    turned = Rotations("axis-angle", (0,), MOTORS)
    six = turned.names()
    spec = PolicySpec(
        ("head",), (32, 48), six, six, 50, (CAMERA,), state_rotations=turned, action_rotations=turned
    )
    arm = documented("LeRobotArm")[0](Motors(tmp_path), spec)
    observation = arm.observe()
    assert [spec.camera(name) for name in observation["images"]] == ["head"]
    assert observation["state"].shape == (3,)
    arm.send(np.array([0.0, 1.0, 2.0]))
    assert arm.robot.goals == [dict(zip(MOTORS, (0.0, 1.0, 2.0), strict=True))]
    arm.robot.disconnect()


def test_the_ros_node_is_code():
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if "rclpy" in text)
    compile(block, "docs/robots.md", "exec")
