"""What can go wrong during a run: signals, NaN, full disks, lost processes."""

import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from running import interrupt_after, lines, train, weights
from test_scripts import SCRIPTS
from torch import nn

import train_naive_fm
import train_vfp
import train_vfp_moe
from common import checkpoint, files
from common import run as run_module
from common.config import parse
from common.errors import EXIT_HUNG, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, UserError, explain
from common.watch import SIGNALS, StopRequests

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
pytestmark = pytest.mark.usefixtures("accelerate_reset", "tiny_depth", "signals")


@pytest.fixture
def signals():
    """Restore signal handlers: a run that ends with an exception leaves its own."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


def start(*command, **options):
    """A script in its own process."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for_step(run_dir, step, process, seconds=120):
    """Wait until a process has logged a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0][-3000:]
        if (run_dir / "metrics.jsonl").exists() and any(row["step"] >= step for row in lines(run_dir)):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no step {step} after {seconds} s: {process.communicate()[0][-3000:]}")


def same_checkpoints(one, other, step):
    mine, reference = weights(one, step), weights(other, step)
    return mine.keys() == reference.keys() and all(torch.equal(mine[key], reference[key]) for key in mine)


# -- signals and time


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_what_follows_equals_a_run_that_was_left_alone(
    number, tiny, tmp_path, monkeypatch
):
    flags = ["--steps", 5, "--save-every", 100, "--log-every", 2, "--eval-every", 100]
    whole = train(train_vfp_moe, tiny, tmp_path / "whole", *flags)
    steps = []

    def agreed(requests, ready=0, original=StopRequests.agreed):
        steps.append(requests)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return original(requests, ready)

    monkeypatch.setattr(StopRequests, "agreed", agreed)
    with pytest.raises(SystemExit) as stopped:
        train(train_vfp_moe, tiny, tmp_path / "run", *flags)
    assert stopped.value.code == EXIT_STOPPED
    assert checkpoint.find(tmp_path / "run").name == "step_0000003"  # between two lines of metrics
    train(train_vfp_moe, tiny, tmp_path / "run", *flags, "--resume", "auto")
    assert same_checkpoints(tmp_path / "run", whole, 5)
    assert lines(tmp_path / "run") == lines(whole)
    assert [row["step"] for row in lines(whole)] == [2, 4, 5]


def test_time_that_is_over_does_the_same(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(train_vfp, tiny, tmp_path / "run", "--steps", 9, "--max-time", 1e-9)
    assert stopped.value.code == EXIT_STOPPED
    assert checkpoint.find(tmp_path / "run").name == "step_0000001"
    assert "stopped after step 1 of 9 (time is over)" in capsys.readouterr().out
    # a finished run just ends, whatever the time limit
    train(train_vfp, [], None, "--resume", tmp_path / "run", "--steps", 2, "--max-time", 1e-9)


@pytest.mark.slow
def test_a_second_signal_exits_at_once(tmp_path):
    program = """
import hashlib, os, signal, threading, time
from common import watch
requests = watch.StopRequests(0, 1, None, 0)
assert not requests.agreed()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what a terminal has sent already
assert requests.agreed()
time.sleep(0.5)
print("still here", flush=True)
watch.SAME_REQUEST_SECONDS = 0.0
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where Python's handlers do not run
print("not reached", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "still here\n"
    assert "once more to exit at once" in done.stderr


@pytest.mark.slow
def test_two_processes_agree_on_the_step_after_which_they_stop(tiny, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*tiny, "--log-every", 3, "--eval-every", 1000, "--schedule", "constant", "--warmup-steps", 0]
    process = start(*TORCHRUN, "train_vfp.py", *flags, "--run-dir", run, "--steps", 100_000)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert "(SIGTERM): continue with --resume" in printed
    assert process.returncode != 0
    done = int(checkpoint.find(run).name[5:])
    for more in (["--resume", run], [*flags, "--run-dir", whole]):
        process = start(*TORCHRUN, "train_vfp.py", *more, "--steps", done + 4)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed[-3000:]
    assert same_checkpoints(run, whole, done + 4)
    assert lines(run) == lines(whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_between_two_lines_survive(script, tiny, tmp_path):
    flags = ["--steps", 6, "--save-every", 2, "--log-every", 5, "--eval-every", 100]
    whole = train(script, tiny, tmp_path / "whole", *flags)
    for step in (2, 4):
        part = interrupt_after(whole, step, tmp_path / f"part{step}")
        train(script, [], None, "--resume", part)
        assert lines(part) == lines(whole)
        assert [row["step"] for row in lines(part)] == [5, 6]


def test_clocks_that_jump_change_nothing(tiny, tmp_path, monkeypatch):
    whole = train(train_vfp, tiny, tmp_path / "whole", "--steps", 4, "--save-every", 1)
    jumps = iter([1e9, -1e8, 4e9, 0.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    run = train(train_vfp, tiny, tmp_path / "run", "--steps", 4, "--save-every", 1, "--max-time", 1)
    assert same_checkpoints(run, whole, 4)
    part = interrupt_after(run, 2, tmp_path / "part")
    train(train_vfp, [], None, "--resume", part)
    assert same_checkpoints(part, whole, 4)
    assert lines(part) == lines(whole)


# -- numbers


def test_a_bad_step_after_a_window_was_reset_does_not_bring_it_back(tiny, tmp_path, monkeypatch):
    """Counts of codes and experts restart after a line or window; the next step may be a bad one."""
    flags = ["--num-experts", 2, "--latent", "vq", "--num-codes", 4, "--latent-dim", 4, "--code-window", 2]
    flags += ["--steps", 4, "--log-every", 2, "--max-bad-steps", 9]
    original, seen = train_vfp_moe.compute_loss, []

    def compute_loss(policy, *args, train, **more):
        loss, metrics = original(policy, *args, train=train, **more)
        if train:
            seen.append(policy.gate.usage.counts.sum().item())
            loss = loss * (math.nan if len(seen) in (3, 4) else 1.0)
        return loss, metrics

    monkeypatch.setattr(train_vfp_moe, "compute_loss", compute_loss)
    run = train(train_vfp_moe, tiny, tmp_path / "run", *flags)
    assert seen[1] > 0
    assert seen[2] == seen[3] == 0  # skipped steps count nothing, so nothing is replaced
    assert all(value.isfinite().all() for value in weights(run, 4).values())
    assert [row["bad_steps"] for row in lines(run)] == [0, 2]
    assert lines(run)[1]["codes/replaced"] == 0


def spoil(monkeypatch, script, bad_batches):
    """Make the loss of some batches, counted from 1, NaN; returns the rows of every batch."""
    drawn = []
    original = script.compute_loss

    def compute_loss(policy, batch, *args, train, **more):
        loss, metrics = original(policy, batch, *args, train=train, **more)
        if train:
            drawn.append(batch.index.tolist())
            loss = loss * (math.nan if len(drawn) in bad_batches else 1.0)
        return loss, metrics

    monkeypatch.setattr(script, "compute_loss", compute_loss)
    return drawn


def test_one_bad_step_is_skipped_counted_and_told(tiny, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, train_vfp, {2})
    run = train(train_vfp, tiny, tmp_path / "run", "--steps", 4, "--log-every", 4, "--max-bad-steps", 2)
    (row,) = lines(run)
    assert row["bad_steps"] == 1
    assert math.isfinite(row["loss"])  # averaged over the other three
    assert all(value.isfinite().all() for value in weights(run, 4).values())
    assert "step 4  skipped 1 step whose loss" in capsys.readouterr().out


@pytest.mark.parametrize("accumulation", [1, 2])
def test_too_many_bad_steps_stop_the_run_and_name_their_samples(accumulation, tiny, tmp_path, monkeypatch):
    bad_steps = {3, 4, 5}
    bad = {accumulation * (step - 1) + 1 for step in bad_steps}  # one bad micro-batch makes its step bad
    drawn = spoil(monkeypatch, train_vfp, bad)
    flags = ["--steps", 50, "--log-every", 3, "--save-every", 2, "--grad-accumulation", accumulation]
    with pytest.raises(UserError, match=r"In 3 steps in a row, 3 to 5, .*bad_steps\.json") as refused:
        train(train_vfp, tiny, tmp_path / "run", *flags, "--max-bad-steps", 3)
    named = json.loads((tmp_path / "run" / "bad_steps.json").read_text())["samples"]
    rows = [row for batch in drawn[2 * accumulation : 5 * accumulation] for row in batch]
    assert [sample["row"] for sample in named] == rows
    assert {sample["step"] for sample in named} == bad_steps
    assert f"episode {named[0]['episode']}, frame {named[0]['frame']}" in str(refused.value)
    assert checkpoint.find(tmp_path / "run").name in ("step_0000002", "step_0000004", "step_0000006")


def test_bad_steps_in_a_row_are_counted_across_lines_and_checkpoints(tiny, tmp_path, monkeypatch):
    flags = ["--log-every", 2, "--save-every", 3, "--max-bad-steps", 4]
    spoil(monkeypatch, train_vfp, {2, 3})
    train(train_vfp, tiny, tmp_path / "run", "--steps", 3, *flags)
    spoil(monkeypatch, train_vfp, {1, 2})
    with pytest.raises(UserError, match="In 4 steps in a row, 2 to 5"):
        train(train_vfp, [], None, "--resume", tmp_path / "run", "--steps", 9)


# -- disks


@pytest.mark.parametrize("more", [[], ["--no-background-saving"]])
def test_a_full_disk_costs_a_checkpoint_not_the_run(more, tiny, tmp_path, monkeypatch, capsys):
    flags = ["--steps", 4, "--save-every", 1, "--keep", 9, *more]
    whole = train(train_vfp, tiny, tmp_path / "whole", *flags)
    original, calls = checkpoint.save_file, []

    def sometimes_full(tensors, path):
        calls.append(path)
        if "step_0000002" in str(path) or "step_0000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", sometimes_full)
    run = train(train_vfp, tiny, tmp_path / "run", *flags)
    assert capsys.readouterr().out.count("is not saved ([Errno 28] No space left on device)") == 2
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last", "step_0000001", "step_0000004"]
    assert same_checkpoints(run, whole, 4)
    assert lines(run) == lines(whole)


def test_a_last_step_that_cannot_be_saved_is_an_error(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"Step 2, the last, could not be saved: free disk space"):
        train(train_vfp, tiny, tmp_path / "run", "--steps", 2)


@pytest.mark.slow
def test_files_that_may_not_grow_are_a_full_disk(tiny, tmp_path):
    """Real errors of torch, safetensors and Python, caused by a limit on file sizes."""
    train(train_vfp, tiny, tmp_path / "before", "--steps", 1)  # its store may be larger than the limit
    run, limit = tmp_path / "run", 300_000

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = ["--steps", 3, "--save-every", 1, "--eval-every", 1]
    process = start(sys.executable, "train_vfp.py", *tiny, *flags, "--run-dir", run, preexec_fn=limited)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.count("is not saved (") == 3
    assert "error: Step 3, the last, could not be saved" in printed
    assert "Traceback" not in printed
    assert [row["step"] for row in lines(run)] == [1, 2, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == []


def test_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    from common.tracking import Lines

    file = Lines(tmp_path / "metrics.jsonl")
    file.append({"n": 1})
    original = os.write

    def full(descriptor, content):
        original(descriptor, content[:2])  # only part of it fits
        return 2

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        file.append({"n": 2})
        file.append({"n": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"n": 1}\n'
    assert capsys.readouterr().out.count("wait in memory") == 1
    file.append({"n": 4})
    file.close()
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in written] == [1, 2, 3, 4]


# -- checkpoints that are written while training goes on


SLOWLY = """
import sys, time
import torch._dynamo  # what the first optimizer imports: no time of the watch is lost to that
import train_vfp
from common import checkpoint
from common.config import cli
from common.run import Run

how = sys.argv.pop(1)

def seal(folder, original=checkpoint.seal):
    if "step_0000004" in folder.name:
        (folder.parents[1] / "writing").touch()
        time.sleep(60 if how == "stuck" else 4)
    original(folder)

def end_step(run, original=Run.end_step):
    if how == "mistaken" and run.step == 5:
        raise ValueError("a mistake in the script")
    return original(run)

checkpoint.seal, Run.end_step = seal, end_step
cli(train_vfp.main, train_vfp.Config)
"""
EVERY_TWO = ["--save-every", 2, "--eval-every", 1000, "--schedule", "constant", "--warmup-steps", 0]


def writing(how, tiny, run_dir, *more):
    """A run that trains on while its checkpoint of step 4 is being written, slowly."""
    flags = [*tiny, *EVERY_TWO, "--steps", 100_000, "--run-dir", run_dir, *more]
    process = start(sys.executable, "-c", SLOWLY, how, *flags)
    while not (run_dir / "writing").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_resumes_from_the_checkpoint_before(tiny, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = writing("stuck", tiny, run)
    wait_for_step(run, 5, process)  # it did not wait
    process.kill()
    process.communicate()
    assert (run / "checkpoints" / ".step_0000004.unfinished" / "state" / "optimizer.bin").exists()
    assert checkpoint.find(run).name == "step_0000002"
    train(train_vfp, [], None, "--resume", run, "--steps", 6)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last", "step_0000002", "step_0000004", "step_0000006"]
    train(train_vfp, tiny, whole, *EVERY_TWO, "--steps", 6)
    assert same_checkpoints(run, whole, 6)
    assert lines(run) == lines(whole)


def test_one_process_at_a_time_writes_a_run_folder(tiny, tmp_path, monkeypatch, capsys):
    run, new = tmp_path / "run", tmp_path / "new"
    train(train_naive_fm, tiny, run, "--steps", 1)
    new.mkdir()
    code = "import sys, time; from pathlib import Path; from common.files import hold\n"
    code += "held = [hold(Path(folder, '.lock'), folder) for folder in sys.argv[1:]]\n"
    code += "print(flush=True); time.sleep(99)"
    other = start(sys.executable, "-c", code, run, new)
    assert other.stdout.readline() == "\n"
    monkeypatch.setattr(run_module, "hold", partial(files.hold, patience=0))
    busy = rf"is in use by process {other.pid} on .*: stop that one, or choose another folder"
    for where, resume in ((new, "auto"), (None, run)):
        with pytest.raises(UserError, match=busy):
            train(train_naive_fm, tiny, where, "--resume", resume, "--steps", 2)
    monkeypatch.setattr(run_module, "hold", partial(files.hold, patience=60))
    threading.Timer(1.0, other.kill).start()
    capsys.readouterr()
    train(train_naive_fm, [], None, "--resume", run, "--steps", 2)
    assert f"waiting for process {other.pid} on" in capsys.readouterr().out
    assert checkpoint.find(run).name == "step_0000002"
    other.communicate()


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("")  # permissions do not bind root
    with pytest.raises(UserError, match=r"run cannot be written \(Not a directory\): choose another"):
        files.hold(tmp_path / "run" / ".lock", tmp_path / "run")


@pytest.mark.slow
def test_a_signal_waits_for_what_is_written_and_a_second_one_does_not(tiny, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    process = writing("slow", tiny, once, "--save-every", 4)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED
    assert "(SIGTERM): continue with --resume" in printed
    last = checkpoint.find(once)
    steps = sorted(path.name for path in (once / "checkpoints").iterdir())
    assert steps == ["last", "step_0000004", last.name]  # saved at step 4, and at the signal
    assert lines(once)[-1]["step"] == int(last.name[5:]) > 4
    assert all(checkpoint.damage(once / "checkpoints" / step) is None for step in steps)

    process = writing("stuck", tiny, twice)
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint.find(twice).name == "step_0000002"


@pytest.mark.slow
def test_a_run_that_fails_finishes_the_checkpoint_that_is_being_written(tiny, tmp_path):
    process = writing("mistaken", tiny, tmp_path / "run")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "ValueError: a mistake in the script" in printed
    last = checkpoint.find(tmp_path / "run")
    assert last.name == "step_0000004"
    assert checkpoint.damage(last) is None


@pytest.mark.slow
def test_a_disk_that_does_not_answer_is_told_by_the_watch(tiny, tmp_path):
    process = writing("stuck", tiny, tmp_path / "run", "--hang-timeout", 20)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_HUNG
    assert "process 0 of 1 has not got past 'writing the previous checkpoint'" in printed
    assert "in seal" in printed


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_without_memory_for_a_copy_training_waits(error, tiny, tmp_path, monkeypatch, capsys):
    flags = ["--steps", 2, "--save-every", 1]
    whole = train(train_vfp, tiny, tmp_path / "whole", *flags)

    def refuse(*_):
        raise error

    monkeypatch.setattr(checkpoint, "tree_map_only", refuse)
    run = train(train_vfp, tiny, tmp_path / "run", *flags)
    # Not of the last step, for which nothing is copied.
    assert capsys.readouterr().out.count("no memory to save step 1 in the background: training waits") == 1
    assert all(same_checkpoints(run, whole, step) for step in (1, 2))


@pytest.mark.parametrize("script", [train_vfp, train_naive_fm])  # a weight average, and that of schedule-free
def test_what_is_written_late_is_what_there_was(script, tiny, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--save-every", 2, "--eval-every", 1]
    waited = train(script, tiny, tmp_path / "waited", *flags, "--no-background-saving")
    steps_done = threading.Event()

    def complete(large, unfinished, final, original=checkpoint._complete):
        assert steps_done.wait(60)
        original(large, unfinished, final)

    def end_step(run, original=run_module.Run.end_step):
        if run.step == 4:
            steps_done.set()
        return original(run)

    monkeypatch.setattr(checkpoint, "_complete", complete)
    monkeypatch.setattr(run_module.Run, "end_step", end_step)
    run = train(script, tiny, tmp_path / "run", *flags)
    for step in (2, 4):
        sums, expected = (
            json.loads((folder / f"checkpoints/step_000000{step}/checksums.json").read_text())
            for folder in (run, waited)
        )
        assert sums.pop("policy/policy.json") != expected.pop("policy/policy.json")  # it names the folder
        assert sums == expected
        assert len(sums) > 8


# -- processes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "asleep", "killed"])
def test_a_process_that_hangs_or_dies_ends_the_job_and_is_named(how, tiny, tmp_path):
    flags = [*tiny, "--run-dir", tmp_path / "run", "--steps", 100_000, "--hang-timeout", 20, "--log-every", 5]
    started = time.monotonic()
    process = start(*TORCHRUN, "tests/ddp_hang.py", how, *flags)
    printed, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert time.monotonic() - started < 120
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    if how == "killed":
        assert "rank      : 1" in printed
        assert "SIGKILL" in printed
    else:
        assert "error: process 1 of 2" in printed, printed[-3000:]
        assert "--hang-timeout" in printed


@pytest.mark.slow
def test_a_process_that_hangs_before_the_first_step_is_named(tiny, tmp_path):
    flags = [*tiny, "--run-dir", tmp_path / "run", "--steps", 2, "--hang-timeout", 20]
    process = start(*TORCHRUN, "tests/ddp_hang.py", "starting", *flags)
    printed, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "process 1 of 2 has not got past 'setting up the policy'" in printed, printed[-3000:]
    assert "in build_optimizer" in printed


@pytest.mark.slow
def test_a_process_may_take_long_over_its_data(tiny, tmp_path):
    flags = [*tiny, "--run-dir", tmp_path / "run", "--steps", 2, "--hang-timeout", 20]
    process = start(*TORCHRUN, "tests/ddp_hang.py", "reading", *flags)
    printed, _ = process.communicate(timeout=150)
    assert process.returncode == 0, printed[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_start_says_so(rank, tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    flags = [*tiny, "--run-dir", tmp_path / "run", "--steps", 2, "--hang-timeout", 5]
    environment = [f"{name}={value}" for name, value in place.items()]
    process = start("env", *environment, sys.executable, "train_vfp.py", *flags)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_HUNG
    assert f"error: process {rank} of 2 has waited 5 s for the others to start (--hang-timeout)" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loading_process_that_dies_is_reported(tiny, tmp_path):
    run = tmp_path / "run"
    flags = ["--num-workers", 1, "--run-dir", run, "--steps", 100_000]
    process = start(sys.executable, "train_vfp.py", *tiny, *flags)
    wait_for_step(run, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    loading = [
        pid
        for pid in children
        if "multiprocessing" in Path(f"/proc/{pid}/cmdline").read_text()
        or "train_vfp.py" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert loading
    for pid in loading:
        os.kill(int(pid), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_HUNG
    assert "A process that loads data has died" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_run_that_makes_no_progress_ends_with_its_whereabouts():
    program = """
import time
from common.watch import HangWatch
class Run: progress_mark = (1, "loading data")
run = Run()
watch = HangWatch(run, 0, 1, timeout=0.4)
for n in range(8):  # progress keeps it alive
    run.progress_mark = (n, "loading data")
    time.sleep(0.1)
print("alive", flush=True)
def stuck_here(): time.sleep(60)
stuck_here()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EXIT_HUNG
    assert done.stdout == "alive\n"
    assert "process 0 of 1 has not got past 'loading data'" in done.stderr
    assert "stuck_here" in done.stderr


# -- memory


def test_running_out_of_memory_says_what_to_lower():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    sentence, code = explain(failed.value)
    assert "lower --batch-size" in sentence
    assert code == EXIT_OUT_OF_MEMORY
    assert explain(torch.OutOfMemoryError("CUDA out of memory."))[1] == EXIT_OUT_OF_MEMORY
    assert explain(OSError(errno.ENOSPC, "No space left on device", "x.bin"))[1] == 1
    assert explain(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))[1] == EXIT_OUT_OF_MEMORY
    assert "process was lost" in explain(RuntimeError("[gloo] Connection closed by peer [::1]:2"))[0]
    for broken in (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), EOFError()):
        assert explain(broken)[1] == EXIT_HUNG
    assert explain(RuntimeError("anything else")) is None
    assert explain(IndexError("Caught IndexError in DataLoader worker process 0.")) is None


# -- the files of a run


def test_a_run_may_change_its_precision(tiny, tmp_path, monkeypatch):
    """fp16 has a state that other precisions lack."""
    run = train(train_vfp, tiny, tmp_path / "run", "--steps", 1)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    policy = nn.ModuleDict({"a": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(policy.parameters())
    average = type("Average", (), {"policy": policy, "optimizer": optimizer, "load": lambda *_: None})()
    monkeypatch.setattr(accelerator, "load_state", lambda path: loaded.append(accelerator.scaler))
    monkeypatch.setattr(checkpoint, "_read_components", lambda *_: {})
    monkeypatch.setattr(checkpoint, "_check_random_state", lambda *_: None)
    loaded = []
    assert checkpoint.restore(accelerator, run, average) == (1, 4)
    assert loaded == [None]
    assert accelerator.scaler is not None


def test_a_job_that_died_while_it_wrote_its_first_file_can_start_again(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json.abc.part").write_text("{")
    train(train_vfp, tiny, run, "--steps", 1, "--resume", "auto")
    assert checkpoint.find(run).name == "step_0000001"


@pytest.mark.real("git", "fsync", "drawing")
def test_the_run_folder_says_what_ran(tiny, tmp_path):
    run = train(train_vfp, tiny, tmp_path / "run", "--steps", 1)
    saved = json.loads((run / "config.json").read_text())
    assert saved["processes"] == 1
    assert saved["device"] == "cpu"
    assert saved["mixed_precision"] == "no"
    assert saved["config"]["run"]["seed"] == 0
    assert {"torch", "accelerate", "python"} <= saved["versions"].keys()
    assert len(saved["fingerprint"]) > 8


def test_a_run_knows_when_it_was_resumed_and_what_it_had_reached(tiny, tmp_path):
    whole = train(train_vfp, tiny, tmp_path / "whole", "--steps", 4, "--save-every", 2)
    assert "resumes" not in json.loads((whole / "config.json").read_text())
    run = interrupt_after(whole, 2, tmp_path / "part")
    for step, last in ((2, 4), (4, 5)):
        train(train_vfp, tiny, None, "--resume", run, "--steps", last)
        resumes = json.loads((run / "config.json").read_text())["resumes"]
        assert (resumes[-1]["step"], resumes[-1]["reached"]) == (step, 4)
        assert abs(datetime.fromisoformat(resumes[-1]["time"]).timestamp() - time.time()) < 600
    assert len(resumes) == 2


@pytest.mark.real("git")
def test_uncommitted_code_is_kept_as_a_patch(tmp_path, monkeypatch):
    root, run_dir = tmp_path / "project", tmp_path / "run"
    (root / "common").mkdir(parents=True)
    run_dir.mkdir()
    (root / "train.py").write_text("lr = 1\n")
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(run_module, "__file__", str(root / "common" / "run.py"))
    found, changes = run_module._git()
    assert found["git_dirty"] is False
    assert changes == ""
    (root / "train.py").write_text("lr = 2\n")
    (root / "train_mine.py").write_text("idea = 3\n")
    (root / "notes.txt").write_text("not code\n")
    found, patch = run_module._git()
    assert found["git_dirty"] is True
    (run_dir / "changes.patch").write_text(patch)
    assert "+lr = 2" in patch
    assert "+idea = 3" in patch
    assert "not code" not in patch
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", root, copy], check=True)
    subprocess.run(["git", "-C", copy, "apply", run_dir / "changes.patch"], check=True)
    assert (copy / "train_mine.py").read_text() == "idea = 3\n"


@pytest.mark.usefixtures("accelerate_reset")
def test_changes_that_were_committed_since_are_no_changes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_git", lambda: ({"git_commit": "a", "git_dirty": True}, "a change"))
    run = train(train_naive_fm, tiny, tmp_path / "run", "--steps", 1)
    assert (run / "changes.patch").read_text() == "a change"
    monkeypatch.setattr(run_module, "_git", lambda: ({}, ""))  # without git, nothing is known
    train(train_naive_fm, tiny, run, "--steps", 2, "--resume", "auto")
    assert (run / "changes.patch").is_file()
    monkeypatch.setattr(run_module, "_git", lambda: ({"git_commit": "b", "git_dirty": False}, ""))
    train(train_naive_fm, tiny, run, "--steps", 3, "--resume", "auto")
    assert not (run / "changes.patch").exists()


def test_deterministic_runs_use_only_such_algorithms(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        one = train(train_vfp, tiny, tmp_path / "one", "--steps", 2, "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        other = train(train_vfp, tiny, tmp_path / "other", "--steps", 2, "--deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_checkpoints(one, other, 2)
    refused = RuntimeError("x does not have a deterministic implementation, but you set ...")
    assert explain(refused)[0].startswith("--deterministic: x does not have")


def test_a_run_goes_on_from_another_folder(tiny, dataset, tmp_path, monkeypatch):
    """The saved configuration describes the data in full, whatever the command line said."""
    flags = ["--dataset", dataset.name, "--cache-dir", "cache", "--run-dir", str(tmp_path / "run")]
    monkeypatch.chdir(dataset.parent)
    settings = parse(train_vfp.Config, [*tiny, *flags], "train_vfp.py")
    assert settings.data.dataset == (str(dataset),)
    assert settings.data.cache_dir == dataset.parent / "cache"
    assert parse(train_vfp.Config, [*tiny, "--dataset", "a/b"], "").data.dataset == ("a/b",)
    assert parse(train_vfp.Config, [*tiny, "--dataset", "demo"], "").data.dataset == ("demo",)
