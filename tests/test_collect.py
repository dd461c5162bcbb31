"""Recording what a policy should learn from next."""

import numpy as np
import pytest
from running import lines, train

import collect
import train_naive_fm
from common.config import parse
from common.data import DataConfig, open_dataset
from common.data.demo import demonstrate, record
from common.envs.demo import DemoEnvironment
from common.errors import UserError
from common.rollout import Episode


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return record(tmp_path_factory.mktemp("demos") / "table", demonstrate(3, seed=0))


@pytest.fixture
def run(demos, cache_dir, tiny, tmp_path, accelerate_reset):
    """A policy that has learned nothing."""
    return train(train_naive_fm, tiny, tmp_path / "run", "--dataset", demos, "--steps", 1)


def collected(run, out, *flags):
    argv = [str(run), str(out), "--env", "demo", "--episodes", "4", *map(str, flags)]
    collect.main(parse(collect.Config, argv, "collect.py"))
    return sorted(out.glob("[!.]*"))


@pytest.fixture
def acted(monkeypatch):
    """The episodes of the last call."""
    episodes, roll_out = [], collect.roll_out

    def noted(*arguments, **named):
        episodes[:] = roll_out(*arguments, **named)
        return episodes

    monkeypatch.setattr(collect, "roll_out", noted)
    return episodes


def opened(path, cache_dir):
    return open_dataset(DataConfig(dataset=(str(path),), cache_dir=cache_dir))


def test_an_expert_goes_on_where_the_policy_failed(run, tmp_path, cache_dir, capsys, tiny, demos, acted):
    (path,) = collected(run, tmp_path / "new", "--rewind", 30)
    assert "0 of 4 episodes succeeded\n4 corrections, " in capsys.readouterr().out
    store = opened(path, cache_dir)
    assert store.num_episodes == 4
    for number, (start, end) in enumerate(zip(store.episode_starts, store.episode_starts[1:], strict=False)):
        begins = [np.allclose(store.state[start], state) for state in acted[number].states]
        assert any(begins)
        environment = DemoEnvironment()
        environment.reset(3_000_000, number)
        for action in acted[number].actions[: begins.index(True)]:
            environment.step(action)
        np.testing.assert_allclose(store.state[start], environment.state(), atol=1e-6)
        picture = environment.images()["cam_head"].transpose(2, 0, 1)
        np.testing.assert_array_equal(store.images(np.array([start]))[0, 0], picture)
        for action in store.action[start:end]:
            environment.step(action)
        assert environment.success()

    again = opened(collected(run, tmp_path / "again", "--rewind", 30)[0], cache_dir)
    np.testing.assert_array_equal(again.state, store.state)  # the same seed, the same corrections
    np.testing.assert_array_equal(again.action, store.action)
    flags = ("--dataset", demos, "--grow-from", tmp_path / "new", "--steps", 2, "--log-every", 1)
    grown = train(train_naive_fm, tiny, tmp_path / "grown", *flags)
    assert len(lines(grown)) == 2
    assert "now 6 training episodes" in capsys.readouterr().out  # one of three is held out


def test_all_episodes_are_recorded_as_they_were(run, tmp_path, cache_dir, capsys, acted):
    (path,) = collected(run, tmp_path / "new", "--keep", "all")
    store = opened(path, cache_dir)
    np.testing.assert_allclose(
        store.action, np.concatenate([episode.actions for episode in acted]), atol=1e-6
    )
    states = np.concatenate([episode.states[:-1] for episode in acted])
    np.testing.assert_allclose(store.state, states, atol=1e-6)
    assert collected(run, tmp_path / "none", "--keep", "successes") == []
    assert "nothing to record with --keep successes" in capsys.readouterr().out


def test_the_budget_holds_in_whole_episodes(run, tmp_path, cache_dir):
    whole = opened(collected(run, tmp_path / "whole")[0], cache_dir)
    first = whole.episode_starts[2]  # two episodes
    (path,) = collected(run, tmp_path / "part", "--budget", first + 1)
    assert opened(path, cache_dir).num_steps == first


def test_every_round_needs_a_name_of_its_own(run, tmp_path, monkeypatch):
    collected(run, tmp_path / "new")
    with pytest.raises(UserError, match="already exists: give each round its own --seed"):
        collected(run, tmp_path / "new")
    assert len(collected(run, tmp_path / "new", "--seed", 4)) == 2
    with pytest.raises(UserError, match="--env is missing"):
        collect.main(parse(collect.Config, [str(run), str(tmp_path / "new")], "collect.py"))


def failing(steps=20):
    environment = DemoEnvironment()
    environment.reset(0, 0)
    episode = Episode(0, 10, states=[environment.state()])
    for _ in range(steps):
        action = environment.state() + np.float32([0, 0.03, 0, 0.03])
        environment.step(action)
        episode.actions.append(action)
        episode.states.append(environment.state())
    episode.steps = steps
    return environment, episode


def config(tmp_path, **more):
    return collect.Config(tmp_path, tmp_path, seed=0, **more)


def test_an_expert_that_fails_tries_from_further_back(tmp_path, monkeypatch):
    environment, episode = failing()
    begins, replay = [], collect.replay

    def noted(environment, episode, steps, seed):
        begins.append(steps)
        replay(environment, episode, steps, seed)

    monkeypatch.setattr(collect, "replay", noted)
    with monkeypatch.context() as useless:
        useless.setattr(DemoEnvironment, "expert", lambda self: self.state)
        assert collect.correct(environment, episode, config(tmp_path, rewind=4)) is None
    assert begins == [16, 12, 4, 0]
    begins.clear()
    found = collect.correct(environment, episode, config(tmp_path, rewind=4))
    np.testing.assert_array_equal(found.state[0], episode.states[begins[-1]])


def test_what_cannot_be_repeated_or_corrected_is_said(tmp_path, monkeypatch):
    environment, episode = failing()
    with monkeypatch.context() as without:
        without.setattr(DemoEnvironment, "expert", lambda self: None)
        with pytest.raises(UserError, match="demo has no expert to correct the policy"):
            collect.correct(environment, episode, config(tmp_path))
    episode.states[10] = episode.states[10] + 0.1
    with pytest.raises(UserError, match="demo does not repeat an episode"):
        collect.correct(environment, episode, config(tmp_path))
