"""Collecting with several collectors on a Ray cluster. `make ray` installs Ray and runs this."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from running import train

pytest.importorskip("ray")
import ray

import collect
import collect_ray
import train_naive_fm
from benchmarks import faults
from benchmarks.faults import actors
from common.config import parse
from common.data import DataConfig, open_dataset
from common.data.demo import demonstrate, record
from common.data.growth import LOG
from common.errors import EXIT_STOPPED, UserError
from common.files import write_json

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SLOW_MACHINE = 900  # seconds, a limit for every wait


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return record(tmp_path_factory.mktemp("demos") / "table", demonstrate(3, seed=0))


@pytest.fixture
def run(demos, cache_dir, tiny, tmp_path, accelerate_reset):
    """A policy that has learned nothing."""
    return train(train_naive_fm, tiny, tmp_path / "a run", "--dataset", demos, "--steps", 1)


def configuration(run, out, *flags):
    argv = [str(run), str(out), "--env", "demo", *map(str, flags)]
    return parse(collect_ray.Config, argv, "collect_ray.py")


def made(out, name, steps=10):
    """A dataset of which the board reads only the length."""
    write_json_in(out / name / "meta" / "info.json", {"total_frames": steps})


def write_json_in(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


# -- the board's decisions


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new"


def test_the_board_recognises_what_was_recorded(run, out):
    made(out, "a run-step_0000001-seed-5", 30)
    made(out, "a run-step_0000001-seed-6", 12)
    made(out, ".a run-step_0000001-seed-7", 99)  # half written
    made(out, "b run-step_0000001-seed-5", 99)
    made(out, "a run-step_0000001-seed-6.bak", 99)
    made(out, "a run-step_0000002-seed-5", 3)  # with the same seed
    (out / "a run-step_0000001-seed-9").mkdir()
    board = collect_ray.Board(configuration(run, out, "--budget", 50))
    assert board.status() == (45, "", 0, 0)
    made(out, "a run-step_0000001-seed-8", 5)
    board.end(0)
    assert board.status().steps == 50
    assert board.why_wait() == collect_ray.DONE


def test_the_budget_counts_what_others_are_about_to_record(run, out):
    board = collect_ray.Board(configuration(run, out, "--budget", 50))
    assert board.grant(0, 30)
    assert board.grant(0, 30)  # asked again, because the answer was lost
    assert not board.grant(1, 30)
    assert board.why_wait() == ""  # the first collector may be lost
    board.begin(0)  # it was lost
    assert board.grant(1, 30)
    assert board.status().recording == 1
    made(out, "a run-step_0000001-seed-8", 30)
    board.end(1)
    assert board.status().recording == 0
    assert not board.grant(0, 21)
    assert board.why_wait() == collect_ray.DONE


def test_what_a_collector_was_granted_and_never_recorded_is_free_again(run, out, monkeypatch):
    board = collect_ray.Board(configuration(run, out, "--budget", 50))
    assert board.grant(0, 30)  # and its machine never comes back
    assert not board.grant(1, 30)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + collect_ray.HELD + 1)
    assert board.status().recording == 0
    assert board.grant(1, 30)


def test_the_board_counts_losses_since_the_last_round(run, out):
    board = collect_ray.Board(configuration(run, out))
    assert [board.begin(0), board.begin(1), board.begin(0), board.begin(0)] == [0, 0, 1, 2]
    board.end(0)
    assert board.begin(0) == 1
    assert board.status().started == 2


def test_without_a_budget_everything_is_granted(run, out):
    board = collect_ray.Board(configuration(run, out))
    assert board.grant(0, 10**9)
    assert board.why_wait() == ""


def test_collectors_wait_until_the_run_has_learned(run, out):
    board = collect_ray.Board(configuration(run, out, "--max-waiting", 2))
    for seed in (1, 2):
        made(out, f"a run-step_0000001-seed-{seed}")
        board.end(0)
    assert "has learned from 2 datasets" in board.why_wait()
    entry = {"name": "a run-step_0000001-seed-1", "episodes": "", "fingerprint": ""}
    write_json(run / LOG, [{"step": 3, "samples": 12, "entries": [entry]}])
    assert board.why_wait() == ""


def test_collectors_wait_for_weights_that_are_new_enough(run, out):
    board = collect_ray.Board(configuration(run, out, "--max-staleness", 5))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "split": "train", "loss": 1.0}\n')
    assert board.why_wait() == ""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "train", "loss": 1.0}\n')
    assert "a checkpoint newer than 6 steps" in board.why_wait()
    shutil.rmtree(run / "checkpoints")
    assert board.why_wait() == "waiting for the first checkpoint"


# -- bad input


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--resources", "robot"], "--resources robot: give a whole number, or a part of one"),
        (["--resources", "CPU=many"], "--resources CPU=many: give a whole number"),
        (["--resources", "GPU=1.5"], "--resources GPU=1.5: give a whole number"),
        (["--resources", "robot=-1"], "--resources robot=-1: give a whole number"),
        (["--checkpoint", "1"], "leave out --checkpoint"),
        (["--by", "keyboard"], "A person corrects on their own machine: use collect.py"),
    ],
)
def test_what_makes_no_sense_is_refused_before_ray_starts(flags, sentence, run, out):
    with pytest.raises(UserError, match=sentence):
        collect_ray.main(configuration(run, out, *flags))


def test_a_run_that_is_not_there_is_refused(out, tmp_path):
    with pytest.raises(UserError, match="no such run does not exist: start the run first"):
        collect_ray.main(configuration(tmp_path / "no such run", out))


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answer: answer)


def collector(run, out, mark, *flags, code=None, **board):
    """Whose method `work` runs without Ray, with a board that answers what it is told to."""
    if "waits" in board:
        waits = iter(board.pop("waits"))
        board["status"] = lambda: collect_ray.Status(0, next(waits), 1, 0)
    answers = {"begin": lambda number: 0, "end": lambda number: None, "newest": lambda version: None} | board
    told = {name: SimpleNamespace(remote=answer) for name, answer in answers.items()}
    code = code or collect_ray.code()
    made = collect_ray.Collector(0, configuration(run, out, *flags), mark, code)
    made.policy = "loaded"
    return SimpleNamespace(work=lambda: made.work(SimpleNamespace(**told)))


def test_a_folder_that_is_not_shared_is_refused(run, out, no_ray):
    with collect_ray.marked(out) as mark:
        collector(run, out, mark, waits=[collect_ray.DONE]).work()
    assert not list(out.iterdir())
    with pytest.raises(UserError, match="is not the folder of the launcher's machine: share it there"):
        collector(run, out, mark).work()


def test_another_version_of_the_project_is_refused(run, out):
    with collect_ray.marked(out) as mark, pytest.raises(UserError, match="is another version of the project"):
        collector(run, out, mark, code="of another version").work()


def test_a_collector_goes_on_after_a_round_that_failed(run, out, no_ray, monkeypatch, capsys):
    seeds = []

    def act(policy, config, granted):
        seeds.append(config.seed)
        if len(seeds) in (1, 2, 4):
            raise UserError("the state is not finite.")

    monkeypatch.setattr(collect, "collect", act)
    monkeypatch.setattr(collect_ray, "POLL_SECONDS", 0)
    with collect_ray.marked(out) as mark:
        waits = ["", "", "", "a reason", "", collect_ray.DONE]
        collector(run, out, mark, waits=waits).work()
        assert seeds == list(range(3_000_000, 3_000_004))
        assert capsys.readouterr().out.count("collector 0: the state is not finite.\n") == 3


def test_a_collector_whose_rounds_all_fail_ends(run, out, no_ray, monkeypatch, capsys):
    def act(policy, config, granted):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(collect, "collect", act)
    ends = []
    with collect_ray.marked(out) as mark, pytest.raises(OSError, match="No space left"):
        collector(run, out, mark, waits=[""] * 9, end=ends.append).work()
    said = "collector 0: OSError: [Errno 28] No space left on device\n"
    assert capsys.readouterr().out == said * (collect_ray.PATIENCE - 1)
    assert len(ends) == collect_ray.PATIENCE  # what it was granted is free again


def test_a_collector_that_is_lost_again_and_again_ends(run, out, no_ray, capsys):
    with collect_ray.marked(out) as mark:
        collector(run, out, mark, begin=lambda number: 1, waits=[collect_ray.DONE]).work()
        assert capsys.readouterr().out == "collector 0 was lost, with the round that it had begun\n"
        with pytest.raises(UserError, match="it was lost 3 times in a row"):
            collector(run, out, mark, begin=lambda number: collect_ray.PATIENCE).work()


def test_a_collector_that_starts_again_goes_on_after_its_last_dataset(run, out, no_ray, monkeypatch):
    made(out, "a run-step_0000001-seed-3000004")
    made(out, ".a run-step_0000001-seed-3000005")
    made(out, "a run-step_0000001-seed-4000007")
    seeds, waits = [], ["", "", collect_ray.DONE]
    monkeypatch.setattr(collect, "collect", lambda policy, config, granted: seeds.append(config.seed))
    with collect_ray.marked(out) as mark:
        collector(run, out, mark, "--episodes", 20, waits=waits).work()
    assert seeds == [3_000_024, 3_000_044]  # after the episodes of its last round


# -- with Ray


@pytest.fixture(scope="module")
def machines():
    with faults.machines() as made:
        yield made
    ray.shutdown()


def launch(machines, run, out, *flags):
    command = [sys.executable, ROOT / "collect_ray.py", run, out, "--env", "demo", "--collectors", 2]
    command += ["--address", machines.address, *flags]
    log = run.with_suffix(".log").open("a")
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
    )


def wait_until(what, process):
    end = time.monotonic() + SLOW_MACHINE
    while not what():
        assert process.poll() is None, "the launcher ended early"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def whole(out):
    return sorted(path.name for path in out.glob("[!.]*"))


def finish(process, run, code=0):
    ended = process.wait(SLOW_MACHINE)
    printed = run.with_suffix(".log").read_text()
    assert ended == code, printed[-4000:]
    return printed


@pytest.mark.slow
def test_collectors_record_what_collect_py_records_up_to_the_budget(machines, run, out, tmp_path, cache_dir):
    machines.have(2)
    printed = finish(launch(machines, run, out, "--budget", 300), run)
    config = DataConfig(dataset=(str(out),), cache_dir=cache_dir)
    stores = {name: open_dataset(replace(config, dataset=(str(out / name),))) for name in whole(out)}
    steps = sum(store.num_steps for store in stores.values())
    assert 200 < steps <= 300
    assert f"{steps} steps recorded in {out}" in printed
    assert not list(out.glob(".*"))
    seed = next(iter(stores)).rpartition("-")[2]
    argv = [str(run), str(tmp_path / "alone"), "--env", "demo", "--episodes", "1", "--seed", seed]
    collect.main(parse(collect.Config, argv, "collect.py"))
    (alone,) = (tmp_path / "alone").iterdir()
    same = open_dataset(replace(config, dataset=(str(alone),)))
    np.testing.assert_array_equal(same.action, stores[alone.name].action)
    before = whole(out)
    finish(launch(machines, run, out, "--budget", 300), run)  # there is nothing left to do
    assert whole(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["Collector", "Board", "launcher", "machine"])
def test_what_is_killed_costs_no_finished_episode(what, machines, run, out):
    machines.have(2)
    process = launch(machines, run, out, "--budget", 2000, "--max-waiting", 1000)
    wait_until(lambda: len(whole(out)) >= 2, process)
    if what == "launcher":
        process.kill()
        process.wait()
        end = time.monotonic() + SLOW_MACHINE
        while actors("Collector") or actors("Board"):
            assert time.monotonic() < end, "an actor outlives its launcher"
            time.sleep(0.1)
        process = launch(machines, run, out, "--budget", 2000, "--max-waiting", 1000)
    elif what == "machine":
        machines.have(1)
    else:
        os.kill(actors(what)[0], signal.SIGKILL)
    had = whole(out)
    machines.have(2)
    printed = finish(process, run)
    assert set(had) <= set(whole(out))
    assert 1900 < collect_ray.Board(configuration(run, out)).status().steps <= 2000
    assert len({name.rpartition("-")[2] for name in whole(out)}) == len(whole(out))
    if what in ("Collector", "machine"):
        assert printed.count("was lost, with the round that it had begun") == 1


@pytest.mark.slow
def test_collectors_use_new_weights_and_stop_when_told(machines, run, out, demos, cache_dir, tiny):
    machines.have(2)
    process = launch(machines, run, out, "--max-waiting", 1000)
    wait_until(lambda: len(whole(out)) >= 2, process)
    assert all("step_0000001" in name for name in whole(out))
    more = ["--resume", "auto", "--dataset", demos, "--steps", 3, "--run-dir", run]
    subprocess.run(
        list(map(str, [sys.executable, ROOT / "train_naive_fm.py", *tiny, *more])),
        env=ENVIRONMENT,
        check=True,
    )
    wait_until(lambda: any("step_0000003" in name for name in whole(out)), process)
    process.send_signal(signal.SIGTERM)
    assert ": the same command continues" in finish(process, run, EXIT_STOPPED)


@pytest.mark.slow
def test_an_error_in_every_collector_ends_with_its_message(machines, run, out):
    machines.have(2)
    printed = finish(launch(machines, run, out, "--env", "nowhere:factory"), run, 1)
    assert "error: No collector is left" in printed
    assert "collector 0 has ended: --env nowhere:factory is none of" in printed
