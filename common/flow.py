"""Flow matching: times t from 0 (noise x_0) to 1 (data x_1), the path between, guidance, integration."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

TimeDistribution = Literal["beta", "uniform", "logit-normal"]
Integrator = Literal["euler", "midpoint", "heun"]
Generators = torch.Generator | Sequence[torch.Generator] | None
"""Source of noise: one for a whole batch, or one for each of its samples."""


def noise(shape: Sequence[int], device: torch.device | str, generator: Generators = None) -> Tensor:
    """Standard normal noise; with a generator for each sample, independent of what else is in the batch."""
    if not isinstance(generator, Sequence):
        return torch.randn(*shape, device=device, generator=generator)
    return torch.stack([torch.randn(*shape[1:], device=device, generator=one) for one in generator])


def sample_time(
    num: int,
    device: torch.device | str,
    distribution: TimeDistribution = "beta",
    beta: tuple[float, float] = (1.0, 1.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw flow times, (num,) float32 in [0, 1].

    The default Beta(1.0, 1.5) favours the noisy end, where the velocity field decides which mode a sample
    goes to (as pi0 does, Black et al. 2024, whose code runs time the other way). "logit-normal" is the
    sigmoid of a standard normal (Esser et al. 2024), with few draws at either end.
    """
    if distribution == "uniform":
        return torch.rand(num, device=device, generator=generator)
    if distribution == "logit-normal":
        return torch.sigmoid(torch.randn(num, device=device, generator=generator))
    a, b = beta
    if a == 1.0:  # inverse of the distribution function 1 - (1 - t)^b: one uniform draw
        return 1 - torch.rand(num, device=device, generator=generator) ** (1 / b)
    concentration = torch.stack([torch.full((num,), float(c), device=device) for c in (a, b)], dim=1)
    # Dirichlet is what torch draws Beta from; the private function is the one that takes a generator.
    return torch._sample_dirichlet(concentration, generator=generator)[:, 0]


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point and target velocity on the straight path from noise to data.

    x_t = (1 - t) x_0 + t x_1, velocity = x_1 - x_0 (Lipman et al. 2023, the conditional optimal-transport
    path with sigma_min = 0; Liu et al. 2023).

    Args:
        x_0, x_1: standard normal noise and normalized actions, (B, T, A).
        t: (B,), in [0, 1].
    """
    if t.shape != x_1.shape[:1]:
        raise ValueError(f"t must be one value per sample, {tuple(x_1.shape[:1])}, got {tuple(t.shape)}")
    t = t.view(-1, *[1] * (x_1.ndim - 1))
    return (1 - t) * x_0 + t * x_1, x_1 - x_0


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): v_null + w (v_z - v_null); w = 1 changes nothing."""
    return unconditional + scale * (conditional - unconditional)


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, steps: int, method: Integrator = "euler"
) -> Tensor:
    """Carry noise (B, ...) to data: solve dx/dt = velocity(x, t), t (B,), from 0 to 1 in equal steps.

    Euler evaluates the velocity once a step (error O(h)); midpoint and Heun twice (O(h^2)).
    """
    if steps < 1:
        raise ValueError(f"integration needs at least 1 step, got {steps}")
    x, h = x_0, 1 / steps
    for i in range(steps):
        t = torch.full((len(x),), i * h, device=x.device)
        v = velocity(x, t)
        if method == "midpoint":
            v = velocity(x + h / 2 * v, t + h / 2)
        elif method == "heun":
            v = (v + velocity(x + h * v, t + h)) / 2
        elif method != "euler":
            raise ValueError(f"unknown integrator {method!r}: choose euler, midpoint or heun")
        x = x + h * v
    return x


def prepend_start(x_0: Tensor, x_t: Tensor, t: Tensor, flow_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each observation one draw more, before its M others: the first one's noise, at t = 0.

    The velocity there, added to that noise, is the chunk that a single integration step makes. From noise and
    points (B * M, T, A) and times (B * M,) to the noise of the new draws (B, T, A), and points
    (B * (1 + M), T, A) and times (B * (1 + M),) of all.
    """
    start = x_0.unflatten(0, (-1, flow_samples))[:, :1]
    x_t = torch.cat([start, x_t.unflatten(0, (-1, flow_samples))], dim=1).flatten(0, 1)
    t = torch.nn.functional.pad(t.unflatten(0, (-1, flow_samples)), (1, 0)).flatten()
    return start[:, 0], x_t, t
