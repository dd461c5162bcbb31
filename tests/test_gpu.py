"""What only an NVIDIA GPU can show; skipped elsewhere. `python -m pytest tests/test_gpu.py` takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from running import lines, train
from test_inference import awake, observation
from torch.profiler import ProfilerActivity, profile

import train_cfg_vqvae
import train_mi
import train_naive_fm
import train_vfp
import train_vfp_moe
from common.data.samples import Ahead
from common.inference import load_policy
from common.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[1]
GPU, CPU = "cuda", "cpu"
POLICIES = (train_naive_fm, train_vfp, train_cfg_vqvae, train_vfp_moe)
ACT = """
import sys
from common.inference import load_policy
policy = load_policy(sys.argv[1], device=sys.argv[2], compile=True)
for _ in range(3):
    policy.act(policy.blank_observation())
"""


def named(script):
    return script.__name__


def away(one, other, policy):
    """The largest difference of two chunks, in normalized units."""
    return (np.abs(one - other) / policy.normalizer.action_scale.cpu().numpy()).max()


@pytest.mark.parametrize("script", POLICIES, ids=named)
def test_a_captured_chunk_is_the_eager_one_and_is_not_captured_again(
    script, tiny, tmp_path, accelerate_reset
):
    run = train(script, tiny, tmp_path / "run", "--steps", 1, "--max-delay", 2)
    eager, compiled = (awake(load_policy(run, device=GPU, seed=0, compile=c)) for c in (False, True))
    assert compiled._integration is not None
    for number in range(6):  # enough that train_vfp_moe uses both experts
        seen = observation(eager, seed=number)
        for prefix in (None, np.ones((number % 3, 3))):
            chunks = []
            for policy in (eager, compiled):
                policy.reset(number)
                chunks.append(policy.act(seen, prefix=prefix))
            assert away(*chunks, eager) < 1e-3
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen_by:
        compiled.act(seen)
    calls = {event.key: event.count for event in seen_by.key_averages()}
    assert calls.get("cudaGraphLaunch") == 1
    assert not [key for key in calls if "BeginCapture" in key]


def test_a_program_that_has_acted_with_a_captured_graph_ends_well(tiny, tmp_path, accelerate_reset):
    run = train(train_naive_fm, tiny, tmp_path / "run", "--steps", 1)
    done = subprocess.run([sys.executable, "-c", ACT, run, GPU], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stdout


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_vision_transformer_computes_what_it_computes_on_a_cpu(precision, tiny, tmp_path, accelerate_reset):
    """The size at which compiled bfloat16 once gave other actions."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=1024, num_hidden_layers=12, num_attention_heads=16)).save_pretrained(
        tmp_path / "vit"
    )
    flags = ["--backbone", tmp_path / "vit", "--image-size", 224, "--d-model", 512, "--num-heads", 8]
    run = train(train_vfp, tiny, tmp_path / "run", *flags, "--steps", 1)
    reference = load_policy(run, device=CPU, seed=0)
    for parameter in (p for p in reference.model.parameters() if not p.any()):  # hides what is before it
        torch.nn.init.normal_(parameter, std=0.02)
    seen = observation(reference)
    noise = torch.randn(1, reference.horizon, 3, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, device, compiled in (("CPU", CPU, False), ("GPU", GPU, False), ("compiled", GPU, True)):
        policy = load_policy(run, device=device, seed=0, compile=compiled)
        assert (policy._integration is not None) == compiled
        policy.model.load_state_dict(reference.model.state_dict())
        policy.precision = "no" if device == CPU else precision
        images = torch.stack([policy._images(seen["images"])]).to(device)
        proprio = policy.normalizer.proprio(torch.from_numpy(seen["state"]).to(device)[None, None])
        with torch.no_grad(), policy._precision():
            x = train_vfp.sample_actions(policy.model, images, proprio, policy.config, x_0=noise.to(device))
        found[name] = x.float().cpu()
    limit = {"no": 2e-3, "bf16": 0.05}[precision]
    for name in ("GPU", "compiled"):
        assert (found[name] - found["CPU"]).abs().max() < limit, name


@pytest.mark.parametrize("script", [*POLICIES, train_mi], ids=named)
def test_a_step_waits_for_nothing_and_its_batches_are_gathered_ahead(
    script, tiny, tmp_path, monkeypatch, accelerate_reset
):
    batches, rows = Run.micro_batches, []

    def watched(run):
        torch.cuda.set_sync_debug_mode("error" if run.step in (2, 3, 4) else "default")
        for batch in batches(run):
            assert isinstance(run._batches, Ahead)
            rows.append(batch.index)
            yield batch

    monkeypatch.setattr(Run, "micro_batches", watched)
    if script is train_mi:  # its estimate needs more episodes
        monkeypatch.setattr(script, "estimate", lambda *_: None)
        monkeypatch.setattr(script, "require_episodes", lambda *_: None)
    try:
        run = train(script, tiny, tmp_path / "run", "--steps", 6, "--log-every", 6, "--eval-every", 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({tuple(row.tolist()) for row in rows}) == 6
    assert json.loads((run / "config.json").read_text())["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("script", [train_vfp_moe, train_cfg_vqvae], ids=named)
def test_a_step_recorded_as_a_graph_learns_as_a_compiled_one(script, tiny, tmp_path, accelerate_reset):
    found = []
    for mode in ("default", "graphs"):
        torch._dynamo.reset()
        run = train(script, tiny, tmp_path / mode, "--steps", 8, "--log-every", 1, "--compile", mode)
        found.append([row["loss"] for row in lines(run)])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(*found, rtol=1e-3)  # the same random numbers


def test_codes_are_replaced_deterministically(tiny, tmp_path, accelerate_reset):
    flags = ("--steps", 5, "--code-window", 2, "--num-codes", 8, "--log-every", 1, "--deterministic")
    runs = [train(train_cfg_vqvae, tiny, tmp_path / name, *flags) for name in ("one", "other")]
    assert lines(runs[0]) == lines(runs[1])
    assert any(row.get("codes/replaced") for row in lines(runs[0]))
