"""The command line: one typed `Config` per script, restored from a run folder or a file.

Values come from the dataclass's defaults, then `--config FILE` or the resumed run's `config.json`, then
explicit flags; the last one wins. The option's annotation states its range, and whether it may differ when a
run is resumed:

    @options
    class Config:
        horizon: PositiveInt = 16                          # at least 1; may not change on resume
        sample_steps: MayChange[PositiveInt] = 10          # may change on resume
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

import tyro
from docstring_parser import parse_from_object
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass as validated_dataclass

from common.console import say
from common.errors import UserError, explain
from common.files import completed_checkpoints, read_json

T = TypeVar("T")
Flat = Annotated[T, tyro.conf.OmitArgPrefixes]
"""A nested option group with its own heading in the help, and flat flags: `config.optim.lr` is `--lr`."""
MAY_CHANGE = "may change on resume"
MayChange = Annotated[T, MAY_CHANGE]
"""An option that may differ when a run is resumed; any other would make it a different experiment."""
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["no", "bf16", "fp16"]
Compile = Literal["no", "default", "graphs"]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path; a leading ~ is the home folder, because the shell does not expand it in `--flag=~/folder`."""
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""An absolute path, because a run may be resumed from another working directory."""


@dataclass_transform(frozen_default=True)
def options[T](cls: type[T]) -> type[T]:
    """Make a class of options: a frozen dataclass whose values are checked against their annotations.

    Docstrings below the fields become the help, without `(default: None)`: the text says what None does.
    """
    with suppress(OSError, TypeError):  # a class without a source file, as in a notebook, has no help
        for doc in parse_from_object(cls).params:
            hint = "" if getattr(cls, doc.arg_name, ...) in (None, ()) else None
            note = tyro.conf.arg(help=" ".join((doc.description or "").split()), help_behavior_hint=hint)
            cls.__annotations__[doc.arg_name] = Annotated[cls.__annotations__[doc.arg_name], note]
    settings = ConfigDict(extra="forbid", allow_inf_nan=False, ser_json_inf_nan="strings")
    made = validated_dataclass(cls, frozen=True, config=settings)
    construct = made.__init__

    def __init__(self, *args, **values):
        try:
            construct(self, *args, **values)
        except ValidationError as error:
            raise UserError(_sentence(error)) from None

    made.__init__ = __init__
    return made


def _sentence(error: ValidationError) -> str:
    """pydantic's first error, as a sentence that names the flag."""
    first = error.errors(include_url=False)[0]
    name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "")
    if first["type"] == "unexpected_keyword_argument":
        return f"There is no option {name!r}: remove it, or use the version that wrote it."
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not name:
        return f"{reason.rstrip('.')}."
    return f"--{name.replace('_', '-')} is {shown(first['input'])}: it {reason.rstrip('.')}."


def _once_a_flag(value: Any) -> Any:
    """Read `--compile` from files of older versions, where it was true or false."""
    return {False: "no", True: "default"}[value] if isinstance(value, bool) else value


@options
class RunConfig:
    """The run: its folder, logging, checkpoints, precision."""

    run_dir: MayChange[UserPath | None] = None
    """The run folder itself (default: runs/METHOD-YYYYmmdd-HHMMSS). Must be new or empty, or use --resume."""
    resume: MayChange[str | None] = None
    """Run folder to continue, with its configuration; other flags override it. `auto` continues --run-dir if
    it holds a checkpoint and starts it otherwise, so that a job can be restarted unchanged."""
    config: MayChange[UserPath | None] = None
    """JSON file to take the configuration from, a run's config.json or one of configs/; flags override it.
    --run-dir, --resume and --push-to-hub are not taken from it."""
    init_from: tuple[str, ...] = ()
    """Weights to start from: RUN, component=RUN, component=FILE.safetensors or component=FILE.pt. RUN may
    also be an exported policy, as its folder or its name on the hub. Statistics are those of the new data."""
    freeze: tuple[str, ...] = ()
    """Components that are not trained."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, data order and noise."""
    log_every: MayChange[PositiveInt] = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: MayChange[PositiveInt] = 1000
    """Steps between evaluations on held-out episodes."""
    eval_samples: MayChange[PositiveInt] = 512
    """Evaluate on at most this many held-out steps, evenly spaced."""
    save_every: MayChange[PositiveInt] = 1000
    """Steps between checkpoints; the last step is always saved."""
    background_saving: MayChange[bool] = True
    """Checkpoints are written while training continues, from a copy of weights, moments and averages in the
    memory of the first process's machine (with AdamW, 16 bytes a parameter); without, training waits."""
    keep: MayChange[PositiveInt] = 3
    """Keep this many newest checkpoints."""
    keep_every: MayChange[PositiveInt | None] = None
    """Also keep the checkpoint of every step that is a multiple of this."""
    max_time: MayChange[NonNegativeFloat | None] = None
    """Hours after which the run saves and ends with exit code 75, as it does on SIGTERM."""
    hang_timeout: MayChange[NonNegativeFloat] = 1800.0
    """Seconds without progress after which the job ends and names the process that is behind; 0: never."""
    max_bad_steps: MayChange[PositiveInt] = 20
    """Stop, and name the samples, after this many steps in a row whose loss or gradient was not finite;
    checked when a line of metrics is written."""
    deterministic: MayChange[bool] = False
    """Use only algorithms whose result is always the same, bit for bit; slower on CUDA."""
    mixed_precision: MayChange[Precision | None] = None
    """Precision of forward and backward pass (default: that of `accelerate launch`, else the resumed run's,
    else no)."""
    compile: MayChange[Annotated[Compile, BeforeValidator(_once_a_flag)]] = "no"
    """default: compile policy, augmentation and loss with torch.compile; the first step is slow, later ones
    are faster. graphs: also launch them as CUDA graphs, which pays off for small networks; needs
    --grad-accumulation 1. Without a value: default."""
    checkpoint_activations: MayChange[bool] = False
    """Store few of the backbones' activations, and compute them again in the backward pass: less memory, the
    same gradient, but backbones take about a third longer."""
    tracker: MayChange[Literal["none", "wandb", "tensorboard"]] = "none"
    """Where metrics go in addition to metrics.jsonl."""
    project: MayChange[str] = "flow-policies"
    """Project name for wandb."""
    push_to_hub: MayChange[str | None] = None
    """Push the policy to this name on the hub (owner/name) at the end of the run; see docs/lerobot.md."""


def cli[T](
    main: Callable[[Any], None],
    config_type: type[T],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse the command line and run a script; its last line calls this. Exit codes: see docs/running.md.

    `prog` is what the user has typed before `argv`, unless that is the script, or `python -m` and its name.
    """
    module = sys.modules[config_type.__module__]
    script = Path(module.__file__).name
    if module.__name__ == "__main__" and module.__spec__:
        prog = prog or f"python -m {module.__spec__.name.removesuffix('.__main__')}"
    try:
        main(parse(config_type, list(sys.argv[1:] if argv is None else argv), script, prog))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {explained[0]}", file=sys.stderr)
        else:  # most errors occur in all processes: the launcher ends this one after rank 0
            time.sleep(3)
            print(f"error in process {rank}: {explained[0]}", file=sys.stderr)
        sys.exit(explained[1])


def parse[T](config_type: type[T], argv: Sequence[str], script: str, prog: str | None = None) -> T:
    """A script's configuration from its command line; the module's docstring says which value wins.

    Its help calls the program `prog`, by default `script`.
    """

    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)

    def from_flags(default: T | None) -> T:
        return tyro.cli(config_type, args=list(argv), default=default, prog=prog or script, config=markers)

    def from_file(path: Path) -> T:
        """A file's options, without those of that run alone, and without one that a flag replaces."""
        base = _with_run(read_config(config_type, path, script), run_dir=None, resume=None, config=None)
        return _without_rival(base, argv)

    if not issubclass(get_type_hints(config_type).get("run", object), RunConfig):  # such as serve.py
        return from_flags(None)
    followed = pairwise([*argv, "-"])
    argv = [x for w, n in followed for x in (w, "default")[: 1 + (w == "--compile" and n[:1] == "-")]]
    if {"-h", "--help"} & set(argv):
        from_flags(None)  # and ends
    # Only what says where the others are: they may fit those of the file, but not the defaults.
    run, _ = tyro.cli(
        RunConfig, args=argv, prog=prog or script, return_unknown_args=True, add_help=False, config=markers
    )
    resumed = _resumed_run(run)
    if resumed is not None:
        base = from_file(resumed / "config.json")
        config = from_flags(base)
        _refuse_changes(base, config, resumed)
        _tell_of_new_options(config, resumed)
        return _with_run(config, run_dir=resumed, resume=str(resumed))
    # A new run must not replace what the earlier one pushed.
    config = from_flags(_with_run(from_file(run.config), push_to_hub=None) if run.config else None)
    _refuse_used(run.run_dir, restart=run.resume == "auto")
    return _with_run(config, resume=None)


def _without_rival[T](config: T, argv: Sequence[str]) -> T:
    """Drop the file's `steps` if a flag gives `epochs`, and vice versa: only one of them may be set."""
    given = {word.split("=")[0].replace("_", "-") for word in argv}
    rival = {("--steps",): "epochs", ("--epochs",): "steps"}.get(tuple(given & {"--steps", "--epochs"}))
    if rival is None or not hasattr(getattr(config, "optim", None), rival):
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **{rival: None}))


def _with_run[T](config: T, /, **changes: Any) -> T:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


def _resumed_run(run: RunConfig) -> Path | None:
    """The run folder to continue; None without --resume, or with `auto` if there is nothing to continue."""
    if run.resume is None:
        return None
    if run.resume == "auto":
        if run.run_dir is None:
            raise UserError("--resume auto needs --run-dir, to know which run to continue.")
        if not completed_checkpoints(run.run_dir):
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
                f"--resume {run.resume} continues in that folder with its own configuration: leave out "
                f"{flag} {value}."
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"--resume {run.resume}: {folder} holds no config.json; give the folder of a run.")
    if not completed_checkpoints(folder):
        raise UserError(
            f"--resume {run.resume}: {folder} holds no checkpoint yet; start again with another --run-dir, "
            f"or with --run-dir {folder} --resume auto."
        )
    return folder


def _refuse_used(run_dir: Path | None, restart: bool) -> None:
    """Refuse to start a run in a folder that is not empty.

    With `restart` it may hold a run that died before its first checkpoint: nothing in it is worth keeping.
    """
    if run_dir is None or not run_dir.exists():
        return
    held = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else {"a file"}
    begun = all(name.endswith(".part") or name in (".lock", "changes.patch") for name in held)
    if held and not (restart and ("config.json" in held or begun)):
        raise UserError(
            f"{run_dir} exists and is not empty: continue it with --resume {run_dir}, or name another "
            f"--run-dir."
        )


def _refuse_changes(before: Any, now: Any, resumed: Path) -> None:
    """Refuse flags given with --resume that would make the run a different experiment."""
    old, new = flat_options(before), flat_options(now)
    for name in _fixed_options(type(now)):
        if new[name] != old[name]:
            raise UserError(
                f"--{name.replace('_', '-')} was {shown(old[name])} when {resumed} began and cannot become "
                f"{shown(new[name])}: leave it out, or start a new run with --init-from {resumed}."
            )


def _tell_of_new_options(config: Any, resumed: Path) -> None:
    """Warn if the run is of an earlier version, which did not know some of the options that define it."""
    had, now = flat_options(read_json(resumed / "config.json")["config"]), flat_options(config)
    if new := [name for name in _fixed_options(type(config)) if name not in had]:
        values = ", ".join(f"--{name.replace('_', '-')} {shown(now[name])}" for name in new)
        say(f"warning: an earlier version began {resumed}; from here on it also has {values}")


def _fixed_options(config_type: type) -> list[str]:
    """Names of the options that may not change on resume: those without the marker `MayChange`."""
    names = []
    for name, kind in get_type_hints(config_type, include_extras=True).items():
        if MAY_CHANGE in getattr(kind, "__metadata__", ()):
            continue
        group = getattr(kind, "__origin__", kind)
        names += _fixed_options(group) if dataclasses.is_dataclass(group) else [name]
    return names


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list | tuple) else str(value)


def flat_options(config: Any) -> dict[str, Any]:
    """Options of a configuration by flag name, option groups flattened, as JSON values."""
    flat: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else to_dict(config)).items():
        flat |= flat_options(value) if isinstance(value, dict) else {name: value}
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON values; `from_dict` is the inverse."""
    return json.loads(TypeAdapter(type(config)).dump_json(config))


def from_dict[T](config_type: type[T], values: Any) -> T:
    """The configuration that `to_dict` was given; absent options take their default.

    Raises a UserError that names an option that does not exist, has the wrong type or is out of range.
    """
    try:
        return TypeAdapter(config_type).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def read_config[T](config_type: type[T], path: Path, script: str) -> T:
    """The configuration in a script's JSON file: a run's `config.json`, or the options alone."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a run's config.json.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options: give a run's config.json.")
    if values.get("script", script) != script:
        raise UserError(f"{path} belongs to {values['script']}, not to {script}: use that script.")
    options_alone = {key: value for key, value in values.items() if key != "script"}
    return from_dict(config_type, values.get("config", options_alone))
