"""Optimizer groups, gradient clipping, learning-rate schedules, and the average of the weights.

A policy's *components* are its direct children (`head_backbone`, `info_embedder`, `action_decoder`, ...).
Each has its own optimizer groups, learning rate and weight decay, and its gradient norm is reported.
"""

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from common.config import MayChange, Share, options
from common.errors import UserError

DEFAULT_STEPS = 20_000


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
    """cosine: linear warmup, cosine decay. onecycle: cosine up, cosine down. schedule-free: RAdam, which does
    without --warmup-steps and --ema-decay."""
    warmup_steps: MayChange[NonNegativeInt | None] = None
    """Steps of linear warmup, or of onecycle's rise (default: 5 %, onecycle 30 %, of the steps)."""
    batch_size: MayChange[PositiveInt] = 32
    """Samples per process and micro-batch; the global batch is this x processes x --grad-accumulation."""
    grad_accumulation: MayChange[PositiveInt] = 1
    """Micro-batches per optimizer step."""
    steps: MayChange[PositiveInt | None] = None
    """Optimizer steps to train for (default: 20,000, unless --epochs is given)."""
    epochs: MayChange[PositiveFloat | None] = None
    """Passes over the training episodes to train for, converted to steps at the start."""
    grad_clip: MayChange[Annotated[float, Field(gt=0, allow_inf_nan=True), BeforeValidator(float)]] = 1.0
    """Largest norm of the gradient; it is scaled down to this. inf clips nothing."""
    ema_decay: MayChange[Share] = 0.999
    """Decay of the averaged weights that are evaluated and exported; 0 exports the raw weights."""


def resolve_steps(
    config: OptimConfig, num_samples: int, global_batch: int, done_steps: int = 0, done_samples: int = 0
) -> int:
    """Optimizer steps to train for, from the beginning of the run.

    Args:
        num_samples: in an epoch.
        global_batch: samples of a step, over all processes.
        done_steps, done_samples: where a resumed run stands; its global batch may have been another.

    Raises:
        UserError: if both --steps and --epochs are given, or they come to less than one step.
    """
    if config.steps is not None and config.epochs is not None:
        raise UserError("--steps and --epochs both say how long to train: give one of them.")
    if config.epochs is None:
        return config.steps or DEFAULT_STEPS
    total = done_steps + math.floor((config.epochs * num_samples - done_samples) / global_batch + 0.5)
    if total < 1:
        raise UserError(f"--epochs {config.epochs} comes to {total} optimizer steps: train for at least 1.")
    return total


def build_optimizer(policy: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or schedule-free RAdam (Defazio et al. 2024), over `parameter_groups`.

    AdamW is fused: fast on CUDA, and a step can be skipped on the device (see `GradientClipper`).
    """
    groups, betas = parameter_groups(policy, config), (0.9, config.beta2)
    if config.schedule == "schedule-free":
        from schedulefree import RAdamScheduleFree

        optimizer = RAdamScheduleFree(groups, betas=betas)
        optimizer.train()
        return optimizer
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def parameter_groups(policy: nn.Module, config: OptimConfig) -> list[dict]:
    """Two groups for each trainable component: what weight decay applies to, and the rest.

    Raises:
        UserError: for an option that names a component the policy does not have, or with nothing to train.
    """
    groups = []
    components = dict(policy.named_children())
    rates = _per_component(config.component_lr, components, "--component-lr")
    decays = _per_component(config.component_weight_decay, components, "--component-weight-decay")
    for name, component in components.items():
        is_backbone = name.endswith("backbone") and config.backbone_lr is not None
        lr = rates.get(name, config.backbone_lr if is_backbone else config.lr)
        trainable = [parameter for parameter in component.parameters() if parameter.requires_grad]
        decayed = {id(parameter) for parameter in _matrices(component)}
        for decay, matrices in ((decays.get(name, config.weight_decay), True), (0.0, False)):
            parameters = [parameter for parameter in trainable if (id(parameter) in decayed) == matrices]
            if parameters:
                groups.append({"component": name, "params": parameters, "lr": lr, "weight_decay": decay})
    if not groups:
        raise UserError("Every component is frozen, so nothing would be trained: leave one out of --freeze.")
    return groups


def _matrices(component: nn.Module) -> list[nn.Parameter]:
    """Weights of linear and convolutional layers: what multiplies an input, is not added or looked up."""
    return [
        parameter
        for module in component.modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim >= 2
    ]


def _per_component(options: tuple[str, ...], components: dict, flag: str) -> dict[str, float]:
    """Read `name=value` options."""
    values = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in components:
            raise UserError(
                f"{flag} {option}: there is no component {name!r}; there are {', '.join(components)}."
            )
        try:
            values[name] = float(value)
        except ValueError:
            raise UserError(f"{flag} {option}: write it as {name}=NUMBER.") from None
        if not 0 <= values[name] < math.inf:
            raise UserError(f"{flag} {option}: it must not be negative.")
    return values


def lr_factor(step: int, total_steps: int, schedule: str, warmup_steps: int | None = None) -> float:
    """Learning rate at a step, as a share of its peak: a pure function, so resuming restores nothing.

    "onecycle" is that of Smith & Topin (2018) with the constants of torch's OneCycleLR: from 1/25 of the
    peak by a cosine to the peak, then by a cosine to 1/250,000; momentum is not cycled.
    """
    if schedule == "schedule-free":
        return 1.0
    share = 0.3 if schedule == "onecycle" else 0.05
    warmup = round(share * total_steps) if warmup_steps is None else warmup_steps
    if schedule == "onecycle":
        rise, fall = max(warmup - 1, 1), max(total_steps - warmup, 1)
        if step <= rise:
            return _cosine(1 / 25, 1.0, step / rise)
        return _cosine(1.0, 1 / 250_000, min((step - rise) / fall, 1.0))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return _cosine(1.0, 0.0, min((step - warmup) / max(total_steps - warmup, 1), 1.0))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def build_scheduler(
    optimizer: torch.optim.Optimizer, policy: nn.Module, config: OptimConfig, total_steps: int, step: int
) -> LambdaLR:
    """Scheduler that stands at `step`.

    The optimizer may have been restored from a checkpoint: where flags given beside --resume changed a
    learning rate or weight decay, the present configuration holds, not what the checkpoint remembers.
    """
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

    A loss that overflowed can have a finite gradient. Made NaN, it makes that of all processes NaN when DDP
    averages them, and `GradientClipper` skips the step everywhere, with no further communication.
    """
    # Not `where` on the loss itself: the branch that is not taken would send back 0 * NaN.
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class GradientClipper:
    """Scales gradients to a largest norm, and lets steps whose gradient is not finite do nothing.

    Nothing here waits for the device: what is to be skipped is decided there. After DDP's all-reduce every
    process holds the same gradient, hence all decide the same. Weights and moments stay as they were, and so
    do buffers, which the forward pass has changed already (statistics of batch norm, counts of codes). AdamW
    is told to skip; the step of any other optimizer is undone.

    Args:
        policy: its children are the components whose norms are reported.
        optimizer: over their parameters.
        max_norm: of the gradient of all.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        self.policy, self.optimizer, self.max_norm = policy, optimizer, max_norm
        self.bad = torch.zeros((), dtype=torch.bool)
        saved = policy.state_dict().keys()  # buffers that are not saved are constants
        self._buffers = _Snapshot([buffer for name, buffer in policy.named_buffers() if name in saved])
        self._fused = isinstance(optimizer, torch.optim.AdamW)  # its kernel can be told to skip a step
        if not self._fused:
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
            optimizer.register_step_post_hook(lambda *_: self._state.restore_where(self.bad))

    def begin_step(self) -> None:
        """Note the buffers to which a bad step goes back; called before its first forward pass."""
        self._buffers.take()

    def _before_step(self) -> None:
        """Note what the optimizer is about to change: weights and, from the second step on, moments."""
        known_good = self.bad.device.type == "cpu" and not self.bad  # there, looking waits for nothing
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = [x for p in weights for x in self.optimizer.state.get(p, {}).values() if torch.is_tensor(x)]
        self._state = _Snapshot([] if known_good else [*weights, *moments])
        self._state.take()

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Clip; called once a step, when gradients are complete.

        Returns:
            Norms before clipping: `grad_norm` of the whole, `grad_norm/<component>` of each trained
            component. Scalars on the device.
        """
        norms, parameters = {}, []
        for name, component in self.policy.named_children():
            trained = [p for p in component.parameters() if p.grad is not None]
            if trained:
                norms[f"grad_norm/{name}"] = nn.utils.get_total_norm([p.grad for p in trained])
                parameters += trained
        total = torch.stack(list(norms.values())).norm()
        self.bad = ~torch.isfinite(total)
        nn.utils.clip_grads_with_norm_(parameters, self.max_norm, total)
        if self._fused:
            self.optimizer.found_inf = self.bad.float()
            self.optimizer.grad_scale = None
        else:  # the step is undone afterwards; until then nothing may become NaN
            for parameter in parameters:
                parameter.grad = torch.where(self.bad, 0.0, parameter.grad)
        self._buffers.restore_where(self.bad)
        return {"grad_norm": total, **norms}


class _Snapshot:
    """Values of tensors, and the way back to them."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.before = [torch.empty_like(tensor) for tensor in tensors]

    @torch.no_grad()
    def take(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.before, self.tensors)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Go back if the condition, a bool scalar on the device, holds."""
        if self.tensors:
            pairs = zip(self.before, self.tensors, strict=True)
            torch._foreach_copy_(self.tensors, [torch.where(condition, b, now) for b, now in pairs])


@torch.no_grad()
def move_average(averages: Sequence[Tensor], now: Sequence[Tensor], updates: int, decay: float) -> None:
    """Exponential moving average, in place: average <- d average + (1 - d) now.

    At update n, d = min(decay, (1 + n) / (10 + n)), so that the first, bad weights are forgotten early.
    Nothing waits for the device, as torch's AveragedModel does to copy its counter there.

    Args:
        averages, now: tensors of the same shapes.
        updates: n.
    """
    torch._foreach_lerp_(list(averages), list(now), 1 - min(decay, (1 + updates) / (10 + updates)))


class AveragedPolicy:
    """The weights that are evaluated and exported: an average over the course of training.

    - EMA (`decay` > 0): see `move_average`; after every step.
    - schedule-free: the optimizer keeps the average itself and trains at another point; it is computed into
      a copy, since switching the training weights back and forth is not exact to the last bit.
    - otherwise: the weights themselves.

    `model` is a module of its own, so that evaluating it cannot disturb training.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        self.policy, self.optimizer = policy, optimizer
        self.schedule_free = not isinstance(optimizer, torch.optim.AdamW)
        self.decay = 0.0 if self.schedule_free else decay
        self.updates = 0
        self._average = copy.deepcopy(policy).requires_grad_(False)
        pairs = list(zip(self._average.parameters(), policy.parameters(), strict=True))
        # A frozen network that copies share needs no averaging.
        self._moving = [pair for pair in pairs if pair[0] is not pair[1]]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        if self.decay:
            move_average(*zip(*self._moving, strict=True), self.updates, self.decay)
            buffers = list(self.policy.buffers())
            if buffers:
                torch._foreach_copy_(list(self._average.buffers()), buffers)

    @property
    def model(self) -> nn.Module:
        """The policy with the averaged weights, in eval mode."""
        if not self.decay:
            self._average.load_state_dict(self.policy.state_dict())
        if self.schedule_free:
            self._schedule_free_average()
        return self._average.eval()

    @torch.no_grad()
    def _schedule_free_average(self) -> None:
        """x from the training point y = (1 - beta1) z + beta1 x (Defazio et al. 2024)."""
        mine = dict(zip(self.policy.parameters(), self._average.parameters(), strict=True))
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "z" in state:
                    mine[parameter].lerp_(state["z"], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def replace_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Start some rows of a parameter anew: there, in its average, and in what the optimizer remembers.

        Args:
            parameter: of the policy, (K, ...).
            rows: (K,), True where a row is replaced.
            values: (K, ...), the new rows; others are not looked at.
        """
        rows = rows.view(-1, *[1] * (parameter.ndim - 1))
        averages = dict(zip(self.policy.parameters(), self._average.parameters(), strict=True))
        for tensor in (parameter, averages[parameter]):
            tensor.copy_(torch.where(rows, values, tensor))
        for name, moment in self.optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(moment) and moment.shape == parameter.shape:
                # schedule-free's z is not a moment, but where the parameter itself is
                moment.copy_(torch.where(rows, values if name == "z" else torch.zeros_like(moment), moment))

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Restore an EMA from exported weights; the other averages follow from the training state."""
        self.updates = updates
        if self.decay:
            self._average.load_state_dict(weights)
