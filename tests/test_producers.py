"""Files as other projects write them (`producers.py`), read as the docs promise."""

import re

import h5py
import numpy as np
import producers
import pytest
from lerobot_factory import action_of, read, state_of

from common.data import DataConfig, open_dataset
from common.errors import UserError


@pytest.fixture
def open_(tmp_path):
    def open_(root, **options):
        return open_dataset(
            DataConfig((str(root),), cache_dir=tmp_path / "cache", ingest_workers=1, **options)
        )

    return open_


def check(store, steps, cameras, dims):
    """Check that the store has exactly these steps, in order."""
    assert store.cameras == cameras
    images = store.images(np.arange(store.num_steps)).numpy()
    for camera in range(len(cameras)):
        assert [read(row[camera]) for row in images] == [(step, camera) for step in steps]
    np.testing.assert_array_equal(store.state, state_of(np.array(steps), dims[0]))
    np.testing.assert_array_equal(store.action, action_of(np.array(steps), dims[1]))


def unused(text):
    """The parts that the output names as not used."""
    return re.findall(r"^  not used +(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("base", [False, True])
def test_aloha(tmp_path, open_, capsys, compressed, base):
    root = tmp_path / "d"
    root.mkdir()
    for number, steps in enumerate((np.arange(6), np.arange(6, 11))):
        producers.aloha(root / f"episode_{number}.hdf5", steps, compressed, base)
    store = open_(root, fps=50.0)
    check(store, range(11), ("high", "left_wrist", "right_wrist"), (14, 16 if base else 14))
    assert store.action_names[:14] == store.state_names
    assert store.action_names[14:] == (("base_action.0", "base_action.1") if base else ())
    lines = ["observations/effort (14), observations/qvel (14): take it with --state-keys"]
    lines = [f"compress_len ({6}): not one row a step"] * compressed + lines
    assert unused(capsys.readouterr().out) == lines


def test_a_base_action_of_other_steps_is_no_part_of_the_action(tmp_path, open_, capsys):
    (tmp_path / "d").mkdir()
    producers.aloha(tmp_path / "d/episode_0.hdf5", np.arange(6), base=True)
    with h5py.File(tmp_path / "d/episode_0.hdf5", "a") as file:
        del file["base_action"]
        file["base_action"] = np.zeros((3, 2))
    assert open_(tmp_path / "d", fps=50.0).action.shape == (6, 14)
    assert "base_action (2): not one row a step" in unused(capsys.readouterr().out)


def test_robomimic(tmp_path, open_, capsys):
    (tmp_path / "d").mkdir()
    producers.robomimic(tmp_path / "d/image.hdf5", (6, 5, 4))
    store = open_(tmp_path / "d")
    check(store, range(15), ("agentview", "robot0_eye_in_hand"), (9, 7))
    assert store.fps == 20
    assert store.state_names[3] == "robot0_eef_quat.0"
    assert unused(capsys.readouterr().out) == [
        "dones, rewards, states: no observation",
        "next_obs/*: the future",
        "obs/object (10), obs/robot0_joint_pos (7): take it with --state-keys",
        "mask/train (2), mask/valid (1): lists of episodes; --episodes chooses, --val-fraction holds out",
    ]
    future = open_(tmp_path / "d", cameras=("next_obs/agentview_image", "agentview"))
    assert future.cameras == ("next_obs_agentview_image", "agentview")
    images = future.images(np.arange(15)).numpy()
    assert [read(row[1]) for row in images] == [(step, 0) for step in range(15)]
    assert [read(row[0]) for row in images] == [(step + 1, 0) for step in range(15)]


def test_robomimic_without_cameras(tmp_path, open_):
    producers.robomimic(tmp_path / "low_dim.hdf5", (6, 5), cameras=False)
    with pytest.raises(UserError, match=r"low_dim.hdf5 has no colour camera, but a policy needs one: "):
        open_(tmp_path / "low_dim.hdf5")


def test_a_file_without_cameras_beside_one_with_them_does_not_decide(tmp_path, open_):
    (tmp_path / "d").mkdir()
    producers.robomimic(tmp_path / "d/image.hdf5", (6, 5))
    producers.robomimic(tmp_path / "d/low_dim.hdf5", (6, 5), cameras=False)
    with pytest.raises(UserError, match=r"low_dim.hdf5, data/demo_\d\) has no obs/agentview_image"):
        open_(tmp_path / "d")
    check(
        open_(tmp_path / "d", skip_bad_episodes=True), range(11), ("agentview", "robot0_eye_in_hand"), (9, 7)
    )


def test_libero_with_a_file_for_every_task(tmp_path, open_, capsys):
    (tmp_path / "d").mkdir()
    producers.libero(tmp_path / "d/turn_on_the_stove_demo.hdf5", (6, 5))
    first = open_(tmp_path / "d")
    assert "LIBERO layout" in (said := capsys.readouterr().out)
    assert "stores what is seen after an action with it: if so, --action-offset 1" in said
    check(first, range(11), ("agentview", "eye_in_hand"), (8, 7))
    assert first.episode_indices.tolist() == [0, 1]  # demo_0 and demo_1
    capsys.readouterr()
    producers.libero(tmp_path / "d/open_the_drawer_demo.hdf5", (3, 4, 5), first=11)
    second = open_(tmp_path / "d")
    numbers = second.episode_indices.tolist()
    begins = dict(
        re.findall(r"episode (\d+) \+ N: (\w+)_demo.hdf5, data/demo_N", capsys.readouterr().out)[:2]
    )
    begins = {name: int(begin) for begin, name in begins.items()}
    stove, drawer = begins["turn_on_the_stove"], begins["open_the_drawer"]
    assert sorted(numbers) == sorted([stove, stove + 1, drawer, drawer + 1, drawer + 2])
    chosen = open_(tmp_path / "d", episodes=(str(stove + 1), str(drawer)))
    last, third = [*range(6, 11)], [*range(11, 14)]
    steps = last + third if stove < drawer else third + last
    check(chosen, steps, ("agentview", "eye_in_hand"), (8, 7))
    with pytest.raises(UserError, match="has no episode 1"):  # instead of silently taking another one
        open_(tmp_path / "d", episodes=("1",))
    producers.libero(tmp_path / "d/a_third_demo.hdf5", (4, 5))
    assert set(numbers) < set(open_(tmp_path / "d").episode_indices.tolist())


def test_maniskill(tmp_path, open_, capsys):
    (tmp_path / "d").mkdir()
    producers.maniskill(tmp_path / "d/trajectory.rgb.pd_joint_delta_pos.physx_cpu.h5", (6, 5, 4))
    store = open_(tmp_path / "d", fps=20.0)
    check(store, range(15), ("base_camera", "hand_camera"), (9, 8))
    assert unused(capsys.readouterr().out) == [
        "env_states/*, obs/sensor_param/*, rewards, success, terminated, truncated: no observation",
        "obs/agent/qvel (9), obs/extra/is_grasped (1), obs/extra/tcp_pose (7): take it with --state-keys",
        "obs/sensor_data/base_camera/depth, obs/sensor_data/base_camera/segmentation, "
        "obs/sensor_data/hand_camera/depth, obs/sensor_data/hand_camera/segmentation: no 8-bit colour image",
        "the observation after the last action of each episode",
    ]
    where = open_(tmp_path / "d", fps=20.0, action_keys=("obs/agent/qpos",), state_keys=("obs/agent/qvel",))
    np.testing.assert_array_equal(where.action, state_of(np.arange(15), 9))
    for camera in ("depth", "obs/sensor_data/base_camera/depth"):
        with pytest.raises(UserError, match="which is no 8-bit colour image but int16: choose other"):
            open_(tmp_path / "d", fps=20.0, cameras=(camera,))


@pytest.mark.parametrize("rows", [4, 6, 7])
def test_maniskill_with_any_other_number_of_actions_is_refused(tmp_path, open_, rows):
    producers.maniskill(tmp_path / "t.h5", (6, 5))
    with h5py.File(tmp_path / "t.h5", "a") as file:
        del file["traj_1/actions"]
        file["traj_1/actions"] = action_of(np.arange(rows), 8)
    if rows == 6:  # as many as observations: none is left over
        assert open_(tmp_path / "t.h5", fps=20.0).num_steps == 12
        return
    with pytest.raises(UserError, match=rf"Episode 1 .*has 6 steps in obs/agent/qpos and {rows} in actions"):
        open_(tmp_path / "t.h5", fps=20.0)


def test_one_observation_more_elsewhere_is_a_damaged_episode(tmp_path, open_):
    producers.robomimic(tmp_path / "image.hdf5", (6, 5))
    with h5py.File(tmp_path / "image.hdf5", "a") as file:
        for key in ("actions", "rewards", "dones", "states"):
            values = file[f"data/demo_1/{key}"][:-1]
            del file[f"data/demo_1/{key}"]
            file[f"data/demo_1/{key}"] = values
    with pytest.raises(UserError, match=r"has 5 steps in obs/robot0_eef_pos and 4 in actions"):
        open_(tmp_path / "image.hdf5")


def test_push_t(tmp_path, open_, capsys):
    pytest.importorskip("zarr")
    producers.push_t(tmp_path / "pusht_cchi_v7_replay.zarr", (12, 9, 15))
    store = open_(tmp_path / "pusht_cchi_v7_replay.zarr", fps=10.0)
    check(store, range(36), ("img",), (5, 2))
    assert store.episode_indices.tolist() == [0, 1, 2]
    assert unused(capsys.readouterr().out) == ["keypoint (18), n_contacts (1): take it with --state-keys"]


def test_umi(tmp_path, open_, capsys):
    pytest.importorskip("zarr")
    producers.umi(tmp_path / "umi.zarr", (12, 9))
    keys = ("robot0_eef_pos", "robot0_eef_rot_axis_angle", "robot0_gripper_width")
    store = open_(tmp_path / "umi.zarr", fps=60.0, action_keys=keys)
    assert store.cameras == ("camera0",)
    assert [read(row[0]) for row in store.images(np.arange(21)).numpy()] == [(step, 0) for step in range(21)]
    np.testing.assert_array_equal(store.state, state_of(np.arange(21), 7))
    np.testing.assert_array_equal(store.action, store.state)
    left = unused(capsys.readouterr().out)
    assert left == ["robot0_demo_end_pose (6), robot0_demo_start_pose (6): take it with --state-keys"]
