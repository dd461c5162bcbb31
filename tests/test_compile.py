"""`--compile`: what is compiled, how often, and that results do not change."""

import json
from importlib import import_module

import pytest
import torch
from running import lines, train, weights
from torch._dynamo.testing import CompileCounter

import train_naive_fm
from common import losses
from common.config import parse
from common.errors import UserError
from common.run import start_run

SLOW = ("train_naive_fm", "train_vfp_depth", "train_cfg_vqvae", "train_mi")


@pytest.mark.parametrize(
    "name", ["train_vfp", "train_vfp_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_loss_is_compiled_once_as_one_graph(
    name, tiny, tiny_depth, tmp_path, monkeypatch, accelerate_reset
):
    script, flags = import_module(name), ("--steps", 3, "--eval-every", 500, "--save-every", 500)
    if name == "train_mi":
        monkeypatch.setattr(script, "estimate", lambda *_: None)
        monkeypatch.setattr(script, "require_episodes", lambda *_: None)
    eager = train(script, tiny, tmp_path / "eager", *flags)
    counter, compile = CompileCounter(), torch.compile  # runs the graph uncompiled
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, backend=counter, dynamic=False))
    torch._dynamo.reset()
    losses._compiled_steps.cache_clear()
    compiled = train(script, tiny, tmp_path / "compiled", *flags, "--compile")
    # Augmentation, networks and loss; training progress does not recompile. Sinkhorn is another graph.
    assert counter.frame_count == (2 if name in ("train_cfg_vqvae", "train_vfp_moe") else 1)
    losses._compiled_steps.cache_clear()
    assert lines(compiled) == lines(eager)
    expected = weights(eager, 3)
    assert all(torch.equal(value, expected[key]) for key, value in weights(compiled, 3).items())


@pytest.mark.parametrize(
    ("flags", "mode"),
    [("", "no"), ("--compile", "default"), ("--compile --lr 1", "default"), ("--compile graphs", "graphs")],
)
def test_compile_is_also_the_flag_that_it_was(flags, mode):
    assert parse(train_naive_fm.Config, flags.split(), "train_naive_fm.py").run.compile == mode


@pytest.mark.parametrize(("before", "mode"), [(False, "no"), (True, "default"), ("graphs", "graphs")])
def test_configurations_of_older_versions_are_read(tmp_path, before, mode):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"run": {"compile": before}}))
    config = parse(train_naive_fm.Config, ["--config", str(file)], "train_naive_fm.py")
    assert config.run.compile == mode


def test_graphs_do_not_accumulate():
    config = parse(
        train_naive_fm.Config, ["--compile", "graphs", "--grad-accumulation", "2"], "train_naive_fm.py"
    )
    with pytest.raises(UserError, match="--grad-accumulation 1"):
        start_run(config, "train_naive_fm.py")
