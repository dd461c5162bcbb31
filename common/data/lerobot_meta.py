"""What a LeRobot v3 dataset says about itself: `meta/info.json` and the rows of `meta/episodes`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, PositiveInt, ValidationError

from common.data.layout import Array
from common.data.source import POINTER, is_pointer, reason, spaced
from common.errors import UserError
from common.files import read_json, walk

if TYPE_CHECKING:
    import pyarrow as pa

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"
OLD_CONVERTER = "python -m lerobot.datasets.v21.convert_dataset_v20_to_v21"  # of LeRobot 0.3.3, hub only
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
COLOR = (3, 4)  # channels
COLLECTED = {"written_by": "collect.py"}  # what each camera says about itself in such a dataset
PLACE = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


class Feature(BaseModel):
    """A feature in `meta/info.json`."""

    dtype: str | None = None
    shape: list[PositiveInt] | None = None
    names: Any = None
    info: Any = None
    video_info: Any = None

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("video", "image")

    def array(self, steps: int) -> Array:
        """The feature as an array; a colour camera becomes pixels with dtype `video` or `image`."""
        shape, dtype = (steps, *(self.shape or ())), self.dtype or "nothing"
        if not self.is_camera:
            dtype += " of no stated shape" * (self.shape is None)
            return Array("other" if dtype == "string" or self.shape is None else "numbers", shape, dtype)
        about = {}
        for said in (self.video_info, self.info):
            about |= said if isinstance(said, dict) else {}
        depth = about.get("is_depth_map") or about.get("video.is_depth_map")
        if depth or str(about.get("video.pix_fmt", "")).startswith("gray"):
            return Array("other", shape, f"{dtype} of depth")
        if self.shape is None:
            return Array("pixels", shape, dtype)
        if len(self.shape) != 3 or not {self.shape[0], self.shape[2]} & set(COLOR):
            return Array("other", shape, f"{dtype} without colour")
        return Array("pixels", shape, dtype, self._size())

    def _size(self) -> tuple[int, int]:
        """(H, W); the channel axis has size 3 or 4, and the names decide if both ends have."""
        first, last = self.shape[0] in COLOR, self.shape[2] in COLOR
        names = [name.casefold() for name in flatten(self.names)]
        named_first = bool(names) and names[0] in ("channel", "channels", "c", "rgb")
        height, width = self.shape[1:] if first and (named_first or not last) else self.shape[:2]
        return height, width


class Meta(BaseModel):
    """The parts of `meta/info.json` that are used."""

    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    total_frames: int | None = None
    total_episodes: int | None = None
    features: dict[str, Feature]
    video_path: Annotated[str, Field(pattern=r"^[^./]")] | None = None  # below the folder

    @property
    def collected(self) -> bool:
        """Whether `collect.py` wrote it: RGB, with state and action as a policy takes and returns them."""
        return any(feature.info == COLLECTED for feature in self.features.values())


def read_meta(root: Path, source: str) -> Meta:
    """Read `meta/info.json`, which must be that of a LeRobot v3 dataset."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(
            f"{source} is not a LeRobot dataset (it has no meta/info.json): give another folder or name."
        )
    try:
        content = read_json(path)
        version = str(content["codebase_version"]).removeprefix("v")
        major, minor = (int(part) for part in f"{version}.0".split(".")[:2])
        if (major, minor) < (3, 0):
            raise UserError(_older_format(root, source, version, (major, minor)))
        if major > 3:
            raise UserError(f"{source} has LeRobot format v{version}, newer than v3, the only one supported.")
        return Meta.model_validate(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path} is damaged ({what}): download or record the dataset again.") from error


def _older_format(root: Path, source: str, version: str, number: tuple[int, int]) -> str:
    """How to convert a format before v3."""
    name = shlex.quote(source)
    convert = f"`{CONVERTER} --repo-id={name} --root={shlex.quote(str(root))} --push-to-hub=false`"
    said = f"{source} has LeRobot format v{version}, but v3 is needed"
    if number >= (2, 1):
        return f"{said}: convert it with {convert}."
    if number < (2, 0):
        return f"{said}: convert it to v2.1 with LeRobot versions from that time, then with {convert}."
    on_hub = "OWNER/NAME" if source.count("/") != 1 or Path(source).exists() else name
    return (
        f"{said}: convert it to v2.1 on the hub, with LeRobot 0.3.3 in a separate environment "
        f"(`{OLD_CONVERTER} --repo-id={on_hub}`), download that, and convert it to v3 with {convert}."
    )


def flatten(names: Any) -> list[str]:
    """Names from nested lists, `{"motors": [...]}`, or `{"x": 0, "y": 1}`."""
    if isinstance(names, dict):
        if all(isinstance(value, int) for value in names.values()):
            return sorted(names, key=names.__getitem__)
        names = list(names.values())
    if isinstance(names, list):
        return [name for entry in names for name in flatten(entry)]
    return [] if names is None else [str(names)]


class Place(NamedTuple):
    """Where an episode's frames are: a file below the root, and start and end in it, in seconds."""

    file: str
    start: float
    end: float | None


class EpisodeRow(NamedTuple):
    """An episode in `meta/episodes`.

    `first` and `last` are its rows in the whole dataset, if stated; `videos` its places by the camera's key.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    first: int | None
    last: int | None
    videos: dict[str, Place]


def read_rows(root: Path, meta: Meta) -> list[EpisodeRow]:
    """All episodes that `meta/episodes` lists, by number."""
    rows = []
    cameras = [key for key, feature in meta.features.items() if feature.dtype == "video"]
    optional = [f"videos/{key}/{part}" for key in cameras for part in PLACE]
    for file in files_below(root / "meta" / "episodes"):
        table = read_parquet(
            file, ["episode_index", "length", "tasks"], ["dataset_from_index", "dataset_to_index", *optional]
        )
        try:
            rows += [_row(row, cameras, meta) for row in table.to_pylist()]
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise UserError(f"{file} or video_path in info.json is damaged: {error!r}.") from error
    return sorted(rows, key=lambda row: row.index)


def _row(row: dict[str, Any], cameras: Sequence[str], meta: Meta) -> EpisodeRow:
    videos = {}
    for key in cameras:
        chunk, number, start, end = (row.get(f"videos/{key}/{part}") for part in PLACE)
        if None in (chunk, number, start) or not math.isfinite(float(start)):
            continue
        template = meta.video_path or VIDEO_PATH
        file = template.format(video_key=key, chunk_index=int(chunk), file_index=int(number))
        if ".." in Path(file).parts:
            raise ValueError(f"{file} lies elsewhere")
        videos[key] = Place(file, float(start), None if end is None or math.isnan(float(end)) else float(end))
    tasks = [row["tasks"]] if isinstance(row["tasks"], str) else row["tasks"] or ()
    first, last = (row.get(f"dataset_{end}_index") for end in ("from", "to"))
    first, last = (None if place is None or math.isnan(place) else int(place) for place in (first, last))
    return EpisodeRow(
        int(row["episode_index"]), int(row["length"]), tuple(map(spaced, tasks)), first, last, videos
    )


def read_tasks(root: Path) -> dict[int, str] | None:
    """Instructions by `task_index`; None if the dataset lists none."""
    file = root / "meta" / "tasks.parquet"
    if not file.is_file():
        return None
    # The instructions are the index of a pandas table, whose column has changed its name over time.
    table = read_parquet(file, ["task_index"], ["task", "__index_level_0__"])
    names = [name for name in table.column_names if name != "task_index"]
    texts = table[names[0]].to_pylist() if names else []
    numbers = table["task_index"].to_pylist()
    fits = len(texts) == len(numbers) and all(isinstance(text, str) for text in texts)
    if not fits or not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{file} does not list instructions as texts with their task_index: record it again.")
    return dict(zip(numbers, map(spaced, texts), strict=True))


def files_below(folder: Path) -> list[Path]:
    """Parquet files in a folder, sorted, without hidden ones (macOS makes some) or hidden folders' files."""
    found = (inside / name for inside, _, names in walk(folder) for name in names)
    return sorted(
        path
        for path in found
        if path.suffix.lower() == ".parquet"
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_parquet(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Columns of a parquet file, in memory, with those of the optional ones that it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            there = set(parquet.schema_arrow.names)
            missing = [name for name in columns if name not in there]
            if not missing:
                table = parquet.read([*columns, *(name for name in optional if name in there)])
                table.validate(full=True)  # damaged files can hold invalid texts and lists
                return table
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_pointer(file):
            raise UserError(f"{file} {POINTER}.") from None
        raise UserError(
            f"{file} cannot be read ({reason(error)}): download the dataset again, or, if you recorded it, "
            f"make sure that the recorder called finalize()."
        ) from error
    raise UserError(
        f"{file} has no column {missing[0]}, which a LeRobot v3 dataset has: download or record it again."
    )
