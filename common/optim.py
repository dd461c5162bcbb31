"""Optimizer groups, gradient clipping, learning-rate schedules, and the average of the weights.

A policy's *components* are its direct children (`head_backbone`, `info_embedder`, `action_decoder`, ...).
"""

import copy
import inspect
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from common.config import MayChange, Share, options
from common.errors import UserError

DEFAULT_STEPS = 20_000
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


@options
class OptimConfig:
    """Optimizer, schedule and batch."""

    lr: MayChange[NonNegativeFloat] = 1e-3
    """Peak learning rate."""
    backbone_lr: MayChange[NonNegativeFloat | None] = None
    """Peak learning rate of every component whose name ends in `backbone` (default: as --lr)."""
    component_lr: MayChange[tuple[str, ...]] = ()
    """Peak learning rate of single components, for example `action_decoder=3e-4 info_embedder=1e-4`."""
    weight_decay: MayChange[NonNegativeFloat] = 1e-4
    """Decoupled weight decay of matrices and kernels; norms, biases, embeddings and tokens have none."""
    component_weight_decay: MayChange[tuple[str, ...]] = ()
    """Weight decay of single components, for example `head_backbone=0.05`."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    schedule: MayChange[Literal["cosine", "onecycle", "constant", "schedule-free"]] = "cosine"
    """cosine: linear warmup, cosine decay. onecycle: cosine up, cosine down. schedule-free: RAdam, which
    needs neither --warmup-steps nor --ema-decay."""
    warmup_steps: MayChange[NonNegativeInt | None] = None
    """Steps of linear warmup, or of onecycle's rise (default: 5 % of the steps, for onecycle 30 %)."""
    batch_size: MayChange[PositiveInt] = 32
    """Samples per process and micro-batch; the global batch is this x processes x --grad-accumulation."""
    grad_accumulation: MayChange[PositiveInt] = 1
    """Micro-batches per optimizer step."""
    steps: MayChange[PositiveInt | None] = None
    """Optimizer steps to train for (default: 20,000, unless --epochs is given)."""
    epochs: MayChange[PositiveFloat | None] = None
    """Passes over the training episodes to train for, converted to steps at the start."""
    grad_clip: MayChange[Annotated[float, Field(gt=0, allow_inf_nan=True), BeforeValidator(float)]] = 1.0
    """Largest norm of the gradient, which is scaled down to this. inf: no clipping."""
    ema_decay: MayChange[Share] = 0.999
    """Decay of the averaged weights that are evaluated and exported; 0 exports the raw weights."""


def resolve_steps(
    config: OptimConfig, num_samples: int, global_batch: int, done_steps: int = 0, done_samples: int = 0
) -> int:
    """Optimizer steps to train for, from the beginning of the run, with `num_samples` in an epoch.

    `done_steps` and `done_samples` say where a resumed run stands; its global batch may have been another.
    """
    if config.steps is not None and config.epochs is not None:
        raise UserError("--steps and --epochs both say how long to train: give one of them.")
    if config.epochs is None:
        return config.steps or DEFAULT_STEPS
    total = done_steps + math.floor((config.epochs * num_samples - done_samples) / global_batch + 0.5)
    if total < 1:
        raise UserError(f"--epochs {config.epochs} comes to {total} optimizer steps: train for at least 1.")
    return total


class AdamW(torch.optim.AdamW):
    """PyTorch's own, whose step does not import the compiler: see `leave_compiler_out`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def leave_compiler_out() -> None:
    """Let optimizers work without PyTorch's compiler, which takes seconds to import.

    They import it only to tell it that it must not compile them, which nothing here asks for. PyTorch keeps
    what to call instead of such a method in an attribute of it.
    """
    for method in vars(torch.optim.Optimizer).values():
        if plain := getattr(method, "__wrapped__", None):
            plain.__dynamo_disable = plain


def build_optimizer(policy: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or schedule-free RAdam (Defazio et al. 2024), over `parameter_groups`."""
    leave_compiler_out()
    groups, betas = parameter_groups(policy, config), (0.9, config.beta2)
    if config.schedule == "schedule-free":
        if config.beta2 <= 0.6:
            raise UserError(
                f"--beta2 {config.beta2:g}: with 0.6 or less, RAdam of --schedule schedule-free never begins "
                f"to train: give more, such as 0.99."
            )
        from schedulefree import RAdamScheduleFree

        optimizer = RAdamScheduleFree(groups, betas=betas)
        optimizer.train()
        return optimizer
    return AdamW(groups, betas=betas, fused=True)  # `GradientClipper` can tell this one to skip


def parameter_groups(policy: nn.Module, config: OptimConfig) -> list[dict]:
    """Two groups for each trainable component: parameters with weight decay, and the rest."""
    groups, components = [], dict(policy.named_children())
    rates = _per_component(config.component_lr, components, "--component-lr")
    decays = _per_component(config.component_weight_decay, components, "--component-weight-decay")
    if config.backbone_lr is not None and not any(name.endswith("backbone") for name in components):
        raise UserError(
            f"--backbone-lr: the backbone is no component of its own here: give --component-lr for one of "
            f"{', '.join(components)}."
        )
    for name, component in components.items():
        is_backbone = name.endswith("backbone") and config.backbone_lr is not None
        lr = rates.get(name, config.backbone_lr if is_backbone else config.lr)
        trained = [parameter for parameter in component.parameters() if parameter.requires_grad]
        # Weights of linear and convolutional layers multiply an input; the others are added or looked up.
        matrices = {
            parameter
            for module in component.modules()
            if not isinstance(module, nn.Embedding)
            for key, parameter in module.named_parameters(recurse=False)
            if key.endswith("weight") and parameter.ndim >= 2
        }
        for decay, decays_too in ((decays.get(name, config.weight_decay), True), (0.0, False)):
            parameters = [parameter for parameter in trained if (parameter in matrices) == decays_too]
            if parameters:
                groups.append({"component": name, "params": parameters, "lr": lr, "weight_decay": decay})
    if not groups:
        raise UserError("Every component is frozen, so nothing would be trained: leave one out of --freeze.")
    return groups


def _per_component(options: tuple[str, ...], components: dict, flag: str) -> dict[str, float]:
    values = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in components:
            there = ", ".join(components)
            raise UserError(f"{flag} {option}: there is no component {name!r}; there are {there}.")
        with suppress(ValueError):
            values[name] = float(value)
        if not 0 <= values.get(name, -1) < math.inf:
            raise UserError(f"{flag} {option}: write it as {name}=NUMBER, which must not be negative.")
    return values


def lr_factor(step: int, total_steps: int, schedule: str, warmup_steps: int | None = None) -> float:
    """Learning rate at a step, as a share of its peak: a pure function, so resuming restores nothing.

    "onecycle" is that of Smith & Topin (2018) with the constants of torch's OneCycleLR: from 1/25 of the
    peak by a cosine to the peak, then by a cosine to 1/250,000; momentum is not cycled.
    """

    def cosine(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    if schedule == "schedule-free":
        return 1.0
    share = 0.3 if schedule == "onecycle" else 0.05
    warmup = round(share * total_steps) if warmup_steps is None else warmup_steps
    rest = max(total_steps - warmup, 1)
    if schedule == "onecycle":
        rise = max(warmup - 1, 1)
        return (
            cosine(1 / 25, 1, step / rise) if step <= rise else cosine(1, 1 / 250_000, (step - rise) / rest)
        )
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else cosine(1, 0, (step - warmup) / rest)


def ramp(progress: float | Tensor, over: float) -> Tensor:
    """Rises from 0 to 1 over the first share `over` of training, or is 1 if that is 0; a float64 scalar."""
    done = torch.as_tensor(progress, dtype=torch.float64)
    return (done / over).clamp(max=1.0) if over else torch.ones_like(done)


def build_scheduler(
    optimizer: torch.optim.Optimizer, policy: nn.Module, config: OptimConfig, total_steps: int, step: int
) -> LambdaLR:
    """Scheduler that continues at `step`, with the configuration's learning rates and weight decays.

    An optimizer restored from a checkpoint has the old ones, which flags given with --resume may change.

    Raises:
        UserError: if the warmup of a new run takes all of its steps; a resumed one may have been shortened.
    """
    if step == 0 and config.schedule != "schedule-free" and (config.warmup_steps or 0) >= total_steps:
        raise UserError(
            f"--warmup-steps {config.warmup_steps} leaves none of the run's {total_steps} steps to train at "
            f"--lr: give fewer, or train for more steps."
        )
    for group, now in zip(optimizer.param_groups, parameter_groups(policy, config), strict=True):
        group["initial_lr"], group["weight_decay"] = now["lr"], now["weight_decay"]

    def factor(at: int) -> float:
        return lr_factor(at, total_steps, config.schedule, config.warmup_steps)

    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Present learning rate of each component."""
    return {group["component"]: group["lr"] for group in optimizer.param_groups}


def or_nan(loss: Tensor) -> Tensor:
    """The loss, or NaN with a gradient of NaN everywhere if it is not finite.

    A loss that overflowed can have a finite gradient. NaN makes the gradient NaN in all processes when DDP
    averages it, so that `GradientClipper` skips the step everywhere, with no further communication.
    """
    # Not `where` on the loss itself: the branch that is not taken would backpropagate 0 * NaN.
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class GradientClipper:
    """Clips gradients to a largest norm, and skips steps whose gradient is not finite.

    Nothing here waits for the device, which decides itself what to skip. After DDP's all-reduce every process
    holds the same gradient, so all decide the same. Weights and moments stay as they were; buffers that the
    forward pass has changed already (statistics of batch norm, counts of codes) are restored. AdamW is told
    to skip; the step of any other optimizer is undone.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        self.policy, self.optimizer, self.max_norm = policy, optimizer, max_norm
        self.bad = torch.zeros((), dtype=torch.bool)
        self._saved = changing_buffers(policy)
        self._fused = isinstance(optimizer, torch.optim.AdamW)  # its kernel can be told to skip a step
        if not self._fused:
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
            optimizer.register_step_post_hook(lambda *_: self._state.restore_where(self.bad))
        self.begin_step()

    def begin_step(self) -> None:
        """Save the buffers, which a bad step restores; called before the step's first forward pass."""
        self._buffers = _Snapshot(self._saved)

    def _before_step(self) -> None:
        """Save what the optimizer is about to change: weights and, from the second step on, moments."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = [x for p in weights for x in self.optimizer.state.get(p, {}).values() if torch.is_tensor(x)]
        self._state = _Snapshot([] if self._known_good() else [*weights, *moments])

    def _known_good(self) -> bool:
        return self.bad.device.type == "cpu" and not self.bad  # there, reading it waits for nothing

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Clip; called once a step, when gradients are complete.

        Returns norms before clipping, scalars on the device: `grad_norm` of the whole, and
        `grad_norm/<component>` of each trained component.
        """
        named = self.policy.named_children()
        grads = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in named}
        grads = {name: part for name, part in grads.items() if part}
        everything = [grad for part in grads.values() for grad in part]
        # The norms that torch.nn.utils computes, for all components at once: few launches.
        single = torch.stack(torch._foreach_norm(everything)).split([len(part) for part in grads.values()])
        norms = {f"grad_norm/{name}": part.norm() for name, part in zip(grads, single, strict=True)}
        total = torch.stack(list(norms.values())).norm()
        self.bad = ~torch.isfinite(total)
        torch._foreach_mul_(everything, (self.max_norm / (total + 1e-6)).clamp(max=1.0))
        if self._fused:
            self.optimizer.found_inf = self.bad.float()
            self.optimizer.grad_scale = None
        else:  # the step is undone afterwards; the moments that the first one makes must not be NaN
            for group in _as_integers(everything):  # whose product with 0 is 0, unlike that of NaN
                torch._foreach_mul_(group, (~self.bad).to(group[0].dtype))
        self._buffers.restore_where(self.bad)
        return {"grad_norm": total, **norms}


def changing_buffers(policy: nn.Module) -> list[Tensor]:
    """The buffers that training may change: they are saved, and their module does not say `constant`."""
    saved = policy.state_dict().keys()
    constant = {
        id(buffer)
        for part in policy.modules()
        if getattr(part, "constant", False)
        for buffer in part.buffers()
    }
    named = policy.named_buffers()
    return [buffer for name, buffer in named if name in saved and id(buffer) not in constant]


def _as_integers(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors viewed as integers, grouped by width.

    Integer arithmetic on many tensors at once can select values that may be NaN: `where` needs a launch each.
    """
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        width = tensor.dtype.itemsize
        groups.setdefault(width, []).append(tensor.view(INTEGERS[width]))
    return list(groups.values())


class _Snapshot:
    """Saves values of tensors and restores them, in few launches whatever their number."""

    @torch.no_grad()
    def __init__(self, tensors: list[Tensor]):
        self.now = _as_integers(tensors)
        self.before = [[torch.empty_like(tensor) for tensor in group] for group in self.now]
        for before, now in zip(self.before, self.now, strict=True):
            torch._foreach_copy_(before, now)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Restore the values if the condition, a bool scalar on the device, holds; then free them."""
        for before, now in zip(self.before, self.now, strict=True):
            back = condition.to(now[0].dtype)
            torch._foreach_mul_(before, back)
            torch._foreach_mul_(now, 1 - back)
            torch._foreach_add_(now, before)
        self.now, self.before = [], []  # frees the memory


@torch.no_grad()
def move_average(averages: Iterable[Tensor], now: Iterable[Tensor], updates: int, decay: float) -> None:
    """Exponential moving average, in place: average <- d average + (1 - d) now.

    At update n, d = min(decay, (1 + n) / (10 + n)), so that the first, bad weights are forgotten early.
    Nothing waits for the device, unlike torch's AveragedModel, which copies its counter there.
    """
    torch._foreach_lerp_(list(averages), list(now), 1 - min(decay, (1 + updates) / (10 + updates)))


class AveragedPolicy:
    """The weights that are evaluated and exported: an average over the course of training.

    - EMA (`decay` > 0): see `move_average`; after every step.
    - schedule-free: the optimizer keeps the average itself and trains at another point. It is computed into
      a copy, since switching the training weights back and forth is not exact to the last bit.
    - otherwise: the weights themselves.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        self.policy, self.optimizer = policy, optimizer
        self.schedule_free = not isinstance(optimizer, torch.optim.AdamW)
        self.decay = 0.0 if self.schedule_free else decay
        self.updates = 0
        self._average = copy.deepcopy(policy).requires_grad_(False)
        pairs = zip(policy.parameters(), self._average.parameters(), strict=True)
        # Without tensors that never change, which the copies share.
        self._average_of = {p: average for p, average in pairs if average is not p}
        self._buffers, self._average_buffers = map(changing_buffers, (policy, self._average))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        if self.decay:
            move_average(self._average_of.values(), self._average_of, self.updates, self.decay)
            if self._buffers:
                torch._foreach_copy_(self._average_buffers, self._buffers)

    @property
    @torch.no_grad()
    def model(self) -> nn.Module:
        """The policy with the averaged weights, in eval mode: a separate module from the one in training."""
        if not self.decay:
            self._average.load_state_dict(self.policy.state_dict())
        if self.schedule_free:  # x from the training point y = (1 - beta1) z + beta1 x (Defazio et al. 2024)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if "z" in (state := self.optimizer.state.get(parameter, {})):
                        self._average_of[parameter].lerp_(state["z"], 1 - 1 / group["betas"][0])
        return self._average.eval()

    @torch.no_grad()
    def replace_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Reset some rows of a parameter (K, ...), also in its average and in the optimizer's state.

        `rows` (K,) is True where `values` (K, ...) hold a new row.
        """
        rows = rows.view(-1, *[1] * (parameter.ndim - 1))
        for tensor in (parameter, self._average_of[parameter]):
            tensor.copy_(torch.where(rows, values, tensor))
        for name, moment in self.optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(moment) and moment.shape == parameter.shape:
                # schedule-free's z is not a moment, but a point like the parameter itself
                moment.copy_(torch.where(rows, values if name == "z" else torch.zeros_like(moment), moment))

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Restore an EMA from exported weights; the other averages follow from the training state."""
        self.updates = updates
        if self.decay:
            self._average.load_state_dict(weights)
