"""Statistics of state and action: fit on training episodes, apply, invert, save.

Quantiles are computed here, from the data: those stored in a LeRobot dataset are averages of per-episode
quantiles, which are not the quantiles of the whole.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.console import say
from common.data import ChunkDataset
from common.data.motion import cautions, idle_dimensions, usual_spread, without_extremes
from common.errors import UserError

Normalization = Literal["mean-std", "min-max", "quantile"]
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


def fit_statistics(values: np.ndarray) -> dict[str, Tensor]:
    """`STATISTICS` of each dimension of (S, D) recorded steps, accumulated in float64: (D,) float32 each."""
    exact = values.astype(np.float64)
    quantiles = np.quantile(exact, [0.01, 0.99], axis=0)
    found = exact.mean(0), exact.std(0), exact.min(0), exact.max(0), *quantiles
    return {name: torch.from_numpy(x.astype(np.float32)) for name, x in zip(STATISTICS, found, strict=True)}


def scale_offset(statistics: dict[str, Tensor], mode: Normalization) -> tuple[Tensor, Tensor]:
    """Scale and offset with normalized = (x - offset) / scale, each (D,).

    "mean-std": zero mean, unit variance. "min-max": the recorded range becomes [-1, 1]. "quantile": the
    range from the 1st to the 99th percentile becomes [-1, 1], outliers lie outside.

    A dimension whose spread is nothing but rounding would explode when divided by it. Such a dimension gets
    scale 1: it normalizes to 0 where it was recorded, and the inverse gives back its constant. A dimension
    that moves in less than 1 % of the steps (a gripper that closes once) has equal quantiles, but is not
    constant: it falls back to its whole range. No scale is below the `floor`, see `Normalizer.fit`.
    """
    low, high = statistics["min"], statistics["max"]
    constant = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs()).clamp(min=1e-6)
    if mode == "mean-std":
        scale, offset = statistics["std"], statistics["mean"]
    else:
        if mode == "quantile":
            moves = statistics["q99"] - statistics["q01"] > 1e-3 * (high - low)
            low = torch.where(moves, statistics["q01"], low)
            high = torch.where(moves, statistics["q99"], high)
        scale, offset = (high - low) / 2, (high + low) / 2
    if "floor" in statistics:
        scale = torch.maximum(scale, statistics["floor"])
    return torch.where(constant, 1.0, scale), offset


def shared_dimensions(state_names: Sequence[str], action_names: Sequence[str]) -> np.ndarray:
    """For each action dimension the state dimension that is the same thing, or -1: (A,) int64.

    They are the same where they have the same name, or, if no name agrees, where there are as many of both;
    it is a UserError if neither holds.
    """
    places = {name: i for i, name in enumerate(state_names)}
    if places.keys() & set(action_names):
        return np.array([places.get(name, -1) for name in action_names])
    if len(state_names) == len(action_names):
        return np.arange(len(action_names))
    raise UserError(
        f"--relative-actions: no dimension of the action ({', '.join(action_names)}) is one of the state "
        f"({', '.join(state_names)}): choose others with --state-keys or --action-keys."
    )


class Normalizer(nn.Module):
    """Normalizes proprioception and actions, and inverts it for actions; always in float32.

    Args:
        state, action: statistics from `fit_statistics`, and the `floor`, (D,), of the scale.
        action_range: (2, A), lowest and highest recorded action.
        relative_to: normalize the difference from the present state, in `shared_dimensions`; None leaves
            actions as recorded.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        action: dict[str, Tensor],
        action_range: Tensor,
        mode: Normalization = "mean-std",
        relative_to: Tensor | None = None,
    ):
        super().__init__()
        self.statistics = {"state": state, "action": action}
        for name, statistics in self.statistics.items():
            scale, offset = scale_offset(statistics, mode)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_offset", offset)
        self.register_buffer("action_range", action_range)
        self.register_buffer("relative_to", relative_to)

    @classmethod
    def fit(
        cls,
        dataset: ChunkDataset,
        mode: Normalization = "mean-std",
        relative: bool = False,
        idle_floor: float = 0.1,
    ) -> Self:
        """Fit on the steps of a dataset, each counted once whatever the datasets' weights.

        A dimension that shows nothing but sensor noise would magnify it: an idle joint with a jitter of 1e-5
        that is 0.01 off on the robot would be 1000 deviations away. Its scale is at least `idle_floor` times
        the spread that is usual for the others, and a line says so; see `idle_dimensions`. Lines say, too,
        what makes statistics useless.

        Raises:
            UserError: if the action never changes, so that there is nothing to learn.
        """
        store, rows = dataset.store, dataset.rows
        recorded = {"state": store.state[rows], "action": store.action[rows + dataset.action_offset]}
        if (recorded["action"] == recorded["action"][:1]).all():
            raise UserError(f"The action of {store.source} never changes: choose another with --action-keys.")
        statistics = {part: fit_statistics(values) for part, values in recorded.items()}
        spread = {part: without_extremes(values).std(0) for part, values in recorded.items()}
        action, pairs = statistics["action"], None
        action_range = torch.stack([action["min"], action["max"]])
        if relative:
            pairs = shared_dimensions(store.state_names, store.action_names)
            for dim in np.flatnonzero(pairs >= 0):
                # One dimension after the other: all chunks at once can be many gigabytes.
                chunks, is_pad = dataset.chunks(rows, dim)
                differences = (chunks - store.state[rows, pairs[dim]][:, None])[~is_pad]
                for name, value in fit_statistics(differences[:, None]).items():
                    action[name][dim] = value[0]
                spread["action"][dim] = without_extremes(differences[:, None]).std()
            pairs = torch.from_numpy(pairs)
        for line in cautions(store, dataset.action_offset, relative):
            say(line)
        episodes = store.episode_of(rows)
        for part, names in (("state", store.state_names), ("action", store.action_names)):
            idle = idle_dimensions(recorded[part], episodes)
            floor = idle_floor * usual_spread(spread[part])
            statistics[part]["floor"] = torch.where(torch.from_numpy(idle), floor, 0.0)
            if floor and idle.any():
                found = ", ".join(names[i] for i in np.flatnonzero(idle))
                say(f"{part}: nothing but noise in {found}; scaled by at least {floor:.2g} (--idle-floor)")
            std = statistics[part]["std"].numpy()
            if mode != "quantile" and (far := (std > 5 * spread[part]) & (spread[part] > 0)).any():
                found = ", ".join(names[i] for i in np.flatnonzero(far))
                way = "leave their episodes out, or give --normalization quantile"
                say(f"{part}: a few extreme steps set the scale of {found}: {way}")
        return cls(*statistics.values(), action_range, mode, pairs)

    def proprio(self, proprio: Tensor) -> Tensor:
        """(..., P) in recorded units -> unitless float32."""
        return (proprio.float() - self.state_offset) / self.state_scale

    def actions(self, actions: Tensor, proprio: Tensor) -> Tensor:
        """(B, T, A), and (B, K, P) with the present state last, in recorded units -> unitless float32."""
        return (actions.float() - self._base(proprio) - self.action_offset) / self.action_scale

    def unnormalize_actions(self, actions: Tensor, proprio: Tensor) -> Tensor:
        """The inverse of `actions`."""
        return actions.float() * self.action_scale + self.action_offset + self._base(proprio)

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
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], mode: Normalization) -> Self:
        """A KeyError if one is missing."""
        parts = [{key: tensors[f"{n}.{key}"] for key in STATISTICS} for n in ("state", "action")]
        for name, part in zip(("state", "action"), parts, strict=True):
            part["floor"] = tensors.get(f"{name}.floor", torch.zeros_like(part["std"]))
        return cls(*parts, tensors["action_range"], mode, tensors.get("relative_to"))

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
