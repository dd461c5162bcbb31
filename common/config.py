"""The command line: one typed `Config` per script, restored from a run folder or a file.

Values come from, later ones winning: the dataclass's defaults, `--config FILE` or the resumed run's
`config.json`, explicit flags.
"""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from common.errors import UserError
from common.files import read_json, write_json, write_whole

DEFAULT_STEPS = 20_000

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.OmitArgPrefixes]
"""A nested option group with a heading of its own in the help and flat flags: `config.optim.lr` is `--lr`."""

MAY_CHANGE_ON_RESUME = {
    *(
        "dataset",
        "episodes_file",
        "cache_dir",
        "num_workers",
        "ingest_workers",
        "batch_size",
        "grad_accumulation",
    ),
    *("steps", "epochs", "lr", "backbone_lr", "component_lr", "weight_decay", "component_weight_decay"),
    *("schedule", "warmup_steps", "grad_clip", "ema_decay", "sample_steps", "guidance", "sample_method"),
    *("run_dir", "resume", "config", "log_every", "eval_every", "eval_samples", "save_every", "keep"),
    *("mixed_precision", "compile", "tracker", "project", "depth_cache", "depth_weights"),
    *("keep_every", "max_time", "hang_timeout", "max_bad_steps", "deterministic", "find_batch_size"),
}
"""Options that may differ when a run is resumed; any other would make it a different experiment. The
dataset may have moved: that its content and the choice of episodes are the same is checked by fingerprint."""

AT_LEAST_ONE = {
    *("horizon", "flow_samples", "sample_steps", "d_model", "num_heads", "encoder_layers", "decoder_layers"),
    *("batch_size", "grad_accumulation", "log_every", "eval_every", "eval_samples", "save_every", "keep"),
    *("num_codes", "posterior_layers", "prior_layers", "code_window", "depth_pool"),
    *("num_experts", "latent_dim", "expert_layers", "state_latent_dim", "action_latent_dim", "repeats"),
    *("keep_every", "max_bad_steps"),
}
NOT_NEGATIVE = {
    *("lr", "backbone_lr", "weight_decay", "warmup_steps", "aug_rotate", "aug_blur", "seed"),
    *("commitment_weight", "transport_weight", "gate_noise", "z_loss_weight", "balance_weight", "kl_weight"),
    *("free_bits", "top_k", "max_time", "hang_timeout"),
}
POSITIVE = {"grad_clip", "transport_blur"}
AT_MOST_1000 = {
    *("encoder_layers", "decoder_layers", "posterior_layers", "prior_layers", "num_experts", "num_heads"),
    *("proprio_history",),
}
"""What networks are built of one by one: a configuration from elsewhere cannot build for ever."""
SHARES = {
    *("camera_dropout", "ema_decay", "aug_color", "aug_shift"),
    *("posterior_decay", "cfg_dropout", "cfg_ramp", "replace_until", "kl_warmup"),
    "gate_warmup",
}


@dataclass(frozen=True)
class RunConfig:
    """The run: its folder, logging, checkpoints, precision."""

    run_dir: Path | None = None
    """The run folder itself (default: runs/METHOD-YYYYmmdd-HHMMSS). Must be new or empty, or use --resume."""
    resume: str | None = None
    """Run folder to continue, with its configuration; flags given beside it override. `auto` continues
    --run-dir if it holds a checkpoint and starts it otherwise, so that a job can be restarted as it is."""
    config: Path | None = None
    """JSON file to take the configuration from, a run's config.json or one of configs/; flags override."""
    init_from: tuple[str, ...] = ()
    """Weights to start from: RUN, component=RUN, component=FILE.safetensors or component=FILE.pt."""
    freeze: tuple[str, ...] = ()
    """Components that are not trained."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on held-out episodes."""
    eval_samples: int = 512
    """At most this many held-out steps, evenly spaced, are evaluated."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Keep the checkpoints of every such step besides."""
    max_time: float | None = None
    """Hours after which the run saves and ends with exit code 75, as it does on SIGTERM."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which the job ends and says which process is to blame; 0 waits for
    ever."""
    max_bad_steps: int = 20
    """Stop, and name the samples, after so many steps in a row whose loss or gradient was not finite; seen
    when a line of metrics is written."""
    deterministic: bool = False
    """Only algorithms whose result is always the same, bit for bit; slower on CUDA."""
    find_batch_size: bool = False
    """Instead of training, find the largest --batch-size that fits into memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of forward and backward (default: what `accelerate launch` says, else no)."""
    compile: bool = False
    """Compile the policy with torch.compile: a slow first step, then faster ones."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics go besides metrics.jsonl."""
    project: str = "flow-policies"
    """Project name for wandb."""


def cli[T](main: Callable[[Any], None], config_type: type[T], argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run a script: what its last line calls.

    Errors that a user can put right are printed as one sentence. Exit codes: see `common/faults.py`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.modules[config_type.__module__].__file__)
    config = None
    try:
        config = parse(config_type, argv, script.name)
        if isinstance(getattr(config, "run", None), RunConfig) and config.run.find_batch_size:
            from common.batch_size import find_batch_size

            find_batch_size(script, config)
        else:
            main(config)
    except UserError as error:
        _complain(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from common.faults import explain

        explained = explain(error, getattr(getattr(config, "optim", None), "batch_size", None))
        if explained is None:
            raise
        _complain(*explained)


def _complain(sentence: str, code: int) -> NoReturn:
    """Print an error and exit."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {sentence}", file=sys.stderr)
    else:  # most errors are those of all processes; the launcher ends this one once the first has spoken
        time.sleep(3)
        print(f"error in process {rank}: {sentence}", file=sys.stderr)
    sys.exit(code)


def parse[T](config_type: type[T], argv: Sequence[str], script: str) -> T:
    """A script's configuration from its command line; see the module's docstring for what wins.

    Raises:
        UserError: for a file that does not fit, a run folder that is in use, or a change that would make a
            resumed run another experiment.
    """

    def from_flags(default: T | None) -> T:
        markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
        config = tyro.cli(config_type, args=list(argv), default=default, prog=script, config=markers)
        return _expand_paths(config)

    def from_file(path: Path) -> T:
        """What a file says, less what was about that run alone, and less what a flag stands against."""
        base = _with_run(read_config(config_type, path, script), run_dir=None, resume=None, config=None)
        return _without_rival(base, argv)

    if {"-h", "--help"} & set(argv):
        _tidy_help(config_type)
    config = from_flags(None)  # also answers --help, and refuses bad flags
    run = getattr(config, "run", None)
    if not isinstance(run, RunConfig):
        return config
    if run.tracker != "none" and importlib.util.find_spec(run.tracker) is None:
        raise UserError(f"--tracker {run.tracker} is not installed: install it, or use --tracker none.")
    resumed = _resumed_run(run)
    if resumed is not None:
        base = from_file(resumed / "config.json")
        config = from_flags(base)
        config = _with_absolute_data(config)
        _refuse_changes(base, config, resumed)
        check_ranges(config)
        return _with_run(config, run_dir=resumed, resume=str(resumed))
    if run.config is not None:
        config = from_flags(from_file(run.config))
    check_ranges(config)
    _refuse_used(run.run_dir, restart=run.resume == "auto")
    return _with_absolute_data(_with_run(config, resume=None))


def check_ranges(config: Any) -> None:
    """Refuse numbers that could only fail later, some of them after hours.

    Raises:
        UserError: names the option.
    """
    options = flat_options(config)
    for name in AT_LEAST_ONE & options.keys():
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}: it must be at least 1.")
    for name in AT_MOST_1000 & options.keys():
        if options[name] is not None and options[name] > 1000:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}: it must be at most 1000.")
    for name in SHARES & options.keys():
        if not 0 <= options[name] <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}: it must lie between 0 and 1.")
    for name, value in options.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"--{name.replace('_', '-')} is not a number: give one.")
    for name in NOT_NEGATIVE & options.keys():
        if options[name] is not None and not 0 <= options[name] < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}: it must not be negative.")
    for name in POSITIVE & options.keys():
        if not options[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}: it must be positive.")
    if not 0 <= options.get("beta2", 0.0) < 1:
        raise UserError(f"--beta2 is {options['beta2']}: it must be at least 0 and below 1.")
    if options.get("seed", 0) >= 2**32:
        raise UserError(f"--seed is {options['seed']}: it must be below 2^32.")
    if min(options.get("time_beta", [1])) <= 0:
        raise UserError(f"--time-beta is {options['time_beta']}: both numbers must be positive.")


def _tidy_help(config_type: type) -> None:
    """Make --help read well: docstrings unwrapped, no `(default: None)` behind a default told in words."""
    from docstring_parser import parse_from_object

    for doc in parse_from_object(config_type).params:
        option = config_type.__dataclass_fields__.get(doc.arg_name)
        if option is not None:
            text = " ".join((doc.description or "").split())
            hint = "" if option.default in (None, ()) else None
            note = tyro.conf.arg(help=text, help_behavior_hint=hint)
            config_type.__annotations__[option.name] = Annotated[option.type, note]
    for kind in get_type_hints(config_type).values():
        if dataclasses.is_dataclass(kind):
            _tidy_help(kind)


def _expand_paths(value: Any) -> Any:
    """Replace a leading ~ in every path of a configuration: the shell leaves `--flag=~/folder` alone."""
    if isinstance(value, Path):
        return value.expanduser()
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _expand_paths(getattr(value, name)) for name in names})
    return value


def _with_absolute_data[T](config: T) -> T:
    """The configuration with the data's place in full: a run may be resumed from another folder."""
    data = getattr(config, "data", None)
    if data is None:
        return config
    found = {"dataset": tuple(_absolute(source) for source in data.dataset)}
    for name in ("cache_dir", "episodes_file"):
        path = getattr(data, name)
        found[name] = path and path.absolute()
    return dataclasses.replace(config, data=dataclasses.replace(data, **found))


def _absolute(source: str) -> str:
    """A dataset's folder or file in full; names of hub datasets and built-in ones as they are."""
    path = Path(source).expanduser()
    return str(path.absolute()) if source != "demo" and path.exists() else source


def _without_rival[T](config: T, argv: Sequence[str]) -> T:
    """Drop the file's `steps` where a flag gives `epochs`, and the reverse: only one of them may be set."""
    given = {word.split("=")[0].replace("_", "-") for word in argv}
    rival = {("--steps",): "epochs", ("--epochs",): "steps"}.get(tuple(given & {"--steps", "--epochs"}))
    if rival is None or not hasattr(getattr(config, "optim", None), rival):
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **{rival: None}))


def _with_run[T](config: T, /, **changes: Any) -> T:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def _resumed_run(run: RunConfig) -> Path | None:
    """The run folder to continue, if one is asked for and, with `auto`, there is something to continue."""
    if run.resume is None:
        return None
    if run.resume == "auto":
        if run.run_dir is None:
            raise UserError("--resume auto needs --run-dir, to know which run to continue.")
        if not _has_checkpoint(run.run_dir):
            return None
        if not (run.run_dir / "config.json").is_file():
            raise UserError(
                f"{run.run_dir} holds checkpoints but no config.json: copy the whole folder of the run."
            )
        return run.run_dir
    folder = Path(run.resume).expanduser()
    for flag, value in (("--config", run.config), ("--run-dir", run.run_dir)):
        if value is not None and value.absolute() != folder.absolute():
            raise UserError(
                f"--resume {run.resume} goes on in that folder with its own configuration: leave out "
                f"{flag} {value}."
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {run.resume}: {folder} holds no config.json; give the folder of a run.")
    if not _has_checkpoint(folder):
        raise UserError(
            f"--resume {run.resume}: {folder} holds no checkpoint yet; start anew with another --run-dir, or "
            f"with --run-dir {folder} --resume auto."
        )
    return folder


def _has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was written to its end there."""
    return any((folder / "checkpoints").glob("step_*/checksums.json"))


def _refuse_used(run_dir: Path | None, restart: bool) -> None:
    """Refuse to start a run in a folder that holds something.

    Args:
        restart: accept a run that died before its first checkpoint; nothing of it is worth keeping.
    """
    if run_dir is None or not run_dir.exists():
        return
    held = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else {"a file"}
    begun = all(name.endswith(".part") or name == "changes.patch" for name in held)
    if held and not (restart and ("config.json" in held or begun)):
        raise UserError(
            f"{run_dir} exists and is not empty: continue it with --resume {run_dir}, or name another "
            f"--run-dir."
        )


def _refuse_changes(before: Any, now: Any, resumed: Path) -> None:
    """Refuse flags given beside --resume that would make the run another experiment."""
    old, new = flat_options(before), flat_options(now)
    for name, value in new.items():
        # Schedule-free training has an optimizer of its own, whose state is unlike the others'.
        other_optimizer = name == "schedule" and "schedule-free" in (value, old[name])
        if value != old[name] and (other_optimizer or name not in MAY_CHANGE_ON_RESUME):
            raise UserError(
                f"--{name.replace('_', '-')} was {_shown(old[name])} when {resumed} began and cannot become "
                f"{_shown(value)}: leave it out, or start a new run with --init-from {resumed}."
            )


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list) else str(value)


def flat_options(config: Any) -> dict[str, Any]:
    """Options of a configuration by their flag's name, option groups flattened, as JSON can hold them."""
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        flat |= flat_options(value) if isinstance(value, dict) else {name: value}
    return flat


# config.json


def to_dict(config: Any) -> Any:
    """A configuration as JSON can hold it; `from_dict` is the inverse."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_dict[T](config_type: type[T], values: Any) -> T:
    """The configuration that `to_dict` was given; absent options take their default.

    Raises:
        UserError: for an option that does not exist or a value of the wrong type; names it.
    """
    return _value(config_type, values, "configuration")


def _value(kind: Any, value: Any, name: str) -> Any:
    """`value`, read from JSON, as the type `kind`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(args[0], value, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(kind)})
        if unknown:
            raise UserError(
                f"{name} has no option {unknown[0]!r}: remove it, or use the version that wrote it."
            )
        return kind(**{key: _value(hints[key], item, key) for key, item in value.items()})
    if origin in (Union, types.UnionType):
        for choice in args:
            try:
                return _value(choice, value, name)
            except UserError:
                continue
    elif kind is type(None) and value is None:
        return None
    elif origin is Literal and value in args:
        return value
    elif origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else args
        if len(kinds) == len(value):
            return tuple(_value(k, item, name) for k, item in zip(kinds, value, strict=True))
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise UserError(f"{name} cannot be {value!r}: it must be {_described(kind)}.")


def _described(kind: Any) -> str:
    """A type in words a user can act on."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, args))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_described, args))
    if get_origin(kind) is tuple:
        return "a list of " + (_described(args[0]) if args[-1] is ... else ", ".join(map(_described, args)))
    if dataclasses.is_dataclass(kind):
        return "a group of options"
    return {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
    }.get(kind, "null")


def read_config[T](config_type: type[T], path: Path, script: str) -> T:
    """The configuration in a JSON file: a run's `config.json`, or the options alone.

    Raises:
        UserError: if the file is missing, damaged, or another script's.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a run's config.json.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options: give a run's config.json.")
    if values.get("script", script) != script:
        raise UserError(f"{path} belongs to {values['script']}, not to {script}: use that script.")
    return from_dict(
        config_type, values.get("config", {key: v for key, v in values.items() if key != "script"})
    )


def write_run_config(run_dir: Path, script: str, config: Any, extra: dict[str, Any]) -> None:
    """Write `config.json`: what is needed to repeat the run. Replaced in one step, never half-written.

    Args:
        script: the training script's name.
        extra: further entries, as the dataset's fingerprint.
    """
    packages = ("torch", "torchvision", "accelerate", "transformers", "lerobot", "safetensors", "numpy", "av")
    versions = {"python": sys.version.split()[0]}
    installed = {name: _version(name) for name in packages}
    versions |= {name: version for name, version in installed.items() if version is not None}
    git, changes = _git()
    values = {"script": script, "config": to_dict(config), "versions": versions, **git, **extra}
    write_json(run_dir / "config.json", values)
    if changes:
        write_whole(run_dir / "changes.patch", changes.encode(errors="replace"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[dict[str, Any], str]:
    """Commit of this checkout, whether files differ from it, and how; nothing where there is no git.

    New Python and JSON files are part of the difference: with the commit it is the code that ran.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*command: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=30)
        if done.returncode not in codes:
            raise subprocess.SubprocessError(done.stderr)
        return done.stdout

    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--no-color")
        for name in git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.json").splitlines():
            changes += git("diff", "--no-color", "--no-index", os.devnull, name, codes=(0, 1))
        dirty = bool(git("status", "--porcelain").strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}, ""
    return {"git_commit": commit, "git_dirty": dirty}, changes


def resolve_steps(
    steps: int | None,
    epochs: float | None,
    num_samples: int,
    global_batch: int,
    done_steps: int = 0,
    done_samples: int = 0,
) -> int:
    """Optimizer steps to train for, from the beginning of the run.

    Args:
        num_samples: in an epoch.
        done_steps, done_samples: where a resumed run stands; its global batch may have been another.

    Raises:
        UserError: if both are given, or they come to less than one step.
    """
    if steps is not None and epochs is not None:
        raise UserError("--steps and --epochs both say how long to train: give one of them.")
    total = DEFAULT_STEPS if steps is None else steps
    if epochs is not None:
        total = done_steps + math.floor((epochs * num_samples - done_samples) / global_batch + 0.5)
    if total < 1:
        given = f"--steps {steps}" if epochs is None else f"--epochs {epochs}"
        raise UserError(f"{given} comes to {total} optimizer steps: train for at least 1.")
    return total
