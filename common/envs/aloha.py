"""ALOHA's bimanual tasks in MuJoCo (Zhao et al. 2023), on the scenes of gym-aloha, scored strictly.

gym-aloha always renders three pictures of 480x640 at every step, and counts a transfer as done at the first
touch. Here pictures are rendered only when a policy needs them, and the end state counts: the left hand holds
the cube off the table, with the right hand away from it; or the peg touches the pin inside the socket while
both are held up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from common.envs import one_of
from common.envs.mujoco import Renderer

FPS, STEPS = 50, 400
SIDES = ("left", "right")
CAMERAS = ("top", "left_wrist", "right_wrist")
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
NAMES = tuple(f"{side}_{joint}" for side in SIDES for joint in JOINTS)
SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")
TASKS = {
    "transfer-cube": "pick up the cube with the right arm and hand it over to the left arm",
    "insertion": "pick up the peg and the socket and put the peg into the socket",
}


class AlohaEnvironment:
    """`transfer-cube` or `insertion`; see `common.envs.Environment`.

    State and action are the 14 joint positions, radians, with grippers from 0 (closed) to 1 (open).
    """

    fps, state_names, action_names, cameras = float(FPS), NAMES, NAMES, CAMERAS
    pushes = (*(0.1,) * 6, 0.0) * 2  # radians

    def __init__(self, task: str, image_size: tuple[int, int], max_steps: int | None = None):
        import gym_aloha.constants

        self.constants = gym_aloha.constants
        self.name = f"aloha:{one_of(task, list(TASKS), 'aloha')}"
        self.task, self._task = TASKS[task], task
        self.max_steps = max_steps or STEPS
        self._size, self.model = image_size, None

    def _make(self) -> None:
        import mujoco

        scene = f"bimanual_viperx_{self._task.replace('-', '_')}.xml"
        self.model = mujoco.MjModel.from_xml_path(str(self.constants.ASSETS_DIR / scene))
        self.data = mujoco.MjData(self.model)
        self._renderer = Renderer(self.model, self.data, self._size)
        self._substeps = round(1 / FPS / self.model.opt.timestep)

    def reset(self, seed: int, episode: int) -> None:
        import mujoco
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose

        if self.model is None:
            self._make()
        if self._task == "insertion":
            objects = np.concatenate(sample_insertion_pose(seed + episode))
        else:
            objects = sample_box_pose(seed + episode)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = self.constants.START_ARM_POSE
        self.data.qpos[16:] = objects
        mujoco.mj_forward(self.model, self.data)

    def state(self) -> np.ndarray:
        joints = self.data.qpos[:16].reshape(2, 8)[:, :7].copy()
        joints[:, 6] = opening(joints[:, 6])
        return joints.reshape(-1).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {camera: self._renderer(camera) for camera in CAMERAS}

    def picture(self) -> np.ndarray:
        return self._renderer(CAMERAS[0])

    def step(self, action: np.ndarray) -> bool:
        import mujoco

        self.data.ctrl[:] = self.controls(action)
        mujoco.mj_step(self.model, self.data, self._substeps)
        return False

    def controls(self, action: np.ndarray) -> np.ndarray:
        """(14,) joint positions -> (16,) targets of the motors: each gripper has two fingers."""
        close, open_ = (
            self.constants.PUPPET_GRIPPER_POSITION_CLOSE,
            self.constants.PUPPET_GRIPPER_POSITION_OPEN,
        )
        arms = np.asarray(action, float).reshape(2, 7)
        finger = close + arms[:, 6:] * (open_ - close)
        return np.concatenate([arms[:, :6], finger, -finger], axis=1).reshape(-1)

    def touching(self) -> set[tuple[str, str]]:
        """Pairs of bodies in contact, in both orders; an arm's bodies are named after its side."""
        pairs = set()
        for contact in self.data.contact[: self.data.ncon]:
            names = [self.model.geom(geom).name for geom in (contact.geom1, contact.geom2)]
            one, other = (next((s for s in SIDES if name.startswith(f"vx300s_{s}")), name) for name in names)
            pairs |= {(one, other), (other, one)}
        return pairs

    def success(self) -> bool:
        touching = self.touching()
        if self._task == "insertion":
            lifted = not any(("table", what) in touching for what in ("red_peg", *SOCKET))
            return ("red_peg", "pin") in touching and lifted
        held, other, table = ((("red_box", what) in touching) for what in ("left", "right", "table"))
        return held and not other and not table

    def facts(self) -> dict[str, bool | str]:
        return {}

    def expert(self) -> Callable[[], np.ndarray]:
        """An expert that knows where the objects are; its plan is as long as a usual episode."""
        plan = insertion if self._task == "insertion" else transfer
        actions = iter(plan(self.model, self.data.qpos.copy(), max(self.max_steps, STEPS)))
        return lambda: next(actions)


def opening[T](finger: T) -> T:
    """How far a gripper is open, from 0 to 1, by the position of its finger."""
    from gym_aloha.constants import PUPPET_GRIPPER_POSITION_CLOSE as CLOSED
    from gym_aloha.constants import PUPPET_GRIPPER_POSITION_OPEN as OPEN

    return (finger - CLOSED) / (OPEN - CLOSED)


class Waypoint(NamedTuple):
    """Gripper pose wanted at a step: tip (3,) in meters, pitch below the horizon and roll in degrees."""

    step: int
    tip: Sequence[float]
    pitch: float
    roll: float
    opening: float


REACH = 0.15  # meters from a gripper's link to where its fingers hold


def transfer(model, qpos: np.ndarray, steps: int) -> np.ndarray:
    """Joint positions, (steps, 14), that move the cube from the table into the left hand.

    The right hand picks the cube and carries it to the middle; there the left hand, turned by 90 degrees so
    that the fingers do not collide, grasps its other half.
    """
    x, y, _ = qpos[16:19]
    meet, height = np.array([0.02, 0.5, 0.28]), 0.02
    beside = np.array([-0.04, 0.0, 0.0])  # meters: where the left hand waits, relative to the cube
    away = meet - 3 * beside
    right = [
        *approach(model, qpos, "right", (x, y, height)),
        Waypoint(150, (x, y, height), 60, 0, 0),
        Waypoint(225, meet, 0, 0, 0),
        Waypoint(310, meet, 0, 0, 0),
        Waypoint(325, meet, 0, 0, 1),
        Waypoint(370, away, 0, 0, 1),
        Waypoint(steps, away, 0, 0, 1),
    ]
    left = [
        present(model, qpos, "left"),
        Waypoint(150, meet + 3 * beside, 0, 90, 1),
        Waypoint(230, meet + 2 * beside, 0, 90, 1),
        Waypoint(280, meet, 0, 90, 1),
        Waypoint(300, meet, 0, 90, 0),
        Waypoint(330, meet, 0, 90, 0),
        Waypoint(380, meet + 2 * beside, 0, 90, 0),
        Waypoint(steps, meet + 2 * beside, 0, 90, 0),
    ]
    return both_arms(model, qpos, left, right, steps)


def insertion(model, qpos: np.ndarray, steps: int) -> np.ndarray:
    """Joint positions, (steps, 14), that pick up peg and socket and push one into the other, in the air."""
    (peg_x, peg_y, _), (socket_x, socket_y, _) = qpos[16:19], qpos[23:26]
    ways = []
    for side, sign, x, y, height in (
        ("left", -1, socket_x, socket_y, 0.02),
        ("right", 1, peg_x, peg_y, 0.01),
    ):
        apart, together = np.array([0.17 * sign, 0.5, 0.25]), np.array([0.04 * sign, 0.5, 0.25])
        ways.append(
            [
                *approach(model, qpos, side, (x, y, height)),
                Waypoint(160, (x, y, height), 60, 0, 0),
                Waypoint(250, apart, 60, 0, 0),
                Waypoint(350, together, 60, 0, 0),
                Waypoint(steps, together, 60, 0, 0),
            ]
        )
    return both_arms(model, qpos, *ways, steps)


def present(model, qpos: np.ndarray, side: str) -> Waypoint:
    """Where a hand is: an expert may also take over from a policy, in the middle of an episode."""
    import mujoco
    from scipy.spatial.transform import Rotation

    data, body = mujoco.MjData(model), model.body(f"vx300s_{side}/gripper_link").id
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    rotation = data.xmat[body].reshape(3, 3)
    _, pitch, roll = Rotation.from_matrix(rotation).as_euler("ZYX", degrees=True)
    finger = qpos[8 * SIDES.index(side) + 6]
    return Waypoint(0, data.xpos[body] + REACH * rotation[:, 0], pitch, roll, opening(finger))


def approach(model, qpos: np.ndarray, side: str, target: Sequence[float]) -> list[Waypoint]:
    """From where a hand is to an object on the table, by a detour that does not tell where the object is.

    The first steps of a straight way give the place away: in all later ones the state says where the hand
    will go, and a policy begins by not looking (docs/benchmarks.md, transfer-cube). The detour depends on the
    target only to be the same for the same episode.
    """
    random = np.random.default_rng(np.array(target[:2]).view(np.uint64))
    sign = 1 if side == "right" else -1
    somewhere = random.uniform((0.0, 0.40, 0.18), (0.24, 0.60, 0.32)) * (sign, 1, 1)
    above = target + random.uniform((-0.04, -0.04, 0.08), (0.04, 0.04, 0.12))
    return [
        present(model, qpos, side),
        Waypoint(45, somewhere, 45, 0, 1),
        Waypoint(90, above, 60, 0, 1),
        Waypoint(115, target + np.array([0, 0, 0.04]), 60, 0, 1),
        Waypoint(135, target, 60, 0, 1),
    ]


def both_arms(model, qpos: np.ndarray, left: Sequence[Waypoint], right: Sequence[Waypoint], steps: int):
    """Joint positions, (steps, 14), that follow the two hands' waypoints."""
    arms = [follow(model, qpos, side, way, steps) for side, way in zip(SIDES, (left, right), strict=True)]
    return np.concatenate(arms, axis=1).astype(np.float32)


def follow(model, qpos: np.ndarray, side: str, way: Sequence[Waypoint], steps: int) -> np.ndarray:
    """Joint positions, (steps, 7), that move a gripper along its waypoints, by damped least squares.

    The gripper points away from the arm's base: if it kept one heading instead, the forearm would have to
    roll by up to half a turn within a few steps, one way on the left of the base and the other on its right.
    """
    import mujoco
    from scipy.spatial.transform import Rotation

    data, body = mujoco.MjData(model), model.body(f"vx300s_{side}/gripper_link").id
    data.qpos[:] = qpos
    first = 8 * SIDES.index(side)
    base = model.body(f"vx300s_{side}").pos
    dofs, found = slice(first, first + 6), np.empty((steps, 7))
    jacobian = np.zeros((6, model.nv))
    for step in range(steps):
        tip, pitch, roll, found[step, 6] = between(way, step + 1)
        x, y, _ = tip - base
        heading = np.degrees(np.arctan2(y, x))
        rotation = Rotation.from_euler("ZYX", (heading, pitch, roll), degrees=True).as_matrix()
        position = tip - REACH * rotation[:, 0]
        for _ in range(50):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            off = rotation @ data.xmat[body].reshape(3, 3).T
            spin = 0.5 * np.array([off[2, 1] - off[1, 2], off[0, 2] - off[2, 0], off[1, 0] - off[0, 1]])
            error = np.concatenate([position - data.xpos[body], spin])
            if np.abs(error).max() < 1e-4:
                break
            mujoco.mj_jacBody(model, data, jacobian[:3], jacobian[3:], body)
            part = jacobian[:, dofs]
            data.qpos[dofs] += part.T @ np.linalg.solve(part @ part.T + 1e-4 * np.eye(6), error)
        found[step, :6] = data.qpos[dofs]
    return found


def between(way: Sequence[Waypoint], step: int) -> tuple[np.ndarray, float, float, float]:
    """Tip, pitch, roll and opening at a step, with smooth starts and stops at the waypoints."""
    last = next(i for i in range(1, len(way)) if step <= way[i].step)
    a, b = way[last - 1], way[last]
    share = (step - a.step) / (b.step - a.step)
    share = share**2 * (3 - 2 * share)
    mix = [
        np.asarray(one) + share * (np.asarray(other) - one) for one, other in zip(a[1:], b[1:], strict=True)
    ]
    return mix[0], *map(float, mix[1:])
