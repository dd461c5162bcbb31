"""Finds and reads exported policies, in a folder or on the hub; `lerobot_policy_flow` writes them.

    config.json         LeRobot's settings, and a checkpoint's policy.json as `run`
    model.safetensors   weights as `model.<component>.<name>`, statistics as `statistics.<part>.<name>`

Reading them cannot run code and does not need LeRobot.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from common.vision import brief, hub_answers

TYPE, VERSION = "flow", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL, STATISTICS = "model.", "statistics."
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


class Exported(NamedTuple):
    """Contents of an exported policy."""

    settings: dict
    """`script`, `spec`, `config` and `step`, as in a checkpoint's `policy.json`."""
    weights: dict[str, Tensor]
    """State dict of the policy."""
    statistics: dict[str, Tensor]
    """Output of `Normalizer.tensors`."""


def find(name: str | Path) -> Path | None:
    """Folder of an exported policy; None if the name is something else, such as a run folder.

    Downloads a hub name into the hub's cache.

    Raises:
        UserError: if the hub has no such policy, or does not answer.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path if (path / WEIGHTS).is_file() else None
    if not re.fullmatch(HUB_NAME, str(name)):
        return None
    from huggingface_hub import snapshot_download

    far = not hub_answers(str(name))
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], local_files_only=far))
    except Exception as error:  # the hub's client raises dozens of classes, from three libraries
        reason = "it is not in the hub's cache here, and there is no connection" if far else brief(error)
        raise UserError(
            f"{name} is no folder here and cannot be loaded from the hub ({reason}): check the name, and "
            f"run `hf auth login` if it is private."
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{name} on the hub has no {WEIGHTS}: give a policy that this project exported.")
    return folder


def read(folder: Path) -> Exported:
    """Read an exported policy; a UserError if it comes from another project or version, or is damaged."""
    settings = read_settings(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UserError(
            f"{folder / WEIGHTS} cannot be read ({brief(error)}): export the run again."
        ) from None
    return Exported(settings, *parts(tensors))


def read_settings(folder: Path) -> dict:
    """The `settings` of an exported policy; a UserError if it comes from another project or version."""
    try:
        config = read_json(folder / CONFIG)
        kind, version, settings = config.get("type"), config.get("version"), config.get("run")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({error}): export the run again.") from None
    if kind != TYPE:
        raise UserError(f"{folder} holds a policy of type {kind!r}: give one that this project exported.")
    require_version(version, folder)
    return require_settings(settings, folder)


def require_version(version: object, where: object) -> None:
    """Refuse exports of another version."""
    if version != VERSION:
        raise UserError(
            f"{where} was exported in version {version} of the format, and this code reads {VERSION}: export "
            f"the run again, or use the code that wrote it."
        )


def require_settings(settings: object, where: object) -> dict:
    """An export's description of its run; a UserError if anything is missing."""
    there = settings if isinstance(settings, dict) else {}
    if missing := {"script", "spec", "config", "step"} - there.keys():
        raise UserError(f"{where} lacks {', '.join(sorted(missing))} of its run: export it again.")
    return there


def parts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split an export's tensors into weights and statistics."""
    weights, statistics = (
        {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        for prefix in (MODEL, STATISTICS)
    )
    return weights, statistics


def require_pushable(name: str, script: str) -> None:
    """Refuse, before a run starts, a policy that could not be pushed to the hub at its end."""
    from huggingface_hub import get_token

    from common.inference import load_script

    require_hub_name(name, "--push-to-hub")
    found = load_script(script)
    if not hasattr(found, "sample_actions"):
        raise UserError(f"--push-to-hub {name}: {script} trains no policy, so leave the flag out.")
    require_carried(found)
    if get_token() is None:
        raise UserError(f"--push-to-hub {name} needs a login: `hf auth login`, or the variable HF_TOKEN.")


def require_carried(script: ModuleType) -> None:
    """Refuse a script outside the distribution: LeRobot could not load its policies."""
    path = Path(script.__file__)
    if path.parent != Path(__file__).resolve().parents[1]:
        raise UserError(f"{path.name} is not next to common/: copy it there and train again to export.")


def require_hub_name(name: str, flag: str) -> None:
    """Refuse an invalid hub name."""
    if not re.fullmatch(HUB_NAME, name):
        raise UserError(f"{flag} {name}: write owner/name, such as me/fold-towel.")
