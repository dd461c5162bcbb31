"""Tiny LeRobot v3 datasets, written with only pyarrow and PyAV, whose frames encode their step."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
BITS = 12
STATE, ACTION = "observation.state", "action"


def draw(number: int, camera: int, size: tuple[int, int]) -> np.ndarray:
    """A (H, W, 3) picture: a number as dark and bright bars, and a camera as the colour below them."""
    height, width = size
    bits = number >> np.arange(BITS) & 1
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2] = (30 + 190 * bits[np.arange(width) * BITS // width])[None, :, None]
    picture[height // 2 :, :, camera % 3] = 200
    return picture


def read(frame: np.ndarray) -> tuple[int, int]:
    """The number and the camera that a (3, H, W) picture shows, whatever its size and compression."""
    _, height, width = frame.shape
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    bits = frame[1, height // 8 : height * 3 // 8, centres].mean(-1) > 125
    return int((bits << np.arange(BITS)).sum()), int(frame[:, height * 3 // 4].mean(-1).argmax())


def make_dataset(
    root: Path,
    lengths: Sequence[int] = (12, 9, 15),
    cameras: Mapping[str, tuple[int, int]] | Sequence[str] = ("observation.images.cam_high",),
    *,
    video: bool = True,
    dims: tuple[int, int] = (3, 2),
    names: Any = "flat",
    tasks: Sequence[str] = ("fold the towel",),
    episodes_per_file: int = 2,
    gop: int = 4,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dataset; step i of the whole dataset is drawn as number i in every camera.

    Args:
        root: folder to create.
        lengths: steps of each episode.
        cameras: feature names, with sizes (H, W) if they differ from 32x48.
        video: mp4 files of several episodes each, or images inside the data files.
        dims: dimensions of state and action.
        names: how dimensions are named: `flat`, `nested`, `dict`, `index`, or None.
        tasks: instructions, assigned to the episodes in turn.
        episodes_per_file: episodes that share a file.
        gop: distance of key frames in a video; B-frames are used above 2.
        changes: entries of info.json to replace.
    """
    sizes = dict(cameras) if isinstance(cameras, Mapping) else dict.fromkeys(cameras, (32, 48))
    info = _info(lengths, sizes, video, dims, names) | dict(changes or {})
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    starts = np.cumsum([0, *lengths])
    rows = []
    for file, first in enumerate(range(0, len(lengths), episodes_per_file)):
        group = range(first, min(first + episodes_per_file, len(lengths)))
        steps = np.arange(starts[group[0]], starts[group[-1] + 1])
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(steps, group, lengths, dims, {} if video else sizes, len(tasks)), path)
        for camera, (key, size) in enumerate(sizes.items() if video else ()):
            path = root / f"videos/{key}/chunk-000/file-{file:03d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, [draw(int(step), camera, size) for step in steps], gop)
        for episode in group:
            row = {
                "episode_index": episode,
                "length": lengths[episode],
                "tasks": [tasks[episode % len(tasks)]],
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": int(starts[episode]),
                "dataset_to_index": int(starts[episode + 1]),
            }
            for key in sizes if video else ():
                begin, end = (starts[episode : episode + 2] - starts[first]) / FPS
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
                row |= {f"videos/{key}/from_timestamp": begin, f"videos/{key}/to_timestamp": end}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def state_of(steps: np.ndarray, dim: int) -> np.ndarray:
    """The (S, dim) state that `make_dataset` records at these steps of the whole dataset."""
    return (steps[:, None] + np.arange(dim) / 10).astype(np.float32)


def action_of(steps: np.ndarray, dim: int) -> np.ndarray:
    """The (S, dim) action that `make_dataset` records at these steps."""
    return -state_of(steps, dim)


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    gop: int = 4,
    format: str = "rgb24",
    codec: str = "libx264",
    stored: str = "yuv420p",
    ticks: Sequence[int] | None = None,
    **color: int,
) -> None:
    """Write a video of (H, W, 3) pictures, FPS per second; `color` sets colorspace and similar options.

    Pictures in yuv420p are planes below each other, (H * 3 / 2, W), and are stored unchanged.
    `stored` is the stream's format; `ticks` are the times of the pictures, in 1/1000 of a picture's duration.
    """
    ticks = range(0, 1000 * len(pictures), 1000) if ticks is None else ticks
    height, width = pictures[0].shape[:2]
    options = {"crf": "18", "g": str(gop)} | ({"preset": "12"} if codec == "libsvtav1" else {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width = (height * 2 // 3 if format == "yuv420p" else height), width
        stream.pix_fmt = stored
        stream.codec_context.max_b_frames = 2 if gop > 2 else 0
        stream.codec_context.thread_count = 1
        for name, value in color.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = Fraction(1, 1000 * FPS)
        for tick, picture in zip(ticks, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format)
            frame.pts, frame.time_base = tick, Fraction(1, 1000 * FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def edit_column(file: Path, name: str, edit) -> None:
    """Rewrite one column of a parquet file; `edit` changes its list of values in place or returns another."""
    table = pq.read_table(file, partitioning=None)
    values = table[name].to_pylist()
    values = edit(values) or values
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(values)), file)


def edit_rows(root: Path, edit) -> None:
    """Rewrite meta/episodes; `edit` changes its list of rows in place or returns another."""
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(file, partitioning=None).to_pylist()
    pq.write_table(pa.Table.from_pylist(edit(rows) or rows), file)


def _info(lengths, sizes, video: bool, dims, names) -> dict[str, Any]:
    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": [dim], "names": _names(names, key, dim)}
        for key, dim in ((STATE, dims[0]), (ACTION, dims[1]))
    }
    for key, size in sizes.items():
        features[key] = {
            "dtype": "video" if video else "image",
            "shape": [*size, 3],
            "names": ["height", "width", "channels"],
        }
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        kind = "float32" if key == "timestamp" else "int64"
        features[key] = {"dtype": kind, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }


def _names(style: Any, key: str, dim: int) -> Any:
    flat = [f"{'joint' if key == STATE else 'target'}_{i}" for i in range(dim)]
    styles = {"flat": flat, "nested": [flat], "dict": {"motors": flat}, None: None}
    return styles[style] if style != "index" else {name: i for i, name in enumerate(flat)}


def _table(steps, group, lengths, dims, images: Mapping[str, tuple[int, int]], num_tasks: int) -> pa.Table:
    episode = np.repeat(list(group), [lengths[e] for e in group])
    frame = np.concatenate([np.arange(lengths[e]) for e in group])
    columns: dict[str, Any] = {
        STATE: pa.array(list(state_of(steps, dims[0])), pa.list_(pa.float32(), dims[0])),
        ACTION: pa.array(list(action_of(steps, dims[1])), pa.list_(pa.float32(), dims[1])),
    }
    for camera, (key, size) in enumerate(images.items()):
        pngs = []
        for step in steps:
            file = io.BytesIO()
            Image.fromarray(draw(int(step), camera, size)).save(file, "PNG")
            pngs.append({"bytes": file.getvalue(), "path": f"{step}.png"})
        columns[key] = pa.array(pngs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns |= {"timestamp": pa.array((frame / FPS).astype(np.float32)), "frame_index": frame}
    columns |= {"episode_index": episode, "index": steps, "task_index": episode % num_tasks}
    return pa.table(columns)
