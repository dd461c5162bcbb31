import json
import os
import re
import shutil
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from hdf5_factory import make_hdf5
from lerobot_factory import action_of, draw, make_dataset, read, state_of

from common.data import ChunkDataset, DataConfig, open_dataset
from common.errors import UserError

zarr = pytest.importorskip("zarr")
LENGTHS, SIZE = (12, 9, 15), (32, 48)


def make_zarr(path, lengths=LENGTHS, cameras=("img",), images="array", zarr_format=2, **arrays):
    """A replay buffer with the steps of `make_dataset`: state and action, or `arrays`, and cameras by key."""
    steps = np.arange(sum(lengths))
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    data, meta = group.create_group("data"), group.create_group("meta")
    meta.create_array("episode_ends", data=np.cumsum(lengths))
    for key, values in (arrays or {"state": state_of(steps, 3), "action": action_of(steps, 3)}).items():
        data.create_array(key, data=values.astype(np.float64))
    for number, key in enumerate(cameras):
        pictures = np.stack([draw(step, number, SIZE) for step in steps])
        pictures = pictures.transpose(0, 3, 1, 2) if images == "channels first" else pictures
        pictures = pictures.astype(np.float32) if images == "float" else pictures
        data.create_array(key, data=pictures, chunks=(5, *pictures.shape[1:]))
    return path


def umi_arrays(robots=1):
    state, parts = state_of(np.arange(sum(LENGTHS)), 7 * robots) / 10, {}  # angles below one turn
    for robot in range(robots):
        pieces = np.split(state[:, 7 * robot : 7 * robot + 7], (3, 6), axis=1)
        for name, values in zip(("eef_pos", "eef_rot_axis_angle", "gripper_width"), pieces, strict=True):
            parts[f"robot{robot}_{name}"] = values
    return parts | {"robot0_demo_start_pose": np.zeros((sum(LENGTHS), 6))}


@pytest.fixture
def open_(tmp_path):
    def open_(root, **options):
        options = {"fps": 10.0, "cache_dir": tmp_path / "cache"} | options
        return open_dataset(DataConfig((str(root),), **options))

    return open_


def whole(store):
    dataset = ChunkDataset(store, [0, 2], horizon=5, proprio_history=3, action_offset=1)
    return dataset.__getitems__(np.arange(len(dataset)))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("images", ["array", "channels first", "float"])
@pytest.mark.parametrize("image_size", [(), (20, 30)])
def test_every_format_gives_the_same_batches_to_the_bit(tmp_path, open_, images, zarr_format, image_size):
    cameras = ("high", "left")
    roots = (
        make_zarr(tmp_path / "d.zarr", cameras=("img", "left"), images=images, zarr_format=zarr_format),
        make_hdf5(tmp_path / "hdf5", LENGTHS, cameras),
        make_dataset(
            tmp_path / "lerobot", LENGTHS, [f"cam_{camera}" for camera in cameras], video=False, dims=(3, 3)
        ),
    )
    one, *others = (whole(open_(root, image_size=image_size)) for root in roots)
    for other in others:
        for a, b in zip(one[:5], other[:5], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_zip_is_the_same_dataset_as_a_folder(tmp_path, open_):
    folder = make_zarr(tmp_path / "d.zarr")
    shutil.make_archive(str(folder), "zip", folder)
    one, two = open_(folder), open_(tmp_path / "d.zarr.zip")
    assert all(torch.equal(a, b) for a, b in zip(whole(one)[:5], whole(two)[:5], strict=True))
    assert [read(frame)[0] for frame in two.images(np.arange(36))[:, 0].numpy()] == list(range(36))


def test_what_was_recognised_is_printed(tmp_path, open_, capsys):
    store = open_(make_zarr(tmp_path / "d.zarr"))
    out = capsys.readouterr().out
    assert "d.zarr: zarr, pushT layout, 10 Hz" in out
    assert "state[0:3]".ljust(16) + "state" in out
    assert "img, 32x48, uint8" in out
    assert store.state_names == ("state.0", "state.1", "state.2")


@pytest.mark.parametrize("robots", [1, 2])
def test_umi_learns_where_the_robot_went_if_told_so(tmp_path, open_, robots):
    root = make_zarr(tmp_path / "d.zarr", cameras=("camera0_rgb",), **umi_arrays(robots))
    with pytest.raises(
        UserError, match=r"records no action: .* --action-keys (.*) --action-offset 1"
    ) as error:
        open_(root)
    keys = tuple(str(error.value).partition("--action-keys ")[2].partition(" --")[0].split())
    assert len(keys) == 3 * robots
    store = open_(root, action_keys=keys)
    assert store.cameras == ("camera0",)
    assert (store.state == state_of(np.arange(36), 7 * robots) / 10).all()
    assert (store.action == store.state).all()
    assert store.state_names[3] == "robot0_eef_rot_axis_angle.0"
    turned = open_(root, action_keys=keys, rotation="axis-angle->6d")
    assert turned.state.shape == (36, 10 * robots)


def test_other_buffers_are_given_by_keys(tmp_path, open_):
    steps = np.arange(36)
    root = make_zarr(
        tmp_path / "d.zarr", cameras=("rgb",), joints=state_of(steps, 3), goal=action_of(steps, 3)
    )
    with pytest.raises(
        UserError, match=r"say with --state-keys .*goal 36x3 float64, joints 36x3 float64, rgb 36x32"
    ):
        open_(root)
    store = open_(root, state_keys=("joints",), action_keys=("goal",))
    assert (store.action == action_of(steps, 3)).all()
    with pytest.raises(UserError, match="give --fps"):
        open_(root, state_keys=("joints",), action_keys=("goal",), fps=None)


def change(root, key, where, value):
    zarr.open_group(root, mode="a")[f"data/{key}"][where] = value


def test_a_buffer_that_changed_gives_another_store(tmp_path, open_):
    root = make_zarr(tmp_path / "d.zarr")
    first = open_(root)
    assert open_(shutil.copytree(root, tmp_path / "e" / "d.zarr")).path == first.path
    change(root, "img", 3, draw(77, 0, SIZE))
    second = open_(root)
    assert second.fingerprint != first.fingerprint
    assert read(second.images(np.array([3]))[0, 0].numpy())[0] == 77


def test_a_number_in_the_middle_of_a_large_file_counts(tmp_path, open_):
    lengths, noise = (300, 300), np.random.default_rng(0).random((600, 200))
    root = make_zarr(tmp_path / "d.zarr", lengths, state=noise)
    whole = {"chunks": noise.shape, "compressors": None}  # the size stays the same; so it does with noise
    array = zarr.open_group(root)["data"].create_array("action", data=noise, **whole)
    first = open_(root)
    array[290:310, 7] = noise[:20, 0]
    second = open_(root)
    assert second.fingerprint != first.fingerprint
    np.testing.assert_allclose(second.action[290:310, 7], noise[:20, 0], rtol=1e-6)


def test_a_buffer_that_grew_decodes_its_new_episodes_only(tmp_path, open_):
    first = open_(make_zarr(tmp_path / "d.zarr", (12, 9)))
    inode = first.frame_files[0].stat().st_ino
    second = open_(make_zarr(tmp_path / "d.zarr", LENGTHS))
    assert second.num_episodes == 3
    assert second.frame_files[0].stat().st_ino == inode
    assert [read(frame)[0] for frame in second.images(np.arange(36))[:, 0].numpy()] == list(range(36))


BAD = {
    "nan": (
        lambda root: change(root, "action", (13, 1), np.nan),
        "has nan in action, dimension action.1, at step 1",
    ),
    "chunk": (lambda root: (root / "data/img/2.0.0.0").write_bytes(b"nothing"), "cannot be decoded from img"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_episode_is_named_and_can_be_left_out(tmp_path, open_, case):
    damage, pattern = BAD[case]
    root = make_zarr(tmp_path / "d.zarr")
    damage(root)
    with pytest.raises(UserError, match=f"^Episode [01] {pattern}.*--skip-bad-episodes"):
        open_(root)
    store = open_(root, skip_bad_episodes=True)
    assert 1 not in store.episode_indices
    assert 2 in store.episode_indices


def test_episodes_that_are_too_short_or_absent(tmp_path, open_):
    root = make_zarr(tmp_path / "d.zarr", (12, 1, 15))
    with pytest.raises(UserError, match=r"^Episode 1 has 1 step, but an action chunk needs at least 2"):
        open_(root)
    with pytest.raises(UserError, match="has no episode 7"):
        open_(root, episodes=("7",))
    assert open_(root, episodes=("0", "2")).num_steps == 27


def test_a_change_in_a_linked_folder_is_noticed(tmp_path, open_):
    root = make_zarr(tmp_path / "d.zarr")
    (root / "data/img").rename(tmp_path / "img")
    (root / "data/img").symlink_to(tmp_path / "img")
    store = open_(root)
    shutil.copy(tmp_path / "img/0.0.0.0", tmp_path / "img/1.0.0.0")
    assert open_(root).source_fingerprint != store.source_fingerprint


def test_times_that_contradict_the_rate_are_refused(tmp_path, open_):
    root = make_zarr(tmp_path / "d.zarr")
    zarr.open_group(root, mode="a")["data"].create_array("timestamp", data=1.7e9 + np.arange(36) / 10)
    with pytest.raises(UserError, match="has 10 steps a second by its timestamps, but --fps says 19"):
        open_(root, fps=19.0)
    assert open_(root, fps=10.0).timestamps[:3].tolist() == pytest.approx([0, 0.1, 0.2])


def test_buffers_that_are_none(tmp_path, open_):
    root = make_zarr(tmp_path / "d.zarr")
    shutil.copytree(root, tmp_path / "e.zarr")
    ends = zarr.open_group(tmp_path / "e.zarr", mode="a")["meta/episode_ends"]
    ends[2] = 40
    with pytest.raises(UserError, match=r"has 36 steps in data/state, and episodes end at .*40"):
        open_(tmp_path / "e.zarr")
    ends[:] = [12, 9, 36]
    with pytest.raises(UserError, match=r"episodes end at \[12, 9, 36\]"):
        open_(tmp_path / "e.zarr")
    shutil.rmtree(root / "meta")
    with pytest.raises(UserError, match="is not a readable replay buffer"):
        open_(root)
    (tmp_path / "f.zarr.zip").write_bytes(b"PK half a file")
    with pytest.raises(UserError, match=r"f\.zarr\.zip is not a readable replay buffer"):
        open_(tmp_path / "f.zarr.zip")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_files_that_file_managers_leave_change_nothing(tmp_path, open_, recwarn, zarr_format):
    root = make_zarr(tmp_path / "d.zarr", zarr_format=zarr_format)
    before = open_(root)
    for name in (".DS_Store", "data/._img", "data/.DS_Store", "data/img/._0.0.0.0", "meta/Thumbs.db"):
        (root / name).write_bytes(b"\0\5\x16\7")
    assert open_(root).path == before.path
    shutil.make_archive(str(root), "zip", root)
    one, two = whole(before), whole(open_(tmp_path / "d.zarr.zip"))
    assert all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))
    assert not [warning for warning in recwarn if "Zarr hierarchy" in str(warning.message)]


def test_what_is_not_used_is_said(tmp_path, open_, capsys):
    root = make_zarr(tmp_path / "d.zarr")
    data = zarr.open_group(root, mode="a")["data"]
    data.create_array("next_img", data=np.zeros((36, *SIZE, 3), np.uint8))
    data.create_array("depth", data=np.ones((36, *SIZE), np.float32))
    data.create_array("shares", data=np.random.default_rng(0).random((36, *SIZE, 3), np.float32))
    data.create_group("arm").create_array("force", data=np.ones((36, 3)))
    assert open_(root).cameras == ("img",)
    out = capsys.readouterr().out
    for line in (
        "arm/force (3): take it with --state-keys",
        "depth, shares (float32): no 8-bit colour image",
        "next_img: the future",
    ):
        assert "  not used".ljust(18) + line in out
    assert open_(root, state_keys=("arm/force", "state")).state_names[:2] == ("arm/force.0", "arm/force.1")
    with pytest.raises(UserError, match="--camera-keys shares holds no images of 8 bits a colour"):
        open_(root, camera_keys=("shares",))


def test_missing_packages_are_named(tmp_path, open_, monkeypatch):
    root = make_zarr(tmp_path / "d.zarr")
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    file = root / "data/img/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"compressor": {"id": "my_codec"}}))
    with pytest.raises(UserError, match="is compressed with my_codec: pip install imagecodecs"):
        open_(root)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UserError, match=r"needs zarr: pip install -r requirements-zarr.txt"):
        open_(root)
    assert os.path.isfile(os.path.join(os.path.dirname(__file__), "..", "requirements-zarr.txt"))


def test_images_in_jpeg_xl_are_read(tmp_path, open_):
    """As UMI publishes them; decoded frames are close to those recorded."""
    codecs = pytest.importorskip("imagecodecs.numcodecs")
    root = make_zarr(tmp_path / "d.zarr")
    codecs.register_codecs(verbose=False)
    group = zarr.open_group(root, mode="a")
    pictures = group["data/img"][:]
    del group["data/img"]
    group.create_array(
        "data/img",
        shape=pictures.shape,
        chunks=(1, *SIZE, 3),
        dtype="u1",
        compressors=codecs.Jpegxl(level=99),
    )
    group["data/img"][:] = pictures
    images = open_(root).images(np.arange(36))[:, 0].numpy()
    assert [read(frame)[0] for frame in images] == list(range(36))


def test_chunks_that_are_not_there_are_named(tmp_path, open_, capsys):
    root = make_zarr(tmp_path / "d.zarr")
    open_(root)
    assert "missing" not in capsys.readouterr().out
    (root / "data/img/2.0.0.0").unlink()
    store = open_(root)
    assert "data/img: 1 of 8 chunks are missing and read as 0: copy the buffer" in capsys.readouterr().out
    assert store.images(np.arange(10, 15)).max() == 0


@pytest.mark.parametrize("missing", [None, "data/pose/0.0", "data/pose_vel/0.0"])
def test_keys_that_begin_alike_are_told_apart_in_a_zip(tmp_path, open_, capsys, missing):
    steps = np.arange(sum(LENGTHS))
    names = {"pose": state_of(steps, 3), "pose_vel": action_of(steps, 3)}
    root = make_zarr(tmp_path / "d.zarr", **names)
    if missing:
        (root / missing).unlink()
    shutil.make_archive(str(tmp_path / "e.zarr"), "zip", root)
    keys = {"state_keys": ("pose",), "action_keys": ("pose_vel",)}
    for buffer in (root, tmp_path / "e.zarr.zip"):
        with suppress(UserError):  # an action that never changes
            open_(buffer, **keys)
        said = capsys.readouterr().out
        assert re.findall(r"(\S+): 1 of 1 chunks are missing", said) == ([missing[:-4]] if missing else [])


def test_a_zip_of_the_folder_instead_of_its_content_is_named(tmp_path, open_):
    make_zarr(tmp_path / "replay.zarr")
    shutil.make_archive(str(tmp_path / "d.zarr"), "zip", tmp_path, "replay.zarr")
    with pytest.raises(UserError, match=r"d.zarr.zip holds the buffer in a folder, replay.zarr/: zip its"):
        open_(tmp_path / "d.zarr.zip")


def test_datasets_that_go_by_their_names_are_chosen_by_these(tmp_path):
    roots = tuple(str(make_zarr(tmp_path / f"{name}.zarr")) for name in ("fold", "lift"))
    options = {"cache_dir": tmp_path / "cache", "fps": 10}
    both = DataConfig(roots, task=("fold", "lift"), task_weights=(2, 1), **options)
    assert open_dataset(both).task_weights == (2, 1)
    with pytest.raises(UserError, match='"lift", one of the datasets, is not among --task: leave out that'):
        open_dataset(DataConfig(roots, task=("fold",), **options))
