import h5py
import numpy as np
import pytest
from hdf5_factory import make_hdf5

from common.data import DataConfig, open_dataset
from common.data.rotation import (
    LARGEST_ANGLE,
    SOURCES,
    Rotations,
    from_matrix,
    gram_schmidt,
    parse,
    to_matrix,
)
from common.errors import UserError


def turned(values, kind, vector):
    """Rotate a vector by the definition of each representation, one rotation at a time."""
    if kind == "euler":
        for axis, angle in enumerate(values):  # about fixed x, then y, then z
            i, j = [(1, 2), (2, 0), (0, 1)][axis]
            c, s = np.cos(angle), np.sin(angle)
            vector = vector.copy()
            vector[i], vector[j] = c * vector[i] - s * vector[j], s * vector[i] + c * vector[j]
        return vector
    if kind == "axis-angle":  # Rodrigues
        angle = np.linalg.norm(values)
        k = values / angle
        return (
            vector * np.cos(angle)
            + np.cross(k, vector) * np.sin(angle)
            + k * (k @ vector) * (1 - np.cos(angle))
        )
    values = values / np.linalg.norm(values)
    xyz, w = (values[:3], values[3]) if kind == "quaternion" else (values[1:], values[0])
    return vector + 2 * np.cross(xyz, np.cross(xyz, vector) + w * vector)


@pytest.mark.parametrize("kind", SOURCES)
def test_matrices_turn_vectors_as_the_definitions_say(kind):
    rng = np.random.default_rng(0)
    for values in rng.normal(size=(50, SOURCES[kind])):
        vector = rng.normal(size=3)
        matrix = to_matrix(values, kind)
        np.testing.assert_allclose(matrix @ vector, turned(values, kind, vector), atol=1e-12)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_way_back_gives_the_same_rotation(kind):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(300, SOURCES[kind]))
    values[:4] = 0
    if kind.startswith("quaternion"):  # half turns about each axis, and no rotation
        values[:4] = np.eye(4)
    matrix = to_matrix(values, kind)
    again = from_matrix(matrix, kind)
    np.testing.assert_allclose(to_matrix(again, kind), matrix, atol=1e-9)
    assert np.isfinite(again).all()


def test_six_numbers_are_continuous_where_quaternions_flip():
    angles = np.linspace(0, 6 * np.pi, 400)
    smooth = np.stack([0 * angles, np.sin(angles / 2), 0 * angles, np.cos(angles / 2)], -1)
    flipped = smooth * np.where(np.arange(400) % 7 < 3, -1, 1)[:, None]
    rotations = Rotations("quaternion", (0,), ("qx", "qy", "qz", "qw"))
    six = rotations.encode(flipped)
    assert np.abs(np.diff(flipped, axis=0)).max() > 1
    assert np.abs(np.diff(six, axis=0)).max() < 0.05
    np.testing.assert_allclose(six, rotations.encode(smooth), atol=1e-6)
    back = rotations.decode(six)
    rotations.follow(back)  # the same rotation, with one sign along the whole chunk
    assert np.abs(np.diff(back, axis=0)).max() < 0.05
    np.testing.assert_allclose(np.abs((back * smooth).sum(-1)), 1, atol=1e-6)


@pytest.mark.parametrize("kind", SOURCES)
def test_numbers_continue_those_before_them(kind):
    angle = np.linspace(2.5, 5.5, 40)[:, None]  # beyond a half turn
    if kind.startswith("quaternion"):
        recorded = np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * [0.6, 0, 0.8]], 1)
        recorded = recorded if kind.endswith("wxyz") else np.roll(recorded, -1, 1)
    else:
        recorded = (
            angle * [0.6, 0, 0.8] if kind == "axis-angle" else np.concatenate([angle, 0 * angle, -angle], 1)
        )
    rotations = Rotations(kind, (1,), ("x", *"abcd"[: recorded.shape[1]]))
    recorded = np.concatenate([angle, recorded], 1).astype(np.float32)
    back = rotations.decode(rotations.encode(recorded))
    assert np.abs(np.diff(back, axis=0)).max() > 1 or (back[-1] * recorded[-1]).sum() < 0
    rotations.follow(back)
    np.testing.assert_allclose(back, recorded, atol=1e-5)
    second = rotations.decode(rotations.encode(recorded[20:]))
    rotations.follow(second, recorded[19])
    np.testing.assert_allclose(second, recorded[20:], atol=1e-5)


def test_angles_that_continue_stay_within_those_of_recordings():
    yaw = np.array([0, 0, 1]) * np.linspace(0, 20, 400)[:, None]
    for kind in ("euler", "axis-angle"):
        rotations = Rotations(kind, (0,), ("r", "p", "y"))
        six = rotations.encode(yaw)
        back = rotations.decode(six)
        rotations.follow(back)
        np.testing.assert_allclose(rotations.encode(back), six, atol=1e-5)
        assert 6.2 < np.abs(back).max() <= LARGEST_ANGLE
        assert (np.abs(np.diff(back, axis=0)).max(1) > 1).sum() == 3


def test_gram_schmidt_makes_a_rotation_of_any_six_numbers():
    six = np.random.default_rng(2).normal(size=(100, 6))
    matrix = gram_schmidt(six)
    np.testing.assert_allclose(
        matrix.swapaxes(-1, -2) @ matrix, np.broadcast_to(np.eye(3), (100, 3, 3)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(matrix), 1)
    np.testing.assert_allclose(
        gram_schmidt(matrix[..., :2].swapaxes(-1, -2).reshape(-1, 6)), matrix, atol=1e-9
    )


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("six", [np.zeros(6), np.ones(6), [0, 0, 0, 1, 2, 3], [1, 2, 3, -2, -4, -6]])
def test_six_numbers_from_which_no_rotation_follows_still_give_one(six, kind):
    matrix = gram_schmidt(np.array([six, six], float))
    np.testing.assert_allclose(matrix.swapaxes(-1, -2) @ matrix, np.stack([np.eye(3)] * 2), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(matrix), 1)
    assert np.isfinite(from_matrix(matrix, kind)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_a_pitch_straight_up_or_down_gives_the_same_rotation(pitch):
    rotations = Rotations("euler", (0,), ("roll", "pitch", "yaw"))
    recorded = np.array([[0.3, pitch, 0.7], [0, pitch, 0], [-2, pitch, 1], [0.3, pitch * (1 - 1e-8), 0.7]])
    back = rotations.decode(rotations.encode(recorded))
    np.testing.assert_allclose(to_matrix(back, "euler"), to_matrix(recorded, "euler"), atol=1e-3)


def test_dimensions_are_found_by_name_and_others_left_alone():
    names = ("x", "left_quat.0", "left_quat.1", "left_quat.2", "left_quat.3", "grip", "qx", "qy", "qz", "qw")
    found = Rotations.find(names, "quaternion", None)
    assert found.starts == (1, 6)
    assert found.names() == (
        "x",
        *(f"left_quat.0:r{i}" for i in range(6)),
        "grip",
        *(f"qx:r{i}" for i in range(6)),
    )
    values = np.random.default_rng(3).normal(size=(5, 10)).astype(np.float32)
    encoded = found.encode(values)
    assert encoded.shape == (5, 14)
    assert (encoded[:, [0, 7]] == values[:, [0, 5]]).all()
    back = found.decode(encoded)
    assert (back[:, [0, 5]] == values[:, [0, 5]]).all()
    for start in (1, 6):
        unit = values[:, start : start + 4]
        unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
        np.testing.assert_allclose(np.abs((unit * back[:, start : start + 4]).sum(-1)), 1, atol=1e-6)
    assert Rotations.find(names, "quaternion", "left").starts == (1,)
    with pytest.raises(UserError, match="are 5 dimensions, but a rotation has 4"):
        Rotations.find((*names[:5], "quat_valid"), "quaternion", None)


def test_options_that_are_not_understood():
    assert parse("quaternion->6d") == (None, "quaternion")
    assert parse("eef:axis-angle->6d") == ("eef", "axis-angle")
    for wrong in ("quaternion", "quaternion->7d", "spin->6d", "->6d", ""):
        with pytest.raises(UserError, match="is not understood: write KIND->6d"):
            parse(wrong)


def test_a_dataset_is_re_expressed_and_its_store_shared(tmp_path):

    root = make_hdf5(tmp_path / "d", (6, 5), layout="robomimic", dims=(3, 3))
    quaternions = np.random.default_rng(4).normal(size=(11, 4))
    with h5py.File(root / "demos.hdf5", "a") as file:
        for demo, rows in (("demo_0", slice(0, 6)), ("demo_1", slice(6, 11))):
            file[f"data/{demo}/obs/robot0_eef_quat"] = quaternions[rows]

    def open_(**options):
        return open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", **options))

    plain, store = open_(), open_(rotation="quaternion->6d")
    assert store.path == plain.path
    assert plain.state.shape == (11, 7)
    assert store.state.shape == (11, 9)
    matrices = to_matrix(quaternions, "quaternion")
    np.testing.assert_allclose(store.state[:, 3:6], matrices[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(store.state[:, 6:9], matrices[:, :, 1], atol=1e-6)
    assert (store.action == plain.action).all()
    with pytest.raises(UserError, match=r"no dimension of .* is named like one"):
        open_(rotation="euler->6d")
    with h5py.File(root / "demos.hdf5", "a") as file:
        file["data/demo_1/obs/robot0_eef_quat"][2] = 0
    with pytest.raises(UserError, match=r"episode 1 of .* a quaternion of four zeros"):
        open_(rotation="quaternion->6d")


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("quaternion", "qw qx qy qz", "qw, qx, qy, qz are not in the order x y z w"),
        ("quaternion-wxyz", "rot_x rot_y rot_z rot_w", "are not in the order w x y z"),
        ("euler", "shoulder_pitch shoulder_roll shoulder_yaw", "are not in the order roll pitch yaw"),
        ("quaternion", "qx qy qz qw", None),
        ("quaternion", "quat.0 quat.1 quat.2 quat.3", None),
        ("euler", "base_roll base_pitch base_yaw", None),
        ("axis-angle", "rot.z rot.y rot.x", None),
    ],
)
def test_names_that_say_another_order_are_refused(kind, names, said):
    if said is None:
        assert Rotations.find(names.split(), kind, None).listed() == names.replace(" ", ", ")
    else:
        with pytest.raises(UserError, match=said):
            Rotations.find(names.split(), kind, None)


def test_joints_with_the_names_of_angles_are_no_rotations(tmp_path, capsys):
    root = make_hdf5(tmp_path / "d", (6, 5), layout="robomimic", dims=(3, 3))
    with h5py.File(root / "demos.hdf5", "a") as file:
        for demo, steps in (("demo_0", 6), ("demo_1", 5)):
            file[f"data/{demo}/obs/wrist_rpy"] = np.full((steps, 3), 1.9)

    def open_(rotation):
        keys = ("obs/wrist_rpy",)
        return open_dataset(
            DataConfig((str(root),), (), cache_dir=tmp_path, rotation=rotation, state_keys=keys)
        )

    with pytest.raises(UserError, match=r"episode 0 of .* has a pitch of more than pi / 2.*wrist_rpy"):
        open_("euler->6d")
    store = open_("wrist_rpy:euler->6d")  # whoever names them means it
    assert store.state.shape == (11, 6)
    said = "state: wrist_rpy.0, wrist_rpy.1, wrist_rpy.2 are rotations, by --rotation wrist_rpy:euler->6d"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("largest", [180.0, 2.5 * np.pi])
def test_angles_in_degrees_or_with_turns_are_no_rotations(tmp_path, largest):
    root = make_hdf5(tmp_path / "d", (6, 5))
    with h5py.File(root / "day_1/episode_1.hdf5", "a") as file:
        file["observations/qpos"][...] = 0.1
        file["observations/qpos"][3, 2] = -largest
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file["observations/qpos"][...] = 3.14
    config = DataConfig((str(root),), cache_dir=tmp_path / "cache", rotation="joint:euler->6d")
    with pytest.raises(UserError, match=r"episode 1 of .* holds angles of more than 2 pi: convert"):
        open_dataset(config)
