"""Demonstrations: opens datasets by name or path as an `EpisodeStore`, the source of `Batch`es."""

import json
import os
import re
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from common.config import AbsolutePath, MayChange, Share, options
from common.console import say
from common.data.ingest import StoreRequest, ensure_store
from common.data.motion import copies, trim_idle
from common.data.samples import Batch, ChunkDataset, SampleStream, evenly_spaced, make_loader, split_episodes
from common.data.source import Info, Source
from common.data.store import EpisodeStore
from common.data.tasks import cut_at_tasks, name_tasks, weigh_tasks
from common.data.workers import kept_pool
from common.errors import UserError
from common.files import allow_many_open

# What other modules import from here, in addition to the names below.
__all__ = ["Batch", "ChunkDataset", "SampleStream", "evenly_spaced", "make_loader", "split_episodes"]

MAX_IMAGE_SIDE = 4096
GRIPPER = "gripper"  # in names of dimensions that open and close a gripper
BUILT_IN = ("demo", "demo-tasks")  # tasks that are recorded on first use


def default_cache_dir() -> Path:
    """Folder for datasets in the form that training reads: below the user's cache home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flow-policies"


def _in_full(name: str) -> str:
    """A local dataset by its absolute path: a run may be resumed from another working directory."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in BUILT_IN and path.exists() else name


def _as_several(task: Any) -> Any:
    """Earlier versions saved a single instruction, or none."""
    if isinstance(task, str):
        return (task,)
    return () if task is None else tuple(task) if isinstance(task, list) else task


def _is_size(sides: tuple[int, ...]) -> tuple[int, ...]:
    if len(sides) > 2 or not all(0 < side <= MAX_IMAGE_SIDE for side in sides):
        raise ValueError(f"must be one side, or height and width, of 1 to {MAX_IMAGE_SIDE} pixels")
    return sides


@options
class DataConfig:
    """Which demonstrations to learn from, and in what form."""

    dataset: MayChange[tuple[Annotated[str, AfterValidator(_in_full)], ...]] = ("demo",)
    """Datasets, one or more: LeRobot v3 (a folder, or a hub name `owner/name`), a folder of HDF5 files or one
    such file, a zarr replay buffer (a folder or .zarr.zip), `demo`, the built-in two-arm task, or
    `demo-tasks`, the same with sixteen instructions."""
    weights: tuple[float, ...] = ()
    """How often samples of each dataset are drawn, relative to each other. Default: in proportion to their
    number, so that a larger dataset weighs more."""
    cameras: tuple[str, ...] = ()
    """Cameras in order, the head camera first, by full or short name (`cam_high` or `high`). Default: head,
    left and right if the dataset has them, otherwise all of its cameras."""
    image_size: Annotated[tuple[int, ...], AfterValidator(_is_size)] = ()
    """Size of the stored images in pixels: one number for a square, or height and width. Default: as
    recorded."""
    state_keys: tuple[str, ...] = ()
    """Features (LeRobot) or arrays (HDF5, zarr) that make up the robot's state, in this order. Default:
    observation.state, or what the file's layout says."""
    action_keys: tuple[str, ...] = ()
    """Features or arrays that make up the action. Default: action, or what the file's layout says. With
    --action-offset 1 the state itself can be the action: where the robot went."""
    camera_keys: tuple[str, ...] = ()
    """HDF5, zarr: arrays that hold images, if the layout is not recognised."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the recorded colours; OpenCV writes bgr unless told otherwise."""
    fps: PositiveFloat | None = None
    """HDF5, zarr: control steps per second, if the files do not say."""
    rotation: str | None = None
    """Convert rotations to a form without jumps: `KIND->6d`, where KIND is quaternion (x, y, z, w),
    quaternion-wxyz, axis-angle, or euler. Dimensions are recognised by name, or named: `eef_quat:KIND->6d`.
    A trained policy still takes and returns them as recorded."""
    task: Annotated[tuple[str, ...], BeforeValidator(_as_several)] = ()
    """Instructions whose episodes to use. Default: all instructions."""
    task_key: str | None = None
    """HDF5: attribute, or array of one text, that holds an episode's instruction, if its name is not one of
    the usual ones, such as language_instruction."""
    task_weights: tuple[float, ...] = ()
    """How often samples of each --task are drawn, relative to each other. Default: see --task-balance."""
    task_balance: Share = 0.0
    """How evenly tasks are drawn: 0 as often as they were recorded, 1 equally often, values in between mix
    the two: n samples count as n^(1 - balance)."""
    episodes: tuple[str, ...] = ()
    """Episodes to use, by number: `0 3 10-19`. Default: all."""
    episodes_file: MayChange[AbsolutePath | None] = None
    """File that lists the episodes to use: numbers or ranges, separated by spaces, commas or lines; or one
    written by `train_mi.py`, which names the best."""
    proprio_history: PositiveInt = 1
    """States in an observation: the present one and those before it."""
    image_history: PositiveInt = 1
    """Frames of each camera in an observation: the present one and those before it, for tasks in which motion
    must be seen. In training, the backbone takes that many times the memory and time."""
    image_stride: PositiveInt = 1
    """Control steps between two frames of --image-history. Acting is cheapest if this is the number of steps
    after which the next chunk is sampled: half of --horizon, unless you choose another."""
    action_offset: NonNegativeInt = 0
    """Control steps between an observation and the first action of its chunk."""
    hold: NonNegativeInt = 0
    """Control steps for which the last action of an episode is learned as if it went on: for actions that are
    positions, and episodes that end when the task is done. Nothing later is learned."""
    relative_actions: bool = False
    """Learn actions as differences from the present state, in the dimensions that state and action share. A
    trained policy still returns them as recorded."""
    relative_mask: tuple[str, ...] = (GRIPPER,)
    """Dimensions that stay absolute then: parts of their names. Default: grippers, for which it matters how
    far they are open, not how much further than now. The flag without a name makes all of them relative."""
    relative_poses: bool = False
    """With --relative-actions and --rotation: learn positions with their rotations as poses in the frame of
    the present pose (SE(3), as UMI does). A position is the three dimensions before its rotation."""
    idle_floor: Share = 0.1
    """Dimensions that show only sensor noise are normalized as if they had this share of the usual spread of
    the others, so that noise is not taken for motion; 0 normalizes them like any other."""
    trim_idle: bool = False
    """Leave out steps at the ends of episodes in which nothing happens: zeros or black frames, which fill up
    files of fixed length, and a robot at rest. `inspect` shows where there are any."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the episodes that is held out for validation, at least one; 0 holds out none."""
    cache_dir: MayChange[AbsolutePath] = field(default_factory=default_cache_dir)
    """Folder for decoded copies of datasets, each of image height x width x 3 bytes per camera and step."""
    store: Literal["raw", "jpeg", "auto"] = "raw"
    """Decoded copies as raw pixels, which train fastest, or as JPEG of quality 95, a fifth to a twentieth of
    the size. `auto` takes raw pixels if they fill at most half of the free disk space."""
    num_workers: MayChange[NonNegativeInt | None] = None
    """Processes that gather batches ahead of training. Default: none for raw pixels, where the training
    process gathers in a millisecond or two and passing batches on takes longer; for JPEG one per core, at
    most 8."""
    ingest_workers: MayChange[PositiveInt | None] = None
    """Processes that decode a dataset when it is first used. Default: one per core."""
    grow_from: MayChange[AbsolutePath | None] = None
    """Folder in which further episodes appear while the run trains, as HDF5 files or LeRobot datasets; or a
    LeRobot dataset that grows. Statistics and held-out episodes are of --dataset only."""
    grow_weight: PositiveFloat = 1.0
    """How often a sample of --grow-from is drawn, relative to one of --dataset."""
    skip_bad_episodes: bool = False
    """Leave out and list episodes that cannot be used (broken video, NaN, too short), and continue."""

    def __post_init__(self):
        count = len(self.dataset)
        if not count:
            raise UserError("--dataset names none: give a folder, a hub name such as owner/name, or demo.")
        if self.weights and (len(self.weights) != count or not min(self.weights) > 0):
            given = " ".join(f"{weight:g}" for weight in self.weights)
            raise UserError(f"--weights {given}: give one positive number for each of the {count} datasets.")
        if self.task_weights and (len(self.task_weights) != len(self.task) or not min(self.task_weights) > 0):
            given = " ".join(f"{weight:g}" for weight in self.task_weights)
            raise UserError(f"--task-weights {given}: give one positive number for each --task, in order.")
        if self.task_weights and self.task_balance:
            raise UserError("--task-weights and --task-balance both weigh tasks: give one of them.")
        if self.episodes and self.episodes_file:
            raise UserError("--episodes and --episodes-file both choose episodes: give one of them.")
        if self.relative_poses and not (self.relative_actions and self.rotation):
            raise UserError(
                "--relative-poses needs --relative-actions, and --rotation to know where rotations are."
            )
        if self.image_stride > 1 and self.image_history == 1:
            raise UserError("--image-stride needs --image-history: say how many frames are that far apart.")
        if count > 1 and (self.episodes or self.episodes_file):
            raise UserError("--episodes and --episodes-file are for one dataset: give a single --dataset.")


def open_dataset(config: DataConfig) -> EpisodeStore:
    """The episodes to learn from; decodes a dataset on first use, with a progress bar.

    Raises:
        UserError: if a dataset cannot be found, read or used as configured.
    """
    allow_many_open()  # each store is a file that stays open
    with kept_pool():
        stores = [ensure_store(stores_folder(config), request_store(name, config)) for name in config.dataset]
    stores = [cut_at_tasks(store, config.task) for store in stores]
    if config.trim_idle:
        stores = [trim_idle(store) for store in stores]
    if len(stores) == 1:
        store = stores[0]
    else:
        store = EpisodeStore.concatenate(name_tasks(stores, config.dataset), config.weights or None)
    store = weigh_tasks(store, config)
    for line in copies(store):
        say(line)
    return store.re_express(config.rotation) if config.rotation else store


def stores_folder(config: DataConfig) -> Path:
    """Folder of the stores."""
    return config.cache_dir / "stores"


def open_source(name: str, config: DataConfig) -> Source:
    """One of the datasets, in any supported format."""
    from common.data.hdf5 import Hdf5Source, holds_hdf5
    from common.data.lerobot import LeRobotSource, recorded_here
    from common.data.zarr import ZarrSource, is_zarr

    path = Path(name).expanduser()
    if name in BUILT_IN:
        from common.data import demo, demo_tasks  # the simulator takes a while to import

        task = demo if name == "demo" else demo_tasks
        return LeRobotSource(task.ensure_recorded(config.cache_dir), name, config)
    if (path / "meta" / "info.json").is_file():
        return LeRobotSource(path, str(path.resolve()), config)
    if is_zarr(path):
        return ZarrSource(path, str(path.resolve()), config)
    if holds_hdf5(path):
        return Hdf5Source(path, str(path.resolve()), config)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not path.exists():
        if root := recorded_here(name):
            return LeRobotSource(root, str(root.resolve()), config)
        return LeRobotSource.from_hub(name, config)
    what = "has an unknown format" if path.exists() else "was not found"
    raise UserError(
        f"The dataset {name} {what}: give the folder of a LeRobot dataset or of HDF5 files, a zarr replay "
        f"buffer, a hub name such as owner/name, or demo."
    )


def request_store(name: str, config: DataConfig) -> StoreRequest:
    """The store to make from one of the datasets."""
    source = open_source(name, config)
    info = source.info()
    chosen = chosen_episodes(config, info)
    return StoreRequest(source, info, config.store, chosen, config.skip_bad_episodes, config.ingest_workers)


def chosen_episodes(config: DataConfig, info: Info | None = None) -> tuple[int, ...] | None:
    """The episodes to use, ascending; None for all. A file must not be about another dataset."""
    words, origin = list(config.episodes), "--episodes"
    if config.episodes_file is not None:
        words, origin = _listed(config.episodes_file, info), f"--episodes-file {config.episodes_file}"
    numbers: set[int] = set()
    for word in words:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found:
            raise UserError(f"{origin}: {word} is no episode number and no range such as 10-19.")
        numbers.update(found)
    return tuple(sorted(numbers)) or None


def _listed(file: Path, info: Info | None) -> list[str]:
    """The words in a file that lists episodes; from a file written by `train_mi.py`, its `episodes`."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--episodes-file {file} cannot be read ({error}): give a text file.") from None
    with suppress(ValueError):
        scores = json.loads(text)
        if isinstance(scores, dict):
            text = str(scores.get("episodes", ""))
            # Earlier versions wrote the fingerprint, which also depends on the videos in use.
            if info is not None and scores.get("fingerprint") not in (
                info.tables_fingerprint,
                info.fingerprint,
            ):
                raise UserError(
                    f"--episodes-file {file} chooses episodes of {scores.get('dataset')} as it was then, not "
                    f"of {info.source} as it is now: score this one with train_mi.py."
                )
    uncommented = "\n".join(line.partition("#")[0] for line in text.splitlines())
    words = re.findall(r"[^\s,\[\]]+", uncommented)
    if not words:
        raise UserError(f"--episodes-file {file} names no episode: give a text file of numbers.")
    return words
