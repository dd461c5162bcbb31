"""A trained policy for a robot: camera images and joint states in, actions in recorded units out.

policy = load_policy("runs/vfp-20260301-101500")
chunk = policy.act({"images": {"head": rgb, "left": rgb, "right": rgb}, "state": joints})    # (T, A)
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import PolicySpec, find, load_components, read_settings, refuse_damaged
from common.config import from_dict
from common.data.cameras import known_name
from common.data.frames import resize_rgb
from common.errors import UserError
from common.normalize import Normalizer

ROOT = Path(__file__).resolve().parents[1]


def load_policy(
    run: str | Path,
    checkpoint: str = "last",
    device: str | torch.device | None = None,
    seed: int | None = None,
) -> "RobotPolicy":
    """Load the policy of a run folder, ready to act.

    Args:
        checkpoint: `last`, or the number of a saved step.
        device: where to compute; the accelerator if there is one, else the CPU.
        seed: makes sampled actions repeatable; None draws new noise on every start.
    """
    path = find(Path(run), checkpoint)
    refuse_damaged(path, "policy/")
    settings = read_settings(path)
    spec = PolicySpec.from_json(settings["spec"])
    module = load_script(settings["script"])
    if not hasattr(module, "sample_actions"):
        raise UserError(f"{run} was trained by {settings['script']}, which trains no policy: it cannot act.")
    config = from_dict(module.Config, settings["config"])
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = module.Policy(config, spec, pretrained=False)
    load_components(model, path / "policy")
    normalizer = Normalizer.load(path / "policy" / "stats.safetensors", config.normalization)
    policy = RobotPolicy(model, normalizer, config, spec, module, torch.device(device), seed)
    policy.checkpoint, policy.trained_steps = path, settings["step"]
    return policy


def load_script(name: str):
    """Import a script by the name in a checkpoint; only a `train_*.py` that lies beside `common/`."""
    scripts = sorted(path.name for path in ROOT.glob("train_*.py"))
    if name not in scripts:
        raise UserError(
            f"The policy was trained by {name!r}, which is not in {ROOT}; there are {', '.join(scripts)}."
        )
    return importlib.import_module(Path(name).stem)  # found where `common` was found


class RobotPolicy:
    """Samples action chunks from observations as a robot delivers them.

    Attributes:
        spec: what it knows of its data; a chunk's actions are 1 / `spec.fps` seconds apart.
        horizon: T, actions in a chunk.
        checkpoint, trained_steps: where the weights come from.
    """

    def __init__(self, model, normalizer: Normalizer, config, spec: PolicySpec, script, device, seed=None):
        self.model = model.to(device).eval()
        self.normalizer = normalizer.to(device)
        self.config, self.spec, self.script, self.device = config, spec, script, device
        self.horizon = config.horizon
        self._generator, self._seed = torch.Generator(device), seed
        self.reset()

    def reset(self) -> None:
        """Start a new episode: forget the chunks being executed, restart the noise of a seed."""
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed)
        self._chunks: list[tuple[int, np.ndarray]] = []  # (step of its first action, (T, A))
        self._states: list[np.ndarray] = []  # the last K, for next_action
        self._step = 0

    def act(self, observation: Mapping, sample_steps: int | None = None, clip: bool = False) -> np.ndarray:
        """Sample one chunk of actions for what the robot sees and feels now.

        Args:
            observation: `images`, a mapping from camera name (short, or the dataset's full key) to an RGB
                frame (H, W, 3) uint8 of any size; and `state`, (P,) in recorded units and order. A policy
                that sees K states needs (K, P), the present one last.
            sample_steps: integration steps, instead of the configured number.
            clip: keep every action within the range recorded in training.

        Returns:
            (T, A) float32 in recorded units; row i is for i / fps seconds from now, or, of a policy with an
            action offset, that many steps later.

        Raises:
            ValueError: for a missing or unknown camera, a wrong shape or dtype, a state that is not finite.
        """
        images = self._images(observation["images"])
        given, history = np.asarray(observation["state"], np.float32), self.spec.proprio_history
        state = given[None] if given.ndim == 1 and history == 1 else given
        if state.shape != (history, self.state_dim):
            wanted = f"({self.state_dim},)" if history == 1 else f"{(history, self.state_dim)}, oldest first"
            raise ValueError(f"state must have shape {wanted}, got {given.shape}")
        if not np.isfinite(state).all():
            raise ValueError("the state holds NaN or infinity: check the robot's sensors before acting on it")
        if self.spec.state_rotations:
            state = self.spec.state_rotations.encode(state)
        chunk = self.sample(images[None], torch.from_numpy(state)[None], sample_steps, clip)[0].cpu().numpy()
        return self.spec.action_rotations.decode(chunk) if self.spec.action_rotations else chunk

    @property
    def state_dim(self) -> int:
        """P, as the robot delivers it."""
        rotations = self.spec.state_rotations
        return len(rotations.recorded) if rotations else self.spec.state_dim

    def sample(
        self, images: Tensor, proprio: Tensor, sample_steps: int | None = None, clip: bool = False
    ) -> Tensor:
        """A chunk for each of B observations as an episode store gives them: (B, T, A) in recorded units.

        Args:
            images: (B, N, 3, H, W) uint8, in the order of `spec.cameras`, already of `spec.image_size`.
            proprio: (B, K, P) in recorded units; rotations re-expressed, if the policy was trained so.
        """
        images, proprio = images.to(self.device), proprio.to(self.device)
        seen = self.normalizer.proprio(proprio)
        actions = self.script.sample_actions(
            self.model, images, seen, self.config, sample_steps, self._generator
        )
        actions = self.normalizer.unnormalize_actions(actions, proprio)
        return torch.clamp(actions, *self.normalizer.action_range) if clip else actions

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
            observation: see `act`, with the present state alone: earlier ones are remembered here.
            execute_steps: actions of a chunk to execute before the next is sampled (default: half of it).
            ensemble: instead, sample a chunk at every step and average all predictions for now, with weight
                exp(-ensemble * age), oldest first at age 0 (temporal ensembling, Zhao et al. 2023). Chunks
                that took different modes are averaged, too: where that is harmful, execute chunks instead.

        Returns:
            (A,) float32 in recorded units. Until the first action of a policy with an action offset is due,
            that action.
        """
        history, offset = self.spec.proprio_history, self.spec.action_offset
        if execute_steps is None:
            execute_steps = max(min(self.horizon // 2, self.horizon - offset), 1)
        if not 1 <= execute_steps <= self.horizon - offset:
            raise ValueError(f"execute_steps must lie in 1..{self.horizon - offset}, got {execute_steps}")
        state = np.asarray(observation["state"], np.float32)
        if state.shape != (self.state_dim,):
            raise ValueError(f"state must have shape ({self.state_dim},), got {state.shape}")
        self._states = [*(self._states or [state] * history), state][-history:]  # as at an episode's start
        newest = self._chunks[-1][0] - offset if self._chunks else None  # the step at which it was sampled
        if newest is None or ensemble is not None or self._step - newest >= execute_steps:
            seen = {**observation, "state": np.stack(self._states)}
            self._chunks.append((self._step + offset, self.act(seen, sample_steps, clip)))
        self._chunks = [(s, chunk) for s, chunk in self._chunks if self._step - s < self.horizon]
        due = [chunk[self._step - start] for start, chunk in self._chunks if self._step >= start]
        due = due or [self._chunks[0][1][0]]
        action = due[-1]
        if ensemble is not None:
            weights = np.exp(-ensemble * np.arange(len(due)))
            action = (weights[:, None] * np.stack(due)).sum(0) / weights.sum()
        self._step += 1
        return action.astype(np.float32)

    def _images(self, images: Mapping) -> Tensor:
        """Frames by camera -> (N, 3, H, W) uint8 in the policy's order and size."""
        known = self.spec.cameras
        frames = {known_name(key, known): frame for key, frame in images.items()}
        if set(frames) != set(known) or len(frames) < len(images):  # two keys may mean one camera
            raise ValueError(f"the policy needs the cameras {', '.join(known)}; got {', '.join(images)}")
        return torch.stack([self._resize(name, np.asarray(frames[name])) for name in known])

    def _resize(self, name: str, frame: np.ndarray) -> Tensor:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"camera {name} must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        frame = resize_rgb(frame, self.spec.image_size)  # as the training frames were
        return torch.from_numpy(frame.transpose(2, 0, 1).copy())
