import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hdf5_factory import LAYOUTS, encode, make_hdf5, write_images
from lerobot_factory import action_of, draw, make_dataset, read, state_of

from common.data import ChunkDataset, DataConfig, hdf5_files, open_dataset
from common.data.hdf5_layouts import ALOHA_JOINTS
from common.data.source import BadEpisode
from common.errors import UserError

HIGH = "observations/images/cam_high"


@pytest.fixture
def open_(tmp_path):
    def open_(root, **options):
        return open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", **options))

    return open_


@pytest.fixture
def refused(open_):
    """Opening fails with one sentence that matches the pattern, and leaves no store behind."""

    def refused(root, pattern, **options):
        with pytest.raises(UserError, match=pattern) as caught:
            open_(root, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert "Traceback" not in message
        return message

    return refused


def check_aligned(store, dims=(3, 3)):
    """Every step shows its own number, in every camera, and has its own state and action."""
    images = store.images(np.arange(store.num_steps)).numpy()
    steps = np.array([read(row[0])[0] for row in images])
    for camera in range(len(store.cameras)):
        assert [read(row[camera]) for row in images] == [(step, camera) for step in steps]
    assert (store.state == state_of(steps, dims[0])).all()
    assert (store.action == action_of(steps, dims[1])).all()
    return steps


# What is read


@pytest.mark.parametrize("image_size", [(), (20, 30), (40, 50)])
@pytest.mark.parametrize(
    ("layout", "images"),
    [
        ("aloha", "array"),
        ("aloha", "gzip"),
        ("aloha", "padded"),
        ("grouped", "channels first"),
        ("grouped", "variable"),
        ("robomimic", "array"),
        ("robomimic", "bytes"),
    ],
)
def test_hdf5_and_lerobot_give_the_same_batches_to_the_bit(tmp_path, open_, layout, images, image_size):
    lengths, cameras = (12, 9, 15), ("high", "left")
    keys = [f"observation.images.cam_{camera}" for camera in cameras]
    lerobot = make_dataset(tmp_path / "lerobot", lengths, keys, video=False, dims=(3, 3))
    hdf5 = make_hdf5(tmp_path / "hdf5", lengths, cameras, layout, images=images)
    one, two = (open_(root, image_size=image_size) for root in (lerobot, hdf5))
    assert one.cameras == two.cameras == cameras
    assert one.fps == two.fps
    batches = []
    for store in (one, two):
        dataset = ChunkDataset(store, [0, 2], horizon=5, proprio_history=3, action_offset=1)
        batches.append(dataset.__getitems__(np.arange(len(dataset))))
    for a, b in zip(*(batch[:5] for batch in batches), strict=True):  # without extras: there are none
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    if not image_size:
        check_aligned(two)


def test_twenty_episodes_as_video_and_as_hdf5_agree_on_everything_but_pixels(tmp_path, open_):
    lengths, size = tuple(4 + 3 * k % 7 for k in range(20)), (48, 64)
    cameras = ("high", "left")
    keys = dict.fromkeys([f"observation.images.cam_{camera}" for camera in cameras], size)
    video = open_(make_dataset(tmp_path / "video", lengths, keys, dims=(3, 3), episodes_per_file=7))
    hdf5 = open_(make_hdf5(tmp_path / "hdf5", lengths, dict.fromkeys(cameras, size), images="gzip"))
    for name in ("cameras", "image_size", "fps", "num_episodes", "num_steps"):
        assert getattr(video, name) == getattr(hdf5, name)
    for name in ("state", "action", "episode_starts", "episode_indices"):
        assert (getattr(video, name) == getattr(hdf5, name)).all()
    np.testing.assert_allclose(video.timestamps, hdf5.timestamps, atol=1e-6)
    one, two = (
        ChunkDataset(store, range(20), 4, 2).__getitems__(np.arange(video.num_steps))
        for store in (video, hdf5)
    )
    assert all(torch.equal(a, b) for a, b in zip(one[1:5], two[1:5], strict=True))
    lossy = (one.images.float() - two.images.float()).abs().mean()
    assert 0.1 < lossy < 10
    assert check_aligned(video).tolist() == check_aligned(hdf5).tolist()


def test_jpeg_frames_are_those_that_a_decoder_gives(tmp_path, open_):
    make_hdf5(tmp_path / "d", (4,))
    file = tmp_path / "d/day_0/episode_0.hdf5"
    pictures = [draw(step, 0, (32, 48)) for step in range(4)]
    with h5py.File(file, "a") as opened:
        del opened[HIGH]
        write_images(opened, HIGH, pictures, "padded", "JPEG")
    store = open_(tmp_path / "d")
    from PIL import Image

    with h5py.File(file) as opened:
        for step in range(4):
            cell = opened[HIGH][step].tobytes()
            import io

            expected = np.asarray(Image.open(io.BytesIO(cell)))
            assert (store.images(np.array([step]))[0, 0].permute(1, 2, 0).numpy() == expected).all()
    check_aligned(store)


@pytest.mark.parametrize("kind", ["array", "padded"])
def test_blue_first_frames_are_turned_round(tmp_path, open_, kind):
    make_hdf5(tmp_path / "d", (4,), images=kind)
    rgb = open_(tmp_path / "d").images(np.arange(4))
    bgr = open_(tmp_path / "d", color_order="bgr").images(np.arange(4))
    assert torch.equal(rgb.flip(2), bgr)
    assert not torch.equal(rgb, bgr)


def test_grey_and_transparent_frames(tmp_path, open_, capsys):
    """Grey images are no camera unless asked for; colours with an alpha channel stay as they are."""
    make_hdf5(tmp_path / "d", (4,))
    file = tmp_path / "d/day_0/episode_0.hdf5"
    with h5py.File(file, "a") as opened:
        pixels = opened[HIGH][:]
        del opened[HIGH]
        opened[HIGH] = np.concatenate([pixels, pixels[..., :1]], -1)
        opened["observations/images/cam_grey"] = pixels[..., :1]
    store = open_(tmp_path / "d")
    assert store.cameras == ("high",)
    assert (store.images(np.arange(4)).numpy()[:, 0] == pixels.transpose(0, 3, 1, 2)).all()
    out = capsys.readouterr().out
    assert "cam_high, 32x48, uint8, fourth channel not used" in out
    assert "observations/images/cam_grey (grey): no 8-bit colour image" in out
    for names in ({"cameras": ("grey", "high")}, {"camera_keys": ("observations/images/cam_grey", HIGH)}):
        store = open_(tmp_path / "d", **names)
        assert store.cameras == ("grey", "high")
        images = store.images(np.arange(4)).numpy()
        assert (images[:, 1] == pixels.transpose(0, 3, 1, 2)).all()
        assert (images[:, 0] == pixels[..., 0][:, None]).all()


def test_what_was_recognised_is_printed_with_every_slice(tmp_path, open_, capsys):
    open_(make_hdf5(tmp_path / "d", (4, 5), ("high", "left"), "grouped"))
    out = capsys.readouterr().out
    assert "HDF5, grouped layout, 2 files, 2 episodes, 10 Hz" in out
    for part, group in (("state", "observation"), ("action", "action")):
        assert f"{part}[0:1]".ljust(16) + f"{group}/joint_pos/left" in out
        assert f"{part}[1:2]".ljust(16) + f"{group}/joint_pos/right" in out
        assert f"{part}[2:3]".ljust(16) + f"{group}/hand_joint_pos/left" in out
    assert "observation/images/left, 32x48, uint8" in out
    assert re.search(r"not used +observation/force \(2\): take it with --state-keys", out)


def test_dimensions_have_the_names_of_what_they_are(tmp_path, open_):
    aloha = open_(make_hdf5(tmp_path / "a", (4,), dims=(14, 14)))
    assert aloha.state_names == aloha.action_names == ALOHA_JOINTS
    assert aloha.state_names[6] == "left_gripper"
    grouped = open_(make_hdf5(tmp_path / "g", (4,), layout="grouped"))
    assert grouped.state_names == ("joint_pos/left", "joint_pos/right", "hand_joint_pos/left")
    assert grouped.shared_space
    robomimic = open_(make_hdf5(tmp_path / "r", (4,), layout="robomimic", dims=(3, 2)))
    assert robomimic.state_names == tuple(f"robot0_eef_pos.{i}" for i in range(3))
    assert robomimic.action_names == ("actions.0", "actions.1")


def test_episodes_are_numbered_as_their_files_are(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 5, 6, *(3,) * 8))
    store = open_(root)
    assert store.episode_indices.tolist() == list(range(11))  # episode_10 after episode_9
    check_aligned(store)
    os.remove(root / "day_1/episode_3.hdf5")
    assert open_(root).episode_indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    os.rename(root / "day_0/episode_0.hdf5", root / "day_0/first.hdf5")
    *numbers, last = open_(root).episode_indices.tolist()
    assert numbers == [1, 2, 4, 5, 6, 7, 8, 9, 10]  # the others keep theirs
    assert last >= 10**8


def test_one_file_is_a_dataset_too(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 5, 3), layout="robomimic")
    assert check_aligned(open_(root / "demos.hdf5")).tolist() == list(range(12))


def test_groups_that_are_episodes():
    keys = ["data/demo_1/obs/x", "data/demo_1/actions", "data/demo_10/obs/x", "mask/train"]
    assert hdf5_files.episode_groups(keys) == ["data/demo_1/", "data/demo_10/"]
    assert hdf5_files.episode_groups(["traj_0/actions", "traj_0/obs/agent/qpos"]) == ["traj_0/"]
    assert hdf5_files.episode_groups(["episode_3/demo_1/a"]) == ["episode_3/"]
    assert hdf5_files.episode_groups(["action", "observations/qpos"]) == [""]
    assert hdf5_files.episode_groups([]) == []
    with pytest.raises(BadEpisode, match="in data/dem/, which is not named like data/demo_1/"):
        hdf5_files.episode_groups(["data/demo_1/actions", "data/dem/actions", "data/dem/obs"])


def test_any_layout_can_be_given_by_keys(tmp_path, open_, refused):
    (tmp_path / "d").mkdir()
    with h5py.File(tmp_path / "d/log.h5", "w") as file:
        file["robot/arm"], file["robot/hand"] = state_of(np.arange(5), 2), state_of(np.arange(5), 3)[:, 2:]
        file["command"] = action_of(np.arange(5), 3)
        write_images(file, "rgb/front", [draw(i, 0, (32, 48)) for i in range(5)])
        file["depth"] = np.zeros((5, 32, 48), np.uint16)
    message = refused(tmp_path / "d", "say with --state-keys which arrays to use", fps=10)
    assert "robot/arm 5x2 float32" in message
    assert "depth 5x32x48 uint16" in message
    keys = {"state_keys": ("/robot/arm", "robot/hand"), "action_keys": ("command",), "fps": 10}
    store = open_(tmp_path / "d", **keys)
    assert store.cameras == ("front",)
    assert store.state_names == ("robot/arm.0", "robot/arm.1", "robot/hand")
    check_aligned(store)
    assert open_(tmp_path / "d", **keys, camera_keys=("rgb/front",)).path == store.path
    refused(
        tmp_path / "d",
        r"no --state-keys robot/arn \(did you mean robot/arm",
        state_keys=("robot/arn",),
    )
    refused(tmp_path / "d", "--camera-keys depth holds no images", **{**keys, "camera_keys": ("depth",)})


def test_the_frame_rate(tmp_path, open_, refused):
    root = make_hdf5(tmp_path / "d", (4, 3), fps=None)
    refused(root, "does not state its control rate: give --fps")
    assert open_(root, fps=7.5).fps == 7.5
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file.attrs["control_freq"] = np.int64(20)
    assert open_(root).fps == 20
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        file.attrs["fps"] = 30.0
    refused(root, r"different control rates \(20 Hz in day_0/episode_0.hdf5, 30 Hz in")
    robomimic = make_hdf5(tmp_path / "r", (4,), layout="robomimic", fps=None)
    with h5py.File(robomimic / "demos.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 15}})
    assert open_(robomimic).fps == 15


def write_times(root, *times):
    """Write recorded times for the episodes, (L,) each."""
    for episode, values in enumerate(times):
        with h5py.File(root / f"day_{episode % 2}/episode_{episode}.hdf5", "a") as file:
            file["timestamps"] = values


def test_recorded_times_are_kept_in_whatever_unit_they_are(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 4, 4, 4))
    times = 1.7e9 + np.array([0, 0.1, 0.35, 0.45])
    write_times(root, times, (times * 1e9).astype(np.int64), times * 1e3, np.arange(4))
    uneven, even = [0, 0.1, 0.35, 0.45], [0, 0.1, 0.2, 0.3]  # a step counter is not a time
    np.testing.assert_allclose(open_(root).timestamps, uneven * 3 + even, atol=1e-6)


def test_times_that_contradict_the_rate_are_refused_unless_it_is_given(tmp_path, open_, refused, capsys):
    root = make_hdf5(tmp_path / "d", (4, 4), fps=50.0)
    write_times(root, np.arange(4) * 0.1, np.arange(4) * 0.02)
    refused(
        root,
        r"Episode 0 .* has 10 steps a second by its timestamps, but its files say 50 \(give the right --fps",
    )
    assert open_(root, fps=10.0, episodes=("0",)).timestamps.tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert "--fps 10 overrides 50 Hz in the files" in capsys.readouterr().out
    assert open_(root, fps=50.0).timestamps.tolist() == pytest.approx([0, 0.02, 0.04, 0.06] * 2)
    refused(root, "Episode 1 .* has 50 steps a second by its timestamps, but --fps says 10", fps=10.0)


def test_times_may_jitter_and_steps_be_lost_but_the_rate_must_be_right(tmp_path, open_, refused):
    root = make_hdf5(tmp_path / "d", (40, 40), fps=None)
    rng = np.random.default_rng(0)
    slow, lossy = np.arange(40) / 43, np.sort(rng.choice(50, 40, replace=False)) / 50
    write_times(root, slow + rng.uniform(0, 0.01, 40), lossy + rng.uniform(0, 0.004, 40))
    np.testing.assert_allclose(np.diff(open_(root, fps=50.0).timestamps[40:]), np.diff(lossy), atol=0.005)
    for wrong in (20.0, 25.0, 33.0, 60.0, 90.0):
        refused(root, f"has .* steps a second by its timestamps, but --fps says {wrong:g} ", fps=wrong)


def test_steps_that_were_never_written_are_no_zeros(tmp_path, open_, refused):
    root = make_hdf5(tmp_path / "d", (12, 9))
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        action = file["action"][:]
        del file["action"]
        item = file.create_dataset("action", action.shape, chunks=(4, 2))
        item[:4] = action[:4]
        item[8:10] = action[8:10]
        item[4:8, :2] = action[4:8, :2]
    refused(root, r"Episode 0 .* steps 4 to 7 of action were never written")
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["action"][4:8] = action[4:8]  # trailing rows may be empty, see --trim-idle
    assert (open_(root).action[10:12] == 0).all()


def test_a_camera_may_begin_with_empty_images(tmp_path, refused, open_):
    root = make_hdf5(tmp_path / "d", (4, 3), ("high", "left"), images="variable")
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["observations/images/cam_left"][0] = np.empty(0, np.uint8)
    refused(root, r"Episode 0 .* cannot be decoded: observations/images/cam_left, step 0")
    assert open_(root, skip_bad_episodes=True).cameras == ("high", "left")


def test_tasks_are_said_and_chosen(tmp_path, open_, refused, capsys):
    root = make_hdf5(tmp_path / "d", (4, 3, 5))
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file.create_group("data").attrs["problem_info"] = json.dumps({"language_instruction": ["open it"]})
        file.attrs["language_instruction"] = "open it"
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        file.attrs["task"] = np.bytes_("close\n it")
    store = open_(root)
    assert store.episode_tasks == ("open it", "close it", None)
    assert '2 tasks ("open it", "close it"); choose some with --task' in capsys.readouterr().out
    chosen = open_(root, task=("close it",))
    assert chosen.episode_indices.tolist() == [1]
    assert chosen.task == "close it"
    refused(root, r'has no task "close" .*it has "open it", "close it"', task=("close",))


def test_tasks_of_liberos_files_belong_to_all_of_their_episodes(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 3), layout="robomimic")
    with h5py.File(root / "demos.hdf5", "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": ["open it"]})
        file["data/demo_1"].attrs["task"] = "close it"
    assert open_(root).episode_tasks == ("open it", "close it")


def test_a_compression_that_is_not_there_is_named(tmp_path, refused):
    root = make_hdf5(tmp_path / "d", (4, 3))
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        del file["action"]
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_chunk((4, 3))
        how.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)  # Blosc
        space = h5py.h5s.create_simple((4, 3))
        item = h5py.h5d.create(file.id, b"action", h5py.h5t.IEEE_F32LE, space, how)
        item.write_direct_chunk((0, 0), bytes(48))
    refused(root, r"Episode 0 .* numbers cannot be read .*`pip install hdf5plugin`")


def test_pointers_of_git_lfs_are_named(tmp_path, refused):
    root = make_hdf5(tmp_path / "d", (4, 3))
    (root / "day_0/episode_0.hdf5").write_text("version https://git-lfs.github.com/spec/v1\nsize 146946961\n")
    refused(root, r"episode_0.hdf5 is a git-lfs pointer, not the file itself \(`git lfs pull`")


def test_encoded_images_may_have_been_written_as_bgr(tmp_path, open_, capsys):
    root = make_hdf5(tmp_path / "d", (4, 3), images="padded")
    open_(root)
    assert "if inspect shows red and blue swapped, give --color-order bgr" in capsys.readouterr().out
    open_(root, color_order="bgr")
    assert "red and blue" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, ">f4"])
def test_numbers_of_any_width_become_float32(tmp_path, open_, dtype):
    root = make_hdf5(tmp_path / "d", (4,), dtype=np.dtype(dtype))
    store = open_(root)
    assert store.state.dtype == np.float32
    expected = state_of(np.arange(4), 3).astype(dtype).astype(np.float32)
    assert (store.state == expected).all()


# Starting again


def test_a_second_start_reads_nothing(tmp_path, open_, monkeypatch):
    root = make_hdf5(tmp_path / "d")
    first = open_(root)
    monkeypatch.setattr("common.data.hdf5.guarded_map", lambda *_: pytest.fail("read again"))
    assert open_(root).path == first.path


@pytest.mark.parametrize("what", ["pixels", "numbers", "new episode"])
def test_a_source_that_changed_gives_another_store(tmp_path, open_, what):
    root = make_hdf5(tmp_path / "d", (4, 5))
    first = open_(root)
    inode = first.frame_files[0].stat().st_ino
    if what == "new episode":
        more = make_hdf5(tmp_path / "more", (4, 5, 6))
        shutil.copy(more / "day_0/episode_2.hdf5", root / "day_0/episode_2.hdf5")
    else:
        with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
            if what == "pixels":
                file[HIGH][2] = draw(77, 0, (32, 48))
            else:
                file["action"][2, 0] = 77
    second = open_(root)
    assert second.fingerprint != first.fingerprint
    if what == "pixels":
        assert read(second.images(np.array([2]))[0, 0].numpy())[0] == 77
    elif what == "numbers":
        assert second.action[2, 0] == 77
    else:
        assert check_aligned(second).tolist() == list(range(15))
        assert second.frame_files[0].stat().st_ino == inode  # only the new episode was decoded


def test_a_copy_elsewhere_is_the_same_dataset(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 5))
    first = open_(root)
    copy = shutil.copytree(root, tmp_path / "e" / "d")
    assert open_(copy).fingerprint == first.fingerprint
    assert open_(copy).path == first.path


def test_two_processes_that_start_at_once_build_one_store(tmp_path):
    root = make_hdf5(tmp_path / "d", (40, 30), {"high": (200, 300)})
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from common.data import DataConfig, open_dataset
        if __name__ == "__main__":
            print(open_dataset(DataConfig(({str(root)!r},), cache_dir={str(tmp_path / "cache")!r})).path)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, tmp_path / "program.py"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ends
    paths = {out.splitlines()[-1] for out, _ in ends}
    assert len(paths) == 1
    assert sum("ingest d" in err for _, err in ends) == 1, "one of them decoded"
    assert len(list((tmp_path / "cache/stores").glob("d-*"))) == 1


# Bad input


def change(path, key, how):
    with h5py.File(path, "a") as file:
        values = file[key][:]
        del file[key]
        file[key] = how(values)


def broken_jpeg(path):
    with h5py.File(path, "a") as file:
        del file[HIGH]
        files = [encode(draw(step, 0, (32, 48)), "JPEG") for step in range(12, 21)]
        files[4] = files[4][:40] + b"\0" * (len(files[4]) - 40)
        width = max(map(len, files))
        file[HIGH] = np.stack([np.frombuffer(content.ljust(width, b"\0"), np.uint8) for content in files])


def set_value(path, key, value):
    with h5py.File(path, "a") as file:
        file[key][3, 1] = value


def to_objects(path):
    with h5py.File(path, "a") as file:
        del file["action"]
        file.create_dataset("action", (9,), h5py.string_dtype())


def absurd(path, key, shape, dtype="f8"):
    with h5py.File(path, "a") as file:
        del file[key]
        file.create_dataset(key, shape, dtype, chunks=(1, *shape[1:]))


def link(path, key, target):
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = target


def external(path):
    (path.parent / "secret.bin").write_bytes(bytes(9 * 3 * 8))
    with h5py.File(path, "a") as file:
        del file["action"]
        file.create_dataset("action", (9, 3), "f8", external=[(str(path.parent / "secret.bin"), 0, 216)])


def virtual(path):
    with h5py.File(path, "a") as file:
        del file["action"]
        layout = h5py.VirtualLayout((9, 3), "f8")
        layout[:] = h5py.VirtualSource(str(path.parent.parent / "day_0/episode_0.hdf5"), "action", (12, 3))[
            :9
        ]
        file.create_virtual_dataset("action", layout)


def delete(path, key):
    with h5py.File(path, "a") as file:
        del file[key]


def shorten(path):
    for key in ("action", "observations/qpos", HIGH):
        change(path, key, lambda a: a[:1])


NAME = r"^Episode 1 \(day_1/episode_1.hdf5\)"
QPOS = "observations/qpos"
LINK = h5py.ExternalLink("../x.h5", "/a")
BAD = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:9000]), "cannot be read"),
    "zero length": (lambda p: p.write_bytes(b""), "is empty"),
    "not HDF5": (lambda p: p.write_text("hello" * 1000), "is not an HDF5 file"),
    "missing key": (
        lambda p: delete(p, "action"),
        f"no action, it has {HIGH} 9x32x48x3 uint8, {QPOS} 9x3 float",
    ),
    "missing camera": (lambda p: delete(p, HIGH), f"has no {HIGH}"),
    "lengths": (lambda p: change(p, "action", lambda a: a[:-1]), f"has 9 steps in {QPOS} and 8 in action"),
    "frames": (lambda p: change(p, HIGH, lambda a: a[:-1]), f"has 9 steps in {QPOS} and 8 in {HIGH}"),
    "one step": (shorten, "has 1 step, "),
    "dimensions": (lambda p: change(p, "action", lambda a: a[:, :2]), "has 2 numbers a step in action"),
    "another size": (lambda p: change(p, HIGH, lambda a: a[:, :30]), "of another size .* 30x48 instead of"),
    "jpeg": (broken_jpeg, f"cannot be decoded: {HIGH}, step 4 "),
    "nan": (lambda p: set_value(p, "action", np.nan), "has nan in action, dimension joint_1, at step 3"),
    "too large": (lambda p: set_value(p, "action", 1e300), "has inf in action, dimension joint_1, at step 3"),
    "objects": (to_objects, "holds object instead of numbers in action"),
    "external link": (lambda p: link(p, "action", LINK), "links to another file at action"),
    "soft link": (lambda p: link(p, "action", h5py.SoftLink(QPOS)), "has no action"),
    "external storage": (external, "keeps action in another file"),
    "virtual": (virtual, "keeps action in another file"),
    "scalar": (
        lambda p: change(p, "action", lambda a: a[0, 0]),
        "holds float64 instead of numbers in action",
    ),
    "absurd length": (lambda p: absurd(p, QPOS, (10**12, 3)), "has 1000000000000 steps"),
    "absurd width": (lambda p: absurd(p, "action", (9, 10**7)), "has 10000000 numbers a step"),
}


def test_widths_are_compared_key_by_key(tmp_path, refused):
    """The same total number of dimensions, divided differently, would be mixed up silently."""
    root = make_hdf5(tmp_path / "d", (6, 5), layout="grouped")
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        for part in ("observation", "action"):
            left, hand = f"{part}/joint_pos/left", f"{part}/hand_joint_pos/left"
            values = np.concatenate([file[left][:], file[hand][:]], 1)
            del file[left], file[hand]
            file[left], file[hand] = values[:, :0], values
    refused(root, f"{NAME} has 0 numbers a step in observation/joint_pos/left instead of 1")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_episode_is_named_and_can_be_left_out(tmp_path, open_, refused, case):
    damage, pattern = BAD[case]
    root = make_hdf5(tmp_path / "d", (12, 9, 15))
    damage(root / "day_1/episode_1.hdf5")
    message = refused(root, f"{NAME}.*{pattern}")
    assert "--skip-bad-episodes" in message
    store = open_(root, skip_bad_episodes=True)
    assert store.episode_indices.tolist() == [0, 2]
    assert check_aligned(store).tolist() == [*range(12), *range(21, 36)]
    assert open_(root, skip_bad_episodes=True).path == store.path


def test_a_first_episode_that_is_bad_does_not_decide_what_the_dataset_is(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (12, 9))
    (root / "day_0/episode_0.hdf5").write_bytes(b"nothing")
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [1]


def test_groups_inside_themselves_are_read_once(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (12,))
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["observations/again"] = file["/"]
    check_aligned(open_(root))


def test_links_are_followed_each_folder_once(tmp_path, open_, refused):
    root = make_hdf5(tmp_path / "d", (12,))
    disk = make_hdf5(tmp_path / "disk", (5, 7, 3))
    (root / "day_1").symlink_to(disk / "day_1")
    (root / "link.hdf5").symlink_to(disk / "day_0/episode_2.hdf5")
    for name, target in (("a", root / "day_0"), ("b", disk / "day_1"), ("c", tmp_path), ("d", disk / "loop")):
        (root / name).symlink_to(target)  # seen already, seen already, a parent, one that leads back
    (disk / "loop").mkdir()
    (disk / "loop" / "back").symlink_to(root)
    store = open_(root)
    assert sorted(np.diff(store.episode_starts)) == [3, 7, 12]
    with h5py.File(disk / "day_1/episode_1.hdf5", "a") as file:
        file["action"][0] += 1
    assert open_(root).path != store.path
    shutil.rmtree(disk / "day_1")
    refused(root, r"d/(b|day_1) links to nothing: mount its disk, or remove the link")


def test_folders_without_demonstrations(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"neither LeRobot's meta/info.json nor any \*.hdf5 or \*.h5 file")
    (tmp_path / "none").mkdir()
    h5py.File(tmp_path / "none/a.h5", "w").close()
    refused(tmp_path / "none", "has no usable episode: a.h5 holds no datasets")


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, refused, monkeypatch):
    root, scandir = make_hdf5(tmp_path / "d", (4, 5)), os.scandir

    def guarded(path):
        if Path(path).name == "day_1":  # simulated, because root may read everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refused(root, r"d/day_1 cannot be read \(Permission denied\)")
    monkeypatch.undo()  # before pytest removes what the test wrote


def test_a_file_that_may_not_be_read(tmp_path, open_, refused, monkeypatch):
    root = make_hdf5(tmp_path / "d", (4, 5))
    monkeypatch.setattr("common.data.hdf5.scan_file", forbidden)
    refused(root, f"{NAME} is unusable: day_1/episode_1.hdf5 cannot be read .*Permission denied")
    monkeypatch.undo()
    assert open_(root).num_episodes == 2


def forbidden(path, name):
    import builtins

    plain = builtins.open

    def guarded(file, *args, **options):
        if str(file).endswith("_1.hdf5"):
            raise PermissionError(13, "Permission denied", file)
        return plain(file, *args, **options)

    builtins.open = guarded
    try:
        return hdf5_files.scan_file(path, name)
    finally:
        builtins.open = plain


def test_a_file_that_crashes_or_hangs_the_library_costs_itself_only(tmp_path, open_, refused, monkeypatch):
    """A crash in the HDF5 library is simulated: the worker is killed while it reads."""
    from common.data import hdf5, workers

    root = make_hdf5(tmp_path / "d", (12, 9, 15))
    monkeypatch.setattr(hdf5, "scan_file", die_of_the_second)
    refused(root, f"{NAME} is unusable: the process that read it ended with signal 6")
    monkeypatch.setattr(hdf5, "scan_file", hang_on_the_second)
    monkeypatch.setattr(workers, "STALL_SECONDS", 1.0)
    refused(root, f"{NAME} is unusable: reading did not end within 1 s")
    monkeypatch.undo()
    assert open_(root).num_episodes == 3  # not remembered: it may have been the machine's fault


def die_of_the_second(path, name):
    if name.endswith("_1.hdf5"):
        os.abort()
    return hdf5_files.scan_file(path, name)


def hang_on_the_second(path, name):
    if name.endswith("_1.hdf5"):
        import time

        time.sleep(60)
    return hdf5_files.scan_file(path, name)


def test_layouts_of_the_factory_are_those_recognised(tmp_path, open_):
    for layout in LAYOUTS:
        check_aligned(open_(make_hdf5(tmp_path / layout, (3, 4), layout=layout)))


def test_no_store_is_left_of_an_ingest_that_failed(tmp_path, refused):
    root = make_hdf5(tmp_path / "d", (9, 9))
    broken_jpeg(root / "day_0/episode_0.hdf5")
    broken_jpeg(root / "day_1/episode_1.hdf5")
    refused(root, "cannot be decoded")
    assert not [path for path in (tmp_path / "cache/stores").iterdir() if path.is_dir()]
