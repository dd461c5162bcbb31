"""Rotations inside state and action, re-expressed so that a network meets no jumps.

Quaternions q and -q are the same rotation, and recorders flip between them; axis-angle and Euler angles jump
by a turn. The first two columns of the rotation matrix, six numbers, are continuous (Zhou et al. 2019, "On
the Continuity of Rotation Representations in Neural Networks"); Gram-Schmidt brings any six back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.data.store import EpisodeStore
from common.errors import UserError

TARGET, TARGET_DIM = "6d", 6
SOURCES = {"quaternion": 4, "quaternion-wxyz": 4, "axis-angle": 3, "euler": 3}
"""What can be re-expressed, and in how many numbers it is recorded. A `quaternion` is (x, y, z, w), `euler`
roll, pitch, yaw about the fixed axes x, y, z; angles are in radians."""
USUAL_NAMES = {
    "quaternion": r"(quat|rot|orn|orientation)|(^|[_./])q[xyzw]$",
    "quaternion-wxyz": r"(quat|rot|orn|orientation)|(^|[_./])q[xyzw]$",
    "axis-angle": r"(axis_?angle|rotvec|rot|orn|ori)",
    "euler": r"(euler|rpy|rot|orn|orientation)|(^|[_./])(roll|pitch|yaw)$",
}


@dataclass(frozen=True)
class Rotations:
    """Where a vector holds rotations, and how they are recorded.

    Attributes:
        kind: one of SOURCES.
        starts: index of the first number of each rotation in the recorded vector, ascending.
        recorded: names of the recorded dimensions.
    """

    kind: str
    starts: tuple[int, ...]
    recorded: tuple[str, ...]

    @classmethod
    def find(cls, names: Sequence[str], kind: str, pattern: str | None) -> Rotations:
        """Runs of dimensions whose names match, cut into rotations."""
        wanted = re.compile(re.escape(pattern) if pattern else USUAL_NAMES[kind], re.IGNORECASE)
        size, starts, index = SOURCES[kind], [], 0
        while index < len(names):
            run = index
            while run < len(names) and wanted.search(names[run]):
                run += 1
            if run > index and (run - index) % size:
                found = ", ".join(names[index:run])
                raise UserError(
                    f"--rotation {kind}->{TARGET}: {found} are {run - index} dimensions, and a rotation has "
                    f"{size}: name the right ones, as in --rotation eef_quat:{kind}->{TARGET}."
                )
            starts += range(index, run, size)
            index = max(run, index + 1)
        return cls(kind, tuple(starts), tuple(names))

    def names(self) -> tuple[str, ...]:
        """Names of the re-expressed dimensions."""
        return tuple(
            self._walk(list(self.recorded), lambda part: [f"{part[0]}:r{i}" for i in range(TARGET_DIM)])
        )

    def _walk(self, items: list, convert: Callable[[list], list]) -> list:
        out, index, size = [], 0, SOURCES[self.kind]
        for start in self.starts:
            out += items[index:start] + convert(items[start : start + size])
            index = start + size
        return out + items[index:]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Recorded vectors (..., D) to re-expressed ones (..., D'), float32."""
        columns = [values[..., i : i + 1] for i in range(values.shape[-1])]

        def convert(part: list[np.ndarray]) -> list[np.ndarray]:
            matrix = to_matrix(np.concatenate(part, -1).astype(np.float64), self.kind)
            return [matrix[..., :, 0], matrix[..., :, 1]]

        return np.concatenate(self._walk(columns, convert), -1).astype(np.float32)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Re-expressed vectors (..., D') back to recorded ones (..., D), float32."""
        size, parts, index = SOURCES[self.kind], [], 0
        for number, start in enumerate(self.starts):
            here = start + (TARGET_DIM - size) * number
            six = values[..., here : here + TARGET_DIM].astype(np.float64)
            parts += [values[..., index:here], from_matrix(gram_schmidt(six), self.kind)]
            index = here + TARGET_DIM
        return np.concatenate([*parts, values[..., index:]], -1).astype(np.float32)


def parse(option: str) -> tuple[str | None, str]:
    """`[NAMES:]KIND->6d` to (NAMES, KIND)."""
    pattern, _, rest = option.rpartition(":")
    kind, arrow, target = rest.partition("->")
    if kind not in SOURCES or not arrow or target != TARGET:
        raise UserError(
            f"--rotation {option} is not understood: write KIND->{TARGET} with KIND one of "
            f"{', '.join(SOURCES)}, or NAME:KIND->{TARGET} with what the dimensions' names have in common."
        )
    return pattern or None, kind


def re_express(store: EpisodeStore, option: str) -> EpisodeStore:
    """The store with the rotations of its states and actions in six numbers each.

    Raises:
        UserError: if there is no rotation among the dimensions.
    """
    pattern, kind = parse(option)
    state = Rotations.find(store.state_names, kind, pattern)
    action = Rotations.find(store.action_names, kind, pattern)
    if not state.starts and not action.starts:
        raise UserError(
            f"--rotation {option}: no dimension of {store.source} is named like one: the state has "
            f"{', '.join(store.state_names)}; the action {', '.join(store.action_names)}."
        )
    for rotations, values in ((state, store.state), (action, store.action)):
        if kind.startswith("quaternion"):
            parts = [values[:, start : start + 4] for start in rotations.starts]
            zero = [int(np.argmin(abs(part).sum(1))) for part in parts if not abs(part).sum(1).all()]
            if zero:
                episode = store.episode_indices[store.episode_of(np.array(zero[0]))]
                raise UserError(
                    f"--rotation {option}: episode {episode} of {store.source} holds a quaternion of four "
                    f"zeros, which is no rotation: choose others with --episodes, or record it again."
                )
    return replace(
        store,
        state=state.encode(store.state),
        action=action.encode(store.action),
        state_names=state.names(),
        action_names=action.names(),
        state_rotations=state,
        action_rotations=action,
    )


def to_matrix(values: np.ndarray, kind: str) -> np.ndarray:
    """(..., 3 or 4) numbers of a kind to rotation matrices (..., 3, 3)."""
    if kind == "euler":
        cos, sin = np.cos(values), np.sin(values)
        zero, one = np.zeros_like(cos[..., 0]), np.ones_like(cos[..., 0])

        def about(axis: int) -> np.ndarray:
            c, s = cos[..., axis], sin[..., axis]
            rows = {
                0: [one, zero, zero, zero, c, -s, zero, s, c],
                1: [c, zero, s, zero, one, zero, -s, zero, c],
                2: [c, -s, zero, s, c, zero, zero, zero, one],
            }[axis]
            return np.stack(rows, -1).reshape(*c.shape, 3, 3)

        return about(2) @ about(1) @ about(0)
    if kind == "axis-angle":
        angle = np.linalg.norm(values, axis=-1, keepdims=True)
        xyz = values * 0.5 * np.sinc(angle / (2 * np.pi))  # sin(angle / 2) / angle, also at 0
        values = np.concatenate([xyz, np.cos(angle / 2)], -1)
    elif kind == "quaternion-wxyz":
        values = np.roll(values, -1, axis=-1)
    x, y, z, w = np.moveaxis(values / np.linalg.norm(values, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def gram_schmidt(six: np.ndarray) -> np.ndarray:
    """The rotation (..., 3, 3) whose first two columns are nearest, in turn, to (..., 6) numbers."""
    first = six[..., :3] / np.maximum(np.linalg.norm(six[..., :3], axis=-1, keepdims=True), 1e-9)
    second = six[..., 3:] - (first * six[..., 3:]).sum(-1, keepdims=True) * first
    second = second / np.maximum(np.linalg.norm(second, axis=-1, keepdims=True), 1e-9)
    return np.stack([first, second, np.cross(first, second)], -1)


def from_matrix(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Rotation matrices (..., 3, 3) to numbers of a kind; quaternions along a chunk never flip their sign."""
    m = matrix
    if kind == "euler":
        pitch = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 0, 0], m[..., 1, 0]))
        return np.stack(
            [np.arctan2(m[..., 2, 1], m[..., 2, 2]), pitch, np.arctan2(m[..., 1, 0], m[..., 0, 0])], -1
        )
    # Each row is 4 q_k (x, y, z, w) for one k: the longest one loses no precision.
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    rows = np.stack(
        [
            np.stack([1 + xx - yy - zz, xy, xz, xw], -1),
            np.stack([xy, 1 - xx + yy - zz, yz, yw], -1),
            np.stack([xz, yz, 1 - xx - yy + zz, zw], -1),
            np.stack([xw, yw, zw, 1 + xx + yy + zz], -1),
        ],
        -2,
    )
    lengths = np.linalg.norm(rows, axis=-1)
    best = lengths.argmax(-1)[..., None, None]
    quaternion = np.take_along_axis(rows, best, -2)[..., 0, :]
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    quaternion *= np.where(quaternion[..., 3:] < 0, -1, 1)
    if kind == "axis-angle":
        half = np.arctan2(np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True), quaternion[..., 3:])
        return quaternion[..., :3] * 2 / np.sinc(half / np.pi)  # half / sin(half), also at 0
    if quaternion.ndim > 1:
        turns = (quaternion[..., 1:, :] * quaternion[..., :-1, :]).sum(-1) < 0
        flips = np.cumsum(turns, axis=-1) % 2
        quaternion[..., 1:, :] *= np.where(flips, -1, 1)[..., None]
    return quaternion if kind == "quaternion" else np.roll(quaternion, 1, axis=-1)
