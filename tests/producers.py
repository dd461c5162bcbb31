"""Small files like those of other projects' recorders: names, shapes, types, attributes, compression.

Step i of a dataset shows picture i; the parts of state and action that a policy gets are those of
`lerobot_factory`. Everything else that the recorder stores is there too, filled with values of no step.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
from hdf5_factory import write_images
from lerobot_factory import action_of, draw, state_of

SIZE = (32, 48)
OTHER = 1000.0  # value of everything that a policy does not get


def pictures(steps: np.ndarray, camera: int = 0) -> np.ndarray:
    return np.stack([draw(int(step), camera, SIZE) for step in steps])


def other(steps: np.ndarray, *width: int, dtype: str = "f8") -> np.ndarray:
    return np.full((len(steps), *width), OTHER, dtype)


def aloha(file: Path, steps: np.ndarray, compressed: bool = False, base: bool = False) -> None:
    """ACT's `record_sim_episodes.py` and ALOHA's `record_episodes.py`; with `base`, Mobile ALOHA's."""
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    with h5py.File(file, "w", rdcc_nbytes=2**21) as root:
        root.attrs["sim"], root.attrs["compress"] = not base, compressed
        action = action_of(steps, 16 if base else 14)
        root["observations/qpos"], root["action"] = state_of(steps, 14), action[:, :14]
        root["observations/qvel"], root["observations/effort"] = other(steps, 14), other(steps, 14)
        if base:
            root["base_action"] = action[:, 14:]
        images = root.create_group("observations/images")
        for number, camera in enumerate(cameras):
            if compressed:
                write_images(images, camera, pictures(steps, number), "padded", "JPEG")
            else:
                images.create_dataset(camera, data=pictures(steps, number), chunks=(1, *SIZE, 3))
        if compressed:
            root["compress_len"] = np.full((len(cameras), len(steps)), 999.0)


def robomimic(file: Path, lengths: tuple[int, ...], cameras: bool = True) -> None:
    """robomimic's `dataset_states_to_obs.py`, after `split_train_val.py`."""
    first = 0
    with h5py.File(file, "w") as root:
        data = root.create_group("data")
        data.attrs["total"] = sum(lengths)
        env = {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": {"control_freq": 20}}
        data.attrs["env_args"] = json.dumps(env, indent=4)
        for number, length in enumerate(lengths):
            steps, demo = np.arange(first, first + length), data.create_group(f"demo_{number}")
            first += length
            demo.attrs["num_samples"], demo.attrs["model_file"] = length, "<mujoco/>"
            demo["actions"], demo["states"] = action_of(steps, 7).astype("f8"), other(steps, 32)
            demo["rewards"], demo["dones"] = other(steps), other(steps, dtype="i8")
            for group, later in (("obs", 0), ("next_obs", 1)):
                state = state_of(steps + later, 9).astype("f8")
                found = {
                    "robot0_eef_pos": state[:, :3],
                    "robot0_eef_quat": state[:, 3:7],
                    "robot0_gripper_qpos": state[:, 7:],
                    "robot0_joint_pos": other(steps, 7),
                    "object": other(steps, 10),
                }
                if cameras:
                    found["agentview_image"] = pictures(steps + later, 0)
                    found["robot0_eye_in_hand_image"] = pictures(steps + later, 1)
                for key, values in found.items():
                    demo.create_dataset(f"{group}/{key}", data=values, compression="gzip")
        names = [f"demo_{number}".encode() for number in range(len(lengths))]
        root["mask/train"], root["mask/valid"] = np.array(names[:-1]), np.array(names[-1:])


def libero(file: Path, lengths: tuple[int, ...], first: int = 0) -> None:
    """LIBERO's `create_dataset.py`."""
    with h5py.File(file, "w") as root:
        data = root.create_group("data")
        data.attrs["num_demos"], data.attrs["total"], data.attrs["tag"] = (
            len(lengths),
            sum(lengths),
            "libero-v1",
        )
        data.attrs["macros_image_convention"], data.attrs["env_name"] = "opengl", "Libero_Kitchen"
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["turn on the stove"]})
        for number, length in enumerate(lengths):
            steps, demo = np.arange(first, first + length), data.create_group(f"demo_{number}")
            first += length
            demo.attrs["num_samples"], demo.attrs["init_state"] = str(length), np.zeros(45)
            state = state_of(steps, 8).astype("f8")
            demo["actions"], demo["states"] = action_of(steps, 7).astype("f8"), other(steps, 45)
            demo["robot_states"] = other(steps, 9)
            demo["rewards"], demo["dones"] = np.zeros(length, "u1"), np.zeros(length, "u1")
            obs = demo.create_group("obs")
            obs["ee_states"], obs["gripper_states"] = state[:, :6], state[:, 6:]
            obs["ee_pos"], obs["ee_ori"], obs["joint_states"] = (
                other(steps, 3),
                other(steps, 3),
                other(steps, 7),
            )
            obs["agentview_rgb"], obs["eye_in_hand_rgb"] = pictures(steps, 0), pictures(steps, 1)


def maniskill(file: Path, lengths: tuple[int, ...], obs_mode: str = "rgb+depth+segmentation") -> None:
    """ManiSkill's `RecordEpisode`: one more observation than actions, and a JSON file next to it."""
    first, episodes = 0, []
    with h5py.File(file, "w") as root:
        for number, length in enumerate(lengths):
            steps, after = np.arange(first, first + length), np.arange(first, first + length + 1)
            first += length
            traj = root.create_group(f"traj_{number}", track_order=True)
            obs = traj.create_group("obs", track_order=True)
            obs["agent/qpos"], obs["agent/qvel"] = state_of(after, 9), other(after, 9, dtype="f4")
            obs["extra/tcp_pose"], obs["extra/is_grasped"] = other(after, 7, dtype="f4"), other(after) > 0
            for camera_number, camera in enumerate(("base_camera", "hand_camera")):
                for key in ("extrinsic_cv", "cam2world_gl", "intrinsic_cv"):
                    obs[f"sensor_param/{camera}/{key}"] = other(after, 3, 4, dtype="f4")
                kinds = {"rgb": pictures(after, camera_number)}
                kinds["depth"] = kinds["segmentation"] = np.full((length + 1, *SIZE, 1), 700, "i2")
                for kind, values in kinds.items():
                    if kind in obs_mode:
                        place = f"sensor_data/{camera}/{kind}"
                        obs.create_dataset(place, data=values, compression="gzip", compression_opts=5)
            traj["actions"] = action_of(steps, 8)
            for key in ("terminated", "truncated", "success"):
                traj[key] = np.zeros(length, bool)
            traj["env_states/actors/cube"], traj["env_states/articulations/panda"] = (
                other(after, 13, dtype="f4"),
                other(after, 31, dtype="f4"),
            )
            traj["rewards"] = other(steps, dtype="f4")
            episodes.append({"episode_id": number, "episode_seed": number, "elapsed_steps": length})
    env = {
        "env_id": "PickCube-v1",
        "env_kwargs": {"obs_mode": obs_mode, "control_mode": "pd_joint_delta_pos"},
    }
    file.with_suffix(".json").write_text(json.dumps({"env_info": env, "episodes": episodes}))


def replay_buffer(path: Path, lengths: tuple[int, ...], arrays: dict[str, np.ndarray]) -> None:
    """`ReplayBuffer.save_to_path` of diffusion_policy: zarr 2, Blosc."""
    import zarr
    from numcodecs import Blosc

    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.create_group("meta").create_array("episode_ends", data=np.cumsum(lengths))
    data = root.create_group("data")
    for key, values in arrays.items():
        codec = Blosc("zstd", clevel=5, shuffle=Blosc.BITSHUFFLE)
        data.create_array(key, data=values, chunks=(7, *values.shape[1:]), compressors=codec)


def push_t(path: Path, lengths: tuple[int, ...]) -> None:
    """diffusion_policy's pusht_cchi_v7_replay.zarr: everything in float32, even images."""
    steps = np.arange(sum(lengths))
    arrays = {
        "action": action_of(steps, 2),
        "img": pictures(steps).astype("f4"),
        "keypoint": other(steps, 9, 2, dtype="f4"),
        "n_contacts": other(steps, 1, dtype="f4"),
        "state": state_of(steps, 5),
    }
    replay_buffer(path, lengths, arrays)


def umi(path: Path, lengths: tuple[int, ...]) -> None:
    """UMI's `07_generate_replay_buffer.py`, its images in Blosc."""
    steps = np.arange(sum(lengths))
    state = state_of(steps, 7)
    arrays = {
        "camera0_rgb": pictures(steps),
        "robot0_demo_end_pose": other(steps, 6),
        "robot0_demo_start_pose": other(steps, 6),
        "robot0_eef_pos": state[:, :3],
        "robot0_eef_rot_axis_angle": state[:, 3:6],
        "robot0_gripper_width": state[:, 6:],
    }
    replay_buffer(path, lengths, arrays)
