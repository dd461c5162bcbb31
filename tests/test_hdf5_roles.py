"""Which files are read, which parts of an HDF5 file are used or left out, and what is printed about it."""

import re
import shutil

import h5py
import numpy as np
import pytest
from hdf5_factory import encode, make_hdf5, write_images
from lerobot_factory import action_of, draw, read, state_of

from common.data import DataConfig, open_dataset
from common.errors import UserError

IMAGES = "observations/images/"
SIZE = (32, 48)


@pytest.fixture
def open_(tmp_path):
    def open_(root, **options):
        options = {"cache_dir": tmp_path / "cache", "ingest_workers": 1} | options
        return open_dataset(DataConfig((str(root),), **options))

    return open_


@pytest.fixture
def one(tmp_path):
    """A dataset of one ALOHA file, and the file, open for changes."""
    root = make_hdf5(tmp_path / "d", (6,))

    def one(change):
        with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
            change(file)
        return root

    return one


def unused(text):
    return re.findall(r"^  not used +(.*)$", text, re.MULTILINE)


def pictures(first=0, count=6, camera=0):
    return np.stack([draw(first + step, camera, SIZE) for step in range(count)])


def put(key, values):
    def change(file):
        if key in file:
            del file[key]
        file[key] = values

    return change


FUTURE = ["next_obs", "next_observations", "future", "future_obs", "goal", "obs/next", "subgoals"]
FUTURE = [f"{group}/images/cam_high" for group in FUTURE]
FUTURE += ["observations/images/next_cam_high", "observations/next/cam_high", "obs_next/cam_high"]
OUTCOME = ["infos/frame", "info/render/rgb", "env_states/rgb"]
NO_COLOUR = [
    "cam_depth",
    "depth",
    "front_seg",
    "mask",
    "segmentation_left",
    "ir_left",
    "headDepth",
    "infra1",
    "ir2",
]
REASONS = {key: "the future" for key in FUTURE} | {key: "no observation" for key in OUTCOME}
REASONS |= {IMAGES + name: "no 8-bit colour image" for name in NO_COLOUR}


OUTSIDE = ["obs_tp1/cam_high", "later/cam_high", "video", "render/rgb", "observations_t1/images/cam_high"]
REASONS |= {key: "cameras that are not chosen, or outside the observations" for key in OUTSIDE}


@pytest.mark.parametrize("key", REASONS)
def test_pictures_that_are_no_cameras_by_their_name(one, open_, capsys, key):
    root = one(put(key, pictures(1)))
    assert open_(root).cameras == ("high",)
    (line,) = unused(capsys.readouterr().out)
    name, _, why = line.partition(": ")
    assert why == REASONS[key]
    assert key.startswith(name.rstrip("*"))
    asked = open_(root, cameras=(key, "high"))
    assert asked.camera_keys == (key, IMAGES + "cam_high")
    assert read(asked.images(np.arange(1)).numpy()[0, 0])[0] == 1


def depth(dtype, *shape):
    return np.linspace(400, 4000, 6 * np.prod(shape)).reshape(6, *shape).astype(dtype)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (depth("u2", *SIZE), "uint16"),
        (depth("u2", *SIZE, 1), "uint16"),
        (depth("i2", 1, *SIZE), "int16"),
        (depth("f4", *SIZE), "float32"),
        (depth("f4", *SIZE, 3), "float32"),
        (pictures() / np.float32(255), "float32"),
        (pictures() > 100, "bool"),
        ((pictures() > 100).astype("f4"), "float32"),
        (pictures().astype("f4") + np.float32(0.5), "float32"),
        (np.zeros((6, 3, 32, 3), "u1"), "uint8"),  # which axis is colour?
        (pictures()[..., 0], "uint8"),
    ],
)
def test_arrays_that_are_no_colour_images(one, open_, capsys, values, said):
    key = IMAGES + "cam_top"
    root = one(put(key, values))
    assert open_(root).cameras == ("high",)
    assert unused(capsys.readouterr().out) == [f"{key} ({said}): no 8-bit colour image"]
    for name in (key, "cam_top", "top"):
        with pytest.raises(
            UserError, match=rf"--cameras {name} names {key}, which is no .*{said}: choose other"
        ):
            open_(root, cameras=(name,))
    with pytest.raises(UserError, match=rf"--camera-keys {key} holds no images of 8 bits"):
        open_(root, camera_keys=(key,))


@pytest.mark.parametrize("dtype", ["f4", "f8", "u2", "i8"])
def test_pictures_in_wider_numbers_are_read_exactly(one, open_, dtype):
    root = one(put(IMAGES + "cam_top", pictures().astype(dtype)))
    images = open_(root, cameras=("top",)).images(np.arange(6)).numpy()
    np.testing.assert_array_equal(images[:, 0], pictures().transpose(0, 3, 1, 2))


def test_pictures_that_become_fractions_later_are_refused(one, open_):
    values = pictures().astype("f4")
    values[4] /= 255
    with pytest.raises(UserError, match=r"Episode 0 .*cam_top, step 4 \(its pixels, float32, are not whole"):
        open_(one(put(IMAGES + "cam_top", values)))


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.linspace(0, 60000, 32 * 48).reshape(SIZE).astype("u2"), "16-bit I;16 PNG"),
        (draw(3, 0, SIZE)[..., 0], "L PNG"),
    ],
)
def test_encoded_images_without_colour(one, open_, capsys, picture, said):
    def change(file):
        item = file.create_dataset(IMAGES + "cam_top", (6,), h5py.vlen_dtype(np.uint8))
        for step in range(6):
            item[step] = np.frombuffer(encode(picture), np.uint8)

    root = one(change)
    assert open_(root).cameras == ("high",)
    assert unused(capsys.readouterr().out) == [f"{IMAGES}cam_top ({said}): no 8-bit colour image"]
    with pytest.raises(UserError, match="which is no 8-bit colour image but"):
        open_(root, cameras=("top",))


def test_an_episode_that_turns_grey_is_refused(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (5, 4))
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        put(IMAGES + "cam_high", file[IMAGES + "cam_high"][..., :1])(file)
    with pytest.raises(
        UserError, match=r"Episode 1 .*has uint8 images of 1 colours in observations/images/cam"
    ):
        open_(root)


def test_a_grey_camera_alone_has_to_be_asked_for(one, open_):
    root = one(put(IMAGES + "cam_high", pictures()[..., :1]))
    with pytest.raises(
        UserError, match=r"no colour camera, but a policy needs one \(--cameras \S+ takes the others"
    ):
        open_(root)
    assert open_(root, cameras=("high",)).cameras == ("high",)


def test_images_outside_the_observations_have_to_be_asked_for(one, open_):
    def change(file):
        file.move(IMAGES + "cam_high", "pictures/cam_high")

    root = one(change)
    for keys in ({}, {"state_keys": ("observations/qpos",), "action_keys": ("action",)}):
        with pytest.raises(
            UserError, match=r"no colour camera, .* \(--cameras pictures/cam_high takes the others"
        ):
            open_(root, **keys)
    assert open_(root, cameras=("high",)).camera_keys == ("pictures/cam_high",)
    assert open_(root, camera_keys=("/pictures/cam_high",)).cameras == ("high",)


def test_every_vector_that_is_not_used_is_named(one, open_, capsys):
    def change(file):
        for key in ("observations/qvel", "observations/gripper", "action_eef", "base_velocity"):
            file[key] = np.ones((6, 2))
        file["observations/text"] = np.array([b"pick"] * 6)
        file["intrinsics"] = np.ones((3, 3))
        file["scalar"] = 4.0
        file["observations/linked"] = h5py.SoftLink("/action")

    store = open_(one(change))
    assert store.state.shape == store.action.shape == (6, 3)
    assert unused(capsys.readouterr().out) == [
        "action_eef (2): take it with --action-keys",
        "base_velocity (2), observations/gripper (2), observations/qvel (2): take it with --state-keys",
        "intrinsics (3): not one row a step",
        "observations/text (|S4), scalar (float64): neither numbers nor images of a known kind",
        "observations/linked (a soft link): outside the episodes",
    ]


def test_what_only_later_episodes_have_is_named(tmp_path, open_, capsys):
    root = make_hdf5(tmp_path / "d", (5, 4))
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        file["base_action"] = np.ones((4, 2))
    assert open_(root).action.shape == (9, 3)
    assert unused(capsys.readouterr().out) == ["base_action: only some episodes have it"]
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["base_action"] = np.ones((5, 2))
    assert open_(root).action.shape == (9, 5)


def test_what_only_the_action_of_a_grouped_layout_has_belongs_to_it(tmp_path, open_, capsys):
    root = make_hdf5(tmp_path / "d", (5,), layout="grouped")
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["action/base_velocity"] = np.arange(10.0).reshape(5, 2)
        file["action/timestamp"] = file["observation/timestamp"] = np.arange(5.0)
        file["action/next/joint_pos"] = file["observation/next/joint_pos"] = np.ones((5, 2))
        file["action/chunks"] = np.ones((5, 8, 3))
    store = open_(root)
    assert store.action_names[:3] == store.state_names
    assert store.action_names[3:] == ("base_velocity.0", "base_velocity.1")
    np.testing.assert_array_equal(store.action[:, :3], action_of(np.arange(5), 3))
    np.testing.assert_array_equal(store.action[:, 3:], np.arange(10.0).reshape(5, 2))
    said = " ".join(unused(capsys.readouterr().out))
    for key in ("action/timestamp", "action/chunks (24)", "action/next/*", "observation/force (2)"):
        assert key in said


def test_an_index_finger_is_no_bookkeeping(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (5,), layout="grouped")
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        for finger in ("thumb", "index"):
            file[f"action/hand_joint_pos/{finger}"] = file[f"observation/hand_joint_pos/{finger}"] = np.ones(
                (5, 2)
            )
        file["action/frame_index"] = file["observation/frame_index"] = np.arange(5.0)
    names = open_(root).action_names
    assert {"hand_joint_pos/index.0", "hand_joint_pos/thumb.1"} <= set(names)
    assert len(names) == 7


def test_two_cameras_never_share_a_name(one, open_):
    def change(file):
        file["observations/images/high_rgb"] = pictures(10)
        file["observations/images/High"] = pictures(20)

    root = one(change)
    store = open_(root)
    assert len({name.casefold() for name in store.cameras}) == 3
    firsts = {IMAGES + "cam_high": 0, IMAGES + "high_rgb": 10, IMAGES + "High": 20}
    for place, key in enumerate(store.camera_keys):
        assert read(store.images(np.arange(1)).numpy()[0, place])[0] == firsts[key]
        assert open_(root, cameras=(key,)).camera_keys == (key,)
    with pytest.raises(UserError, match=f"--cameras high could be {IMAGES}cam_high and {IMAGES}high_rgb"):
        open_(root, cameras=("high",))


def test_dimensions_never_share_a_name(one, open_):
    def change(file):
        file["obs/qpos"], file["observations/a"] = np.ones((2, 6, 2))
        file["observations/a.0"] = np.ones(6)

    keys = ("observations/qpos", "obs/qpos", "observations/a", "observations/a.0")
    store = open_(one(change), state_keys=keys)
    assert store.state_names == (
        *(f"joint_{i}" for i in range(3)),
        *("qpos.0", "qpos.1", "a.a.0", "a.1", "a.0.a.0"),
    )
    both = open_(one(lambda file: None), state_keys=("obs/qpos", "observations/qpos", "observations/a"))
    assert len(set(both.state_names)) == 7
    with pytest.raises(UserError, match="--state-keys obs/qpos obs/qpos names an array twice"):
        open_(one(lambda file: None), state_keys=("obs/qpos", "obs/qpos"))


def test_arrays_of_no_width_are_no_state(one, open_):
    root = one(put("action", np.zeros((6, 0))))
    with pytest.raises(UserError, match="--action-keys action has no numbers in a step"):
        open_(root)
    root = one(put("action", h5py.Empty("f8")))
    with pytest.raises(UserError, match=r"The layout of .* is unknown"):
        open_(root)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fps", 12.0),
        ("fps", np.array([12])),
        ("fps", np.array([[12.0]])),
        ("fps", b"12"),
        ("fps", "12"),
        ("fps", np.array([b"12"])),
        ("env_args", '{"env_kwargs": {"control_freq": 12}}'),
        ("env_args", np.bytes_(b'{"env_kwargs": {"control_freq": 12}}')),
        ("env_args", np.array([b'{"env_kwargs": {"control_freq": 12}}'])),
    ],
)
def test_rates_in_any_kind_of_attribute(tmp_path, open_, name, value):
    root = make_hdf5(tmp_path / "d", (5,), fps=None)
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file.attrs[name] = value
        file.attrs["hz"], file.attrs["frequency"] = h5py.Empty("f8"), np.array([1.0, 2.0])  # no usable value
    assert open_(root).fps == 12


# Which files are read


def test_files_that_file_managers_and_editors_leave(tmp_path, open_, capsys):
    root = make_hdf5(tmp_path / "d", (5, 4, 3))
    before = open_(root)
    for name in ("day_0/._episode_0.hdf5", "._episode_1.HDF5", ".DS_Store", "Thumbs.db", "episode_0.hdf5~"):
        (root / name).write_bytes(b"\0\5\x16\7")
    for folder in (".ipynb_checkpoints", ".Trash-1000", "__MACOSX"):
        (root / folder).mkdir()
        shutil.copy(root / "day_0/episode_0.hdf5", root / folder / "episode_0.hdf5")
    capsys.readouterr()
    after = open_(root)
    assert after.episode_indices.tolist() == [0, 1, 2]
    assert after.fingerprint == before.fingerprint
    assert "1 more not read: hidden files are not episodes" in capsys.readouterr().out


def test_suffixes_in_capitals_and_hidden_folders_that_are_given(tmp_path, open_):
    root = make_hdf5(tmp_path / ".hidden" / "d", (5, 4))
    (root / "day_1/episode_1.hdf5").rename(root / "day_1/episode_1.HDF5")
    (root / "day_0/episode_0.hdf5").rename(root / "day_0/episode_0.H5")
    store = open_(tmp_path / ".hidden")
    assert store.episode_indices.tolist() == [0, 1]
    np.testing.assert_array_equal(store.state, state_of(np.arange(9), 3))
    assert open_(root / "day_1/episode_1.HDF5").num_steps == 4
    shutil.move(root / "day_0/episode_0.H5", tmp_path / ".own.h5")
    assert open_(tmp_path / ".own.h5").num_steps == 5


def test_a_file_that_is_none_of_the_episodes_does_not_decide_what_they_are(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (5, 4))
    for name in ("calibration_0.h5", "a.h5"):
        with h5py.File(root / name, "w") as file:
            file["matrix"] = np.eye(4)
    with pytest.raises(UserError, match=r"^Episode \d{9} \((calibration_0|a).h5\) has no observations/qpos"):
        open_(root)
    store = open_(root, skip_bad_episodes=True)
    assert store.episode_indices.tolist() == [0, 1]
    assert open_(root, episodes=("1",)).state.tolist() == state_of(np.arange(5, 9), 3).tolist()


def test_numbers_stay_when_an_episode_breaks(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (5, 4, 3))
    for name in ("day_0/episode_0.hdf5", "day_1/episode_1.hdf5"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(b"nothing")
        store = open_(root, skip_bad_episodes=True)
        assert store.episode_indices.tolist() == [n for n in range(3) if str(n) not in name]
        np.testing.assert_array_equal(open_(root, episodes=("2",)).state, state_of(np.arange(9, 12), 3))
        (root / name).write_bytes(content)


def test_a_folder_of_datasets_says_so(tmp_path, open_):
    (tmp_path / "many/a/meta").mkdir(parents=True)
    (tmp_path / "many/a/meta/info.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"many is no dataset but contains some: give one, such as .*many/a\."
    ):
        open_(tmp_path / "many")


def test_variable_images_are_written_as_before(one, open_):
    """The factory's kinds of images keep their numbers next to arrays that are left out."""

    def change(file):
        write_images(file, IMAGES + "cam_left", list(pictures(7, camera=1)), "variable")
        file["next_obs/x"] = np.ones((6, 2))

    images = open_(one(change), cameras=("left", "high")).images(np.arange(6)).numpy()
    assert [read(row[0]) for row in images] == [(7 + step, 1) for step in range(6)]
