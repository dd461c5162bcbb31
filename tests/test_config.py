import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from common import config as c
from common.errors import UserError
from train_vfp import Config as VfpConfig

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Optim:
    lr: float = 0.1
    steps: int | None = None


@dataclass(frozen=True)
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
    c.write_run_config(folder, script, config, {"fingerprint": "f"})
    if checkpoint:
        (folder / "checkpoints" / "step_0000010").mkdir(parents=True)
    return folder


def test_options_of_groups_are_flat_flags():
    config = parse("--lr", "0.5", "--horizon", "8", "--names", "x=1", "y=2", "--kind", "b", "--beta", "2", "3", "--compile")
    assert config.optim.lr == 0.5
    assert (config.horizon, config.kind, config.beta) == (8, "b", (2.0, 3.0))
    assert config.names == ("x=1", "y=2")
    assert config.run.compile
    assert parse("--log_every", "7").run.log_every == 7  # underscores work too


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
        ({"horizons": 3}, "horizons"),
        ({"horizon": "long"}, "horizon cannot be 'long'"),
        ({"horizon": True}, "horizon"),
        ({"kind": "c"}, "kind"),
        ({"beta": [1.0]}, "beta"),
        ({"optim": {"lr": None}}, "lr"),
        ({"optim": 3}, "optim"),
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


def test_the_run_configuration_records_what_repeats_the_run(tmp_path):
    write_run(tmp_path / "run", parse())
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["script"] == "train_x.py"
    assert saved["fingerprint"] == "f"
    assert set(saved["versions"]) >= {"python", "torch", "accelerate", "lerobot"}
    assert c.from_dict(Config, saved["config"]) == parse()


def test_steps_and_epochs():
    assert c.resolve_steps(7, None, 100, 10) == 7
    assert c.resolve_steps(None, 2.5, 100, 10) == 25
    assert c.resolve_steps(None, None, 100, 10) == c.DEFAULT_STEPS
    for steps, epochs in ((5, 1.0), (0, None), (None, 0.01)):
        with pytest.raises(UserError, match="--steps"):
            c.resolve_steps(steps, epochs, 100, 10)


def test_errors_for_people_come_as_one_sentence_and_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "train_vfp.py", "--resume", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --resume")
    assert len(done.stderr.splitlines()) == 1


def test_help_needs_neither_lerobot_nor_wandb_nor_torchvision():
    code = (
        "import sys, runpy; sys.argv = ['train_vfp.py', '--help']\n"
        "try: runpy.run_path('train_vfp.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'lerobot', 'wandb', 'torchvision', 'transformers', 'matplotlib', 'pandas', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--camera-dropout" in done.stdout
