"""LeRobot v3 datasets, read with pyarrow and PyAV: importing LeRobot itself takes many seconds.

Parquet holds states, actions and, for image cameras, the encoded frames; one mp4 file holds a camera's frames
for many episodes one after the other. Frames are picked by their timestamps, as the format defines them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from common.data.cameras import closest
from common.data.frames import FrameError, as_rgb, image_frame, video_frames
from common.data.layout import Array, Known, Layout, choose_layout
from common.data.source import BadEpisode, Episode, Info, existing, hash_ends, reason, refuse_unusable
from common.errors import UserError
from common.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from common.data import DataConfig

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
KNOWN = Known("LeRobot", ("observation.state",), ("action",))
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True)
class LeRobotSource:
    """A LeRobot v3 dataset in the folder `root`, under the options chosen for it (see `Source`)."""

    root: Path
    name: str
    config: DataConfig

    isolated: ClassVar[bool] = False

    @classmethod
    def from_hub(cls, name: str, config: DataConfig) -> LeRobotSource:
        """Fetch a dataset into the hub's cache, only the videos that are needed."""
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*"]))
            source = cls(root, name, config)
            needed = ["data/*", *(f"videos/{camera.key}/*" for camera in source.layout.cameras)]
            # The folder is named after the commit: nothing changes between the two downloads.
            snapshot_download(name, repo_type="dataset", revision=root.name, allow_patterns=needed)
        except UserError:
            raise
        except Exception as error:  # the hub's client has dozens of classes, of three libraries
            raise UserError(
                f"The dataset {name} is no folder here and could not be downloaded ({type(error).__name__}): "
                f"check the name, the connection, and `hf auth login` if it is private."
            ) from error
        return source

    @cached_property
    def meta(self) -> Meta:
        return read_meta(self.root, self.name)

    @cached_property
    def layout(self) -> Layout:
        def names_of(key: str, width: int) -> list[str]:
            names = _flatten(self.meta.features[key].names)
            short = key.rpartition(".")[2]
            return names if len(set(names)) == width else [f"{short}_{i}" for i in range(width)]

        features, steps = self.meta.features, self.meta.total_frames
        arrays = {key: features[key].array(steps) for key in features if key not in BOOKKEEPING}
        return choose_layout(arrays, KNOWN, self.config, self.name, "meta/info.json", names_of)

    def info(self) -> Info:
        fps, layout = self.meta.fps, self.layout
        if self.config.fps not in (None, fps):
            raise UserError(f"{self.name} was recorded at {fps:g} Hz: leave out --fps {self.config.fps:g}.")
        rows = self._rows()
        content = fingerprint(self.root, self.meta, {file for row in rows for file, _ in row.videos.values()})
        return layout.info(self.name, content, fps, task=rows[0].task)

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        rows = {row.index: row for row in self._rows()}
        keys = {key for group in self.layout.keys.values() for key in group}
        runs = read_numbers(self.root, {key: self.layout.arrays[key].width for key in keys})
        episodes, bad = [], []
        for index in existing(wanted, rows, self.name):
            try:
                episodes.append(self._episode(rows[index], runs.get(index, [])))
            except BadEpisode as error:
                bad.append(str(error))
        return episodes, bad

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        layout, fps, (file, start) = self.layout, self.meta.fps, episode.origin[camera]
        path, (key, _, recorded) = self.root / file, layout.cameras[camera]
        try:
            if layout.arrays[key].dtype == "video":
                times = np.arange(len(episode)) / fps
                if np.abs(episode.timestamps - times).max() > 0.1 / fps:  # not recorded at even intervals
                    times = episode.timestamps
                frames = video_frames(path, times + start, 0.5 / fps, recorded, layout.size)
            else:
                cells = read_images(path, key, start, len(episode))
                frames = (image_frame(_encoded(self.root, cell), recorded, layout.size) for cell in cells)
            for frame in frames:
                yield as_rgb(frame, layout.color_order)
        except (FrameError, OSError) as error:
            raise BadEpisode(
                f"Episode {episode.index} cannot be decoded from {path} ({reason(error)})"
            ) from None

    def _rows(self) -> list[EpisodeRow]:
        """The episodes of the chosen task, or of the only one there is, in order."""
        rows: list[EpisodeRow] = []
        cameras = [c.key for c in self.layout.cameras if self.layout.arrays[c.key].dtype == "video"]
        places = ("chunk_index", "file_index", "from_timestamp")
        columns = [f"videos/{camera}/{place}" for camera in cameras for place in places]
        for file in sorted((self.root / "meta" / "episodes").glob("**/*.parquet")):
            table = read_parquet(file, ["episode_index", "length", "tasks", *columns])
            try:
                for row in table.to_pylist():
                    videos = {}
                    for key in cameras:
                        chunk, number, start = (row[f"videos/{key}/{place}"] for place in places)
                        template = self.meta.video_path or VIDEO_PATH
                        name = template.format(video_key=key, chunk_index=chunk, file_index=number)
                        videos[key] = name, float(start)
                    tasks = tuple(map(str, row["tasks"] or ()))
                    rows.append(EpisodeRow(int(row["episode_index"]), int(row["length"]), videos, tasks))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{file} or video_path in info.json is damaged: {error!r}.") from error
        return choose_task(sorted(rows, key=lambda row: row.index), self.config.task, self.name)

    def _episode(self, row: EpisodeRow, runs: list[Run]) -> Episode:
        """An episode from its row in `meta/episodes` and its rows in the data files; raises BadEpisode."""
        name, steps = f"Episode {row.index}", sum(len(run.columns["timestamp"][0]) for run in runs)
        if steps != row.length:
            raise BadEpisode(f"{name} has {steps} steps in the data files and {row.length} in meta/episodes")
        if not steps:
            raise BadEpisode(f"{name} has 0 steps, and an action chunk needs at least 2")
        file, first, columns = runs[0]
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
        state, action = self.layout.vectors(lambda key: columns[key][0])
        origin = [row.videos.get(camera.key, (file, first)) for camera in self.layout.cameras]
        for file, _ in origin:
            if not (self.root / file).is_file():
                raise BadEpisode(f"{name} lacks its video: {self.root / file} is missing")
        episode = Episode(row.index, state, action, times, origin, row.task)
        refuse_unusable(name, episode, self.layout.names)
        return episode


class Feature(BaseModel):
    """A feature in `meta/info.json`."""

    dtype: str
    shape: list[PositiveInt]
    names: Any = None
    info: dict | None = None
    video_info: dict | None = None

    def array(self, steps: int) -> Array:
        """The feature as an array; a colour camera holds pixels, and a dtype of `video` or `image`."""
        about, shape = self.info or self.video_info or {}, (steps, *self.shape)
        if self.dtype not in ("video", "image"):
            return Array("other" if self.dtype == "string" else "numbers", shape, self.dtype)
        if len(self.shape) != 3 or about.get("is_depth_map") or about.get("video.is_depth_map"):
            return Array("other", shape, self.dtype)
        names = _flatten(self.names)
        channels_first = names[0] in ("channel", "channels", "c") if names else self.shape[0] <= 4
        return Array("pixels", shape, self.dtype, tuple(self.shape[1:] if channels_first else self.shape[:2]))


class Meta(BaseModel):
    """What is read of `meta/info.json`."""

    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    total_frames: int = 0
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
        major = int(version.partition(".")[0])
        if major < 3:
            raise UserError(
                f"{source} has LeRobot format v{version}, and v3 is needed: convert it with "
                f"`{CONVERTER} --repo-id={source} --root={root} --push-to-hub=false`."
            )
        if major > 3:
            raise UserError(f"{source} has LeRobot format v{version}, newer than v3, which is read here.")
        return Meta.model_validate(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path} is damaged ({what}): download or record the dataset again.") from error


def _flatten(names: Any) -> list[str]:
    """Names out of nested lists, `{"motors": [...]}`, or `{"x": 0, "y": 1}`."""
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list):
        return [name for entry in names for name in _flatten(entry)]
    return [] if names is None else [str(names)]


class EpisodeRow(NamedTuple):
    """An episode in `meta/episodes`; `videos` gives (file in the root, start in s) by the camera's key."""

    index: int
    length: int
    videos: dict[str, tuple[str, float]]
    tasks: tuple[str, ...]
    task: str | None = None


def choose_task(rows: list[EpisodeRow], task: str | None, source: str) -> list[EpisodeRow]:
    """The episodes of a task, or of the only one there is, with the task as theirs."""
    if not rows:
        raise UserError(f"{source} has no episodes (meta/episodes is empty): record or download it again.")
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
    there = ", ".join(f'"{name}"' for name in tasks) or "none"
    if task is not None and task not in tasks:
        raise UserError(f'{source} has no task "{task}"{closest(task, tasks)}: it has {there}.')
    if task is None and len(tasks) > 1:
        raise UserError(
            f"{source} has {len(tasks)} tasks, and one policy learns one: choose with --task ({there})."
        )
    chosen = task or next(iter(tasks), None)
    return [row._replace(task=chosen) for row in rows if task is None or task in row.tasks]


def read_parquet(file: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a parquet file, in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            if not missing:
                table = parquet.read(columns)
                table.validate(full=True)  # damaged files can hold texts and lists that are none
                return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({reason(error)}): download the dataset again, or, if you recorded it, "
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


class Run(NamedTuple):
    """Rows of a data file from `first` on that belong to one episode.

    `columns` holds, of each feature, values (L, D) and how many numbers a step really has, (L,).
    """

    file: str
    first: int
    columns: dict[str, tuple[np.ndarray, np.ndarray]]


def read_numbers(root: Path, widths: dict[str, int]) -> dict[int, list[Run]]:
    """Every run of rows with one episode index, by that index, with features of so many numbers a step."""
    found: dict[int, list[Run]] = {}
    for file in sorted((root / "data").glob("**/*.parquet")):
        table = read_parquet(file, [*widths, "timestamp", "frame_index", "episode_index"])
        columns = {}
        for key in table.column_names:
            dtype = np.float32 if key in widths else np.float64
            columns[key] = matrix(table[key], widths.get(key, 1), f"{file}, {key},", dtype)
        index = columns.pop("episode_index")[0][:, 0]
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for first, last in pairwise(edges):
            if first < last and np.isfinite(index[first]):
                part = {key: (x[first:last], counts[first:last]) for key, (x, counts) in columns.items()}
                run = Run(file.relative_to(root).as_posix(), first, part)
                found.setdefault(int(index[first]), []).append(run)
    return found


def matrix(column: pa.ChunkedArray, width: int, what: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or (nested) lists of them as (rows, width), NaN where a row has another count.

    Also returns how many numbers each row has.
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
    rows = np.full((count, width), np.nan, dtype)
    rows[counts == width] = values[counts[row] == width].reshape(-1, width)
    return rows, counts


def read_images(path: Path, key: str, first: int, count: int) -> Iterator[Any]:
    """So many cells of an image column of a data file, from row `first` on; raises FrameError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise FrameError(f"it has no column {key}")
            groups = range(file.num_row_groups)
            edges = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in groups)])
            own = [group for group in groups if edges[group] < first + count and first < edges[group + 1]]
            row = edges[own[0]] if own else 0
            for batch in file.iter_batches(64, own, [key]):
                batch.validate(full=True)
                inside = batch.slice(max(0, first - row), max(0, first + count - max(first, row)))
                row += len(batch)
                yield from inside.column(0).to_pylist()
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
