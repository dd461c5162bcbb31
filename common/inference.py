"""A trained policy for a robot: camera images and joint states in, actions in recorded units out.

policy = load_policy("runs/vfp-20260301-101500")
chunk = policy.act({"images": {"head": rgb, "left": rgb, "right": rgb}, "state": joints})    # (T, A)
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import PolicySpec, find, load_components, read_settings
from common.config import from_dict
from common.data.frames import resize_rgb
from common.data.lerobot import short_name
from common.errors import UserError
from common.normalize import Normalizer

ROOT = Path(__file__).resolve().parents[1]


def load_policy(
    run: str | Path,
    checkpoint: str = "last",
    device: str | torch.device | None = None,
    seed: int | None = None,
) -> "RobotPolicy":
    """Load a run's policy, ready to act.

    Args:
        run: run folder, as printed by the training script.
        checkpoint: `last`, or the number of a saved step.
        device: where to compute; the accelerator if there is one, else the CPU.
        seed: makes sampled actions repeatable; None draws new noise on every start.

    Raises:
        UserError: if the run or checkpoint is missing, damaged, or of a script that is not here.
    """
    path = find(Path(run), checkpoint)
    settings = read_settings(path)
    spec = PolicySpec.from_json(settings["spec"])
    module = load_script(settings["script"])
    config = from_dict(module.Config, settings["config"])
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = module.Policy(config, spec, pretrained=False)
    load_components(model, path / "policy")
    normalizer = Normalizer.load(path / "policy" / "stats.safetensors", config.normalization)
    policy = RobotPolicy(model, normalizer, config, spec, module.sample_actions, torch.device(device), seed)
    policy.checkpoint, policy.trained_steps = path, settings["step"]
    return policy


def load_script(name: str):
    """Import a training script of this project by the name that a checkpoint gives.

    A checkpoint may come from anywhere, so its word is not a path: only a `train_*.py` that lies beside
    `common/` is imported.
    """
    stem = Path(name).stem
    path = ROOT / f"{stem}.py"
    if (
        Path(name).name != name
        or not stem.startswith("train_")
        or not stem.isidentifier()
        or not path.is_file()
    ):
        there = ", ".join(sorted(p.name for p in ROOT.glob("train_*.py")))
        raise UserError(f"The policy was trained by {name!r}, which is not in {ROOT}; there are {there}.")
    if stem not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(stem, path)
        sys.modules[stem] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(sys.modules[stem])
    return sys.modules[stem]


class RobotPolicy:
    """Samples action chunks from observations as a robot delivers them.

    Attributes:
        spec: what the policy knows of its data: `cameras`, `image_size`, `state_names`, `action_names`,
            `fps` (a chunk's actions are 1 / fps seconds apart).
        horizon: T, actions in a chunk.
        checkpoint, trained_steps: where the weights come from.
    """

    def __init__(
        self, model, normalizer: Normalizer, config, spec: PolicySpec, sample_actions, device, seed=None
    ):
        self.model = model.to(device).eval()
        self.normalizer = normalizer.to(device)
        self.config, self.spec, self.device = config, spec, device
        self.horizon = config.horizon
        self._sample_actions = sample_actions
        self._generator = torch.Generator(device)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Start a new episode: forget the chunks being executed, restart the noise of a seed."""
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed)
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of its first action, (T, A))
        self._step = 0

    def act(self, observation: Mapping, sample_steps: int | None = None, clip: bool = False) -> np.ndarray:
        """Sample one chunk of actions for what the robot sees and feels now.

        Args:
            observation: `images`, a mapping from camera name (short, or the dataset's full key) to an RGB
                frame (H, W, 3) uint8 of any size; and `state`, (P,) in recorded units and order.
            sample_steps: integration steps, instead of the number the policy was trained to use by default.
            clip: keep every action within the range recorded in training.

        Returns:
            (T, A) float32 in recorded units; row 0 is for now, row i for i / fps seconds later.

        Raises:
            ValueError: for a missing or unknown camera, a wrong shape or dtype, a state that is not finite.
        """
        images = self._images(observation["images"])
        state = np.asarray(observation["state"], np.float32)
        if state.shape != (self.spec.state_dim,):
            raise ValueError(f"state must have shape ({self.spec.state_dim},), got {state.shape}")
        chunk = self.sample(images[None], torch.from_numpy(state)[None, None], sample_steps, clip)
        return chunk[0].cpu().numpy()

    def sample(
        self, images: Tensor, proprio: Tensor, sample_steps: int | None = None, clip: bool = False
    ) -> Tensor:
        """Sample a chunk for each of many observations at once.

        Args:
            images: (B, N, 3, H, W) uint8, ordered as `spec.cameras`, already of `spec.image_size`.
            proprio: (B, K, P) in recorded units.

        Returns:
            (B, T, A) float32 in recorded units, on the policy's device.

        Raises:
            ValueError: if proprioception is not finite.
        """
        if not torch.isfinite(proprio).all():
            raise ValueError("the state holds NaN or infinity: check the robot's sensors before acting on it")
        proprio = self.normalizer.proprio(proprio.to(self.device))
        actions = self._sample_actions(
            self.model, images.to(self.device), proprio, self.config, sample_steps, self._generator
        )
        actions = self.normalizer.unnormalize_actions(actions)
        if clip:
            actions = torch.clamp(actions, self.normalizer.action_min, self.normalizer.action_max)
        return actions

    def next_action(
        self,
        observation: Mapping,
        execute_steps: int | None = None,
        ensemble: float | None = None,
        sample_steps: int | None = None,
        clip: bool = False,
    ) -> np.ndarray:
        """The action for this control step; call once every 1 / fps seconds.

        Args:
            execute_steps: actions of a chunk to execute before the next is sampled (default: half of it).
            ensemble: instead, sample a chunk at every step and average all predictions for now, with weight
                exp(-ensemble * age), oldest first at age 0 (temporal ensembling, Zhao et al. 2023).

        Returns:
            (A,) float32 in recorded units.
        """
        execute_steps = execute_steps or max(self.horizon // 2, 1)
        if not 1 <= execute_steps <= self.horizon:
            raise ValueError(f"execute_steps must lie in 1..{self.horizon}, got {execute_steps}")
        newest = self._chunks[-1][0] if self._chunks else None
        if newest is None or ensemble is not None or self._step - newest >= execute_steps:
            self._chunks.append((self._step, self.act(observation, sample_steps, clip)))
        self._chunks = [(s, chunk) for s, chunk in self._chunks if self._step - s < self.horizon]
        if ensemble is None:
            start, chunk = self._chunks[-1]
            action = chunk[self._step - start]
        else:
            predictions = np.stack([chunk[self._step - start] for start, chunk in self._chunks])
            weights = np.exp(-ensemble * np.arange(len(predictions)))
            action = (weights[:, None] * predictions).sum(0) / weights.sum()
        self._step += 1
        return action.astype(np.float32)

    def _images(self, images: Mapping) -> Tensor:
        """Frames by camera -> (N, 3, H, W) uint8 in the policy's order and size."""
        frames = {short_name(key): frame for key, frame in images.items()}
        if set(frames) != set(self.spec.cameras):
            raise ValueError(
                f"the policy needs the cameras {', '.join(self.spec.cameras)}; "
                f"got {', '.join(map(str, images))}"
            )
        return torch.stack([self._resize(name, np.asarray(frames[name])) for name in self.spec.cameras])

    def _resize(self, name: str, frame: np.ndarray) -> Tensor:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"camera {name} must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        frame = resize_rgb(frame, self.spec.image_size)  # as the training frames were
        return torch.from_numpy(frame.transpose(2, 0, 1).copy())
