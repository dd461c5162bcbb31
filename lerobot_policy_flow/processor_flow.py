"""LeRobot's processing steps around a policy of this project: names, batch, device."""

from typing import Any

from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_policy_flow.configuration_flow import FlowConfig


def make_flow_pre_post_processors(
    config: FlowConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """LeRobot's usual steps. Its commands override them by name, so none may be left out; those that
    normalize do nothing, whatever statistics they get, because of `FlowConfig.normalization_mapping`."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
