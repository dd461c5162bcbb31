"""Policies pushed to the hub and loaded from it; the hub is a local stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, hub
from safetensors.numpy import save

from common.config import parse
from common.errors import UserError

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
import numpy as np, torch
import train_mi, train_naive_fm
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState
from common.config import parse
from common.errors import UserError
from common.inference import load_policy
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot_policy_flow import export

tiny = sys.argv[1:]
said = {}

def attempt(name, action):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        said[name] = action()
    except UserError as error:
        said[name] = str(error)

def train(*flags, script=train_naive_fm):
    script.main(parse(script.Config, [*tiny, *flags], Path(script.__file__).name))

def weights(policy):
    return {key: x.double().sum().item() for key, x in policy.model.state_dict().items()}

def in_lerobot(name):
    config = PreTrainedConfig.from_pretrained(name)
    config.pretrained_path = Path(name)
    policy = get_policy_class("flow").from_pretrained(Path(name), config=config)
    pre, post = make_pre_post_processors(config, name, preprocessor_overrides={})
    torch.manual_seed(0)
    policy.reset()
    own.reset(policy._seed)  # the run's policy has the seed 0, and episode n the seed n
    batch = {"observation.state": torch.from_numpy(observation["state"])[None]}
    for key, camera in config.cameras.items():
        batch[key] = torch.from_numpy(images[camera]).permute(2, 0, 1)[None].float() / 255
    return post(policy.predict_action_chunk(pre(batch)))[0].numpy()

attempt("push", lambda: train("--run-dir", "run", "--steps", "2", "--push-to-hub", "me/towel"))
policy = load_policy("me/towel", device="cpu", seed=0)
rng = np.random.default_rng(0)
images = {camera: rng.integers(0, 255, (32, 32, 3), np.uint8) for camera in policy.spec.cameras}
observation = {"images": images, "state": np.zeros(3, np.float32)}
own = load_policy("run", device="cpu", seed=0)
said["equal"] = bool(np.array_equal(policy.act(observation), own.act(observation)))
said["in lerobot"] = bool(np.array_equal(in_lerobot("me/towel"), own.act(observation)))
flags = ("--run-dir", "second", "--steps", "1", "--lr", "1e-30", "--freeze", "backbone")
attempt("init", lambda: train(*flags, "--init-from", "me/towel"))
first, second = weights(own), weights(load_policy("second"))
said["taken"] = max(abs(first[key] - second[key]) for key in first)
attempt("again", lambda: export.main(parse(export.Config, ["run", "out", "--hub", "me/towel"], "export.py")))
attempt("one", lambda: train("--run-dir", "x1", "--steps", "1", "--init-from", "backbone=me/towel"))
attempt("none", lambda: train("--run-dir", "x2", "--steps", "1", "--init-from", "wings=me/towel"))
attempt("absent", lambda: load_policy("me/absent"))
attempt("other", lambda: load_policy("you/act"))
attempt("folder", lambda: load_policy("me/cards"))
attempt("forbidden", lambda: train("--run-dir", "x3", "--steps", "1", "--push-to-hub", "you/towel"))
attempt("name", lambda: train("--run-dir", "x4", "--steps", "1", "--push-to-hub", "towel"))
attempt("mi", lambda: train_mi.main(parse(train_mi.Config, ["--push-to-hub", "me/mi"], "train_mi.py")))
said["whole"] = load_policy("x3").trained_steps
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def server():
    with hub() as server:
        server.refused = {"you/towel"}
        yield server


def environment(server, home):
    known = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    known |= {"HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    return {**known, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def said(server, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    server.repos["you/act"] = {"config.json": b'{"type": "act"}', "model.safetensors": save({})}
    server.repos["me/cards"] = {"README.md": b"nothing to load", "config.json": b"{}"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *tiny],
        cwd=folder,
        env=environment(server, folder / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_pushes_its_policy_which_loads_by_name_and_acts_alike(said, server):
    assert said["push"] is None
    repo = server.repos["me/towel"]
    assert {"config.json", "model.safetensors", "README.md"} <= repo.keys()
    assert {"policy_preprocessor.json", "policy_postprocessor.json"} <= repo.keys()
    assert b"# me/towel" in repo["README.md"]
    assert said["equal"] is said["in lerobot"] is True
    assert any(path.startswith("PUT /lfs/") for path in server.asked)  # weights are too large for a commit


def test_a_run_starts_from_a_policy_on_the_hub_or_from_one_component_of_it(said):
    assert said["init"] is said["one"] is None
    assert said["taken"] < 1e-12


def test_pushing_again_replaces(said, server):
    assert said["again"] is None
    commits = [path for path in server.asked if path.startswith("POST /api/models/me/towel/commit")]
    assert len(commits) == 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", "there is no component 'wings'"),
        ("absent", "me/absent is no folder here and cannot be loaded from the hub"),
        ("other", "holds a policy of type 'act'"),
        ("folder", "me/cards on the hub has no model.safetensors"),
        ("forbidden", "could not be pushed to you/towel"),
        ("name", "write owner/name"),
        ("mi", "train_mi.py trains no policy"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(said, case, words):
    assert words in said[case]
    assert "\n" not in said[case]


def test_a_run_that_may_not_push_is_whole_and_says_how_to_push_it(said):
    assert "python -m lerobot_policy_flow.export x3 DIR --hub you/towel" in said["forbidden"]
    assert said["whole"] == 1


def test_who_has_no_login_hears_it_before_training(tiny, tmp_path, monkeypatch):
    import train_naive_fm

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    flags = ["--run-dir", str(tmp_path / "run"), "--steps", "1", "--push-to-hub", "me/towel"]
    with pytest.raises(UserError, match="hf auth login"):
        train_naive_fm.main(parse(train_naive_fm.Config, [*tiny, *flags], "train_naive_fm.py"))
    assert not (tmp_path / "run").exists()
