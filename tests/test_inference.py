import dataclasses
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hdf5_factory import make_hdf5
from running import SMALL, train
from torch.utils._python_dispatch import TorchDispatchMode

import train_cfg_vqvae
import train_naive_fm
import train_vfp
import train_vfp_moe
from common import flow, vision
from common.checkpoint import PolicySpec, seal
from common.config import parse
from common.data.rotation import Rotations
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


def test_cameras_whose_short_names_could_be_shortened_again(policy):
    spec = dataclasses.replace(policy.spec, cameras=("head_image", "obs_left_image", "right"))
    policy.spec = spec
    frame = np.full((32, 32, 3), 100, np.uint8)
    assert policy._images(dict.fromkeys(spec.cameras, frame)).shape == (3, 3, 32, 32)


def test_two_frames_for_one_camera_are_refused(policy):
    frames = observation(policy)["images"]
    frames["cam_" + policy.spec.cameras[0]] = next(iter(frames.values()))
    with pytest.raises(ValueError, match="the policy needs the cameras"):
        policy._images(frames)


def test_a_camera_that_goes_by_its_full_name_is_found_by_its_key(policy):
    policy.spec = dataclasses.replace(policy.spec, cameras=("images_cam_high", "images_high_rgb", "left"))
    frame = np.full((32, 32, 3), 100, np.uint8)
    frames = dict.fromkeys(("images/cam_high", "images/high_rgb", "images/cam_left"), frame)
    assert policy._images(frames).shape == (3, 3, 32, 32)


def test_a_seed_gives_each_episode_noise_of_its_own_that_can_be_repeated(policy):
    first, second = policy.act(observation(policy)), policy.act(observation(policy))
    assert not np.array_equal(first, second)
    policy.reset()
    assert not np.array_equal(policy.act(observation(policy)), first)
    policy.reset(0)
    assert np.array_equal(policy.act(observation(policy)), first)


def test_full_camera_names_and_frames_of_another_size_are_accepted(policy):
    flat = np.full((64, 96, 3), 100, np.uint8)  # a plain frame is the same at every size
    small = np.full((32, 32, 3), 100, np.uint8)
    state = observation(policy)["state"]
    full = {"images": {f"observation.images.cam_{c}": flat for c in policy.spec.cameras}, "state": state}
    short = {"images": dict.fromkeys(policy.spec.cameras, small), "state": state}
    chunk = policy.act(full)
    policy.reset(0)
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
    policy.reset(0)
    actions = [policy.next_action(seen, execute_steps=3) for _ in range(6)]
    np.testing.assert_array_equal(actions, np.concatenate([chunks[0][:3], chunks[1][:3]]))
    with pytest.raises(ValueError, match="execute_steps"):
        policy.next_action(seen, execute_steps=policy.horizon + 1)


def test_a_state_far_from_what_was_recorded_is_said_once_an_episode(policy):
    seen = observation(policy)
    statistics = policy.normalizer.statistics["state"]
    high, std = statistics["max"][1].item(), statistics["std"][1].item()
    near, far = seen["state"].copy(), seen["state"].copy()
    near[1], far[1] = high + 2.9 * std, high + 7 * std
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.act({**seen, "state": near})
    for _ in range(2):
        policy.reset()
        with pytest.warns(
            UserWarning, match=rf"{policy.spec.state_names[1]} is 7 standard deviations outside"
        ):
            policy.act({**seen, "state": far})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            policy.act({**seen, "state": far})


def test_pictures_are_taken_only_when_a_chunk_is_due(policy):
    seen, taken = observation(policy), []
    expected = [policy.next_action(seen, execute_steps=3) for _ in range(7)]
    policy.reset(0)
    for step in range(7):
        images = lambda step=step: taken.append(step) or seen["images"]  # noqa: E731
        action = policy.next_action({"images": images, "state": seen["state"]}, execute_steps=3)
        np.testing.assert_array_equal(action, expected[step])
    assert taken == [0, 3, 6]


def test_a_batch_of_observations_gives_the_chunks_of_each(policy):
    rng = np.random.default_rng(0)
    several = []
    for _ in range(3):
        images = {camera: rng.integers(0, 255, (32, 32, 3), np.uint8) for camera in policy.spec.cameras}
        several.append({"images": images, "state": rng.normal(size=policy.spec.state_dim)})
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = policy.act_batch(several, generators=generators)
    for chunk, one, seed in zip(together, several, (5, 6, 7), strict=True):
        alone = policy.act_batch([one], generators=[torch.Generator().manual_seed(seed)])[0]
        np.testing.assert_allclose(chunk, alone, rtol=1e-4, atol=1e-5)


def test_temporal_ensembling_averages_what_chunks_say_about_now(policy):
    seen = observation(policy)
    chunks = [policy.act(seen) for _ in range(3)]
    policy.reset(0)
    actions = [policy.next_action(seen, ensemble=0.1) for _ in range(3)]
    weights = np.exp(-0.1 * np.arange(3))
    expected = sum(w * c[2 - i] for i, (w, c) in enumerate(zip(weights, chunks, strict=True))) / weights.sum()
    np.testing.assert_allclose(actions[0], chunks[0][0], rtol=1e-6)
    np.testing.assert_allclose(actions[2], expected, rtol=1e-5, atol=1e-6)


def test_ensembles_average_rotations_as_rotations(policy, monkeypatch):
    angles = iter((3.1, -3.1))  # nearly the same half turn

    def act_batch(observations, *_):
        yaw = next(angles)
        return np.repeat(np.array([[[0, 0, yaw]]], np.float32), policy.horizon, axis=1)

    monkeypatch.setattr(policy, "act_batch", act_batch)
    rotations = Rotations("euler", (0,), ("roll", "pitch", "yaw"))
    monkeypatch.setattr(policy, "spec", replace(policy.spec, action_rotations=rotations))
    given = [policy.next_action(observation(policy), ensemble=0.0) for _ in range(2)]
    assert abs(given[1][2]) == pytest.approx(np.pi, abs=1e-4)
    policy.reset()


@pytest.mark.parametrize("options", [{}, {"ensemble": 0.1}, None])
def test_rotations_continue_the_numbers_of_the_last_action(policy, monkeypatch, options):
    rotations = Rotations("euler", (0,), ("roll", "pitch", "yaw"))
    rolls = iter(3 + 0.02 * np.arange(30))  # goes through pi

    def sample(*_):
        return torch.from_numpy(rotations.encode(np.array([[[next(rolls), 0, 0]] * policy.horizon])))

    monkeypatch.setattr(policy, "sample", sample)
    monkeypatch.setattr(policy, "spec", replace(policy.spec, action_rotations=rotations))
    act = policy.act if options is None else lambda seen: policy.next_action(seen, **options)[None]
    given = np.stack([act(observation(policy))[0] for _ in range(30)])
    assert given[-1, 0] > np.pi
    assert np.abs(np.diff(given, axis=0)).max() < 0.1
    policy.reset()
    rolls = iter([3.3])
    assert act(observation(policy))[0, 0] == pytest.approx(3.3 - 2 * np.pi, abs=1e-5)  # nothing to continue
    policy.reset()


def test_the_number_of_sampling_steps_can_be_chosen(policy):
    seen = observation(policy)
    chunks = []
    for steps in (1, 4):
        policy.reset(0)
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
    seal(copy / "checkpoints" / "last")
    with pytest.raises(UserError, match="not in"):
        load_policy(copy)


def test_scripts_are_found_by_name():
    assert load_script("train_vfp.py").Policy.__name__ == "Policy"


def test_nothing_that_loading_reads_can_run_code(run_dir):
    """Policies are loaded without pickles, only from safetensors and JSON."""
    folder = run_dir / "checkpoints" / "last" / "policy"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    for name in ("optimizer.bin", "random_states_0.pkl"):  # Accelerate's own: only tensors and plain values
        from accelerate.utils.other import load

        load(run_dir / "checkpoints" / "last" / "state" / name, weights_only=True)
    assert torch.get_default_dtype() == torch.float32


# Policies that see earlier states, and act relative to the current one


def trained(tiny, folder, *flags):
    argv = [*tiny, *flags, "--run-dir", str(folder), "--steps", "2", "--save-every", "2"]
    train_vfp.main(parse(train_vfp.Config, argv, "train_vfp.py"))
    return load_policy(folder, device="cpu", seed=0)


@pytest.fixture
def relative_policy(tiny, tmp_path, accelerate_reset):
    flags = "--relative-actions --proprio-history 3 --action-offset 2 --horizon 8"
    return trained(tiny, tmp_path / "run", *flags.split())


def test_relative_actions_come_out_absolute(relative_policy):
    policy, seen = relative_policy, observation(relative_policy)
    states = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    chunk = policy.act({**seen, "state": states})
    proprio = torch.from_numpy(states)[None]
    policy.reset(0)
    images = policy._images(seen["images"])[None]
    normalized = train_vfp.sample_actions(
        policy.model, images, policy.normalizer.proprio(proprio), policy.config, None, policy._generator
    )[0].numpy()
    scale, offset = policy.normalizer.action_scale.numpy(), policy.normalizer.action_offset.numpy()
    np.testing.assert_allclose(chunk, normalized * scale + offset + states[-1], rtol=1e-5, atol=1e-5)
    low, high = policy.normalizer.action_range.numpy()
    clipped = policy.act({**seen, "state": states + 1000}, clip=True)
    assert ((low <= clipped) & (clipped <= high)).all()


def test_a_policy_with_a_memory_asks_for_it(relative_policy):
    with pytest.raises(ValueError, match=r"\(3, 3\), oldest first, got \(3,\)"):
        relative_policy.act(observation(relative_policy))
    with pytest.raises(ValueError, match=r"state must have shape \(3,\), got \(3, 3\)"):
        relative_policy.next_action({**observation(relative_policy), "state": np.zeros((3, 3))})


def test_next_action_remembers_states_and_waits_for_the_first_action(relative_policy, monkeypatch):
    policy, asked = relative_policy, []

    def act_batch(observations, sample_steps, clip, generators):
        (seen,) = observations
        asked.append(seen["state"].copy())
        start = seen["state"][-1, 0] + 2  # the state counts steps, and chunks begin two steps ahead
        return np.repeat(np.arange(start, start + 8, dtype=np.float32)[None, :, None], 3, axis=2)

    monkeypatch.setattr(policy, "act_batch", act_batch)
    frames = observation(policy)["images"]
    given = []
    for step in range(20):
        state = np.full(3, step, np.float32)
        given.append(policy.next_action({"images": frames, "state": state}, execute_steps=6)[0])
    assert given == [2, 2, *range(2, 20)]  # the action of step 2, until it is due
    assert [seen[:, 0].tolist() for seen in asked] == [[0, 0, 0], [4, 5, 6], [10, 11, 12], [16, 17, 18]]
    with pytest.raises(ValueError, match=r"execute_steps must lie in 1..6, got 7"):
        policy.next_action({"images": frames, "state": state}, execute_steps=7)
    policy.reset(0)
    ensembled = [
        policy.next_action({"images": frames, "state": np.full(3, step)}, ensemble=0.1)[0]
        for step in range(12)
    ]
    np.testing.assert_allclose(ensembled, [2, 2, *range(2, 12)], rtol=1e-6)
    policy.reset(0)
    asked.clear()
    policy.next_action({"images": frames, "state": np.full(3, 7)})
    assert asked[0][:, 0].tolist() == [7, 7, 7]  # the previous episode is forgotten


def test_rotations_are_taken_and_given_as_recorded(tiny, tmp_path, accelerate_reset):
    import h5py

    root = make_hdf5(tmp_path / "d", (12, 9), ("head", "left", "right"), "robomimic")
    rng = np.random.default_rng(0)
    with h5py.File(root / "demos.hdf5", "a") as file:
        for demo, steps in (("demo_0", 12), ("demo_1", 9)):
            quaternions = rng.normal([0, 0, 0, 3], 1, (steps, 4))
            group = file[f"data/{demo}"]
            group["obs/robot0_eef_quat"] = quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)
            del group["actions"]
            group["actions"] = np.concatenate([group["obs/robot0_eef_pos"], group["obs/robot0_eef_quat"]], 1)
    keys = [*(f"robot0_eef_pos.{i}" for i in range(3)), *(f"robot0_eef_quat.{i}" for i in range(4))]
    flags = ["--rotation", "3:quaternion->6d", "--dataset", str(root)]
    with pytest.raises(UserError, match="a rotation has 4"):
        trained(tiny, tmp_path / "wrong", *flags)
    flags = ["--dataset", str(root), "--rotation", "quaternion->6d", "--normalization", "min-max"]
    policy = trained(tiny, tmp_path / "run", *flags)
    assert policy.spec.state_rotations.recorded == tuple(keys)
    assert not policy.spec.action_rotations.starts  # the name "actions.3" does not show a rotation
    assert policy.state_dim == 7
    frames = observation(policy)["images"]
    state = np.array([1, 2, 3, 0.1, 0.2, 0.3, 0.9], np.float32)
    chunk = policy.act({"images": frames, "state": state})
    policy.reset(0)
    negative = np.concatenate([state[:3], -state[3:]])  # the same rotation
    np.testing.assert_allclose(policy.act({"images": frames, "state": negative}), chunk, atol=1e-5)
    with pytest.raises(ValueError, match=r"state must have shape \(7,\), got \(9,\)"):
        policy.act({"images": frames, "state": np.zeros(9)})

    flags = ["--state-keys", "obs/robot0_eef_quat", "--action-keys", "obs/robot0_eef_quat", *flags]
    policy = trained(tiny, tmp_path / "both", *flags, "--action-offset", "1", "--relative-actions")
    assert policy.spec.action_dim == 6
    chunk = policy.act({"images": frames, "state": state[3:]})
    assert chunk.shape == (policy.horizon, 4)
    np.testing.assert_allclose(np.linalg.norm(chunk, axis=1), 1, atol=1e-5)


# Faster


def awake(policy):
    """Nonzero weights, as after training, so that all of them matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    policy.reset(0)
    return policy


def tiny_run(script, tiny, folder):
    return train(script, tiny, folder, "--steps", "1")


SCRIPTS = (train_naive_fm, train_cfg_vqvae, train_vfp_moe)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_compiled_components_give_the_same_chunks(tiny, tmp_path, script, traced_only, accelerate_reset):
    """Test tracing with an eager backend: compiling to machine code takes minutes, see the slow test."""
    run = train(script, tiny, tmp_path / "run", "--steps", "1", "--max-delay", "2")
    stats = torch._dynamo.utils.counters["stats"]
    eager, traced = (awake(load_policy(run, device="cpu", seed=0, compile=c)) for c in (False, True))
    graphs = stats["unique_graphs"]
    # One graph each: backbone, embedder, the gate of experts; with and without a prefix, the integration and
    # the prior of a latent.
    assert graphs == {train_naive_fm: 4, train_cfg_vqvae: 6, train_vfp_moe: 7}[script]
    for number in range(6):  # enough that train_vfp_moe uses both experts
        seen = observation(eager, seed=number)
        for prefix in (None, np.ones((number % 3, 3))):
            for policy in (traced, eager):
                policy.reset(number)
            chunks = [policy.act(seen, prefix=prefix) for policy in (traced, eager)]
            np.testing.assert_allclose(*chunks, rtol=1e-4, atol=1e-5)
    assert stats["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    traced.act(seen, 5)
    assert stats["unique_graphs"] == graphs + 1  # the integration with five steps


@pytest.fixture
def traced_only(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile(f, **(given | {"backend": "eager"})))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_a_policy_that_cannot_be_compiled_runs_as_it_is(policy, run_dir, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *_, **given: fail)
    slow = load_policy(run_dir, device="cpu", seed=0, compile=True)
    assert "runs without being compiled (no compiler here)" in capsys.readouterr().out
    np.testing.assert_array_equal(slow.act(observation(policy)), policy.act(observation(policy)))


@pytest.mark.parametrize(("wrong", "said"), [(0.005, False), (0.02, True), (float("nan"), True)])
def test_a_policy_that_is_compiled_to_something_else_runs_as_it_is(
    policy, run_dir, monkeypatch, capsys, wrong, said
):
    monkeypatch.setattr(torch, "compile", lambda function, **given: function)
    monkeypatch.setattr(flow, "compile_integration", lambda _: lambda *given: integrated(*given) + wrong)
    integrated = flow._integrate
    loaded = load_policy(run_dir, device="cpu", seed=0, compile=True)
    assert ("its actions would be wrong" in capsys.readouterr().out) == said
    assert (loaded._integration is None) == said
    if said:
        np.testing.assert_array_equal(loaded.act(observation(policy)), policy.act(observation(policy)))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_compiled_code_gives_the_same_chunks(tiny, tmp_path, script, accelerate_reset):
    torch._dynamo.reset()
    run = tiny_run(script, tiny, tmp_path / "run")
    eager, compiled = (awake(load_policy(run, device="cpu", seed=0, compile=c)) for c in (False, True))
    scale = eager.normalizer.action_scale.numpy()
    for number in range(6):
        seen = observation(eager, seed=number)
        for policy in (compiled, eager):
            policy.reset(number)
        assert (np.abs(compiled.act(seen) - eager.act(seen)) / scale).max() < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_half_precision_changes_chunks_by_little(tiny, tmp_path, script, accelerate_reset):
    """They change, by at most a twentieth of the actions' standard deviation."""
    run = tiny_run(script, tiny, tmp_path / "run")
    full, half = (awake(load_policy(run, device="cpu", seed=0, precision=p)) for p in ("no", "bf16"))
    scale = full.normalizer.action_scale.numpy()
    for number in range(3):
        seen = observation(full, seed=number)
        chunk, rounded = full.act(seen), half.act(seen)
        assert rounded.dtype == np.float32
        assert 0 < (np.abs(rounded - chunk) / scale).max() < 0.05


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for its device: reading values, value-dependent shapes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten._unique2)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_no_sampler_waits_for_its_device(script, tiny):
    """`meta` stands in for another device: it has no values, so reading one fails."""
    argv = [*tiny, *SMALL.get(script.__name__, "").split()]
    config = parse(script.Config, argv, "")
    policy = script.Policy(config, PolicySpec(("head",), (32, 32), ("x",), ("x",), 10.0)).eval()

    def waits(device, batch):
        images = torch.zeros(batch, 1, 3, 32, 32, dtype=torch.uint8)
        if device == "meta":  # has no autocast, which the backbone turns off
            images = vision.features([policy.backbone], vision.to_float(images)).unsqueeze(2).to(device)
        proprio, x_0 = torch.zeros(batch, 1, 1, device=device), torch.zeros(batch, 4, 1, device=device)
        with Waits() as mode:
            chunks = script.sample_actions(policy.to(device), images, proprio, config, x_0=x_0)
        assert chunks.shape == (batch, 4, 1)
        return mode.count

    assert (waits("cpu", 2) > 0) == (script is train_vfp_moe)  # a CPU reads the experts' numbers at no cost
    assert waits("meta", 1) == 0
