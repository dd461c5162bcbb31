"""Layouts of HDF5 files: which arrays are the state and the action, and the names of their dimensions.

Recognised layouts (for others, give `--state-keys`, `--action-keys`, `--camera-keys`):

    ALOHA, ACT      /observations/qpos, /observations/images/<camera>, /action
                    /base_action, the second part of Mobile ALOHA's action
    grouped         /observation/joint_pos/left, ..., /action/joint_pos/left, ...: what both groups have,
                    joints before hands before the rest, left before right; then what only the action has
    robomimic       /data/demo_0/obs/..., /data/demo_0/actions; likewise episode_0, traj_0, ...: also LIBERO
                    and ManiSkill, whose names are others
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from common.data.hdf5_files import natural
from common.data.layout import GROUPS, Array, Known, numbered, role

QUANTITIES = ("joint_pos", "hand_joint_pos", "gripper_pos", "gripper")
# In names of no quantity; below one, `index` is a finger.
BOOKKEEPING = re.compile(r"time|stamp|^index$|(frame|episode|task|sample)_?index|step|mask|valid|is_pad")
STATES = {  # below obs/, by layout; the first that exists is used
    "robomimic": ("robot{}_eef_pos", "robot{}_eef_quat", "robot{}_gripper_qpos"),
    "LIBERO": ("ee_states", "gripper_states"),
    "ManiSkill": ("agent/qpos",),
}
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ALOHA_JOINTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ARM)


def recognise(arrays: dict[str, Array]) -> Known | None:
    """The layout of an episode with these arrays; None if unknown."""
    numbers = [key for key, array in arrays.items() if array.kind == "numbers"]

    def alike(key: str, other: str) -> bool:
        """Whether an array has as many rows as another, each a vector."""
        return len(arrays[key].shape) <= 2 and arrays[key].shape[0] == arrays[other].shape[0]

    if {"observations/qpos", "action"} <= set(numbers):
        base = [key for key in ("base_action",) if key in numbers and alike(key, "action")]  # Mobile ALOHA's
        return Known("ALOHA", ("observations/qpos",), ("action", *base))
    if "actions" in numbers:
        for layout, names in STATES.items():
            robots = range(10) if "{}" in names[0] else (0,)
            keys = [f"obs/{name.format(robot)}" for robot in robots for name in names]
            keys = tuple(key for key in keys if key in numbers)
            if keys:
                return Known(layout, keys, ("actions",))
    parts = [key.partition("/")[2] for key in numbers if key.startswith("action/") and not role(key)]
    parts = sorted((key for key in parts if not BOOKKEEPING.search(key)), key=_grouped_order)
    shared = [key for key in parts if f"observation/{key}" in numbers]
    if shared:  # what only the action has, such as a base's velocity, comes last
        more = [key for key in parts if key not in shared and alike(f"action/{key}", f"action/{shared[0]}")]
        state = tuple(f"observation/{key}" for key in shared)
        return Known("grouped", state, tuple(f"action/{key}" for key in (*shared, *more)))
    return None


def _grouped_order(key: str) -> tuple:
    quantity, _, part = key.partition("/")
    rank = QUANTITIES.index(quantity) if quantity in QUANTITIES else len(QUANTITIES)
    side = {"left": 0, "right": 1}.get(part, 2)
    return rank, quantity, side, natural(part)


def short_names(key: str, width: int) -> Sequence[str]:
    """Names of an array's dimensions; the same for state and action if they are the same quantity."""
    return numbered(GROUPS.sub("", key), width)


def aloha_names(key: str, width: int) -> Sequence[str]:
    if key not in ("observations/qpos", "action"):
        return short_names(key, width)
    return ALOHA_JOINTS if width == len(ALOHA_JOINTS) else [f"joint_{i}" for i in range(width)]
