import json
import shutil

import numpy as np
import pytest
import torch

import train_vfp
from common.config import parse
from common.errors import UserError
from common.inference import load_policy, load_script


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = [*tiny, "--run-dir", str(folder), "--steps", "2", "--save-every", "1"]
    train_vfp.main(parse(train_vfp.Config, argv, "train_vfp.py"))
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


@pytest.fixture
def policy(run_dir):
    return load_policy(run_dir, device="cpu", seed=0)


def observation(policy, size=(32, 32), seed=0):
    rng = np.random.default_rng(seed)
    frames = {camera: rng.integers(0, 255, (*size, 3), np.uint8) for camera in policy.spec.cameras}
    return {"images": frames, "state": rng.normal(size=policy.spec.state_dim).astype(np.float32)}


def test_a_chunk_has_the_promised_shape_and_units(policy):
    chunk = policy.act(observation(policy))
    assert chunk.shape == (policy.horizon, policy.spec.action_dim)
    assert chunk.dtype == np.float32
    low, high = policy.normalizer.action_range.numpy()
    wild = {**observation(policy), "state": np.full(policy.spec.state_dim, 1e4, np.float32)}
    clipped = policy.act(wild, clip=True)
    assert (clipped >= low).all()
    assert (clipped <= high).all()


def test_a_seed_repeats_the_noise_and_reset_restarts_it(policy):
    first, second = policy.act(observation(policy)), policy.act(observation(policy))
    assert not np.array_equal(first, second)
    policy.reset()
    assert np.array_equal(policy.act(observation(policy)), first)


def test_full_camera_names_and_frames_of_another_size_are_accepted(policy):
    flat = np.full((64, 96, 3), 100, np.uint8)  # a plain frame is the same at every size
    small = np.full((32, 32, 3), 100, np.uint8)
    state = observation(policy)["state"]
    full = {"images": {f"observation.images.cam_{c}": flat for c in policy.spec.cameras}, "state": state}
    short = {"images": dict.fromkeys(policy.spec.cameras, small), "state": state}
    chunk = policy.act(full)
    policy.reset()
    assert np.array_equal(policy.act(short), chunk)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o["images"].pop("left"), "cameras head, left, right"),
        (lambda o: o["images"].update(tail=o["images"]["left"]), "cameras"),
        (lambda o: o["images"].update(left=o["images"]["left"] / 255), "uint8"),
        (lambda o: o["images"].update(left=o["images"]["left"][..., 0]), "uint8"),
        (lambda o: o.update(state=np.zeros(7, np.float32)), "shape"),
        (lambda o: o["state"].__setitem__(0, np.nan), "NaN"),
    ],
)
def test_observations_that_would_move_a_robot_by_mistake_are_refused(policy, change, words):
    wrong = observation(policy)
    change(wrong)
    with pytest.raises(ValueError, match=words):
        policy.act(wrong)


def test_stepping_executes_part_of_each_chunk(policy):
    seen = observation(policy)
    chunks = [policy.act(seen) for _ in range(2)]
    policy.reset()
    actions = [policy.next_action(seen, execute_steps=3) for _ in range(6)]
    np.testing.assert_array_equal(actions, np.concatenate([chunks[0][:3], chunks[1][:3]]))
    with pytest.raises(ValueError, match="execute_steps"):
        policy.next_action(seen, execute_steps=policy.horizon + 1)


def test_temporal_ensembling_averages_what_chunks_say_about_now(policy):
    seen = observation(policy)
    chunks = [policy.act(seen) for _ in range(3)]
    policy.reset()
    actions = [policy.next_action(seen, ensemble=0.1) for _ in range(3)]
    weights = np.exp(-0.1 * np.arange(3))
    expected = sum(w * c[2 - i] for i, (w, c) in enumerate(zip(weights, chunks, strict=True))) / weights.sum()
    np.testing.assert_allclose(actions[0], chunks[0][0], rtol=1e-6)
    np.testing.assert_allclose(actions[2], expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_sampling_steps_can_be_chosen(policy):
    seen = observation(policy)
    chunks = []
    for steps in (1, 4):
        policy.reset()
        chunks.append(policy.act(seen, sample_steps=steps))
    assert not np.array_equal(*chunks)


def test_earlier_checkpoints_can_be_loaded_by_their_step(run_dir):
    assert load_policy(run_dir).trained_steps == 2
    assert load_policy(run_dir, checkpoint="1").trained_steps == 1
    with pytest.raises(UserError, match="step_0000001, step_0000002"):
        load_policy(run_dir, checkpoint="7")


def test_a_run_whose_newest_steps_were_deleted_falls_back(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    shutil.rmtree(copy / "checkpoints" / "step_0000002")
    assert load_policy(copy).trained_steps == 1


def damage(file, change):
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("action_decoder.safetensors", None),
        ("action_decoder.safetensors", lambda content: content[:200]),
        ("stats.safetensors", lambda content: b"x" * 50),
        ("policy.json", lambda content: content[:100]),
    ],
)
def test_damaged_checkpoints_are_named(run_dir, tmp_path, name, change):
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    damage(copy / "checkpoints" / "last" / "policy" / name, change)
    with pytest.raises(UserError, match="use another checkpoint"):
        load_policy(copy)


@pytest.mark.parametrize(
    "name", ["../evil.py", "/etc/train_x.py", "train_absent.py", "evaluate.py", "train_../x.py"]
)
def test_a_checkpoint_cannot_name_code_from_elsewhere(run_dir, tmp_path, name):
    copy = shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    file = copy / "checkpoints" / "last" / "policy" / "policy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "script": name}))
    with pytest.raises(UserError, match="not in"):
        load_policy(copy)


def test_scripts_are_found_by_name():
    assert load_script("train_vfp.py").Policy.__name__ == "Policy"


def test_nothing_that_loading_reads_can_run_code(run_dir):
    """What a policy is loaded from: no pickles, only safetensors and JSON."""
    folder = run_dir / "checkpoints" / "last" / "policy"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    for name in ("optimizer.bin", "random_states_0.pkl"):  # Accelerate's own: tensors and plain values alone
        from accelerate.utils.other import load

        load(run_dir / "checkpoints" / "last" / "state" / name, weights_only=True)
    assert torch.get_default_dtype() == torch.float32
