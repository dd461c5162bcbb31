"""A policy of this project as LeRobot calls it."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.console import say
from common.errors import UserError
from common.exported import MODEL, STATISTICS, WEIGHTS, parts
from common.inference import Controller, RobotPolicy, build, fill
from common.normalize import Normalizer
from lerobot_policy_flow.configuration_flow import FlowConfig, trained_elsewhere


class FlowPolicy(PreTrainedPolicy):
    """Acts as `common.inference` does, to the bit, on LeRobot's batches.

    Images come as float in [0, 1]; they were bytes, and are converted back to these. States and actions are
    in recorded units. Noise follows torch's generator, and with it LeRobot's `--seed`: `reset` draws a
    number, and that number + i is the seed of episode i of a batch.
    """

    config_class = FlowConfig
    name = "flow"

    def __init__(self, config: FlowConfig, **_: Any):
        super().__init__(config)
        config.validate_features()
        where = config.pretrained_path or "the export"
        self._blank = build(config.run, where)
        self.model = self._blank.model
        self.normalizer: Normalizer | None = None
        self._said = False
        self.reset()

    # Loading and saving

    @classmethod
    def of(cls, policy: RobotPolicy, config: FlowConfig) -> "FlowPolicy":
        """A loaded policy, in LeRobot's form."""
        made = cls(config)
        return made._filled(policy.model.state_dict(), policy.normalizer.tensors(), policy.checkpoint)

    @classmethod
    def _load_as_safetensor(
        cls, model: "FlowPolicy", model_file: str, map_location: str, strict: bool
    ) -> "FlowPolicy":
        try:
            tensors = load_file(model_file)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{model_file} cannot be read ({reason}): export the run again.") from None
        return model._filled(*parts(tensors), Path(model_file))  # always strictly, whatever LeRobot asks for

    def _filled(self, weights: dict[str, Tensor], statistics: dict[str, Tensor], where: Path) -> "FlowPolicy":
        self.normalizer = fill(self._blank, weights, statistics, where)
        return self

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors`; `state_dict` is for training in LeRobot."""
        config = copy.copy(self.config)
        config.device = None  # wherever it is loaded, LeRobot picks the best one
        config._save_pretrained(save_directory)
        weights, statistics = self.model.state_dict(), self.normalizer.tensors()
        tensors = {f"{MODEL}{key}": tensor.cpu().contiguous() for key, tensor in weights.items()}
        tensors |= {f"{STATISTICS}{key}": tensor for key, tensor in statistics.items()}
        save_file(tensors, save_directory / WEIGHTS)

    # Acting

    def reset(self) -> None:
        """Start episodes: forget states and chunks; draw the seed of their noise."""
        self._seed = int(torch.randint(2**62, ()))
        self._robot: RobotPolicy | None = None
        self._controller: Controller | None = None
        self._generators: list[torch.Generator] = []

    @property
    def robot(self) -> RobotPolicy:
        """The policy as `load_policy` gives it, for the episodes since `reset`."""
        device = next(self.model.parameters()).device
        if self._robot is None or self._robot.device != device:
            if self.normalizer is None:
                raise UserError("The policy has no weights and statistics: load it with --policy.path.")
            self._robot = RobotPolicy(self.model, self.normalizer, *self._blank[1:], device, self._seed)
            self._robot.text_encoder = self.config.text_encoder or self._robot.text_encoder
        return self._robot

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, Tensor], **_: Any) -> Tensor:
        """The action of this control step, (B, A), for B episodes that advance together."""
        states = self._states(batch)[:, -1]
        if self._controller is None:
            seeds = [self._seed + i for i in range(len(states))]
            config = self.config
            options = (
                config.n_action_steps,
                config.temporal_ensemble_coeff,
                config.sample_steps,
                config.clip,
            )
            self._controller = Controller(self.robot, seeds, *options)
        if len(states) != self._controller.num:
            raise UserError(
                f"There are {len(states)} episodes where there were {self._controller.num}: call reset()."
            )
        tasks = self._tasks(batch, len(states))
        more = {} if tasks is None else {"tasks": tasks}
        which = np.arange(len(states))
        actions = self._controller.next_actions(which, states, lambda _: self._pictures(batch), **more)
        return torch.from_numpy(actions).to(self.robot.device)

    def supports_rtc(self) -> bool:
        """Whether chunks can continue one that is being executed: for policies trained with a prefix."""
        return self._why_no_rtc() is None

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Mapping[str, Tensor],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Sample a chunk, (B, T, A) in recorded units; row i is for i control steps from now.

        A policy with an action offset does not predict the first steps: its first action is repeated there,
        and the chunk is that much longer.

        Args:
            batch: see `select_action`; a policy that sees K states needs `observation.state` (B, K, P).
            inference_delay: control steps that will have passed when the chunk is ready.
            prev_chunk_left_over: (T', A), what is left of the chunk that is being executed; its first
                `inference_delay` actions will still be executed, and the new chunk continues them.
        """
        if (frames := self._blank.spec.image_history) > 1:
            raise UserError(
                f"The policy sees {frames} frames of a camera, but LeRobot gives only one for a chunk: use "
                f"--inference.type=sync, which asks for single actions."
            )
        states, pictures = self._states(batch), self._pictures(batch)
        observations = [{"images": i, "state": s} for i, s in zip(pictures, states, strict=True)]
        for observation, task in zip(observations, self._tasks(batch, len(states)) or (), strict=False):
            observation["task"] = task
        prefix = self._prefix(inference_delay, prev_chunk_left_over, len(states))
        options = (self.config.sample_steps, self.config.clip)
        if len(observations) == 1:
            more = {} if prefix is None else {"prefix": prefix}
            chunks = self.robot.act(observations[0], *options, **more)[None]
        else:
            for i in range(len(self._generators), len(states)):
                self._generators.append(torch.Generator(self.robot.device).manual_seed(self._seed + i))
            chunks = self.robot.act_batch(observations, *options, self._generators[: len(states)])
        first = np.repeat(chunks[:, :1], self.robot.spec.action_offset, axis=1)
        return torch.from_numpy(np.concatenate([first, chunks], axis=1)).to(self.robot.device)

    def _why_no_rtc(self) -> str | None:
        """Why chunks cannot continue another; None if they can."""
        spec = self._blank.spec
        if spec.max_delay == 0:
            return "it was not trained to continue a chunk"
        if spec.proprio_history > 1 or spec.image_history > 1:
            seen = f"{spec.proprio_history} states and {spec.image_history} frames"
            return f"it sees {seen}, but LeRobot gives only one"
        return None

    def _prefix(self, delay: int | None, left_over: Tensor | None, episodes: int) -> np.ndarray | None:
        """The actions, (d, A), that will be executed before the new chunk is ready; None without any."""
        if left_over is None or not delay:
            return None
        if why := self._why_no_rtc():
            raise UserError(f"The policy cannot act in real time ({why}): use --inference.type=sync.")
        if episodes != 1:
            raise UserError(f"A chunk of one episode can be continued, and there are {episodes}.")
        spec = self._blank.spec
        left = left_over.reshape(-1, left_over.shape[-1]).float().cpu().numpy()
        real = np.flatnonzero(left.any(axis=1))  # LeRobot pads with rows of zeros
        first, last = spec.action_offset, min(delay, spec.action_offset + spec.max_delay)
        if last < delay and not self._said:
            self._said = True
            say(
                f"warning: a chunk takes {delay} control steps, and the policy was trained to continue "
                f"{spec.max_delay} actions: expect jumps, or lower --policy.sample_steps"
            )
        if not len(real) or first >= last:
            return None
        return left[np.minimum(np.arange(first, last), real[-1])]  # after the last one, the robot holds it

    def _tasks(self, batch: Mapping[str, Any], episodes: int) -> list[Any] | None:
        """The instruction of each episode, if the policy is told any; `...` where there is none."""
        if self._blank.spec.tasks is None:
            return None
        tasks = batch.get("task") or ""
        return [task or ... for task in ([tasks] * episodes if isinstance(tasks, str) else tasks)]

    def _states(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """(B, K', P), as many states as are given, the present one last."""
        if OBS_STATE not in batch:
            raise UserError(f"The observation has no {OBS_STATE}, which the policy needs: {_listed(batch)}.")
        states = batch[OBS_STATE].float().cpu().numpy()
        states = states[:, None] if states.ndim == 2 else states
        if states.ndim != 3 or states.shape[-1] != self.robot.state_dim:
            rotations, spec = self._blank.spec.state_rotations, self._blank.spec
            names = rotations.recorded if rotations else spec.state_names
            raise UserError(
                f"{OBS_STATE} has {states.shape[-1]} numbers, and the policy was trained on {len(names)} "
                f"({', '.join(names)}): it was trained for another robot."
            )
        return states

    def _pictures(self, batch: Mapping[str, Tensor]) -> Sequence[Mapping[str, np.ndarray]]:
        """What each episode's cameras see, (H, W, 3) uint8 by camera."""
        wanted = self.config.cameras
        if absent := [key for key in wanted if key not in batch]:
            raise UserError(
                f"The observation has no {', '.join(absent)}, which the policy needs: map what it has "
                f"({_listed(batch)}) with --rename_map."
            )
        views = {camera: _bytes(batch[key], key) for key, camera in wanted.items()}
        return [dict(zip(views, frames, strict=True)) for frames in zip(*views.values(), strict=True)]

    # Training, which is done elsewhere

    def get_optim_params(self) -> dict:
        raise UserError(trained_elsewhere(self.config))

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict | None]:
        raise UserError(trained_elsewhere(self.config))


def _bytes(pictures: Tensor, key: str) -> np.ndarray:
    """(B, [1,] 3, H, W) in [0, 1], or uint8, to (B, H, W, 3) uint8; bytes / 255 become what they were."""
    pictures = pictures[:, -1] if pictures.ndim == 5 else pictures
    if pictures.dtype != torch.uint8:
        if not (pictures.min() >= 0 and pictures.max() <= 1):
            raise UserError(f"{key} is not within 0 to 1: the policy takes images that are not normalized.")
        pictures = (pictures.float() * 255).round().to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).cpu().numpy()


def _listed(batch: Mapping[str, Any]) -> str:
    return ", ".join(key for key in batch if key.startswith("observation")) or "nothing"
