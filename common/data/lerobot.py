"""LeRobot v3 datasets, read with pyarrow and PyAV, since importing LeRobot itself takes many seconds.

Parquet holds states, actions and, for image cameras, the frames (`lerobot_tables.py`); one mp4 file holds a
camera's frames for many episodes one after the other. `meta/episodes` gives the times of each episode
(`lerobot_meta.py`); `video_clock.py` checks the files against them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from common.console import say
from common.data.cameras import short_name
from common.data.frames import FrameError, NoColor, as_rgb, pixel_frame, video_frames, video_size, video_times
from common.data.layout import Array, Known, Layout, choose_layout
from common.data.lerobot_meta import (
    COLOR,
    EpisodeRow,
    Meta,
    files_below,
    flatten,
    read_meta,
    read_rows,
    read_tasks,
)
from common.data.lerobot_tables import (
    Run,
    check_times,
    image_files,
    misplaced,
    only_run,
    read_images,
    read_numbers,
)
from common.data.source import (
    BadEpisode,
    Episode,
    Info,
    existing,
    hash_ends,
    hash_once,
    reason,
    refuse_unusable,
)
from common.data.tasks import listed, wanted_tasks
from common.data.video_clock import TOLERANCE, Segment, clock_faults
from common.errors import UserError

if TYPE_CHECKING:
    from common.data import DataConfig

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
KNOWN = Known("LeRobot", ("observation.state",), ("action",))


def recorded_here(name: str) -> Path | None:
    """LeRobot's local folder for a dataset with this repo id, if it exists."""
    from huggingface_hub.constants import HF_HOME

    home = Path(os.environ.get("HF_LEROBOT_HOME") or Path(HF_HOME) / "lerobot").expanduser()
    root = home / name
    return root if (root / "meta" / "info.json").is_file() and (root / "data").is_dir() else None


@dataclass(frozen=True)
class LeRobotSource:
    """A LeRobot v3 dataset in the folder `root`, with the options chosen for it (see `Source`)."""

    root: Path
    name: str
    config: DataConfig

    isolated: ClassVar[bool] = False
    LARGE: ClassVar[tuple[str, ...]] = ("rows", "arrays", "tasks", "task_names")  # recomputed where needed

    @classmethod
    def from_hub(cls, name: str, config: DataConfig) -> LeRobotSource:
        """Download a dataset into the hub's cache, with only the videos that are needed."""
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*"]))
            source = cls(root, name, config)
            needed = ["data/*", *(f"videos/{camera.key}/*" for camera in source.layout.cameras)]
            # The folder is named after the commit: nothing changes between the two downloads.
            snapshot_download(name, repo_type="dataset", revision=root.name, allow_patterns=needed)
        except UserError:
            raise
        except Exception as error:  # the hub's client raises dozens of classes, from three libraries
            raise UserError(
                f"The dataset {name} is no folder here and could not be downloaded ({type(error).__name__}): "
                f"check the name, the connection, and `hf auth login` if it is private."
            ) from error
        return cls(root, name, config)  # looks at the pictures, now that they are here

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self.LARGE}

    @cached_property
    def meta(self) -> Meta:
        return read_meta(self.root, self.name)

    @cached_property
    def rows(self) -> list[EpisodeRow]:
        """All episodes of all tasks, by number."""
        return read_rows(self.root, self.meta)

    @cached_property
    def tasks(self) -> dict[int, str] | None:
        """Instructions by `task_index`, see `read_tasks`."""
        return read_tasks(self.root)

    @cached_property
    def task_names(self) -> list[str]:
        """The instructions in `meta/episodes`, in order of appearance; if it has none, those of the table."""
        named = dict.fromkeys(task for row in self.rows for task in row.tasks)
        return list(named or dict.fromkeys((self.tasks or {}).values()))

    @cached_property
    def layout(self) -> Layout:
        def names_of(key: str, width: int) -> list[str]:
            names = flatten(self.meta.features[key].names)
            short = key.rpartition(".")[2]
            return names if len(set(names)) == width else [f"{short}_{i}" for i in range(width)]

        for key, array in self.colorless.items():
            if {key, short_name(key)} & set(self.config.cameras):
                raise UserError(f"{self.name}: {key} is {array.dtype}: choose other cameras with --cameras.")
        config = self.config
        if self.meta.collected:  # whatever the files are like that its policy learned from
            config = replace(config, state_keys=(), action_keys=(), camera_keys=(), color_order="rgb")
        layout = choose_layout(self.arrays, KNOWN, config, self.name, "meta/info.json", names_of)
        unused = [line for line in layout.unused if line.partition(":")[0] not in self.colorless]
        unused += [f"{key}: {array.dtype}" for key, array in self.colorless.items()]
        return replace(layout, unused=tuple(unused))

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """The arrays with a value for every step."""
        return {key: self._array(key) for key in self.meta.features if key not in BOOKKEEPING}

    @property
    def colorless(self) -> dict[str, Array]:
        """Cameras without colour, such as depth."""
        features = self.meta.features
        return {k: array for k, array in self.arrays.items() if features[k].is_camera and not array.is_image}

    def _array(self, key: str) -> Array:
        """A feature as info.json describes it, corrected by a camera's first picture if that is here."""
        array = self.meta.features[key].array(self.meta.total_frames or 0)
        if not array.is_image:
            return array
        try:
            size = self._first_size(key, array.dtype)
        except NoColor as error:
            return Array("other", array.shape, f"{array.dtype} ({error})")
        except (FrameError, OSError):
            size = None  # its episode cannot be decoded either
        shape = array.shape[1:]
        if size and (not shape or any(sorted((*size, count)) == sorted(shape) for count in COLOR)):
            return array._replace(size=size)
        return array if array.size else Array("other", array.shape, f"{array.dtype} of no stated shape")

    def _first_size(self, key: str, dtype: str) -> tuple[int, int] | None:
        """(H, W) of a camera's first picture, None if not here; raises NoColor, FrameError, OSError."""
        if dtype == "video":
            places = (self.root / row.videos[key].file for row in self.rows if key in row.videos)
            file = next((place for place in places if place.is_file()), None)
            return file and video_size(file)
        for file in files_below(self.root / "data")[:1]:
            for picture in read_images(self.root, file.relative_to(self.root).as_posix(), key, 0, 1):
                return picture.shape[:2]
        return None

    def info(self) -> Info:
        fps, layout = self.meta.fps, self.layout
        if self.config.fps not in (None, fps):
            raise UserError(f"{self.name} was recorded at {fps:g} Hz: leave out --fps {self.config.fps:g}.")
        tasks, rows = self._chosen()
        head = "LeRobot, written by collect.py" if self.meta.collected else "LeRobot"
        layout.say(f"{self.name}: {head}, {len(rows)} episodes, {fps:g} Hz")
        mixed = [row.index for row in rows if len(row.tasks) > 1]
        if mixed and self.tasks is None:
            many = f"{len(mixed)} episodes, {mixed[0]} for one, have"
            say(f"  {many} other tasks, too: all of their steps are used, whatever the task")
        if len(tasks) > 1 and not self.config.task:
            say(f"  {len(tasks)} tasks ({listed(tasks)}); choose some with --task")
        if self.meta.total_episodes not in (None, 0, len(self.rows)):
            say(f"  info.json counts {self.meta.total_episodes} episodes, meta/episodes {len(self.rows)}")
        files = {place.file for row in rows for key, place in row.videos.items() if key in layout.arrays}
        for key in (c.key for c in layout.cameras if layout.arrays[c.key].dtype == "image"):
            files |= image_files(self.root, key)
        # Cutting episodes makes a different store.
        chosen = tasks[0] if len(tasks) == 1 and not (mixed and self.tasks) else list(self.config.task)
        whole, tables = fingerprints(self.root, self.meta, files, self.config.cache_dir / "hashes")
        info = layout.info(self.name, whole, fps, task=chosen or None)
        return replace(info, tables_fingerprint=tables)

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        _, chosen = self._chosen()
        rows = {row.index: row for row in chosen}
        wanted = existing(wanted, rows, self.name)
        keys = {key for group in self.layout.keys.values() for key in group}
        runs = read_numbers(self.root, {key: self.layout.arrays[key].width for key in keys})
        faults = self._video_faults(set(wanted), runs)
        listed, strays = Counter(row.index for row in self.rows), misplaced(self.rows, runs)
        episodes, bad = [], []
        for index in wanted:
            try:
                if listed[index] > 1:
                    raise BadEpisode(f"Episode {index} is listed {listed[index]} times in meta/episodes")
                if index in strays:
                    raise BadEpisode(
                        f"Episode {index} has rows whose index contradicts its dataset_from_index"
                    )
                episode = self._episode(rows[index], runs.get(index, []))
                if index in faults:
                    raise BadEpisode(faults[index])
                episodes.append(episode)
            except BadEpisode as error:
                bad.append(str(error))
        return episodes, bad

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        layout, fps, (file, start) = self.layout, self.meta.fps, episode.origin[camera]
        path, (key, _, recorded) = self.root / file, layout.cameras[camera]
        try:
            if layout.arrays[key].dtype == "video":
                times = start + np.arange(len(episode)) / fps
                frames = video_frames(path, times, TOLERANCE / fps, recorded, layout.size)
            else:
                pictures = read_images(self.root, file, key, start, len(episode))
                frames = (pixel_frame(picture, recorded, layout.size) for picture in pictures)
            for frame in frames:
                yield as_rgb(frame, layout.color_order)
        except (FrameError, OSError) as error:
            said = f"camera {layout.cameras[camera].short}: {reason(error)}"
            raise BadEpisode(f"Episode {episode.index} cannot be decoded from {path} ({said})") from None

    def _video_faults(self, wanted: set[int], runs: dict[int, list[Run]]) -> dict[int, str]:
        """Faults in the places of wanted episodes in the chosen cameras' videos, by episode number."""
        files: dict[tuple[str, str], list[Segment]] = {}
        for key in (c.key for c in self.layout.cameras if self.layout.arrays[c.key].dtype == "video"):
            for row in self.rows:
                steps = sum(run.steps for run in runs.get(row.index, [])) or row.length
                if key in row.videos and steps:
                    file, start, end = row.videos[key]
                    files.setdefault((key, file), []).append(Segment(row.index, steps, start, end))
        files = {
            place: segments
            for place, segments in files.items()
            if wanted & {segment.episode for segment in segments} and (self.root / place[1]).is_file()
        }
        faults: dict[int, str] = {}
        with ThreadPoolExecutor(4) as pool:  # reading a file releases the GIL
            for found in pool.map(self._file_faults, files, files.values()):
                faults = found | faults
        return faults

    def _file_faults(self, place: tuple[str, str], segments: list[Segment]) -> dict[int, str]:
        """Faults in the places of all episodes in one camera's file, by episode number."""
        camera, file = place
        known = {row.index for row in self.rows if camera in row.videos}
        beside = {s.episode + step for s in segments for step in (-1, 1)} - known
        absent = {n for n in beside if 0 <= n < max(self.meta.total_episodes or 0, max(known))}
        try:
            times = video_times(self.root / file)
        except (FrameError, OSError) as error:
            said = f"cannot be decoded from {self.root / file} ({reason(error)})"
            return {segment.episode: f"Episode {segment.episode} {said}" for segment in segments}
        return clock_faults(str(self.root / file), times, segments, self.meta.fps, absent)

    def _chosen(self) -> tuple[list[str], list[EpisodeRow]]:
        """The wanted tasks (default: all), and the episodes that have one of them."""
        if not self.rows:
            said = f"{self.name} has no episodes (meta/episodes is empty): record or download it again."
            raise UserError(said)
        wanted = wanted_tasks(self.task_names, self.config, self.name)
        every = not self.config.task or not self.task_names  # it goes by its name, if it is one of several
        # An episode that lists no task may have any, if its steps say which.
        known = {*wanted, *((None,) if self.tasks else ())}
        return wanted, [row for row in self.rows if every or known.intersection(row.tasks or [None])]

    def _task(self, row: EpisodeRow, run: Run) -> str | tuple[tuple[int, str], ...] | None:
        """An episode's instruction, see `Episode.task`; raises BadEpisode."""
        name = f"Episode {row.index}"
        several = max(len(self.task_names), len(self.tasks or ())) > 1
        if not self.tasks or "task_index" not in run.columns:
            wanted = [task for task in row.tasks if task in (self.config.task or row.tasks)]
            if len(wanted) > 1:
                lacking = "neither task_index nor meta/tasks.parquet assigns them to steps"
                raise BadEpisode(f"{name} has {len(row.tasks)} tasks, but {lacking}")
            return next(iter(wanted), None)
        numbers = run.column("task_index")
        first = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
        for step in first:
            if numbers[step] not in self.tasks:
                there = f"meta/tasks.parquet lists {len(self.tasks)} tasks"
                raise BadEpisode(f"{name} has task_index {numbers[step]:g} at step {step}, but {there}")
            if several and row.tasks and self.tasks[numbers[step]] not in row.tasks:
                said = f'"{self.tasks[numbers[step]]}" at step {step}'
                raise BadEpisode(f"{name} has the task {said}, but meta/episodes says {listed(row.tasks)}")
        if not several and row.tasks:  # whichever of two spellings the table has
            return row.tasks[0]
        told = ((step, self.tasks[numbers[step]]) for step in first)
        spans = tuple(next(same) for _, same in groupby(told, itemgetter(1)))  # numbers can share a text
        unlisted = self.config.task and not row.tasks  # `cut_at_tasks` then leaves out what is not wanted
        return spans if len(spans) > 1 or unlisted else spans[0][1]

    def _episode(self, row: EpisodeRow, runs: list[Run]) -> Episode:
        """An episode from its row in `meta/episodes` and its rows in the data files; raises BadEpisode."""
        name = f"Episode {row.index}"
        run = only_run(name, row, runs)
        times = run.column("timestamp")
        is_video = [self.layout.arrays[camera.key].dtype == "video" for camera in self.layout.cameras]
        check_times(name, run, self.meta.fps, any(is_video))
        for key, (values, counts) in run.columns.items():
            wrong = np.flatnonzero(counts != values.shape[1])
            if len(wrong):
                raise BadEpisode(
                    f"{name} has {counts[wrong[0]]} numbers in {key} at step {wrong[0]}, but info.json says "
                    f"{values.shape[1]}"
                )
        origin = [(run.file, run.first)] * len(is_video)
        for number in np.flatnonzero(is_video):
            place = row.videos.get(self.layout.cameras[number].key)
            if place is None:
                raise BadEpisode(f"{name} has no place in a video of {self.layout.cameras[number].short}")
            if not (self.root / place.file).is_file():
                raise BadEpisode(f"{name} lacks its video: {self.root / place.file} is missing")
            origin[number] = place.file, place.start
        state, action = self.layout.vectors(lambda key: run.columns[key][0])
        episode = Episode(row.index, state, action, times - times[0], origin, self._task(row, run))
        refuse_unusable(name, episode, self.layout.names)
        return episode


def fingerprints(root: Path, meta: Meta, others: set[str], kept: Path) -> tuple[str, str]:
    """Hashes of the dataset's content: features, parquet files, and size, head and tail of other files; and
    of the same without the other files.

    Hashes of parquet files, which can hold all pictures, are kept in the folder `kept` while those files
    stay unchanged.
    """

    def hashed(files: list[str], parts: list[str]) -> str:
        content = json.dumps([meta.model_dump(), files, parts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    tables = [file for part in ("meta", "data") for file in files_below(root / part)]
    names = [file.relative_to(root).as_posix() for file in tables]
    with ThreadPoolExecutor(8) as pool:  # reading releases the GIL
        ends = pool.map(hash_ends, (root / name for name in sorted(others)))
        parts = hash_once(root, tables, kept)
        return hashed(names + sorted(others), [*parts, *ends]), hashed(names, parts)
