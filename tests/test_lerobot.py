import json
import math
import os
import shutil
import subprocess
import sys
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
    make_dataset,
    read,
    state_of,
    write_video,
)

from common.data import DataConfig, open_dataset
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
    """Opening fails with one sentence of that pattern, and leaves no store behind.

    With `decoding`, it fails at an episode's frames: those of the episodes before it are kept, unfinished.
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
            if path.name != "stores" and path.suffix != ".lock"
        ]
        records = [record for path in left if path.is_dir() for record in read_records(path).values()]
        finished = [record.index for record in records if record.crc32 is not None]
        assert finished == (list(range(int(message.split()[1]))) if decoding else [])
        assert left == [] or (finished and "meta.json" not in [path.name for path in left])
        return message

    return refused


def check_aligned(store, episodes=None):
    """Every frame shows the step whose state and action stand beside it."""
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


def test_uneven_timestamps_are_followed(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (12, 9))
    edit_column(
        root / DATA, "timestamp", lambda times: [t + 0.04 * (i % 3 == 1) for i, t in enumerate(times)]
    )
    store = open_(root)
    check_aligned(store)
    assert store.timestamps[1] == pytest.approx(0.14)


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
    assert capsys.readouterr().out == ""


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


def test_a_task_is_chosen(tmp_path, open_, refused):
    root = make_dataset(tmp_path / "d", (4, 5, 6, 3), tasks=("fold", "unfold"))
    refused(root, r'has 2 tasks.*--task \("fold", "unfold"\)')
    refused(root, r'no task "unfolds" \(did you mean unfold\?\)', task="unfolds")
    store = open_(root, task="unfold")
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
    refused(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no meta/info.json")
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

    from common.data.lerobot import CONVERTER

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
            "ends after 3 of 9 frames",
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
    refused(root, r"^Episode 0 has 4 numbers in observation.state at step 3, and info.json says 3")
    check_aligned(open_(root, skip_bad_episodes=True))
    change_info(root, lambda info: info["features"][STATE].update(shape=[5]))
    refused_all = "Episode 0 has 3 numbers in observation.state at step 0, and info.json says 5"
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
    refused(root, f"^Episode 1 has {length} step.* at least 2")
    assert open_(root, skip_bad_episodes=True).episode_indices.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("file", "column", "edit", "pattern"),
    [
        (EPISODES, "length", lambda rows: [12, 8, 15], "Episode 1 has 9 steps in the data files and 8"),
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


def test_an_unguarded_program_is_told_so_instead_of_hanging(tmp_path):
    """Decoding processes import the program anew: one that opens a dataset right then would wait for ever."""
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
    assert "must do so below `if __name__" in done.stderr
