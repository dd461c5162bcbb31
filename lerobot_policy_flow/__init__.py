"""LeRobot's plug-in for the policies of this project: importing it registers the policy type `flow`.

The package is used in two places: in this repository, next to `common/` and the training scripts, and as a
distribution that carries both inside it (tools/bundle.py).
"""

from importlib.metadata import version

from packaging.version import Version

OLDEST = "0.6.1"

if Version(version("lerobot")) < Version(OLDEST):  # LeRobot logs this and continues without the plug-in
    raise ImportError(
        f"lerobot_policy_flow needs lerobot {OLDEST} or newer and finds {version('lerobot')}: upgrade it."
    )

from lerobot_policy_flow.configuration_flow import FlowConfig  # noqa: E402

__all__ = ["FlowConfig"]
