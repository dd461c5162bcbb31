"""Statistics of state and action: fit on training episodes, apply, invert, save.

Quantiles are computed here, from the data: those stored in a LeRobot dataset are averages of per-episode
quantiles, which are not the quantiles of the whole.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.console import say
from common.data import GRIPPER, ChunkDataset, EpisodeStore
from common.data.motion import Motion, cautions, differences_already, slabs, usual_spread, without_extremes
from common.data.rotation import TARGET_DIM
from common.errors import UserError
from common.files import checksum, computed_once

Normalization = Literal["mean-std", "min-max", "quantile"]
POSE = 3 + TARGET_DIM  # numbers in a position and a re-expressed rotation
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")
FORMULAS = ("normalize.py", "data/motion.py", "data/rotation.py", "data/samples.py")  # code of the statistics


def fit_statistics(values: np.ndarray) -> dict[str, Tensor]:
    """`STATISTICS` of each dimension of (S, D) recorded steps, accumulated in float64: (D,) float32 each."""
    parts = []
    for exact in slabs(values):
        quantiles = np.quantile(exact, [0.01, 0.99], axis=0)
        parts.append((exact.mean(0), exact.std(0), exact.min(0), exact.max(0), *quantiles))
    found = map(np.concatenate, zip(*parts, strict=True))
    return {name: torch.from_numpy(x.astype(np.float32)) for name, x in zip(STATISTICS, found, strict=True)}


def moves_enough(statistics: dict[str, Tensor]) -> Tensor:
    """Whether a dimension moves in so many steps that its quantiles say how far, (D,) bool."""
    apart = statistics["q99"] - statistics["q01"]
    if "spread" not in statistics:  # of an earlier version
        return apart > 1e-3 * (statistics["max"] - statistics["min"])
    return apart > 1e-2 * statistics["spread"]


def scale_offset(statistics: dict[str, Tensor], mode: Normalization) -> tuple[Tensor, Tensor]:
    """Scale and offset with normalized = (x - offset) / scale, each (D,).

    "mean-std": zero mean, unit variance. "min-max": the recorded range becomes [-1, 1]. "quantile": the
    range from the 1st to the 99th percentile becomes [-1, 1], outliers lie outside.

    A dimension whose spread is only rounding would explode when divided by it. It gets scale 1 instead: its
    recorded values normalize to 0, and the inverse returns the constant. A dimension that moves in less than
    1 % of the steps (a gripper that closes once) has equal quantiles, but is not constant: it falls back to
    its whole range. No scale is below the `floor`, see `Normalizer.fit`.
    """
    low, high = statistics["min"], statistics["max"]
    constant = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs()).clamp(min=1e-6)
    if mode == "mean-std":
        scale, offset = statistics["std"], statistics["mean"]
    else:
        if mode == "quantile":
            moves = moves_enough(statistics)
            low = torch.where(moves, statistics["q01"], low)
            high = torch.where(moves, statistics["q99"], high)
        scale, offset = (high - low) / 2, (high + low) / 2
    if "floor" in statistics:
        scale = torch.maximum(scale, statistics["floor"])
    return torch.where(constant, 1.0, scale), offset


def masked_dimensions(names: Sequence[str], mask: Sequence[str]) -> list[int]:
    """Action dimensions whose names contain a part of `--relative-mask`; a UserError if a part is in none."""
    for part in mask:
        if part != GRIPPER and not any(part.lower() in name.lower() for name in names):
            raise UserError(
                f"--relative-mask {part}: no action dimension has this in its name ({', '.join(names)})."
            )
    return [i for i, name in enumerate(names) if any(part.lower() in name.lower() for part in mask)]


def shared_poses(store: EpisodeStore, pairs: np.ndarray) -> list[tuple[int, int]]:
    """Where poses begin in action and state: position, then the first two columns of the rotation's matrix.

    Args:
        pairs: see `shared_dimensions`.

    Raises:
        UserError: if the action has no rotation or one without a position, or the state lacks the same pose.
    """
    found = []
    for start in store.action_rotations.encoded_starts():
        pose = np.arange(start - 3, start + TARGET_DIM)
        name = store.action_names[start].partition(":")[0]
        if start < 3 or any(":r" in store.action_names[i] for i in pose[:3]):
            raise UserError(
                f"--relative-poses: {name} has no position in the three dimensions before it: order them "
                f"with --action-keys."
            )
        if pairs[start - 3] < 0 or (pairs[pose] != pairs[start - 3] + np.arange(len(pose))).any():
            raise UserError(
                f"--relative-poses: the pose of {name} is not in the state, in the same order: choose it "
                f"with --state-keys."
            )
        found.append((int(pose[0]), int(pairs[pose[0]])))
    if not found:
        raise UserError("--relative-poses: --rotation finds no rotation in the action: name it there.")
    return found


def in_frame(poses: Tensor, frame: Tensor, invert: bool = False) -> Tensor:
    """Poses (B, T, 9) as seen from a frame (B, 9), itself a pose: T_frame^-1 T; inverted, T_frame T.

    A pose is a position and the first two columns of a rotation matrix, so the matrix product reduces to
    rotating three vectors. They need not be unit vectors, since a network predicts them. Products are written
    out, since those of matrices have half or TF32 precision in mixed precision and on GPUs.
    """
    position, first, second = frame.unflatten(-1, (3, 3)).unbind(-2)
    columns = torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)  # (B, 3, 3)
    vectors = poses.unflatten(-1, (3, 3))  # rows
    origin = torch.zeros_like(vectors)
    origin[..., 0, :] = position.unsqueeze(1)
    if invert:
        return (rotated(vectors, columns.mT) + origin).flatten(-2)
    return rotated(vectors - origin, columns).flatten(-2)


def rotated(vectors: Tensor, columns: Tensor) -> Tensor:
    """Rows (B, T, 3, 3) times matrices (B, 3, 3)."""
    return (vectors.unsqueeze(-1) * columns[:, None, None]).sum(dim=-2)


def shared_dimensions(state_names: Sequence[str], action_names: Sequence[str]) -> np.ndarray:
    """For each action dimension, the state dimension that is the same quantity, or -1: (A,) int64.

    Dimensions match by name or, if no name agrees, by order if there are as many of both.
    """
    places = {name: i for i, name in enumerate(state_names)}
    if places.keys() & set(action_names):
        return np.array([places.get(name, -1) for name in action_names])
    if len(state_names) == len(action_names):
        return np.arange(len(action_names))
    return np.full(len(action_names), -1)


def in_blocks(rows: np.ndarray) -> list[np.ndarray]:
    """Steps, a few thousand at a time: all their chunks at once can be many gigabytes."""
    return np.array_split(rows, max(len(rows) // 4096, 1))


def relative_chunks(dataset: ChunkDataset, dim: int, of: int) -> np.ndarray:
    """All real actions of chunks in a dimension, minus the state at which the chunk begins: (S,) float32.

    `of` is the dimension of the state.
    """
    parts = []
    for rows in in_blocks(dataset.rows):
        chunks, is_pad = dataset.chunks(rows, dim)
        parts.append((chunks - dataset.store.state[rows, of][:, None])[~is_pad])
    return np.concatenate(parts)


def relative_pose_chunks(dataset: ChunkDataset, start: int, of: int) -> np.ndarray:
    """All real poses of chunks, as seen from the states at which the chunks begin: (S, 9) float32.

    `start` and `of` are where the pose begins in action and state.
    """
    parts = []
    for rows in in_blocks(dataset.rows):
        chunks, is_pad = dataset.chunks(rows)
        frame = torch.from_numpy(dataset.store.state[rows, of : of + POSE])
        poses = in_frame(torch.from_numpy(chunks[..., start : start + POSE]), frame)
        parts.append(poses.numpy()[~is_pad])
    return np.concatenate(parts)


def _relative(
    dataset: ChunkDataset,
    action: dict[str, Tensor],
    spread: np.ndarray,
    varies: np.ndarray,
    mask: Sequence[str],
    relative_poses: bool,
    say: Callable[[str], None],
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Replace statistics, spreads and variation (A,) of the action by its differences', where it is relative.

    Returns:
        (A,), the state dimension that each action dimension is relative to, or -1; and the relative poses.
    """
    store = dataset.store
    pairs = shared_dimensions(store.state_names, store.action_names)
    if (pairs < 0).all():
        raise UserError(
            f"--relative-actions: no dimension of the action ({', '.join(store.action_names)}) is one of the "
            f"state ({', '.join(store.state_names)}): choose others with --state-keys or --action-keys."
        )
    masked = masked_dimensions(store.action_names, mask)
    absolute = [i for i in masked if pairs[i] >= 0]
    lacking = [i for i in np.flatnonzero(pairs < 0) if i not in masked]
    pairs[absolute] = -1
    if (pairs < 0).all() and not relative_poses:
        raise UserError(
            f"--relative-actions has no effect: of the action ({', '.join(store.action_names)}), the state "
            f"({', '.join(store.state_names)}) has only what --relative-mask keeps absolute: choose others "
            f"with --state-keys or --action-keys."
        )
    for kept, why in ((absolute, "--relative-mask"), (lacking, "the state has none of these names")):
        if kept:
            names = ", ".join(store.action_names[i] for i in kept)
            say(f"--relative-actions: {names} stay absolute ({why})")
    if twice := differences_already(store, pairs):
        say(
            f"warning: the action seems to hold differences already, in "
            f"{', '.join(store.action_names[i] for i in twice)}: --relative-actions would take the "
            f"difference twice; leave the flag out"
        )
    poses = shared_poses(store, pairs) if relative_poses else []
    for start, of in poses:
        pairs[start : start + POSE] = -1
        names = store.action_names[start : start + POSE]
        say(f"--relative-poses: {', '.join(names[:3])} and {names[3].partition(':')[0]} are one pose")
        found = relative_pose_chunks(dataset, start, of)
        for i, values in enumerate(found.T[:, :, None]):
            for name, value in fit_statistics(values).items():
                action[name][start + i] = value[0]
            spread[start + i], varies[start + i] = _extent(values)
    for dim in np.flatnonzero(pairs >= 0):
        differences = relative_chunks(dataset, dim, pairs[dim])
        for name, value in fit_statistics(differences[:, None]).items():
            action[name][dim] = value[0]
        spread[dim], varies[dim] = _extent(differences[:, None])
    return torch.from_numpy(pairs), poses


def _extent(values: np.ndarray) -> tuple[float, bool]:
    """Standard deviation of (S, 1) steps, and whether they vary, extremes apart."""
    exact = without_extremes(values)
    return exact.std(), exact.max() > exact.min()


class Normalizer(nn.Module):
    """Normalizes proprioception and actions, and unnormalizes actions; always in float32.

    Args:
        state, action: statistics from `fit_statistics`, and the `floor`, (D,), of the scale.
        action_range: (2, A), lowest and highest recorded action.
        relative_to: normalize the difference from the present state, in `shared_dimensions`; None leaves
            actions as recorded.
        poses: where poses begin, in action and state, that are normalized in the frame of the present pose.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        action: dict[str, Tensor],
        action_range: Tensor,
        mode: Normalization = "mean-std",
        relative_to: Tensor | None = None,
        poses: Sequence[tuple[int, int]] = (),
    ):
        super().__init__()
        self.statistics = {"state": state, "action": action}
        for name, statistics in self.statistics.items():
            scale, offset = scale_offset(statistics, mode)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_offset", offset)
        self.register_buffer("action_range", action_range)
        self.register_buffer("relative_to", relative_to)
        self.poses = tuple(poses)

    @classmethod
    def fit(
        cls,
        dataset: ChunkDataset,
        mode: Normalization = "mean-std",
        relative: bool = False,
        idle_floor: float = 0.1,
        mask: Sequence[str] = (),
        relative_poses: bool = False,
        say: Callable[[str], None] = say,
    ) -> Self:
        """Fit on the steps of a dataset, each counted once whatever the datasets' weights.

        Normalizing a dimension that shows only sensor noise would magnify the noise: an idle joint with a
        jitter of 1e-5 that is 0.01 off on the robot would be 1000 deviations away. The scale of such a
        dimension is at least `idle_floor` times the usual spread of the others; see `idle_dimensions`. Says
        which these are, what makes statistics useless, and what stays absolute.

        Args:
            relative, mask, relative_poses: see `DataConfig`.
            say: called with each line.

        Raises:
            UserError: if the action never changes, so that there is nothing to learn; if `relative` and no
                action is.
        """
        store, rows = dataset.store, dataset.rows
        episodes, statistics, motion = store.episode_of(rows), {}, {}
        for part, steps in (("state", rows), ("action", rows + dataset.action_offset)):
            values = getattr(store, part)[steps]
            statistics[part], motion[part] = fit_statistics(values), Motion.of(values, episodes)
        spread = {part: found.spread.copy() for part, found in motion.items()}
        action, pairs, poses = statistics["action"], None, []
        if torch.equal(action["min"], action["max"]):
            raise UserError(f"The action of {store.source} never changes: choose another with --action-keys.")
        action_range = torch.stack([action["min"], action["max"]])
        if relative:  # a constant command is idle if the state jitters: the difference is nothing but noise
            extents = spread["action"], motion["action"].varies
            pairs, poses = _relative(dataset, action, *extents, mask, relative_poses, say)
        for line in cautions(store, dataset.action_offset, relative):
            say(line)
        same = shared_dimensions(store.state_names, store.action_names)
        if dataset.hold and (moving := differences_already(store, same)):
            say(
                f"warning: the action seems to hold differences, in "
                f"{', '.join(store.action_names[i] for i in moving)}: with --hold a robot would go on moving "
                f"where an episode ends; leave the flag out"
            )
        for part, names in (("state", store.state_names), ("action", store.action_names)):
            idle = motion[part].idle
            floor = idle_floor * usual_spread(spread[part])
            statistics[part]["floor"] = torch.where(torch.from_numpy(idle), floor, 0.0)
            statistics[part]["spread"] = torch.from_numpy(spread[part].astype(np.float32))
            if (noise := idle & (spread[part] < floor)).any():
                found = ", ".join(names[i] for i in np.flatnonzero(noise))
                say(f"{part}: nothing but noise in {found}; scaled by at least {floor:.2g} (--idle-floor)")
            std = statistics[part]["std"].numpy()
            far = (std > 5 * spread[part]) & (spread[part] > 0)
            if mode == "quantile":
                far &= ~moves_enough(statistics[part]).numpy()
            if far.any():
                found = ", ".join(names[i] for i in np.flatnonzero(far))
                way = "leave their episodes out" + ", or give --normalization quantile" * (mode != "quantile")
                say(f"{part}: a few extreme steps set the scale of {found}: {way}")
        return cls(*statistics.values(), action_range, mode, pairs, poses)

    @classmethod
    def fit_once(
        cls, dataset: ChunkDataset, mode: Normalization, relative: bool = False, *options: Any
    ) -> Self:
        """`fit`, once for all runs and processes that need the same: the result is kept in the store."""
        store = dataset.store
        of_store = store.fingerprint, store.arrays_checksums, store.state_names, store.action_names
        rotations = repr((store.state_rotations, store.action_rotations))
        horizon = dataset.horizon if relative else None
        samples = dataset.episodes.tolist(), dataset.action_offset, dataset.hold, horizon
        code = [checksum(Path(__file__).parent / name) for name in FORMULAS]
        versions = np.__version__, torch.__version__
        key = [*of_store, rotations, *samples, mode, relative, *options, code, versions]

        def compute() -> list:
            lines: list[str] = []
            fitted = cls.fit(dataset, mode, relative, *options, say=lines.append)
            return [lines, {name: tensor.tolist() for name, tensor in fitted.tensors().items()}]

        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        lines, tensors = computed_once(store.path / f"statistics-{name}.json", key, compute)
        for line in lines:
            say(line)
        return cls.of_tensors({name: torch.tensor(values) for name, values in tensors.items()}, mode)

    def proprio(self, proprio: Tensor) -> Tensor:
        """(..., P) in recorded units -> unitless float32."""
        return (proprio.float() - self.state_offset) / self.state_scale

    def actions(self, actions: Tensor, proprio: Tensor) -> Tensor:
        """(B, T, A), and (B, K, P) with the present state last, in recorded units -> unitless float32."""
        actions = self._in_frames(actions.float() - self._base(proprio), proprio)
        return (actions - self.action_offset) / self.action_scale

    def unnormalize_actions(self, actions: Tensor, proprio: Tensor) -> Tensor:
        """The inverse of `actions`."""
        actions = actions.float() * self.action_scale + self.action_offset + self._base(proprio)
        return self._in_frames(actions, proprio, invert=True)

    def _in_frames(self, actions: Tensor, proprio: Tensor, invert: bool = False) -> Tensor:
        """Actions (B, T, A) with poses as seen from the present ones, or back; see `in_frame`."""
        for start, of in self.poses:
            frame = proprio[:, -1, of : of + POSE].float()
            posed = in_frame(actions[..., start : start + POSE], frame, invert)
            actions = torch.cat([actions[..., :start], posed, actions[..., start + POSE :]], dim=-1)
        return actions

    def _base(self, proprio: Tensor) -> Tensor | float:
        """What actions are relative to, (B, 1, A)."""
        if self.relative_to is None:
            return 0.0
        base = proprio[:, -1:].float().index_select(-1, self.relative_to.clamp(min=0))
        return base * (self.relative_to >= 0)

    def tensors(self) -> dict[str, Tensor]:
        """The statistics by name: `state.mean`, `action.q99`, ...; `of_tensors` is the inverse."""
        tensors = {f"{name}.{key}": x for name, part in self.statistics.items() for key, x in part.items()}
        tensors["action_range"] = self.action_range
        if self.relative_to is not None:
            tensors["relative_to"] = self.relative_to
        if self.poses:
            tensors["poses"] = torch.tensor(self.poses)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], mode: Normalization) -> Self:
        """The inverse of `tensors`; a KeyError if one is missing."""
        parts = [{key: tensors[f"{n}.{key}"] for key in STATISTICS} for n in ("state", "action")]
        for name, part in zip(("state", "action"), parts, strict=True):
            part["floor"] = tensors.get(f"{name}.floor", torch.zeros_like(part["std"]))
            if f"{name}.spread" in tensors:
                part["spread"] = tensors[f"{name}.spread"]
        poses = tensors["poses"].tolist() if "poses" in tensors else ()
        relative_to, poses = tensors.get("relative_to"), [tuple(pose) for pose in poses]
        return cls(*parts, tensors["action_range"], mode, relative_to, poses)

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors."""
        save_file(self.tensors(), path)

    @classmethod
    def load(cls, path: Path, mode: Normalization) -> Self:
        """Read what `save` wrote; a UserError names a file that is missing or holds no statistics."""
        try:
            return cls.of_tensors(load_file(path), mode)
        except Exception as error:
            raise UserError(
                f"{path} holds no normalization statistics ({error}): use another checkpoint."
            ) from None
