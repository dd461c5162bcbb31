"""Scripts on Ray: the launcher's decisions and, where Ray is installed, real groups on virtual machines.

`make ray` installs Ray and runs all of this.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import lines, weights

pytest.importorskip("ray")
import ray.train
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

import launch_ray
import train_vfp
from benchmarks import faults
from benchmarks.faults import orphans, parent, scripts_of
from common.checkpoint import find
from common.config import parse
from common.errors import EXIT_HUNG, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, UserError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
SLOW_MACHINE = 900  # seconds, a limit for every wait


def configuration(*argv):
    return parse(launch_ray.Config, list(map(str, argv)), "launch_ray.py")


# -- decisions of the launcher


@pytest.mark.parametrize(
    ("samples", "most", "workers", "active", "batch", "parts"),
    [
        (64, 64, 4, 4, 16, 1),
        (64, 32, 3, 2, 32, 1),  # 64 samples cannot be divided among three
        (64, 16, 1, 1, 16, 4),
        (64, 10, 2, 2, 8, 4),  # the largest below 10 that divides 32
        (7, 7, 4, 1, 7, 1),
        (6, 4, 1, 1, 3, 2),
    ],
)
def test_a_step_has_the_same_samples_whatever_the_number_of_workers(
    samples, most, workers, active, batch, parts
):
    assert active * batch * parts == samples
    flags = ["--batch-size", str(batch), "--grad-accumulation", str(parts)]
    assert launch_ray.divide(samples, most, workers) == (active, flags)
    assert launch_ray.divide(None, most, workers) == (workers, [])


def test_flags_of_the_script_are_read_as_it_reads_them():
    flags = ["--lr", "1", "--batch-size", "8", "--batch_size=16", "--epochs"]
    assert launch_ray.flag(flags, "batch-size") == "16"
    assert launch_ray.flag(flags, "epochs") == ""
    assert launch_ray.flag(flags, "steps") is None
    assert launch_ray.flag([], "steps") is None


@pytest.mark.parametrize(
    ("argv", "flags", "sentence"),
    [
        (["--num-workers", "4-1"], [], "--num-workers is 4-1: give a number"),
        (["--num-workers", "0"], [], "--num-workers is 0: give a number"),
        (["--num-workers", "1-4"], [], "give --global-batch"),
        (["--env", "NO_SUCH_VARIABLE"], [], "--env NO_SUCH_VARIABLE: there is no such variable"),
        ([], ["--run_dir=elsewhere"], "--run-dir after the -- is set by launch_ray.py itself"),
        ([], ["--resume", "auto"], "--resume after the -- is set by launch_ray.py itself"),
        (["--global-batch", "8"], ["--grad-accumulation", "2"], "--grad-accumulation after the --"),
        (["--global-batch", "8"], ["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_ray_starts(argv, flags, sentence, tmp_path):
    config = configuration(*argv, ROOT / "train_vfp.py", "--run-dir", tmp_path)
    with pytest.raises(UserError, match=sentence):
        launch_ray.main(config, flags)


def test_the_most_that_a_process_takes_is_the_scripts_own_batch_size(tmp_path):
    config = configuration(ROOT / "train_vfp.py", "--run-dir", tmp_path / "run")
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"script": "train_vfp.py", "config": {"optim": {"batch_size": 12}}}))
    assert launch_ray.batch_size(config, []) == train_vfp.Config().optim.batch_size
    assert launch_ray.batch_size(config, ["--config", str(file)]) == 12
    assert launch_ray.batch_size(config, ["--config", str(file), "--batch-size", "3"]) == 3


def test_a_run_in_the_place_of_rays_own_folder_is_kept(tmp_path):
    config = configuration(ROOT / "train_vfp.py", "--run-dir", tmp_path / "towel")
    launch_ray.refuse_senseless(config, [])
    (tmp_path / "towel.ray/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"towel\.ray, where Ray would keep its files, is a run"):
        launch_ray.refuse_senseless(config, [])


def test_a_cluster_that_has_gone_is_not_waited_for(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(launch_ray.ray, "init", lambda address, **options: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(launch_ray, "last_cluster", lambda: here)
        launch_ray.connect(None)
    launch_ray.connect(None)
    assert f"the last cluster here, {here}, does not answer" in capsys.readouterr().out
    launch_ray.connect("auto")
    assert asked == [None, "local", "auto"]


def test_a_script_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train_absent\.py does not exist"):
        launch_ray.refuse_senseless(configuration("train_absent.py", "--run-dir", tmp_path), [])


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([SystemExit(1), SystemExit(1)], 1),
        ([SystemExit(EXIT_OUT_OF_MEMORY), SystemExit(EXIT_HUNG)], EXIT_OUT_OF_MEMORY),
        ([SystemExit(EXIT_HUNG)], None),
        ([SystemExit(-9)], None),
        ([SystemExit(1), SystemExit(-9)], None),  # an error caused by losing the other process
        ([SystemExit(1), RuntimeError("lost")], None),
    ],
)
def test_only_what_another_attempt_may_help_is_tried_again(ends, code):
    assert launch_ray.judge(WorkerGroupError("", dict(enumerate(ends))))[0] == code


def test_a_group_whose_controller_is_lost_starts_again():
    assert launch_ray.judge(ray.exceptions.ActorDiedError())[0] is None


def test_what_ray_refuses_is_not_tried_again():
    with pytest.raises(UserError, match="Ray cannot run the scripts"):
        launch_ray.judge(RuntimeError("no such storage"))


def test_news_of_a_run_folder_are_told_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "loss": 9.0}\n')
    folder = launch_ray.RunFolder(tmp_path)  # of a resumed run
    assert folder.news() == {}
    with path.open("a") as file:
        file.write('{"step": 2, "split": "train", "loss": 2.0, "lr/all": 0.5}\n')
        file.write('{"step": 2, "split": "val", "loss": 3.0}\n{"step": 3, "spl')
    assert folder.news() == {"step": 2, "train/loss": 2.0, "train/lr/all": 0.5, "val/loss": 3.0}
    assert folder.news() == {}
    path.write_text('{"step": 1, "split": "train", "loss": 9.0}\n')  # resumed: later lines are dropped
    assert folder.news() == {}
    with path.open("a") as file:
        file.write('{"step": 2, "split": "train", "loss": 2.5}\n')
    assert folder.news() == {"step": 2, "train/loss": 2.5}
    checkpoint = tmp_path / "checkpoints" / "step_0000002"
    checkpoint.mkdir(parents=True)
    assert folder.news() == {}  # still incomplete
    (checkpoint / "checksums.json").write_text("{}")
    assert folder.news() == {"checkpoint": str(checkpoint)}
    assert folder.news() == {}


# -- real groups


@pytest.fixture(scope="module")
def machines():
    with faults.machines() as made:
        yield made
    ray.shutdown()


def launch(machines, run_dir, options, flags, cwd=ROOT, workers=1):
    """Start the launcher; its output goes to a .log file next to the run folder."""
    command = faults.launcher(machines.address, workers, ROOT / "train_naive_fm.py", run_dir, flags, *options)
    log = Path(cwd, run_dir).with_suffix(".log").open("w")
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)


def finish(process, run_dir, code=0):
    ended = process.wait(SLOW_MACHINE)
    printed = run_dir.with_suffix(".log").read_text()
    assert ended == code, printed[-4000:]
    return printed


def plain(processes, run_dir, flags):
    """The same script without Ray."""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(start if processes > 1 else []), "train_naive_fm.py", *flags]
    command += ["--run-dir", run_dir, "--resume", "auto"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run(list(map(str, command)), timeout=SLOW_MACHINE, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def wait_until(what, process, seconds=SLOW_MACHINE):
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, "the launcher ended early"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def wait_for_step(run_dir, step, process):
    written = run_dir / "metrics.jsonl"
    wait_until(lambda: written.exists() and any(x["step"] >= step for x in lines(run_dir)), process)


def same(one, other, step):
    mine, reference = weights(one, step), weights(other, step)
    assert mine.keys() == reference.keys()
    assert all(mine[key].equal(reference[key]) for key in mine)
    assert lines(one) == lines(other)


@pytest.fixture(scope="module")
def flags(tiny):
    return [*tiny, "--schedule", "constant", "--warmup-steps", 0, "--steps", 20, "--save-every", 5]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """Runs without Ray, by their number of processes."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(processes, steps=20):
        if (processes, steps) not in made:
            own = [*flags, "--steps", steps]
            made[processes, steps] = plain(processes, folder / f"{processes}-{steps}", own)
        return made[processes, steps]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_workers_train_bit_for_bit_what_python_and_torchrun_train(number, machines, flags, alone, tmp_path):
    machines.have(2)
    run = tmp_path / "a run"  # a space in its name
    finish(launch(machines, run, [], flags, workers=number), run)
    same(run, alone(number), 20)
    told = json.loads(next((tmp_path / "a run.ray").glob("checkpoint_*/checkpoint.json")).read_text())
    assert told["checkpoint"] == str(find(run))
    # finished: nothing is trained again; also with a relative path
    before = (run / "metrics.jsonl").read_bytes()
    finish(launch(machines, "a run", [], flags, workers=number, cwd=tmp_path), run)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["script", "actor", "machine"])
def test_what_is_killed_goes_on_by_itself_to_the_same_end(what, machines, flags, alone, tmp_path):
    machines.have(2)
    run, steps = tmp_path / "run", 300  # enough that it has not ended before Ray misses a machine
    process = launch(machines, run, [], [*flags, "--steps", steps, "--save-every", 20], workers=2)
    wait_for_step(run, 30, process)
    had = scripts_of(run)
    parents = {script: parent(script) for script in had}
    assert len(had) == 2
    if what == "machine":
        machines.have(1)
    else:
        os.kill(had[1] if what == "script" else parent(had[1]), signal.SIGKILL)
    time.sleep(2)
    assert not orphans(parents)
    wait_until(lambda: not set(scripts_of(run)) & set(had), process, 60)
    machines.have(2)
    printed = finish(process, run)
    assert "starting again from the newest checkpoint (failure 1)" in printed
    same(run, alone(2, steps), steps)


@pytest.mark.slow
def test_a_script_ends_with_its_actor_at_once(machines, flags, tmp_path):
    machines.have(1)
    run = tmp_path / "run"
    process = launch(machines, run, ["--max-failures", 0], [*flags, "--steps", 100_000])
    wait_for_step(run, 2, process)
    (script,) = scripts_of(run)
    os.kill(parent(script), signal.SIGKILL)
    time.sleep(2)
    assert scripts_of(run) == []
    assert "failure 1 of 0 allowed" in finish(process, run, EXIT_HUNG)


@pytest.mark.slow
def test_a_group_grows_and_shrinks_with_the_cluster_and_a_step_keeps_its_samples(machines, flags, tmp_path):
    machines.have(1)
    machines.settle()  # else the group would be made for two, and wait for the second
    run = tmp_path / "run"
    options = ["--global-batch", 4, "--resize-every", 5]
    process = launch(machines, run, options, [*flags, "--steps", 100_000], workers="1-2")
    worlds = lambda: json.loads((run / "config.json").read_text())["processes"]  # noqa: E731
    wait_for_step(run, 6, process)
    assert worlds() == 1
    machines.have(2)
    wait_until(lambda: worlds() == 2, process)
    wait_for_step(run, max(row["step"] for row in lines(run)) + 10, process)
    machines.have(1)
    wait_until(lambda: worlds() == 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process, run, EXIT_STOPPED)
    state = json.loads((find(run) / "state" / "trainer.json").read_text())
    assert state["samples"] == 4 * state["step"]


def drain(machines):
    """Tell Ray that the newest machine will be taken away."""
    ray_command = Path(sys.executable).with_name("ray")
    told = ["--address", machines.address, "--node-id", machines.nodes[-1].node_id]
    told += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
    command = [ray_command, "drain-node", *told, "--deadline-remaining-seconds", "600"]
    subprocess.run(command, env=ENVIRONMENT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signal", "drained"])
def test_a_launcher_that_is_stopped_leaves_a_checkpoint_of_that_step(how, machines, flags, tmp_path):
    machines.have(2)
    run = tmp_path / "run"
    endless = [*flags, "--steps", 100_000, "--save-every", 9999]
    process = launch(machines, run, [], endless, workers=2)
    wait_for_step(run, 3, process)
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        drain(machines)
    printed = finish(process, run, EXIT_STOPPED)
    if how == "drained":
        machines.have(1)
    last = max(row["step"] for row in lines(run))
    assert find(run).name == f"step_{last:07d}"
    assert "stopped after step" in printed
    assert scripts_of(run) == []


@pytest.mark.slow
def test_what_a_user_can_put_right_ends_with_1_and_is_tried_once(machines, flags, tmp_path):
    machines.have(1)
    run = tmp_path / "run"
    printed = finish(launch(machines, run, [], [*flags, "--max-delay", 4]), run, 1)
    assert printed.count("error: ") == 1
    assert "starting again" not in printed


@pytest.mark.slow
def test_a_trainer_of_ones_own_runs_the_script_in_its_worker(machines, flags, alone, tmp_path):
    from ray.train.torch import TorchTrainer

    machines.have(1)
    ray.init(machines.cluster.address, ignore_reinit_error=True)
    run = tmp_path / "run"
    told = {"script": str(ROOT / "train_naive_fm.py"), "flags": [*flags, "--run-dir", str(run)]}
    storage = RunConfig(storage_path=str(tmp_path / "ray"), checkpoint_config=CheckpointConfig())
    TorchTrainer(
        launch_ray.train_func,
        train_loop_config=told,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=storage,
    ).fit()
    same(run, alone(1), 20)
