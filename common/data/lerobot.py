"""LeRobot v3 datasets, read with pyarrow and PyAV: importing LeRobot itself takes many seconds.

Parquet holds states, actions and, for image cameras, the encoded frames; one mp4 file holds a camera's frames
for many episodes one after the other. Frames are picked by their timestamps, as the format defines them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.data.cameras import Camera, closest, select_cameras, target_size, with_short_names
from common.data.frames import FrameError, image_frame, video_frames
from common.data.ingest import (
    BadEpisode,
    Episode,
    Load,
    Loaded,
    StoreInfo,
    absent_episodes,
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
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def describe(root: Path, source: str, config: DataConfig) -> tuple[StoreInfo, Load]:
    """What the store of a LeRobot v3 dataset is, and how its episodes are read.

    Args:
        root: the dataset's folder.
        source: what to call the dataset.

    Raises:
        UserError: whatever is wrong with the dataset or the choices.
    """
    features, fps, video_path = read_info(root, source)
    if config.fps not in (None, fps):
        raise UserError(f"{source} was recorded at {fps:g} Hz: leave out --fps {config.fps:g}.")
    keys = {
        "--state-keys": config.state_keys or STATE_KEYS,
        "--action-keys": config.action_keys or ACTION_KEYS,
    }
    names = {flag: vector_names(features, keys[flag], flag, source) for flag in keys}
    chosen = select_cameras(colour_cameras(features), config.camera_keys or config.cameras, source)
    size = target_size(chosen, config.image_size)
    table, task = read_episodes(root, source, [c for c in chosen if c.is_video], video_path, config.task)
    info = StoreInfo(
        source=source,
        fingerprint=fingerprint(root, features, fps, table),
        cameras=tuple(camera.short for camera in chosen),
        camera_keys=tuple(camera.key for camera in chosen),
        image_size=size,
        fps=fps,
        state_keys=tuple(keys["--state-keys"]),
        action_keys=tuple(keys["--action-keys"]),
        state_names=names["--state-keys"],
        action_names=names["--action-keys"],
        task=task,
        color_order=config.color_order,
    )
    dims = {key: math.prod(features[key]["shape"]) for key in (*info.state_keys, *info.action_keys)}
    by_index = {row.index: row for row in table}

    def load_episodes(wanted: Sequence[int] | None) -> Loaded:
        absent = set(wanted or ()) - by_index.keys()
        if absent:
            raise absent_episodes(source, sorted(absent))
        rows = table if wanted is None else [by_index[index] for index in wanted]
        return load(root, info, chosen, rows, dims)

    return info, load_episodes


# -- metadata


def read_info(root: Path, source: str) -> tuple[dict[str, dict[str, Any]], float, str]:
    """Features, frame rate and video path template from `meta/info.json`."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(
            f"{source} is not a LeRobot dataset (it has no meta/info.json): give another folder or name."
        )
    try:
        info = read_json(path)
        version = str(info["codebase_version"]).removeprefix("v")
        major = int(version.partition(".")[0])
        features, fps = info.get("features"), info.get("fps")
        video_path = info.get("video_path") or VIDEO_PATH
        parts = [*Path(video_path).parts, *(part for key in features or () for part in Path(key).parts)]
        sound = isinstance(features, dict) and all(_is_feature(feature) for feature in features.values())
        sound = sound and isinstance(fps, int | float) and math.isfinite(fps) and fps > 0
        sound = sound and ".." not in parts and not Path(video_path).is_absolute()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): download or record the dataset again."
        ) from error
    if major < 3:
        raise UserError(
            f"{source} has LeRobot format v{version}, and v3 is needed: convert it with "
            f"`{CONVERTER} --repo-id={source} --root={root} --push-to-hub=false`."
        )
    if major > 3:
        raise UserError(
            f"{source} has LeRobot format v{version}, which is newer than the v3 that is read here."
        )
    if not sound:
        raise UserError(
            f"{path} is damaged (features, fps or video_path): download or record the dataset again."
        )
    return features, float(fps), video_path


def _is_feature(feature: Any) -> bool:
    return (
        isinstance(feature, dict)
        and isinstance(feature.get("dtype"), str)
        and isinstance(feature.get("shape"), list)
        and all(isinstance(side, int) and side > 0 for side in feature["shape"])
    )


def vector_names(features: dict, keys: Sequence[str], flag: str, source: str) -> tuple[str, ...]:
    """Names of the dimensions of features, one after the other; numbered where the dataset has none."""
    vectors = [
        name
        for name, feature in features.items()
        if feature["dtype"] not in ("video", "image", "string") and name not in BOOKKEEPING
    ]
    names: list[str] = []
    for key in keys:
        if key not in vectors:
            raise UserError(
                f"{source} has no {flag} {key}{closest(key, vectors)}: it has {', '.join(vectors) or 'none'}."
            )
        count, own = math.prod(features[key]["shape"]), _flatten(features[key].get("names"))
        own = own if len(set(own)) == count else [f"{short_key(key)}_{i}" for i in range(count)]
        names += [f"{short_key(key)}_{name}" if name in names else name for name in own]
    return tuple(names)


def short_key(key: str) -> str:
    return key.rpartition(".")[2]


def _flatten(names: Any) -> list[str]:
    """Names out of nested lists, `{"motors": [...]}`, or `{"x": 0, "y": 1}`."""
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list):
        return [name for entry in names for name in _flatten(entry)]
    return [] if names is None else [str(names)]


def colour_cameras(features: dict) -> list[Camera]:
    """The cameras among a dataset's features."""
    return with_short_names(
        Camera(key, "", _recorded_size(feature), feature["dtype"] == "video")
        for key, feature in features.items()
        if feature["dtype"] in ("video", "image") and len(feature["shape"]) == 3 and not _is_depth(feature)
    )


def _is_depth(feature: dict) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _recorded_size(feature: dict) -> tuple[int, int]:
    height, width = feature["shape"][:2]
    names = _flatten(feature.get("names"))
    if names[:1] in (["channel"], ["channels"], ["c"]) or (not names and feature["shape"][0] <= 4):
        height, width = feature["shape"][1:]
    return height, width


class EpisodeRow(NamedTuple):
    """An episode in `meta/episodes`; `videos` maps a camera's key to (file in the root, start in s)."""

    index: int
    length: int
    videos: dict[str, tuple[str, float]]


def read_episodes(
    root: Path, source: str, video_cameras: Sequence[Camera], video_path: str, task: str | None
) -> tuple[list[EpisodeRow], str | None]:
    """The episodes of one task, in order, and that task.

    Raises:
        UserError: if there are several tasks and none is chosen, or the chosen one does not exist.
    """
    files = sorted((root / "meta" / "episodes").glob("**/*.parquet"))
    rows: list[tuple[EpisodeRow, list[str]]] = []
    for file in files:
        places = [f"videos/{camera.key}/" for camera in video_cameras]
        columns = [
            place + name for place in places for name in ("chunk_index", "file_index", "from_timestamp")
        ]
        table = read_parquet(file, ["episode_index", "length", *columns], optional=["tasks"])
        for row in table.to_pylist():
            videos = {}
            try:
                for camera, place in zip(video_cameras, places, strict=True):
                    chunk, number = row[place + "chunk_index"], row[place + "file_index"]
                    name = video_path.format(video_key=camera.key, chunk_index=chunk, file_index=number)
                    videos[camera.key] = (name, float(row[place + "from_timestamp"]))
                episode = EpisodeRow(int(row["episode_index"]), int(row["length"]), videos)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise UserError(f"{file} or video_path in info.json is damaged: {error!r}.") from error
            rows.append((episode, [str(name) for name in row.get("tasks") or ()]))
    if not rows:
        raise UserError(f"{source} has no episodes (meta/episodes is empty): record or download it again.")
    tasks = list(dict.fromkeys(name for _, names in rows for name in names))
    listing = ", ".join(f'"{name}"' for name in tasks) or "none"
    if task is not None and task not in tasks:
        raise UserError(f'{source} has no task "{task}"{closest(task, tasks)}: it has {listing}.')
    if task is None and len(tasks) > 1:
        raise UserError(
            f"{source} has {len(tasks)} tasks, and one policy learns one: choose with --task ({listing})."
        )
    kept = [episode for episode, names in rows if task is None or task in names]
    return sorted(kept), task or next(iter(tasks), None)


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


def fingerprint(root: Path, features: dict, fps: float, episodes: Sequence[EpisodeRow]) -> str:
    """Hash of what the dataset contains: features, parquet files, and size, head and tail of its videos."""
    parquet = sorted(file for part in ("meta", "data") for file in (root / part).glob("**/*.parquet"))
    videos = sorted({root / name for episode in episodes for name, _ in episode.videos.values()})
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release the interpreter's lock
        parts = [*pool.map(_hash_whole, parquet), *pool.map(_hash_ends, videos)]
    names = [file.relative_to(root).as_posix() for file in (*parquet, *videos)]
    content = json.dumps([features, fps, names, parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _hash_whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_ends(path: Path, count: int = 64 * 1024) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(count)
            file.seek(max(0, size - count))
            return hashlib.sha256(size.to_bytes(8, "little") + head + file.read(count)).hexdigest()
    except OSError:
        return "unreadable"  # the ingest says which episode misses it


def download(name: str, cameras: Sequence[str]) -> Path:
    """Fetch a dataset from the hub into its cache, only the videos that are needed; the folder.

    Raises:
        UserError: if it is not there, or there is no connection and no earlier download.
    """
    from huggingface_hub import snapshot_download

    try:
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*"]))
        features, _, _ = read_info(root, name)
        chosen = select_cameras(colour_cameras(features), cameras, name, quiet=True)
        videos = [f"videos/{camera.key}/*" for camera in chosen]
        return Path(
            snapshot_download(name, repo_type="dataset", allow_patterns=["meta/*", "data/*", *videos])
        )
    except UserError:
        raise
    except Exception as error:  # the hub's client has dozens of classes, of three libraries
        raise UserError(
            f"The dataset {name} is no folder here and could not be downloaded "
            f"({type(error).__name__}): check the name, the connection, and `hf auth login` if it is private."
        ) from error


# -- data


class Segment(NamedTuple):
    """Where a camera's frames of an episode start: in seconds in a video, or at a row in a parquet file."""

    file: str
    start: float


@dataclass(frozen=True)
class LeRobotReader:
    """Frames of the dataset's cameras (see `FrameReader`).

    Attributes:
        root: the dataset's folder.
        cameras: those to read.
        size: (H, W) of the result.
        fps: frames per second.
        lengths: steps of each episode.
        segments: per episode, one segment a camera.
        irregular: timestamps of the episodes that are not recorded at even intervals.
        color_order: of the recorded pixels.
    """

    isolated = False

    root: Path
    cameras: tuple[Camera, ...]
    size: tuple[int, int]
    fps: float
    lengths: dict[int, int]
    segments: dict[int, tuple[Segment, ...]]
    irregular: dict[int, np.ndarray]
    color_order: str = "rgb"

    def frames(self, episode: int, camera: int) -> Iterator[np.ndarray]:
        for frame in self._decoded(episode, camera):
            yield frame if self.color_order == "rgb" else np.ascontiguousarray(frame[::-1])

    def only(self, episode: int) -> LeRobotReader:
        irregular = {episode: self.irregular[episode]} if episode in self.irregular else {}
        lengths, segments = {episode: self.lengths[episode]}, {episode: self.segments[episode]}
        return replace(self, lengths=lengths, segments=segments, irregular=irregular)

    def _decoded(self, episode: int, camera: int) -> Iterator[np.ndarray]:
        segment, place = self.segments[episode][camera], self.cameras[camera]
        try:
            if place.is_video:
                times = self.irregular.get(episode, np.arange(self.lengths[episode]) / self.fps)
                yield from video_frames(
                    self.root / segment.file, times + segment.start, 0.5 / self.fps, place.size, self.size
                )
            else:
                yield from self._images(episode, place, segment)
        except (FrameError, OSError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise BadEpisode(
                f"Episode {episode} cannot be decoded from {self.root / segment.file} ({reason})"
            ) from None

    def _images(self, episode: int, camera: Camera, segment: Segment) -> Iterator[np.ndarray]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        first, last = int(segment.start), int(segment.start) + self.lengths[episode]
        try:
            with pq.ParquetFile(self.root / segment.file) as parquet:
                if camera.key not in parquet.schema_arrow.names:
                    raise FrameError(f"it has no column {camera.key}")
                begin = 0
                for group in range(parquet.num_row_groups):
                    end = begin + parquet.metadata.row_group(group).num_rows
                    if begin < last and first < end:
                        row = begin
                        for batch in parquet.iter_batches(64, [group], [camera.key]):
                            batch.validate(full=True)
                            inside = batch.slice(max(0, first - row), max(0, last - max(first, row)))
                            row += len(batch)
                            for entry in inside.column(0).to_pylist():
                                yield image_frame(self._encoded(entry), camera.size, self.size)
                    begin = end
        except (pa.ArrowException, ValueError) as error:
            raise FrameError(str(error)) from error

    def _encoded(self, entry: Any) -> bytes:
        """The bytes of an image cell: inside the table, or in a file of the dataset's folder."""
        entry = entry if isinstance(entry, dict) else {"bytes": entry}
        if entry.get("bytes"):
            return entry["bytes"]
        path = Path(entry.get("path") or "")
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise FrameError("an image is neither in the table nor in the dataset's folder")
        return (self.root / path).read_bytes()


def load(
    root: Path,
    info: StoreInfo,
    cameras: Sequence[Camera],
    table: Sequence[EpisodeRow],
    dims: dict[str, int],
) -> Loaded:
    """Episodes without their frames, a clause about each one that cannot be used, and the frames' reader.

    Args:
        dims: numbers a step in each state and action feature.
    """
    numbers = _read_numbers(root, dims)
    episodes, bad = [], []
    reader = LeRobotReader(
        root, tuple(cameras), info.image_size, info.fps, {}, {}, {}, color_order=info.color_order
    )
    for row in table:
        try:
            episode, file, first = _episode(row, numbers, info, dims)
            segments = []
            for camera in cameras:
                segment = Segment(*row.videos[camera.key]) if camera.is_video else Segment(file, first)
                if not (root / segment.file).is_file():
                    raise BadEpisode(f"Episode {row.index} lacks its video: {root / segment.file} is missing")
                segments.append(segment)
        except BadEpisode as error:
            bad.append(str(error))
            continue
        reader.lengths[row.index], reader.segments[row.index] = row.length, tuple(segments)
        if np.abs(episode.timestamps - np.arange(row.length) / info.fps).max() > 0.1 / info.fps:
            reader.irregular[row.index] = episode.timestamps
        origin = [(s.file, s.start) if c.is_video else s.file for s, c in zip(segments, cameras, strict=True)]
        episodes.append(replace(episode, origin=json.dumps(origin)))
    return episodes, bad, reader


class _Numbers(NamedTuple):
    """An episode's rows of a data file: the file below the root, first row, and columns by name."""

    file: str
    first: int
    columns: dict[str, np.ndarray]


def _read_numbers(root: Path, dims: dict[str, int]) -> dict[int, list[_Numbers]]:
    """Every run of rows with one episode index, by that index."""
    found: dict[int, list[_Numbers]] = {}
    for file in sorted((root / "data").glob("**/*.parquet")):
        table = read_parquet(file, [*dims, "timestamp", "frame_index", "episode_index"])
        columns = {}
        for name, dim in dims.items():
            columns[name], columns[name + "/length"] = matrix(table[name], dim, f"{file}, {name},")
        for name, kind in (
            ("timestamp", np.float64),
            ("frame_index", np.float64),
            ("episode_index", np.float64),
        ):
            columns[name] = matrix(table[name], 1, f"{file}, {name},", kind)[0][:, 0]
        index = columns.pop("episode_index")
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for first, last in pairwise(edges):
            if first < last and np.isfinite(index[first]):
                part = {name: column[first:last] for name, column in columns.items()}
                place = file.relative_to(root).as_posix()
                found.setdefault(int(index[first]), []).append(_Numbers(place, first, part))
    return found


def matrix(
    column: pa.ChunkedArray, dim: int, what: str, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or (nested) lists of them as (rows, dim), and how many numbers each row really has.

    Rows with another count become NaN, as do nulls.
    """
    import pyarrow as pa

    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    counts = _leaf_counts(array)
    while _is_list(array):
        array = array.flatten()
    if not (
        pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)
    ):
        raise UserError(
            f"{what} holds {array.type} instead of numbers: choose another feature or repair the dataset."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.to_numpy(zero_copy_only=False).astype(dtype)
    if (counts == dim).all():
        return values.reshape(-1, dim), counts
    rows = np.full((len(counts), dim), np.nan, dtype)
    rows[counts == dim] = values[np.repeat(counts == dim, counts)].reshape(-1, dim)
    return rows, counts


def _is_list(array: pa.Array) -> bool:
    import pyarrow as pa

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(array.type) for is_kind in kinds)


def _leaf_counts(array: pa.Array) -> np.ndarray:
    """Numbers in each row of an array of (nested) lists: (rows,) int64."""
    import pyarrow.compute as pc

    if not _is_list(array):
        return np.ones(len(array), np.int64)
    ends = np.cumsum(
        pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False), dtype=np.int64
    )
    below = np.concatenate([[0], np.cumsum(_leaf_counts(array.flatten()))])
    return np.diff(below[ends], prepend=0)


def _episode(
    row: EpisodeRow, numbers: dict[int, list[_Numbers]], info: StoreInfo, dims: dict[str, int]
) -> tuple[Episode, str, int]:
    """An episode, the parquet file it is in and its first row there; raises BadEpisode."""
    runs, name = numbers.get(row.index, []), f"Episode {row.index}"
    steps = sum(len(run.columns["timestamp"]) for run in runs)
    if steps != row.length:
        raise BadEpisode(f"{name} has {steps} steps in the data files and {row.length} in meta/episodes")
    if steps < 2:
        raise BadEpisode(f"{name} has {steps} step{'s' * (steps != 1)}, and an action chunk needs at least 2")
    columns = runs[0].columns
    if len(runs) > 1 or (np.diff(columns["frame_index"]) != 1).any():
        raise BadEpisode(f"{name} has its steps out of order in {runs[0].file}")
    times = columns["timestamp"]
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise BadEpisode(f"{name} has timestamps that do not increase")
    for key, dim in dims.items():
        wrong = np.flatnonzero(columns[key + "/length"] != dim)
        if len(wrong):
            found = columns[key + "/length"][wrong[0]]
            raise BadEpisode(
                f"{name} has {found} numbers in {key} at step {wrong[0]}, and info.json says {dim}"
            )
    state, action = (
        np.concatenate([columns[key] for key in keys], axis=1) for keys in (info.state_keys, info.action_keys)
    )
    refuse_nonfinite(name, {"state": (state, info.state_names), "action": (action, info.action_names)})
    return Episode(row.index, state, action, times, origin=""), runs[0].file, runs[0].first
