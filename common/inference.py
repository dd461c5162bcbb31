"""A trained policy for a robot: camera images and joint states in, actions in recorded units out.

policy = load_policy("runs/vfp-20260301-101500")    # or an exported one: a folder, or "user/name" on the hub
chunk = policy.act({"images": {"head": rgb, "left": rgb, "right": rgb}, "state": joints})    # (T, A)
"""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import exported
from common.checkpoint import PolicySpec, find, load_components, read_settings, refuse_damaged
from common.config import from_dict
from common.data.frames import resize_rgb
from common.errors import UserError
from common.normalize import Normalizer, scale_offset

ROOT = Path(__file__).resolve().parents[1]
FAR = 3.0  # standard deviations outside the recorded range: a state that the policy knows nothing about


class Blank(NamedTuple):
    """A policy without its weights."""

    model: nn.Module
    config: Any
    spec: PolicySpec
    script: ModuleType


def load_policy(
    run: str | Path,
    checkpoint: str = "last",
    device: str | torch.device | None = None,
    seed: int | None = None,
) -> "RobotPolicy":
    """Load a policy, ready to act.

    Args:
        run: run folder, or what `lerobot_policy_flow.export` wrote: a folder, or its name on the hub.
        checkpoint: of a run: `last`, or the number of a saved step.
        device: where to compute; the accelerator if there is one, else the CPU.
        seed: makes sampled actions repeatable; None draws new noise on every start.
    """
    if path := exported.find(run):
        if checkpoint != "last":
            raise UserError(f"{run} is exported, and holds no step but one: leave out the checkpoint.")
        found = exported.read(path)
        settings, blank = found.settings, build(found.settings, run)
        normalizer = fill(blank, found.weights, found.statistics, path)
    else:
        path = find(Path(run), checkpoint)
        refuse_damaged(path, "policy/")
        settings = read_settings(path)
        blank = build(settings, run)
        load_components(blank.model, path / "policy")
        normalizer = Normalizer.load(path / "policy" / "stats.safetensors", blank.config.normalization)
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    policy = RobotPolicy(blank.model, normalizer, *blank[1:], torch.device(device), seed)
    policy.checkpoint, policy.trained_steps = path, settings["step"]
    return policy


def build(settings: dict, source: str | Path) -> Blank:
    """The policy that a `policy.json` describes; `source` is what messages call it."""
    spec = PolicySpec.from_json(settings["spec"])
    module = load_script(settings["script"])
    if not hasattr(module, "sample_actions"):
        raise UserError(
            f"{source} was trained by {settings['script']}, which trains no policy: it cannot act."
        )
    config = from_dict(module.Config, settings["config"])
    return Blank(module.Policy(config, spec, pretrained=False), config, spec, module)


def fill(
    blank: Blank, weights: dict[str, Tensor], statistics: dict[str, Tensor], source: str | Path
) -> Normalizer:
    """Load an exported policy's weights, which must agree in names and shapes; its statistics."""
    try:
        blank.model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The weights in {source} do not fit their network ({reason}): export the run again, with the "
            f"script that trained it."
        ) from None
    try:
        return Normalizer.of_tensors(statistics, blank.config.normalization)
    except KeyError as error:
        raise UserError(f"{source} lacks the statistics {error}: export the run again.") from None


def load_script(name: str) -> ModuleType:
    """Import a script by the name in a checkpoint; only a `train_*.py` that lies beside `common/`."""
    scripts = sorted(path.name for path in ROOT.glob("train_*.py"))
    if name not in scripts:
        raise UserError(
            f"The policy was trained by {name!r}, which is not in {ROOT}; there are {', '.join(scripts)}."
        )
    # Found where `common` was found, which a distribution has inside of a package.
    return importlib.import_module(f"{__package__.removesuffix('common')}{Path(name).stem}")


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
        statistics = self.normalizer.statistics["state"]
        scale, _ = scale_offset(statistics, "mean-std")
        self._known_range = [x.cpu().numpy() for x in (statistics["min"], statistics["max"], scale)]
        self._generator, self._seed, self._episode = torch.Generator(device), seed, -1
        self.reset()

    def reset(self, episode: int | None = None) -> None:
        """Start an episode, the next one by default: forget the chunks being executed.

        With a seed, each episode has noise of its own, always the same: `reset(0)` repeats the first.
        """
        self._episode = self._episode + 1 if episode is None else episode
        self._said: set[int] = set()  # dimensions of the state that were found to be far away
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed + self._episode)
        self._controller: Controller | None = None

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

        Warns of a state more than three standard deviations outside the recorded range, once an episode.
        """
        return self.act_batch([observation], sample_steps, clip)[0]

    def act_batch(
        self,
        observations: Sequence[Mapping],
        sample_steps: int | None = None,
        clip: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> np.ndarray:
        """A chunk for each of several observations, in one forward pass; see `act`.

        Args:
            generators: source of the noise of each observation; by default all share the policy's own.

        Returns:
            (B, T, A) float32.
        """
        images = torch.stack([self._images(observation["images"]) for observation in observations])
        states = np.stack([self._state(observation["state"]) for observation in observations])
        self._warn_of_far_states(states[:, -1])
        chunks = self.sample(images, torch.from_numpy(states), sample_steps, clip, generators).cpu().numpy()
        return self.spec.action_rotations.decode(chunks) if self.spec.action_rotations else chunks

    def _state(self, given) -> np.ndarray:
        """A state as `act` takes it -> (K, P) as the policy was trained."""
        given, history = np.asarray(given, np.float32), self.spec.proprio_history
        state = given[None] if given.ndim == 1 and history == 1 else given
        if state.shape != (history, self.state_dim):
            wanted = f"({self.state_dim},)" if history == 1 else f"{(history, self.state_dim)}, oldest first"
            raise ValueError(f"state must have shape {wanted}, got {given.shape}")
        if not np.isfinite(state).all():
            raise ValueError("the state holds NaN or infinity: check the robot's sensors before acting on it")
        return self.spec.state_rotations.encode(state) if self.spec.state_rotations else state

    def _warn_of_far_states(self, states: np.ndarray) -> None:
        """Warn, once an episode, of each dimension of (B, P) states far outside what was recorded."""
        low, high, scale = self._known_range
        away = (np.maximum(low - states, states - high) / scale).max(axis=0)
        for i in set(np.flatnonzero(away > FAR).tolist()) - self._said:
            self._said.add(i)
            warnings.warn(
                f"{self.spec.state_names[i]} is {away[i]:.0f} standard deviations outside the range "
                f"{low[i]:.4g} to {high[i]:.4g} that the policy was trained on: check sensor and units",
                stacklevel=4,
            )

    @property
    def state_dim(self) -> int:
        """P, as the robot delivers it."""
        rotations = self.spec.state_rotations
        return len(rotations.recorded) if rotations else self.spec.state_dim

    def sample(
        self,
        images: Tensor,
        proprio: Tensor,
        sample_steps: int | None = None,
        clip: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """A chunk for each of B observations as an episode store gives them: (B, T, A) in recorded units.

        Args:
            images: (B, N, 3, H, W) uint8, in the order of `spec.cameras`, already of `spec.image_size`.
            proprio: (B, K, P) in recorded units; rotations re-expressed, if the policy was trained so.
            generators: see `act_batch`.
        """
        images, proprio = images.to(self.device), proprio.to(self.device)
        seen = self.normalizer.proprio(proprio)
        noise = generators or self._generator
        actions = self.script.sample_actions(self.model, images, seen, self.config, sample_steps, noise)
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
            observation: see `act`, with the present state alone: earlier ones are remembered here. `images`
                can be a function that returns them: it is called only when a chunk is due.
            execute_steps, ensemble: see `Controller`.

        Returns:
            (A,) float32 in recorded units. Until the first action of a policy with an action offset is due,
            that action.
        """
        state = np.asarray(observation["state"], np.float32)
        if state.shape != (self.state_dim,):
            raise ValueError(f"state must have shape ({self.state_dim},), got {state.shape}")
        if self._controller is None:
            self._controller = Controller(self, 1)
        control, images = self._controller, observation["images"]
        control.configure(execute_steps, ensemble, sample_steps, clip)
        look = images if callable(images) else lambda: images
        return control.next_actions(np.array([0]), state[None], lambda which: [look()])[0]

    def _images(self, images: Mapping) -> Tensor:
        """Frames by camera -> (N, 3, H, W) uint8 in the policy's order and size."""
        known = self.spec.cameras
        frames = {self.spec.camera(key): frame for key, frame in images.items()}
        if set(frames) != set(known) or len(frames) < len(images):  # two keys may mean one camera
            raise ValueError(f"the policy needs the cameras {', '.join(known)}; got {', '.join(images)}")
        return torch.stack([self._resize(name, np.asarray(frames[name])) for name in known])

    def _resize(self, name: str, frame: np.ndarray) -> Tensor:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"camera {name} must be (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        frame = resize_rgb(frame, self.spec.image_size)  # as the training frames were
        return torch.from_numpy(frame.transpose(2, 0, 1).copy())


class Controller:
    """Executes chunks in E episodes that advance together: samples new ones when they are due.

    Args:
        seeds: of each episode, for its noise; a number of episodes instead shares the policy's own noise.
        execute_steps: actions of a chunk to execute before the next is sampled (default: half of it).
        ensemble: instead, sample a chunk at every step and average all predictions for now, with weight
            exp(-ensemble * age), oldest first at age 0 (temporal ensembling, Zhao et al. 2023). Chunks that
            took different modes are averaged, too: where that is harmful, execute chunks instead.
        sample_steps, clip: see `RobotPolicy.act`.
    """

    def __init__(
        self,
        policy: RobotPolicy,
        seeds: Sequence[int] | int,
        execute_steps: int | None = None,
        ensemble: float | None = None,
        sample_steps: int | None = None,
        clip: bool = False,
    ):
        self.policy, self.generators = policy, None
        self.num = seeds if isinstance(seeds, int) else len(seeds)
        if not isinstance(seeds, int):
            self.generators = [torch.Generator(policy.device).manual_seed(seed) for seed in seeds]
        self.step = 0
        self.states: list[np.ndarray] = []  # the last K, each (E, P)
        self.chunks: list[tuple[int, np.ndarray]] = []  # (step of its first action, (E, T, A))
        self.configure(execute_steps, ensemble, sample_steps, clip)

    def configure(
        self, execute_steps: int | None, ensemble: float | None, sample_steps: int | None, clip: bool
    ) -> None:
        """Change how to act, from now on; raises ValueError if a chunk has not so many actions to execute."""
        horizon, offset = self.policy.horizon, self.policy.spec.action_offset
        if execute_steps is None:
            execute_steps = max(min(horizon // 2, horizon - offset), 1)
        if not 1 <= execute_steps <= horizon - offset:
            raise ValueError(f"execute_steps must lie in 1..{horizon - offset}, got {execute_steps}")
        self.execute_steps, self.ensemble = execute_steps, ensemble
        self.sample_steps, self.clip = sample_steps, clip

    @property
    def due(self) -> bool:
        """Whether the next step samples chunks, and so needs pictures."""
        if not self.chunks or self.ensemble is not None:
            return True
        sampled = self.chunks[-1][0] - self.policy.spec.action_offset  # the step at which it was
        return self.step - sampled >= self.execute_steps

    def next_actions(
        self,
        which: np.ndarray,
        states: np.ndarray,
        look: Callable[[np.ndarray], Sequence[Mapping]],
    ) -> np.ndarray:
        """The actions of this control step.

        Args:
            which: (R,), the episodes that are running; those that are over do not come back.
            states: (R, P), their present states.
            look: gives the images of the episodes asked for; called only if chunks are due.

        Returns:
            (R, A) float32 in recorded units.
        """
        history, offset = self.policy.spec.proprio_history, self.policy.spec.action_offset
        present = np.zeros((self.num, states.shape[1]), np.float32)
        present[which] = states
        # At an episode's start there was nothing before: it repeats its first state.
        self.states = [*(self.states or [present] * history), present][-history:]
        if self.due:
            seen = np.stack(self.states, axis=1)[which]
            observations = [
                {"images": images, "state": state} for images, state in zip(look(which), seen, strict=True)
            ]
            generators = self.generators and [self.generators[e] for e in which]
            sampled = self.policy.act_batch(observations, self.sample_steps, self.clip, generators)
            chunks = np.zeros((self.num, *sampled.shape[1:]), np.float32)
            chunks[which] = sampled
            self.chunks.append((self.step + offset, chunks))
        self.chunks = [(s, chunk) for s, chunk in self.chunks if self.step - s < self.policy.horizon]
        due = [chunk[which, self.step - start] for start, chunk in self.chunks if self.step >= start]
        due = due or [self.chunks[0][1][which, 0]]
        actions = due[-1]
        if self.ensemble is not None:
            weights = np.exp(-self.ensemble * np.arange(len(due)))
            actions = np.einsum("i,ira->ra", weights / weights.sum(), np.stack(due))
        self.step += 1
        return actions.astype(np.float32)
