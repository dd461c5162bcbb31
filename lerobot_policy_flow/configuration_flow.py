"""What LeRobot knows about a policy of this project: its features, and how it acts."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from common.errors import UserError
from common.exported import TYPE, VERSION, require_settings, require_version


@PreTrainedConfig.register_subclass(TYPE)
@dataclass
class FlowConfig(PreTrainedConfig):
    """Settings of an exported policy; those for acting can be changed on LeRobot's command line.

    Args:
        version: of this format.
        run: `script`, `spec`, `config` and `step` of the run that was exported.
        cameras: the policy's camera for each of LeRobot's image keys.
        n_obs_steps, chunk_size: K and T; see `common/checkpoint.py`.
        n_action_steps: actions of a chunk that are executed before the next is sampled; default: half of it.
        sample_steps: integration steps; default: what the run was trained with.
        temporal_ensemble_coeff: sample at every step and average; see `Controller` in `common/inference.py`.
        clip: keep actions within the range that was recorded.
        text_encoder: where the text encoder of the instructions is, if it has moved; it is loaded only for
            sentences that the policy was not trained on.
        action_feature_names: the action's dimensions, in order.
        normalization_mapping: LeRobot must not normalize: the policy does it.
    """

    version: int = VERSION
    run: dict[str, Any] = field(default_factory=dict)
    cameras: dict[str, str] = field(default_factory=dict)
    chunk_size: int = 1
    n_action_steps: int | None = None
    sample_steps: int | None = None
    temporal_ensemble_coeff: float | None = None
    clip: bool = False
    text_encoder: str | None = None
    action_feature_names: list[str] | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def validate_features(self) -> None:
        """Refuse what is no export, has another version, or does not fit this robot or environment."""
        where = self.pretrained_path or "--policy.path"
        if not self.run:
            raise UserError(
                "A policy of type flow is trained by this project's scripts and exported: give --policy.path."
            )
        require_version(self.version, where)
        spec = require_settings(self.run, where)["spec"]
        rotations = spec.get("action_rotations")
        names = rotations["recorded"] if rotations else spec["action_names"]
        there = self.output_features.get(ACTION) if self.output_features else None
        if there is not None and tuple(there.shape) != (len(names),):
            raise UserError(
                f"{where} gives {len(names)} actions ({', '.join(names)}), but {there.shape[0]} are expected "
                f"here: it was trained for another robot."
            )
        pictures = {key for key, feature in self.input_features.items() if feature.type is FeatureType.VISUAL}
        if pictures != self.cameras.keys() or set(self.cameras.values()) != set(spec["cameras"]):
            raise UserError(
                f"{where} has images of {', '.join(sorted(pictures)) or 'no camera'}, but its policy sees "
                f"{', '.join(spec['cameras'])}: export it again with --images."
            )
        if OBS_STATE not in self.input_features:
            raise UserError(f"{where} has no {OBS_STATE} among its features: export it again.")

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return list(range(1 - self.n_obs_steps, 1)) if self.n_obs_steps > 1 else None

    @property
    def action_delta_indices(self) -> list[int]:
        first = self.run["spec"]["action_offset"] if self.run else 0
        return list(range(first, first + self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self):
        raise UserError(trained_elsewhere(self))

    def get_scheduler_preset(self):
        raise UserError(trained_elsewhere(self))


def trained_elsewhere(config: FlowConfig) -> str:
    """Why LeRobot cannot train these policies: a method is more than a loss."""
    script = config.run.get("script", "train_vfp.py")
    return f"lerobot-train cannot train policies of type flow: python {script} --init-from EXPORT does."
