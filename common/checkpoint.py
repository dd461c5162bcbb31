"""Checkpoints: save, resume, start from another run.

    checkpoints/step_0002000/
        policy/         what inference needs: <component>.safetensors (averaged weights), policy.json,
                        stats.safetensors
        state/          what resuming also needs: Accelerate's state (weights, optimizer, random
                        generators), trainer.json, metrics that are not logged yet, growth.json
        checksums.json  size and CRC-32 of every file
    checkpoints/last -> the newest complete checkpoint

A checkpoint is written under a temporary name and renamed when it is complete and on disk: no interruption
leaves half of one. Checksums find later damage. Nothing that is loaded can run code:
weights are safetensors, settings JSON, and Accelerate's own state is read with `weights_only`.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils import (
    OPTIMIZER_NAME,
    SAFE_WEIGHTS_NAME,
    broadcast_object_list,
    clean_state_dict_for_safetensors,
    gather_object,
)
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from common import exported
from common.config import flat_options, shown, to_dict
from common.console import say
from common.data import ChunkDataset
from common.data.cameras import known_name
from common.data.growth import LOG as GROWTH_LOG
from common.data.rotation import Rotations
from common.errors import UserError
from common.files import (
    CHECKSUMS,
    checksum,
    completed_checkpoints,
    read_json,
    sync,
    sync_one,
    write_json,
    write_whole,
)
from common.instructions import Instructions
from common.optim import AveragedPolicy
from common.vision import Backbone

if TYPE_CHECKING:
    from common.run import Run


STATISTICS = "stats.safetensors"  # in a policy folder, but no component
ORDERED = {"cameras": "--cameras", "state_names": "--state-keys", "action_names": "--action-keys"}
"""What weights take in a certain order, and the options that set it."""
MEANING = ("fps", "action_offset", "normalization", "relative_actions", "relative_mask", "relative_poses")
"""What else changes the meaning of the same numbers."""


@dataclass(frozen=True)
class PolicySpec:
    """What a policy must know about its data; kept in `policy.json`.

    Attributes:
        cameras, camera_keys: short names, and full names in the dataset, in the order of the images; the
            first is the head camera.
        fps: control steps per second.
        proprio_history: K, states in an observation.
        image_history: F, frames of each camera in an observation.
        image_stride: control steps between two frames.
        action_offset: control steps from an observation to the first action of its chunk.
        max_delay: largest number of given actions at the start of a chunk, see `common/flow.py`.
        state_rotations, action_rotations: rotations that were re-expressed, see `common/data/rotation.py`.
        backbone_config: architecture of a Hugging Face backbone, so that loading needs no hub.
        tasks: the instructions that the policy knows; None if it is not told any.
    """

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float
    camera_keys: tuple[str, ...] = ()
    task: str | None = None
    proprio_history: int = 1
    image_history: int = 1
    image_stride: int = 1
    action_offset: int = 0
    max_delay: int = 0
    state_rotations: Rotations | None = None
    action_rotations: Rotations | None = None
    backbone_config: dict | None = None
    tasks: Instructions | None = None

    def camera(self, name: str) -> str:
        """A camera's name in `cameras`, given its full or short name."""
        by_key = dict(zip(self.camera_keys, self.cameras, strict=False))
        return by_key.get(name) or known_name(name, self.cameras)

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def recorded_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the robot's state and action, before rotations are re-expressed."""
        state, action = self.state_rotations, self.action_rotations
        return state.recorded if state else self.state_names, action.recorded if action else self.action_names

    @classmethod
    def of(cls, dataset: ChunkDataset, backbone_config: dict | None = None) -> PolicySpec:
        """The spec of policies for a dataset."""
        known = {
            f.name: getattr(part, f.name)
            for part in (dataset.store, dataset)
            for f in fields(cls)
            if hasattr(part, f.name)
        }
        return cls(**known, backbone_config=backbone_config)

    @property
    def views(self) -> int:
        """N F, frames in an observation."""
        return len(self.cameras) * self.image_history

    def with_backbone(self, policy: nn.Module) -> PolicySpec:
        """The spec with the architecture of the policy's backbones; cameras that have their own share it."""
        backbone = next((m for m in policy.modules() if isinstance(m, Backbone)), None)
        return replace(self, backbone_config=backbone and backbone.hf_config)

    @classmethod
    def from_json(cls, values: dict) -> PolicySpec:
        return TypeAdapter(cls).validate_python(values)

    @classmethod
    def load(cls, checkpoint: Path) -> PolicySpec:
        """The spec in a checkpoint."""
        return cls.from_json(read_settings(checkpoint)["spec"])

    def to_json(self) -> dict:
        """Everything but the vectors of instructions, which are among the weights."""
        return asdict(replace(self, tasks=self.tasks and replace(self.tasks, table=None)))


def save(run: Run) -> Future[int | None] | None:
    """Write the checkpoint of a run's step; every process calls it and writes its own random state.

    Tensors are copied to the first process's memory, and its thread `run.writer` writes them while training
    goes on. That thread uses neither the device nor other processes. Where training ends, nothing is copied;
    where there is no memory for a copy, training waits.
    A full disk costs this checkpoint, not the run: a warning is printed, and earlier checkpoints stay.

    Returns:
        In the first process, a future: the step when its checkpoint is complete, or None if it has failed.
    """
    options, folder, step = run.config.run, run.folder / "checkpoints", run.step
    final, unfinished = folder / f"step_{step:07d}", folder / f".step_{step:07d}.unfinished"

    def begin() -> None:
        if run.is_main:
            for leftover in folder.glob(".*.unfinished"):
                shutil.rmtree(leftover)
            (unfinished / "policy").mkdir(parents=True)
            (unfinished / "state").mkdir()

    def complete(large: dict[str, dict], trouble: str | None) -> int | None:
        if trouble := trouble or _trouble(partial(_complete, large, unfinished, final)):
            shutil.rmtree(unfinished, ignore_errors=True)
            say(f"warning: step {step} is not saved ({trouble}): training continues; free disk space")
            return None
        _prune(final, options.keep, options.keep_every)
        return step

    trouble = _agreed(begin) or _agreed(partial(_write_small, run, unfinished))
    if not run.is_main:
        return None
    large, ends = {} if trouble else _large(run), run.stopping or run.step == run.total_steps
    if options.background_saving and not ends:
        try:
            large = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), large)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
            say(f"warning: there is no memory to save step {step} in the background: training waits for it")
            wait([saving := run.writer.submit(complete, large, trouble)])
            return saving
    return run.writer.submit(complete, large, trouble)


def _write_small(run: Run, folder: Path) -> None:
    """Write the small files: each process its random state and metrics, the first all but the tensors."""
    policy, state, accelerator = folder / "policy", folder / "state", run.accelerator
    scaler = accelerator.scaler if run.is_main else None
    save_accelerator_state(str(state), [], [], [], [], run.rank, accelerator.step, scaler)
    run.tracker.save(state)
    if not run.is_main:
        return
    run.data.normalizer.save(policy / "stats.safetensors")
    settings = {"script": run.script.name, "step": run.step}
    settings |= {"spec": run.data.spec.to_json(), "config": to_dict(run.config)}
    write_json(policy / "policy.json", settings)
    trainer = {"step": run.step, "samples": run.samples, "updates": run.average.updates}
    trainer |= {"processes": run.world, "optimizer": type(run.average.optimizer).__name__}
    write_json(state / "trainer.json", trainer)
    if (log := run.folder / GROWTH_LOG).exists():
        shutil.copy(log, state / GROWTH_LOG)


def _large(run: Run) -> dict[str, dict]:
    """The tensors of a checkpoint, by file: weights and optimizer as Accelerate loads them, and averages."""
    weights = clean_state_dict_for_safetensors(run.average.policy.state_dict())
    optimizer = run.average.optimizer.state_dict()
    components = run.average.model.named_children()
    return {
        f"state/{SAFE_WEIGHTS_NAME}": weights,
        f"state/{OPTIMIZER_NAME}.bin": optimizer,
        **{f"policy/{name}.safetensors": component.state_dict() for name, component in components},
    }


def _complete(large: dict[str, dict], unfinished: Path, final: Path) -> None:
    """Write the tensors, and give the checkpoint its name once all of it is on disk."""
    for name, content in large.items():
        if name.endswith(".bin"):
            torch.save(content, unfinished / name)
        else:
            tensors = {key: value.cpu().contiguous() for key, value in content.items()}
            save_file(tensors, unfinished / name)
    seal(unfinished)
    sync(unfinished)
    if final.exists():  # the run was resumed from an older checkpoint and has reached this step again
        shutil.rmtree(final)
    unfinished.rename(final)
    _point(final.parent / "last", final.name)
    sync_one(final.parent)


def _point(link: Path, name: str) -> None:
    """Make a symbolic link, in one step: it never dangles, whenever the process is killed.

    Where there are no links, there is none: then the newest checkpoint is the last.
    """
    if link.is_dir() and not link.is_symlink():  # made by a copy that followed links
        shutil.rmtree(link)
    made = link.with_name(f".{link.name}.new")
    made.unlink(missing_ok=True)
    try:
        made.symlink_to(name)
        made.replace(link)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        link.unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """Write size and CRC-32 of a checkpoint's files, to find damage later."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {str(path.relative_to(checkpoint)): [path.stat().st_size, checksum(path)] for path in files}
    write_json(checkpoint / CHECKSUMS, sums)


def _agreed(action: Callable[[], None]) -> str | None:
    """Do something that writes, on every process; returns to all what went wrong on one of them."""
    return next(filter(None, gather_object([_trouble(action)])), None)


def _trouble(action: Callable[[], None]) -> str | None:
    """Do something that writes; returns what went wrong with the disk."""
    try:
        action()
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        # torch reports a failed write as an error of its archive; its other errors are not about files
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", reason):
            raise
        return reason
    return None


def _prune(newest: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and those of every `keep_every`-th step."""
    # Later steps date from before the run went back to an older checkpoint: do not count or delete them.
    older = sorted(path for path in newest.parent.glob("step_*") if path.name < newest.name)
    for path in older[: max(len(older) - (keep - 1), 0)]:
        step = path.name.removeprefix("step_")
        if not (keep_every and step.isdigit() and int(step) % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def find(run_dir: Path, name: str = "last") -> Path:
    """Folder of a run's checkpoint: `last`, a step folder's name, or a step's number.

    Raises:
        UserError: if the run or the checkpoint is not there; lists those that are.
    """
    there = completed_checkpoints(run_dir)
    if not there:
        raise UserError(
            f"{run_dir} holds no finished checkpoint: give the folder of a run that has saved one."
        )
    if name == "last":
        # If it does not exist, someone deleted newer step folders and left `last` dangling.
        last = (there[0].parent / "last").resolve()
        return last if last in there else there[-1]
    name = f"step_{int(name):07d}" if re.fullmatch(r"\d{1,12}", name) else name
    by_name = {path.name: path for path in there}
    if name not in by_name:
        raise UserError(f"{run_dir} holds no checkpoint {name}: choose one of {', '.join(by_name)}.")
    return by_name[name]


def damage(checkpoint: Path, part: str = "") -> str | None:
    """How a checkpoint's files differ from what was written, as a clause; None: they do not.

    Args:
        part: check only files whose path begins with this, such as `policy/`.
    """
    try:
        sums = read_json(checkpoint / CHECKSUMS)
        files = {name: (size, crc) for name, (size, crc) in sums.items() if name.startswith(part)}
        if not files:
            return f"{CHECKSUMS} names no file of {part or 'it'}"
        for name, (size, crc) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksum(path) != crc:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({_reason(error)})"
    return None


def refuse_damaged(checkpoint: Path, part: str = "") -> None:
    """Raise a UserError that names the file if one differs from what was written."""
    if what := damage(checkpoint, part):
        raise UserError(f"{checkpoint} is damaged ({what}): use another checkpoint.")


def newest_undamaged(run_dir: Path, part: str = "", tell: bool = False) -> Path:
    """The newest undamaged checkpoint of a run, at most the one that `last` names.

    Args:
        part: see `damage`.
        tell: print a warning for each damaged one.
    """
    last = find(run_dir)
    found = []
    for path in reversed([path for path in completed_checkpoints(run_dir) if path.name <= last.name]):
        what = damage(path, part)
        if what is None:
            return path
        found.append(f"{path.name}: {what}")
        if tell:
            say(f"warning: {path} is damaged ({what}); using the checkpoint before it")
    raise UserError(
        f"{run_dir} holds no undamaged checkpoint ({'; '.join(found)}): restore one from a copy, or start "
        f"a new run with another --run-dir."
    )


def read_settings(checkpoint: Path) -> dict:
    """The content of a checkpoint's `policy.json`: script, spec, config and step; a UserError if damaged."""
    path = checkpoint / "policy" / "policy.json"
    try:
        settings = read_json(path)
        missing = {"script", "spec", "config", "step"} - set(settings)
        if missing or "backbone_config" not in settings["spec"]:
            raise ValueError(f"no {', '.join(sorted(missing)) or 'backbone_config'}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): use another checkpoint.") from None
    return settings


def restore(accelerator: Accelerator, run_dir: Path, average: AveragedPolicy) -> tuple[int, int]:
    """Load the last checkpoint of a run into what `accelerator.prepare` returned, on every process.

    If it is damaged, the one before it is used, with a warning. With the number of processes that saved it,
    training continues bit for bit (on CPU). With another number, it continues at the same position in the
    data but with other noise, and prints that.

    Returns:
        The run's step and samples when it was saved.

    Raises:
        UserError: if there is no undamaged checkpoint, or it is of another policy or optimizer.
    """
    path = newest_undamaged(run_dir, tell=True) if accelerator.is_main_process else None
    if path is not None:
        _restore_growth(path / "state" / GROWTH_LOG, run_dir / GROWTH_LOG)
    path = broadcast_object_list([path])[0]  # the first process looks, for all
    try:
        trainer = read_json(path / "state" / "trainer.json")
        _refuse_other_optimizer(path, trainer, average.optimizer)
        scaler = accelerator.scaler
        if not (path / "state" / "scaler.pt").exists():
            accelerator.scaler = None  # fp16 only from now on: its scale starts from the beginning
        accelerator.load_state(str(path / "state"))
        accelerator.scaler = scaler
        # Its count of micro-batches: a checkpoint lies between optimizer steps, whatever is accumulated now.
        accelerator.step = trainer["step"] * accelerator.gradient_accumulation_steps
        average.load(_read_components(path / "policy", average.policy), trainer["updates"])
        if trainer["processes"] == accelerator.num_processes:
            _check_random_state(path / "state" / f"random_states_{accelerator.process_index}.pkl")
        else:
            say(
                f"{path.name} was saved by {trainer['processes']} processes, now there are "
                f"{accelerator.num_processes}: the data order continues, the noise differs."
            )
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, RuntimeError) and "state_dict" in reason:
            raise UserError(
                f"{path} was saved by another network ({reason}): restore the script, or start a new run "
                f"with --init-from {run_dir}."
            ) from None
        raise UserError(
            f"{path} cannot be resumed ({reason}): if it is damaged, move it away to resume from the "
            f"checkpoint before it."
        ) from None
    return trainer["step"], trainer["samples"]


def _restore_growth(saved: Path, log: Path) -> None:
    """Put the run folder's log of new episodes back, if it is lost or knows less than the checkpoint."""
    known: list = []
    with suppress(OSError, ValueError):
        known = read_json(log)
    if saved.exists() and len(read_json(saved)) > len(known):
        say(f"{log} is missing or too short: it is written again, from {saved.parents[1].name}")
        write_whole(log, saved.read_bytes())


def _refuse_other_optimizer(path: Path, trainer: dict, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to change the optimizer: schedule-free training has its own, with a different state."""
    before, now = trainer.get("optimizer"), type(optimizer).__name__
    if before not in (None, now):
        raise UserError(
            f"{path} was trained with {before} and cannot continue with {now}: leave out --schedule, or "
            f"start a new run with --init-from {path.parents[1]}."
        )


def _reason(error: Exception) -> str:
    """An error's text, short and on one line."""
    return " ".join(str(error).split())[:300]


def _check_random_state(path: Path) -> None:
    """Accelerate continues silently when it could not restore a random state; a resumed run must not."""
    # numpy's part of the state needs more than plain tensors, so we compare only torch's, by its bytes.
    state = torch.get_rng_state().numpy().tobytes()
    if state not in path.read_bytes():
        raise UserError(
            f"{path} does not hold the random state: move its checkpoint away to use the one before it."
        )
    if torch.cuda.is_available() and torch.cuda.get_rng_state().numpy().tobytes() not in path.read_bytes():
        say(f"warning: the random state of the GPU is not in {path}: the noise differs from here on")


def _read_components(folder: Path, policy: nn.Module) -> dict[str, Tensor]:
    """State dict of a policy, from the files of its components in a folder."""
    return {
        f"{name}.{key}": value
        for name, _ in policy.named_children()
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def load_components(policy: nn.Module, folder: Path) -> None:
    """Load every component of a policy from a checkpoint's `policy` folder; names and shapes must match.

    Raises:
        UserError: if a file is missing, damaged, or of another architecture.
    """
    try:
        policy.load_state_dict(_read_components(folder, policy))
    except Exception as error:
        raise UserError(
            f"The weights in {folder} cannot be loaded into this network ({_reason(error)}): use them with "
            f"the scripts they were trained with, or use another checkpoint."
        ) from None


def initialise(policy: nn.Module, sources: tuple[str, ...]) -> set[str]:
    """Start from the weights of other policies (`--init-from`).

    Args:
        sources: each is a run folder or an exported policy (every component that both policies have), or
            `component=SOURCE`, where SOURCE may also be a `.safetensors` file or a `.pt` state dict. A
            backbone is also found within another component of a run.

    Returns:
        Names of the components that were loaded.

    Raises:
        UserError: if a source is missing or its shapes do not fit.
    """
    components, loaded = dict(policy.named_children()), set()
    for source in sources:
        for name, (file, read) in _weights_of(source, components).items():
            try:
                components[name].load_state_dict(read())
            except Exception as error:
                raise UserError(
                    f"--init-from: {file} does not fit the component {name} ({_reason(error)})."
                ) from None
            loaded.add(name)
    return loaded


def compare_origins(
    policy: nn.Module, sources: tuple[str, ...], spec: PolicySpec, config: dict, loaded: Collection[str]
) -> None:
    """Say which components the policies of `--init-from` lack, and how they differ from this one in what
    their weights take for granted.

    Args:
        spec, config: of this policy; the configuration as `to_dict` gives it.
        loaded: what `initialise` returned.

    Raises:
        UserError: if a whole policy saw the same cameras, or moved the same dimensions, in another order.
    """
    components = dict(policy.named_children())
    for source in sources:
        name, where = _parted(source, components)
        path = Path(where).expanduser()
        if export := exported.find(where):
            settings = exported.read_settings(export)
        elif path.is_dir():
            settings = read_settings(find(path))
        else:
            continue  # a file of weights says nothing about itself
        if not name and (absent := [part for part in components if part not in loaded]):
            say(f"--init-from {source}: has no weights for {', '.join(absent)}")
        before = PolicySpec.from_json(settings["spec"])
        for what, flag in ORDERED.items():
            old, new = getattr(before, what), getattr(spec, what)
            if not name and old != new and sorted(old) == sorted(new):
                raise UserError(
                    f"--init-from {source}: trained with another order of {what.replace('_', ' ')}, "
                    f"{', '.join(old)}: give it with {flag}, or name the components to take."
                )
        # What the options became counts, not what was given: --fps and --cameras are seldom.
        old = flat_options(settings["config"]) | asdict(before)
        new = flat_options(config) | asdict(spec)
        for key in (*ORDERED, *MEANING):
            if key in old and old[key] != new.get(key):
                values = f"{shown(old[key])}, here {shown(new.get(key))}"
                say(f"--init-from {source}: trained with {key.replace('_', ' ')} {values}")


def _parted(source: str, components: Collection[str]) -> tuple[str, str]:
    """The component that one `--init-from` names, or "" for all of them, and where their weights are."""
    name, equals, where = source.partition("=")
    if not equals or (name not in components and Path(source).expanduser().exists()):
        return "", source  # a run, whose path may contain a "="
    if name not in components:
        raise UserError(
            f"--init-from {source}: there is no component {name!r}; there are {', '.join(components)}."
        )
    return name, where


def _weights_of(
    source: str, components: dict[str, nn.Module]
) -> dict[str, tuple[Path, Callable[[], dict[str, Tensor]]]]:
    """Weights that one `--init-from` names, by component: the file, and a function that reads it."""
    name, where = _parted(source, components)
    path = Path(where).expanduser()
    if export := exported.find(where):
        there = _by_component(exported.read(export).weights)
        found = {part: (export, partial(dict, weights)) for part, weights in there.items()}
        return _chosen(found, name, source, components)
    if not path.exists():
        raise UserError(
            f"--init-from {source}: {path} does not exist; give a run folder, an exported policy or a "
            f"weights file."
        )
    if not path.is_dir():
        if not name:
            raise UserError(
                f"--init-from {source}: write component=FILE to say which component the file is for."
            )
        return {name: (path, partial(_read_weights, path))}
    last = find(path)
    refuse_damaged(last, "policy/")
    files = {file.stem: file for file in sorted(last.glob("policy/*.safetensors")) if file.name != STATISTICS}
    if name.endswith("backbone") and name not in files:
        for file in files.values():
            if inner := _backbone_within(file):
                return {name: (file, partial(dict, inner))}
    return _chosen({part: (f, partial(load_file, f)) for part, f in files.items()}, name, source, components)


def _backbone_within(file: Path) -> dict[str, Tensor]:
    """Weights of a backbone that is part of another component, as in `train_mi.py`."""
    prefix = "backbone."
    return {k.removeprefix(prefix): x for k, x in load_file(file).items() if k.startswith(prefix)}


def _chosen[T](there: dict[str, T], name: str, source: str, components: dict[str, nn.Module]) -> dict[str, T]:
    """The requested components: the one of that name or, without a name, all that the policy also has."""
    found = {part: there[part] for part in ([name] if name else components) if part in there}
    if not found:
        raise UserError(
            f"--init-from {source}: nothing to load; the source has the components {', '.join(there)}."
        )
    return found


def _by_component(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A policy's state dict, split into one for each component."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        component, _, rest = key.partition(".")
        found.setdefault(component, {})[rest] = tensor
    return found


def _read_weights(file: Path) -> dict[str, Tensor]:
    pickled = file.suffix in (".pt", ".pth")
    return torch.load(file, "cpu", weights_only=True) if pickled else load_file(file)


def require_components(policy: nn.Module) -> None:
    """Raise a UserError if the policy has weights outside its components: checkpoints would lack them."""
    loose = [name for name in policy.state_dict() if "." not in name]
    if loose:
        raise UserError(
            f"{type(policy).__name__} has {', '.join(loose)} outside its components, where checkpoints would "
            f"lack it: make it part of one of its modules."
        )


def freeze(policy: nn.Module, names: tuple[str, ...], loaded: set[str] | None = None) -> None:
    """Freeze components (`--freeze`): no gradients, no weight decay.

    Warns of those that stay random: neither in `loaded` nor pretrained. None: all were loaded.
    """
    components = dict(policy.named_children())
    for name in names:
        if name not in components:
            raise UserError(
                f"--freeze {name}: there is no such component; there are {', '.join(components)}."
            )
        part = components[name]
        pretrained = getattr(part, "hf_config", None) is not None
        # What could not learn anyway (depth, no parameters at all) is no surprise.
        learns = any(parameter.requires_grad for parameter in part.parameters())
        if loaded is not None and name not in loaded and learns and not pretrained:
            say(f"warning: {name} stays random: --freeze {name} without --init-from {name}=RUN")
        part.requires_grad_(False)
