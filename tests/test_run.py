"""What a run does around a step: micro-batches, their weights, the order of operations."""

import pytest
import torch
from running import lines, reset, train, weights

import train_naive_fm
from common import checkpoint
from common.config import parse
from common.data.growth import GrownDataset
from common.errors import UserError
from common.run import start_run

pytestmark = pytest.mark.usefixtures("accelerate_reset")


def started(tiny, run_dir, *more):
    """A run that is ready for its first step, with its policy and data."""
    reset()
    flags = [*tiny, "--run-dir", str(run_dir), "--steps", "100", *map(str, more)]
    config = parse(train_naive_fm.Config, flags, "train_naive_fm.py")
    run = start_run(config, train_naive_fm.__file__)
    data = run.load_data(config.horizon, config.normalization)
    policy = train_naive_fm.Policy(config, data.spec)
    with torch.no_grad():  # zero-initialized projections would hide most gradients
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    run.prepare(policy, data)
    return run, data, policy, config


def gradient(run, data, policy, config):
    """A step's gradient, with noise that depends only on the sample; and the step's batches."""
    batches = []
    for batch in run.micro_batches():
        draws = [torch.Generator().manual_seed(int(row)) for row in batch.index]
        shape = (config.horizon, batch.actions.shape[2])
        x_0 = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        t = torch.cat([torch.rand(1, generator=draw) for draw in draws])
        loss, _ = train_naive_fm.compute_loss(
            run.model, batch, data.normalizer, config, train=False, count=run.real_actions, x_0=x_0, t=t
        )
        run.backward(loss)
        batches.append(batch)
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, batches


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tiny, tmp_path):
    """Every real action has the same weight, whatever the share of padding."""
    flags = ("--horizon", 8)
    whole, batches = gradient(*started(tiny, tmp_path / "one", "--batch-size", 12, *flags))
    assert len(batches) == 1
    more = ("--batch-size", 4, "--grad-accumulation", 3)
    parts, batches = gradient(*started(tiny, tmp_path / "three", *more, *flags))
    shares = [batch.is_pad.float().mean().item() for batch in batches]
    assert len(batches) == 3
    assert max(shares) > min(shares) + 0.05  # otherwise the test would prove nothing
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_images_that_the_backbone_cannot_take_are_refused_before_they_are_decoded(tiny, tmp_path):
    flags = ("--cache-dir", tmp_path / "cache", "--backbone", "resnet18", "--image-size", 16)
    with pytest.raises(UserError, match="at least 32x32"):
        train(train_naive_fm, tiny, tmp_path / "run", *flags)
    assert not (tmp_path / "cache").exists()


def test_what_is_held_past_the_end_is_learned_and_not_validated(tiny, tmp_path):
    data = started(tiny, tmp_path / "run", "--horizon", 4, "--hold", 2)[1]
    last = [len(part) - 1 for part in (data.train, data.val)]
    padded = [part.__getitems__([n]).is_pad.tolist() for part, n in zip(data, last, strict=False)]
    assert padded == [[[False, False, False, True]], [[False, True, True, True]]]
    assert data.train.on(data.train.store).hold == GrownDataset(data.train, [data.train.store], 1.0).hold == 2


def test_weights_that_no_checkpoint_would_contain_are_refused(tiny, tmp_path, monkeypatch):
    made = train_naive_fm.Policy.__init__

    def with_more(policy, *args, **options):
        made(policy, *args, **options)
        policy.null = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(train_naive_fm.Policy, "__init__", with_more)
    with pytest.raises(UserError, match="Policy has null outside its components"):
        started(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_are_counted_and_due(tiny, tmp_path):
    run, data, policy, config = started(tiny, tmp_path / "run", "--grad-accumulation", 2)
    assert (run.step, run.samples, run.total_steps, run.global_batch) == (0, 0, 100, 8)
    for step in (1, 2, 3):
        gradient(run, data, policy, config)
        assert (run.step, run.progress) == (step, (step - 1) / 100)
        run.log(run.clip_gradients())
        assert run.end_step().keys() >= {"loss", "grad_norm", "samples_per_s"}
        assert run.samples == 8 * step
        assert run.due(2) == (step == 2)
    run.step = 100
    assert run.due(3)


def test_the_policy_trains_and_what_is_frozen_does_not(tiny, tmp_path):
    run, _, policy, _ = started(tiny, tmp_path / "run", "--freeze", "backbone")
    assert policy.training
    assert policy.action_decoder.training
    assert not policy.backbone.training
    assert run.model.training
    assert not any(parameter.requires_grad for parameter in policy.backbone.parameters())


def test_a_frozen_component_without_weights_is_told(tiny, tmp_path, capsys):
    flags = ("--steps", 1, "--freeze", "backbone")
    first = train(train_naive_fm, tiny, tmp_path / "first", *flags)
    said = "warning: backbone stays random: --freeze backbone without --init-from backbone=RUN\n"
    assert said in capsys.readouterr().out
    train(train_naive_fm, [], None, "--resume", first, "--steps", 2)
    _, _, policy, _ = started(tiny, tmp_path / "run", *flags, "--init-from", f"backbone={first}")
    policy.backbone.requires_grad_(True).hf_config = {}  # as of a pretrained model
    checkpoint.freeze(policy, ("backbone",), set())
    assert "stays random" not in capsys.readouterr().out


def test_a_fork_may_change_buffers_after_its_step(tiny, tmp_path, monkeypatch):
    """A bad step returns to the values at its start, not at the end of the previous step."""
    counted = []

    class Policy(train_naive_fm.Policy):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.backbone.register_buffer("seen", torch.zeros(()))

        def forward(self, x_t, *args):
            if self.training:
                self.backbone.seen += 100
            bad = self.training and len(counted) == 2
            return super().forward(x_t * (torch.nan if bad else 1.0), *args)

    def due(run, every, original=train_naive_fm.Run.due):
        if every == 1000:  # the last thing in a step
            policy = run.accelerator.unwrap_model(run.model)
            counted.append(policy.backbone.seen.item())
            policy.backbone.seen += 1
        return original(run, every)

    monkeypatch.setattr(train_naive_fm, "Policy", Policy)
    monkeypatch.setattr(train_naive_fm.Run, "due", due)
    flags = ("--steps", 4, "--eval-every", 500, "--save-every", 1000)
    run_dir = train(train_naive_fm, tiny, tmp_path / "run", *flags)
    assert [row["bad_steps"] for row in lines(run_dir)] == [0, 0, 1, 0]
    assert counted == [100, 201, 202, 303]
    assert all(value.isfinite().all() for value in weights(run_dir, 4).values())
