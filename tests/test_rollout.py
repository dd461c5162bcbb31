"""Acting in closed loop: parallel episodes, what a policy is shown, and environments that misbehave."""

import importlib
import sys
import time
from dataclasses import replace
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from arm_env import Arm as Arena
from PIL import Image
from running import lines, train, weights

import train_naive_fm
from common import envs, rollout
from common.checkpoint import PolicySpec
from common.config import parse
from common.data.demo import Simulator
from common.envs import EnvConfig, make_environment, record
from common.envs import gym as gymnasium_env
from common.envs.demo import DemoEnvironment
from common.envs.gym import GymEnvironment, factory
from common.errors import UserError
from common.rollout import rates, roll_out

HORIZON = 4


class Policy:
    """Returns chunks made from its observations, and records these."""

    horizon, state_dim, device = HORIZON, 1, torch.device("cpu")
    spec = PolicySpec(("top",), (4, 4), ("x",), ("dx",), fps=10.0)

    def __init__(self):
        self.shown = []

    def act_batch(self, observations, sample_steps, clip, generators):
        self.shown.append([int(o["images"]["top"][0, 0, 0]) for o in observations])
        noise = [torch.rand((), generator=g).item() for g in generators]
        states = np.array([o["state"][0, 0] for o in observations])
        return np.tile((states + noise)[:, None, None], (1, HORIZON, 1)).astype(np.float32)


class Counter:
    """Ends after `length` steps; its image is the episode's number, its state the sum of all actions."""

    name, fps, task, state_names, action_names = "counter", 10.0, "count", ("x",), ("dx",)

    def __init__(self, length=6, max_steps=20):
        self.length, self.max_steps, self.drawn = length, max_steps, 0

    def reset(self, seed, episode):
        self.number, self.steps, self.x = episode, 0, np.float32(seed)

    def state(self):
        return np.array([self.x], np.float32)

    def images(self):
        self.drawn += 1
        return {"top": np.full((4, 4, 3), self.number, np.uint8), "unused": np.zeros((2, 2, 3), np.uint8)}

    def picture(self):
        return self.images()["top"]

    def step(self, action):
        self.x += action[0]
        self.steps += 1
        return self.steps >= self.length + self.number

    def success(self):
        return self.number % 2 == 0

    def facts(self):
        return {"late": self.number > 2, "way": "left" if self.number < 4 else "right"}


def test_episodes_end_the_same_however_many_run_beside_them():
    alone = roll_out(Policy(), [Counter()], range(5), seed=7)
    together = roll_out(Policy(), [Counter() for _ in range(3)], range(5), seed=7)
    assert [episode.number for episode in together] == list(range(5))
    assert [episode.steps for episode in together] == [6, 7, 8, 9, 10]
    assert [episode.success for episode in together] == [True, False, True, False, True]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.states, other.states)
    other_seed = roll_out(Policy(), [Counter()], range(1), seed=8)
    assert not np.array_equal(other_seed[0].states, alone[0].states)


def test_pictures_are_drawn_only_when_a_chunk_is_due():
    environment, policy = Counter(length=8), Policy()
    roll_out(policy, [environment], range(1), seed=0, execute_steps=4)
    assert len(policy.shown) == 2
    assert environment.drawn == 3  # once more to find the cameras


def test_what_a_policy_is_shown():
    for eyes, shown in (("own", [0, 1, 2]), ("other", [1, 2, 0]), ("grey", [128] * 3)):
        policy = Policy()
        roll_out(policy, [Counter(), Counter(), Counter()], range(3), seed=0, eyes=eyes)
        assert policy.shown[0] == shown


@pytest.mark.parametrize(("episodes", "environments"), [(2, 2), (3, 3), (4, 3), (5, 3), (7, 3), (21, 20)])
def test_nobody_is_alone_where_pictures_are_those_of_another(episodes, environments):
    policy = Policy()
    counters = [Counter(length=40, max_steps=2) for _ in range(environments)]
    roll_out(policy, counters, range(episodes), seed=0, eyes="other")
    shown = [number for numbers in policy.shown for number in numbers]
    assert sorted(shown) == list(range(episodes))
    assert all(seen != number for number, seen in enumerate(shown))


def test_an_episode_that_is_alone_is_not_shown_its_own_pictures_as_anothers():
    with pytest.raises(ValueError, match="pictures of another episode"):
        roll_out(Policy(), [Counter()], range(2), seed=0, eyes="other")


def test_a_process_without_a_share_has_no_episodes():
    assert roll_out(Policy(), [], range(0), seed=0) == []


def test_the_first_episodes_are_filmed():
    episodes = roll_out(Policy(), [Counter(), Counter()], range(3), seed=0, film=2)
    assert [len(episode.frames) for episode in episodes] == [6, 7, 0]
    assert episodes[1].frames[0].max() == 1


def test_a_fast_environment_is_filmed_at_20_pictures_a_second_at_most():
    environment = Counter()
    environment.fps = 50.0  # every third step is filmed
    (episode,) = roll_out(Policy(), [environment], [1], seed=0, film=2)
    assert episode.steps == 7
    assert len(episode.frames) == 3
    assert episode.film_fps == pytest.approx(50 / 3)


def test_films_of_large_pictures_stay_small_whatever_the_environment_draws_into():
    class Large(Counter):
        canvas = np.zeros((680, 340, 3), np.uint8)

        def picture(self):
            self.canvas[:] = self.steps
            return self.canvas

    (episode,) = roll_out(Policy(), [Large()], range(1), seed=0, film=1)
    assert {frame.shape for frame in episode.frames} == {(256, 128, 3)}
    assert [frame.max() for frame in episode.frames] == [1, 2, 3, 4, 5, 6]
    Large.canvas = np.zeros((8, 6, 3), np.uint8)
    (episode,) = roll_out(Policy(), [Large()], range(1), seed=0, film=1)
    assert [frame.max() for frame in episode.frames] == [1, 2, 3, 4, 5, 6]


def test_rates_of_episodes():
    found = rates(roll_out(Policy(), [Counter()], range(6), seed=0))
    assert found["success"] == 0.5
    assert found["lates"] == 0.5
    assert found["ways"] == {"left": pytest.approx(2 / 3), "right": pytest.approx(1 / 3)}
    # the bounds of Clopper and Pearson (1934): so few or so many successes have a probability of 2.5 %
    from math import comb

    low, high = found["low"], found["high"]
    assert sum(comb(6, k) * low**k * (1 - low) ** (6 - k) for k in range(3, 7)) == pytest.approx(0.025)
    assert sum(comb(6, k) * high**k * (1 - high) ** (6 - k) for k in range(4)) == pytest.approx(0.025)


def failing(what):
    class Failing(Counter):
        def step(self, action):
            if what == "raises" and self.steps == 2:
                raise RuntimeError("the motor burned")
            if what == "hangs":
                time.sleep(30)
            return super().step(action) or what == "ends"

        def state(self):
            return np.array([np.nan if what == "nan" and self.steps == 3 else 0.0], np.float32)

        def success(self):
            return False

    return Failing()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("raises", "--env counter failed in step 2 of episode 0 .*the motor burned"),
        ("nan", "a state that is not finite, at step 2 of episode 0"),
        ("ends", "ends every episode after its first step"),
    ],
)
def test_environments_that_misbehave_are_named(what, sentence):
    with pytest.raises(UserError, match=sentence):
        roll_out(Policy(), [failing(what)], range(2), seed=0)


def test_an_environment_that_hangs_ends_the_program(monkeypatch, capfd):
    monkeypatch.setattr(envs, "HANG_SECONDS", 0.2)
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(envs.os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.6)))
    monkeypatch.setattr(envs.threading, "excepthook", lambda args: None)
    roll_out(Policy(), [failing("hangs")], range(1), seed=0)
    assert codes[0] == 70
    assert "--env counter hangs in step 0 of episode 0" in capfd.readouterr().err


def test_cameras_and_states_that_do_not_fit_are_both_listed():
    policy = Policy()
    policy.spec = replace(policy.spec, cameras=("head",))
    with pytest.raises(
        UserError, match=r"cameras top, unused, and the policy sees head: .*--env-map head=top"
    ):
        roll_out(policy, [Counter()], range(1), seed=0)
    policy = Policy()
    policy.spec = replace(policy.spec, state_names=("x", "y"))
    with pytest.raises(UserError, match="has the state x, and the policy was trained on x, y"):
        roll_out(policy, [Counter()], range(1), seed=0)


def test_actions_and_pictures_that_do_not_fit_are_said(monkeypatch):
    policy = Policy()
    policy.spec = replace(policy.spec, action_names=("dx", "dy"))
    with pytest.raises(UserError, match="takes the actions dx, and the policy gives dx, dy"):
        roll_out(policy, [Counter()], range(1), seed=0)
    policy.spec = replace(policy.spec, action_names=("dx", "dy"))
    monkeypatch.setattr(Counter, "action_names", ("dy", "dx"))
    with pytest.raises(
        UserError, match="has the actions dy, dx, and the policy was trained on dx, dy: record"
    ):
        roll_out(policy, [Counter()], range(1), seed=0)
    monkeypatch.undo()
    first = {"top": np.zeros((3, 4, 4), np.uint8)}
    monkeypatch.setattr(Counter, "images", lambda self: first)
    with pytest.raises(
        UserError, match=r"pictures of top are uint8 \(3, 4, 4\), and a policy sees \(H, W, 3\)"
    ):
        roll_out(Policy(), [Counter()], range(1), seed=0)


def test_another_control_rate_is_said(capsys):
    roll_out(Policy(), [Counter()], range(1), seed=0)
    assert capsys.readouterr().out == ""
    environment = Counter()
    environment.fps = 80.0
    roll_out(Policy(), [environment], range(1), seed=0)
    assert "runs at 80 Hz, the policy was trained at 10 Hz" in capsys.readouterr().out


@pytest.mark.parametrize(("hold", "steps"), [(0, 6), (5, 11), (50, 20)])
def test_an_expert_goes_on_for_a_while_after_success(hold, steps):
    environment = Counter(length=6, max_steps=20)
    environment.expert = lambda: lambda: np.ones(1, np.float32)
    recorded = record.attempt(environment, 0, 0, hold)
    np.testing.assert_array_equal(recorded.state[:, 0], np.arange(steps))
    assert len(recorded.action) == len(recorded.images["top"]) == steps


def test_pushes_disturb_what_happens_but_not_what_is_recorded():
    environment = Counter(length=90, max_steps=100)
    environment.expert = lambda: lambda: np.ones(1, np.float32)
    environment.pushes = (0.5,)
    recorded, again = (record.attempt(environment, 0, 2, disturb=0.1) for _ in range(2))
    np.testing.assert_array_equal(recorded.state, again.state)
    np.testing.assert_array_equal(recorded.action, np.ones((92, 1)))
    pushed = np.diff(recorded.state[:, 0]) - 1
    assert 0 < np.count_nonzero(np.abs(pushed) > 1e-4) < 91
    assert np.abs(pushed).max() <= 0.5
    assert not np.array_equal(record.attempt(environment, 0, 4, disturb=0.1).state, recorded.state)


def test_a_push_lasts_for_ten_steps_and_leaves_the_gripper_alone():
    made = record.pushes((1, 2, 0), 0.05, np.random.default_rng(0))
    found = np.stack([next(made) for _ in range(2000)])
    begins = np.flatnonzero((found[1:] != found[:-1]).any(1)) + 1
    lengths = {b - a for a, b in pairwise(begins) if found[a].any()}
    assert lengths == {record.PUSH_STEPS}
    assert not found[:, 2].any()
    assert (np.abs(found[:, :2]).max(0) <= (1, 2)).all()
    assert (np.abs(found[:, :2]).max(0) > (0.5, 1)).all()


def test_pushes_of_unknown_strength_are_refused(tmp_path):
    with pytest.raises(UserError, match="--disturb: demo does not say how hard its robot may be pushed"):
        record.main(record.Config("demo", tmp_path / "d", disturb=0.1))
    assert not list(tmp_path.iterdir())


def test_an_expert_that_fails_is_not_recorded_for_ever(monkeypatch, tmp_path):
    class Clumsy(Counter):
        def success(self):
            return False

        def expert(self):
            return lambda: np.ones(1, np.float32)

    monkeypatch.setattr(record, "make_environment", lambda config, size: Clumsy())
    with pytest.raises(UserError, match="The expert of counter succeeded in 0 of 7 episodes"):
        record.main(record.Config("clumsy", tmp_path / "data", episodes=2))
    assert not (tmp_path / "data").exists()


# The built-in task


def test_an_episode_of_the_built_in_task_is_that_of_the_simulator():
    together = Simulator(5, seed=3)
    environment = make_environment(EnvConfig(env="demo"), (64, 64))
    environment.reset(3, 4)
    for step in range(30):
        np.testing.assert_array_equal(environment.state(), together.state[4])
        for camera, image in zip(("cam_head", "cam_left", "cam_right"), together.images()[4], strict=True):
            np.testing.assert_array_equal(environment.images()[camera], image)
        action = together.state + np.float32(0.02 * (step % 3))
        together.step(action)
        environment.step(action[4])
    assert isinstance(environment, DemoEnvironment)


# gymnasium


class Arm(gymnasium.Env):
    """One joint and two images, nested as in many environments."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.joint = 0, self.np_random.normal(size=2)
        return self._see(), {}

    def _see(self):
        frame = np.full((6, 8, 3), self.steps, np.uint8)
        return {"pixels": {"top": frame, "wrist": frame + 1}, "agent_pos": self.joint, "object": np.ones(3)}

    def step(self, action):
        self.steps += 1
        self.joint = self.joint + action
        return self._see(), float(self.steps), False, False, {"is_success": self.steps == 3}

    def render(self):
        return np.full((5, 5, 3), 77, np.uint8)


class Silent(Arm):
    def step(self, action):
        return (*super().step(action)[:4], {})


class Late(Arm):
    """Says only at an episode's end whether it was a success."""

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, info if info["is_success"] else {}


class Vague(Silent):
    """Reports success for several things at once."""

    def step(self, action):
        return *super().step(action)[:4], {"is_success": {"task": False}}


def gym(env_map=(), make=Arm, **options):
    return GymEnvironment(EnvConfig(env="arm", env_map=env_map, **{"max_steps": 9, **options}), make)


def test_observations_are_found_by_their_names():
    environment = gym()
    environment.reset(5, 2)
    joint = environment.state()
    environment.reset(7, 0)
    np.testing.assert_array_equal(environment.state(), joint)  # seed 7
    assert environment.state().dtype == np.float32
    assert {name: x.shape for name, x in environment.images().items()} == {
        "pixels/top": (6, 8, 3),
        "pixels/wrist": (6, 8, 3),
    }
    assert environment.fps == 25
    ends = [environment.step(np.zeros(2, np.float32)) for _ in range(3)]
    assert ends == [False, False, True]
    assert environment.success()


def test_observations_are_mapped():
    environment = gym(("head=pixels/wrist", "side=render", "state=agent_pos+object"))
    environment.reset(0, 0)
    assert len(environment.state()) == 5
    images = environment.images()
    assert (images["head"][0, 0, 0], images["side"][0, 0, 0]) == (1, 77)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"env_map": ("head=pixels/topp",)}, r"no such observation \(did you mean pixels/top\?\)"),
        ({"env_map": ("head",)}, "--env-map head: write NAME=KEY"),
        ({"max_steps": None}, "give --max-steps"),
        ({"make": Vague}, r"reports is_success as .*, not as true or false: .*--success-reward"),
    ],
)
def test_mappings_and_environments_that_cannot_be_used(options, sentence):
    def use():
        environment = gym(**options)
        environment.reset(0, 0)
        environment.images()
        for _ in range(environment.max_steps):
            environment.step(np.zeros(2, np.float32))

    with pytest.raises(UserError, match=sentence):
        use()


class Several(Arm):
    """Has another instruction in each episode, and pictures that no film can be made of."""

    def reset(self, seed=None, options=None):
        self.task_description = f"reach {seed}"
        return super().reset(seed=seed, options=options)

    def render(self):
        return np.zeros((5, 5), np.float32)


def test_each_episode_has_the_instruction_that_the_environment_gives_it():
    environment = gym(make=Several)
    for episode in (4, 5):
        environment.reset(0, episode)
        assert environment.task == f"reach {episode}"


@pytest.mark.parametrize("render", [Several.render, lambda self: self.undrawn()])
def test_without_a_picture_for_people_the_film_shows_a_camera(render, monkeypatch):
    monkeypatch.setattr(Several, "render", render)
    monkeypatch.setattr(Several, "undrawn", gymnasium.Env.render, raising=False)
    environment = gym(make=Several)
    environment.reset(0, 0)
    np.testing.assert_array_equal(environment.picture(), environment.images()["pixels/top"])


def test_cameras_of_one_name_are_told_apart():
    class Goal(Counter):
        def images(self):
            views = super().images()
            return {"goal/top": views["unused"], "observation/top": views["top"]}

    with pytest.raises(UserError, match=r"two cameras that can be the policy's top, .*--env-map top="):
        roll_out(Policy(), [Goal()], range(1), seed=0)

    class Named(Goal):
        def images(self):
            return super().images() | {"top": np.full((4, 4, 3), 9, np.uint8)}

    policy = Policy()
    roll_out(policy, [Named()], range(1), seed=0)
    assert policy.shown[0] == [9]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nothing = undefined", "--env odd_env:make failed in its construction .*undefined"),
        ("def make(): raise RuntimeError('no licence')", "failed in its construction .no licence"),
        ("def make(): return 3", "--env odd_env:make makes a int, not a gymnasium.Env"),
        ("def make(): import OpenGL", r"failed in its construction \(no libOSMesa\): set MUJOCO_GL=egl"),
    ],
)
def test_environments_that_cannot_be_made(content, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_env", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "OpenGL"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "odd_env.py").write_text(content)
    if "OpenGL" in content:
        (tmp_path / "OpenGL").mkdir()
        (tmp_path / "OpenGL/__init__.py").write_text("raise AttributeError('no libOSMesa')")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=sentence):
        make_environment(EnvConfig(env="odd_env:make", max_steps=3), (8, 8))


def test_limits_of_steps_beyond_a_simulators_own():
    with pytest.raises(UserError, match=r"--max-steps 81: .*demo ends .*after 80 steps"):
        DemoEnvironment(81)
    pytest.importorskip("metaworld")
    environment = make_environment(EnvConfig(env="metaworld:push-v3", max_steps=510), (8, 8))
    environment.reset(0, 0)
    ends = [environment.step(np.zeros(4)) for _ in range(509)]
    assert not any(ends)


def test_a_demonstration_goes_on_after_success():
    environment = DemoEnvironment()
    found = record.attempt(environment, 0, 3, hold=8)
    assert np.abs(found.state[-8] - found.state[-9]).max() > 0
    assert np.linalg.norm(environment.simulator.hands - environment.simulator.targets, axis=-1).max() < 0.02
    assert environment.success()


def test_seeds_of_recordings_share_no_episode():
    starts = []
    for first in (0, record.EPISODES_A_SEED):
        made = record.demonstrate(DemoEnvironment(), 5, first)
        starts.append([next(made).state[0].tolist() for _ in range(5)])
    assert not {tuple(start) for start in starts[0]} & {tuple(start) for start in starts[1]}


def test_success_may_be_told_at_the_end():
    environment = gym(make=Late)
    environment.reset(0, 0)
    assert [environment.step(np.zeros(2, np.float32)) for _ in range(3)] == [False, False, True]
    assert environment.success()


@pytest.mark.parametrize("make", [Late, Silent])
def test_an_episode_without_a_word_about_success_has_failed(make, capsys):
    gymnasium_env._warn_of_silence.cache_clear()
    environment = gym(make=make, max_steps=2)
    for episode in range(2):
        environment.reset(0, episode)
        for _ in range(2):
            environment.step(np.zeros(2, np.float32))
        assert environment.success() is False
    said = capsys.readouterr().out
    assert said.count("warning: --env arm ended an episode without reporting success (info has nothing)") == 1
    assert "--success-reward" in said


def test_gymnasiums_own_limit_of_steps_is_raised():
    make = factory("gymnasium:CartPole-v1", (32, 32), 700)
    assert make().spec.max_episode_steps == 700
    assert factory("gymnasium:CartPole-v1", (32, 32))().spec.max_episode_steps == 500


def test_success_can_be_read_from_the_reward():
    environment = gym(make=Silent, success_reward=2.0)
    environment.reset(0, 0)
    assert [environment.step(np.zeros(2, np.float32)) for _ in range(2)] == [False, True]


def test_actions_for_another_robot_are_refused():
    environment = gym()
    environment.reset(0, 0)
    with pytest.raises(UserError, match=r"takes actions of shape \(2,\), but the policy gives \(7,\)"):
        environment.step(np.zeros(7, np.float32))


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ("gymnasium:CartPole-v9", r"knows no environment CartPole-v9 \(did you mean CartPole"),
        ("no_such_module:make", "there is no module no_such_module"),
        ("math:cosinus", "math has no function cosinus"),
        ("needs_a_package:make", "needs not_installed_anywhere, which is not installed: install it"),
    ],
)
def test_environments_that_do_not_exist(env, sentence, tmp_path, monkeypatch):
    (tmp_path / "needs_a_package.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        make_environment(parse(EnvConfig, ["--env", env], "evaluate.py"), (8, 8))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("head", "--env-map head: write NAME=KEY"),
        ("head=cam_top", "--env-map cam_top: demo has no such camera; it has cam_head, cam_left, cam_right"),
        ("state=hands", "--env-map state: the state of demo is fixed"),
    ],
)
def test_cameras_of_a_simulator_are_renamed_or_refused(entry, sentence):
    renamed = make_environment(EnvConfig(env="demo", env_map=("top=cam_head",)), (64, 64))
    renamed.reset(0, 0)
    assert list(renamed.images()) == ["top"]

    def use():
        environment = make_environment(EnvConfig(env="demo", env_map=(entry,)), (64, 64))
        environment.reset(0, 0)
        environment.images()

    with pytest.raises(UserError, match=sentence):
        use()


def test_a_simulator_that_is_not_installed_says_how(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("metaworld.")]:  # left by another test
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-sim.txt"):
        make_environment(EnvConfig(env="metaworld:push-v3"), (8, 8))


# While training


@pytest.mark.usefixtures("accelerate_reset")
@pytest.mark.parametrize("script", ["train_naive_fm", "train_vfp_moe"])
def test_rollouts_while_training_are_logged_and_change_nothing(script, tiny, tmp_path):
    script = importlib.import_module(script)
    plain = train(script, tiny, tmp_path / "plain", "--steps", "4")
    flags = ("--rollout-every", "2", "--rollout-episodes", "3", "--env", "arm_env:make", "--max-steps", "8")
    acting = train(script, tiny, tmp_path / "acting", "--steps", "4", *flags)
    rows = [row for row in lines(acting, "val") if "rollout/success" in row]
    assert [(row["step"], row["rollout/success"], row["rollout/steps"]) for row in rows] == [
        (2, 1, 6),
        (4, 1, 6),
    ]
    with Image.open(acting / "rollouts.gif") as film:  # six steps of three episodes; the last frames linger
        assert (film.n_frames, film.size) == (6 + 1, (160, 40))
    assert lines(plain) == lines(acting)  # schedule-free RAdam leaves the weights alone for five steps
    one, other = weights(plain, 4), weights(acting, 4)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("accelerate_reset")
def test_rollouts_show_that_the_run_is_alive(tiny, tmp_path, monkeypatch):
    marks = []

    def roll_out(*given, progress, **more):
        run = sys._getframe(1).f_locals["run"]
        marks.append(run.progress_mark)
        return real(*given, progress=lambda n: (progress(n), marks.append(run.progress_mark)), **more)

    real = rollout.roll_out
    monkeypatch.setattr(rollout, "roll_out", roll_out)
    monkeypatch.setattr(rollout, "AT_ONCE", 2)
    flags = ("--rollout-every", "1", "--rollout-episodes", "3", "--env", "arm_env:make", "--max-steps", "8")
    train(train_naive_fm, tiny, tmp_path / "run", "--steps", "1", *flags)
    counts, phases = zip(*marks, strict=True)
    assert np.diff(counts).tolist() == [2, 1]
    assert phases[1:] == ("rollouts", "rollouts")


@pytest.mark.usefixtures("accelerate_reset")
def test_rollouts_need_an_environment(tiny, tmp_path):
    with pytest.raises(UserError, match="--rollout-every needs --env"):
        train(train_naive_fm, tiny, tmp_path / "run", "--steps", "1", "--rollout-every", "1")


@pytest.mark.usefixtures("accelerate_reset")
def test_rollouts_in_an_environment_that_does_not_fit_are_refused_before_training(
    tiny, tmp_path, monkeypatch
):
    flags = ("--rollout-every", "2", "--env", "arm_env:make", "--max-steps", "8")
    monkeypatch.setattr(Arena, "action_space", gymnasium.spaces.Box(-1, 1, (2,), np.float32))
    with pytest.raises(UserError, match="takes the actions 0, 1, and the policy gives"):
        train(train_naive_fm, tiny, tmp_path / "run", "--steps", "2", *flags, "--rollout-episodes", "1")
    monkeypatch.undo()
    for mapped, sentence in (("front=render", "has the cameras front, and"), ("head=images/x", "no such")):
        with pytest.raises(UserError, match=sentence):
            train(train_naive_fm, tiny, tmp_path / "run", "--steps", "2", *flags, "--env-map", mapped)
        assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("accelerate_reset")
def test_an_environment_that_fails_costs_a_rate_and_not_the_run(tiny, tmp_path, monkeypatch, capsys):
    plain, resets, reset = train(train_naive_fm, tiny, tmp_path / "plain", "--steps", "3"), [], Arena.reset

    def fails(self, **given):
        resets.append(given)
        if len(resets) == 4:  # the first of the second rollout; one is made before training
            raise RuntimeError("contacts diverged")
        return reset(self, **given)

    monkeypatch.setattr(Arena, "reset", fails)
    flags = ("--rollout-every", "1", "--rollout-episodes", "2", "--env", "arm_env:make", "--max-steps", "8")
    acting = train(train_naive_fm, tiny, tmp_path / "acting", "--steps", "3", *flags)
    assert [row["step"] for row in lines(acting, "val") if "rollout/success" in row] == [1, 3]
    said = capsys.readouterr().out
    assert "warning: no success rate at step 2: --env arm_env:make failed in the reset of episode 0" in said
    assert lines(plain) == lines(acting)
    one, other = weights(plain, 3), weights(acting, 3)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("accelerate_reset")
def test_an_environment_that_seeds_torch_does_not_change_the_training(tiny, tmp_path, monkeypatch):
    def reset(self, *, seed=None, options=None, real=Arena.reset):
        torch.manual_seed(seed)
        return real(self, seed=seed)

    monkeypatch.setattr(Arena, "reset", reset)
    runs = []
    for name, flags in (("plain", ()), ("acting", ("--rollout-every", "1", "--env", "arm_env:make"))):
        more = ("--steps", "3", "--rollout-episodes", "1", "--max-steps", "2", *flags)
        runs.append(lines(train(train_naive_fm, tiny, tmp_path / name, *more)))
    assert runs[0] == runs[1]


def test_recorded_pictures_stay_as_they_were():
    """An environment may draw every picture into the same array."""
    from common.envs.record import perform

    picture = np.zeros((4, 4, 3), np.uint8)

    class Environment:
        task = "count"
        success = lambda self: False  # noqa: E731
        state = lambda self: picture[0, 0].astype(np.float32)  # noqa: E731
        images = lambda self: {"head": picture}  # noqa: E731

        def step(self, action):
            picture[:] += 1
            return False

    recorded = perform(Environment(), lambda: np.zeros(2, np.float32), steps=3)
    assert recorded.images["head"][:, 0, 0, 0].tolist() == [0, 1, 2]
