"""Forks in `examples/`: their own formulas, and that they stay forks."""

import difflib
from pathlib import Path

import pytest
import torch
from running import fitting, lines, train, weights
from torch._dynamo.testing import CompileCounter

from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, open_dataset
from examples import train_mean_flow, train_two_step

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/train_*.py")), ids=lambda path: path.stem)
def test_a_fork_changes_at_most_60_lines(path):
    original = (ROOT / "train_naive_fm.py").read_text().splitlines()
    lines = path.read_text().splitlines()
    same = difflib.SequenceMatcher(None, original, lines, autojunk=False).get_matching_blocks()
    assert len(lines) - sum(block.size for block in same) <= 60


def observed(script, tiny):
    """A policy with random weights, and an observation for it."""
    config = parse(script.Config, fitting(script, tiny), "")
    store = open_dataset(config.data)
    spec = PolicySpec.of(ChunkDataset(store, range(store.num_episodes), config.horizon))
    torch.manual_seed(0)
    policy = script.Policy(config, spec).eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.randint(256, (2, len(spec.cameras), 3, *spec.image_size), dtype=torch.uint8)
    return config, policy, images, torch.randn(2, 1, spec.state_dim)


def test_mean_flow_differentiates_along_the_path(tiny):
    config, policy, images, proprio = observed(train_mean_flow, tiny)
    x_t, velocity = torch.randn(2, 4, config.horizon, policy.action_decoder.action_in.in_features)
    t, r = torch.tensor([[0.1, 0.4, 0.5, 0.9], [0.2, 0.4, 1.0, 0.95]])
    seen = (images.float() / 255, proprio)
    average, derivative = policy(x_t, t, r, velocity, *seen)
    h = 5e-3
    after, _ = policy(x_t + h * velocity, t + h, r, velocity, *seen)
    before, _ = policy(x_t - h * velocity, t - h, r, velocity, *seen)
    torch.testing.assert_close(derivative, (after - before) / (2 * h), rtol=0.02, atol=2e-3)
    assert derivative.abs().mean() > 1e-3
    assert average.shape == x_t.shape


def test_two_step_regression_answers_twice(tiny):
    config, policy, images, proprio = observed(train_two_step, tiny)
    first = train_two_step.sample_actions(policy, images, proprio, config, steps=1)
    second = train_two_step.sample_actions(policy, images, proprio, config)
    context = policy.observe(images.float() / 255, proprio)
    zeros = torch.zeros_like(first)
    torch.testing.assert_close(first, policy.action_decoder(zeros, torch.zeros(2), context))
    torch.testing.assert_close(second, policy.action_decoder(first, torch.full((2,), 0.9), context))
    assert not torch.allclose(first, second)


@pytest.mark.usefixtures("accelerate_reset")
def test_mean_flow_is_compiled_before_and_after_its_derivative(tiny, tmp_path, monkeypatch):
    flags = ("--steps", 3, "--schedule", "constant", "--save-every", 500, "--eval-every", 500)
    eager = train(train_mean_flow, tiny, tmp_path / "eager", *flags)
    counter, compile = CompileCounter(), torch.compile  # runs the graphs uncompiled
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, backend=counter, dynamic=False))
    torch._dynamo.reset()
    compiled = train(train_mean_flow, tiny, tmp_path / "compiled", *flags, "--compile")
    assert 2 <= counter.frame_count <= 4  # none is compiled again
    assert lines(compiled) == lines(eager)
    expected = weights(eager, 3)
    assert all(torch.equal(value, expected[key]) for key, value in weights(compiled, 3).items())
