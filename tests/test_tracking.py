"""Metrics: what is averaged, what is written, what a resumed run keeps, the trackers."""

import io
import json
import math
import os
import pty
import select
import socket
import subprocess
import sys
import termios
from dataclasses import field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from common import tracking
from common.config import RunConfig, options, to_dict
from common.errors import UserError
from common.film import side_by_side, write_gif
from common.tracking import Tracker

ROOT = Path(__file__).parents[1]


@options
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    names: tuple[str, ...] = ("a", "b")
    lr: float = 0.1


def config(tracker):
    return Config(run=replace(RunConfig(), tracker=tracker))


def read(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def accelerator(accelerate_reset):
    return Accelerator(cpu=True)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "vfp-1"
    folder.mkdir()
    return folder


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when set."""
    now = [1000.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_holds_means_speed_and_rates(accelerator, run_dir, clock):
    tracker = Tracker(accelerator, run_dir, Config(), total_steps=10, start_step=4, start_samples=400)
    with tracker.waiting():
        clock[0] += 1.0
    for loss in (1.0, 2.0, 6.0):
        tracker.add({"loss": torch.tensor(loss, requires_grad=True), "weight": 2 * loss})
    tracker.count_skipped(torch.tensor(1.0))
    tracker.count_skipped(torch.tensor(0.0))
    clock[0] += 3.0
    tracker.pause_clock()
    clock[0] += 50.0  # an evaluation
    tracker.resume_clock()
    returned, skipped, last = tracker.log(6, 600, {"head": 0.1, "tail": 0.2})
    tracker.log(7, 700, {"head": 0.1})
    tracker.close()

    line, later = read(run_dir)
    assert returned.items() <= line.items()
    assert (skipped, last) == (1, 5)
    assert (line["step"], line["split"], line["loss"], line["weight"]) == (6, "train", 3.0, 6.0)
    assert (line["lr/head"], line["lr/tail"], line["bad_steps"]) == (0.1, 0.2, 1)
    assert line["samples_per_s"] == pytest.approx(200 / 4)
    assert line["steps_per_s"] == pytest.approx(2 / 4)
    assert line["data_wait_share"] == pytest.approx(1 / 4)
    assert line["elapsed_s"] == pytest.approx(54)
    assert line["eta_s"] == pytest.approx(4 * 54 / 2)
    assert 0.05 < line["memory_gb"] < 100
    assert "loss" not in later  # intervals are independent
    assert later["data_wait_share"] == 0


def test_means_are_of_every_micro_batch_and_step_that_had_a_value(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, Config(), 10)
    for losses in ((1.0, 3.0), (5.0, 11.0)):
        for loss in losses:
            tracker.add({"loss": torch.tensor(loss)})
            tracker.add({"part": math.nan if loss == 3 else 2 * loss})
        tracker.add({"norm": loss, **({"window": 7.0} if loss == 11 else {})})
        tracker.flush()
    line, _, _ = tracker.log(2, 2, {})
    tracker.close()
    assert (line["loss"], line["part"], line["norm"], line["window"]) == (5.0, 34 / 3, 7.0, 7.0)


def test_collecting_does_not_wait_for_the_device(accelerator, run_dir, monkeypatch):
    tracker = Tracker(accelerator, run_dir, Config(), 10)

    def refuse(*_):
        raise AssertionError("read a value from the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, refuse)
        for _ in range(3):
            tracker.add({"loss": torch.ones(())})
    assert tracker.log(3, 3, {})[0]["loss"] == 1
    tracker.close()


def test_numbers_that_are_not_finite_are_null_in_strict_json(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, Config(), 10)
    tracker.add({"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(math.inf)})
    tracker.log(1, 1, {})
    tracker.log_validation(1, {"action_mae": math.nan})
    lines = [
        json.loads(text, parse_constant=pytest.fail)
        for text in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    tracker.close()
    assert lines[0]["loss"] is None
    assert lines[0]["grad_norm"] is None
    assert lines[1] == {"step": 1, "split": "val", "action_mae": None}


def test_lines_are_in_the_file_as_soon_as_they_are_logged(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, Config(), 10)
    tracker.log(1, 1, {})
    assert [line["step"] for line in read(run_dir)] == [1]
    tracker.close()


def test_a_resumed_run_has_each_step_once(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, Config(), 6)
    for step in (1, 2, 3, 4):
        tracker.log(step, step, {})
        tracker.log_validation(step, {"loss": step})
    elapsed = read(run_dir)[2]["elapsed_s"]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "tra')  # killed while it wrote

    resumed = Tracker(accelerator, run_dir, Config(), 6, start_step=2, start_samples=2)
    for step in (3, 4, 5, 6):
        resumed.log(step, step, {})
        resumed.log_validation(step, {"loss": step})
    resumed.close()
    lines = read(run_dir)
    steps = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert [line["step"] for line in lines] == steps
    assert [line["split"] for line in lines] == ["train", "val"] * 6
    assert lines[4]["elapsed_s"] > elapsed  # elapsed time continues across the resume

    Tracker(accelerator, run_dir, Config(), 6).close()  # a new run in the same folder
    assert read(run_dir) == []


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"\xff\xfe{", b"17\n", b"[]\n", b'{"loss": 1}\n', b"\n"])
def test_damage_at_the_end_of_the_metrics_is_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "split": "train", "loss": 2.0}\n' + damage)
    kept = tracking.keep_lines_up_to(path, 3)
    assert kept == read(tmp_path) == [{"step": 1, "split": "train", "loss": 2.0}]
    assert sorted(tmp_path.iterdir()) == [path]


def test_without_a_terminal_each_interval_is_a_plain_line(accelerator, run_dir, capsys):
    tracker = Tracker(accelerator, run_dir, Config(), 100)
    tracker.add({"loss": 0.25})
    tracker.log(50, 50, {"head": 1e-3, "tail": 1e-4})
    tracker.close()
    printed = capsys.readouterr()
    assert printed.out.startswith("step 50/100  loss 0.2500  lr 1.0e-03  ")
    assert printed.err == ""


def test_the_newest_success_is_shown_and_a_resumed_run_knows_it(accelerator, run_dir, capsys):
    tracker = Tracker(accelerator, run_dir, Config(), 100)
    for step, success in ((10, 0.25), (20, 0.45)):
        tracker.log_validation(step, {"rollout/success": success, "rollout/steps": 30.0})
    tracker.log_validation(20, {"loss": 1.0})
    tracker.log(20, 20, {"head": 1e-3})
    tracker.close()
    assert "step 20/100  loss nan  success 45 %  lr 1.0e-03  " in capsys.readouterr().out
    resumed = Tracker(accelerator, run_dir, Config(), 100, start_step=10, start_samples=10)
    resumed.log(11, 11, {"head": 1e-3})
    resumed.close()
    assert "step 11/100  loss nan  success 25 %  lr 1.0e-03  " in capsys.readouterr().out


def test_a_terminal_has_one_line_that_fits_it(accelerator, run_dir, monkeypatch, capsys):
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        tracker = Tracker(accelerator, run_dir, Config(), 120_000, start_step=60_000)
        tracker.log_validation(60_001, {"rollout/success": 0.45})
        tracker.count_skipped(torch.tensor(0.0))
        tracker.add({"loss": 0.25})
        tracker.log(60_001, 60_001, {"head": 1e-3})
        tracker.close()
        shown = b""
        while select.select([controller], [], [], 0)[0]:
            shown += os.read(controller, 65536)
    os.close(controller)
    shown = shown.decode()
    last = shown.rstrip("\r\n").rpartition("\r")[2]
    assert len(last) <= 80
    assert shown.count("\n") == 1  # only at the end
    for text in ("60001/120000 |", " left, ", "it/s, ", "loss 0.2500", "success 45 %", "lr 1.0e-03"):
        assert text in last, shown
    assert "loss 0.25" not in capsys.readouterr().out


def test_other_processes_show_nothing(accelerator, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    tracker = Tracker(accelerator, run_dir, Config(), 100)
    tracker.count_skipped(torch.tensor(1.0))
    tracker.log(1, 1, {"head": 1e-3})
    tracker.log_validation(1, {"rollout/success": 0.45})
    tracker.close()
    assert capsys.readouterr() == ("", "")
    assert list(run_dir.iterdir()) == []


@pytest.mark.real("drawing")
def test_curves_are_drawn_and_redrawn(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, Config(), 4)
    for step in (1, 2):
        tracker.add({"loss": 1 / step, "grad_norm": 1.0, "grad_norm/head": 2.0})
        tracker.log(step, step, {"head": 0.1})
    tracker.log_validation(2, {"loss": 0.7, "action_mae": math.nan})
    with Image.open(run_dir / "curves.png") as picture:
        assert picture.size == (1200, 1050)
        before = picture.tobytes()
    tracker.add({"loss": 0.01})
    tracker.log(4, 4, {"head": 0.0})
    tracker.close()
    with Image.open(run_dir / "curves.png") as picture:
        assert picture.tobytes() != before
    assert sorted(path.name for path in run_dir.iterdir()) == ["curves.png", "metrics.jsonl"]


def tensorboard_points(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)], events


def test_tensorboard_gets_everything_once(accelerator, run_dir):
    tracker = Tracker(accelerator, run_dir, config("tensorboard"), 6)
    for step in (1, 2, 3, 4):
        tracker.add({"loss": float(step)})
        tracker.log(step, step, {})
    tracker.log_validation(4, {"loss": 9.0})
    tracker.close()
    resumed = Accelerator(cpu=True)
    tracker = Tracker(resumed, run_dir, config("tensorboard"), 6, start_step=2, start_samples=2)
    for step in (3, 4, 5, 6):
        tracker.add({"loss": float(step)})
        tracker.log(step, step, {})
    tracker.close()
    points, events = tensorboard_points(run_dir, "train/loss")
    assert points == [(step, float(step)) for step in (1, 2, 3, 4, 5, 6)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == to_dict(config("tensorboard"))  # still nested


@pytest.fixture
def draw(run_dir):
    """Draws a picture and a film into the run folder; their content depends on a number."""

    def draw(number):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(run_dir / "curves.png")
        films = [[np.full((8, 8, 3), shade, np.uint8) for shade in (number, 255 - number)]]
        write_gif(run_dir / "rollouts.gif", side_by_side(films, [True], linger=1), 20)
        return [(run_dir / name).read_bytes() for name in ("curves.png", "rollouts.gif")]

    return draw


def test_tensorboard_gets_the_pictures_of_every_evaluation_once(accelerator, run_dir, draw):
    first = Tracker(accelerator, run_dir, config("tensorboard"), 6)
    for step in (2, 4):
        first.log_validation(step, {"rollout/success": 0.5})
        draw(10 * step)
        first.resume_clock()  # training goes on
        first.resume_clock()
    first.close()
    resumed = Tracker(Accelerator(cpu=True), run_dir, config("tensorboard"), 6, 2, 2)
    resumed.resume_clock()
    resumed.log(4, 4, {})
    resumed.log_validation(4, {"rollout/success": 0.5})
    png, gif = draw(90)
    resumed.resume_clock()
    resumed.close()
    points, events = tensorboard_points(run_dir, "val/rollout/success")
    assert points == [(2, 0.5), (4, 0.5)]
    for name, content in (("media/curves", png), ("media/rollouts", gif)):
        images = events.Images(name)
        assert [image.step for image in images] == [2, 4]
        assert images[1].encoded_image_string == content
        assert images[0].encoded_image_string[:3] == content[:3]
    with Image.open(io.BytesIO(gif)) as film:
        assert (film.n_frames, film.size) == (3, (64, 16))
        assert (events.Images("media/rollouts")[1].width, events.Images("media/curves")[1].height) == (64, 4)


class Service(GeneralTracker):
    """A tracker like Accelerate's for wandb, without its server."""

    name, requires_logging_directory = "wandb", False

    def __init__(self, broken=False):
        self.broken, self.logged, self.finished = broken, [], False

    tracker = None

    def log(self, values, step=None):
        if self.broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        self.logged += [(step, name, value) for name, value in values.items()]

    def finish(self):
        self.finished = True
        if self.broken:
            raise RuntimeError("the service is gone")


def test_wandb_gets_pictures_and_films_as_what_they_are(accelerator, run_dir, draw):
    import wandb

    accelerator.trackers = [service := Service()]
    draw(1)  # resumed run: nothing new
    tracker = Tracker(accelerator, run_dir, Config(), 6)
    tracker.resume_clock()
    tracker.log(2, 2, {})
    draw(2)
    tracker.resume_clock()  # not evaluated
    assert {name.split("/")[0] for _, name, _ in service.logged} == {"train"}
    tracker.log_validation(2, {"rollout/success": 0.5})
    tracker.resume_clock()
    sent = [(step, name, type(value)) for step, name, value in service.logged if name.startswith("media/")]
    assert sent == [(2, "media/curves", wandb.Image), (2, "media/rollouts", wandb.Video)]
    (run_dir / "alternatives.png").write_bytes((run_dir / "curves.png").read_bytes())
    tracker.close()
    assert service.logged[-1][:2] == (2, "media/alternatives")
    assert service.finished


def test_a_tracker_that_breaks_is_told_once_and_ends_nothing(accelerator, run_dir, draw, capsys):
    accelerator.trackers = [service := Service(broken=True)]
    tracker = Tracker(accelerator, run_dir, Config(), 6)
    for step in (1, 2):
        tracker.log(step, step, {})
    tracker.log_validation(2, {"loss": 1.0})
    draw(1)
    tracker.resume_clock()
    tracker.close()
    assert capsys.readouterr().out.count("warning: the tracker cannot write (Connection reset by peer)") == 1
    assert service.finished
    assert [line["step"] for line in read(run_dir)] == [1, 2, 2]


WANDB = """
import sys
from dataclasses import replace
from pathlib import Path
from accelerate import Accelerator
sys.path.insert(0, "tests")
from test_tracking import Tracker, config
run_dir = Path(sys.argv[1])
for start in (0, 1):
    tracker = Tracker(Accelerator(cpu=True), run_dir, config("wandb"), 2, start, start)
    print(f"id {tracker.accelerator.get_tracker('wandb', unwrap=True).id}")
    tracker.add({"loss": 1.0})
    tracker.log(start + 1, start + 1, {})
    tracker.close()
print("done")
"""


@pytest.mark.slow
def test_wandb_without_a_login_stays_offline_and_never_asks(run_dir, tmp_path):
    """On a terminal, where wandb would ask for a key by default."""
    left_out = ("WANDB_", "NETRC")
    env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    env |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WANDB, str(run_dir)],
        cwd=ROOT,
        env=env,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    text = b""
    while select.select([controller], [], [], 90)[0]:  # silent for so long: it is waiting for an answer
        try:
            text += os.read(controller, 65536)
        except OSError:  # closed by the other side
            break
    os.close(controller)
    text = text.decode()
    assert process.wait(timeout=60) == 0, text
    assert "done" in text
    ids = [line.split()[1] for line in text.splitlines() if line.startswith("id ")]
    assert ids[0] == ids[1]  # the resumed run is the same run
    assert len([line for line in text.splitlines() if "offline" in line]) == 2, text  # one line per start
    assert "wandb: Tracking" not in text
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2
    assert not (tmp_path / ".netrc").exists()


OFFLINE_RUN = """
import os, signal, subprocess, sys
from pathlib import Path
from accelerate import Accelerator
from PIL import Image
sys.path.insert(0, "tests")
from test_tracking import Tracker, config
run_dir, how = Path(sys.argv[1]), sys.argv[2]
for start, end in ((0, 3), (2, 4)):
    tracker = Tracker(Accelerator(cpu=True), run_dir, config("wandb"), 4, start, start)
    for step in range(start + 1, end + 1):
        tracker.add({"loss": float(step)})
        tracker.log(step, step, {})
    Image.new("RGB", (6, 4), (end, 0, 0)).save(run_dir / "alternatives.png")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (end, 255)]
    frames[0].save(run_dir / "rollouts.gif", save_all=True, append_images=frames[1:])
    tracker.log_validation(end, {"rollout/success": 0.5})
    if how == "killed":
        command = ["pgrep", "-P", str(os.getpid()), "wandb-core"]
        os.kill(int(subprocess.run(command, capture_output=True).stdout.split()[0]), signal.SIGKILL)
        tracker.close()
        break
    tracker.resume_clock()
    (run_dir / "alternatives.png").unlink()  # wandb has a copy
    tracker.close()
print("done")
"""


def offline_run(run_dir, how):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    env |= {"HOME": str(run_dir.parent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE_RUN, str(run_dir), how]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
    return done.stdout


def wandb_records(path):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        yield record


def nested(items):
    found = {}
    for item in items:
        *above, last = item.nested_key or [item.key]
        place = found
        for part in above:
            place = place.setdefault(part, {})
        place[last] = json.loads(item.value_json)
    return found


@pytest.mark.slow
def test_a_run_and_its_resume_are_one_wandb_run_with_its_configuration_and_pictures(run_dir):
    offline_run(run_dir, "resumed")
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    for part, steps, number in zip(parts, ([1, 2, 3], [3, 4]), (3, 4), strict=True):
        records = list(wandb_records(next(part.glob("*.wandb"))))
        run = next(record.run for record in records if record.HasField("run"))
        assert run.run_id == (run_dir / "wandb" / "id").read_text()
        updates = [x for record in records if record.HasField("config") for x in record.config.update]
        told = nested([*run.config.update, *updates])
        assert to_dict(config("wandb")).items() <= told.items()
        assert told["run"]["tracker"] == "wandb"
        history = [nested(record.history.item) for record in records if record.HasField("history")]
        losses = {line["_step"]: line["train/loss"] for line in history if "train/loss" in line}
        assert losses == {step: step for step in steps}
        shown = {name: x for line in history for name, x in line.items() if name.startswith("media/")}
        kinds = {name: x["_type"] for name, x in shown.items()}
        pictures = dict.fromkeys(("media/alternatives", "media/curves"), "image-file")
        assert kinds == {**pictures, "media/rollouts": "video-file"}
        with Image.open(part / "files" / shown["media/alternatives"]["path"]) as picture:
            assert picture.getpixel((0, 0)) == (number, 0, 0)
        with Image.open(part / "files" / shown["media/rollouts"]["path"]) as film:
            assert film.n_frames == 2


@pytest.mark.slow
def test_a_wandb_service_that_is_killed_ends_no_run(run_dir):
    printed = offline_run(run_dir, "killed")
    assert printed.count("warning: the tracker cannot write (Connection ") == 1  # lost, or reset
    assert [line["step"] for line in read(run_dir)] == [1, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["silent", "refused"])
def test_wandb_whose_server_does_not_answer_stays_offline(how, run_dir, tmp_path):
    """With a key, so that wandb tries to connect."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    env |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_API_KEY": "k" * 40}
    shorter = "from common import tracking\ntracking.SERVICE_SECONDS = 5.0\n"
    program = WANDB.replace("for start in", f"{shorter}for start in")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if how == "silent":
            server.listen(100)  # accepts connections but never reads
        env["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", program, str(run_dir)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "no answer from the server for 5 s" in line]
    assert len(told) == 2  # one line per start
    assert f"wandb sync --append {run_dir}/wandb/offline-run-*" in told[0]
    assert done.stdout.endswith("done\n")
    assert [line["step"] for line in read(run_dir)] == [1, 2]
    runs = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(file.stat().st_size > 100 for run in runs for file in run.glob("*.wandb"))


@pytest.mark.parametrize(
    ("environment", "files", "may"),
    [
        ({}, {}, False),
        ({"WANDB_API_KEY": "k" * 40}, {}, True),
        ({"WANDB_MODE": "offline"}, {}, True),
        ({}, {".netrc": "machine api.wandb.ai login user password " + "k" * 40}, True),
        ({}, {".netrc": "machine example.org login user password x"}, False),
        ({}, {".netrc": "not a netrc file"}, False),
        (
            {"WANDB_BASE_URL": "http://example.org"},
            {".netrc": "machine example.org login u password " + "x" * 40},
            True,
        ),
    ],
)
def test_a_wandb_login_is_recognised(monkeypatch, tmp_path, environment, files, may):
    import wandb

    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    wandb.teardown()
    options = tracking._wandb_options(tmp_path, 0)
    assert (options.get("mode") != "offline") is may
    assert ("finish_timeout" in options["settings"]) is may
    wandb.teardown()


def test_a_tracker_whose_package_does_not_import_says_so(accelerator, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--tracker wandb does not start \(.*wandb.*\): use --tracker none"):
        Tracker(accelerator, run_dir, config("wandb"), 1)
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_tracker_that_does_not_start_says_why(accelerator, run_dir, monkeypatch):
    monkeypatch.setattr(accelerator, "init_trackers", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"tensorboard does not start.*division"):
        Tracker(accelerator, run_dir, config("tensorboard"), 1)
