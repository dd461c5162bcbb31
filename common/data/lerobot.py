"""LeRobot v3 datasets, read with pyarrow and PyAV: importing LeRobot itself takes many seconds.

Parquet holds states, actions and, for image cameras, the encoded frames; one mp4 file holds a camera's frames
for many episodes one after the other. Frames are picked by their timestamps, as the format defines them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from common.data.cameras import closest, named_cameras, select_cameras, target_size
from common.data.frames import FrameError, as_rgb, image_frame, video_frames
from common.data.source import (
    BadEpisode,
    Camera,
    Episode,
    Info,
    absent_episodes,
    hash_ends,
    refuse_nonfinite,
)
from common.errors import UserError
from common.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from common.data import DataConfig

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
STATE_KEYS, ACTION_KEYS = ("observation.state",), ("action",)
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True)
class LeRobotSource:
    """A LeRobot v3 dataset, under the options chosen for it (see `Source`).

    Attributes:
        root: its folder.
        name: what to call it.
    """

    root: Path
    name: str
    config: DataConfig

    isolated: ClassVar[bool] = False

    @cached_property
    def meta(self) -> Meta:
        return read_meta(self.root, self.name)

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        wanted = self.config.camera_keys or self.config.cameras
        return select_cameras(colour_cameras(self.meta.features), wanted, self.name)

    @cached_property
    def vectors(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Of state and action, the features, one after the other, and the names of their dimensions."""
        keys = {
            "state": self.config.state_keys or STATE_KEYS,
            "action": self.config.action_keys or ACTION_KEYS,
        }
        features = self.meta.features
        return {part: (keys[part], vector_names(features, keys[part], part, self.name)) for part in keys}

    def info(self) -> Info:
        fps = self.meta.fps
        if self.config.fps not in (None, fps):
            raise UserError(f"{self.name} was recorded at {fps:g} Hz: leave out --fps {self.config.fps:g}.")
        (state_keys, state_names), (action_keys, action_names) = self.vectors.values()
        size, rows = target_size(self.cameras, self.config.image_size), self._rows()
        return Info(
            source=self.name,
            fingerprint=fingerprint(self.root, self.meta, {video[0] for row in rows for video in row.videos}),
            cameras=self.cameras,
            image_size=size,
            fps=fps,
            state_names=state_names,
            action_names=action_names,
            choices={
                "state_keys": state_keys,
                "action_keys": action_keys,
                "color_order": self.config.color_order,
                "task": rows[0].task,
            },
        )

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        rows = {row.index: row for row in self._rows()}
        absent = set(wanted or ()) - rows.keys()
        if absent:
            raise absent_episodes(self.name, sorted(absent))
        keys = [key for group, _ in self.vectors.values() for key in group]
        runs = read_numbers(self.root, {key: self.meta.features[key].width for key in keys})
        episodes, bad = [], []
        for index in rows if wanted is None else wanted:
            try:
                episodes.append(self._episode(rows[index], runs.get(index, [])))
            except BadEpisode as error:
                bad.append(str(error))
        return episodes, bad

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        (file, start), (key, _, recorded), fps = episode.origin[camera], self.cameras[camera], self.meta.fps
        path, size = self.root / file, target_size(self.cameras, self.config.image_size)
        try:
            if self._is_video(key):
                times = np.arange(len(episode)) / fps
                if np.abs(episode.timestamps - times).max() > 0.1 / fps:  # not recorded at even intervals
                    times = episode.timestamps
                frames = video_frames(path, times + start, 0.5 / fps, recorded, size)
            else:
                cells = read_images(path, key, episode.index)
                frames = (image_frame(_encoded(self.root, cell), recorded, size) for cell in cells)
            for frame in frames:
                yield as_rgb(frame, self.config.color_order)
        except (FrameError, OSError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise BadEpisode(f"Episode {episode.index} cannot be decoded from {path} ({reason})") from None

    def _is_video(self, key: str) -> bool:
        return self.meta.features[key].dtype == "video"

    def _rows(self) -> list[EpisodeRow]:
        """The episodes of the chosen task, in order."""
        videos = [camera.key for camera in self.cameras if self._is_video(camera.key)]
        rows = read_episodes(self.root, self.name, videos, self.meta.video_path or VIDEO_PATH)
        return of_one_task(rows, self.config.task, self.name)

    def _episode(self, row: EpisodeRow, runs: list[Run]) -> Episode:
        """An episode from its row in `meta/episodes` and its rows in the data files; raises BadEpisode."""
        name, steps = f"Episode {row.index}", sum(len(run.columns["timestamp"][0]) for run in runs)
        if steps != row.length:
            raise BadEpisode(f"{name} has {steps} steps in the data files and {row.length} in meta/episodes")
        if steps < 2:
            raise BadEpisode(f"{name} has {steps} step(s), and an action chunk needs at least 2")
        file, columns = runs[0]
        times = columns["timestamp"][0][:, 0]
        if len(runs) > 1 or (np.diff(columns["frame_index"][0][:, 0]) != 1).any():
            raise BadEpisode(f"{name} has its steps out of order in {file}")
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise BadEpisode(f"{name} has timestamps that do not increase")
        for key, (values, counts) in columns.items():
            wrong = np.flatnonzero(counts != values.shape[1])
            if len(wrong):
                raise BadEpisode(
                    f"{name} has {counts[wrong[0]]} numbers in {key} at step {wrong[0]}, and info.json says "
                    f"{values.shape[1]}"
                )
        vectors = {
            part: (np.concatenate([columns[key][0] for key in keys], axis=1), names)
            for part, (keys, names) in self.vectors.items()
        }
        refuse_nonfinite(name, vectors)
        videos = iter(row.videos)
        origin = [next(videos) if self._is_video(camera.key) else (file, 0.0) for camera in self.cameras]
        for file, _ in origin:
            if not (self.root / file).is_file():
                raise BadEpisode(f"{name} lacks its video: {self.root / file} is missing")
        return Episode(row.index, vectors["state"][0], vectors["action"][0], times, origin, row.task)


# -- metadata


class Feature(BaseModel):
    """A feature in `meta/info.json`; `width` counts its numbers a step."""

    dtype: str
    shape: list[PositiveInt]
    names: Any = None
    info: dict | None = None
    video_info: dict | None = None

    @property
    def width(self) -> int:
        return math.prod(self.shape)


class Meta(BaseModel):
    """What is read of `meta/info.json`."""

    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    features: dict[str, Feature]
    video_path: Annotated[str, Field(pattern=r"^[^./]")] | None = None  # below the folder


def read_meta(root: Path, source: str) -> Meta:
    """What `meta/info.json` says, if it is that of a LeRobot v3 dataset."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(
            f"{source} is not a LeRobot dataset (it has no meta/info.json): give another folder or name."
        )
    try:
        content = read_json(path)
        version = str(content["codebase_version"]).removeprefix("v")
        if int(version.partition(".")[0]) < 3:
            raise UserError(
                f"{source} has LeRobot format v{version}, and v3 is needed: convert it with "
                f"`{CONVERTER} --repo-id={source} --root={root} --push-to-hub=false`."
            )
        if int(version.partition(".")[0]) > 3:
            raise UserError(
                f"{source} has LeRobot format v{version}, which is newer than the v3 that is read here."
            )
        return Meta.model_validate(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path} is damaged ({reason}): download or record the dataset again.") from error


def vector_names(
    features: dict[str, Feature], keys: Sequence[str], part: str, source: str
) -> tuple[str, ...]:
    """Names of the dimensions of features, one after the other; numbered where the dataset has none."""
    vectors = [
        name
        for name, feature in features.items()
        if feature.dtype not in ("video", "image", "string") and name not in BOOKKEEPING
    ]
    names: list[str] = []
    for key in keys:
        if key not in vectors:
            there = ", ".join(vectors) or "none"
            raise UserError(f"{source} has no --{part}-keys {key}{closest(key, vectors)}: it has {there}.")
        short, count = key.rpartition(".")[2], features[key].width
        own = _flatten(features[key].names)
        own = own if len(set(own)) == count else [f"{short}_{i}" for i in range(count)]
        names += [f"{short}_{name}" if name in names else name for name in own]
    return tuple(names)


def _flatten(names: Any) -> list[str]:
    """Names out of nested lists, `{"motors": [...]}`, or `{"x": 0, "y": 1}`."""
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list):
        return [name for entry in names for name in _flatten(entry)]
    return [] if names is None else [str(names)]


def colour_cameras(features: dict[str, Feature]) -> list[Camera]:
    """The cameras among a dataset's features."""
    sizes = {}
    for key, feature in features.items():
        about = feature.info or feature.video_info or {}
        depth = about.get("is_depth_map") or about.get("video.is_depth_map")
        if feature.dtype in ("video", "image") and len(feature.shape) == 3 and not depth:
            names = _flatten(feature.names)
            channels_first = names[0] in ("channel", "channels", "c") if names else feature.shape[0] <= 4
            sizes[key] = feature.shape[1:] if channels_first else feature.shape[:2]
    return named_cameras(sizes)


class EpisodeRow(NamedTuple):
    """An episode in `meta/episodes`; `videos` gives (file in the root, start in s) for each video camera."""

    index: int
    length: int
    videos: tuple[tuple[str, float], ...]
    tasks: tuple[str, ...]
    task: str | None = None


def read_episodes(root: Path, source: str, cameras: Sequence[str], video_path: str) -> list[EpisodeRow]:
    """All episodes, in order.

    Args:
        cameras: keys of those that have a video.
    """
    rows: list[EpisodeRow] = []
    places = ("chunk_index", "file_index", "from_timestamp")
    columns = [f"videos/{camera}/{place}" for camera in cameras for place in places]
    for file in sorted((root / "meta" / "episodes").glob("**/*.parquet")):
        table = read_parquet(file, ["episode_index", "length", *columns], optional=["tasks"])
        try:
            for row in table.to_pylist():
                videos = []
                for camera in cameras:
                    chunk, number, start = (row[f"videos/{camera}/{place}"] for place in places)
                    path = video_path.format(video_key=camera, chunk_index=chunk, file_index=number)
                    videos.append((path, float(start)))
                tasks = tuple(map(str, row.get("tasks") or ()))
                rows.append(EpisodeRow(int(row["episode_index"]), int(row["length"]), tuple(videos), tasks))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{file} or video_path in info.json is damaged: {error!r}.") from error
    if not rows:
        raise UserError(f"{source} has no episodes (meta/episodes is empty): record or download it again.")
    return sorted(rows)


def of_one_task(rows: Sequence[EpisodeRow], wanted: str | None, source: str) -> list[EpisodeRow]:
    """The episodes of the wanted task, or of the only one there is.

    Raises:
        UserError: if there are several tasks and none is chosen, or the chosen one does not exist.
    """
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
    listing = ", ".join(f'"{name}"' for name in tasks) or "none"
    if wanted is not None and wanted not in tasks:
        raise UserError(f'{source} has no task "{wanted}"{closest(wanted, tasks)}: it has {listing}.')
    if wanted is None and len(tasks) > 1:
        raise UserError(
            f"{source} has {len(tasks)} tasks, and one policy learns one: choose with --task ({listing})."
        )
    task = wanted or next(iter(tasks), None)
    return [row._replace(task=task) for row in rows if wanted is None or wanted in row.tasks]


def read_parquet(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Columns of a parquet file, in memory.

    Raises:
        UserError: if the file cannot be read or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            present = set(parquet.schema_arrow.names)
            missing = [name for name in columns if name not in present]
            if not missing:
                table = parquet.read([*columns, *(name for name in optional if name in present)])
                table.validate(full=True)  # damaged files can hold texts and lists that are none
                return table
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{file} cannot be read ({reason}): download the dataset again, or, if you recorded it, "
            f"make sure that the recorder called finalize()."
        ) from error
    raise UserError(
        f"{file} has no column {missing[0]}, which a LeRobot v3 dataset has: download or record it again."
    )


def fingerprint(root: Path, meta: Meta, videos: set[str]) -> str:
    """Hash of what the dataset contains: features, parquet files, and size, head and tail of its videos."""

    def hash_whole(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    tables = sorted(file for part in ("meta", "data") for file in (root / part).glob("**/*.parquet"))
    files = [*tables, *(root / name for name in sorted(videos))]
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release the interpreter's lock
        parts = [*pool.map(hash_whole, tables), *pool.map(hash_ends, files[len(tables) :])]
    names = [file.relative_to(root).as_posix() for file in files]
    return hashlib.sha256(json.dumps([meta.model_dump(), names, parts], sort_keys=True).encode()).hexdigest()


def download(name: str, config: DataConfig) -> Path:
    """Fetch a dataset from the hub into its cache, only the videos that are needed; the folder.

    Raises:
        UserError: if it is not there, or there is no connection and no earlier download.
    """
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*"]))
        cameras = colour_cameras(read_meta(root, name).features)
        chosen = select_cameras(cameras, config.camera_keys or config.cameras, name, quiet=True)
        needed = ["meta/*", "data/*", *(f"videos/{camera.key}/*" for camera in chosen)]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=needed))
    except UserError:
        raise
    except Exception as error:  # the hub's client has dozens of classes, of three libraries
        raise UserError(
            f"The dataset {name} is no folder here and could not be downloaded "
            f"({type(error).__name__}): check the name, the connection, and `hf auth login` if it is private."
        ) from error


# -- data


class Run(NamedTuple):
    """Rows of a data file, one after the other, that belong to one episode.

    Attributes:
        file: below the root.
        columns: of each feature, values (L, D) and how many numbers a step really has, (L,).
    """

    file: str
    columns: dict[str, tuple[np.ndarray, np.ndarray]]


def read_numbers(root: Path, widths: dict[str, int]) -> dict[int, list[Run]]:
    """Every run of rows with one episode index, by that index.

    Args:
        widths: numbers a step in each feature to read.
    """
    found: dict[int, list[Run]] = {}
    for file in sorted((root / "data").glob("**/*.parquet")):
        table = read_parquet(file, [*widths, "timestamp", "frame_index", "episode_index"])
        columns = {
            key: matrix(
                table[key], widths.get(key, 1), f"{file}, {key},", np.float32 if key in widths else np.float64
            )
            for key in table.column_names
        }
        index = columns.pop("episode_index")[0][:, 0]
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for first, last in pairwise(edges):
            if first < last and np.isfinite(index[first]):
                part = {key: (x[first:last], counts[first:last]) for key, (x, counts) in columns.items()}
                run = Run(file.relative_to(root).as_posix(), part)
                found.setdefault(int(index[first]), []).append(run)
    return found


def matrix(
    column: pa.ChunkedArray, width: int, what: str, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or (nested) lists of them as (rows, width), and how many numbers each row has.

    Rows with another count become NaN, as do nulls.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    count, row = len(array), np.arange(len(array))  # row: which row each number belongs to
    while isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        row, array = row[pc.list_parent_indices(array).to_numpy()], array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise UserError(
            f"{what} holds {array.type} instead of numbers: choose another feature or repair the dataset."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.astype(dtype)
    counts = np.bincount(row, minlength=count)
    if (counts == width).all():
        return values.reshape(-1, width), counts
    rows = np.full((count, width), np.nan, dtype)
    rows[counts == width] = values[counts[row] == width].reshape(-1, width)
    return rows, counts


def read_images(path: Path, key: str, episode: int) -> Iterator[Any]:
    """An episode's cells of an image column of a data file; raises FrameError."""
    import pyarrow as pa
    from pyarrow import dataset

    try:
        table = dataset.dataset(path, format="parquet")
        if key not in table.schema.names:
            raise FrameError(f"it has no column {key}")
        own = dataset.field("episode_index") == episode
        for batch in table.to_batches([key], own, batch_size=64, batch_readahead=1, use_threads=False):
            batch.validate(full=True)
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise FrameError(str(error)) from error


def _encoded(root: Path, cell: Any) -> bytes:
    """The bytes of an image cell: inside the table, or in a file of the dataset's folder."""
    cell = cell if isinstance(cell, dict) else {"bytes": cell}
    if cell.get("bytes"):
        return cell["bytes"]
    path = Path(cell.get("path") or "")
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise FrameError("an image is neither in the table nor in the dataset's folder")
    return (root / path).read_bytes()
