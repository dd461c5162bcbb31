"""Export a run's policy in the form that LeRobot's commands and its hub use.

    python -m lerobot_policy_flow.export runs/vfp-20260301-101500 exports/towel
    python -m lerobot_policy_flow.export runs/vfp-20260301-101500 exports/towel --hub me/towel
    python -m lerobot_policy_flow.export RUN DIR --images observation.image=image

Writes `config.json`, `model.safetensors`, LeRobot's two processors, and a model card with pictures.
`load_policy` and `--init-from` read exports, too; see docs/lerobot.md.
"""

import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME as POSTPROCESSOR
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME as PREPROCESSOR

from common.checkpoint import PolicySpec
from common.config import UserPath, cli, options, to_dict
from common.console import say
from common.errors import UserError
from common.exported import require_carried, require_hub_name
from common.files import completed_checkpoints, writing_below
from common.inference import RobotPolicy, load_policy
from common.vision import brief
from lerobot_policy_flow.card import public, without_folders, write_card
from lerobot_policy_flow.configuration_flow import FlowConfig
from lerobot_policy_flow.modeling_flow import FlowPolicy
from lerobot_policy_flow.processor_flow import make_flow_pre_post_processors


@options
class Config:
    """Export a run's policy to LeRobot."""

    run: Annotated[UserPath, tyro.conf.Positional]
    """Run folder."""
    out: Annotated[UserPath, tyro.conf.Positional]
    """Folder of the export, which must be new."""
    images: tuple[str, ...] = ()
    """LeRobot's key for the images of a camera, such as `observation.image=image`. Default: as in the
    dataset, or `observation.images.CAMERA`."""
    checkpoint: str = "last"
    """`last`, or the number of a saved step."""
    hub: str | None = None
    """Name on the hub, as `owner/name`, to push the export to."""


def main(config: Config) -> None:
    if config.hub is not None:
        require_hub_name(config.hub, "--hub")
    export(config.run, config.out, config.images, config.checkpoint, config.hub)
    say(f"exported: {config.out}")
    if config.hub is not None:
        again = f"hf upload {config.hub} {config.out}"
        say(f"pushed: {push(config.out, config.hub, again)}")


def export(
    run: Path, out: Path, images: tuple[str, ...] = (), checkpoint: str = "last", hub: str | None = None
) -> None:
    """Write the policy of a run to a folder, whole or not at all.

    Args:
        images: see `Config`.
        hub: what the model card calls the policy.

    Raises:
        UserError: if the run has no policy, the folder exists already, or an entry of `images` is wrong.
    """
    if out.exists():
        raise UserError(f"{out} exists already: give the export another folder.")
    if not completed_checkpoints(run):
        raise UserError(f"{run} holds no finished checkpoint: give the folder of a run that has saved one.")
    policy = load_policy(run, checkpoint, device="cpu")
    require_carried(policy.script)
    config = flow_config(policy, picture_keys(policy.spec, images))
    with writing_below(out.parent, elsewhere="another folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
    try:
        FlowPolicy.of(policy, config).save_pretrained(unfinished)
        processors = make_flow_pre_post_processors(config)
        for processor, name in zip(processors, (PREPROCESSOR, POSTPROCESSOR), strict=True):
            processor.save_pretrained(unfinished, config_filename=f"{name}.json")
        write_card(unfinished, policy, run, config, hub or out.name)
        unfinished.chmod(0o755)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def picture_keys(spec: PolicySpec, images: tuple[str, ...] = ()) -> dict[str, str]:
    """The policy's camera for each of LeRobot's image keys."""
    chosen: dict[str, str] = {}
    for entry in images:
        key, equals, name = entry.partition("=")
        if not (equals and re.fullmatch(r"observation\.images?(\.[\w.-]+)?", key)):
            raise UserError(f"--images {entry}: write KEY=CAMERA, such as observation.images.top=head.")
        camera = spec.camera(name)
        if camera not in spec.cameras or camera in chosen:
            raise UserError(
                f"--images {entry}: the policy's cameras are {', '.join(spec.cameras)}, each once."
            )
        chosen[camera] = key
    for camera, key in zip(spec.cameras, spec.camera_keys or spec.cameras, strict=True):
        usual = key if key.startswith("observation.image") else f"{OBS_IMAGES}.{camera}"
        chosen.setdefault(camera, usual)
    if len(set(chosen.values())) < len(chosen):
        raise UserError(f"--images {' '.join(images)}: two cameras would have the same key.")
    return {chosen[camera]: camera for camera in spec.cameras}


def flow_config(policy: RobotPolicy, cameras: dict[str, str]) -> FlowConfig:
    """LeRobot's settings of a policy."""
    spec = policy.spec
    rotations = spec.action_rotations
    actions = rotations.recorded if rotations else spec.action_names
    tasks = spec.tasks and replace(spec.tasks, encoder=public(spec.tasks.encoder))
    picture = PolicyFeature(FeatureType.VISUAL, (3, *spec.image_size))
    return FlowConfig(
        device="cpu",
        push_to_hub=False,
        n_obs_steps=spec.proprio_history,
        chunk_size=policy.horizon,
        cameras=cameras,
        input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (policy.state_dim,))}
        | dict.fromkeys(cameras, picture),
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (len(actions),))},
        action_feature_names=list(actions),
        run={
            "script": Path(policy.script.__file__).name,
            "step": policy.trained_steps,
            "spec": replace(spec, tasks=tasks).to_json(),
            "config": without_places(to_dict(policy.config)),
        },
    )


def without_places(config: dict) -> dict:
    """A run's options without the local folders that it used, which do not belong on the hub."""
    places = {"run": ("run_dir", "resume", "config"), "data": ("cache_dir",)}
    kept = {
        group: {name: value for name, value in config[group].items() if name not in names}
        for group, names in places.items()
    }
    return without_folders(config | kept)


def push_run(run: Path, name: str) -> str:
    """Export a run's policy and upload it; returns its address."""
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "export", hub=name)
        again = f"python -m lerobot_policy_flow.export {run} DIR --hub {name}"
        return push(Path(folder) / "export", name, again)


def push(folder: Path, name: str, again: str) -> str:
    """Upload an export to the hub, where its files replace those that are there; returns its address.

    Args:
        again: the command that does it later, for the message if it fails now.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload policy")
    except Exception as error:  # the hub's client raises dozens of classes, from three libraries
        raise UserError(
            f"The policy could not be pushed to {name} ({brief(error)}): check connection and login, then "
            f"run `{again}`."
        ) from None
    return f"{api.endpoint}/{name}"


if __name__ == "__main__":
    cli(main, Config)
