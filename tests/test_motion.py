"""Motion: idle dimensions and their scale, idle ends of episodes, jumps, stuck commands."""

from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from common.data import ChunkDataset, DataConfig, open_dataset
from common.data.motion import idle_dimensions, idle_ends, oddities
from common.errors import UserError
from common.normalize import Normalizer

STEPS, FPS = 120, 10
EPISODES = np.repeat(np.arange(4), 100)


def smooth(rng, scale=1.0, offset=0.0):
    """Motion like a robot's: a few slow sines."""
    t = np.linspace(0, 8, 400)
    return offset + scale * sum(np.sin(t * f + rng.uniform(0, 6)) for f in (1.0, 1.7, 2.9)) / 3


def columns(**named):
    return list(named), np.stack(list(named.values()), axis=1).astype(np.float32)


def test_dimensions_of_noise_are_told_from_slow_small_and_rare_ones():
    rng = np.random.default_rng(0)
    names, values = columns(
        elbow=smooth(rng),
        wrist=smooth(rng, 0.4),
        jitter=0.3 + rng.normal(0, 1e-5, 400),
        jitter_at_zero=rng.normal(0, 1e-5, 400),
        encoder_tick=1.2 + 1e-4 * (np.arange(400) > 250),
        gripper_in_meters=0.02 + 0.02 * (np.arange(400) % 100 > 60),
        rarely=1.0 * (np.arange(400) == 120),
        constant=np.full(400, 0.7),
        slow=0.02 * np.linspace(0, 1, 400),
    )
    idle = idle_dimensions(values, EPISODES)
    found = {name for name, is_idle in zip(names, idle, strict=True) if is_idle}
    assert found == {"jitter", "jitter_at_zero", "encoder_tick"}


def test_radians_beside_millimetres_are_not_idle():
    rng = np.random.default_rng(1)
    _, values = columns(
        x=smooth(rng, 150, 300), y=smooth(rng, 90), yaw=smooth(rng, 0.2), open=smooth(rng, 0.5)
    )
    assert not idle_dimensions(values, EPISODES).any()


def test_an_idle_arm_beside_a_moving_one_is_idle_in_all_its_joints():
    rng = np.random.default_rng(2)
    moving = [smooth(rng, 0.5) for _ in range(7)]
    resting = [0.1 * i + rng.normal(0, 1e-5, 400) for i in range(7)]
    idle = idle_dimensions(np.stack(moving + resting, axis=1), EPISODES)
    assert idle.tolist() == [False] * 7 + [True] * 7


@pytest.mark.parametrize("values", [np.zeros((400, 3)), np.full((400, 1), 2.5)])
def test_where_nothing_moves_nothing_is_idle(values):
    assert not idle_dimensions(values, EPISODES).any()


@pytest.fixture
def record(tmp_path):
    """Write episodes of HDF5 whose state and action are `values`, (L, D), and open them."""

    def record(*episodes, images=None, **options):
        for number, values in enumerate(episodes):
            with h5py.File(tmp_path / f"episode_{number}.hdf5", "w") as file:
                file.attrs["fps"] = FPS
                file["observations/qpos"] = file["action"] = values
                pictures = np.full((len(values), 8, 8, 3), 90, np.uint8) if images is None else images
                file["observations/images/top"] = pictures
        config = DataConfig(dataset=(str(tmp_path),), cache_dir=tmp_path / "cache", val_fraction=0, **options)
        return open_dataset(config)

    return record


def reach(rng, steps=STEPS):
    """A motion of three joints from one pose to another, without a pause."""
    share = np.linspace(0.05, 1, steps)[:, None]
    return (rng.uniform(0.5, 1, 3) * share + 0.002 * rng.normal(size=(steps, 3))).astype(np.float32)


@pytest.mark.parametrize("mode", ["mean-std", "min-max", "quantile"])
def test_the_scale_of_an_idle_joint_has_a_floor_and_is_said(record, capsys, mode):
    rng = np.random.default_rng(3)
    values = reach(rng)
    values[:, 2] = 0.3 + rng.normal(0, 1e-5, STEPS)
    dataset = ChunkDataset(record(values), [0], 4, action_offset=1)
    usual = np.median(values[:-1, :2].std(0))
    capsys.readouterr()

    fitted = Normalizer.fit(dataset, mode)
    said = capsys.readouterr().out
    assert "joint_2" in said
    assert "joint_0" not in said
    at, off = torch.tensor([[0.5, 0.5, 0.30], [0.5, 0.5, 0.31]])
    distance = (fitted.proprio(off) - fitted.proprio(at))[2]
    torch.testing.assert_close(distance.item(), 0.01 / (0.1 * usual), rtol=1e-3, atol=0)
    assert fitted.statistics["state"]["std"][2] < 2e-5  # the statistics do not change

    plain = Normalizer.fit(dataset, mode, idle_floor=0.0)
    assert capsys.readouterr().out == ""
    assert plain.proprio(off)[2] > 100
    for part in ("state_scale", "action_scale"):
        assert torch.equal(getattr(plain, part)[:2], getattr(fitted, part)[:2])


@pytest.mark.parametrize("mode", ["mean-std", "min-max", "quantile"])
def test_the_difference_of_a_constant_command_from_a_jittering_state_has_a_floor(record, capsys, mode):
    rng = np.random.default_rng(3)
    values = reach(rng)
    values[:, 1:] = 0.3
    state = values.copy()
    state[:, 1] += rng.normal(0, 1e-5, STEPS)  # joint 2 does not even jitter
    dataset = ChunkDataset(replace(record(values), state=state), [0], 4, action_offset=1)
    capsys.readouterr()
    fitted = Normalizer.fit(dataset, mode, relative=True)
    assert "action: nothing but noise in joint_1; scaled by at least" in capsys.readouterr().out
    usual = fitted.statistics["action"]["spread"][0].item()
    assert fitted.action_scale[1:].tolist() == pytest.approx([0.1 * usual, 1])
    plain = Normalizer.fit(dataset, mode, relative=True, idle_floor=0.0)
    assert plain.action_scale[1] < 1e-4
    assert plain.action_scale[0] == fitted.action_scale[0]


def test_the_floor_is_saved_with_the_statistics(record, tmp_path):
    rng = np.random.default_rng(4)
    values = reach(rng)
    values[:, 1] = rng.normal(0, 1e-5, STEPS)
    fitted = Normalizer.fit(ChunkDataset(record(values), [0], 4))
    fitted.save(tmp_path / "stats.safetensors")
    loaded = Normalizer.load(tmp_path / "stats.safetensors", "mean-std")
    assert torch.equal(loaded.state_scale, fitted.state_scale)
    assert torch.equal(loaded.action_scale, fitted.action_scale)


def test_preallocated_zeros_are_found_and_trimmed(record, capsys):
    rng = np.random.default_rng(5)
    moves = [reach(rng, 40), reach(rng, 30)]
    padded = [np.concatenate([moves[0], np.zeros((12, 3))]), np.concatenate([np.zeros((5, 3)), moves[1]])]
    store = record(*padded)
    lines = "\n".join(oddities(store))
    assert "episode 0 ends with 12 blank steps" in lines
    assert "episode 1 begins with 5 blank steps" in lines

    trimmed = record(*padded, trim_idle=True)
    assert "17 of 87 steps" in capsys.readouterr().out
    np.testing.assert_array_equal(trimmed.state, np.concatenate(moves))
    assert trimmed.episode_starts.tolist() == [0, 40, 70]
    assert trimmed.fingerprint != store.fingerprint
    assert record(*padded, trim_idle=True).fingerprint == trimmed.fingerprint


def test_black_frames_at_the_end_are_blank_whatever_the_numbers_say(record):
    values = reach(np.random.default_rng(6), 30)
    images = np.full((30, 8, 8, 3), 90, np.uint8)
    images[26:] = 3
    images[4] = 0  # one dropped frame in the middle
    ends = idle_ends(record(values, images=images))
    assert (ends.head.tolist(), ends.tail.tolist(), ends.blank_tail.tolist()) == ([0], [4], [4])


def test_a_robot_at_rest_is_trimmed_to_one_step_and_its_frames_follow(record):
    rng = np.random.default_rng(7)
    move = reach(rng, 40)
    rest = move[-1] + rng.normal(0, 1e-5, (20, 3)).astype(np.float32)
    values = np.concatenate([np.repeat(move[:1], 15, axis=0), move, rest])
    images = np.repeat(np.arange(75, dtype=np.uint8)[:, None] + 20, 192, axis=1).reshape(75, 8, 8, 3)
    trimmed = record(values, images=images, trim_idle=True)
    np.testing.assert_array_equal(trimmed.state, values[15:55])
    assert trimmed.images(np.arange(40))[:, 0, 0, 0, 0].tolist() == list(range(35, 75))
    chunks, is_pad = ChunkDataset(trimmed, [0], 4).chunks(np.array([38]), 0)
    assert is_pad.tolist() == [[False, False, True, True]]
    np.testing.assert_array_equal(chunks[0], values[[53, 54, 54, 54], 0])


def test_a_short_rest_stays(record):
    move = reach(np.random.default_rng(8), 40)
    values = np.concatenate([move, np.repeat(move[-1:], 3, axis=0)])
    assert idle_ends(record(values)).tail.tolist() == [0]


def test_a_lost_reading_does_not_hide_a_gripper_that_closes_at_the_end():
    gripper = np.concatenate([np.full(60, 0.08), np.linspace(0.08, 0.0, 20)])
    gripper[10] = 1e3
    arm = np.pad(reach(np.random.default_rng(16), 60), ((0, 20), (0, 0)), "edge")
    values = np.hstack([arm, gripper[:, None]])
    store = SimpleNamespace(
        **{"state": values, "action": values, "num_episodes": 1, "fps": FPS},
        episode_starts=np.array([0, 80]),
        images=lambda rows: torch.full((1, 1, 3, 8, 8), 90),
    )
    assert idle_ends(store).tail.tolist() == [0]


def test_an_episode_in_which_nothing_moves_is_left_out_whole(record, capsys):
    move = reach(np.random.default_rng(9), 40)
    trimmed = record(move, np.repeat(move[:1], 30, axis=0), trim_idle=True)
    assert trimmed.episode_indices.tolist() == [0]
    assert "1 episodes, in which nothing moves" in capsys.readouterr().out


def test_a_dataset_in_which_nothing_moves_cannot_be_trimmed(record):
    with pytest.raises(UserError, match="--trim-idle: nothing moves"):
        record(np.full((30, 3), 0.5), trim_idle=True)


def test_jumps_and_stuck_commands_are_said(record):
    rng = np.random.default_rng(10)
    gripper = np.arange(STEPS)[:, None] // 15 % 2  # opens and closes instantly: not a jump
    jumping, turning, stuck = (np.hstack([reach(rng), gripper]).astype(np.float32) for _ in range(3))
    jumping[50, 1] = 0.0  # one lost reading
    turning[:, 2] = (np.linspace(0, 5, STEPS) + np.pi) % (2 * np.pi) - np.pi  # an angle that wraps around
    stuck[44:74] = stuck[44]
    lost = np.abs(np.diff(jumping[49:52, 1])).max()
    wrapped = np.abs(np.diff(turning[:, 2])).max()
    assert oddities(record(jumping, turning, stuck)) == [
        "the action does not change for up to 3.0 s in episode 2",
        "the action is the state of the same step: with --action-offset 1 it is that of the next",
        f"the state jumps between two steps in episode 0: joint_1 by {lost:.3g}",
        f"the state jumps between two steps in episode 1: joint_2 by {wrapped:.3g}",
        f"the action jumps between two steps in episode 0: joint_1 by {lost:.3g}",
        f"the action jumps between two steps in episode 1: joint_2 by {wrapped:.3g}",
    ]


def test_a_sensor_that_fails_for_a_step_makes_no_other_dimension_idle(record, capsys):
    values = reach(np.random.default_rng(11))
    values[60, 1] = 6.5e8
    dataset = ChunkDataset(record(values), [0], 4, action_offset=1)
    capsys.readouterr()
    fitted = Normalizer.fit(dataset)
    said = capsys.readouterr().out
    assert "only noise" not in said
    assert "state: a few extreme steps set the scale of joint_1: leave their episodes out" in said
    usual = torch.from_numpy(values[:-1].std(0, dtype=np.float64)).float()
    torch.testing.assert_close(fitted.state_scale, usual)
    Normalizer.fit(dataset, "quantile")
    assert capsys.readouterr().out == ""


def test_relative_actions_of_an_angle_that_wraps_are_said(record, capsys):
    values = reach(np.random.default_rng(12))
    values[:, 2] = (np.linspace(0, 5, STEPS) + np.pi) % (2 * np.pi) - np.pi
    dataset = ChunkDataset(record(values), [0], 4, action_offset=1)
    capsys.readouterr()
    Normalizer.fit(dataset)
    assert capsys.readouterr().out == ""
    Normalizer.fit(dataset, relative=True)
    said = capsys.readouterr().out
    assert "the state jumps between two steps in episode 0: joint_2 by 6.24: so do relative actions" in said
    assert "the action jumps" in said


def test_an_action_that_repeats_the_state_or_never_changes_is_said(record, capsys):
    values = reach(np.random.default_rng(13))
    store = record(values)
    Normalizer.fit(ChunkDataset(store, [0], 4))
    assert "the action is the state of the same step: with --action-offset 1" in capsys.readouterr().out
    still = replace(store, action=np.zeros_like(store.action))
    with pytest.raises(UserError, match=r"The action of .* never changes: choose another with --action-keys"):
        Normalizer.fit(ChunkDataset(still, [0], 4))


def test_copies_of_episodes_are_named(record, capsys):
    one, two = (reach(np.random.default_rng(seed)) for seed in (14, 15))
    record(one, two, one)
    assert "episodes 0, 2 are the same in every step" in capsys.readouterr().out
    record(one, two, two[:-1])
    assert "the same in every step" not in capsys.readouterr().out
