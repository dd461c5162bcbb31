"""Relative actions: what stays absolute, poses in the current frame, actions that already are differences."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from running import train
from scipy.spatial.transform import Rotation
from test_inference import observation

import train_vfp
from common.config import parse
from common.data import ChunkDataset, DataConfig, open_dataset
from common.errors import UserError
from common.inference import load_policy
from common.normalize import Normalizer, in_frame

KEYS = ("obs/eef_pos", "obs/eef_quat", "obs/gripper_width")
STEPS = 40


def motion(rng):
    """A smooth motion of an end effector: positions (L, 3), unit quaternions (L, 4), opening (L, 1)."""
    t = np.linspace(0, 1, STEPS)[:, None]
    position = 0.3 * np.sin(t * rng.uniform(1, 4, 3) + rng.uniform(0, 6, 3))
    turns = Rotation.from_rotvec(np.sin(t * rng.uniform(1, 3, 3) + rng.uniform(0, 6, 3)))
    return position, turns.as_quat(), 0.04 * (t > 0.5)


def moved(position, quaternion, opening, shift, turn):
    """The same motion in a shifted and rotated room."""
    return turn.apply(position) + shift, (turn * Rotation.from_quat(quaternion)).as_quat(), opening


@pytest.fixture
def record(tmp_path):
    """Write motions, whose state is also the action by default, and open them."""

    def record(name, *episodes, keys=KEYS, **options):
        (tmp_path / name).mkdir()
        for number, parts in enumerate(episodes):
            with h5py.File(tmp_path / name / f"episode_{number}.hdf5", "w") as file:
                file.attrs["fps"] = 10
                file["obs/top"] = np.full((STEPS, 32, 32, 3), 90, np.uint8)
                for key, values in zip(KEYS, parts, strict=True):
                    file[key] = values
        options |= {"state_keys": KEYS, "action_keys": keys, "camera_keys": ("obs/top",)}
        return open_dataset(DataConfig((str(tmp_path / name),), cache_dir=tmp_path / "cache", **options))

    return record


def matrices(poses):
    """Poses (..., 9) -> matrices (..., 4, 4)."""
    found = np.zeros((*poses.shape[:-1], 4, 4))
    found[..., 3, 3], found[..., :3, 3] = 1, poses[..., :3]
    first, second = poses[..., 3:6], poses[..., 6:9]
    found[..., :3, :3] = np.stack([first, second, np.cross(first, second)], -1)
    return found


def random_poses(rng, *shape):
    rotations = Rotation.random(int(np.prod(shape)), rng=rng).as_matrix().reshape(*shape, 3, 3)
    columns = rotations[..., :2].swapaxes(-1, -2).reshape(*shape, 6)
    return np.concatenate([rng.normal(size=(*shape, 3)), columns], -1)


def test_poses_in_a_frame_are_products_of_matrices_and_come_back():
    rng = np.random.default_rng(0)
    poses, frame = random_poses(rng, 6, 5), random_poses(rng, 6)
    seen = in_frame(torch.from_numpy(poses), torch.from_numpy(frame))
    with torch.autocast("cpu", torch.bfloat16):  # as in validation
        assert torch.equal(in_frame(torch.from_numpy(poses), torch.from_numpy(frame)), seen)
    expected = np.linalg.inv(matrices(frame))[:, None] @ matrices(poses)
    np.testing.assert_allclose(matrices(seen.numpy()), expected, atol=1e-12)
    back = in_frame(seen, torch.from_numpy(frame), invert=True)
    np.testing.assert_allclose(back, poses, atol=1e-12)
    own = in_frame(torch.from_numpy(frame[:, None]), torch.from_numpy(frame))[:, 0]
    np.testing.assert_allclose(own, np.tile([0, 0, 0, 1, 0, 0, 0, 1, 0], (6, 1)), atol=1e-12)
    rough = torch.randn(6, 5, 9, dtype=torch.float64)  # like a network's predictions
    again = in_frame(in_frame(rough, torch.from_numpy(frame), invert=True), torch.from_numpy(frame))
    torch.testing.assert_close(again, rough)


def fitted(store, **options):
    dataset = ChunkDataset(store, range(store.num_episodes), 6, proprio_history=2, action_offset=1)
    return Normalizer.fit(dataset, relative=True, **options), dataset


def test_relative_poses_do_not_depend_on_where_the_robot_stands(record, capsys, tmp_path):
    rng = np.random.default_rng(1)
    motions = [motion(rng) for _ in range(3)]
    elsewhere = [
        moved(*parts, np.array([2, -1, 0.5]), Rotation.from_rotvec([0.4, 1, -2])) for parts in motions
    ]
    stores = [
        record(name, *m, rotation="quaternion->6d") for name, m in (("here", motions), ("there", elsewhere))
    ]
    capsys.readouterr()
    normalized = []
    for store in stores:
        normalizer, dataset = fitted(store, mask=("gripper",), relative_poses=True)
        batch = dataset.__getitems__(np.arange(len(dataset)))
        actions = normalizer.actions(batch.actions, batch.proprio)
        normalized.append(actions)
        restored = normalizer.unnormalize_actions(actions, batch.proprio)
        torch.testing.assert_close(restored, batch.actions, atol=2e-6, rtol=0)
        real = actions[~batch.is_pad][:, :9]
        torch.testing.assert_close(real.mean(0), torch.zeros(9), atol=1e-4, rtol=0)
        torch.testing.assert_close(real.std(0, correction=0), torch.ones(9), atol=1e-3, rtol=0)
        normalizer.save(tmp_path / "stats.safetensors")
        again = Normalizer.load(tmp_path / "stats.safetensors", "mean-std")
        assert torch.equal(again.actions(batch.actions, batch.proprio), actions)
    torch.testing.assert_close(*normalized, atol=1e-3, rtol=0)
    plain = [fitted(store)[0].statistics["action"]["std"] for store in stores]
    assert (plain[0] - plain[1]).abs().max() > 0.01  # absolute actions do depend on the room
    said = capsys.readouterr().out
    assert "--relative-actions: gripper_width stay absolute (--relative-mask)" in said
    assert "--relative-poses: eef_pos.0, eef_pos.1, eef_pos.2 and eef_quat.0 are one pose" in said


def test_a_policy_of_relative_poses_takes_and_gives_them_as_recorded(
    record, tiny, tmp_path, accelerate_reset
):
    rng = np.random.default_rng(2)
    record("data", motion(rng), motion(rng))
    keys = ["--state-keys", *KEYS, "--action-keys", *KEYS, "--camera-keys", "obs/top"]
    flags = ["--dataset", tmp_path / "data", *keys, "--rotation", "quaternion->6d", "--action-offset", 1]
    flags += ["--relative-actions", "--relative-poses", "--max-delay", 2, "--steps", 2]
    run_dir = train(train_vfp, tiny, tmp_path / "run", *flags)
    policy = load_policy(run_dir, device="cpu", seed=0)
    assert policy.normalizer.poses == ((0, 0),)
    assert policy.normalizer.relative_to.tolist() == [-1] * 10
    position, quaternion, opening = motion(rng)
    state = np.concatenate([position[0], quaternion[0], opening[0]]).astype(np.float32)
    prefix = np.concatenate([position, quaternion, opening], 1)[1:3].astype(np.float32)
    prefix[:, 3:7] *= -1  # the same rotations
    chunk = policy.act({"images": observation(policy)["images"], "state": state}, prefix=prefix)
    assert np.array_equal(chunk[:2], prefix)
    np.testing.assert_allclose(np.linalg.norm(chunk[:, 3:7], axis=1), 1, atol=1e-5)
    # An untrained policy predicts little more than noise around the mean: it stays near the current pose.
    assert np.abs(chunk[:, :3] - state[:3]).max() < 1
    assert ((chunk[1:, 3:7] * chunk[:-1, 3:7]).sum(1) > 0).all()  # no quaternion flips its sign

    # The checkpoint records what is relative: a later change of the default does not affect an old run.
    stats = run_dir / "checkpoints" / "last" / "policy" / "stats.safetensors"
    before = stats.read_bytes()
    train(train_vfp, [], None, "--resume", run_dir, "--steps", 3)
    assert stats.read_bytes() == before


def test_what_stays_absolute_is_chosen_by_name(record, capsys):
    store = record("data", motion(np.random.default_rng(3)))
    assert fitted(store)[0].relative_to.tolist() == list(range(8))
    assert "stay absolute" not in capsys.readouterr().out
    assert fitted(store, mask=("GRIPPER", "pos.2"))[0].relative_to.tolist() == [0, 1, -1, 3, 4, 5, 6, -1]
    assert "eef_pos.2, gripper_width stay absolute" in capsys.readouterr().out
    with pytest.raises(UserError, match="--relative-mask thumb: no action dimension has this in its name"):
        fitted(store, mask=("thumb",))
    without = record("other", motion(np.random.default_rng(4)), keys=KEYS[:2])
    assert fitted(without, mask=("gripper",))[0].relative_to.tolist() == list(range(7))


def test_what_the_state_lacks_stays_absolute_and_is_said(record, capsys):
    store = record("data", motion(np.random.default_rng(9)))
    others = [f"target.{i}" for i in range(7)]
    some = dataclasses.replace(store, action_names=("eef_pos.0", *others[1:], "gripper_width"))
    assert fitted(some, mask=("gripper", "target.6"))[0].relative_to.tolist() == [0, *[-1] * 7]
    said = capsys.readouterr().out
    assert f"--relative-actions: {', '.join(others[1:6])} stay absolute (the state has none of" in said
    none = dataclasses.replace(store, action_names=(*others, "gripper_width"))
    with pytest.raises(
        UserError, match=r"no effect: of the action \(target.0, .* the state \(eef_pos.0, .*keys"
    ):
        fitted(none, mask=("gripper",))


def test_poses_that_cannot_be_relative_are_named(record):
    parts = motion(np.random.default_rng(5))
    turned = record("a", parts, keys=(KEYS[1], KEYS[0]), rotation="quaternion->6d")
    with pytest.raises(UserError, match=r"eef_quat.0 has no position in the three dimensions before it"):
        fitted(turned, relative_poses=True)
    with pytest.raises(UserError, match=r"--rotation finds no rotation in the action"):
        fitted(record("b", parts, keys=KEYS[:1], rotation="quaternion->6d"), relative_poses=True)
    absolute = record("c", parts, rotation="quaternion->6d")
    with pytest.raises(UserError, match=r"the pose of eef_quat.0 is not in the state"):
        fitted(absolute, mask=("eef",), relative_poses=True)
    for flags in (["--relative-poses"], ["--relative-poses", "--relative-actions"]):
        with pytest.raises(UserError, match="--relative-poses needs --relative-actions, and --rotation"):
            parse(train_vfp.Config, flags, "")


def test_actions_that_are_differences_already_are_said(record, capsys):
    store = record("data", motion(np.random.default_rng(6)), motion(np.random.default_rng(7)))
    capsys.readouterr()
    fitted(store)
    assert "already" not in capsys.readouterr().out
    state = store.state.astype(np.float64)
    action = np.roll(state, -1, axis=0) - state
    action[STEPS - 1 :: STEPS] = 0
    rng = np.random.default_rng(8)
    for scale in (1.0, 20.0):  # in units of the state, or of the controller
        noisy = scale * (action + 0.3 * action.std(0) * rng.normal(size=action.shape))
        changes = dataclasses.replace(store, action=noisy.astype(np.float32))
        fitted(changes, mask=("gripper",))
        said = capsys.readouterr().out
        assert (
            "warning: the action seems to hold differences already, in eef_pos.0, eef_pos.1, eef_pos.2"
            in said
        )
        assert "gripper_width:" not in said
    dataset = ChunkDataset(changes, [0], 6)
    Normalizer.fit(dataset)
    assert "hold differences" not in capsys.readouterr().out  # absolute actions may be velocities
    Normalizer.fit(ChunkDataset(changes, [0], 6, hold=4))
    assert "with --hold a robot would go on moving" in capsys.readouterr().out
    Normalizer.fit(ChunkDataset(store, [0], 6, hold=4))
    assert "with --hold" not in capsys.readouterr().out
