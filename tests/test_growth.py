"""Episodes that appear while a run trains."""

import json
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hdf5_factory import make_hdf5
from lerobot_factory import edit_column, edit_rows, make_dataset
from running import interrupt_after, lines, train, weights

import train_naive_fm
import train_vfp_depth
from common.data import DataConfig, SampleStream, growth, open_dataset, split_episodes
from common.data.growth import LOG, GrownDataset, Growth
from common.data.samples import ChunkDataset
from common.errors import UserError
from common.run import Run

CAMERAS = {f"observation.images.cam_{name}": (32, 32) for name in ("head", "left", "right")}


def entry(folder, name, *lengths, sizes=CAMERAS, dims=(3, 3), **more):
    """A dataset that appears whole, as by a rename."""
    hidden = make_dataset(folder / f".{name}", lengths, sizes, video=False, dims=dims, names=None, **more)
    return hidden.rename(folder / name)


def look(growing):
    for _ in range(2):  # what has not changed between two looks is decoded
        growing.look()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


@pytest.fixture
def base(dataset, cache_dir):
    config = DataConfig(dataset=(str(dataset),), cache_dir=cache_dir)
    store = open_dataset(config)
    return config, ChunkDataset(store, split_episodes(store, 0.25, 0)[0], horizon=4)


@pytest.fixture
def growing(folder, base, tmp_path):
    config, samples = base
    return Growth(replace(config, grow_from=folder), samples, tmp_path / LOG, writes=True)


def taken(growing, samples=0):
    found = growing.due(1, samples, len(growing.ready), lambda x: x)
    return [e["name"] for e in found["entries"]] if found else []


@pytest.fixture
def arrivals(monkeypatch, folder):
    """Makes entries appear after given steps, and looks for them at once instead of in a thread."""
    when = {3: ("b", 8), 6: ("c", 9, 7)}
    end_step = Run.end_step

    def end_and_add(run):
        if run._growth is not None and run.step in when:
            if not (folder / when[run.step][0]).exists():
                entry(folder, *when[run.step])
            look(run._growth)
        return end_step(run)

    monkeypatch.setattr(Run, "end_step", end_and_add)
    monkeypatch.setattr(Growth, "start", lambda self: None)
    return when


FLAGS = ("--steps", 8, "--save-every", 2, "--keep", 9, "--log-every", 1, "--batch-size", 4)


def test_a_resumed_run_learns_from_the_same_samples_in_the_same_order(
    tiny, folder, arrivals, tmp_path, monkeypatch, accelerate_reset, capsys
):
    entry(folder, "a", 10)
    seen = []
    batches = Run.micro_batches

    def noted(run):
        for batch in batches(run):
            seen.append((run.step, batch.index.tolist(), batch.actions))
            yield batch

    monkeypatch.setattr(Run, "micro_batches", noted)
    flags = (*FLAGS, "--grow-from", folder, "--grow-weight", 3)
    whole = train(train_naive_fm, tiny, tmp_path / "whole", *flags)
    said = capsys.readouterr().out
    assert "step 0: 1 new in" in said
    assert "step 3: 1 new in" in said
    assert "step 6: 1 new in" in said
    log = json.loads((whole / LOG).read_text())
    assert [(time["step"], [e["name"] for e in time["entries"]]) for time in log] == [
        (0, ["a"]),
        (3, ["b"]),
        (6, ["c"]),
    ]
    first = list(seen)
    most = 47  # steps of the first dataset; the others are behind them
    assert any(index >= most for _, batch, _ in first for index in batch)
    for step in (2, 4, 6):  # the third arrival, and the second, are still to come
        seen.clear()
        copy = interrupt_after(whole, step, tmp_path / f"copy-{step}")
        if step == 6:
            (copy / LOG).unlink()  # the checkpoint has it, too
        train(train_naive_fm, tiny, None, "--resume", copy)
        assert [s for s, *_ in seen] == list(range(step + 1, 9))
        for mine, other in zip(first[step:], seen, strict=True):
            assert mine[:2] == other[:2]
            assert torch.equal(mine[2], other[2])
        assert lines(copy) == lines(whole)
        assert json.loads((copy / LOG).read_text()) == log
        mine, other = weights(copy, 8), weights(whole, 8)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_what_has_appeared_between_two_starts_is_learned_from_the_next_step_on(
    tiny, folder, arrivals, tmp_path, accelerate_reset
):
    run = tmp_path / "run"
    train(train_naive_fm, tiny, run, *FLAGS, "--grow-from", folder, "--steps", 5)
    entry(folder, "d", 8)
    train(train_naive_fm, tiny, None, "--resume", run, "--steps", 8)
    log = json.loads((run / LOG).read_text())
    assert [(time["step"], time["entries"][0]["name"]) for time in log] == [(3, "b"), (5, "d"), (6, "c")]


def test_the_log_of_a_start_that_saved_nothing_is_forgotten(
    tiny, folder, arrivals, tmp_path, accelerate_reset
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / LOG).write_text('[{"step": 0, "samples": 0, "entries": [{"name": "gone"}]}]')
    train(train_naive_fm, tiny, run, *FLAGS, "--grow-from", folder, "--resume", "auto")
    assert [time["step"] for time in json.loads((run / LOG).read_text())] == [3, 6]


def test_statistics_and_held_out_episodes_are_those_of_the_first_dataset(
    tiny, folder, arrivals, tmp_path, accelerate_reset
):
    flags = (*FLAGS, "--val-fraction", 0.25, "--eval-every", 8)
    plain = train(train_naive_fm, tiny, tmp_path / "plain", *flags)
    grown = train(train_naive_fm, tiny, tmp_path / "grown", *flags, "--grow-from", folder)
    name = "checkpoints/last/policy/stats.safetensors"
    assert (plain / name).read_bytes() == (grown / name).read_bytes()
    assert len(json.loads((grown / LOG).read_text())) == 2
    before = [row["loss"] for row in lines(plain)[:3]], [row["loss"] for row in lines(grown)[:3]]
    assert before[0] == before[1]  # until the first arrival nothing differs
    assert lines(plain)[4]["loss"] != lines(grown)[4]["loss"]


@pytest.mark.parametrize("place", [".", "..", "new"])
def test_a_folder_with_the_first_dataset_in_it_is_refused(place, tiny, dataset, tmp_path, accelerate_reset):
    with pytest.raises(UserError, match="share episodes, which would be learned from twice"):
        train(train_naive_fm, tiny, tmp_path / "run", *FLAGS, "--grow-from", dataset / place)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [0.5, 1, 4])
def test_added_samples_are_drawn_as_often_as_the_weight_says(folder, growing, base, weight):
    _, samples = base
    entry(folder, "a", 20, 30)
    look(growing)
    grown = GrownDataset(samples, [growing.open(growing.ready[0])], weight)
    assert len(grown) == len(samples) + 50
    stream = iter(SampleStream(batch_size=len(grown), seed=0, **grown.groups()))
    drawn = np.bincount(np.concatenate([next(stream) for _ in range(40)]), minlength=len(grown))
    ratio = drawn[len(samples) :].mean() / drawn[: len(samples)].mean()
    assert ratio == pytest.approx(weight, rel=0.05)  # an epoch has whole samples of each
    batch = grown.__getitems__([0, len(samples), len(grown) - 1])
    alone = growing.base.__getitems__([0])
    assert torch.equal(batch.images[:1], alone.images)
    assert torch.equal(batch.actions[:1], alone.actions)


def test_weights_between_datasets_stay_as_they_were(dataset, cache_dir, tmp_path, folder):
    other = make_dataset(tmp_path / "cup", (30,), CAMERAS, video=False, dims=(3, 3), names=None)
    config = DataConfig(dataset=(str(dataset), str(other)), weights=(1, 3), cache_dir=cache_dir)
    store = open_dataset(config)
    samples = ChunkDataset(store, np.arange(store.num_episodes), horizon=4)
    added = DataConfig(dataset=(str(entry(folder, "a", 25)),), cache_dir=cache_dir)
    grown = GrownDataset(samples, [open_dataset(added)], 2)
    stream = iter(SampleStream(batch_size=len(grown), seed=0, **grown.groups()))
    drawn = np.bincount(np.concatenate([next(stream) for _ in range(40)]), minlength=len(grown))
    first, second, third = drawn[:47].sum(), drawn[47:77].sum(), drawn[77:].sum()
    assert second / first == pytest.approx(3, rel=0.05)
    assert third / 25 == pytest.approx(2 * (first + second) / 77, rel=0.05)


def test_what_does_not_fit_is_left_out_with_the_reason(folder, growing, capsys, monkeypatch):
    monkeypatch.setattr("common.data.growth.PATIENCE_SECONDS", -1.0)
    entry(folder, "cameras", 8, sizes={"observation.images.cam_top": (32, 32)})
    entry(folder, "dimensions", 8, dims=(4, 4))
    fast = entry(folder, "rate", 8, changes={"fps": 2 * growing.base.store.fps})
    (file,) = fast.glob("data/*/*.parquet")
    edit_column(file, "timestamp", lambda times: [time / 2 for time in times])
    (folder / "notes.txt").write_text("good ones: all")
    broken = entry(folder, "nan", 8)
    (file,) = broken.glob("data/*/*.parquet")
    edit_column(file, "action", lambda rows: [[float("nan")] * 3, *rows[1:]])
    entry(folder, "zzz", 8)
    look(growing)
    look(growing)
    said = capsys.readouterr().out
    assert f"{folder / 'cameras'} is left out" in said
    assert "different cameras" in said
    assert f"{folder / 'dimensions'} is left out" in said
    assert "different dimensions of the state" in said
    assert f"{folder / 'rate'} is left out" in said
    assert "Hz" in said
    assert f"{folder / 'notes.txt'} is left out" in said
    assert "unknown format" in said
    assert f"{folder / 'nan'} is left out" in said
    assert "nan in action" in said
    assert taken(growing) == ["zzz"]
    look(growing)
    assert capsys.readouterr().out == ""  # each is named once


def test_what_is_still_being_written_is_taken_later(folder, growing, capsys):
    whole = make_dataset(folder / ".a", (8,), CAMERAS, video=False, dims=(3, 3), names=None)
    data, away = whole / "data", folder / ".data"
    data.rename(away)
    whole = whole.rename(folder / "a")
    look(growing)
    assert taken(growing) == []
    away.rename(whole / "data")
    growing.look()
    assert taken(growing) == []  # it has changed since the last look
    growing.look()
    assert taken(growing) == ["a"]
    (folder / "b.part").mkdir()
    look(growing)
    assert taken(growing) == []
    assert capsys.readouterr().out == ""


def test_whatever_is_wrong_with_an_entry_the_thread_goes_on(folder, growing, monkeypatch, capsys):
    monkeypatch.setattr("common.data.growth.PATIENCE_SECONDS", -1.0)
    entry(folder, "a", 8)
    with monkeypatch.context() as broken:
        broken.setattr("common.data.open_dataset", lambda config: 1 / 0)
        look(growing)
        look(growing)
    assert "a is left out: ZeroDivisionError: division by zero" in capsys.readouterr().out
    (folder / "a" / "meta" / "more.txt").write_text("mended")
    look(growing)
    assert taken(growing) == ["a"]


def test_samples_of_steps_before_an_arrival_are_named_rightly(
    tiny, folder, arrivals, tmp_path, monkeypatch, accelerate_reset
):
    runs, seen, batches = [], [], Run.micro_batches

    def noted(run):
        runs[:] = [run]
        for batch in batches(run):
            seen.extend(batch.index.tolist())
            yield batch

    monkeypatch.setattr(Run, "micro_batches", noted)
    train(train_naive_fm, tiny, tmp_path / "run", *FLAGS, "--grow-from", folder)
    rows = runs[0].data.train.rows
    assert len(runs[0]._orders) == 3
    assert rows[runs[0]._drawn(0, 32)].tolist() == seen
    assert rows[runs[0]._drawn(7, 30)].tolist() == seen[7:30]


def test_worker_processes_draw_the_same_samples(
    tiny, folder, arrivals, tmp_path, monkeypatch, accelerate_reset
):
    seen, batches = {0: [], 1: []}, Run.micro_batches

    def noted(run):
        for batch in batches(run):
            seen[run.config.data.num_workers].append(batch.index.tolist())
            yield batch

    monkeypatch.setattr(Run, "micro_batches", noted)
    for workers in seen:
        flags = (*FLAGS, "--grow-from", folder, "--num-workers", workers)
        train(train_naive_fm, tiny, tmp_path / f"run{workers}", *flags)
        for name, *_ in arrivals.values():
            shutil.rmtree(folder / name)
    assert seen[0] == seen[1]


def test_a_lerobot_dataset_may_grow_by_itself(folder, growing, base, tmp_path):
    folder.rmdir()
    look(growing)
    assert taken(growing) == []
    shape = {"video": False, "dims": (3, 3), "names": None}
    make_dataset(folder, (8, 9), CAMERAS, **shape)
    look(growing)
    assert [(e.name, e.episodes) for e in growing.ready] == [(".", "0-1")]
    first = growing.due(1, 0, 1, lambda x: x)
    assert growing.take(first).store.num_episodes == 6
    shutil.rmtree(folder)
    make_dataset(folder, (8, 9, 12), CAMERAS, **shape)
    look(growing)
    assert [e.episodes for e in growing.ready] == ["0-1", "2-2"]
    found = growing.due(5, 80, 2, lambda x: x)
    grown = growing.take(found)
    assert grown.store.num_episodes == 7
    assert len(grown) == len(growing.base) + 8 + 9 + 12
    again = Growth(growing.config, growing.base, tmp_path / LOG, writes=False)  # a resumed run
    assert again.due(1, 0, 0, None) == first
    assert again.due(1, 79, 0, None) is None
    again.take(first)
    assert again.due(5, 80, 0, None) == found
    assert torch.equal(again.take(found).__getitems__([40, 60]).images, grown.__getitems__([40, 60]).images)


def test_a_bad_episode_of_a_dataset_that_grows_does_not_keep_others_out(
    folder, growing, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("common.data.growth.PATIENCE_SECONDS", -1.0)
    folder.rmdir()
    shape = {"video": False, "dims": (3, 3), "names": None}
    make_dataset(folder, (8, 9, 7, 6), CAMERAS, **shape)
    nan = [float("nan")] * 3
    (file,) = folder.glob("data/*/file-000.parquet")
    edit_column(file, "action", lambda rows: [*rows[:8], nan, *rows[9:]])
    for _ in range(12):
        growing.look()
    assert [e.episodes for e in growing.ready] == ["0-3"]
    said = capsys.readouterr().out
    assert said.count("left out") == 1
    assert f"episodes 1 of {folder / '.'} are left out: " in said
    first = growing.due(1, 0, 1, lambda x: x)
    assert growing.take(first).store.num_episodes == 4 + 3
    again = Growth(growing.config, growing.base, tmp_path / LOG, writes=False)
    assert again.take(again.due(1, 0, 0, None)).store.num_episodes == 4 + 3
    for _ in range(4):
        growing.look()
    assert len(growing.ready) == 1  # it is not tried again as long as nothing changes
    shutil.rmtree(folder)
    make_dataset(folder, (8, 9, 7, 6, 5, 4), CAMERAS, **shape)
    for _ in range(6):
        growing.look()
    assert [e.episodes for e in growing.ready][1:] == ["4-5", "1-1"]
    assert capsys.readouterr().out == ""


def test_a_dataset_into_which_a_session_records_is_waited_for(folder, growing, monkeypatch, capsys):
    monkeypatch.setattr("common.data.growth.PATIENCE_SECONDS", -1.0)
    folder.rmdir()
    shape = {"video": False, "dims": (3, 3), "names": None}
    make_dataset(folder, (8, 9), CAMERAS, **shape)
    (rows,) = folder.glob("meta/episodes/*/*.parquet")
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-50])  # as LeRobot leaves it until finalize()
    for _ in range(6):
        growing.look()
    assert not growing.ready
    assert capsys.readouterr().out.count("is left out as it is now") == 1
    rows.write_bytes(whole)
    for _ in range(3):
        growing.look()
    assert [e.episodes for e in growing.ready] == ["0-1"]


def test_a_dataset_that_is_being_extended_is_read_again(folder, growing, base, tmp_path, monkeypatch):
    folder.rmdir()
    make_dataset(folder, (8, 9), CAMERAS, video=False, dims=(3, 3), names=None)
    look(growing)
    found = growing.due(1, 0, 1, lambda x: x)
    again, tries = Growth(growing.config, growing.base, tmp_path / LOG, writes=False), []

    def half_written(config):
        tries.append(config)
        if len(tries) < 3:
            raise UserError("data/chunk-000/file-000.parquet is damaged")
        return open_dataset(config)

    monkeypatch.setattr("common.data.open_dataset", half_written)
    assert again.take(again.due(1, 0, 0, None)).store.num_episodes == 6
    assert found == again.times[0]
    assert len(tries) == 3


def test_hdf5_files_appear_one_by_one(folder, cache_dir, tmp_path):
    config = DataConfig(dataset=(str(make_hdf5(tmp_path / "lab")),), cache_dir=cache_dir, grow_from=folder)
    store = open_dataset(config)
    growing = Growth(config, ChunkDataset(store, range(3), horizon=4), tmp_path / LOG, writes=True)
    more = make_hdf5(tmp_path / "more", (7, 8))
    for number, file in enumerate(sorted(more.glob("*/*.hdf5"))):
        file.rename(folder / f"episode_{number}.hdf5")
        look(growing)
        assert taken(growing) == [f"episode_{number}.hdf5"]
    grown = GrownDataset(growing.base, [growing.open(entry) for entry in growing.ready], 1)
    assert len(grown) == 36 + 15
    np.testing.assert_array_equal(grown.store.state[36:], store.state[:15])


def test_episodes_that_changed_since_are_refused(folder, growing, tmp_path):
    entry(folder, "a", 8)
    look(growing)
    found = growing.due(1, 0, 1, lambda x: x)
    shutil.rmtree(folder / "a")
    entry(folder, "a", 9)
    again = Growth(growing.config, growing.base, tmp_path / LOG, writes=True)
    with pytest.raises(UserError, match="has changed since the run has learned from it"):
        again.take(again.due(1, 0, 0, None))
    shutil.rmtree(folder / "a")
    with pytest.raises(UserError, match="a was not found"):
        again.take(found)


def test_a_folder_that_does_not_answer_for_a_while_is_said_once(folder, growing, monkeypatch, capsys):
    looked, look_ = [], growing.look

    def stale():
        looked.append(0)
        if len(looked) < 4:
            raise OSError(116, "Stale file handle")
        look_()

    monkeypatch.setattr(growing, "look", stale)
    entry(folder, "a", 8)
    growing.start()
    while not growing.ready:
        assert len(looked) < 1000
        time.sleep(0.05)
    growing.close()
    assert capsys.readouterr().out.count("cannot be read ([Errno 116] Stale file handle): trying again") == 1


def test_without_room_for_the_log_new_episodes_wait(folder, growing, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    entry(folder, "a", 8)
    look(growing)
    with monkeypatch.context() as disk:
        disk.setattr("common.data.growth.write_json", full)
        assert taken(growing) == []
    assert "new episodes wait" in capsys.readouterr().out
    assert taken(growing) == ["a"]


def test_the_thread_finds_a_new_episode_and_ends(folder, growing):
    growing.start()
    entry(folder, "a", 8)
    deadline = time.monotonic() + 60
    while not growing.ready and time.monotonic() < deadline:
        time.sleep(0.05)
    growing.close()
    assert [e.name for e in growing.ready] == ["a"]
    assert not growing._thread.is_alive()


def test_depth_is_computed_in_each_step_where_data_grow(tiny, folder, tmp_path, tiny_depth, accelerate_reset):
    entry(folder, "a", 8)
    flags = ("--steps", 2, "--log-every", 1, "--grow-from", folder)
    with pytest.raises(UserError, match="--grow-from needs --depth-cache off"):
        train(train_vfp_depth, tiny, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
    run = train(train_vfp_depth, tiny, tmp_path / "run", *flags, "--depth-cache", "off")
    assert len(lines(run)) == 2
    assert len(json.loads((run / LOG).read_text())) == 1


def test_a_policy_that_is_told_its_task_knows_those_of_new_episodes(
    base, folder, growing, monkeypatch, capsys
):
    def stores(*tasks):
        return SimpleNamespace(episode_tasks=tasks, source="new/a")

    monkeypatch.setattr(type(growing.base.store), "refuse_unlike", lambda self, other: None)
    growing.base.store.__dict__["instructions"] = ("fold", "hang")
    growing.refuse_unfit(stores("hang", None))
    capsys.readouterr()
    growing.refuse_unfit(stores("iron"))
    said = capsys.readouterr().out
    assert said == 'warning: the task of new/a is "iron", that of --dataset "fold", "hang"\n'
    growing.base.told = True
    with pytest.raises(UserError, match='its instruction "iron" is none of those in --dataset: "fold"'):
        growing.refuse_unfit(stores("iron"))
    with pytest.raises(UserError, match='its instruction "None"'):
        growing.refuse_unfit(stores("hang", None))
    growing.base.told, growing.config = False, replace(growing.config, task=("hang",))
    with pytest.raises(UserError, match='its instruction "iron" is none of those in --dataset'):
        growing.refuse_unfit(stores("iron"))


def test_an_unknown_instruction_costs_its_own_episode(folder, growing, monkeypatch, capsys):
    monkeypatch.setattr(growth, "PATIENCE_SECONDS", 0.0)
    growing.base.told = True
    growing.base.store.__dict__["instructions"] = ("fold",)
    folder.rmdir()
    make_dataset(folder, (5, 6, 7), CAMERAS, video=False, dims=(3, 3), names=None)
    said = [["fold"], ["fodl"], ["fold"]]
    edit_rows(folder, lambda rows: [{**row, "tasks": own} for row, own in zip(rows, said, strict=True)])
    (folder / "meta/tasks.parquet").unlink(missing_ok=True)
    for _ in range(4):
        growing.look()
    (found,) = growing.ready
    assert growing.open(found).episode_indices.tolist() == [0, 2]
    assert "episodes 1 of" in capsys.readouterr().out
    again = Growth(growing.config, growing.base, folder.parent / "other", writes=True)
    assert again.open(found).episode_indices.tolist() == [0, 2]  # as in a resumed run
