"""Numbers and pictures from the data files of a LeRobot dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.data.frames import FrameError, NoColor, decode_image, rgb_pixels
from common.data.lerobot_meta import EpisodeRow, files_below, read_parquet
from common.data.source import BadEpisode, other_pace
from common.data.video_clock import TOLERANCE
from common.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


class Run(NamedTuple):
    """Consecutive rows of a data file, starting at `first`, that belong to one episode.

    `columns` holds the values (L, D) of each feature and how many numbers each step really has, (L,).
    """

    file: str
    first: int
    columns: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def steps(self) -> int:
        return len(self.columns["timestamp"][0])

    def column(self, key: str) -> np.ndarray:
        """A feature with one number per step, (L,)."""
        return self.columns[key][0][:, 0]


def read_numbers(root: Path, widths: dict[str, int]) -> dict[int, list[Run]]:
    """Runs of rows with one episode index, by that index; `widths` are the features' numbers per step."""
    found: dict[int, list[Run]] = {}
    for file in files_below(root / "data"):
        needed, optional = ("timestamp", "frame_index", "episode_index"), ("index", "task_index")
        table = read_parquet(file, [*widths, *needed], optional)
        columns = {}
        for key in table.column_names:
            dtype = np.float32 if key in widths else np.float64
            columns[key] = matrix(table[key], widths.get(key, 1), f"{file}, {key},", dtype)
        index = columns["episode_index"][0][:, 0]
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for first, last in pairwise(edges):
            if first < last and np.isfinite(index[first]):
                part = {key: (x[first:last], counts[first:last]) for key, (x, counts) in columns.items()}
                run = Run(file.relative_to(root).as_posix(), first, part)
                found.setdefault(int(index[first]), []).append(run)
    return found


def misplaced(rows: Sequence[EpisodeRow], runs: dict[int, list[Run]]) -> set[int]:
    """Episodes whose order by `index` in their rows differs from that by dataset_from_index.

    The numbers themselves may differ, since tools that remove episodes renumber one of the two.
    """
    placed = {
        row.index: row.first for row in rows if row.first is not None and len(runs.get(row.index, [])) == 1
    }
    rows_of = {number: runs[number][0] for number in placed if "index" in runs[number][0].columns}
    begins = {number: run.column("index")[0] for number, run in rows_of.items()}
    if len(set(begins.values())) < len(begins):  # it restarts in every episode
        return set()
    by_index, by_place = sorted(begins, key=begins.__getitem__), sorted(begins, key=placed.__getitem__)
    return {one for one, other in zip(by_index, by_place, strict=True) if one != other}


def only_run(name: str, row: EpisodeRow, runs: list[Run]) -> Run:
    """The rows of an episode, in order and as many as `meta/episodes` says; raises BadEpisode if not."""
    steps, files = sum(run.steps for run in runs), sorted({run.file for run in runs})
    if steps != row.length:
        where = f"the data files ({', '.join(files)})" if len(files) > 1 else "the data files"
        raise BadEpisode(f"{name} has {steps} steps in {where} but {row.length} in meta/episodes")
    if not steps:
        raise BadEpisode(f"{name} has 0 steps, but an action chunk needs at least 2")
    if len(runs) > 1 or (np.diff(runs[0].column("frame_index")) != 1).any():
        raise BadEpisode(f"{name} has its steps out of order in {files[0]}")
    if None not in (row.first, row.last) and row.last - row.first != steps:
        stretch = f"{row.first} to {row.last} (dataset_from_index, dataset_to_index)"
        raise BadEpisode(f"{name} has {steps} steps, but meta/episodes places them at {stretch}")
    return runs[0]


def check_times(name: str, run: Run, fps: float, exactly: bool) -> None:
    """Raise BadEpisode for timestamps that contradict `fps`: each one if `exactly`, else only their pace."""
    times, frame = run.column("timestamp"), run.column("frame_index")
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise BadEpisode(f"{name} has timestamps that do not increase")
    if exactly:
        allowed = TOLERANCE + 1e-7 * frame  # float32 rounding
        off = np.abs(times * fps - frame) + np.abs(frame - np.arange(len(frame))) > allowed
        if off.any():
            step = off.argmax()
            said = f"{times[step]:.6g} s and frame_index {frame[step]:g} at step {step}"
            raise BadEpisode(f"{name} has timestamp {said}, which do not fit a video of {fps:g} Hz")
    elif pace := other_pace(times, fps):
        raise BadEpisode(
            f"{name} has {pace:.4g} steps a second by its timestamps, but info.json says {fps:g}"
        )


def matrix(column: pa.ChunkedArray, width: int, what: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A column of numbers or (nested) lists of them as (rows, width), NaN for rows of another length.

    Also returns how many numbers each row has.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _stored(pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type))
    count, row = len(array), np.arange(len(array))  # row: the row of each number
    while _is_list(array):
        row, array = row[pc.list_parent_indices(array).to_numpy()], array.flatten()
    if pa.types.is_boolean(array.type) or pa.types.is_decimal(array.type):
        array = array.cast(pa.int8() if pa.types.is_boolean(array.type) else pa.float64())
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise UserError(
            f"{what} holds {kind} instead of numbers: choose another feature or repair the dataset."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.to_numpy(zero_copy_only=False).astype(dtype)
    counts = np.bincount(row, minlength=count)
    rows = np.full((count, width), np.nan, dtype)
    rows[counts == width] = values[counts[row] == width].reshape(-1, width)
    return rows, counts


def _stored(array: pa.Array) -> pa.Array:
    """An array without a type that another package has registered: `datasets` has some for matrices."""
    return getattr(array, "storage", array)


def _is_list(array: pa.Array) -> bool:
    from pyarrow.types import is_fixed_size_list, is_large_list, is_list

    return is_list(array.type) or is_large_list(array.type) or is_fixed_size_list(array.type)


def read_images(root: Path, file: str, key: str, first: int, count: int) -> Iterator[np.ndarray]:
    """`count` pictures (H, W, 3) uint8 from a data file's column, from row `first` on; raises FrameError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(root / file) as table:
            if key not in table.schema_arrow.names:
                raise FrameError(f"it has no column {key}")
            groups = range(table.num_row_groups)
            edges = np.cumsum([0, *(table.metadata.row_group(group).num_rows for group in groups)])
            own = [group for group in groups if edges[group] < first + count and first < edges[group + 1]]
            row = edges[own[0]] if own else 0
            for batch in table.iter_batches(64, own, [key]):
                batch.validate(full=True)
                inside = batch.slice(max(0, first - row), max(0, first + count - max(first, row)))
                row += len(batch)
                for number in range(len(inside)):
                    yield _picture(root, _stored(inside.column(0)).slice(number, 1))
    except (pa.ArrowException, ValueError) as error:
        raise FrameError(str(error)) from error


def image_files(root: Path, key: str) -> set[str]:
    """Files that an image column names instead of holding images, if its first one exists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_there(name: Any) -> bool:
        return isinstance(name, str) and _lies_inside(root, name) and (root / name).is_file()

    found: set[str] = set()
    with suppress(pa.ArrowException, OSError, ValueError, KeyError):  # such episodes cannot be read either
        for file in files_below(root / "data"):
            with pq.ParquetFile(file) as table:
                kind = table.schema_arrow.field(key).type
                if pa.types.is_struct(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
                    column = table.read([f"{key}.path" if pa.types.is_struct(kind) else key])[key]
                    names = [cell["path"] if isinstance(cell, dict) else cell for cell in column.to_pylist()]
                    found.update(filter(is_there, names) if is_there(next(iter(names), None)) else ())
    return found


def _picture(root: Path, cell: pa.Array) -> np.ndarray:
    """The image in a cell (an array of length 1): encoded bytes, the path of a file, or pixels."""
    if _is_list(cell):
        return rgb_pixels(_nested(cell))
    value: Any = cell[0].as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return decode_image(value)
    if value is not None and not isinstance(value, str):
        raise NoColor(f"its column holds {cell.type}, but an image is encoded, a path, or an array of pixels")
    if not _lies_inside(root, value or ""):
        raise FrameError("an image is neither in the table nor in the dataset's folder")
    return decode_image((root / value).read_bytes())


def _lies_inside(root: Path, name: str) -> bool:
    path = Path(name)
    return bool(name) and ".." not in path.parts and (path.is_relative_to(root) or not path.is_absolute())


def _nested(cell: pa.Array) -> np.ndarray:
    """Nested lists as a numpy array, uint8 if their numbers are whole and fit; raises if they are ragged."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shape = []
    while _is_list(cell):
        lengths = pc.unique(pc.list_value_length(cell)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise FrameError("an image is missing, or has rows of different lengths")
        shape.append(lengths[0])
        cell = cell.flatten()
    if not (pa.types.is_integer(cell.type) or pa.types.is_floating(cell.type)) or cell.null_count:
        raise NoColor(f"its column holds lists of {cell.type}, but pixels are whole numbers")
    pixels = cell.to_numpy(zero_copy_only=False)
    small = pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255
    return pixels.reshape(shape).astype(np.uint8 if small else pixels.dtype, copy=False)
