"""LeRobot's commands with our plug-ins, in an environment without this checkout: `make plugin`.

Policies are trained and exported here, and act there; `PLUGIN_PYTHON` names that environment's Python.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from running import reset, train

import train_cfg_vqvae
import train_naive_fm
import train_vfp
import train_vfp_depth
import train_vfp_moe
from common.config import parse
from common.data.recording import Demonstration, write_dataset
from common.envs import record
from common.inference import load_policy

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("PLUGIN_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="`make plugin` has an environment to try this in"),
]
SCRIPTS = (train_naive_fm, train_vfp, train_vfp_depth, train_cfg_vqvae, train_vfp_moe)
POSE = ("x", "y", "quat_x", "quat_y", "quat_z", "quat_w")
EVERYTHING = ("--proprio-history", 3, "--action-offset", 2, "--relative-actions")
EVERYTHING += ("--rotation", "quaternion->6d")
ARM = ("--env.type=flow", "--env.task=metaworld:push-v3", "--env.episode_length=6")
ARM += ("--env.observation_height=56", "--env.observation_width=56")
SEED = 11  # of torch's generator

ACT = """
import importlib.util, json, sys
import numpy as np, torch
import lerobot_policy_flow
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()
assert importlib.util.find_spec("common") is None, "a package called common"
assert importlib.util.find_spec("train_vfp") is None, "a script outside of the package"
for name, folder, file in json.loads(sys.argv[1]):
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=folder,
        preprocessor_overrides={
            "device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}
        },
    )
    seen = np.load(file)
    for episodes in (1, 5):
        torch.manual_seed(int(seen["seed"]))
        policy.reset()
        for step, states in enumerate(seen["states"]):
            batch = {"observation.state": torch.from_numpy(states[:episodes]), "task": ["x"] * episodes}
            for key, camera in config.cameras.items():
                frames = torch.from_numpy(seen["images." + camera][step, :episodes])
                batch[key] = frames.permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                actions = post(policy.select_action(pre(batch))).numpy()
            assert np.array_equal(actions, seen[f"actions.{episodes}"][step]), (name, episodes, step)
    print(name, "acts alike")
"""
EVALUATE = """
import sys
from lerobot.scripts import lerobot_eval
for line in sys.argv[1].splitlines():
    sys.argv = ["lerobot-eval", *line.split()]
    lerobot_eval.main()
"""


def run(*command, cwd, code=0):
    """Output of a command in the clean environment; the checkout is not on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home"), "OMP_NUM_THREADS": "1"}
    command = [Path(PYTHON).parent / command[0], *map(str, command[1:])]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) == (code == 0), said[-4000:]
    return said


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def arm(work):
    """Demonstrations from the simulator."""
    pytest.importorskip("metaworld")
    record.main(record.Config("metaworld:push-v3", work / "push", episodes=2, image_size=(56,)))
    return work / "push"


@pytest.fixture(scope="module")
def poses(work):
    """Demonstrations whose states and actions contain a rotation."""
    rng, demonstrations = np.random.default_rng(0), []
    for steps in (14, 11, 13):
        values = rng.normal([0, 0, 0, 0, 0, 2], 0.5, (steps, 6)).astype(np.float32)
        values[:, 2:] /= np.linalg.norm(values[:, 2:], axis=1, keepdims=True)
        images = {"front": rng.integers(0, 256, (steps, 56, 56, 3), np.uint8)}
        demonstrations.append(Demonstration(values, np.roll(values, -1, axis=0), images, "turn"))
    return write_dataset(work / "poses", demonstrations, fps=10, state_names=POSE, action_names=POSE)


@pytest.fixture(scope="module")
def exports(work, arm, poses, tiny):
    """(run folder, export folder) by name, for each script and for a policy that uses every option."""
    made = {}
    plans = {script.__name__: (script, arm, ()) for script in SCRIPTS}
    plans["everything"] = (train_vfp_depth, poses, EVERYTHING)
    for name, (script, dataset, flags) in plans.items():
        made[name] = work / "runs" / name, work / "exports" / name
        flags = ("--dataset", dataset, "--horizon", 8, *flags, "--steps", 2)
        train(script, tiny, made[name][0], *flags)
        export(*made[name])
    reset()
    return made


def export(run_dir, folder, *flags):
    from lerobot_policy_flow import export

    export.main(parse(export.Config, [str(run_dir), str(folder), *flags], "export.py"))


def expected(run_dir, file, steps=9):
    """Write observations of one and five robots, and the actions that this checkout computes for them."""
    import torch

    from common.inference import Controller

    policy, rng = load_policy(run_dir, device="cpu"), np.random.default_rng(0)
    statistics = policy.normalizer.statistics["state"]
    mean = statistics["mean"].numpy()
    mean = policy.spec.state_rotations.decode(mean) if policy.spec.state_rotations else mean
    states = mean + rng.normal(0, 0.01, (steps, 5, len(mean))).astype(np.float32)
    images = {c: rng.integers(0, 256, (steps, 5, 64, 48, 3), np.uint8) for c in policy.spec.cameras}
    torch.manual_seed(SEED)
    first, actions = int(torch.randint(2**62, ())), {}
    for episodes in (1, 5):
        controller = Controller(policy, [first + e for e in range(episodes)])
        actions[f"actions.{episodes}"] = np.stack(
            [
                controller.next_actions(
                    np.arange(episodes),
                    states[step, :episodes],
                    lambda which, step=step: [{c: x[step, e] for c, x in images.items()} for e in which],
                )
                for step in range(steps)
            ]
        )
    pictures = {f"images.{camera}": frames for camera, frames in images.items()}
    np.savez(file, seed=SEED, states=states, **pictures, **actions)
    return file


def test_every_policy_acts_as_it_does_here_to_the_bit(exports, work):
    cases = [
        (name, str(folder), str(expected(run_dir, work / f"{name}.npz")))
        for name, (run_dir, folder) in exports.items()
    ]
    said = run("python", "-c", ACT, json.dumps(cases), cwd=work)
    assert [line for line in said.splitlines() if "acts alike" in line] == [
        f"{c[0]} acts alike" for c in cases
    ]


def test_lerobot_eval_runs_to_its_end_with_each_policy(exports, work):
    """The first runs the command itself, with environments in separate processes, its default. The others
    call the same function in one process, because LeRobot starts slowly."""
    count = ("--eval.n_episodes=2", "--eval.batch_size=2", "--seed=3", "--policy.device=cpu")
    names = [script.__name__ for script in SCRIPTS]
    commands = {
        name: (f"--policy.path={exports[name][1]}", *ARM, *count, f"--output_dir={work / 'eval' / name}")
        for name in names
    }
    run("lerobot-eval", *commands[names[0]], cwd=work)
    lines = [" ".join((*commands[name], "--eval.use_async_envs=false")) for name in names[1:]]
    run("python", "-c", EVALUATE, "\n".join(lines), cwd=work)
    for name in names:
        info = json.loads((work / "eval" / name / "eval_info.json").read_text())
        assert info["overall"]["n_episodes"] == 2
        assert len(list((work / "eval" / name).rglob("*.mp4"))) == 2


def test_lerobot_s_own_environment_with_five_at_once(work, tiny):
    rng = np.random.default_rng(0)
    demonstrations = [
        Demonstration(
            rng.uniform(100, 400, (12, 2)).astype(np.float32),
            rng.uniform(100, 400, (12, 2)).astype(np.float32),
            {"image": rng.integers(0, 256, (12, 96, 96, 3), np.uint8)},
            "push",
        )
        for _ in range(2)
    ]
    names = ("x", "y")
    data = write_dataset(work / "t", demonstrations, fps=10, state_names=names, action_names=names)
    train(train_naive_fm, tiny, work / "pusht", "--dataset", data, "--steps", 1)
    reset()
    export(work / "pusht", work / "pusht-export", "--images", "observation.image=image")
    run(
        "lerobot-eval",
        f"--policy.path={work / 'pusht-export'}",
        *("--env.type=pusht", "--env.episode_length=5", "--env.observation_height=96"),
        *("--env.observation_width=96", "--eval.n_episodes=5", "--eval.batch_size=5", "--policy.device=cpu"),
        "--eval.use_async_envs=false",
        f"--output_dir={work / 'eval' / 'pusht'}",
        cwd=work,
    )
    info = json.loads((work / "eval" / "pusht" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 5


@pytest.fixture(scope="module")
def recorded(work):
    """A dataset by `lerobot-record`."""
    run(
        "lerobot-record",
        *("--robot.type=paper", "--teleop.type=paper_leader", "--dataset.repo_id=me/circles"),
        *(f"--dataset.root={work / 'circles'}", "--dataset.single_task=draw a circle"),
        *("--dataset.num_episodes=2", "--dataset.episode_time_s=2", "--dataset.reset_time_s=0"),
        *("--dataset.fps=10", "--dataset.push_to_hub=false", "--play_sounds=false"),
        cwd=work,
    )
    return work / "circles"


def roll_out(work, name, *flags, code=0):
    """The commands that the robot got, and the output of `lerobot-rollout`."""
    log = work / f"{name}.log"
    common = ("--robot.type=paper", f"--robot.log={log}", "--fps=10", "--duration=2", "--play_sounds=false")
    task = ("--task=draw a circle", "--return_to_initial_position=false", "--device=cpu")
    said = run("lerobot-rollout", *common, *task, *flags, cwd=work, code=code)
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return np.array([row[1:] for row in rows if row[0] == "action"]), said


def test_a_robot_is_recorded_and_driven_by_lerobot(recorded, work, tiny):
    train(train_naive_fm, tiny, work / "circle", "--dataset", recorded, "--horizon", 8, "--steps", 5)
    reset()
    export(work / "circle", work / "circle-export")
    path = f"--policy.path={work / 'circle-export'}"
    actions, _ = roll_out(work, "sync", path)
    assert len(actions) >= 5
    assert np.isfinite(actions).all()
    assert np.ptp(actions) > 0
    _, said = roll_out(work, "refused", path, "--inference.type=rtc", code=1)
    assert "RTC inference is not supported by policy type 'flow'" in said


def test_a_robot_is_driven_in_real_time(recorded, work, tiny):
    if "delay" not in {field.name for field in fields(train_naive_fm.Config)}:
        pytest.skip("no policy here is trained to continue a chunk")
    flags = ("--dataset", recorded, "--horizon", 16, "--steps", 5, "--max-delay", 8)
    train(train_naive_fm, tiny, work / "prefix", *flags)
    reset()
    export(work / "prefix", work / "prefix-export")
    path = f"--policy.path={work / 'prefix-export'}"
    rtc = ("--inference.type=rtc", "--inference.queue_threshold=8", "--inference.rtc.execution_horizon=12")
    actions, said = roll_out(work, "rtc", path, *rtc)
    assert len(actions) >= 5
    assert "RTC inference error" not in said


def test_the_packages_are_what_was_built(work):
    said = run(
        "python", "-c", "import lerobot_policy_flow, sys; print(lerobot_policy_flow.__file__)", cwd=work
    )
    assert str(Path(PYTHON).parents[1]) in said
    assert f"{sys.prefix}/" not in said
    export = ("python", "-m", "lerobot_policy_flow.export", work / "nothing", work / "out")
    assert "holds no finished checkpoint" in run(*export, cwd=work, code=1)
