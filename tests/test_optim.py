import copy
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from common.optim import (
    DEFAULT_STEPS,
    AveragedPolicy,
    GradientClipper,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    changing_buffers,
    lr_factor,
    or_nan,
    parameter_groups,
    resolve_steps,
)

ROOT = Path(__file__).parents[1]


class TinyPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_backbone = nn.Linear(4, 4)
        self.action_decoder = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.action_decoder(self.head_backbone(x))


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return TinyPolicy()


def train_step(policy, optimizer, clip=None, bad=False):
    loss = policy(torch.randn(8, 4)).square().mean()
    (loss * (float("nan") if bad else 1.0)).backward()
    if clip:
        clip()
    optimizer.step()
    optimizer.zero_grad()


def test_cosine_warms_up_linearly_and_decays_to_zero():
    factors = [lr_factor(s, 100, "cosine", 10) for s in range(101)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_constant_and_schedule_free():
    assert [lr_factor(s, 10, "constant", 2) for s in range(4)] == [0.5, 1, 1, 1]
    assert {lr_factor(s, 10, "schedule-free") for s in range(10)} == {1.0}


def test_onecycle_is_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50, cycle_momentum=False)
    for step in range(50):
        assert lr_factor(step, 50, "onecycle") == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), (
            step
        )
        optimizer.step()
        if step < 49:
            reference.step()


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
def test_a_scheduler_built_at_a_step_continues_as_if_it_had_run(policy, schedule):
    config = OptimConfig(lr=0.1, schedule=schedule, warmup_steps=4)
    optimizer = build_optimizer(policy, config)
    scheduler = build_scheduler(optimizer, policy, config, 20, step=0)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * lr_factor(s, 20, schedule, 4) for s in range(20)])
    resumed = build_optimizer(policy, config)
    scheduler = build_scheduler(resumed, policy, config, 20, step=13)
    for expected in rates[13:]:
        assert resumed.param_groups[0]["lr"] == expected
        resumed.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant", "schedule-free"])
def test_a_warmup_as_long_as_the_run_is_refused(policy, schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=20)
    optimizer = build_optimizer(policy, config)
    build_scheduler(optimizer, policy, config, 21, step=0)
    build_scheduler(optimizer, policy, config, 15, step=10)  # a run that was resumed with fewer --steps
    build_scheduler(optimizer, policy, OptimConfig(schedule=schedule), 1, step=0)
    if schedule == "schedule-free":  # which has no warmup
        return
    for total in (20, 15):
        with pytest.raises(UserError, match=f"--warmup-steps 20 leaves none of the run's {total} steps"):
            build_scheduler(optimizer, policy, config, total, step=0)


def test_groups_follow_components_and_decay_only_matrices(policy):
    config = OptimConfig(
        lr=1.0,
        backbone_lr=0.1,
        weight_decay=0.5,
        component_lr=("action_decoder=2.0",),
        component_weight_decay=("head_backbone=0.25",),
    )
    groups = parameter_groups(policy, config)
    found = {(g["component"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        ("head_backbone", 0.1, 0.25, 1),
        ("head_backbone", 0.1, 0.0, 1),
        ("action_decoder", 2.0, 0.5, 1),
        ("action_decoder", 2.0, 0.0, 3),
    }
    policy.head_backbone.requires_grad_(False)
    assert {g["component"] for g in parameter_groups(policy, config)} == {"action_decoder"}


def test_rates_that_would_do_nothing_are_refused(policy):
    with pytest.raises(UserError, match=r"--beta2 0\.6: with 0\.6 or less, .* never begins to train"):
        build_optimizer(policy, OptimConfig(schedule="schedule-free", beta2=0.6))
    optimizer = build_optimizer(policy, OptimConfig(schedule="schedule-free", beta2=0.61, lr=0.1))
    before = [parameter.clone() for parameter in policy.parameters()]
    for _ in range(200):
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert not torch.equal(before[0], next(policy.parameters()))
    encoder = nn.ModuleDict({"state_encoder": policy})
    with pytest.raises(UserError, match=r"--backbone-lr: the backbone is no component .* of state_encoder"):
        parameter_groups(encoder, OptimConfig(backbone_lr=0.1))


def test_what_is_added_or_looked_up_does_not_decay():
    class Component(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(5, 4))
            self.task = nn.Embedding(3, 4)
            self.conv = nn.Conv2d(3, 4, 2)
            self.attention = nn.MultiheadAttention(4, 1)
            self.norm = nn.LayerNorm(4)

    policy = nn.Module()
    policy.encoder = Component()
    groups = parameter_groups(policy, OptimConfig(weight_decay=0.5))
    names = {id(parameter): name for name, parameter in policy.encoder.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"component_lr": ("tail=1",)}, "head_backbone, action_decoder"),
        ({"component_lr": ("head_backbone=fast",)}, "head_backbone=NUMBER"),
        ({"component_weight_decay": ("head_backbone",)}, "head_backbone=NUMBER"),
    ],
)
def test_options_for_components_that_do_not_fit_are_refused(policy, options, words):
    with pytest.raises(UserError, match=words):
        parameter_groups(policy, OptimConfig(**options))


def test_a_policy_that_is_frozen_altogether_is_refused(policy):
    with pytest.raises(UserError, match="--freeze"):
        parameter_groups(policy.requires_grad_(False), OptimConfig())


def test_gradients_are_clipped_as_a_whole_and_reported_by_component(policy):
    policy(100 * torch.randn(8, 4)).square().sum().backward()
    grads = [p.grad.clone() for p in policy.parameters()]
    total = torch.cat([g.flatten() for g in grads]).norm()
    clip = GradientClipper(policy, build_optimizer(policy, OptimConfig()), 1.0)
    norms = clip()
    torch.testing.assert_close(norms["grad_norm"], total)
    backbone = torch.cat([g.flatten() for g in grads[:2]]).norm()
    torch.testing.assert_close(norms["grad_norm/head_backbone"], backbone)
    assert not clip.bad
    clipped = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(clipped, torch.cat([g.flatten() for g in grads]) / total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [False, True])
def test_clipping_is_that_of_torch_and_leaves_gradients_where_they_are(policy, bad):
    """DDP's gradients are views of its buffers: a new tensor in their place would be copied again."""
    policy(100 * torch.randn(8, 4)).square().sum().backward()
    grads = [p.grad for p in policy.parameters()]
    if bad:
        grads[-1][..., 0] = math.nan
    expected = [grad.clone() for grad in grads]
    norms = GradientClipper(policy, build_optimizer(policy, OptimConfig(schedule="schedule-free")), 1.0)()
    assert all(p.grad is grad for p, grad in zip(policy.parameters(), grads, strict=True))
    if bad:
        assert all((grad == 0).all() for grad in grads)
        return
    theirs = [nn.Parameter(torch.empty_like(grad)) for grad in expected]
    for parameter, grad in zip(theirs, expected, strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grads_with_norm_(theirs, 1.0, norms["grad_norm"])
    assert all(torch.equal(grad, p.grad) for grad, p in zip(grads, theirs, strict=True))
    assert torch.equal(norms["grad_norm/head_backbone"], nn.utils.get_total_norm(expected[:2]))


@pytest.mark.parametrize("schedule", ["cosine", "schedule-free"])
def test_a_step_launches_as_much_for_many_tensors_as_for_few(schedule, monkeypatch):
    class Count(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.num += not any(name in str(func) for name in ("view", "empty", "detach"))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(GradientClipper, "_known_good", lambda self: False)  # as on a GPU
    launches = []
    for layers in (1, 20):
        policy = nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))})
        optimizer = build_optimizer(policy, OptimConfig(schedule=schedule))
        clip = GradientClipper(policy, optimizer, 1.0)
        for _ in range(2):  # the first creates the moments
            policy["net"](torch.randn(8, 4)).square().mean().backward()
            with Count() as count:
                clip.begin_step()
                clip()
                optimizer.step()
        launches.append(count.num)
    assert launches[0] == launches[1] < 60


def everything(policy, optimizer):
    """Weights, buffers and moments, copied."""
    moments = optimizer.state_dict()["state"]
    moments = {f"{i} {name}": x for i, state in moments.items() for name, x in state.items()}
    return copy.deepcopy({**policy.state_dict(), **moments})


@pytest.mark.parametrize("schedule", ["cosine", "schedule-free"])
@pytest.mark.parametrize("steps", [0, 8])
def test_a_step_whose_gradient_is_not_finite_does_not_happen(policy, schedule, steps):
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01, schedule=schedule))
    clip = GradientClipper(policy, optimizer, 1.0)
    for _ in range(steps):  # schedule-free RAdam does not move in its first steps
        train_step(policy, optimizer, clip)
    before = everything(policy, optimizer)
    train_step(policy, optimizer, clip, bad=True)
    assert clip.bad
    after = everything(policy, optimizer)
    assert steps == 0 or before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in after.values())
    for _ in range(8):
        train_step(policy, optimizer, clip)
    assert not all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


def test_undoing_a_step_does_not_need_to_look_at_the_device(policy, monkeypatch):
    """On a GPU it is not known in time whether a step is bad: it is undone afterwards."""
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01, schedule="schedule-free"))
    clip = GradientClipper(policy, optimizer, 1.0)
    for _ in range(8):
        train_step(policy, optimizer, clip)
    before = everything(policy, optimizer)
    for bad in (True, False):
        policy(torch.randn(8, 4)).square().mean().mul(math.nan if bad else 1.0).backward()
        clip()
        clip.bad = Unseen(clip.bad)
        optimizer.step()
        optimizer.zero_grad()
        after = everything(policy, optimizer)
        assert all(torch.equal(before[key], after[key]) for key in policy.state_dict()) == bad


STARTS = """
import sys
import torch
from torch import nn
from common.optim import GradientClipper, OptimConfig, build_optimizer
policy = nn.Module()
policy.decoder = nn.Linear(3, 2)
for schedule in ("cosine", "schedule-free"):
    optimizer = build_optimizer(policy, OptimConfig(schedule=schedule))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    clip = GradientClipper(policy, optimizer, 1.0)
    for _ in range(2):
        clip.begin_step()
        policy.decoder(torch.randn(4, 3)).sum().backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def test_a_run_starts_without_importing_the_compiler():
    done = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_adamw_is_pytorchs():
    torch.manual_seed(0)
    ours = nn.Module()
    ours.decoder = nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, OptimConfig(weight_decay=0.1))
    betas = optimizer.defaults["betas"]
    matrices = [
        {"params": [theirs.decoder.weight], "weight_decay": 0.1},
        {"params": [theirs.decoder.bias], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(matrices, lr=1e-3, betas=betas, fused=True)
    for _ in range(4):
        x = torch.randn(5, 3)
        for policy, each in ((ours, optimizer), (theirs, other)):
            policy.decoder(x).square().sum().backward()
            each.step()
            each.zero_grad()
    assert torch.equal(ours.decoder.weight, theirs.decoder.weight)
    assert torch.equal(ours.decoder.bias, theirs.decoder.bias)


class Unseen(torch.Tensor):
    """A scalar that claims to be on another device, and refuses to be read."""

    device = torch.device("meta")

    def __bool__(self):
        raise AssertionError("read a value from the device")


def test_buffers_that_never_change_are_not_copied_in_every_step():
    policy, part = TinyPolicy(), nn.Module()
    part.constant = True
    part.register_buffer("table", torch.zeros(3))
    policy.told = nn.Module()
    policy.told.part = part
    policy.told.register_buffer("counts", torch.zeros(2))
    policy.told.register_buffer("grid", torch.zeros(1), persistent=False)
    assert [buffer.shape for buffer in changing_buffers(policy)] == [(2,)]
    average = AveragedPolicy(policy, build_optimizer(policy, OptimConfig()), 0.9)
    policy.told.counts += 1
    average.update()
    assert average.model.told.counts.tolist() == [1, 1]


def test_a_bad_step_leaves_buffers_as_they_were():
    policy = nn.Module()
    policy.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    clip = GradientClipper(policy, optimizer, 1.0)
    for bad in (False, True, False):
        # A bad step does not undo what a method changed after the step before.
        policy.backbone[1].running_mean += 1.0
        before = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        clip.begin_step()
        x = torch.randn(8, 3) * (math.inf if bad else 1)
        policy.backbone(x).square().mean().backward()
        clip()
        assert clip.bad == bad
        optimizer.step()
        optimizer.zero_grad()
        for name, buffer in policy.named_buffers():
            assert torch.equal(buffer, before[name]) == bad
        assert all(parameter.isfinite().all() for parameter in policy.parameters())


def test_a_loss_that_overflowed_has_no_finite_gradient():
    parameter = torch.tensor([2.0, 3.0], requires_grad=True)
    (parameter.sum() * 2).backward()
    finite = parameter.grad.clone()
    parameter.grad = None
    or_nan(parameter.sum() * 2).backward()
    assert torch.equal(parameter.grad, finite)
    for bad in (math.inf, -math.inf, math.nan):
        parameter.grad = None
        or_nan(parameter.sum() + bad).backward()
        assert parameter.grad.isnan().all()


def test_steps_and_epochs():
    assert resolve_steps(OptimConfig(steps=7), 100, 10) == 7
    assert resolve_steps(OptimConfig(epochs=2.5), 100, 10) == 25
    assert resolve_steps(OptimConfig(), 100, 10) == DEFAULT_STEPS
    # 4 epochs of 32 samples: after 20 steps of 4, the remaining steps have 8
    assert resolve_steps(OptimConfig(epochs=4.0), 32, 8, done_steps=20, done_samples=80) == 26
    for done in range(40):  # a resumed run ends at the same step
        config = OptimConfig(epochs=2.5)
        assert resolve_steps(config, 33, 2, done, 2 * done) == resolve_steps(config, 33, 2)
    for config in (OptimConfig(steps=5, epochs=1.0), OptimConfig(epochs=0.01)):
        with pytest.raises(UserError, match="--epochs"):
            resolve_steps(config, 100, 10)


def test_ema_follows_its_formula(policy):
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01))
    averaged = AveragedPolicy(policy, optimizer, 0.9)
    expected = [p.detach().clone() for p in policy.parameters()]
    for n in range(1, 130):
        train_step(policy, optimizer)
        averaged.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, policy.parameters(), strict=True)
        ]
    for mine, e in zip(averaged.model.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, e)


def test_without_ema_the_weights_themselves_are_exported(policy):
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01))
    averaged = AveragedPolicy(policy, optimizer, 0.0)
    train_step(policy, optimizer)
    averaged.update()
    for mine, weight in zip(averaged.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(mine, weight)
        assert mine is not weight


def test_schedule_free_exports_what_its_eval_mode_would_without_touching_training(policy):
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01, schedule="schedule-free"))
    averaged = AveragedPolicy(policy, optimizer, 0.9)
    for _ in range(30):
        train_step(policy, optimizer)
        averaged.update()
    before = copy.deepcopy(policy.state_dict())
    exported = [p.clone() for p in averaged.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), policy.state_dict().values(), strict=True))
    optimizer.eval()
    for mine, reference in zip(exported, policy.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("schedule", ["cosine", "schedule-free"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_replaced_rows_start_anew_everywhere(policy, schedule, decay):
    optimizer = build_optimizer(policy, OptimConfig(lr=0.01, schedule=schedule))
    averaged = AveragedPolicy(policy, optimizer, decay)
    for _ in range(10):
        train_step(policy, optimizer)
        averaged.update()
    weight = policy.head_backbone.weight
    before = weight.detach().clone()
    moments = {name: moment.clone() for name, moment in optimizer.state[weight].items() if moment.ndim == 2}
    rows, values = torch.tensor([False, True, False, True]), torch.randn(4, 4)
    averaged.replace_rows(weight, rows, values)
    for tensor in (weight, averaged.model.head_backbone.weight):
        torch.testing.assert_close(tensor[rows], values[rows])
    assert torch.equal(weight[~rows], before[~rows])
    assert len(moments) == 2
    for name, moment in optimizer.state[weight].items():
        if name in moments:
            assert torch.equal(moment[~rows], moments[name][~rows])
            assert torch.equal(moment[rows], values[rows] if name == "z" else torch.zeros(2, 4))
    train_step(policy, optimizer)
    step = (weight - torch.where(rows[:, None], values, before)).norm(dim=1)
    assert (step[rows] < 0.05).all()  # old moments of the optimizer do not move it
