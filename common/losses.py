"""Losses over action chunks, between clouds of chunks, and of a codebook.

Padded steps never count, and a mean divides by the number of real elements.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 8
"""Sinkhorn iterations that are compiled together."""


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean squared error over real steps, in float32; 0 (not NaN) if no step is real.

    Args:
        pred, target: (B, T, A). Masked values may be anything, even NaN.
        mask: (B, T), True for real steps.
        count: number of real steps to divide by, instead of those in `mask`. With several processes or
            micro-batches, pass the mean count over them: the average of their gradients is then the gradient
            of the mean over all real elements, whatever share of padding each has.
    """
    return _mean(_real_difference(pred, target, mask).square(), mask, count)


def masked_l1(pred: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean absolute error over real steps; arguments as for `masked_mse`."""
    return _mean(_real_difference(pred, target, mask).abs(), mask, count)


def expert_mse(
    pred: Tensor, target: Tensor, mask: Tensor, gates: Tensor, count: Tensor | None = None
) -> Tensor:
    """As `masked_mse`, of E experts, `pred` (E, B, T, A), weighted by each sample's `gates` (B, E)."""
    squared = _real_difference(pred, target, mask).square()
    return _mean(squared * gates.T[:, :, None, None], mask, count)


def _real_difference(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    # Replace padding before squaring: the derivative of NaN^2 is NaN even times zero.
    return torch.where(mask.unsqueeze(-1), pred.float() - target.float(), 0.0)


def _mean(values: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    count = mask.sum() if count is None else count
    return values.sum() / (count * values.shape[-1]).clamp(min=1)


class Transport(NamedTuple):
    """A transport loss, and how much mass its plan leaves in the wrong place: both scalars."""

    divergence: Tensor
    marginal_error: Tensor


def transport_points(chunks: Tensor, states: Tensor, state_weight: float = 0.2) -> Tensor:
    """Chunks (B, T, A) and the states (B, P) they belong to, normalized, as points (B, T * A + P), float32.

    Their squared distance is C_ij = mean_d (a_i - a_j)^2 + lambda mean_d (s_i - s_j)^2; lambda, the
    `state_weight`, is the cost of matching a chunk to another state's. With means over dimensions, a blur
    has the same meaning for chunks of any size.
    """
    chunks, states = chunks.float().flatten(1), states.float()
    states = states * (state_weight / states.shape[1]) ** 0.5
    return torch.cat([chunks / chunks.shape[1] ** 0.5, states], dim=1)


def chunk_transport(pred: Tensor, chunks: Tensor, states: Tensor, is_pad: Tensor, blur: float) -> Transport:
    """Transport loss from predicted to recorded chunks (B, T, A), each a point with its state (B, P).

    Chunks that run past the end of an episode, by `is_pad` (B, T), have no mass.
    """
    x, y = transport_points(pred, states), transport_points(chunks, states)
    return sinkhorn_divergence(x, y, mass=~is_pad.any(dim=1), blur=blur)


def sinkhorn_divergence(
    x: Tensor, y: Tensor, mass: Tensor | None = None, blur: float = 0.05, iterations: int = 40
) -> Transport:
    """Debiased entropic optimal transport between two clouds of points with the same masses.

    S = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, with cost |x_i - y_j|^2 and epsilon = blur^2 (Cuturi 2013;
    Feydy et al. 2019, whose library halves the cost). Epsilon starts at the largest cost and falls to its
    value over the first half of the iterations, whose number is fixed, to avoid syncs with the device.

    The gradient is that of the optimum (envelope theorem): potentials are constants, only costs are
    differentiated, in OT(x, x) by both arguments, so that no iteration is kept in memory. It is only as
    good as the potentials: the marginal error says how much mass the plan still leaves in the wrong place.

    Args:
        x, y: (B, D); only x gets a gradient.
        mass: (B,), not negative; the same everywhere by default. Points without mass may be anything.
            Without any mass the divergence is 0.
        blur: length below which differences are blurred.

    Returns:
        The divergence, in squared units of the points, and the marginal error, in [0, 2].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.detach().to(dtype)
        mass = torch.ones(len(x), device=x.device, dtype=dtype) if mass is None else mass.to(dtype)
        total, real = mass.sum(), (mass > 0)[:, None]
        weight = torch.where(total > 0, mass / total.clamp(min=1e-30), 1 / len(x))
        log_weight = weight.log()
        x, y = torch.where(real, x, 0.0), torch.where(real, y, 0.0)  # points without mass may be anything
        with torch.no_grad():
            costs = torch.stack([_squared_distances(*pair) for pair in ((x, y), (x, x), (y, y))])
            compiled = torch.compiler.is_compiling() or _compiled_iterations.get()
            solve = _as_one_operation if compiled else _potentials
            f, g = solve(costs, log_weight, blur, iterations)
            epsilon = blur**2
            log_plan = log_weight[:, None] + log_weight + (f[0, :, None] + g[0] - costs[0]) / epsilon
            error = (log_plan.exp().sum(dim=0) - weight).abs().sum()
            f_yy = _soft_min(costs[2], g[2], log_weight, epsilon)
        f_xy = _soft_min(_squared_distances(x, y), g[0], log_weight, epsilon)
        f_xx = _soft_min(_squared_distances(x, x), g[1], log_weight, epsilon)
        # OT = sum_i w_i f_i + sum_j w_j g_j
        divergence = (weight * (f_xy + g[0] - (f_xx + g[1]) / 2 - (f_yy + g[2]) / 2)).sum()
    return Transport(torch.where(total > 0, divergence, 0.0), torch.where(total > 0, error, 0.0))


_compiled_iterations = ContextVar("compiled_iterations", default=False)


@contextmanager
def compiled_iterations() -> Iterator[None]:
    """In this block, Sinkhorn's iterations are compiled, also where the loss is not."""
    token = _compiled_iterations.set(True)
    try:
        yield
    finally:
        _compiled_iterations.reset(token)


def _potentials(
    costs: Tensor, log_weight: Tensor, blur: float, iterations: int, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Potentials f and g, (3, B) both, of the problems (x, y), (x, x) and (y, y); `costs` are (3, B, B)."""
    largest = costs.amax().clamp(min=blur**2)
    fall = torch.linspace(0, 2, iterations, device=costs.device, dtype=costs.dtype).clamp(max=1)
    f, negatives = torch.zeros_like(costs[:, 0]), -largest * (blur**2 / largest) ** fall
    run = _compiled_steps() if compiled else sinkhorn_steps
    for part in negatives.split(BLOCK):
        g_xy = run(f, costs, log_weight, part)
    return f, torch.cat([g_xy[None], f[1:]])


@torch.library.custom_op("common::sinkhorn", mutates_args=())
def _as_one_operation(
    costs: Tensor, log_weight: Tensor, blur: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """`_potentials` for a compiled loss, which would take minutes to compile with all iterations in it."""
    return _potentials(costs, log_weight, blur, iterations, compiled=True)


@_as_one_operation.register_fake
def _(costs: Tensor, log_weight: Tensor, blur: float, iterations: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(costs[:, 0]), torch.empty_like(costs[:, 0])


@cache
def _compiled_steps() -> Callable[..., Tensor]:
    return torch.compile(sinkhorn_steps, dynamic=False)


def sinkhorn_steps(f: Tensor, costs: Tensor, log_weight: Tensor, negatives: Tensor) -> Tensor:
    """A `sinkhorn_step` for each of the `negatives` (I,); returns what the last one does."""
    for negative in negatives:
        g = sinkhorn_step(f, costs, log_weight, negative)
    return g


def sinkhorn_step(f: Tensor, costs: Tensor, log_weight: Tensor, negative: Tensor) -> Tensor:
    """One iteration on the potentials f (3, B) of the problems (x, y), (x, x) and (y, y), in place.

    `costs` are (3, B, B), and `negative` is -epsilon. Symmetric problems have f = g and converge fast with
    half steps. Returns the first problem's g, (B,).
    """

    def soft_min(cost: Tensor, potential: Tensor) -> Tensor:
        # `_soft_min` to the bit, in fewer launches: here are neither derivatives nor sums without weight.
        scaled = torch.addcdiv(log_weight, cost - potential.unsqueeze(-2), negative)
        largest = scaled.amax(dim=-1, keepdim=True)
        return (scaled - largest).exp_().sum(dim=-1).log_().add_(largest.squeeze(-1)).mul_(negative)

    g = soft_min(costs.mT, f)
    f[1:].add_(g[1:]).mul_(0.5)
    f[0] = soft_min(costs[0], g[0])
    return g[0]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(I, D), (J, D) -> (I, J), from differences: matrix products in TF32 would lose small distances."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _soft_min(cost: Tensor, potential: Tensor, log_weight: Tensor, epsilon: Tensor | float) -> Tensor:
    """-epsilon log sum_j w_j exp((g_j - C_ij) / epsilon): (..., I, J), (..., J) -> (..., I)."""
    return -epsilon * torch.logsumexp(log_weight + (potential.unsqueeze(-2) - cost) / epsilon, dim=-1)


def nearest_code(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code vector: z (B, D), codes (K, D) -> (B,)."""
    return _squared_distances(z.detach().float(), codes.detach().float()).argmin(dim=1)


def noise_substitution(z: Tensor, code: Tensor, noise: Tensor) -> Tensor:
    """Vector quantization whose gradient reaches encoder and codebook (NSVQ, Vali & Backstrom 2022).

    z + |z - q| n / |n|, with q the code nearest to the encoder's output z and n standard normal, (B, D) all:
    noise of the same length replaces the quantization error, since rounding has no derivative.
    """
    # the square root's derivative is infinite at 0: an encoder that hits a code must not get NaN for it
    distance = ((z - code).square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return z + distance * noise / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def gaussian_kl(mean: Tensor, log_var: Tensor, prior_mean: Tensor, prior_log_var: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_var)) from the prior's normal, in nats, element by element."""
    difference = (mean - prior_mean).square() * (-prior_log_var).exp()
    return 0.5 * (prior_log_var - log_var + (log_var - prior_log_var).exp() + difference - 1)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of a gate's logits (B, E); keeps them small (ST-MoE, Zoph et al. 2022)."""
    return logits.float().logsumexp(dim=-1).square().mean()


def load_balance(probabilities: Tensor) -> Tensor:
    """E sum_e f_e P_e, at its minimum 1 if experts are used equally (Switch Transformers, Fedus et al. 2021).

    Of the gate's probabilities (B, E): f_e is the share of samples whose most probable expert is e, P_e the
    mean probability of e; gradients reach only P_e.
    """
    num_experts = probabilities.shape[-1]
    chosen = torch.nn.functional.one_hot(probabilities.argmax(dim=-1), num_experts).float().mean(dim=0)
    return num_experts * (chosen * probabilities.float().mean(dim=0)).sum()
