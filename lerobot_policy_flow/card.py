"""The model card of an exported policy: what it is, what it learned from, its results, how to use it."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from common.config import flat_options, to_dict
from common.data.tasks import listed
from common.exported import HUB_NAME
from common.files import read_json
from common.inference import RobotPolicy
from lerobot_policy_flow.configuration_flow import FlowConfig

PICTURES = (
    "curves.png",
    "evaluation/rollouts.gif",
    "evaluation/rollouts.png",
    "evaluation/heldout.png",
    "evaluation/alternatives.png",
    "evaluation/guidance.png",
    "latents.png",
    "depth.png",
)
# Options about where and how a run was done, not about what was learned.
ABOUT_THE_PLACE = {
    *("run_dir", "resume", "config", "cache_dir", "num_workers", "ingest_workers", "max_time"),
    *("tracker", "project", "push_to_hub", "keep", "keep_every", "log_every", "save_every", "hang_timeout"),
    "background_saving",
}

# Options that can be a local path.
PLACES = {"dataset", "episodes_file", "grow_from", "init_from", "task_encoder", "backbone", "depth_weights"}

BLIND = {"grey": "grey pictures", "mismatched": "pictures of another episode", "misled": "told another task"}


def write_card(folder: Path, policy: RobotPolicy, run: Path, config: FlowConfig, name: str) -> None:
    """Write README.md, and the run's pictures next to it.

    Args:
        folder: of the export.
        name: what the policy is called, and on the hub, its name there.
    """
    about, results = _read(run / "config.json"), _read(run / "evaluation" / "results.json")
    evaluated, pictures = results.get("checkpoint") == policy.checkpoint.name, []
    for picture in PICTURES:
        if (run / picture).is_file() and (evaluated or not picture.startswith("evaluation/")):
            pictures.append(Path("pictures") / Path(picture).name)
            (folder / "pictures").mkdir(exist_ok=True)
            shutil.copy(run / picture, folder / pictures[-1])
    method = Path(policy.script.__file__).stem.removeprefix("train_")
    parts = [
        _front_matter(about, method),
        f"# {name}",
        (policy.script.__doc__ or "").strip().partition("\n\n")[0],
        _what_it_learned_from(policy, about, config),
        _results(results if evaluated else {}),
        "\n".join(f"![{picture.stem}]({picture})" for picture in pictures),
        _how_to_use(policy, config, name),
        _how_it_was_trained(policy, about),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def public(name: str) -> str:
    """A dataset's or model's name for others: its name on the hub, or the last part of a local folder."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Options in which local paths are replaced by their last part."""

    def shortened(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return without_folders(value)
        if isinstance(value, list):
            return [shortened(name, part) for part in value]
        if name not in PLACES or not isinstance(value, str):
            return value
        component, equals, place = value.rpartition("=")  # as --init-from takes it
        return component + equals + public(place)

    return {name: shortened(name, value) for name, value in config.items()}


def _read(path: Path) -> dict:
    """A JSON file of the run; empty if it is missing."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _front_matter(about: dict, method: str) -> str:
    """What the hub sorts by, as YAML, of which JSON is a subset."""
    names = about.get("config", {}).get("data", {}).get("dataset", ())
    on_hub = [n for n in names if re.fullmatch(HUB_NAME, n) and not Path(n).exists()]
    tags = ["robotics", "lerobot", "flow-matching", method]
    lines = ["library_name: lerobot", "pipeline_tag: robotics", f"tags: {json.dumps(tags)}"]
    return "\n".join(["---", *lines, *([f"datasets: {json.dumps(on_hub)}"] if on_hub else []), "---"])


def _what_it_learned_from(policy: RobotPolicy, about: dict, config: FlowConfig) -> str:
    spec = policy.spec
    rotations = spec.state_rotations
    states = rotations.recorded if rotations else spec.state_names
    history = f"{spec.proprio_history} states" if spec.proprio_history > 1 else "state"
    apart = f"{spec.image_stride} step{'s' * (spec.image_stride > 1)} apart"
    frames = f", {spec.image_history} frames of each, {apart}" if spec.image_history > 1 else ""
    later = f", starting {spec.action_offset} steps later" if spec.action_offset else ""
    pictures = ", ".join(f"`{key}` ({camera})" for key, camera in config.cameras.items())
    rows = {
        "data": ", ".join(map(public, policy.config.data.dataset)),
        "fingerprint of the data": about.get("fingerprint", "unknown"),
        "task": listed(spec.tasks.sentences, 50) if spec.tasks else spec.task or "one",
        "pictures": f"{pictures}, {spec.image_size[0]}x{spec.image_size[1]}{frames}",
        history: ", ".join(states),
        "action": ", ".join(config.action_feature_names),
        "chunk": f"{policy.horizon} actions at {spec.fps:g} Hz{later}",
        "step": policy.trained_steps,
        "parameters": f"{sum(p.numel() for p in policy.model.parameters()):,}",
    }
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "## What it learned from\n\n" + "\n".join(table)


def _results(results: dict) -> str:
    """Success and errors by `evaluate.py`; empty if it did not see this checkpoint."""
    if not results:
        return "## Results\n\nNot evaluated: run `python evaluate.py RUN` before the export."
    lines = []
    for name, found in results.get("closed_loop", {}).items():
        what = f"{name} sampling steps" if name.isdigit() else BLIND.get(name, name)
        success, low, high = (100 * found[name] for name in ("success", "low", "high"))
        rate = f"{success:.1f} % [{low:.1f}, {high:.1f}]"
        lines.append(f"| {what} | {rate} | {found['episodes']} | {found['steps']:.0f} |")
    parts = ["## Results"]
    if lines:
        head = ["| in closed loop | success, 95 % interval | episodes | steps |", "| --- | --- | --- | --- |"]
        parts += [f"Acting in `{results['env']}`, seed {results['seed']}:", "\n".join([*head, *lines])]
    if heldout := results.get("heldout"):
        methods = ("policy", "mean", "hold", "linear", "nearest", "mismatched")
        errors = [f"{name} {heldout[name]['mae']:.4f}" for name in methods if name in heldout]
        parts.append(
            f"Error of chunks on {heldout['steps']} held-out steps of {heldout['episodes']} episodes, in "
            f"standard units: {', '.join(errors)}."
        )
    return "\n\n".join(parts)


def _how_to_use(policy: RobotPolicy, config: FlowConfig, name: str) -> str:
    images = ", ".join(f'"{camera}": rgb' for camera in policy.spec.cameras)
    shape = (policy.horizon, len(config.action_feature_names))
    tasks = policy.spec.tasks
    task = policy.spec.task or (tasks.sentences[0] if tasks else "")
    robot = f'--robot.type=... --fps={policy.spec.fps:g} --task="{task}"'
    told = f', "task": "{task}"' if tasks else ""
    return f"""## How to use it

With LeRobot and `pip install ./lerobot_policy_flow` from the repository that trained it:

```bash
lerobot-eval --policy.path={name} --env.type=... --eval.n_episodes=50 --eval.batch_size=10
lerobot-rollout --policy.path={name} {robot}
```

Without LeRobot:

```python
from common.inference import load_policy

policy = load_policy("{name}")
chunk = policy.act({{"images": {{{images}}}, "state": state{told}}})  # {shape}
```"""


def _how_it_was_trained(policy: RobotPolicy, about: dict) -> str:
    """The command line, with every option that differs from its default."""
    given = flat_options(without_folders(to_dict(policy.config)))
    usual = flat_options(to_dict(type(policy.config)()))
    flags = [
        _flag(option.replace("_", "-"), value)
        for option, value in given.items()
        if value != usual[option] and option not in ABOUT_THE_PLACE
    ]
    script = Path(policy.script.__file__).name
    command = f"accelerate launch {script} {' '.join(flags)}".strip()
    commit = about.get("git_commit")
    changed = ", with changes" if about.get("git_dirty") else ""
    where = f"\n\nCommit `{commit}`{changed}, {about.get('processes', 1)} process(es)." if commit else ""
    return f"## How it was trained\n\n```bash\n{command}\n```{where}"


def _flag(name: str, value: Any) -> str:
    """An option as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(word)) for word in words)])
