"""Statistics of state and action: fit on training episodes, apply, invert, save.

Quantiles are computed here, from the data: those stored in a LeRobot dataset are averages of per-episode
quantiles, which are not the quantiles of the whole.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError

Normalization = Literal["mean-std", "min-max", "quantile"]


def fit_statistics(values: np.ndarray) -> dict[str, Tensor]:
    """Exact statistics of each dimension, accumulated in float64.

    Args:
        values: (S, D), every recorded step of the training episodes.

    Returns:
        mean, std, min, max, q01, q99: each (D,) float32.
    """
    exact = values.astype(np.float64)
    q01, q99 = np.quantile(exact, [0.01, 0.99], axis=0)
    statistics = {
        "mean": exact.mean(0),
        "std": exact.std(0),
        "min": exact.min(0),
        "max": exact.max(0),
        "q01": q01,
        "q99": q99,
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in statistics.items()}


def scale_offset(statistics: dict[str, Tensor], mode: Normalization) -> tuple[Tensor, Tensor]:
    """Scale and offset with normalized = (x - offset) / scale, each (D,).

    "mean-std": zero mean, unit variance. "min-max": the recorded range becomes [-1, 1]. "quantile": the
    range from the 1st to the 99th percentile becomes [-1, 1], outliers lie outside.

    A dimension whose spread is nothing but rounding would explode when divided by it. Such a dimension gets
    scale 1: it normalizes to 0 where it was recorded, and the inverse gives back its constant. A dimension
    that moves in less than 1 % of the steps (a gripper that closes once) has equal quantiles, but is not
    constant: it falls back to its whole range.
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
    return torch.where(constant, 1.0, scale), offset


class Normalizer(nn.Module):
    """Normalizes proprioception and actions, and inverts it for actions; always in float32.

    Args:
        state, action: statistics from `fit_statistics`.
        mode: see `scale_offset`.
    """

    def __init__(self, state: dict[str, Tensor], action: dict[str, Tensor], mode: Normalization = "mean-std"):
        super().__init__()
        self.statistics = {"state": state, "action": action}
        for name, statistics in self.statistics.items():
            scale, offset = scale_offset(statistics, mode)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_offset", offset)
        self.register_buffer("action_min", action["min"])
        self.register_buffer("action_max", action["max"])

    def proprio(self, proprio: Tensor) -> Tensor:
        """(..., P) in recorded units -> unitless float32."""
        return (proprio.float() - self.state_offset) / self.state_scale

    def actions(self, actions: Tensor) -> Tensor:
        """(..., A) in recorded units -> unitless float32."""
        return (actions.float() - self.action_offset) / self.action_scale

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """(..., A) unitless -> recorded units, float32."""
        return actions.float() * self.action_scale + self.action_offset

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors: `state.mean`, `action.q99`, ..."""
        tensors = {
            f"{name}.{key}": value.cpu().contiguous()
            for name, statistics in self.statistics.items()
            for key, value in statistics.items()
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, mode: Normalization) -> "Normalizer":
        """Read what `save` wrote.

        Raises:
            UserError: if the file is missing or holds no such statistics.
        """
        try:
            tensors = load_file(path)
            parts = [
                {key: tensors[f"{name}.{key}"] for key in ("mean", "std", "min", "max", "q01", "q99")}
                for name in ("state", "action")
            ]
        except Exception as error:
            raise UserError(
                f"{path} holds no normalization statistics ({error}): use another checkpoint."
            ) from None
        return cls(*parts, mode)
