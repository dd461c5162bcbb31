"""The simulators as LeRobot's environments, with the images, episodes and scores of `common/envs`."""

import numpy as np
import pytest

pytest.importorskip("lerobot.envs.configs")

from lerobot.configs import FeatureType
from lerobot.envs import make_env_config
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features, preprocess_observation

import lerobot_env_flow
from common.envs import EnvConfig, make_environment
from common.errors import UserError

TASKS = {
    "metaworld:push-v3": ("metaworld", 80, 4, 4, {"corner2", "gripper"}),
    "aloha:transfer-cube": ("gym_aloha", 50, 14, 14, {"top", "left_wrist", "right_wrist"}),
}


def environment(task, count=2, **more):
    more = {"observation_height": 40, "observation_width": 48, "episode_length": 3} | more
    config = make_env_config("flow", task=task, **more)
    return config, config.create_envs(count)["flow"][0]


@pytest.mark.parametrize("task", TASKS)
def test_lerobot_sees_the_pictures_and_states_of_our_environments(task):
    package, fps, state, action, cameras = TASKS[task]
    pytest.importorskip(package)
    config, envs = environment(task)
    features = env_to_policy_features(config)
    pictures = {key for key, feature in features.items() if feature.type is FeatureType.VISUAL}
    assert pictures == {f"observation.images.{camera}" for camera in cameras}
    assert all(features[key].shape == (3, 40, 48) for key in pictures)
    assert features["observation.state"].shape == (state,)
    assert features["action"].shape == (action,)
    assert config.fps == fps
    observation, _ = envs.reset(seed=[7, 8], options={NEW_ROLLOUT_OPTION: True})
    actions = np.zeros((2, action), np.float32)
    after, *_ = envs.step(actions)
    ours = make_environment(EnvConfig(env=task), (40, 48))
    for episode in range(2):
        ours.reset(7, episode)  # `evaluate.py`'s seed, and the number of its episode
        for seen in (observation, after):
            np.testing.assert_array_equal(seen["agent_pos"][episode], ours.state())
            for camera, picture in ours.images().items():
                np.testing.assert_array_equal(seen["pixels"][camera][episode], picture)
            ours.step(actions[0])
    assert preprocess_observation(after).keys() == pictures | {"observation.state"}
    assert envs.call("task_description")[0] == ours.task
    assert envs.call("_max_episode_steps") == (3, 3)
    assert envs.call("render")[0].shape == (40, 48, 3)
    envs.close()


def test_success_counts_at_the_end_and_what_is_over_waits(monkeypatch):
    pytest.importorskip("gym_aloha")
    _, envs = environment("aloha:transfer-cube", count=1)
    monkeypatch.setattr(type(envs.envs[0].unwrapped.simulator), "success", lambda self: True)
    envs.reset(seed=0, options={NEW_ROLLOUT_OPTION: True})
    action, found = np.zeros((1, 14), np.float32), []
    for _ in range(5):
        _, reward, terminated, truncated, info = envs.step(action)
        found.append((reward[0], terminated[0], truncated[0], info["is_success"][0]))
    assert found[0] == found[1] == (0.0, False, False, False)  # holding too early does not count
    assert found[2] == (1.0, False, True, True)
    steps = envs.envs[0].unwrapped.steps
    assert steps == 3  # steps after the end are not simulated
    envs.close()


@pytest.mark.parametrize("task", ["demo", "push-v3", "", None])
def test_what_is_not_there_is_named(task):
    with pytest.raises(UserError, match="give metaworld:TASK or aloha:TASK"):
        lerobot_env_flow.FlowEnv(task=task)


def test_a_task_that_does_not_exist_is_named():
    pytest.importorskip("metaworld")
    with pytest.raises(UserError, match="has no task pusch-v3"):
        lerobot_env_flow.FlowEnv(task="metaworld:pusch-v3")
