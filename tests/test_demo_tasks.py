"""The built-in task with instructions: what it asks for, and that it cannot be done without them."""

import numpy as np
import pytest
from test_demo import drive

from common.data import demo
from common.data.demo_tasks import COLORS, TASKS, TasksSimulator
from common.envs import EnvConfig, make_environment
from common.errors import UserError


def expert(simulator, aim=TasksSimulator.aim, seed=0):
    """Drive with the demonstrator, its hands heading for `aim(simulator)`."""
    rng = np.random.default_rng(seed)
    sides = rng.choice([-1, 1], (len(simulator.hands), 2))

    def command(s):
        noise = rng.normal(0, demo.EXPERT_NOISE, (len(s.hands), 4))
        return demo.expert_action(s.hands, aim(s), sides) + noise

    return drive(simulator, command)


def test_sixteen_instructions_by_turns():
    assert len(TASKS) == 16
    assert TASKS[1] == "left to red, right to blue"
    simulator = TasksSimulator(20, seed=5)
    assert simulator.tasks == [*TASKS, *TASKS[:4]]
    assert TasksSimulator(3, seed=5, first=7).tasks == list(TASKS[7:10])
    assert (TasksSimulator(3, seed=5, first=7).drawn == simulator.drawn[7:10]).all()
    # The constants equal those of the task with one target per hand.
    assert (simulator.hands == demo.Simulator(20, seed=5).hands).all()
    x, y = np.moveaxis(simulator.drawn.reshape(20, 2, 4, 2), -1, 0)
    assert (np.abs(x - demo.OBSTACLES[:, :1]) <= demo.TARGET_X_SPREAD + 1e-9).all()
    assert (np.abs(y - demo.TARGET_Y) <= demo.TARGET_Y_SPREAD).all()
    assert len({tuple(np.argsort(row).tolist()) for row in x.reshape(-1, 4)}) > 10  # their order varies


def test_the_colours_are_where_the_instruction_means_them():
    simulator = TasksSimulator(16, seed=1)
    simulator.hands[:] = 3  # outside the image
    views = simulator.images()[:, 0]
    for i, (left, right) in enumerate((left, right) for left in COLORS for right in COLORS):
        for arm, color in enumerate((left, right)):
            x, y = simulator.targets[i, arm] / demo.HEAD_EXTENT
            row, column = int((1 - y) * 32), int((x + 1) * 32)
            assert views[i, row, column].tolist() == list(COLORS[color])


def test_the_expert_does_what_it_is_told():
    simulator = expert(TasksSimulator(320, seed=2))
    assert simulator.success.mean() > 0.99
    assert not simulator.wrong.any()
    assert not simulator.collided.any()


def test_without_the_instruction_nobody_exceeds_chance():
    """The demonstrator heads for another instruction's targets, or drives along all of them."""
    others = np.random.default_rng(0).integers(16, size=3200)

    def guess(simulator):
        places = simulator.drawn.reshape(-1, 2, 4, 2)
        asked = np.stack([others // 4, others % 4], 1)
        told = TasksSimulator.aim
        simulator.targets, own = (
            np.take_along_axis(places, asked[:, :, None, None], 2)[:, :, 0],
            simulator.targets,
        )
        aim = told(simulator)
        simulator.targets = own
        return aim

    simulator = expert(TasksSimulator(3200, seed=3), guess)
    assert simulator.success.mean() == pytest.approx(1 / 16, abs=0.013)  # three standard deviations
    assert simulator.wrong.mean() > 0.9

    def along(s):
        """Along all four targets of each side, at their mean height."""
        first, last = demo.OBSTACLES + np.array([-0.45, 0.5]), demo.OBSTACLES + np.array([0.4, 0.75])
        return np.where(s.hands[..., 1:] < 0.4, first, np.broadcast_to(last, s.hands.shape))

    assert expert(TasksSimulator(800, seed=4), along).success.mean() < 1 / 16 + 0.026


def test_an_answer_ends_the_episode():
    simulator = TasksSimulator(2, seed=0)
    places = simulator.drawn.reshape(2, 2, 4, 2)
    simulator.hands[:, 0], simulator.hands[:, 1] = places[:, 0, 0], places[:, 1, 1]  # left red, right blue
    simulator.step(simulator.hands.reshape(2, 4).copy())
    assert simulator.tasks == ["left to red, right to red", "left to red, right to blue"]
    assert simulator.success.tolist() == [False, True]
    assert simulator.wrong.tolist() == [True, False]
    assert simulator.done.all()


def test_the_environment_says_its_task_and_has_an_expert():
    environment = make_environment(EnvConfig(env="demo-tasks"), (64, 64))
    for episode in (3, 8):
        environment.reset(7, episode)
        assert environment.task == TASKS[episode]
        act, over = environment.expert(), False
        while not over:
            over = environment.step(act())
        assert environment.success()
        facts = environment.facts()
        assert (facts["collision"], facts["timeout"], facts["wrong_target"]) == (False, False, False)
        assert set(environment.images()) == set(demo.CAMERAS)
    assert environment.picture().shape == (144, 144, 3)
    only = make_environment(EnvConfig(env=f"demo-tasks:{TASKS[5]}"), (64, 64))
    starts = []
    for episode in (0, 1, 2):
        only.reset(7, episode)
        assert only.task == TASKS[5]
        starts.append(only.state().tolist())
    assert starts[0] != starts[1] != starts[2]
    with pytest.raises(UserError, match="demo-tasks has no task left to black"):
        make_environment(EnvConfig(env="demo-tasks:left to black"), (64, 64))


def test_demonstrations_come_to_rest_on_what_was_asked():
    episodes = list(demo.demonstrate(16, seed=0, kind=TasksSimulator))
    targets = TasksSimulator(16, seed=0).targets
    for i, episode in enumerate(episodes):
        assert episode.task == TASKS[i]
        assert len(episode.state) < demo.MAX_STEPS - 10
        assert np.abs(episode.state[-1] - targets[i].reshape(4)).max() < 0.03
