"""Instructions of episodes: reading, cutting, choosing and naming them, and how often each is drawn."""

import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hdf5_factory import make_hdf5
from lerobot_factory import edit_column, edit_rows, make_dataset

from common.config import from_dict
from common.data import (
    ChunkDataset,
    DataConfig,
    SampleStream,
    inspect,
    lerobot_meta,
    make_loader,
    open_dataset,
    split_episodes,
)
from common.data.hdf5_files import episode_groups, stated_task
from common.data.tasks import draw_shares
from common.errors import UserError

DATA = "data/chunk-000/file-000.parquet"


@pytest.fixture
def open_(tmp_path):
    def open_dataset_(*roots, **options):
        return open_dataset(DataConfig(tuple(map(str, roots)), cache_dir=tmp_path / "cache", **options))

    return open_dataset_


def write_tasks(root, tasks, numbers=None):
    """meta/tasks.parquet as LeRobot writes it: the texts are in pandas' index."""
    import pandas as pd

    numbers = range(len(tasks)) if numbers is None else numbers
    pd.DataFrame({"task_index": list(numbers)}, index=pd.Index(tasks, name="task")).to_parquet(
        root / "meta/tasks.parquet"
    )


@pytest.fixture
def changing(tmp_path):
    """Episode 1 picks in steps 0 to 2 and places in steps 3 to 8; episode 0 picks, episode 2 places."""
    root = make_dataset(tmp_path / "d", (4, 9, 6), video=False, episodes_per_file=3)
    write_tasks(root, ["pick", "place"])
    edit_column(root / DATA, "task_index", lambda rows: [0] * 4 + [0] * 3 + [1] * 6 + [1] * 6)

    def name(rows):
        for row, tasks in zip(rows, (["pick"], ["place", "pick"], ["place"]), strict=True):
            row["tasks"] = tasks

    edit_rows(root, name)
    return root


def test_an_episode_is_cut_where_its_task_changes(changing, open_, capsys):
    store = open_(changing)
    assert store.episode_tasks == ("pick", "pick", "place", "place")
    assert store.episode_indices.tolist() == [0, 1, 1, 2]
    assert store.episode_starts.tolist() == [0, 4, 7, 13, 19]
    said = capsys.readouterr().out
    assert "1 episodes (the first is 1) change their task and are cut there: 3 episodes become 4" in said
    batch = ChunkDataset(store, range(4), 4, told=True).__getitems__([5, 7])
    assert batch.is_pad.tolist() == [[False, False, True, True], [False] * 4]  # chunks end with their task
    assert batch.task.tolist() == [0, 1]
    assert batch.proprio[1, 0, 0] == 7  # the step's own state: its part begins there
    assert store.images(np.array([7])).shape[0] == 1


def test_parts_of_other_tasks_are_left_out(changing, open_, capsys):
    store = open_(changing, task=("place",))
    assert store.episode_starts.tolist() == [0, 6, 12]
    assert store.state[:, 0].tolist() == [*range(7, 13), *range(13, 19)]
    assert store.task == "place"
    assert ChunkDataset(store, [0], 2).__getitems__([0]).task is None
    both = open_(changing, task=("place", "pick"))
    assert both.num_episodes == 4
    assert "choose some with --task" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r'no task "plac" \(did you mean place\?\): it has "pick", "place"'):
        open_(changing, task=("pick", "plac"))


def test_the_parts_of_an_episode_are_held_out_together(changing, open_):
    store = open_(changing)
    for seed in range(6):
        train, held_out = split_episodes(store, 0.3, seed)
        assert sorted([*train, *held_out]) == [0, 1, 2, 3]
        assert set(held_out.tolist()) in ({0}, {1, 2}, {3})


def test_each_instruction_keeps_an_episode_for_training(open_, tmp_path):
    rare = make_dataset(tmp_path / "rare", (4,) * 12, video=False, tasks=["pick"] * 9 + ["fold"] * 3)
    few = make_dataset(tmp_path / "few", (4,) * 6, video=False, tasks=tuple("abcdef"))
    store = open_(rare)
    seen = set()
    for seed in range(20):
        train, held_out = split_episodes(store, 0.5, seed)
        assert len(held_out) == 6
        assert set(store.episode_task_numbers[train]) == {0, 1}
        seen |= set(held_out.tolist())
    assert seen == set(range(12))  # any may be held out
    assert len(split_episodes(open_(few), 0.5, 0)[1]) == 3  # where they do not suffice


def test_a_task_that_only_the_steps_know(changing, open_):
    def name(rows):
        for row in rows:
            row["tasks"] = ["pick"]

    edit_rows(changing, name)
    with pytest.raises(UserError, match='has the task "place" at step 3, but meta/episodes says "pick"'):
        open_(changing)


def test_two_numbers_with_the_same_text_are_one_task(changing, open_):
    write_tasks(changing, ["pick", "place", " place "])
    edit_column(changing / DATA, "task_index", lambda rows: rows[:9] + [2] * 4 + [2] * 6)
    assert open_(changing).episode_tasks == ("pick", "pick", "place", "place")


def test_steps_whose_task_nobody_knows(changing, open_):
    (changing / "meta/tasks.parquet").unlink()
    with pytest.raises(UserError, match=r"^Episode 1 has 2 tasks, but neither task_index nor meta/tasks"):
        open_(changing)
    assert open_(changing, skip_bad_episodes=True).episode_tasks == ("pick", "place")


def test_a_task_index_beyond_the_table(changing, open_):
    edit_column(changing / DATA, "task_index", lambda rows: rows[:13] + [7] * 6)
    message = "^Episode 2 has task_index 7 at step 0, but meta/tasks.parquet lists 2 tasks"
    with pytest.raises(UserError, match=message):
        open_(changing)
    edit_column(changing / DATA, "task_index", lambda rows: rows[:13] + [0] * 6)
    with pytest.raises(UserError, match=r'^Episode 2 has the task "pick" at step 0, but meta/episodes'):
        open_(changing)
    edit_rows(changing, lambda rows: [{**row, "tasks": ["pick"]} for row in rows])
    write_tasks(changing, ["pick"])
    edit_column(changing / DATA, "task_index", lambda rows: [0] * 13 + [1] * 6)
    with pytest.raises(UserError, match=r"^Episode 2 has task_index 1 at step 0, but .* lists 1 tasks"):
        open_(changing)
    write_tasks(changing, ["pick"], ["b"])
    with pytest.raises(UserError, match="does not list instructions as texts with their task_index"):
        open_(changing)


def test_one_task_in_two_spellings_is_one(changing, open_):
    edit_rows(changing, lambda rows: [{**row, "tasks": ["pick"]} for row in rows])
    edit_column(changing / DATA, "task_index", lambda rows: [0] * 19)
    for table in (["Pick."], []):
        write_tasks(changing, table)
        assert open_(changing).episode_tasks == ("pick",) * 3


@pytest.mark.parametrize("unlisted", [(0, 1, 2), (2,)])
def test_tasks_that_episodes_do_not_list_are_read_from_their_steps(changing, open_, unlisted):
    edit_rows(changing, lambda rows: [{**r, "tasks": []} if i in unlisted else r for i, r in enumerate(rows)])
    assert open_(changing).episode_tasks == ("pick", "pick", "place", "place")
    store = open_(changing, task=("pick",))
    assert store.episode_tasks == ("pick", "pick")
    assert np.diff(store.episode_starts).tolist() == [4, 3]


def test_episodes_whose_task_nobody_states_are_not_of_the_chosen_one(changing, open_):
    (changing / "meta/tasks.parquet").unlink()
    stated = (["pick"], [], ["place"])
    edit_rows(changing, lambda rows: [{**r, "tasks": t} for r, t in zip(rows, stated, strict=True)])
    assert open_(changing).episode_tasks == ("pick", None, "place")
    assert open_(changing, task=("pick",)).episode_tasks == ("pick",)


def test_files_that_cannot_be_read_are_reported_whatever_the_task(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 3, 5))
    files = sorted(root.rglob("*.hdf5"))
    for file in files:
        with h5py.File(file, "a") as content:
            content.attrs["task"] = "fold"
    files[-1].write_bytes(files[-1].read_bytes()[:9000])
    with pytest.raises(UserError, match=r"is unusable|cannot be read"):
        open_(root, task=("fold",))
    store = open_(root, task=("fold",), skip_bad_episodes=True)
    assert store.num_episodes == 2
    assert len(store.skipped) == 1


def test_texts_that_are_not_utf_8(changing, open_):
    texts = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    table = pa.table({"task_index": [0], "task": texts})
    pq.write_table(table, changing / "meta/tasks.parquet")
    with pytest.raises(UserError, match=r"tasks.parquet cannot be read"):
        open_(changing)


def test_inspect_lists_tasks(changing, open_):
    lines = inspect.describe(open_(changing))
    at = next(i for i, line in enumerate(lines) if line.startswith("  2 tasks"))
    assert [line.split() for line in lines[at + 1 : at + 3]] == [["2", "7", "pick"], ["2", "12", "place"]]


def test_instructions_of_hdf5(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 3, 5, 4), layout="robomimic")
    with h5py.File(root / "demos.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        file["data/demo_1"].attrs["lang"] = "lift the\n cube"
        file["data/demo_2"].attrs["ep_meta"] = json.dumps({"lang": "open the drawer", "layout": 3})
        file["data/demo_3/note/text"] = np.array([b"close it"])
        file["data/demo_0"].attrs["model_file"] = "<xml/>" * 1000
    assert open_(root).episode_tasks == ("Lift", "lift the cube", "open the drawer", "Lift")
    assert open_(root, task_key="note/text").episode_tasks == (None, None, None, "close it")
    assert open_(root, task_key="lang").episode_tasks == (None, "lift the cube", None, None)
    with pytest.raises(UserError, match=r"--task-key words: .* no such text, only .*lang"):
        open_(root, task_key="words")


def test_each_of_a_file_s_many_episodes_has_its_own_instruction():
    groups = [f"data/demo_{number}/" for number in range(10_000)]
    assert episode_groups([f"{group}actions" for group in groups]) == groups
    texts = {group: {"lang": f"fold towel {number}"} for number, group in enumerate(groups)}
    assert stated_task(texts, groups[7], None) == ("fold towel 7", "lang")
    assert len({stated_task(texts, group, None) for group in groups}) == 10_000


def test_texts_of_the_same_files_are_not_taken_for_each_other(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 3), layout="robomimic")
    with h5py.File(root / "demos.hdf5", "a") as file:
        for demo in ("demo_0", "demo_1"):
            file[f"data/{demo}"].attrs.update({"language_instruction": "pick the cup", "task": "kitchen"})
            file[f"data/{demo}/a/text"], file[f"data/{demo}/b/text"] = (
                np.array([b"first"]),
                np.array([b"second"]),
            )
    said = {None: "pick the cup", "task": "kitchen", "a/text": "first", "b/text": "second"}
    for key, text in [*said.items(), *said.items()]:  # the second time from what is cached
        assert open_(root, task_key=key).episode_tasks == (text, text)
    mixed = make_hdf5(tmp_path / "mixed", (4, 3), layout="robomimic")
    with h5py.File(mixed / "demos.hdf5", "a") as file:
        file["data/demo_0"].attrs.update({"language_instruction": "pick", "lang": "pick the cup"})
        file["data/demo_1"].attrs["lang"] = "pour"
    assert open_(mixed).episode_tasks == ("pick", "pour")
    assert open_(mixed, task_key="lang").episode_tasks == ("pick the cup", "pour")


def test_instructions_of_lerobot_have_single_spaces(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (8, 9), {"observation.images.head": (8, 8)}, video=False)
    write_tasks(root, ["fold  the towel "])
    assert lerobot_meta.read_tasks(root) == {0: "fold the towel"}


def test_hdf5_instructions_in_another_code(tmp_path, open_):
    root = make_hdf5(tmp_path / "d", (4, 3))
    with h5py.File(root / "day_0/episode_0.hdf5", "a") as file:
        file.attrs["task"] = np.bytes_("räume auf".encode("latin-1"))
    assert open_(root).episode_tasks == ("r�ume auf", None)


def test_datasets_without_instructions_go_by_their_names(tmp_path, open_, capsys):
    names, lengths = ("fold_towel", "a/cups", "b/cups"), ((4, 3), (3, 4), (5, 4))
    roots = [make_hdf5(tmp_path / name, length) for name, length in zip(names, lengths, strict=True)]
    assert open_(roots[0]).task is None
    store = open_(*roots)
    assert store.instructions == ("a cups", "b cups", "fold towel")
    assert store.episode_tasks == ("fold towel",) * 2 + ("a cups",) * 2 + ("b cups",) * 2
    assert f'{roots[0]} states no instruction: its name is used, "fold towel"' in capsys.readouterr().out
    with h5py.File(roots[0] / "day_0/episode_0.hdf5", "a") as file:
        file.attrs["task"] = "fold it"
    assert open_(*roots[:2]).episode_tasks == ("fold it", None, "cups", "cups")
    assert open_(roots[1], roots[1]).instructions == ("cups",)
    chosen = open_(roots[0], roots[1], task=("fold it", "cups"), task_weights=(1, 3))
    assert (chosen.episode_tasks, chosen.task_weights) == (("fold it", "cups", "cups"), (3, 1))
    with pytest.raises(UserError, match='"cups", one of the datasets, is not among --task'):
        open_(roots[0], roots[1], task=("fold it",))


def test_tasks_of_several_datasets_are_chosen(tmp_path, open_):
    roots = [make_dataset(tmp_path / name, (4, 5, 6), tasks=tasks, video=False) for name, tasks in
             (("a", ("fold", "lift")), ("b", ("lift", "open")), ("c", ("shut",)))]  # fmt: skip
    store = open_(*roots[:2], task=("fold", "open"))
    assert store.episode_tasks == ("fold", "fold", "open")
    with pytest.raises(UserError, match='c has no task "fold": it has "shut"'):
        open_(*roots, task=("fold", "open"))
    with pytest.raises(UserError, match='there is no task "wash", only "fold", "open"'):
        open_(*roots[:2], task=("fold", "open", "wash"))


# How often each is drawn


def drawn(store, count, **more):
    dataset = ChunkDataset(store, range(store.num_episodes), 2, told=True)
    loader = iter(make_loader(dataset, 8, seed=3, num_workers=0, **more))
    return dataset, [next(loader) for _ in range(count)]


def test_weights_between_tasks(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (20, 10, 20, 10, 20), tasks=("fold", "lift"), video=False)
    store = open_(root, task=("lift", "fold"), task_weights=(3.0, 1.0))
    assert store.task_weights == (1.0, 3.0)  # in the order of `instructions`
    dataset, batches = drawn(store, 100)  # ten epochs of 80
    tasks = np.concatenate([batch.task.numpy() for batch in batches])
    assert np.bincount(tasks).tolist() == [200, 600]
    counts = np.bincount(np.concatenate([batch.index.numpy() for batch in batches]), minlength=80)
    fold = dataset.store.episode_task_numbers[dataset.store.episode_of(np.arange(80))] == 0
    assert np.ptp(counts[fold]) <= 1  # within a task, every sample equally often
    assert np.ptp(counts[~fold]) <= 1


@pytest.mark.parametrize(
    ("balance", "shares"), [(0.0, [0.75, 0.25]), (1.0, [0.5, 0.5]), (0.5, [0.634, 0.366])]
)
def test_tasks_are_balanced(tmp_path, open_, balance, shares):
    root = make_dataset(tmp_path / "d", (20, 10, 20, 10, 20), tasks=("fold", "lift"), video=False)
    _, batches = drawn(open_(root, task_balance=balance), 200)
    tasks = np.concatenate([batch.task.numpy() for batch in batches])
    np.testing.assert_allclose(np.bincount(tasks) / len(tasks), shares, atol=0.01)


def test_without_weights_the_order_is_that_of_all_samples(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (20, 10, 20), tasks=("fold", "lift"), video=False)
    dataset, batches = drawn(open_(root), 6)
    plain = iter(SampleStream([50], 8, 3))
    assert [batch.index.tolist() for batch in batches] == [
        dataset.rows[next(plain)].tolist() for _ in range(6)
    ]


def test_a_stream_of_weighted_tasks_can_begin_anywhere(tmp_path, open_):
    root = make_dataset(tmp_path / "d", (20, 10, 20, 10), tasks=("fold", "lift"), video=False)
    store = open_(root, task_balance=1.0)
    _, whole = drawn(store, 30)
    for skipped in (1, 7, 8, 23):
        _, later = drawn(store, 3, start=8 * skipped)
        assert [b.index.tolist() for b in later] == [b.index.tolist() for b in whole[skipped : skipped + 3]]


def test_shares_of_tasks_and_datasets():
    samples = np.array([[30.0, 10.0, 0.0], [0.0, 40.0, 0.0]])  # two datasets; the third task has no samples
    np.testing.assert_allclose(draw_shares(samples, None, 0.0), samples)
    equal = draw_shares(samples, None, 1.0)
    np.testing.assert_allclose(equal, [[1, 0.2, 0], [0, 0.8, 0]])  # each task is divided like its samples
    np.testing.assert_allclose(draw_shares(samples, np.array([2.0, 1.0, 5.0]), 0.0).sum(0), [2, 1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_weights": (1.0,)}, "one positive number for each --task"),
        ({"task": ("a", "b"), "task_weights": (1.0, 0.0)}, "one positive number for each --task"),
        ({"task": ("a",), "task_weights": (1.0,), "task_balance": 0.5}, "give one of them"),
        ({"task_balance": 1.5}, "--task-balance is 1.5"),
    ],
)
def test_weights_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


def test_what_earlier_runs_wrote_down():
    assert from_dict(DataConfig, {"task": "fold"}).task == ("fold",)
    assert from_dict(DataConfig, {"task": None}).task == ()
    assert from_dict(DataConfig, {"task": ["fold", "lift"]}).task == ("fold", "lift")
