"""Flow matching: times t from 0 (noise x_0) to 1 (data x_1), the path between, guidance, integration.

A chunk can begin with a *prefix*: actions that are given, because the robot executes them while the others
are computed (training-time real-time chunking, Black et al. 2025, arXiv 2512.05964). Each action then has its
own flow time, (B, T): 1 if it is given, and the sample's t if it is to be predicted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, Literal, NamedTuple

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from common.config import Share, options
from common.console import say

TimeDistribution = Literal["beta", "uniform", "logit-normal"]
Integrator = Literal["euler", "midpoint", "heun"]
Generators = torch.Generator | Sequence[torch.Generator] | None
"""Source of noise: one for a whole batch, or one for each of its samples."""


OTHER_SEED = 0x9E3779B97F4A7C15  # turns a seed into that of independent noise


@options
class DelayConfig:
    """Chunks that continue what the robot does while they are computed."""

    max_delay: NonNegativeInt = 0
    """Most control steps that a robot may take between an observation and its chunk: the actions of these
    steps are given, and the chunk continues them. Training draws 0 to this many; 0 turns this off."""
    prefix_share: Share = 0.25
    """Share of the training draws that have such a prefix; the others have none, because a network that
    mostly learns to continue a motion is slow to learn to look at the images."""


def noise(shape: Sequence[int], device: torch.device | str, generator: Generators = None) -> Tensor:
    """Standard normal noise; with a generator for each sample, independent of what else is in the batch."""
    if not isinstance(generator, Sequence):
        return torch.randn(*shape, device=device, generator=generator)
    return torch.stack([torch.randn(*shape[1:], device=device, generator=one) for one in generator])


def episode_noise(shape: Sequence[int], device: torch.device | str, generator: Generators = None) -> Tensor:
    """Noise that stays the same as long as the generators are not seeded again, that is, in an episode.

    For latents, which name a way to do the task: a robot that is on one must not draw another in its next
    chunk. `noise` with the generators is independent of it.
    """
    if isinstance(generator, Sequence):
        return torch.cat([episode_noise((1, *shape[1:]), device, one) for one in generator])
    if generator is None:
        return torch.randn(*shape, device=device)
    own = torch.Generator(generator.device).manual_seed(generator.initial_seed() ^ OTHER_SEED)
    return torch.randn(*shape, device=device, generator=own)


def sample_time(
    num: int,
    device: torch.device | str,
    distribution: TimeDistribution = "beta",
    beta: tuple[float, float] = (1.0, 1.5),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw flow times, (num,) float32 in [0, 1].

    The default Beta(1.0, 1.5) favours the noisy end, where the velocity field decides which mode a sample
    goes to (as in pi0, Black et al. 2024, whose code runs time the other way). "logit-normal" is the
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
    # torch draws Beta from Dirichlet; only the private function takes a generator.
    return torch._sample_dirichlet(concentration, generator=generator)[:, 0]


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point and target velocity on the straight path from noise to data.

    x_t = (1 - t) x_0 + t x_1, velocity = x_1 - x_0 (Lipman et al. 2023, the conditional optimal-transport
    path with sigma_min = 0; Liu et al. 2023).

    Args:
        x_0, x_1: standard normal noise and normalized actions, (B, T, A).
        t: (B,), or one for each action, (B, T), in [0, 1].
    """
    if t.shape not in (x_1.shape[:1], x_1.shape[:2]):
        raise ValueError(
            f"t must be one value per sample, {tuple(x_1.shape[:1])}, or per action, got {tuple(t.shape)}"
        )
    t = t.view(*t.shape, *[1] * (x_1.ndim - t.ndim))
    return (1 - t) * x_0 + t * x_1, x_1 - x_0


def random_prefix(t: Tensor, horizon: int, config: DelayConfig) -> Tensor:
    """Flow times (B, T) of chunks whose first 0 to `max_delay` actions are given, each number equally likely.

    Some of the chunks have no prefix, unlike in the paper, which starts from trained policies: see
    `docs/chunks.md`. Without `max_delay`, nothing is drawn and t (B,) is returned as it is.
    """
    if config.max_delay == 0:
        return t
    delay = torch.randint(config.max_delay + 1, (len(t), 1), device=t.device)
    delay = delay * (torch.rand(len(t), 1, device=t.device) < config.prefix_share)
    return torch.where(torch.arange(horizon, device=t.device) < delay, 1.0, t.unsqueeze(1))


def to_predict(t: Tensor) -> Tensor:
    """Which actions are not given: bool (B, T) from flow times (B, T); from (B,), (B, 1), all True.

    Only these have a loss: the velocity of a given action means nothing.
    """
    return t < 1 if t.ndim == 2 else torch.ones_like(t, dtype=torch.bool).unsqueeze(1)


def share_to_predict(horizon: int, config: DelayConfig) -> Tensor:
    """How often `random_prefix` leaves each action of a chunk to be predicted, (T,) float32, in (0, 1]."""
    given = (1 - torch.arange(1, horizon + 1) / (config.max_delay + 1)).clamp(min=0)
    return 1 - config.prefix_share * given


def levels(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct flow times of each sample, for a network that embeds them.

    From t (B,): t itself and None. From t (B, T): (B, 2), the time of the actions to predict, then 1; and
    which actions are given, (B, T) bool.
    """
    if t.ndim == 1:
        return t, None
    return torch.stack([t.amin(dim=1), torch.ones_like(t[:, 0])], dim=1), ~to_predict(t)


class Prefix(NamedTuple):
    """Actions that are given to B chunks, as many as each needs."""

    actions: Tensor
    """(B, T, A), normalized; arbitrary where not given."""
    given: Tensor
    """(B, T) bool."""

    def of(self, rows: Tensor) -> "Prefix":
        """The prefix of some of the chunks."""
        return Prefix(self.actions[rows], self.given[rows])


def prefix_in_training(actions: Tensor, t: Tensor) -> Prefix | None:
    """The prefix of one of each chunk's draws, the last: of chunks (B, T, A) and flow times (B * M, T).

    None if no draw has one: t is (B * M,).
    """
    return None if t.ndim == 1 else Prefix(actions, ~to_predict(t).unflatten(0, (len(actions), -1))[:, -1])


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): v_null + w (v_z - v_null); w = 1 changes nothing."""
    return unconditional + scale * (conditional - unconditional)


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    steps: int,
    method: Integrator = "euler",
    prefix: Prefix | None = None,
) -> Tensor:
    """Carry noise (B, ...) to data: solve dx/dt = velocity(x, t), t (B,), from 0 to 1 in equal steps.

    Euler evaluates the velocity once a step (error O(h)); midpoint and Heun twice (O(h^2)). The actions of a
    prefix stay as they are, to the bit; `velocity` is then called with a time for each action, (B, T).
    """
    if steps < 1:
        raise ValueError(f"integration needs at least 1 step, got {steps}")
    run = _compiled.get() or _integrate
    return run(velocity, x_0, steps, method, prefix)


@contextmanager
def compiled(function: Callable[..., Tensor] | None) -> Iterator[None]:
    """In this block, `integrate` runs `function`, made by `compile_integration`; None: runs uncompiled."""
    token = _compiled.set(function)
    try:
        yield
    finally:
        _compiled.reset(token)


def is_compiled() -> bool:
    """Whether `integrate` runs what `compile_integration` made."""
    return _compiled.get() is not None


def let_thread_capture() -> None:
    """Let this thread capture compiled code: PyTorch 2.11 prepares only the one that imports its compiler.

    What it captures stays until the process ends: PyTorch crashes if a thread takes its graphs with it.
    """
    from torch._inductor import cudagraph_trees

    _captured.append({})
    cudagraph_trees.local.tree_manager_containers = _captured[-1]
    cudagraph_trees.local.tree_manager_locks = defaultdict(Lock)


def compile_integration(device: torch.device) -> Callable[..., Tensor]:
    """`integrate` with all of its steps as one graph, which CUDA captures and replays.

    Another number of steps or another shape compiles again. If that fails, for example after too many shapes,
    it says so and runs uncompiled from then on. A captured graph belongs to the thread that runs it first.
    """
    mode = "reduce-overhead" if device.type == "cuda" else None
    run = torch.compile(_integrate, dynamic=False, fullgraph=True, mode=mode)

    def compiled_or_not(*arguments: Any) -> Tensor:
        nonlocal run
        try:
            return run(*arguments).clone()  # the next replay writes to the same memory
        except Exception as error:  # compilers fail in many ways
            x = _integrate(*arguments)
            say(f"warning: actions are sampled without a compiled graph ({type(error).__name__})")
            run = _integrate
            return x

    return compiled_or_not


_captured: list[dict] = []  # of all threads, by device
_compiled: ContextVar[Callable[..., Tensor] | None] = ContextVar("compiled", default=None)


def _integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    steps: int,
    method: Integrator,
    prefix: Prefix | None,
) -> Tensor:
    if prefix is not None:
        given, free = prefix.given, velocity
        x_0 = torch.where(given.unsqueeze(-1), prefix.actions, x_0)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return free(x, torch.where(given, 1.0, t.unsqueeze(1))).masked_fill(given.unsqueeze(-1), 0.0)

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
    """Give each observation one more draw, before its M others: the first one's noise, at t = 0.

    This noise plus the velocity there is the chunk that a single integration step makes; it has no prefix,
    even if the other draws do. Takes noise and points (B * M, T, A) and times (B * M,); returns the noise of
    the new draws (B, T, A), and points (B * (1 + M), T, A) and times (B * (1 + M),) of all. Times of each
    action, (B * M, T), become (B * (1 + M), T).
    """
    start = x_0.unflatten(0, (-1, flow_samples))[:, :1]
    x_t = torch.cat([start, x_t.unflatten(0, (-1, flow_samples))], dim=1).flatten(0, 1)
    t = t.unflatten(0, (-1, flow_samples))
    t = torch.cat([torch.zeros_like(t[:, :1]), t], dim=1).flatten(0, 1)
    return start[:, 0], x_t, t
