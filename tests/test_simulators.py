"""The public simulators, where they are installed and can render: `make sim`."""

import numpy as np
import pytest

from common.data import DataConfig, open_dataset
from common.envs import EnvConfig, make_environment, record
from common.errors import UserError

NAMES = {
    "metaworld:push-v3": (("corner2", "gripper"), 4, 4),
    "aloha:transfer-cube": (("top", "left_wrist", "right_wrist"), 14, 14),
    "aloha:insertion": (("top", "left_wrist", "right_wrist"), 14, 14),
    "pusht": (("pixels",), 2, 2),
}


@pytest.fixture(scope="module", params=NAMES)
def environment(request):
    packages = {"metaworld": "metaworld", "aloha": "gym_aloha", "pusht": "gym_pusht"}
    pytest.importorskip(packages[request.param.partition(":")[0]])
    environment = make_environment(EnvConfig(env=request.param), (48, 64))
    try:
        environment.reset(0, 0)
    except UserError as error:
        pytest.skip(str(error))
    return environment


def test_an_episode_is_a_function_of_its_seed(environment):
    cameras, state_dim, action_dim = NAMES[environment.name]

    def start(seed, episode):
        environment.reset(seed, episode)
        first = environment.state(), environment.images()
        rng = np.random.default_rng(0)
        low, high = (100, 400) if environment.name == "pusht" else (-0.3, 0.3)
        for _ in range(5):
            environment.step(rng.uniform(low, high, action_dim).astype(np.float32))
        return *first, environment.state()

    state, images, later = start(3, 1)
    assert state.shape == (state_dim,)
    assert state.dtype == np.float32
    assert {name: (x.shape, x.dtype) for name, x in images.items()} == {
        camera: ((48, 64, 3), np.uint8) for camera in cameras
    }
    assert all(x.std() > 5 for x in images.values())  # images are not blank
    again, _, later_again = start(3, 1)
    np.testing.assert_array_equal(state, again)
    np.testing.assert_array_equal(later, later_again)
    _, other, _ = start(4, 1)
    assert not np.array_equal(other[cameras[0]], images[cameras[0]])  # objects are placed differently
    assert not np.array_equal(later, state)
    assert not environment.success()


@pytest.mark.parametrize("task", ["push-v3", "pick-place-v3", "assembly-v3", "peg-insert-side-v3"])
def test_the_first_pictures_show_the_goal_of_their_own_episode(task):
    mujoco = pytest.importorskip("mujoco")
    pytest.importorskip("metaworld")
    environment = make_environment(EnvConfig(env=f"metaworld:{task}"), (96, 96))
    for episode in range(2):
        environment.reset(0, episode)
        first = environment.images()
        mujoco.mj_forward(environment._env.model, environment._env.data)  # brings everything to its place
        for camera, picture in environment.images().items():
            np.testing.assert_array_equal(picture, first[camera])


@pytest.mark.parametrize("name", ["metaworld:push-v3", "aloha:transfer-cube", "aloha:insertion"])
def test_experts_succeed(name):
    pytest.importorskip("metaworld" if name.startswith("m") else "gym_aloha")
    environment = make_environment(EnvConfig(env=name), (32, 32))
    wins, fastest = 0, 0.0
    for episode in range(5):
        environment.reset(100, episode)
        act, actions = environment.expert(), []
        for _ in range(environment.max_steps):
            actions.append(act())
            if environment.step(actions[-1]):
                break
        wins += environment.success()
        if name.startswith("aloha"):  # all joints but the grippers
            fastest = max(fastest, np.abs(np.diff(np.delete(actions, (6, 13), axis=1), axis=0)).max())
    assert fastest * environment.fps < 3  # rad/s: faster ones are none to imitate
    assert wins >= 4


@pytest.mark.parametrize("task", ["transfer-cube", "insertion"])
def test_alohas_experts_take_over_from_where_the_arms_are(task):
    pytest.importorskip("gym_aloha")
    environment = make_environment(EnvConfig(env=f"aloha:{task}"), (32, 32))
    environment.reset(100, 0)
    act = environment.expert()
    for _ in range(60):
        environment.step(act())
    first, state = environment.expert()(), environment.state()
    assert np.abs(np.delete(first - state, (6, 13))).max() < 0.05


@pytest.mark.slow
def test_recordings_are_a_function_of_the_seed_and_can_be_opened(tmp_path):
    pytest.importorskip("metaworld")
    stores = []
    for name in ("one", "two"):
        config = record.Config("metaworld:push-v3", tmp_path / name, episodes=2, image_size=(32,))
        record.main(config)
        data = DataConfig(dataset=(str(tmp_path / name),), cache_dir=tmp_path / "cache")
        stores.append(open_dataset(data))
    for part in ("state", "action", "episode_starts"):
        np.testing.assert_array_equal(getattr(stores[0], part), getattr(stores[1], part))
    rows = np.arange(stores[0].num_steps)
    assert (stores[0].images(rows) == stores[1].images(rows)).all()
    assert stores[0].cameras == ("corner2", "gripper")
    assert stores[0].state_names == ("x", "y", "z", "gripper")
    assert stores[0].task == "push"
    with pytest.raises(UserError, match="already exists"):
        record.main(config)


def test_what_an_expert_cannot_do_is_not_recorded(tmp_path):
    pytest.importorskip("gym_pusht")
    with pytest.raises(UserError, match="pusht has no expert"):
        record.main(record.Config("pusht", tmp_path / "none", episodes=1))


def test_tasks_that_do_not_exist():
    pytest.importorskip("metaworld")
    with pytest.raises(UserError, match=r"no task pick-plce-v3 \(did you mean pick-place-v3\?\)"):
        make_environment(EnvConfig(env="metaworld:pick-plce-v3"), (8, 8))
