"""Rotations inside state and action, re-expressed without jumps for a network.

Quaternions q and -q are the same rotation; axis-angle and Euler angles jump by a full turn. The first two
columns of the rotation matrix are continuous; Gram-Schmidt turns any six numbers into one (Zhou et al. 2019).
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from common.errors import UserError

TARGET, TARGET_DIM = "6d", 6
SOURCES = {"quaternion": 4, "quaternion-wxyz": 4, "axis-angle": 3, "euler": 3}
"""Kinds that can be re-expressed, and their sizes. A `quaternion` is (x, y, z, w), `euler` roll, pitch, yaw
about the fixed axes x, y, z; angles are in radians."""
LARGEST_PITCH = np.pi / 2 + 1e-3
LARGEST_ANGLE = 2 * np.pi + 1e-3  # with recorders' rounding
QUATERNION_NAMES = r"(quat|rot|orn|orientation)|(^|[_./])q[xyzw]$"
USUAL_NAMES = {
    "quaternion": QUATERNION_NAMES,
    "quaternion-wxyz": QUATERNION_NAMES,
    "axis-angle": r"(axis_?angle|rotvec|rot|orn|ori)",
    "euler": r"(euler|rpy|rot|orn|orientation)|(^|[_./])(roll|pitch|yaw)$",
}


@dataclass(frozen=True)
class Rotations:
    """Where a vector with dimensions named `recorded` holds rotations of a kind: the first index of each."""

    kind: str
    starts: tuple[int, ...]
    recorded: tuple[str, ...]

    @classmethod
    def find(cls, names: Sequence[str], kind: str, pattern: str | None) -> "Rotations":
        """Runs of dimensions whose names match, cut into rotations."""
        wanted = re.compile(re.escape(pattern) if pattern else USUAL_NAMES[kind], re.IGNORECASE)
        size, starts = SOURCES[kind], []
        for matches, group in groupby(range(len(names)), lambda i: wanted.search(names[i]) is not None):
            run = list(group)
            if matches and len(run) % size:
                found = ", ".join(names[i] for i in run)
                raise UserError(
                    f"--rotation {kind}->{TARGET}: {found} are {len(run)} dimensions, but a rotation has "
                    f"{size}: name the right ones, such as --rotation eef_quat:{kind}->{TARGET}."
                )
            starts += run[::size] if matches else []
        for start in starts:
            _refuse_order(names[start : start + size], kind)
        return cls(kind, tuple(starts), tuple(names))

    def listed(self) -> str:
        """The names of all dimensions that are rotations."""
        size = SOURCES[self.kind]
        return ", ".join(name for start in self.starts for name in self.recorded[start : start + size])

    def names(self) -> tuple[str, ...]:
        """Names of the re-expressed dimensions."""
        names = list(self.recorded)
        for start in reversed(self.starts):
            names[start : start + SOURCES[self.kind]] = [f"{names[start]}:r{i}" for i in range(TARGET_DIM)]
        return tuple(names)

    def encoded_starts(self) -> list[int]:
        """The first index of each re-expressed rotation."""
        longer = TARGET_DIM - SOURCES[self.kind]
        return [start + longer * number for number, start in enumerate(self.starts)]

    def zeros(self, values: np.ndarray) -> np.ndarray:
        """Rows of recorded vectors (S, D) with a quaternion of four zeros, which is no rotation."""
        starts = self.starts if self.kind.startswith("quaternion") else ()
        return np.flatnonzero(np.any([~values[:, start : start + 4].any(1) for start in starts], axis=0))

    def turns(self, values: np.ndarray) -> np.ndarray:
        """Rows of recorded vectors (S, D) with an angle above a full turn, which would not be restored."""
        if self.kind.startswith("quaternion"):
            return np.empty(0, np.int64)
        columns = [start + i for start in self.starts for i in range(SOURCES[self.kind])]
        return np.flatnonzero((np.abs(values[:, columns]) > LARGEST_ANGLE).any(1))

    def bent(self, values: np.ndarray) -> np.ndarray:
        """Rows of recorded vectors (S, D) with a pitch above a quarter turn, restored as other angles."""
        if self.kind != "euler":
            return np.empty(0, np.int64)
        pitch = values[:, [start + 1 for start in self.starts]]
        return np.flatnonzero((np.abs(pitch) > LARGEST_PITCH).any(1))

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Convert recorded vectors (..., D) to re-expressed ones (..., D'), float32."""

        def two_columns(numbers: np.ndarray) -> np.ndarray:
            return to_matrix(numbers, self.kind)[..., :2].mT.reshape(*numbers.shape[:-1], TARGET_DIM)

        return _replaced(values, self.starts, SOURCES[self.kind], two_columns)

    def nearest(self, values: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """The same rotations in recorded vectors (..., D), as the numbers nearest to those in `previous`.

        Whoever interpolates or filters the numbers would otherwise turn a robot by a full turn.
        """
        values = values.copy()
        for start in self.starts:
            part = slice(start, start + SOURCES[self.kind])
            values[..., part] = _nearest(values[..., part], previous[..., part], self.kind)
        return values

    def follow(self, chunk: np.ndarray, previous: np.ndarray | None = None) -> None:
        """Make each action of a recorded chunk (T, D) the `nearest` to the one before, in place.

        The first one stays, or becomes the nearest to a `previous` action (D,).
        """
        for row in chunk:
            if previous is not None:
                row[:] = self.nearest(row, previous)
            previous = row

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Convert re-expressed vectors (..., D') back to recorded ones (..., D), float32, each by itself."""
        starts = self.encoded_starts()
        return _replaced(values, starts, TARGET_DIM, lambda six: from_matrix(gram_schmidt(six), self.kind))


def _refuse_order(names: Sequence[str], kind: str) -> None:
    """A UserError if the names say that a rotation's numbers are in another order than the kind's."""
    wanted = {"quaternion": "x y z w", "quaternion-wxyz": "w x y z", "euler": "roll pitch yaw"}.get(kind, "")
    ends = [re.search(r"(roll|pitch|yaw|[wxyz])$", name, re.IGNORECASE) for name in names]
    found = [end[1].lower() for end in ends if end]
    if sorted(found) == sorted(wanted.split()) and found != wanted.split():
        ways = (
            "choose others with --rotation NAME:KIND->6d, or order them with --state-keys and --action-keys"
        )
        raise UserError(
            f"--rotation {kind}->{TARGET}: {', '.join(names)} are not in the order {wanted}: {ways}."
        )


def _replaced(values: np.ndarray, starts: Sequence[int], size: int, convert: Callable) -> np.ndarray:
    """Vectors (..., D), float32, with the `size` numbers at each start converted."""
    parts, done = [], 0
    for start in starts:
        parts += [values[..., done:start], convert(values[..., start : start + size].astype(np.float64))]
        done = start + size
    return np.concatenate([*parts, values[..., done:]], -1).astype(np.float32)


def parse(option: str) -> tuple[str | None, str]:
    """`[NAMES:]KIND->6d` to (NAMES, KIND)."""
    pattern, _, rest = option.rpartition(":")
    kind, arrow, target = rest.partition("->")
    if kind not in SOURCES or not arrow or target != TARGET:
        raise UserError(
            f"--rotation {option} is not understood: write KIND->{TARGET} with KIND one of "
            f"{', '.join(SOURCES)}, or NAME:KIND->{TARGET} with a text that the dimensions' names share."
        )
    return pattern or None, kind


def to_matrix(values: np.ndarray, kind: str) -> np.ndarray:
    """Convert (..., 3 or 4) numbers of a kind to rotation matrices (..., 3, 3)."""
    from scipy.spatial.transform import Rotation

    flat = values.reshape(-1, SOURCES[kind])
    if kind == "euler":
        rotation = Rotation.from_euler("xyz", flat)  # lower case: about fixed axes
    elif kind == "axis-angle":
        rotation = Rotation.from_rotvec(flat)
    else:
        rotation = Rotation.from_quat(flat, scalar_first=kind == "quaternion-wxyz")
    return rotation.as_matrix().reshape(*values.shape[:-1], 3, 3)


def from_matrix(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Convert matrices (..., 3, 3) to numbers of a kind: angles up to pi, quaternions with w >= 0."""
    from scipy.spatial.transform import Rotation

    rotation, shape = Rotation.from_matrix(matrix.reshape(-1, 3, 3)), matrix.shape[:-2]
    if kind == "euler":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gimbal lock")  # any angles for this rotation will do
            return rotation.as_euler("xyz").reshape(*shape, 3)
    if kind == "axis-angle":
        return rotation.as_rotvec().reshape(*shape, 3)
    return rotation.as_quat(canonical=True, scalar_first=kind == "quaternion-wxyz").reshape(*shape, 4)


def _nearest(values: np.ndarray, previous: np.ndarray, kind: str) -> np.ndarray:
    """Of all numbers (..., 3 or 4) for the same rotation, those nearest to `previous` ones."""

    def turns(angles: np.ndarray, before: np.ndarray) -> np.ndarray:
        more = 2 * np.pi * np.round((before - angles) / (2 * np.pi))
        return np.where(np.abs(angles + more) > LARGEST_ANGLE, 0, more)  # no recording has larger ones

    if kind == "euler":
        return values + turns(values, previous)
    if kind == "axis-angle":
        angle = np.linalg.norm(values, axis=-1, keepdims=True)
        axis = values / np.maximum(angle, 1e-9)
        return values + axis * turns(angle, (axis * previous).sum(-1, keepdims=True))
    return np.where((values * previous).sum(-1, keepdims=True) < 0, -values, values)


def gram_schmidt(six: np.ndarray) -> np.ndarray:
    """The rotation (..., 3, 3) whose first two columns are nearest, in turn, to (..., 6) numbers.

    Columns that are zero or parallel are replaced.
    """

    def unit(vector: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        return np.where(length > 1e-9, vector / np.maximum(length, 1e-9), otherwise)

    def across(vector: np.ndarray) -> np.ndarray:
        return vector - (first * vector).sum(-1, keepdims=True) * first

    first = unit(six[..., :3], np.eye(3)[0])
    other = across(np.eye(3)[abs(first).argmin(-1)])  # the least parallel axis
    second = unit(across(six[..., 3:]), other / np.linalg.norm(other, axis=-1, keepdims=True))
    return np.stack([first, second, np.cross(first, second)], -1)
