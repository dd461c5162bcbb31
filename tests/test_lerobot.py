import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_factory import (
    ACTION,
    FPS,
    STATE,
    action_of,
    draw,
    edit_column,
    edit_rows,
    make_dataset,
    read,
    state_of,
    write_video,
)
from PIL import Image

from common.data import DataConfig, open_dataset, open_source
from common.data.cameras import short_name
from common.data.ingest import read_records
from common.errors import UserError

HIGH, LEFT, RIGHT, HEAD = (f"observation.images.cam_{name}" for name in ("high", "left", "right", "head"))
DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{HIGH}/chunk-000/file-000.mp4"


@pytest.fixture
def open_(tmp_path):
    def open_(root, **options):
        return open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", **options))

    return open_


@pytest.fixture
def refused(open_, tmp_path):
    """Opening fails with one sentence that matches the pattern, and leaves no store behind.

    With `decoding`, it fails at an episode's frames; those of earlier episodes stay in an unfinished store.
    """

    def refused(root, pattern, decoding=False, **options):
        with pytest.raises(UserError, match=pattern) as caught:
            open_(root, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith((".", ")"))
        left = [
            path
            for path in (tmp_path / "cache").rglob("*")
            if path.name not in ("stores", "hashes")
            and path.parent.name != "hashes"
            and path.suffix != ".lock"
        ]
        records = [record for path in left if path.is_dir() for record in read_records(path).values()]
        finished = [record.index for record in records if record.crc32 is not None]
        assert finished == (list(range(int(message.split()[1]))) if decoding else [])
        assert left == [] or (finished and "meta.json" not in [path.name for path in left])
        return message

    return refused


def check_aligned(store, episodes=None):
    """Every frame shows the same step as its state and action."""
    images = store.images(np.arange(store.num_steps)).numpy()
    steps = np.array([read(row[0])[0] for row in images])
    for camera in range(images.shape[1]):
        assert [read(row[camera])[0] for row in images] == steps.tolist()
    np.testing.assert_array_equal(store.state, state_of(steps, store.state.shape[1]))
    np.testing.assert_array_equal(store.action, action_of(steps, store.action.shape[1]))
    return steps


# Reading


@pytest.mark.parametrize("gop", [1, 4, 250])
@pytest.mark.parametrize("episodes_per_file", [1, 2, 5])
def test_video_frames_lie_beside_their_states(tmp_path, open_, gop, episodes_per_file):
    lengths = (12, 2, 15, 7, 9)
    root = make_dataset(tmp_path / "d", lengths, (HIGH, LEFT), gop=gop, episodes_per_file=episodes_per_file)
    store = open_(root)
    assert (check_aligned(store) == np.arange(sum(lengths))).all()
    assert store.episode_starts.tolist() == np.cumsum([0, *lengths]).tolist()
    assert [read(frame)[1] for frame in store.images(np.array([3]))[0].numpy()] == [0, 1]
    assert (store.fps, store.task, store.image_size) == (FPS, "fold the towel", (32, 48))


def test_image_cameras_are_exact(tmp_path, open_):
    root = make_dataset(tmp_path / "d", cameras=(HIGH, LEFT), video=False)
    store = open_(root)
    check_aligned(store)
    images = store.images(np.arange(store.num_steps)).numpy()
    for step, camera in ((0, 0), (11, 1), (12, 0), (20, 1), (35, 0)):
        assert (images[step, camera].transpose(1, 2, 0) == draw(step, camera, (32, 48))).all()


def test_image_files_beside_the_tables_are_read_only_inside_the_dataset(tmp_path, open_, refused):
    root = make_dataset(tmp_path / "d", cameras=(HIGH,), video=False)

    def move_out(cells):
        (root / "images").mkdir()
        for number, cell in enumerate(cells):
            (root / "images" / f"{number}.png").write_bytes(cell["bytes"])
            cell["bytes"], cell["path"] = None, f"images/{number}.png"

    edit_column(root / DATA, HIGH, move_out)
    check_aligned(open_(root))
    shutil.rmtree(tmp_path / "cache")
    edit_column(root / DATA, HIGH, lambda cells: cells[0].update(path="../secret.png"))
    refused(root, "neither in the table nor in the dataset's folder")


@pytest.mark.parametrize("video", [True, False])
def test_frames_are_resized_without_losing_their_place(tmp_path, open_, video):
    sizes = {HIGH: (64, 96), LEFT: (32, 48)}
    root = make_dataset(tmp_path / "d", cameras=sizes, video=video)
    for given, size in (((24,), (24, 24)), ((40, 60), (40, 60)), ((80, 120), (80, 120))):
        store = open_(root, image_size=given)
        assert store.image_size == size
        check_aligned(store)


def late(times):
    return [time + 0.04 * (step % 3 == 1) for step, time in enumerate(times)]


def test_uneven_timestamps_are_kept_beside_images_and_refused_beside_videos(tmp_path, open_, refused):
    root = make_dataset(tmp_path / "d", (12, 9), video=False)
    edit_column(root / DATA, "timestamp", late)
    store = open_(root)
    check_aligned(store)
    assert store.timestamps[1] == pytest.approx(0.14)
    shutil.rmtree(tmp_path / "cache")
    root = make_dataset(tmp_path / "e", (12, 9))
    edit_column(root / DATA, "timestamp", late)
    refused(root, r"^Episode 0 has timestamp 0\.14 s and frame_index 1 at step 1.*also unusable: 1")


@pytest.mark.parametrize("names", ["flat", "nested", "dict", "index"])
def test_names_are_flattened(tmp_path, open_, names):
    store = open_(make_dataset(tmp_path / "d", names=names, dims=(3, 2)))
    assert store.state_names == ("joint_0", "joint_1", "joint_2")
    assert store.action_names == ("target_0", "target_1")
    assert not store.shared_space


def test_nameless_dimensions_are_numbered(tmp_path, open_):
    store = open_(make_dataset(tmp_path / "d", names=None, dims=(2, 2)))
    assert store.state_names == ("state_0", "state_1")
    assert store.action_names == ("action_0", "action_1")
    assert not store.shared_space


def test_other_keys_and_number_types(tmp_path, open_):
    root = make_dataset(tmp_path / "d")
    rename(root, STATE, "robot.joints")
    for file in (root / "data").glob("**/*.parquet"):
        edit_column(
            file, "robot.joints", lambda rows: [[float(x) for x in row] for row in rows]
        )  # float64 lists
    check_aligned(open_(root, state_keys=("robot.joints",)))


def rename(root, old, new):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][new] = info["features"].pop(old)
    (root / "meta/info.json").write_text(json.dumps(info))
    for file in (root / "data").glob("**/*.parquet"):
        table = pq.read_table(file, partitioning=None)
        pq.write_table(
            table.rename_columns([new if name == old else name for name in table.column_names]), file
        )


def change_info(root, change):
    info = json.loads((root / "meta/info.json").read_text())
    change(info)
    (root / "meta/info.json").write_text(json.dumps(info))


def test_short_names():
    assert short_name("observation.images.cam_high") == "high"
    assert short_name("observation.image.left_wrist") == "left_wrist"
    assert short_name("observation.images.cam_") == "cam_"
    assert short_name("top") == "top"


def test_usual_cameras_come_first_and_others_are_announced(tmp_path, open_, capsys):
    store = open_(make_dataset(tmp_path / "a", (4,), (RIGHT, HIGH, LEFT, HEAD)))
    assert store.cameras == ("head", "left", "right")
    assert "3 of 4" in capsys.readouterr().out
    store = open_(make_dataset(tmp_path / "b", (4,), (RIGHT, HIGH)))
    assert store.cameras == ("right", "high")
    assert store.camera_keys == (RIGHT, HIGH)
    assert "cameras: right high (all in" in capsys.readouterr().out
    open_(make_dataset(tmp_path / "c", (4,), (RIGHT, LEFT, HEAD)))
    assert "cameras:" not in capsys.readouterr().out


def test_cameras_are_chosen_by_either_name(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (4,), (RIGHT, HIGH, LEFT))
    for names in (("left", "high"), (LEFT, "high"), (LEFT, HIGH)):
        store = open_(root, cameras=names)
        assert store.cameras == ("left", "high")
        assert [read(frame)[1] for frame in store.images(np.array([1]))[0].numpy()] == [2, 1]


def test_depth_cameras_are_not_colour(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (4,), (HIGH, LEFT))
    change_info(root, lambda info: info["features"][LEFT].update(info={"video.is_depth_map": True}))
    assert open_(root).cameras == ("high",)


def test_a_task_is_chosen(tmp_path, open_, refused, capsys):
    root = make_dataset(tmp_path / "d", (4, 5, 6, 3), tasks=("fold", "unfold"))
    refused(root, r'no task "unfolds" \(did you mean unfold\?\)', task=("fold", "unfolds"))
    whole = open_(root)
    assert whole.episode_tasks == ("fold", "unfold", "fold", "unfold")
    assert '2 tasks ("fold", "unfold"); choose some with --task' in capsys.readouterr().out
    store = open_(root, task=("unfold",))
    assert store.episode_indices.tolist() == [1, 3]
    assert store.task == "unfold"
    assert check_aligned(store).tolist() == [4, 5, 6, 7, 8, 15, 16, 17]


def test_a_moved_dataset_has_the_same_store_and_a_changed_one_another(tmp_path, open_):
    root = make_dataset(tmp_path / "d")
    first = open_(root)
    shutil.copytree(root, tmp_path / "e")
    assert open_(tmp_path / "e").path == first.path
    assert open_(tmp_path / "e").fingerprint == first.fingerprint
    (root / VIDEO).write_bytes((root / VIDEO).read_bytes() + b"\0" * 8)
    assert open_(root).fingerprint != first.fingerprint
    edit_column(tmp_path / "e" / DATA, ACTION, lambda rows: rows[3].__setitem__(0, 0.5))
    changed = open_(tmp_path / "e")
    assert changed.fingerprint != first.fingerprint
    assert changed.action[3, 0] == 0.5


# Refusing


def test_missing_datasets_are_not_downloaded(tmp_path, refused, monkeypatch):
    download = lambda *_, **__: pytest.fail("tried to download")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name in (
        str(tmp_path / "none"),
        "./none",
        "../none/there",
        "~/none/there/at/all",
        "none",
        "a/b/c",
        "",
    ):
        if name:
            refused(name, "was not found")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "has an unknown format")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither LeRobot's meta/info.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_hub_name_without_a_connection(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("nobody/fold_towel", "nobody/fold_towel is no folder here and could not be downloaded")


def test_a_hub_dataset_is_downloaded_without_the_videos_of_other_cameras(tmp_path, open_, monkeypatch):
    import huggingface_hub

    root, asked = make_dataset(tmp_path / "d", (4,), (HIGH, LEFT)), []

    def snapshot_download(name, *, repo_type, allow_patterns, revision=None):
        assert revision in (None, root.name)
        asked.append((name, repo_type, tuple(allow_patterns)))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    store = open_("me/towel", cameras=("left",))
    assert store.source == "me/towel"
    assert {name for name, _, _ in asked} == {"me/towel"}
    assert {kind for _, kind, _ in asked} == {"dataset"}
    patterns = [pattern for _, _, each in asked for pattern in each]
    assert f"videos/{LEFT}/*" in patterns
    assert not any(HIGH in pattern for pattern in patterns)


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_an_older_format_names_the_converter(tmp_path, refused, version):
    root = make_dataset(tmp_path / "d", changes={"codebase_version": version})
    refused(root, "lerobot.scripts.convert_dataset_v21_to_v30")


def test_the_converter_exists():
    from importlib.util import find_spec

    from common.data.lerobot_meta import CONVERTER

    parent = find_spec("lerobot").submodule_search_locations[0]
    module = CONVERTER.removeprefix("python -m lerobot.").replace(".", "/")
    from pathlib import Path

    source = (Path(parent) / f"{module}.py").read_text()
    assert all(flag in source for flag in ("--repo-id", "--root", "--push-to-hub"))


def damage_features(info):
    info["features"][STATE]["shape"] = [-3]


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.pop("codebase_version"),
        lambda info: info.update(codebase_version="new"),
        lambda info: info.update(features=[1]),
        lambda info: info.pop("features"),
        lambda info: info.update(fps=0),
        lambda info: info.update(fps="fast"),
        lambda info: info.update(video_path="../../other/{video_key}.mp4"),
        lambda info: info.update(video_path="/etc/{video_key}"),
        lambda info: info.update(video_path=3),
        damage_features,
    ],
)
def test_a_malformed_info_json(tmp_path, refused, change):
    root = make_dataset(tmp_path / "d", (4,))
    change_info(root, change)
    refused(root, r"info\.json is damaged")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"null"])
def test_an_unreadable_info_json(tmp_path, refused, content):
    root = make_dataset(tmp_path / "d", (4,))
    (root / "meta/info.json").write_bytes(content)
    refused(root, r"info\.json is damaged")


def test_a_newer_format(tmp_path, refused):
    refused(make_dataset(tmp_path / "d", (4,), changes={"codebase_version": "v4.0"}), "newer")


def test_missing_keys_name_those_there(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (4,), (HIGH, LEFT))
    there = "meta/info.json has observation.state 4x3 float32, action 4x2 float32"
    wrong = r"no --state-keys observation.stat \(did you mean observation.state\?\): "
    refused(root, wrong + there, state_keys=("observation.stat",))
    refused(root, f"no --action-keys wheels: {there}", action_keys=("wheels",))
    refused(root, f"--state-keys {HIGH} holds no numbers", state_keys=(HIGH,))
    refused(root, r"no camera hihg \(did you mean high\?\): it has high, left", cameras=("hihg",))
    refused(root, "twice", cameras=("high", HIGH))


def test_no_camera_at_all(tmp_path, refused):
    refused(make_dataset(tmp_path / "d", (4,), ()), "no colour camera")


def test_different_sizes_need_a_common_one(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (4,), {HIGH: (32, 48), LEFT: (48, 64)})
    refused(root, r"different sizes \(high 32x48, left 48x64\).*--image-size")


@pytest.mark.parametrize("size", [(0,), (-3, 4), (1, 2, 3), (10**6,)])
def test_nonsense_sizes(tmp_path, refused, size):
    refused(
        make_dataset(tmp_path / "d", (4,)),
        "--image-size is .* must be one side, or height and width",
        image_size=size,
    )


@pytest.mark.parametrize("flag", ["num_workers", "ingest_workers"])
def test_negative_workers(tmp_path, refused, flag):
    refused(
        make_dataset(tmp_path / "d", (4,)), f"--{flag.replace('_', '-')} is -1: it should be", **{flag: -1}
    )


def flip(path, start, count=400):
    content = bytearray(path.read_bytes())
    place = int(len(content) * start)
    content[place : place + count] = bytes(255 - value for value in content[place : place + count])
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be decoded"),
        (lambda path: path.write_bytes(b"no video at all" * 100), "cannot be decoded"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: flip(path, 0.3), "cannot be decoded"),
        (
            lambda path: write_video(path, [draw(i, 0, (32, 48)) for i in range(15)]),
            "has 15 frames but its episodes have 21",
        ),
        (lambda path: write_video(path, [draw(i, 0, (48, 64)) for i in range(21)]), "48x64 instead of 32x48"),
    ],
    ids=["missing", "truncated", "text", "empty", "flipped", "too few frames", "other size"],
)
def test_a_broken_video_names_episode_and_file(tmp_path, refused, open_, damage, pattern):
    root = make_dataset(tmp_path / "d", (12, 9, 15))
    damage(root / VIDEO)
    message = refused(root, pattern, decoding=True)
    assert message.startswith(("Episode 0 ", "Episode 1 "))
    assert str(root / VIDEO) in message
    assert "--skip-bad-episodes" in message
    store = open_(root, skip_bad_episodes=True)
    assert 2 in store.episode_indices
    assert len(store.skipped) == 3 - store.num_episodes > 0
    steps = check_aligned(store)
    assert steps.tolist()[-15:] == list(range(21, 36))
    assert json.loads((store.path / "meta.json").read_text())["skipped"] == list(store.skipped)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("key", [STATE, ACTION])
def test_numbers_that_are_none_name_episode_dimension_and_step(tmp_path, refused, open_, key, value):
    root = make_dataset(tmp_path / "d", (12, 9, 15))
    edit_column(root / DATA, key, lambda rows: rows[12 + 4].__setitem__(1, value))
    part, name = ("state", "joint_1") if key == STATE else ("action", "target_1")
    refused(root, rf"^Episode 1 has (nan|inf) in {part}, dimension {name}, at step 4: ")
    store = open_(root, skip_bad_episodes=True)
    assert store.episode_indices.tolist() == [0, 2]
    assert np.isfinite(check_aligned(store)).all()


def test_vectors_of_another_length(tmp_path, refused, open_):
    root = make_dataset(tmp_path / "d", (12, 9, 15))
    edit_column(root / DATA, STATE, lambda rows: rows[3].append(1.0))
    refused(root, r"^Episode 0 has 4 numbers in observation.state at step 3, but info.json says 3")
    check_aligned(open_(root, skip_bad_episodes=True))
    change_info(root, lambda info: info["features"][STATE].update(shape=[5]))
    refused_all = "Episode 0 has 3 numbers in observation.state at step 0, but info.json says 5"
    with pytest.raises(UserError, match=refused_all):
        open_(root)


def test_columns_that_hold_no_numbers(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (12,))
    edit_column(root / DATA, STATE, lambda rows: ["text"] * len(rows))
    refused(root, "observation.state, holds string instead of numbers")


@pytest.mark.parametrize("length", [1, 0])
def test_an_episode_that_is_too_short(tmp_path, refused, open_, length):
    root = make_dataset(tmp_path / "d", (12, 1, 15))
    if length == 0:
        for file, column in ((DATA, "episode_index"), (EPISODES, "length")):
            edit_column(root / file, column, lambda rows: [0 if v == 1 else v for v in rows])
        edit_column(root / EPISODES, "length", lambda rows: [13, 0, 15])
        edit_column(root / DATA, "frame_index", lambda rows: list(range(13)))
        edit_column(root / DATA, "timestamp", lambda rows: [i / FPS for i in range(13)])
        edit_column(root / EPISODES, "dataset_to_index", lambda rows: [13, 13, 28])
        edit_column(root / EPISODES, f"videos/{HIGH}/to_timestamp", lambda rows: [1.3, 1.3, 1.5])
    refused(root, f"^Episode 1 has {length} step.* at least 2")
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("file", "column", "edit", "pattern"),
    [
        (EPISODES, "length", lambda rows: [12, 8, 15], "Episode 1 has 9 steps in the data files but 8"),
        (DATA, "frame_index", lambda rows: [0, 2, 1, *rows[3:]], "Episode 0 has its steps out of order"),
        (
            DATA,
            "timestamp",
            lambda rows: [0.0, 0.0, *rows[2:]],
            "Episode 0 has timestamps that do not increase",
        ),
        (
            DATA,
            "timestamp",
            lambda rows: [math.nan, *rows[1:]],
            "Episode 0 has timestamps that do not increase",
        ),
    ],
)
def test_rows_that_contradict_each_other(tmp_path, refused, open_, file, column, edit, pattern):
    root = make_dataset(tmp_path / "d", (12, 9, 15))
    edit_column(root / file, column, edit)
    refused(root, pattern)
    check_aligned(open_(root, skip_bad_episodes=True))


@pytest.mark.parametrize("file", [DATA, EPISODES])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"PAR1 half a file",
        lambda whole: whole[: len(whole) * 2 // 3],
        lambda whole: whole.replace(b"episode_index", b"episode\xff\xffndex"),
    ],
)
def test_a_corrupt_table(tmp_path, refused, file, damage):
    root = make_dataset(tmp_path / "d")
    (root / file).write_bytes(damage((root / file).read_bytes()))
    refused(root, r"file-000\.parquet cannot be read .*finalize")


def test_a_table_without_a_column(tmp_path, refused):
    root = make_dataset(tmp_path / "d")
    table = pq.read_table(root / EPISODES, partitioning=None)
    pq.write_table(table.drop_columns(["length"]), root / EPISODES)
    refused(root, "has no column length")


def test_no_episodes(tmp_path, refused):
    root = make_dataset(tmp_path / "d")
    (root / EPISODES).unlink()
    refused(root, "no episodes")


def test_texts_that_are_no_texts(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (6, 5))
    content = (root / EPISODES).read_bytes()
    assert content.count(b"fold the towel") > 0
    (root / EPISODES).write_bytes(content.replace(b"the towel", b"\xff\xfe\xff towel"))
    refused(root, "cannot be read")


def test_a_damaged_image(tmp_path, refused, open_):
    root = make_dataset(tmp_path / "d", (12, 9), (HIGH,), video=False)
    edit_column(root / DATA, HIGH, lambda cells: cells[15].update(bytes=cells[15]["bytes"][:60]))
    refused(root, "^Episode 1 cannot be decoded from .*an image is damaged", decoding=True)
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [0]


def test_images_that_are_missing(tmp_path, refused, open_):
    root = make_dataset(tmp_path / "d", (12, 9, 15), (HIGH,), video=False)
    table = pq.read_table(root / DATA, partitioning=None)
    pq.write_table(table.drop_columns([HIGH]), root / DATA)
    refused(root, f"^Episode 0 cannot be decoded from .*no column {HIGH}")
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [2]


def test_large_row_groups_and_files_in_many_parts(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (30, 40, 20), (HIGH,), video=False, episodes_per_file=3)
    table = pq.read_table(root / DATA, partitioning=None)
    pq.write_table(table, root / DATA, row_group_size=23)
    assert (check_aligned(open_(root)) == np.arange(90)).all()


def test_nested_shapes_are_flattened(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (6,), dims=(4, 2))
    table = pq.read_table(root / DATA, partitioning=None)
    nested = [np.reshape(row, (2, 2)).tolist() for row in table[STATE].to_pylist()]
    place = table.schema.get_field_index(STATE)
    pq.write_table(table.set_column(place, STATE, pa.array(nested)), root / DATA)
    change_info(root, lambda info: info["features"][STATE].update(shape=[2, 2]))
    check_aligned(open_(root))


class Matrix(pa.ExtensionType):
    """Such as `datasets` registers for features of two dimensions."""

    def __init__(self, storage):
        super().__init__(storage, "test.matrix")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls(storage)


def test_types_that_another_package_has_registered_are_read(tmp_path, open_):
    root = with_second(tmp_path / "d", COLOR["rows of uint8"])
    table = pq.read_table(root / DATA, partitioning=None)
    for key in (STATE, LEFT):
        cells = pa.array(
            [np.reshape(cell, (3, 1)).tolist() if key == STATE else cell for cell in table[key].to_pylist()]
        )
        typed = pa.ExtensionArray.from_storage(Matrix(cells.type), cells)
        table = table.set_column(table.schema.get_field_index(key), key, typed)
    pq.write_table(table, root / DATA)
    change_info(root, lambda info: info["features"][STATE].update(shape=[3, 1]))
    pa.register_extension_type(Matrix(pa.null()))
    try:
        assert isinstance(pq.read_schema(root / DATA).field(STATE).type, Matrix)
        check_aligned(open_(root, cameras=("left",)))
    finally:
        pa.unregister_extension_type("test.matrix")


def test_an_unguarded_program_is_told_so_instead_of_hanging(tmp_path):
    """Decoding processes import the program again; if that opens a dataset, they would wait forever."""
    make_dataset(tmp_path / "data", (6, 6), video=False)
    program = tmp_path / "program.py"
    folders = f"({str(tmp_path / 'data')!r},), cache_dir={str(tmp_path / 'cache')!r}"
    program.write_text(
        "from common.data import DataConfig, open_dataset\n"
        f"open_dataset(DataConfig({folders}, ingest_workers=2))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    assert "must do so under `if __name__" in done.stderr


# Videos whose times contradict each other: lengths 12, 9, 15 and 6, all in one file


def named(root, **options):
    """The episodes that a source refuses before decoding."""
    source = open_source(str(root), DataConfig((str(root),), **options))
    usable, bad = source.episodes()
    numbers = [int(clause.split()[1].strip(":")) for clause in bad]
    assert sorted([episode.index for episode in usable] + numbers) == [row.index for row in source.rows]
    return set(numbers)


def place(part):
    return f"videos/{HIGH}/{part}_timestamp"


def edit_times(**edits):
    def edit(rows):
        for number, row in enumerate(rows):
            for part, change in edits.items():
                key = place({"start": "from", "end": "to"}[part])
                row[key] = change(number, row[key])

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edit_times(start=lambda e, t: 0.0 if e == 1 else t), {0, 1}),
        (edit_times(start=lambda e, t: t + 0.07 * e), {1, 2, 3}),
        (edit_times(start=lambda e, t: t + 0.07 * e, end=lambda e, t: t + 0.07 * e), {1, 2, 3}),
        (edit_times(start=lambda e, t: t + 0.1, end=lambda e, t: t + 0.1), {0, 1, 2, 3}),
        (edit_times(start=lambda e, t: t + 0.1 * (e > 1), end=lambda e, t: t + 0.1 * (e > 0)), {1, 2, 3}),
        (edit_times(end=lambda e, t: t + 0.5 * (e == 3)), {3}),
        (edit_times(start=lambda e, t: math.nan if e == 1 else t), {1}),
        (edit_times(start=lambda e, t: None if e == 3 else t), {3}),
        (lambda rows: rows[2].update(dataset_to_index=35), {2}),
        (lambda rows: rows[2].update(dataset_from_index=50, dataset_to_index=65), {2, 3}),
    ],
)
def test_times_that_contradict_name_every_episode_concerned(tmp_path, open_, refused, edit, expected):
    root = make_dataset(tmp_path / "d", (12, 9, 15, 6), episodes_per_file=4)
    edit_rows(root, edit)
    assert named(root) >= expected
    message = refused(root, rf"^Episode {min(expected)}\b")
    others = sorted(expected)[1:]
    assert not others or f"also unusable: {', '.join(map(str, others))})" in message
    if len(expected) < 4:
        store = open_(root, skip_bad_episodes=True)
        assert set(store.episode_indices.tolist()) == {0, 1, 2, 3} - expected
        starts = np.cumsum([0, 12, 9, 15])
        steps = [start + np.arange(n) for start, n in zip(starts, (12, 9, 15, 6), strict=True)]
        left = [steps[e] for e in range(4) if e not in expected]
        assert check_aligned(store).tolist() == np.concatenate(left).tolist()


def test_an_episode_that_is_listed_twice(tmp_path, open_, refused):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=1)
    edit_rows(root, lambda rows: [*rows, rows[1] | {place("from"): 0.1}])
    refused(root, "^Episode 1 is listed 2 times in meta/episodes")
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [0, 2]


def test_times_without_their_ends_are_held_against_the_lengths(tmp_path, open_):
    def without_ends(rows):
        for row in rows:
            del row[place("to")]

    root = make_dataset(tmp_path / "d", (12, 9, 15, 6), episodes_per_file=4)
    edit_rows(root, without_ends)
    check_aligned(open_(root))
    edit_rows(root, lambda rows: rows[1].update({place("from"): 0.0}))
    assert named(root) == {0, 1}


def test_a_video_of_another_rate(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=2)
    write_video(root / VIDEO, [draw(i, 0, (32, 48)) for i in range(21)], ticks=range(0, 21 * 500, 500))
    assert named(root) == {0, 1}
    refused(root, r"^Episode 0: .* has 20 frames a second, but info.json says 10 \(also unusable: 1\)")
    root = make_dataset(tmp_path / "e", (12, 9, 15), changes={"fps": 20})
    assert named(root) == {0, 1, 2}


def test_a_video_with_a_frame_too_many(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=2)
    write_video(root / VIDEO, [draw(i, 0, (32, 48)) for i in [0, 1, 2, *range(2, 21)]])
    assert named(root) == {0, 1}
    refused(root, "^Episode 0 cannot be told from the others: .* has 22 frames but its episodes have 21")


def test_a_frame_that_was_lost_costs_its_episode(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=2)
    left = [i for i in range(21) if i != 5]
    write_video(root / VIDEO, [draw(i, 0, (32, 48)) for i in left], ticks=[1000 * i for i in left])
    assert named(root) == {0}
    assert check_aligned(open_(root, skip_bad_episodes=True)).tolist() == list(range(12, 36))


def test_a_clock_that_begins_later_is_followed_where_the_times_say_so(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=2)
    ticks = [1000 * i + 3000 for i in range(21)]
    write_video(root / VIDEO, [draw(i, 0, (32, 48)) for i in range(21)], ticks=ticks)
    assert named(root) == {0, 1}
    later = edit_times(start=lambda e, t: t + 0.3 * (e < 2), end=lambda e, t: t + 0.3 * (e < 2))
    edit_rows(root, later)
    check_aligned(open_(root))


@pytest.mark.parametrize("first", [0.1, 1e9])
def test_timestamps_of_another_clock(tmp_path, refused, first):
    root = make_dataset(tmp_path / "d", (12, 9))
    edit_column(root / DATA, "timestamp", lambda times: [time + first for time in times])
    refused(root, r"^Episode 0 has timestamp .* at step 0, which do not fit a video of 10 Hz")


def test_frame_indices_that_begin_later(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (12, 9))
    edit_column(root / DATA, "frame_index", lambda rows: [5 + row for row in rows])
    edit_column(root / DATA, "timestamp", lambda rows: [0.5 + row for row in rows])
    refused(root, r"^Episode 0 has timestamp 0\.5 s and frame_index 5 at step 0")


@pytest.mark.parametrize("fps", [12, 30])
def test_image_timestamps_of_another_rate(tmp_path, refused, fps):
    root = make_dataset(tmp_path / "d", (12, 9), video=False, changes={"fps": fps})
    refused(root, rf"^Episode 0 has 10 steps a second by its timestamps, but info.json says {fps}")


def test_episodes_keep_their_numbers_when_one_is_gone(tmp_path, open_, capsys):
    root = make_dataset(tmp_path / "d", (12, 9, 15), episodes_per_file=3)
    edit_rows(root, lambda rows: [rows[0], rows[2]])
    table = pq.read_table(root / DATA, partitioning=None)
    pq.write_table(pa.concat_tables([table[:12], table[21:]]), root / DATA)
    store = open_(root)
    assert store.episode_indices.tolist() == [0, 2]
    assert check_aligned(store).tolist() == [*range(12), *range(21, 36)]
    assert "info.json counts 3 episodes, meta/episodes 2" in capsys.readouterr().out
    assert open_(root, episodes=("2",)).episode_indices.tolist() == [2]


def test_what_is_used_is_printed_once(tmp_path, open_, capsys):
    root = make_dataset(tmp_path / "d", (4, 5))
    open_(root)
    out = capsys.readouterr().out
    assert f"{root}: LeRobot, 2 episodes, 10 Hz\n  state[0:3]" in out
    assert f"{HIGH}, 32x48, video" in out
    assert out.count("LeRobot") == 1


# Images other than 8-bit colour


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def rgb16(step):
    """A PNG of 16 bits per channel, whose high bytes are the step's picture."""
    rows = b"".join(b"\0" + bytes(np.repeat(row, 2)) for row in draw(step, 0, (32, 48)).reshape(32, -1))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(parts), "path": None}


def with_second(root, cells, shape=(32, 48, 3), **about):
    """An image dataset whose camera `cam_left` has these cells, by step; `about` goes into info.json."""
    make_dataset(root, (6, 5), (HIGH,), video=False, episodes_per_file=2)
    table = pq.read_table(root / DATA, partitioning=None)
    column = pa.array([cells(step) for step in range(11)])
    pq.write_table(table.append_column(LEFT, column), root / DATA)
    feature = {
        "dtype": "image",
        "shape": shape and list(shape),
        "names": ["height", "width", "channels"],
        **about,
    }
    change_info(root, lambda info: info["features"].update({LEFT: feature}))
    return root


DEPTH = np.linspace(400, 4000, 48)[None].repeat(32, 0)
COLORLESS = {
    "16-bit grey": lambda step: encoded(Image.fromarray((DEPTH + step).astype(np.uint16))),
    "32-bit grey": lambda step: encoded(Image.fromarray(DEPTH.astype(np.int32)), "TIFF"),
    "32-bit float grey": lambda step: encoded(Image.fromarray(DEPTH.astype(np.float32)), "TIFF"),
    "8-bit grey": lambda step: encoded(Image.fromarray(DEPTH.astype(np.uint8))),
    "8-bit grey jpeg": lambda step: encoded(Image.fromarray(DEPTH.astype(np.uint8)), "JPEG"),
    "8-bit grey alpha": lambda step: encoded(Image.new("LA", (48, 32))),
    "1-bit": lambda step: encoded(Image.new("1", (48, 32))),
    "CMYK": lambda step: encoded(Image.new("CMYK", (48, 32)), "JPEG"),
    "32x48x1 uint16": lambda step: DEPTH[..., None].astype(np.uint16).tolist(),
    "32x48x3 double": lambda step: draw(step, 0, (32, 48)).astype(np.float64).tolist(),
    "32x48 int64": lambda step: DEPTH.astype(np.int64).tolist(),
    "lists of string": lambda step: [["a", "b"]],
    "int64": lambda step: step,
    "bool": lambda step: True,
}


@pytest.mark.parametrize("kind", COLORLESS)
def test_what_is_no_colour_is_no_camera(tmp_path, open_, refused, capsys, kind):
    root = with_second(tmp_path / "d", COLORLESS[kind])
    refused(root, rf"{LEFT} is image \(.*: choose other cameras with --cameras", cameras=("left",))
    refused(root, rf"{LEFT} is image \(.*: choose other cameras with --cameras", cameras=("high", LEFT))
    store = open_(root)
    assert store.cameras == ("high",)
    assert f"not used        {LEFT}: image (" in capsys.readouterr().out
    check_aligned(store)
    change_info(root, lambda info: info["features"].pop(HIGH))
    with pytest.raises(UserError, match="no colour camera"):
        open_(root)


@pytest.mark.parametrize("about", [{"shape": (32, 48, 1)}, {"info": {"is_depth_map": True}}])
def test_info_json_can_say_that_a_camera_is_depth(tmp_path, open_, capsys, about):
    store = open_(with_second(tmp_path / "d", COLORLESS["16-bit grey"], **about))
    assert store.cameras == ("high",)
    assert f"not used        {LEFT}: image " in capsys.readouterr().out


def transparent(step):
    picture = Image.fromarray(draw(step, 0, (32, 48))).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((48, 32)))
    return encoded(picture)


def turned(step):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise for display
    return encoded(Image.fromarray(np.rot90(draw(step, 0, (32, 48)))), exif=exif)


COLOR = {
    "palette": lambda step: encoded(Image.fromarray(draw(step, 0, (32, 48))).quantize(16, dither=0)),
    "transparent": transparent,
    "16 bits a channel": rgb16,
    "turned": turned,
    "rows of uint8": lambda step: draw(step, 0, (32, 48)).tolist(),
    "channels first": lambda step: draw(step, 0, (32, 48)).transpose(2, 0, 1).tolist(),
    "bare bytes": lambda step: encoded(Image.fromarray(draw(step, 0, (32, 48))))["bytes"],
}


@pytest.mark.parametrize("shape", [(32, 48, 3), (3, 32, 48), (48, 32, 3), None])
@pytest.mark.parametrize("kind", COLOR)
def test_colours_are_read_in_whatever_form(tmp_path, open_, kind, shape):
    store = open_(with_second(tmp_path / "d", COLOR[kind], shape), cameras=("left",))
    images = store.images(np.arange(11)).numpy()[:, 0]
    for step in range(11):
        assert (images[step].transpose(1, 2, 0) == draw(step, 0, (32, 48))).all()


def test_one_picture_of_another_kind_costs_its_episode(tmp_path, refused, open_):
    cells = lambda step: (COLORLESS["16-bit grey"] if step == 8 else COLOR["transparent"])(step)  # noqa: E731
    root = with_second(tmp_path / "d", cells)
    refused(root, r"^Episode 1 cannot be decoded from .*camera left: an image is 16-bit grey", decoding=True)
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [0]


def test_rows_of_different_lengths_are_no_picture(tmp_path, refused):
    def cells(step):
        rows = draw(step, 0, (32, 48)).tolist()
        if step == 8:
            rows[3].append(rows[4].pop())
        return rows

    refused(with_second(tmp_path / "d", cells), "^Episode 1 .* has rows of different lengths", decoding=True)


@pytest.mark.parametrize("whole", [False, True])
def test_paths_of_images_are_read_inside_the_dataset(tmp_path, open_, refused, whole):
    root = tmp_path / "d"
    root.mkdir()
    (root / "images").mkdir()
    for step in range(11):
        Image.fromarray(draw(step, 0, (32, 48))).save(root / f"images/{step}.png")
    start = f"{root}/" if whole else ""
    (tmp_path / "made").mkdir()
    with_second(tmp_path / "made" / "d", lambda step: f"{start}images/{step}.png")
    for part in ("data", "meta"):
        shutil.move(tmp_path / "made" / "d" / part, root / part)
    store = open_(root, cameras=("left",))
    assert check_aligned(store).tolist() == list(range(11))
    Image.fromarray(draw(9, 0, (32, 48))).save(root / "images/8.png")
    changed = open_(root, cameras=("left",))
    assert changed.fingerprint != store.fingerprint
    assert read(changed.images(np.array([8]))[0, 0].numpy())[0] == 9
    shutil.rmtree(tmp_path / "cache")
    for wrong, message in (
        ("../d/images/8.png", "nor in the dataset's folder"),
        ("/etc/hostname", "nor in the dataset's folder"),
        ("", "nor in the dataset's folder"),
        (None, "nor in the dataset's folder"),
        ("images/none.png", "No such file"),
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        edit_column(root / DATA, LEFT, lambda cells, wrong=wrong: cells.__setitem__(8, wrong))
        refused(
            root,
            f"^Episode 1 cannot be decoded from .*camera left: .*{message}",
            decoding=True,
            cameras=("left",),
        )


def test_a_depth_video_without_a_flag_is_no_camera(tmp_path, open_, capsys):
    root = make_dataset(tmp_path / "d", (12, 9), (HIGH, LEFT))
    grey = [draw(i, 0, (32, 48)) for i in range(21)]
    for name, options in {
        "gray12le": {"codec": "libx265", "gop": 1},
        "gray": {"codec": "ffv1"},
        "gray16le": {"codec": "ffv1"},
    }.items():
        file = root / VIDEO.replace(HIGH, LEFT)
        suffix = ".mkv" if options["codec"] == "ffv1" else ".mp4"
        write_video(file.with_suffix(suffix), grey, stored=name, **options)
        file.with_suffix(suffix).rename(file)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert open_(root).cameras == ("high",)
        assert f"not used        {LEFT}: video (its pictures are {name}, which is not colour)" in (
            capsys.readouterr().out
        )


def test_a_depth_camera_is_known_before_its_video_is_here(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (12, 9), (HIGH, LEFT))
    change_info(root, lambda info: info["features"][LEFT].update(info={"video.pix_fmt": "gray12le"}))
    (root / VIDEO.replace(HIGH, LEFT)).unlink()
    assert open_(root).cameras == ("high",)


# Unusual names, shapes and files


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([32, 48, 3], ["channels", "height", "width"]),
        ([32, 48, 3], ["Channel", "Height", "Width"]),
        ([32, 48, 3], None),
        ([3, 32, 48], ["Channels", "Height", "Width"]),
        ([3, 32, 48], ["height", "width", "channel"]),
        ([3, 32, 48], {"rgb": None}),
        ([48, 32, 3], ["width", "height", "channels"]),
        (None, None),
    ],
)
def test_the_picture_decides_where_names_and_shape_contradict(tmp_path, open_, shape, names, video):
    root = make_dataset(tmp_path / "d", (6, 5), video=video)
    change_info(root, lambda info: info["features"][HIGH].update(shape=shape, names=names))
    store = open_(root)
    assert store.image_size == (32, 48)
    check_aligned(store)


@pytest.mark.parametrize("dtype", ["float32", "string", "image", "language", None])
def test_features_that_nobody_uses_may_lack_a_shape(tmp_path, open_, dtype):
    root = make_dataset(tmp_path / "d", (6, 5))
    unused = {"dtype": dtype, "shape": None, "names": None}
    change_info(root, lambda info: info["features"].update(note=unused, **{"complementary_info.x": {}}))
    assert open_(root).cameras == ("high",)


def test_a_state_without_a_shape(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (6, 5))
    change_info(root, lambda info: info["features"][STATE].update(shape=None))
    refused(root, "float32 of no stated shape")


@pytest.mark.parametrize("video", [True, False])
def test_files_that_others_leave_are_not_read(tmp_path, open_, video):
    root = make_dataset(tmp_path / "d", (6, 5), video=video)
    for folder in list(root.rglob("chunk-000")):
        for name in ("._file-000.parquet", ".file-001.parquet", "._file-000.mp4", "Thumbs.db", ".DS_Store"):
            (folder / name).write_bytes(b"\0\5\x16\7 Mac OS X")
        (folder / ".ipynb_checkpoints").mkdir()
        for file in folder.glob("file-*.parquet"):
            shutil.copy(file, folder / ".ipynb_checkpoints" / "file-000-checkpoint.parquet")
    assert check_aligned(open_(root)).tolist() == list(range(11))


def test_linked_folders_are_read(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (6, 5))
    for number, folder in enumerate(list(root.rglob("chunk-000"))):
        folder.symlink_to(folder.rename(tmp_path / f"disk_{number}"))
    check_aligned(open_(root))


def test_suffixes_in_capitals(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (6, 5))
    for file in list(root.rglob("*.parquet")):
        file.rename(file.with_suffix(file.suffix.upper()))
    check_aligned(open_(root))


def test_a_copy_of_a_table_is_named(tmp_path, refused):
    root = make_dataset(tmp_path / "d", (6, 5))
    shutil.copy(root / DATA, (root / DATA).with_name("file-000 (1).parquet"))
    refused(
        root, r"^Episode 0 has 12 steps in the data files \(.*file-000 \(1\)\.parquet, .*file-000\.parquet"
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b", "c"], "string"),
        ([{"x": 1.0}] * 3, "struct"),
        ([None] * 3, "null"),
        ([b"a", b"b", b"c"], "binary"),
        ([datetime(2026, 1, 1)] * 3, "timestamp"),
        (pa.array(["a", "b", "a"]).dictionary_encode(), "dictionary"),
        (pa.array([[("k", 1.0)]] * 3, pa.map_(pa.string(), pa.float64())), "struct|map"),
    ],
)
@pytest.mark.parametrize("key", [STATE, "timestamp"])
def test_columns_of_other_types_are_refused_in_a_sentence(tmp_path, refused, key, values, kind):
    root = make_dataset(tmp_path / "d", (3,))
    table = pq.read_table(root / DATA, partitioning=None)
    column = values if isinstance(values, pa.Array) else pa.array(values)
    pq.write_table(table.set_column(table.schema.get_field_index(key), key, column), root / DATA)
    refused(root, f"{key}, holds ({kind}).* instead of numbers")


@pytest.mark.parametrize("number", [Decimal, np.float16, bool, int])
def test_numbers_of_any_type_are_read(tmp_path, open_, number):
    root = make_dataset(tmp_path / "d", (3,))
    values = [[number(step % 2), number(1), number(0)] for step in range(3)]
    edit_column(root / DATA, STATE, lambda rows: values)
    assert open_(root).state.tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 0]]


def test_a_task_that_is_no_list(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (3, 4))
    edit_rows(root, lambda rows: [row | {"tasks": "pick up"} for row in rows])
    assert open_(root).task == "pick up"


def test_an_old_format_says_every_step_with_quoted_paths(tmp_path, refused):
    root = make_dataset(tmp_path / "my data", (4,), changes={"codebase_version": "v2.0"})
    message = refused(root, "v2.1 on the hub, with LeRobot 0.3.3")
    first, second = message.index("convert_dataset_v20_to_v21"), message.index("convert_dataset_v21_to_v30")
    assert first < second
    assert f"--root='{root}'" in message
    change_info(root, lambda info: info.update(codebase_version="v2.1"))
    assert "v20_to_v21" not in refused(root, f"--root='{root}' --push-to-hub=false")
    change_info(root, lambda info: info.update(codebase_version="v1.6"))
    refused(root, "v1.6, but v3 is needed")


@pytest.mark.parametrize("variable", ["HF_LEROBOT_HOME", "HF_HOME"])
def test_a_recording_is_found_by_its_repo_id(tmp_path, open_, monkeypatch, variable):
    import huggingface_hub

    download = lambda *_, **__: pytest.fail("tried to download")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    if variable == "HF_HOME":
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    else:
        monkeypatch.setenv(variable, str(tmp_path / "lerobot"))
    root = make_dataset(tmp_path / "lerobot/me/fold_towel", (4, 5))
    store = open_("me/fold_towel")
    assert store.source == str(root)
    check_aligned(store)


def test_what_lerobot_has_only_begun_to_download_is_asked_of_the_hub(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    shutil.rmtree(make_dataset(tmp_path / "lerobot/me/fold_towel", (4, 5)) / "data")
    refused("me/fold_towel", "could not be downloaded")


def test_labels_of_episodes_that_contradict_the_places_of_their_rows(tmp_path, refused, open_):
    root = make_dataset(tmp_path / "d", (9, 7, 9), episodes_per_file=3)
    swapped = {0: 2, 1: 1, 2: 0}
    edit_column(root / DATA, "episode_index", lambda rows: [swapped[row] for row in rows])
    assert named(root) == {0, 2}
    refused(root, r"^Episode 0 has rows whose index contradicts .* \(also unusable: 2\)")
    edit_column(root / DATA, "episode_index", lambda rows: [swapped[row] for row in rows])
    edit_column(
        root / DATA, "index", lambda rows: [*range(9), *range(7), *range(9)]
    )  # restarts in each episode: no contradiction
    check_aligned(open_(root))
    edit_column(root / DATA, "index", lambda rows: [*range(50, 59), *range(70, 77), *range(90, 99)])
    check_aligned(open_(root))  # as in a part of a larger dataset


def test_metadata_without_what_older_tools_left_out(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (6, 5), changes={"total_frames": None, "total_episodes": None})
    left_out = ("dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index", place("to"))
    edit_rows(root, lambda rows: [{k: v for k, v in row.items() if k not in left_out} for row in rows])
    for file in (root / "data").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.drop_columns(["index", "task_index"]), file)
    check_aligned(open_(root))


@pytest.mark.parametrize("part", ["data", "videos"])
def test_pointers_of_git_lfs_are_named(tmp_path, part):
    root = make_dataset(tmp_path / "d")
    file = next(path for path in sorted((root / part).rglob("file-000.*")) if path.is_file())
    file.write_text("version https://git-lfs.github.com/spec/v1\nsize 146946961\n")
    with pytest.raises(UserError, match=r"is a git-lfs pointer, not the file itself \(`git lfs pull`"):
        open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))


def test_episodes_of_several_tasks_are_said(tmp_path, capsys):
    root = make_dataset(tmp_path / "d")

    def both(rows):
        rows[1]["tasks"] = ["pick", "place"]

    edit_rows(root, both)
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", task=("pick",)))
    assert store.episode_indices.tolist() == [1]
    assert (
        "1 episodes, 1 for one, have other tasks, too: all of their steps are used" in capsys.readouterr().out
    )
