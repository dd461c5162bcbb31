import dataclasses
import json
import math
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from lerobot_factory import make_dataset

import evaluate
import train_vfp
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import demo
from common.data.demo import Simulator
from common.errors import UserError


@pytest.mark.usefixtures("accelerate_reset")
def test_a_run_on_recorded_data_is_evaluated(tiny, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train_vfp.main(
        parse(train_vfp.Config, [*tiny, "--run-dir", str(run_dir), "--steps", "1"], "train_vfp.py")
    )
    config = parse(
        evaluate.Config, [str(run_dir), "--sample-steps", "2", "1", "--batch-size", "5"], "evaluate.py"
    )
    evaluate.main(config)
    results = json.loads((run_dir / "evaluation" / "results.json").read_text())
    assert {path.name for path in (run_dir / "evaluation").iterdir()} == {"results.json", "heldout.png"}
    assert set(results["latency_ms"]) == {"2", "1"}
    assert "closed_loop" not in results
    assert "held-out error" in capsys.readouterr().out

    (run_dir / "evaluation" / "rollouts.gif").write_bytes(b"of an evaluation in an environment")
    evaluate.main(dataclasses.replace(config, sample_steps=(3,)))
    folder = run_dir / "evaluation"
    assert f"the earlier evaluation is now in {folder / 'earlier-1'}" in capsys.readouterr().out
    assert json.loads((folder / "earlier-1" / "results.json").read_text()) == results
    assert {path.name for path in folder.iterdir()} == {"results.json", "heldout.png", "earlier-1"}
    assert (folder / "earlier-1" / "rollouts.gif").is_file()

    # compare the trivial predictors with loops over samples
    policy = evaluate.load_policy(run_dir)
    data = policy.config.data
    store = evaluate.open_dataset(data)
    train_episodes, held_out = evaluate.split_episodes(store, data.val_fraction, 0)
    starts = store.episode_starts
    steps = [s for e in train_episodes for s in range(starts[e], starts[e + 1])]
    mean = store.action[steps].mean(0)
    scale = policy.normalizer.action_scale.numpy()
    errors = {"mean": [], "nearest": []}
    spread = store.state[steps].std(0) + 1e-6
    for e in held_out:
        for s in range(starts[e], starts[e + 1]):
            near = steps[int((((store.state[steps] - store.state[s]) / spread) ** 2).sum(1).argmin())]
            near_end = next(starts[i + 1] for i in train_episodes if starts[i] <= near < starts[i + 1])
            for k in range(policy.horizon):
                if s + k < starts[e + 1]:
                    errors["mean"].append(np.abs(store.action[s + k] - mean) / scale)
                    guess = store.action[min(near + k, near_end - 1)]
                    errors["nearest"].append(np.abs(store.action[s + k] - guess) / scale)
    for name, values in errors.items():
        assert results["heldout"][name]["mae"] == pytest.approx(np.mean(values), rel=1e-4)
    names = list(policy.spec.action_names)
    per_dimension = np.array(errors["mean"]).mean(0) * scale
    for i, name in enumerate(names):
        assert results["heldout"]["mean"]["per_dimension"][name] == pytest.approx(per_dimension[i], rel=1e-4)
    assert (
        results["heldout"]["linear"]["mae"] < results["heldout"]["mean"]["mae"]
    )  # actions are linear in the state


class Expert:
    """Acts like the demonstrator, passing on the right; it knows the targets from the episode's number."""

    horizon, state_dim, device = 8, 4, torch.device("cpu")

    def __init__(self, history, offset):
        cameras = ("cam_head", "cam_left", "cam_right")
        self.spec = PolicySpec(
            cameras, (64, 64), demo.NAMES, demo.NAMES, 10.0, proprio_history=history, action_offset=offset
        )

    def act_batch(self, observations, sample_steps, clip, generators):
        chunks = []
        for observation, generator in zip(observations, generators, strict=True):
            assert observation["state"].shape == (self.spec.proprio_history, 4)
            targets = Simulator(1, 3, first=generator.initial_seed() - 3).targets
            hands, chunk = observation["state"][-1].reshape(1, 2, 2).astype(float), []
            for _ in range(self.spec.action_offset + self.horizon):
                action = demo.expert_action(hands, targets, np.ones((1, 2), int))
                hands = action.reshape(1, 2, 2)
                chunk.append(action[0])
            chunks.append(chunk[-self.horizon :])
        return np.array(chunks, np.float32)


@pytest.mark.parametrize(("history", "offset"), [(1, 0), (3, 2)])
def test_rollouts_execute_chunks_in_closed_loop(tmp_path, history, offset):
    settings = ["--env", "demo", "--episodes", "6", "--parallel", "4", "--seed", "3"]
    config = parse(evaluate.Config, [str(tmp_path), *settings], "evaluate.py")
    results = dict(evaluate.evaluate_closed_loop(Expert(history, offset), config, tmp_path))
    summary = results["10"]
    assert (summary["success"], summary["collisions"], summary["timeouts"]) == (1, 0, 0)
    assert summary["modes"] == {"right-right": 1}
    assert set(results) == {"10", "2", "1", "grey", "mismatched"}
    from PIL import Image

    with Image.open(tmp_path / "rollouts.gif") as gif:
        assert gif.n_frames > 20
        assert gif.size == (4 * 152, 2 * 152)
    assert math.isclose(Image.open(tmp_path / "rollouts.png").width, 1100, abs_tol=2)
    with av.open(str(tmp_path / "rollouts.mp4")) as film:
        assert len(list(film.decode(video=0))) > 20
    assert "right-right 100%" in evaluate.in_words(summary)


@pytest.mark.usefixtures("accelerate_reset")
def test_a_dataset_that_has_moved_is_named(tmp_path, tiny):
    root = make_dataset(tmp_path / "here", (9, 8), {"observation.images.cam_head": (32, 32)}, video=False)
    flags = [*tiny, "--dataset", str(root), "--cache-dir", str(tmp_path / "cache"), "--steps", "1"]
    run_dir = tmp_path / "run"
    train_vfp.main(parse(train_vfp.Config, [*flags, "--run-dir", str(run_dir)], "train_vfp.py"))
    there = root.rename(tmp_path / "there")
    with pytest.raises(UserError, match="here was not found"):
        evaluate.main(evaluate.Config(run_dir, sample_steps=(1,)))
    moved = evaluate.Config(
        run_dir, sample_steps=(1,), dataset=(str(there),), cache_dir=tmp_path / "elsewhere"
    )
    evaluate.main(moved)
    assert (tmp_path / "elsewhere" / "stores").is_dir()
    (run_dir / "config.json").unlink()
    with pytest.raises(UserError, match="has no config"):
        evaluate.main(moved)


def test_an_export_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is an export, which does not name its data: evaluate its run"):
        evaluate.main(evaluate.Config(tmp_path))
    assert not (tmp_path / "evaluation").exists()


def test_a_missing_simulator_is_reported_before_other_work(tmp_path, monkeypatch):
    policy = SimpleNamespace(
        config=train_vfp.Config(),
        spec=SimpleNamespace(image_size=(8, 8)),
        checkpoint=tmp_path,
        trained_steps=1,
    )
    policy.script, policy.device = train_vfp, "cpu"
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(evaluate, "evaluate_heldout", lambda *_: pytest.fail("held-out episodes came first"))
    with pytest.raises(UserError, match="--env nowhere:make"):
        evaluate.main(parse(evaluate.Config, [str(tmp_path), "--env", "nowhere:make"], "evaluate.py"))


@pytest.fixture
def acting(tmp_path, monkeypatch):
    """A policy that is loaded from `tmp_path` and has no held-out episodes."""
    policy = Continuing(2)
    policy.script, policy.config = train_vfp, train_vfp.Config()
    policy.checkpoint, policy.trained_steps = tmp_path, 1
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(evaluate, "evaluate_heldout", lambda *_: None)
    monkeypatch.setattr(evaluate, "measure_latency", lambda *_: {})
    return policy


def test_an_environment_with_other_cameras_is_refused_before_other_work(acting, tmp_path, monkeypatch):
    acting.spec = dataclasses.replace(acting.spec, cameras=("top",))
    monkeypatch.setattr(evaluate, "evaluate_heldout", lambda *_: pytest.fail("held-out episodes came first"))
    with pytest.raises(UserError, match="cameras cam_head, cam_left, cam_right, and the policy sees top"):
        evaluate.main(parse(evaluate.Config, [str(tmp_path), "--env", "demo"], "evaluate.py"))


def test_an_evaluation_that_is_killed_keeps_what_it_has_measured(acting, tmp_path, monkeypatch):
    act = evaluate.act

    def killed(policy, config, steps, *given, **more):
        if steps == 1:
            raise KeyboardInterrupt
        return act(policy, config, steps, *given, **more)

    monkeypatch.setattr(evaluate, "act", killed)
    flags = [str(tmp_path), "--env", "demo", "--episodes", "2", "--max-steps", "2", "--sample-steps"]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(parse(evaluate.Config, [*flags, "2", "1"], "evaluate.py"))
    folder = tmp_path / "evaluation"
    assert not (folder / "results.json").exists()
    assert list(json.loads((folder / "unfinished.json").read_text())["closed_loop"]) == ["2"]
    evaluate.main(parse(evaluate.Config, [*flags, "2"], "evaluate.py"))
    results = json.loads((folder / "results.json").read_text())
    assert list(results["closed_loop"]) == ["2", "grey", "mismatched"]
    assert not (folder / "unfinished.json").exists()
    assert (folder / "earlier-1" / "unfinished.json").is_file()


@pytest.mark.usefixtures("acting")
def test_more_actions_than_a_chunk_has_are_refused_before_other_work(tmp_path):
    with pytest.raises(UserError, match=r"--execute-steps: execute_steps must lie in 1..8, got 9"):
        evaluate.main(evaluate.Config(tmp_path, execute_steps=9))
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("option", [{"delay": (3,)}, {"task": "fold it"}, {"execute_steps": 4}])
def test_options_of_acting_are_refused_without_an_environment(option, tmp_path, monkeypatch):
    policy = Continuing(2)
    policy.script, policy.config = train_vfp, parse(train_vfp.Config, ["--dataset", str(tmp_path)], "train")
    monkeypatch.setattr(evaluate, "load_policy", lambda *_, **__: policy)
    with pytest.raises(UserError, match=f"--{next(iter(option)).replace('_', '-')} needs --env"):
        evaluate.main(evaluate.Config(tmp_path, **option))
    assert not (tmp_path / "evaluation").exists()


def test_a_misled_policy_is_told_another_task_however_its_own_is_spelled(tmp_path, monkeypatch):
    tasks = SimpleNamespace(sentences=("fold it", "hang it"))
    policy = SimpleNamespace(spec=SimpleNamespace(image_size=(8, 8), tasks=tasks))
    episode = evaluate.Episode(0, 10, task=" fold  it\n")
    monkeypatch.setattr(evaluate, "roll_out", lambda *given: given[-1](episode))
    config = parse(evaluate.Config, [str(tmp_path), "--env", "demo"], "evaluate.py")
    assert evaluate.act(policy, config, 1, misled=True) == "hang it"


@pytest.mark.parametrize("option", ["--sample-steps", "--episodes", "--heldout-samples"])
def test_numbers_below_one_are_refused(option, tmp_path):
    with pytest.raises(UserError, match=option):
        evaluate.main(parse(evaluate.Config, [str(tmp_path), option, "0"], "evaluate.py"))


class Continuing(Expert):
    """Continues a prefix from its end, and records its length."""

    def __init__(self, max_delay):
        super().__init__(1, 0)
        self.spec = dataclasses.replace(self.spec, max_delay=max_delay)
        self.normalizer = SimpleNamespace(action_scale=torch.ones(4))
        self.given = set()

    def act_batch(self, observations, sample_steps, clip, generators, prefixes=None):
        if prefixes is None:
            return super().act_batch(observations, sample_steps, clip, generators)
        self.given.update(map(len, prefixes))
        ahead = [{**o, "state": p[-1][None]} for o, p in zip(observations, prefixes, strict=True)]
        chunks = super().act_batch(ahead, sample_steps, clip, generators)
        return np.concatenate([np.stack(prefixes), chunks], 1)[:, : self.horizon]


def test_ways_of_joining_are_compared(tmp_path, capsys):
    """An expert whose chunks continue the executed actions loses nothing through a delay."""
    settings = ["--env", "demo", "--episodes", "4", "--parallel", "4", "--seed", "3", "--delay", "0", "3"]
    settings += ["--execute-steps", "4"]
    config = parse(evaluate.Config, [str(tmp_path), *settings], "evaluate.py")
    policy = Continuing(3)
    assert evaluate.possible_delays(policy, config) == [
        (delay, join) for delay in (0, 3) for join in ("blocking", "naive", "ensemble", "prefix")
    ]
    found = {join: evaluate.act_with_delay(policy, config, 3, join) for join in ("prefix", "blocking")}
    assert policy.given == {3}
    for result in found.values():
        assert (result["success"], result["collisions"]) == (1, 0)
    change = {join: result["velocity_change"] for join, result in found.items()}
    assert change["prefix"]["seam"]["p99"] <= 1.05 * change["prefix"]["inside"]["p99"]
    assert change["blocking"]["seam"]["p99"] > 1.5 * change["prefix"]["seam"]["p99"]  # it stops and starts
    assert found["blocking"]["steps"] > 1.5 * found["prefix"]["steps"]
    evaluate.report({"heldout": None, "latency_ms": {}, "delay": {"3": found}}, tmp_path)
    said = capsys.readouterr().out
    assert "delay  3, blocking: 100.0% [39.8%, 100.0%] of 4 episodes" in said
    assert f"change of velocity: seam {change['prefix']['seam']['mean']:.3f} (99 %: " in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--join", "prefix"), "needs a prefix of 3 actions, but the policy was trained with at most 2"),
        (("--delay", "5"), "too short for a delay of 5 steps"),
        (("--execute-steps", "2"), r"--delay 3, --join naive: execute_steps must lie in 3..5, got 2"),
    ],
)
def test_delays_that_cannot_be_tried_are_refused(flags, words, tmp_path):
    config = parse(evaluate.Config, [str(tmp_path), "--delay", "3", *flags], "evaluate.py")
    with pytest.raises(UserError, match=words):
        evaluate.possible_delays(Continuing(2), config)
    config = parse(evaluate.Config, [str(tmp_path), "--delay", "3"], "evaluate.py")
    joins = [join for _, join in evaluate.possible_delays(Continuing(2), config)]
    assert joins == ["blocking", "naive", "ensemble"]


def test_a_report_lists_some_of_many_tasks(tmp_path, capsys):
    each = {f"fold towel {number}": {"mae": 1.0, "steps": 2} for number in range(2000)}
    results = {"heldout": {"steps": 4000, "policy": {"mae": 1.0}, "tasks": each}, "latency_ms": {}}
    evaluate.report(results, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert "  and 1950 more tasks" in lines
