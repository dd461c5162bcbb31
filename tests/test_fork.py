"""A fork is a copy of a script with a few changed lines: everything around it works unchanged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGES = {
    "    camera_dropout: Share = 0.15\n": (
        "    tilt: PositiveFloat = 2.0\n"
        '    """How much more a velocity that is too small costs than one that is too large."""\n'
        "    camera_dropout: Share = 0.15\n"
    ),
    "    loss = losses.masked_mse(velocity_pred, velocity, ~is_pad & flow.to_predict(t), count)\n": (
        "    short = (velocity_pred.abs() < velocity.abs()).float()\n"
        "    velocity_pred = velocity + (velocity_pred - velocity) * (1 + short * (config.tilt - 1))\n"
        "    loss = losses.masked_l1(velocity_pred, velocity, ~is_pad & flow.to_predict(t), count)\n"
    ),
}
PROGRAM = """
import json, sys
import evaluate, train_tilted
from accelerate.state import AcceleratorState, GradientState
from common.config import parse
from common.errors import UserError
from common.inference import load_policy

def attempt(*flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        train_tilted.main(parse(train_tilted.Config, flags, "train_tilted.py"))
    except UserError as error:
        return str(error)

tiny = sys.argv[1:]
said = [attempt(*tiny, "--run-dir", "run", "--steps", "2", "--tilt", "0")]
said += [attempt(*tiny, "--run-dir", "run", "--steps", "2", "--tilt", "3")]
said += [attempt("--resume", "run", "--steps", "4", "--tilt", "4")]
said += [attempt("--resume", "run", "--steps", "4")]
evaluate.main(parse(evaluate.Config, ["run", "--sample-steps", "2"], "evaluate.py"))
policy = load_policy("run")
print(json.dumps([said, policy.config.tilt, policy.trained_steps, policy.script.__file__]))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project with a fork of train_vfp.py."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "evaluate.py", root)
    text = (ROOT / "train_vfp.py").read_text()
    for before, after in CHANGES.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (root / "train_tilted.py").write_text(text)
    return root


def test_a_fork_trains_resumes_evaluates_and_loads(project, tiny):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *tiny],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, tilt, steps, script = json.loads(done.stdout.splitlines()[-1])
    assert said[0] == "--tilt is 0.0: it should be greater than 0."
    assert said[1] is said[3] is None
    assert said[2].startswith("--tilt was 3.0 when run began and cannot become 4.0")
    assert (tilt, steps) == (3.0, 4)
    assert Path(script) == project / "train_tilted.py"
    rows = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert (project / "run" / "evaluation" / "results.json").is_file()
