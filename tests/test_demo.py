import json

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from common.data import demo


def drive(simulator, command):
    """Run episodes to their end under `command(simulator) -> (E, 4)`."""
    while not simulator.done.all():
        simulator.step(command(simulator))
    return simulator


def expert(simulator, sides, seed=0):
    rng = np.random.default_rng(seed)

    def command(s):
        noise = rng.normal(0, demo.EXPERT_NOISE, (len(s.hands), 4))
        return demo.expert_action(s.hands, s.targets, sides) + noise

    return drive(simulator, command)


def test_the_constants_that_define_the_task():
    """Success rates are compared across methods and versions: these numbers never change."""
    assert demo.OBSTACLES.tolist() == [[-0.5, 0.0], [0.5, 0.0]]
    assert (demo.OBSTACLE_RADIUS, demo.SPEED_LIMIT, demo.SUCCESS_DISTANCE) == (0.28, 0.08, 0.1)
    assert (80, pytest.approx(0.4), 0.004) == (demo.MAX_STEPS, demo.EXPERT_RADIUS, demo.EXPERT_NOISE)
    simulator = demo.Simulator(4000, seed=1)
    for values, low, high in (
        (simulator.hands[..., 0] - [-0.5, 0.5], -0.2, 0.2),
        (simulator.targets[..., 0] - [-0.5, 0.5], -0.3, 0.3),
        (simulator.targets[..., 1] - 0.75, -0.1, 0.1),
    ):
        assert low <= values.min() < 0.98 * low
        assert 0.98 * high < values.max() <= high
    assert (simulator.hands[..., 1] == -0.8).all()


def test_the_expert_succeeds_on_the_side_it_was_told():
    sides = np.random.default_rng(0).choice([-1, 1], (1000, 2))
    simulator = expert(demo.Simulator(1000, seed=2), sides)
    assert simulator.success.mean() >= 0.99
    assert (simulator.sides == sides)[simulator.success].all()


def test_the_straight_way_collides():
    simulator = drive(demo.Simulator(1000, seed=3), lambda s: s.targets.reshape(-1, 4))
    assert simulator.success.mean() <= 0.05


def test_the_average_of_the_modes_collides():
    """A policy that averages demonstrations takes the mean of going left and going right."""

    def average(s):
        ones = np.ones((len(s.hands), 2), int)
        return (
            demo.expert_action(s.hands, s.targets, ones) + demo.expert_action(s.hands, s.targets, -ones)
        ) / 2

    assert drive(demo.Simulator(500, seed=4), average).success.mean() <= 0.05


def test_without_knowing_the_targets_one_fails():
    """The targets' mean position is the best guess of a policy that does not look at the images."""

    def blind(s):
        guess = np.broadcast_to([[-0.5, 0.75], [0.5, 0.75]], s.hands.shape)
        return demo.expert_action(s.hands, guess, np.ones((len(s.hands), 2), int))

    assert drive(demo.Simulator(1000, seed=5), blind).success.mean() < 0.15


def test_no_speed_jumps_over_an_obstacle_and_the_speed_limit_holds():
    simulator = demo.Simulator(1, seed=0)
    simulator.hands = np.array([[[-0.5 + 0.279, -0.03], [0.5, -0.8]]])  # cuts the rim within one step
    simulator.step(np.array([[-0.5 + 0.279, 5.0, 0.5, -0.8]]))
    assert simulator.collided[0]
    simulator = demo.Simulator(1, seed=0)
    before = simulator.hands.copy()
    simulator.step(np.array([[9.0, -9.0, 0.5, -0.8]]))
    assert np.linalg.norm(simulator.hands - before, axis=-1).max() == pytest.approx(demo.SPEED_LIMIT)


def test_episodes_depend_on_seed_and_number_alone():
    few, many = demo.Simulator(3, seed=9), demo.Simulator(50, seed=9)
    assert (few.targets == many.targets[:3]).all()
    assert not (few.targets == demo.Simulator(3, seed=10).targets).any()


def test_ended_episodes_stand_still_and_success_needs_both_hands():
    simulator = demo.Simulator(2, seed=0)
    simulator.hands[0] = simulator.targets[0]
    simulator.hands[1, 0] = simulator.targets[1, 0]
    command = simulator.hands.reshape(2, 4).copy()
    simulator.step(command)
    assert simulator.success.tolist() == [True, False]
    simulator.step(command + 0.05)
    assert (simulator.hands[0] == simulator.targets[0]).all()
    assert simulator.steps.tolist() == [1, 2]


def test_commands_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        demo.Simulator(1, seed=0).step(np.full((1, 4), np.nan))


def test_cameras_show_the_target_where_it_is():
    """The centre of mass of the pixels of the left target's colour, in world coordinates."""
    simulator = demo.Simulator(5, seed=0)
    views = demo.render(simulator.hands, simulator.targets, 64).astype(float)
    reds = (views[:, 0, ..., 0] > 1.8 * views[:, 0, ..., 1]) & (views[:, 0, ..., 2] < 100)
    for mask, target in zip(reds, simulator.targets[:, 0], strict=True):
        rows, columns = mask.nonzero()
        x, y = (columns.mean() + 0.5) / 32 - 1, 1 - (rows.mean() + 0.5) / 32
        assert np.abs(demo.HEAD_EXTENT * np.array([x, y]) - target).max() < 0.02


def test_a_hands_camera_moves_with_the_hand():
    simulator = demo.Simulator(1, seed=0)
    before = demo.render(simulator.hands, simulator.targets)[0]
    simulator.hands[0, 0] += 0.1
    after = demo.render(simulator.hands, simulator.targets)[0]
    centre = slice(29, 35)
    assert (after[1, centre, centre] == before[1, centre, centre]).all()  # the hand stays in the middle
    assert (after[2] == before[2]).all()  # the other hand's close-up does not change
    assert (after[0] != before[0]).any()


def test_the_environment_follows_gymnasium():
    env = demo.BimanualEnv()
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=3)
    assert observation["images"]["cam_head"].shape == (64, 64, 3)
    sides = np.array([[1, -1]])
    terminated = truncated = False
    while not (terminated or truncated):
        action = demo.expert_action(env.simulator.hands, env.simulator.targets, sides)[0]
        observation, reward, terminated, truncated, info = env.step(action)
    assert reward == 1
    assert info["success"]
    assert info["sides"].tolist() == [1, -1]
    assert env.render().shape == (256, 256, 3)


def test_demonstrations_show_all_modes_and_come_to_rest():
    episodes = list(demo.demonstrate(60, seed=0))
    sides = []
    for episode in episodes:
        assert episode.state.shape == episode.action.shape == (len(episode.images["cam_head"]), 4)
        crossing = np.abs(episode.state[:, [1, 3]]).argmin(0)
        sides.append(tuple(np.sign(episode.state[crossing, [0, 2]] - [-0.5, 0.5])))
        assert np.abs(episode.state[-1] - episode.state[-3]).max() < 0.03
        moved = np.abs(np.diff(episode.state, axis=0))
        # the action is where the hand is one step later
        np.testing.assert_allclose(episode.action[:-1], episode.state[1:], atol=1e-6)
        assert moved.max() <= demo.SPEED_LIMIT
    assert {sides.count(mode) > 5 for mode in set(sides)} == {True}
    assert len(set(sides)) == 4


def test_the_recording_is_a_lerobot_dataset(tmp_path):
    root = demo.record(tmp_path / "demo", demo.demonstrate(2, seed=0))
    info = json.loads((root / "meta" / "info.json").read_text())
    assert info["codebase_version"].startswith("v3")
    assert info["total_episodes"] == 2
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("demo/bimanual", root=root)
    episode = next(demo.demonstrate(2, seed=0))
    item = dataset[5]
    np.testing.assert_allclose(item["observation.state"], episode.state[5])
    np.testing.assert_allclose(item["action"], episode.action[5])
    pixels = (item["observation.images.cam_left"].permute(1, 2, 0).numpy() * 255).round()
    assert (pixels == episode.images["cam_left"][5]).all()
