import json
import os
import re
import subprocess
import sys
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from pydantic import PositiveFloat, PositiveInt

from common import config as c
from common.config import MayChange, options
from common.errors import UserError
from train_vfp import Config as VfpConfig

ROOT = Path(__file__).parents[1]


@options
class Optim:
    lr: MayChange[float] = 0.1
    steps: MayChange[PositiveInt | None] = None
    epochs: MayChange[PositiveFloat | None] = None


@options
class Config:
    """A script's configuration."""

    optim: c.Flat[Optim] = field(default_factory=Optim)
    run: c.Flat[c.RunConfig] = field(default_factory=c.RunConfig)
    horizon: int = 16
    kind: Literal["a", "b"] = "a"
    beta: tuple[float, float] = (1.0, 1.5)
    names: tuple[str, ...] = ()


def parse(*argv):
    return c.parse(Config, argv, "train_x.py")


def write_run(folder, config, script="train_x.py", checkpoint=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"script": script, "config": c.to_dict(config)}))
    if checkpoint:
        (folder / "checkpoints" / "step_0000010").mkdir(parents=True)
        (folder / "checkpoints" / "step_0000010" / "checksums.json").write_text("{}")
    return folder


def test_options_of_groups_are_flat_flags():
    config = parse(
        "--lr",
        "0.5",
        "--horizon",
        "8",
        "--names",
        "x=1",
        "y=2",
        "--kind",
        "b",
        "--beta",
        "2",
        "3",
        "--compile",
    )
    assert config.optim.lr == 0.5
    assert (config.horizon, config.kind, config.beta) == (8, "b", (2.0, 3.0))
    assert config.names == ("x=1", "y=2")
    assert config.run.compile
    assert parse("--log_every", "7").run.log_every == 7  # underscores also work


@pytest.mark.parametrize("argv", [("--lr", "fast"), ("--no-such-flag", "1"), ("--kind", "c")])
def test_bad_flags_exit_with_2(argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2


def test_a_configuration_survives_json():
    config = replace(VfpConfig(), horizon=7, time_beta=(2.0, 1.0))
    config = replace(config, run=replace(config.run, run_dir=Path("a/b"), freeze=("x", "y")))
    assert c.from_dict(VfpConfig, json.loads(json.dumps(c.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"horizons": 3}, "no option 'horizons': remove it"),
        ({"horizon": "long"}, "--horizon is long: it should be a valid integer"),
        ({"horizon": "3"}, "--horizon"),
        ({"horizon": True}, "--horizon"),
        ({"kind": "c"}, "--kind is c: it should be 'a' or 'b'"),
        ({"beta": [1.0]}, "--beta"),
        ({"optim": {"lr": None}}, "--lr"),
        ({"optim": 3}, "--optim is 3"),
        ({"names": "x"}, "--names is x: it should be a valid array"),
        ({"optim": {"steps": 1.5}}, "--steps is 1.5: it should be a valid integer"),
        ({"optim": {"steps": 0}}, "--steps is 0: it should be greater than 0"),
    ],
)
def test_configurations_that_do_not_fit_are_named(values, words):
    with pytest.raises(UserError, match=words):
        c.from_dict(Config, values)


def test_flags_win_over_a_file_and_a_file_over_defaults(tmp_path):
    file = tmp_path / "exp.json"
    file.write_text(json.dumps({"script": "train_x.py", "config": {"optim": {"lr": 0.3}, "horizon": 4}}))
    config = parse("--config", str(file), "--horizon", "5")
    assert (config.optim.lr, config.horizon, config.kind) == (0.3, 5, "a")
    file.write_text(json.dumps({"script": "train_y.py", "config": {}}))
    with pytest.raises(UserError, match=r"train_y\.py"):
        parse("--config", str(file))
    file.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        parse("--config", str(file))


def test_flags_may_fit_the_options_of_a_file_but_not_the_defaults(tmp_path):
    values = {"data": {"dataset": ["a", "b"]}, "rollout": {"simulator": {"env": "demo"}}}
    (tmp_path / "exp.json").write_text(json.dumps(values))
    argv = ["--config", str(tmp_path / "exp.json"), "--weights", "1", "3", "--rollout-every", "100"]
    config = c.parse(VfpConfig, argv, "train_vfp.py")
    assert (config.data.weights, config.rollout.rollout_every) == ((1.0, 3.0), 100)


def test_resuming_restores_everything_and_flags_override(tmp_path):
    saved = replace(parse("--lr", "0.7", "--horizon", "3"), names=("k",))
    run = write_run(tmp_path / "run", saved)
    config = parse("--resume", str(run))
    assert (config.optim.lr, config.horizon, config.names) == (0.7, 3, ("k",))
    assert config.run.run_dir == run
    assert config.run.resume == str(run)
    assert parse("--resume", str(run), "--lr", "0.2", "--steps", "50").optim == Optim(0.2, 50)
    with pytest.raises(UserError, match="--horizon was 3"):
        parse("--resume", str(run), "--horizon", "4")


def test_options_that_are_newer_than_a_run_are_said_when_it_resumes(tmp_path, capsys):
    run = write_run(tmp_path / "run", parse("--horizon", "3"))
    parse("--resume", str(run))
    assert "warning" not in capsys.readouterr().out
    about = json.loads((run / "config.json").read_text())
    del about["config"]["horizon"]
    (run / "config.json").write_text(json.dumps(about))
    config = parse("--resume", str(run))
    said = f"warning: an earlier version began {run}; from here on it also has --horizon {config.horizon}\n"
    assert capsys.readouterr().out == said


def test_resuming_needs_a_run_with_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        parse("--resume", str(tmp_path / "absent"))
    run = write_run(tmp_path / "early", parse(), checkpoint=False)
    with pytest.raises(UserError, match="no checkpoint"):
        parse("--resume", str(run))


def test_auto_resume_continues_or_starts(tmp_path):
    run = tmp_path / "run"
    assert parse("--resume", "auto", "--run-dir", str(run)).run.resume is None
    write_run(run, parse("--lr", "0.7"), checkpoint=False)
    assert parse("--resume", "auto", "--run-dir", str(run)).run.resume is None
    (run / "checkpoints" / "step_0000010").mkdir(parents=True)
    (run / "checkpoints" / "step_0000010" / "checksums.json").write_text("{}")
    config = parse("--resume", "auto", "--run-dir", str(run))
    assert config.run.resume == str(run)
    assert config.optim.lr == 0.7
    with pytest.raises(UserError, match="--run-dir"):
        parse("--resume", "auto")


def test_a_new_run_never_goes_into_a_folder_in_use(tmp_path):
    run = write_run(tmp_path / "run", parse())
    with pytest.raises(UserError, match=f"--resume {run}"):
        parse("--run-dir", str(run))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        parse("--run-dir", str(tmp_path / "thesis"))
    (tmp_path / "empty").mkdir()
    assert parse("--run-dir", str(tmp_path / "empty")).run.run_dir == tmp_path / "empty"


def test_only_auto_restarts_a_run_that_died_before_its_first_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", parse(), checkpoint=False)
    (run / "wandb").mkdir()  # other files that may be there
    with pytest.raises(UserError, match="not empty"):
        parse("--run-dir", str(run))
    assert parse("--run-dir", str(run), "--resume", "auto").run == replace(c.RunConfig(), run_dir=run)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        parse("--run-dir", str(tmp_path / "thesis"), "--resume", "auto")


def test_a_new_run_from_the_file_of_another_does_not_go_into_its_folder(tmp_path):
    run = write_run(tmp_path / "run", parse("--run-dir", str(tmp_path / "run"), "--lr", "0.3"))
    config = parse("--config", str(run / "config.json"))
    assert config.optim.lr == 0.3
    assert config.run == replace(c.RunConfig(), config=run / "config.json")


def test_a_new_run_from_the_file_of_another_does_not_push_to_its_place(tmp_path):
    run = write_run(tmp_path / "run", parse("--push-to-hub", "me/first", "--lr", "0.3"))
    file = str(run / "config.json")
    assert parse("--config", file).run.push_to_hub is None
    assert parse("--config", file, "--push-to-hub", "me/second").run.push_to_hub == "me/second"
    assert parse("--resume", str(run)).run.push_to_hub == "me/first"


def test_steps_and_epochs_of_file_and_flags_do_not_add_up(tmp_path):
    run = write_run(tmp_path / "run", parse("--steps", "500"))
    assert parse("--resume", str(run), "--epochs", "3").optim == Optim(steps=None, epochs=3.0)
    assert parse("--resume", str(run), "--lr", "1").optim == Optim(lr=1.0, steps=500)
    assert parse("--config", str(run / "config.json"), "--epochs=3").optim == Optim(steps=None, epochs=3.0)
    run = write_run(tmp_path / "other", parse("--epochs", "3"))
    assert parse("--resume", str(run), "--steps", "9").optim == Optim(steps=9, epochs=None)


def test_resuming_refuses_what_it_would_have_to_ignore(tmp_path):
    run = write_run(tmp_path / "run", parse())
    (tmp_path / "exp.json").write_text("{}")
    for flag, value in (("--config", tmp_path / "exp.json"), ("--run-dir", tmp_path / "other")):
        with pytest.raises(UserError, match=f"leave out {flag}"):
            parse("--resume", str(run), flag, str(value))
    assert parse("--resume", str(run), "--run-dir", str(run)).run.run_dir == run
    with pytest.raises(UserError, match="--init-from was empty"):
        parse("--resume", str(run), "--init-from", "x", "y=z")
    with pytest.raises(UserError, match="cannot become x y=z"):
        parse("--resume", str(run), "--init-from", "x", "y=z")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--run-dir=~/a").run.run_dir == tmp_path / "a"
    run = write_run(tmp_path / "run", parse("--lr", "0.3"))
    assert parse("--config=~/run/config.json").optim.lr == 0.3
    assert parse("--resume", "~/run").run.run_dir == run
    assert parse("--resume=auto", "--run-dir=~/run").run.resume == str(run)


def test_a_number_without_end_survives_json(tmp_path):
    config = c.parse(VfpConfig, ["--grad-clip", "inf"], "train_vfp.py")
    assert c.from_dict(VfpConfig, json.loads(json.dumps(c.to_dict(config), allow_nan=False))) == config


def test_errors_for_people_come_as_one_sentence_and_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "train_vfp.py", "--resume", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --resume")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "rank", "code", "printed"),
    [
        (UserError("Do this."), "0", 1, "error: Do this.\n"),
        (UserError("Do this."), "1", 1, "error in process 1: Do this.\n"),
        (KeyboardInterrupt(), "0", 130, ""),
    ],
)
def test_exit_codes(error, rank, code, printed, monkeypatch, capsys):
    def main(config):
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(c.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        c.cli(main, Config, [])
    assert stop.value.code == code
    assert capsys.readouterr().err == printed


@options
class Evaluation:
    """The configuration of a script that makes no runs."""

    run: Annotated[c.UserPath, tyro.conf.Positional]
    episodes: int = 200


def test_a_script_without_runs_takes_a_position_and_flags():
    seen = []
    c.cli(seen.append, Evaluation, ["~/run", "--episodes", "3"])
    assert seen == [Evaluation(Path.home() / "run", 3)]


def test_help_needs_neither_lerobot_nor_wandb_nor_torchvision():
    code = (
        "import sys, runpy; sys.argv = ['train_vfp.py', '--help']\n"
        "try: runpy.run_path('train_vfp.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'lerobot', 'wandb', 'torchvision', 'transformers', 'matplotlib', 'pandas', 'av'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for group in ("options", "data options", "vision options", "optim options", "run options"):
        assert f"╭─ {group} ─" in text
    flags = re.findall(r"^│ (--[a-z0-9-]+)", text, re.MULTILINE)
    assert "--camera-dropout" in flags
    assert len(flags) == len(set(flags)) == len(c.flat_options(VfpConfig()))
    assert "default: None" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sample-steps 0", "--sample-steps is 0: it should be greater than 0"),
        ("--log-every 0", "--log-every"),
        ("--flow-samples -1", "--flow-samples"),
        ("--camera-dropout 1.5", "--camera-dropout is 1.5: it should be less than or equal to 1"),
        ("--ema-decay -0.1", "--ema-decay"),
        ("--time-beta 1 0", "--time-beta"),
        ("--keep 0", "--keep"),
        ("--lr -1", "--lr is -1.0: it should be greater than or equal to 0"),
        ("--lr nan", "--lr is nan: it should be"),
        ("--lr inf", "--lr is inf: it should be a finite number"),
        ("--grad-clip 0", "--grad-clip is 0.0: it should be greater than 0"),
        ("--grad-clip nan", "--grad-clip is nan"),
        ("--beta2 1.5", "--beta2"),
        ("--warmup-steps -3", "--warmup-steps"),
        ("--aug-blur -1", "--aug-blur"),
        ("--seed -1", "--seed"),
    ],
)
def test_numbers_that_could_only_fail_later_are_refused_at_once(flags, words):
    with pytest.raises(UserError, match=words):
        c.parse(VfpConfig, flags.split(), "train_vfp.py")
