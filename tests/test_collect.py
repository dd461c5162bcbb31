"""Recording what a policy should learn from next."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import lines, train, weights

import collect
import train_naive_fm
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, DataConfig, open_dataset
from common.data.demo import EXPERT_SPEED, demonstrate, record
from common.data.growth import LOG, Entry, Growth
from common.data.recording import Demonstration
from common.envs.demo import DemoEnvironment
from common.errors import UserError
from common.files import read_json
from common.person import Keyboard, make_operator
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
    assert "nothing to record" in capsys.readouterr().out


def test_rounds_of_training_and_collecting_can_be_repeated(
    demos, cache_dir, tiny, tmp_path, accelerate_reset
):
    ends = []
    for place in (tmp_path / "one", tmp_path / "other"):
        new = place / "new"
        new.mkdir(parents=True)
        flags = ("--dataset", demos, "--grow-from", new, "--save-every", 1, "--keep", 9)
        run = train(train_naive_fm, tiny, place / "run", *flags, "--steps", 1)
        for step in (2, 3):
            collected(run, new, "--seed", step, "--episodes", 2)
            train(train_naive_fm, tiny, None, "--resume", run, "--steps", step + 1)
        names = [entry["name"] for time in read_json(run / LOG) for entry in time["entries"]]
        assert names == [path.name for path in sorted(new.glob("[!.]*"))]
        ends.append((names, lines(run), weights(run, 4)))
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(value, ends[1][2][key]) for key, value in ends[0][2].items())


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


def test_what_would_be_in_vain_is_said_before_the_first_episode(run, tmp_path, monkeypatch, capsys):
    policy = collect.load_policy(run)
    monkeypatch.setattr(collect, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(collect, "roll_out", lambda *_, **__: [])
    with monkeypatch.context() as without:
        without.setattr(DemoEnvironment, "expert", lambda self: None)
        with pytest.raises(UserError, match="demo has no expert to correct the policy: give --keep"):
            collected(run, tmp_path / "new")
        assert collected(run, tmp_path / "none", "--keep", "all") == []
    known = SimpleNamespace(sentences=("fold", "hang"), encoder="index")
    policy.spec = replace(policy.spec, tasks=known)
    with pytest.raises(UserError, match='the policy knows only "fold", "hang": act in an environment that'):
        collected(run, tmp_path / "new")
    known.encoder = "text"
    collected(run, tmp_path / "none")
    assert 'has no demonstration of "' in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_repeated_is_said(tmp_path):
    environment, episode = failing(steps=6)
    for given in ({"keep": "all"}, {"keep": "successes"}):
        episode.success = True  # as it was when the policy acted
        with pytest.raises(UserError, match="demo does not repeat an episode"):
            list(collect.demonstrations(environment, [episode], config(tmp_path, **given), lambda _: True))
    episode.success = False
    whole = config(tmp_path, keep="all")
    assert len(list(collect.demonstrations(environment, [episode], whole, lambda _: True))) == 1
    episode.states[4] = episode.states[4] + 0.1
    with pytest.raises(UserError, match="demo does not repeat an episode"):
        list(collect.demonstrations(environment, [episode], whole, lambda _: True))
    with pytest.raises(UserError, match="demo does not repeat an episode"):
        collect.correct(environment, episode, config(tmp_path, rewind=2))


def test_steps_of_another_length_are_not_recorded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(DemoEnvironment, "fps", 20.0)
    with pytest.raises(UserError, match="demo runs at 20 Hz, the policy learned from 10 Hz"):
        collected(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cameras_that_the_policy_does_not_see_are_not_recorded(run, tmp_path, cache_dir, monkeypatch):
    images = DemoEnvironment.images
    more = {"cam_back": np.zeros((5, 6, 3), np.uint8)}
    monkeypatch.setattr(DemoEnvironment, "images", lambda self: images(self) | more)
    (path,) = collected(run, tmp_path / "new")
    assert opened(path, cache_dir).cameras == ("head", "left", "right")


def test_what_is_collected_is_read_whatever_the_first_dataset_is_like(demos, tmp_path, cache_dir):
    names = tuple(f"observation.images.cam_{name}" for name in ("right", "left"))
    keys = {"action_keys": ("observation.state",), "camera_keys": names, "cameras": names}
    more = {"color_order": "bgr", "cache_dir": cache_dir, "grow_from": tmp_path}
    options = DataConfig(dataset=(str(demos),), **keys, **more)
    growing = Growth(options, ChunkDataset(open_dataset(options), [0], 4), tmp_path / LOG, writes=True)
    spec, ones = PolicySpec.of(growing.base), np.ones((5, 4), np.float32)
    seen = {"pixels/cam_left": 1, "back": 2, "pixels/cam_right": 3}  # as an environment calls them
    pictures = {name: np.full((5, 64, 64, 3), (200, 0, value), np.uint8) for name, value in seen.items()}
    collect.write(tmp_path / "round", spec, iter([Demonstration(ones, 2 * ones, pictures, "fold")]))
    store = growing.open(Entry("round"))
    growing.refuse_unfit(store)
    assert store.images(np.array([0]))[0, :, :, 0, 0].tolist() == [[200, 0, 3], [200, 0, 1]]
    np.testing.assert_array_equal(store.action, 2 * ones)


class Scripted:
    """A person who takes over in some steps of some episodes, and then acts as the expert does."""

    def __init__(self, environment, takes, stops=99):
        self.environment, self.takes, self.stops = environment, takes, stops
        self.finished, self.episode, self.seen = False, -1, 0

    def begin(self, task):
        self.has_control, self.step, self.act = False, -1, None
        self.episode += 1

    def show(self, picture):
        assert picture.dtype == np.uint8
        self.step, self.seen = self.step + 1, self.seen + 1
        self.has_control |= self.step == self.takes.get(self.episode)
        self.finished = self.episode == self.stops

    def action(self, state):
        np.testing.assert_array_equal(state, self.environment.state())
        self.act = self.act or self.environment.expert()
        return self.act()


@pytest.fixture
def person(monkeypatch):
    """The person who corrects; made when `collect.py` asks for one."""
    made = []

    def of(takes, **more):
        def make(name, environment):
            made.append(Scripted(environment, takes, **more))
            return made[-1]

        monkeypatch.setattr(collect, "make_operator", make)
        return made

    return of


def test_a_person_takes_over_where_they_like(run, tmp_path, cache_dir, capsys, person, monkeypatch):
    made, acted, roll_out = person({0: 4, 2: 1}), [], collect.roll_out
    monkeypatch.setattr(collect, "roll_out", lambda *given: acted.extend(roll_out(*given)) or acted[-1:])
    paths = collected(run, tmp_path / "new", "--by", "keyboard")
    stores = [opened(path, cache_dir) for path in paths]
    assert [store.num_episodes for store in stores] == [1, 1]  # nobody corrects the other two
    assert [path.name.rpartition("-")[2] for path in paths] == ["3000000", "3000002"]
    assert made[0].episode == 3
    said = capsys.readouterr().out
    assert f"2 corrections, {sum(store.num_steps for store in stores)} steps" in said
    assert all(f"recorded: {path}\n" in said for path in paths)
    assert [acted[number].steps for number in (0, 2)] == [4, 2]  # one step is too short for an episode
    for number, store in zip((0, 2), stores, strict=True):
        environment = DemoEnvironment()
        environment.reset(3_000_000, number)
        for action in acted[number].actions:
            environment.step(action)
        for state, action in zip(store.state, store.action, strict=True):
            np.testing.assert_allclose(state, environment.state(), atol=1e-6)
            environment.step(action)
        assert environment.success()


def test_a_person_who_stops_keeps_what_they_did(run, tmp_path, cache_dir, person):
    made = person({0: 5}, stops=1)
    (path,) = collected(run, tmp_path / "new", "--by", "keyboard")
    assert opened(path, cache_dir).num_episodes == 1
    assert made[0].episode == 1

    def interrupt(picture):
        raise KeyboardInterrupt

    person({0: 5})
    begin = Scripted.begin

    def begins(self, task):
        begin(self, task)
        if self.episode == 1:
            self.show = interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "begin", begins)
        collected(run, tmp_path / "new", "--by", "keyboard", "--seed", 5)
    stores = [opened(path, cache_dir) for path in sorted((tmp_path / "new").glob("[!.]*"))]
    assert [store.num_episodes for store in stores] == [1, 1]


def test_what_is_finished_is_kept_whatever_happens_then(run, tmp_path, cache_dir, person, monkeypatch):
    person({0: 5, 1: 5})
    action, write = Scripted.action, collect.write_dataset

    def unplugged(self, state):
        if self.episode == 1:
            raise OSError("the leader arm does not answer")
        return action(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Scripted, "action", unplugged)
        with pytest.raises(OSError, match="does not answer"):
            collected(run, tmp_path / "new", "--by", "keyboard")
    (path,) = (tmp_path / "new").glob("[!.]*")
    assert opened(path, cache_dir).num_episodes == 1

    def interrupted(*given, **named):
        monkeypatch.setattr(collect, "write_dataset", write)
        raise KeyboardInterrupt

    person({0: 5, 1: 5})
    monkeypatch.setattr(collect, "write_dataset", interrupted)
    (path,) = collected(run, tmp_path / "saved", "--by", "keyboard")
    assert opened(path, cache_dir).num_episodes == 1


def test_a_persons_corrections_keep_to_the_budget(run, tmp_path, cache_dir, capsys, person):
    person({0: 4, 1: 4, 2: 4})
    path, *_ = collected(run, tmp_path / "new", "--by", "keyboard")
    first = opened(path, cache_dir).num_steps
    person({0: 4, 1: 4, 2: 4})
    flags = ("--by", "keyboard", "--budget", first + 1)
    (path,) = collected(run, tmp_path / "part", *flags)
    assert opened(path, cache_dir).num_steps == first
    assert "the last correction is left out: it exceeds --budget" in capsys.readouterr().out
    with pytest.raises(UserError, match="--by keyboard records corrections: leave out --keep all"):
        collected(run, tmp_path / "all", "--by", "keyboard", "--keep", "all")


def test_a_failed_correction_is_left_out(run, tmp_path, capsys, person, monkeypatch):
    person({0: 5})
    monkeypatch.setattr(Scripted, "action", lambda self, state: state)  # stands still
    assert collected(run, tmp_path / "new", "--by", "keyboard") == []
    assert "0 corrections, 0 steps" in capsys.readouterr().out


@pytest.fixture
def window():
    """A keyboard with a figure that is never shown, and a function that presses and releases keys."""
    from matplotlib.backend_bases import CloseEvent, KeyEvent
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure((2, 2)))
    keyboard = Keyboard(canvas.figure, fps=500)

    def press(key, name="key_press_event"):
        canvas.callbacks.process(name, KeyEvent(name, canvas, key))

    close = lambda: canvas.callbacks.process("close_event", CloseEvent("close_event", canvas))  # noqa: E731
    return keyboard, press, close


def test_a_window_whose_step_is_late_does_not_wait_forever(window, monkeypatch):
    keyboard, waits, clock = window[0], [], iter(range(100))  # a second passes at every look at the clock
    monkeypatch.setattr(keyboard._figure.canvas, "start_event_loop", waits.append)
    monkeypatch.setattr("common.person.time", SimpleNamespace(monotonic=lambda: next(clock)))
    keyboard.begin("move")
    for _ in range(3):
        keyboard.show(np.zeros((4, 4, 3), np.uint8))
    assert min(waits) > 0


def test_keys_take_over_and_move_the_hands(window):
    keyboard, press, _ = window
    keyboard.begin("move")
    assert not keyboard.has_control
    state, speed = np.array([0.1, 0.2, 0.3, 0.4]), EXPERT_SPEED
    press(" ")
    assert keyboard.has_control
    assert not keyboard.finished
    np.testing.assert_array_equal(keyboard.action(state), state)
    press("w")
    press("left")
    press("x")
    np.testing.assert_allclose(keyboard.action(state), state + speed * np.array([0, 1, -1, 0]))
    press("left", "key_release_event")
    np.testing.assert_allclose(
        keyboard.action(state), state + speed * np.array([0, 1, 0, 0])
    )  # w is still held
    press("w", "key_release_event")
    press("down")
    press("down", "key_release_event")  # a tap between two steps counts
    np.testing.assert_allclose(keyboard.action(state), state + speed * np.array([0, 0, 0, -1]))
    np.testing.assert_array_equal(keyboard.action(state), state)
    keyboard.begin("move")
    assert not keyboard.has_control
    press("q")
    assert keyboard.finished


def test_the_window_shows_each_step_at_the_tasks_rate(window):
    keyboard, _, close = window
    keyboard.begin("move")
    picture = np.full((8, 8, 3), 77, np.uint8)
    start = time.monotonic()
    for _ in range(20):
        keyboard.show(picture)
    assert time.monotonic() - start >= 20 / 500
    np.testing.assert_array_equal(keyboard._image.get_array(), picture)
    close()
    assert keyboard.finished
    keyboard.show(picture)  # of a window that is gone: nothing happens


@pytest.mark.parametrize("backend", ["agg", "svg"])
def test_a_person_needs_a_window(backend, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.get_backend", lambda: backend)  # here may be a display
    with pytest.raises(UserError, match="matplotlib finds no display"):
        make_operator("keyboard", DemoEnvironment())


def test_keys_move_only_the_hands_of_the_built_in_task():
    arm = DemoEnvironment()
    arm.name = "pusht"
    with pytest.raises(UserError, match="hands of the built-in task, not pusht"):
        make_operator("keyboard", arm)
    with pytest.raises(UserError, match="--by leader is none of expert, keyboard, module:factory"):
        make_operator("leader", arm)
    with pytest.raises(UserError, match="--by math:leader: math has no function leader"):
        make_operator("math:leader", arm)
    assert make_operator("types:SimpleNamespace", arm).__dict__ == {}
