"""Demonstrations: datasets by name or path become an `EpisodeStore`, which gives `Batch`es."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.data.ingest import Load, StoreInfo, choose_storage, ensure_store
from common.data.store import (
    Batch,
    ChunkDataset,
    EpisodeStore,
    SampleStream,
    evenly_spaced,
    make_loader,
    split_episodes,
)
from common.data.workers import kept_pool
from common.errors import UserError

__all__ = [
    "Batch",
    "ChunkDataset",
    "DataConfig",
    "EpisodeStore",
    "SampleStream",
    "evenly_spaced",
    "make_loader",
    "open_dataset",
    "split_episodes",
]


def default_cache_dir() -> Path:
    """Where datasets are kept in the form that training reads: below the user's cache home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flow-policies"


@dataclass(frozen=True)
class DataConfig:
    """Which demonstrations to learn from, and in what form."""

    dataset: tuple[str, ...] = ("demo",)
    """Datasets, one or more: LeRobot v3 (a folder, or a hub name `owner/name`), a folder of HDF5 files or one
    such file, or `demo`, the built-in two-arm task."""
    weights: tuple[float, ...] = ()
    """How often samples of each dataset are drawn, relative to each other. Default: as often as they are
    there, so that a larger dataset weighs more."""
    cameras: tuple[str, ...] = ()
    """Cameras in order, the head camera first, by full or short name (`cam_high` or `high`). Default: head,
    left and right if the dataset has them, otherwise all of its cameras."""
    image_size: tuple[int, ...] = ()
    """Size of the stored images in pixels: one number for a square, or height and width. Default: as
    recorded."""
    state_keys: tuple[str, ...] = ()
    """Features (LeRobot) or datasets (HDF5) that make up the robot's state, in this order. Default:
    observation.state, or what the file's layout says."""
    action_keys: tuple[str, ...] = ()
    """Features or datasets that make up the action. Default: action, or what the file's layout says. With
    --action-offset 1 the state itself can be the action: where the robot went."""
    camera_keys: tuple[str, ...] = ()
    """HDF5: datasets that hold images, where the layout is not recognised."""
    color_order: Literal["rgb", "bgr"] = "rgb"
    """Order of the recorded colours; OpenCV writes bgr unless told otherwise."""
    fps: float | None = None
    """HDF5: control steps per second, where the files do not say."""
    rotation: str | None = None
    """Re-express rotations without jumps, as in `quaternion->6d`; KIND can be quaternion (x, y, z, w),
    quaternion-wxyz, axis-angle, or euler. Dimensions are recognised by name, or named: `eef_quat:KIND->6d`.
    A trained policy still takes and gives them as recorded."""
    task: str | None = None
    """Instruction whose episodes to use, for a LeRobot dataset that has several."""
    episodes: tuple[str, ...] = ()
    """Episodes to use, by number: `0 3 10-19`. Default: all."""
    episodes_file: Path | None = None
    """File that lists the episodes to use: numbers or ranges, separated by spaces, commas or lines; or one
    that `train_mi.py` has written, which names the best."""
    proprio_history: int = 1
    """States in an observation: the present one and those before it."""
    action_offset: int = 0
    """Control steps between an observation and the first action of its chunk."""
    relative_actions: bool = False
    """Learn actions as differences from the present state, in the dimensions that state and action share. A
    trained policy still gives them as recorded."""
    val_fraction: float = 0.1
    """Share of the episodes that is held out for validation, at least one; 0 holds out none."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Folder for decoded copies of datasets. Each takes image height x width x 3 bytes a camera and step."""
    store: Literal["raw", "jpeg", "auto"] = "raw"
    """Decoded copies as raw pixels, which train fastest, or as JPEG of quality 95, a fifth to a twentieth of
    the size. `auto` takes raw pixels if they fill at most half of the free disk."""
    num_workers: int | None = None
    """Processes that gather batches ahead of training. Default: none for raw pixels, where the training
    process gathers in a millisecond or two and handing over takes longer; one a core, at most 8, for JPEG."""
    ingest_workers: int | None = None
    """Processes that decode a dataset when it is first used. Default: one a core."""
    skip_bad_episodes: bool = False
    """Leave out, and list, episodes that cannot be used (broken video, NaN, too short), and go on."""


def open_dataset(config: DataConfig) -> EpisodeStore:
    """The episodes to learn from; decodes a dataset on first use, with a progress bar.

    Raises:
        UserError: if a dataset cannot be found, read or used as configured.
    """
    _check(config)
    stores, folder = [], stores_folder(config)
    with kept_pool():
        for source in config.dataset:
            info, load = describe(source, config)
            if config.store == "auto":
                info = replace(info, storage=choose_storage(folder, info, load))
            stores.append(ensure_store(folder, info, load, config.skip_bad_episodes, config.ingest_workers))
    store = stores[0]
    if len(stores) > 1:
        store = EpisodeStore.concatenate(stores, config.weights or None)
    if config.rotation:
        from common.data.rotation import re_express

        store = re_express(store, config.rotation)
    return store


def stores_folder(config: DataConfig) -> Path:
    """Where stores are."""
    return Path(config.cache_dir).expanduser() / "stores"


def _check(config: DataConfig) -> None:
    for flag, value, least in (
        ("--num-workers", config.num_workers, 0),
        ("--ingest-workers", config.ingest_workers, 1),
        ("--fps", config.fps, 1e-3),
    ):
        if value is not None and not value >= least:
            raise UserError(f"{flag} is {value:g}: it must be at least {least:g}.")
    if not config.dataset:
        raise UserError("--dataset names no dataset: give a folder, a hub name such as owner/name, or demo.")
    if config.weights and (len(config.weights) != len(config.dataset) or not min(config.weights) > 0):
        raise UserError(
            f"--weights {' '.join(f'{w:g}' for w in config.weights)}: give one positive number for each of "
            f"the {len(config.dataset)} datasets."
        )
    if len(config.dataset) > 1 and (config.episodes or config.episodes_file):
        raise UserError(
            "--episodes and --episodes-file number the episodes of one dataset: give a single --dataset with "
            "them."
        )


def describe(source: str, config: DataConfig) -> tuple[StoreInfo, Load]:
    """What the store of one of the datasets is, and how its episodes are read.

    Raises:
        UserError: if it cannot be found, or used as configured.
    """
    from common.data import hdf5, lerobot

    path, cache = Path(source).expanduser(), Path(config.cache_dir).expanduser()
    if source == "demo":
        from common.data.demo import ensure_recorded

        info, load = lerobot.describe(ensure_recorded(cache), source, config)
    elif path.is_dir() and (path / "meta" / "info.json").is_file():
        info, load = lerobot.describe(path, str(path.resolve()), config)
    elif path.is_dir() or (path.is_file() and path.suffix in hdf5.SUFFIXES):
        info, load = hdf5.describe(path, str(path.resolve()), config, stores_folder(config))
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not path.exists():
        info, load = lerobot.describe(lerobot.download(source, config.cameras), source, config)
    else:
        kind = "is a file, and neither HDF5 nor a folder" if path.exists() else "was not found"
        raise UserError(
            f"The dataset {source} {kind}: give the folder of a LeRobot dataset or of HDF5 files, a hub name "
            f"such as owner/name, or demo."
        )
    episodes = chosen_episodes(config)
    _check_scored(config, info)
    options = {**asdict(config), "dataset": (info.source,), "weights": (), "cache_dir": ""}
    options |= {name: str(value) for name, value in options.items() if isinstance(value, Path)}
    storage = "jpeg" if config.store == "jpeg" else "raw"
    return replace(info, episodes=episodes, storage=storage, options=options), load


def chosen_episodes(config: DataConfig) -> tuple[int, ...] | None:
    """The episodes asked for, ascending; None for all.

    Raises:
        UserError: for words that are no numbers, and a file that cannot be read or names none.
    """
    words, origin = list(config.episodes), "--episodes"
    if config.episodes_file is not None:
        origin = f"--episodes-file {config.episodes_file}"
        if words:
            raise UserError(
                "--episodes and --episodes-file both say which episodes to use: give one of them."
            )
        try:
            text = config.episodes_file.expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{origin} cannot be read ({error}): give a text file of numbers.") from None
        scored = _scored(text)
        text = text if scored is None else str(scored.get("episodes", ""))
        words = re.split(r"[\s,\[\]]+", "\n".join(line.partition("#")[0] for line in text.splitlines()))
        words = [word for word in words if word]
        if not words:
            raise UserError(f"{origin} names no episode: give a text file of numbers.")
    return tuple(sorted({number for word in words for number in _numbers(word, origin)})) if words else None


def _scored(text: str) -> dict | None:
    """The content of an episodes file that `train_mi.py` has written; None of another file."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _check_scored(config: DataConfig, info: StoreInfo) -> None:
    """Refuse the scores of another dataset.

    Raises:
        UserError: if an episodes file says that it is about other data.
    """
    if config.episodes_file is None:
        return
    scored = _scored(config.episodes_file.expanduser().read_text())
    if scored is not None and scored.get("fingerprint") != info.fingerprint:
        raise UserError(
            f"--episodes-file {config.episodes_file} chooses episodes of {scored.get('dataset')} as it was "
            f"then, not of {info.source} as it is now: score this one, with train_mi.py."
        )


def _numbers(word: str, origin: str) -> Sequence[int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first or last - first > 10_000_000:
        raise UserError(f"{origin}: {word} is no episode number and no range such as 10-19.")
    return range(first, last + 1)
