"""A run prints, saves and resumes its real settings, whatever the environment tells Accelerate."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import interrupt_after, lines, train, weights

import train_vfp
from common.accelerator import make_accelerator
from common.config import RunConfig
from common.errors import UserError

pytestmark = pytest.mark.usefixtures("accelerate_reset", "no_settings")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value", "way_out"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "--grad-accumulation is 2: unset"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", "--grad-accumulation is 2: unset"),
        ("DYNAMO_BACKEND", "inductor", "--compile"),
        ("DYNAMO_BACKEND", "EAGER", "--compile"),
        ("USE_DEEPSPEED", "true", "without --use_deepspeed"),
        ("USE_FSDP", "True", "without --use_fsdp"),
        ("USE_FSDP", "1", "without --use_fsdp"),
        ("USE_MEGATRON_LM", "true", "without --use_megatron_lm"),
        ("USE_PARALLELISM_CONFIG", "true", "without --use_parallelism_config"),
        ("MIXED_PRECISION", "fp8", "--mixed-precision no, bf16 or fp16"),
        ("MIXED_PRECISION", "BF16", "--mixed-precision no, bf16 or fp16"),
        ("MIXED_PRECISION", "fp16", "There is no fp16 training on cpu: use --mixed-precision"),
    ],
)
def test_a_variable_that_contradicts_a_flag_is_refused(variable, value, way_out, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(UserError) as refused:
        make_accelerator(RunConfig(), grad_accumulation=2)
    sentence = str(refused.value)
    assert way_out in sentence
    assert value in sentence
    assert sentence.count(".") == 1
    if value != "fp16":
        assert f"ACCELERATE_{variable}" in sentence


@pytest.mark.parametrize(("cuda", "device", "warned"), [(None, True, 1), ("13.0", True, 0), (None, False, 0)])
def test_a_gpu_that_pytorch_was_not_built_for_is_named(cuda, device, warned, monkeypatch, capsys):
    real = os.path.exists
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path: device if "nvidiactl" in str(path) else real(path))
    make_accelerator(RunConfig())
    assert capsys.readouterr().out.count("`rm -r .venv; make setup`") == warned


def test_variables_that_agree_change_nothing(monkeypatch):
    """The variables that `accelerate launch` sets by default."""
    said = {"GRADIENT_ACCUMULATION_STEPS": "2", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false"}
    for name, value in (said | {"MIXED_PRECISION": "no", "USE_CPU": "False"}).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    accelerator = make_accelerator(RunConfig(), grad_accumulation=2)
    assert accelerator.gradient_accumulation_steps == 2
    assert (accelerator.mixed_precision, accelerator.device.type) == ("no", "cpu")


@pytest.mark.parametrize(
    ("flag", "launcher", "resumed", "effective"),
    [
        (None, None, None, "no"),
        (None, "bf16", None, "bf16"),
        ("no", "bf16", None, "no"),
        ("bf16", "no", None, "bf16"),
        ("bf16", "fp8", None, "bf16"),
        (None, None, "bf16", "bf16"),
        (None, "no", "bf16", "bf16"),  # the launcher's default
        (None, "bf16", "no", "bf16"),
        ("no", None, "bf16", "no"),
    ],
)
def test_the_precision_is_that_of_the_flag_the_launcher_or_the_resumed_run(
    flag, launcher, resumed, effective, monkeypatch, tmp_path
):
    config = replace(RunConfig(), mixed_precision=flag)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    if resumed:
        (tmp_path / "config.json").write_text(json.dumps({"mixed_precision": resumed}))
        config = replace(config, run_dir=tmp_path, resume=str(tmp_path))
    assert make_accelerator(config).mixed_precision == effective


def test_a_resumed_run_keeps_the_precision_that_the_launcher_gave(tiny, tmp_path, monkeypatch, capsys):
    flags = ("--steps", 2, "--save-every", 1)
    exact = train(train_vfp, tiny, tmp_path / "float32", *flags)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    whole = train(train_vfp, tiny, tmp_path / "whole", *flags)
    run = interrupt_after(whole, 1, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    capsys.readouterr()
    train(train_vfp, tiny, None, "--resume", run)
    assert "bf16 mixed precision" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["mixed_precision"] == "bf16"
    assert lines(run) == lines(whole)
    assert lines(exact)[1]["loss"] != lines(whole)[1]["loss"]  # otherwise the test would prove nothing


def launched(*command, **environment):
    """Run a command with Accelerate's launcher; returns its exit code, output and errors."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_what_the_launcher_says_and_what_the_flags_say_both_hold(tiny, tmp_path):
    flags = [*tiny, "--steps", 2, "--grad-accumulation", 4, "--run-dir"]
    code, printed, errors = launched("train_vfp.py", *flags, tmp_path / "plain")
    assert code == 0, errors[-3000:]
    assert "2 steps of 16 samples" in printed
    assert "no mixed precision" in printed
    alone = train(train_vfp, tiny, tmp_path / "alone", "--steps", 2, "--grad-accumulation", 4)
    mine, other = weights(tmp_path / "plain", 2), weights(alone, 2)
    assert all(torch.equal(mine[key], other[key]) for key in other)

    code, printed, errors = launched("--mixed_precision", "bf16", "train_vfp.py", *flags, tmp_path / "bf16")
    assert code == 0, errors[-3000:]
    assert "bf16 mixed precision" in printed
    assert lines(tmp_path / "bf16")[1]["loss"] != lines(alone)[1]["loss"]

    code, _, errors = launched("--dynamo_backend", "inductor", "train_vfp.py", *flags, tmp_path / "refused")
    assert code == 1
    assert "error: ACCELERATE_DYNAMO_BACKEND is INDUCTOR" in errors
    variable = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}
    code, _, errors = launched("train_vfp.py", *flags, tmp_path / "refused", **variable)
    assert code == 1
    assert "error: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 3 and --grad-accumulation is 4" in errors
    assert not (tmp_path / "refused").exists()
