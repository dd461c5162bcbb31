"""Demonstrations: a dataset by name or path becomes an `EpisodeStore`, which gives `Batch`es."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from common.data.store import Batch, ChunkDataset, EpisodeStore, SampleStream, make_loader, split_episodes
from common.errors import UserError

__all__ = [
    "Batch",
    "ChunkDataset",
    "DataConfig",
    "EpisodeStore",
    "SampleStream",
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

    dataset: str = "demo"
    """LeRobot v3 dataset: a folder, a hub name `owner/name`, or `demo`, the built-in two-arm task."""
    cameras: tuple[str, ...] = ()
    """Cameras in order, the head camera first, by full or short name (`cam_high` or `high`). Default: head,
    left and right if the dataset has them, otherwise all of its cameras."""
    image_size: tuple[int, ...] = ()
    """Size of the stored images in pixels: one number for a square, or height and width. Default: as
    recorded."""
    state_key: str = "observation.state"
    """Feature that holds the robot's state."""
    action_key: str = "action"
    """Feature that holds the actions."""
    task: str | None = None
    """Instruction whose episodes to use, for a dataset that has several."""
    val_fraction: float = 0.1
    """Share of the episodes that is held out for validation, at least one; 0 holds out none."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    """Folder for decoded copies of datasets. Each takes image height x width x 3 bytes a camera and step."""
    num_workers: int = 0
    """Processes that gather batches ahead of training. With 0 the training process gathers, which takes a
    millisecond or two a batch; handing over from workers takes longer, and pays on slow disks only."""
    ingest_workers: int | None = None
    """Processes that decode a dataset when it is first used. Default: one a core."""
    skip_bad_episodes: bool = False
    """Leave out, and list, episodes that cannot be used (broken video, NaN, too short), and go on."""


def open_dataset(config: DataConfig) -> EpisodeStore:
    """The episode store of a dataset; decodes the dataset on first use, with a progress bar.

    Raises:
        UserError: if the dataset cannot be found, read or used as configured.
    """
    from common.data.lerobot import download, open_lerobot

    cache = Path(config.cache_dir).expanduser()
    for flag, workers, least in (
        ("--num-workers", config.num_workers, 0),
        ("--ingest-workers", config.ingest_workers, 1),
    ):
        if workers is not None and workers < least:
            raise UserError(f"{flag} is {workers}: it must be at least {least}.")
    source = config.dataset
    folder = Path(source).expanduser()
    if source == "demo":
        from common.data.demo import ensure_recorded

        root = ensure_recorded(cache)
    elif folder.is_dir():
        root, source = folder, str(folder.resolve())
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not folder.exists():
        root = download(source, config.cameras)
    else:
        kind = "is a file, not the folder of a dataset" if folder.exists() else "was not found"
        raise UserError(
            f"The dataset {source} {kind}: give a LeRobot folder, a hub name such as owner/name, or demo."
        )
    return open_lerobot(
        root,
        cache / "stores",
        source=source,
        cameras=config.cameras,
        image_size=config.image_size,
        state_key=config.state_key,
        action_key=config.action_key,
        task=config.task,
        skip_bad=config.skip_bad_episodes,
        workers=config.ingest_workers,
    )
