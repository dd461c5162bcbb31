"""Losses over action chunks. Padded steps never count, and a mean divides by the number of real elements."""

import torch
from torch import Tensor


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean squared error over real steps, in float32.

    Args:
        pred, target: (B, T, A). Where the mask is False they may be anything, even NaN: nothing of it reaches
            the loss or a gradient.
        mask: (B, T), True for real steps.
        count: number of real steps to divide by, instead of those in `mask`. With several processes, pass
            the mean count over processes: the average of the gradients is then the gradient of the mean
            over all processes' real elements, whatever share of padding each has.

    Returns:
        Scalar; 0 (not NaN) if no step is real.
    """
    return _mean(_real_difference(pred, target, mask).square(), mask, count)


def masked_l1(pred: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean absolute error over real steps; arguments as for `masked_mse`."""
    return _mean(_real_difference(pred, target, mask).abs(), mask, count)


def _real_difference(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    # Padding is cut out before it is squared: the derivative of NaN^2 would be NaN even times zero.
    return torch.where(mask.unsqueeze(-1), pred.float() - target.float(), 0.0)


def _mean(values: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    count = mask.sum() if count is None else count
    return values.sum() / (count * values.shape[-1]).clamp(min=1)
