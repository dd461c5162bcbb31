"""Changes to a LeRobot dataset that keep its files valid but make them contradict each other.

Every step's picture and state are the same number (`lerobot_factory`), whatever the metadata say about it: a
dataset that was changed must be refused, in whole or in part, or show at every step the step's own picture.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import strategies as st
from lerobot_factory import STATE, draw, edit_column, edit_rows, make_dataset, read, write_video
from PIL import Image

LENGTHS, CAMERA, SIZE = (6, 4, 6, 5, 4), "observation.images.cam_high", (32, 48)
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"

episode = st.integers(0, len(LENGTHS) - 1)
offset = st.sampled_from([-20, -7, -1, -0.7, -0.3, -0.06, 0.06, 0.3, 0.5, 0.7, 1, 2, 6, 1e9])  # in steps
mutation = st.one_of(
    st.tuples(st.sampled_from(["from", "to", "both", "from on", "both on"]), episode, offset),
    st.tuples(st.just("drift"), offset, st.booleans()),
    st.tuples(st.just("drop a key"), st.just("to")),
    st.tuples(st.just("row"), st.sampled_from(["twice", "gone", "reversed", "null"]), episode),
    st.tuples(st.just("places"), episode, episode),
    st.tuples(st.just("labels"), episode, episode),
    st.tuples(
        st.sampled_from(["length", "dataset_from_index", "dataset_to_index"]), episode, st.integers(-2, 2)
    ),
    st.tuples(st.just("rate"), st.sampled_from([5, 9, 10.4, 20, 30])),
    st.tuples(st.just("fps"), st.sampled_from([1, 5, 9.97, 11, 20, 0.1, 1e6])),
    st.tuples(st.just("frame"), st.sampled_from(["lost", "cut", "doubled", "late"]), st.integers(0, 24)),
    st.tuples(st.just("ticks"), offset),
    st.tuples(st.just("timestamp"), st.sampled_from(["shift", "scale", "one", "text"]), offset),
    st.tuples(st.just("frame_index"), st.integers(-3, 3)),
    st.tuples(
        st.just("shape"), st.permutations([32, 48, 3]), st.permutations(["height", "Width", "channel"])
    ),
    st.tuples(st.just("shape"), st.sampled_from([None, [], [32, 48], [32, 48, 1], [48, 48, 3]]), st.none()),
    st.tuples(st.just("cells"), st.sampled_from(["grey", "deep", "array", "text", "palette"]), episode),
    st.tuples(st.just("extra"), st.sampled_from(["hidden", "folder", "copy", "capital"])),
)
example = st.tuples(st.booleans(), st.lists(mutation, min_size=1, max_size=2, unique_by=lambda m: m[0]))


def corpus(folder: Path) -> None:
    """A valid dataset with a video camera, and one with an image camera."""
    for name, video in (("video", True), ("images", False)):
        make_dataset(folder / name, LENGTHS, {CAMERA: SIZE}, video=video, episodes_per_file=5, dims=(3, 3))


def mutate(root: Path, is_video: bool, mutations: list[tuple]) -> None:
    """Apply mutations; those of videos do not change a dataset without videos."""
    for kind, *values in sorted(mutations, key=lambda each: each[0] == "extra"):
        if kind in ("from", "to", "both", "from on", "both on", "drift", "drop a key", "row", "places"):
            edit_rows(root, lambda rows, kind=kind, values=values: _edit_rows(rows, kind, *values))
        elif kind in ("length", "dataset_from_index", "dataset_to_index"):
            edit_rows(root, lambda rows, kind=kind, values=values: _add(rows, kind, *values))
        elif kind == "labels":
            one, other = values
            swap = {one: other, other: one}
            edit_column(root / DATA, "episode_index", lambda rows, swap=swap: [swap.get(e, e) for e in rows])
        elif kind in ("rate", "frame", "ticks") and is_video:
            _film_again(root / VIDEO, kind, *values)
        elif kind in ("fps", "shape"):
            _edit_info(root, kind, *values)
        elif kind == "timestamp":
            how, by = values
            change = {
                "shift": lambda i, t, by=by: t + by / 10,
                "scale": lambda i, t, by=by: t * (1 + by / 10),
                "one": lambda i, t, by=by: t + by / 10 * (i == 8),
                "text": lambda i, t: str(t),
            }[how]
            edit_column(
                root / DATA, kind, lambda rows, change=change: [change(i, t) for i, t in enumerate(rows)]
            )
        elif kind == "frame_index":
            edit_column(root / DATA, kind, lambda rows, by=values[0]: [row + by for row in rows])
        elif kind == "cells" and not is_video:
            edit_column(root / DATA, CAMERA, lambda rows, how=values[0], n=values[1]: _cells(rows, how, n))
        elif kind == "extra":
            _extra(root, *values)


def _edit_rows(rows: list[dict], kind: str, *values) -> list[dict] | None:
    begin, end = (f"videos/{CAMERA}/{part}_timestamp" for part in ("from", "to"))
    if kind == "drop a key":
        return [{key: value for key, value in row.items() if key != end} for row in rows]
    if not rows:
        return None
    if kind == "row":
        how, number = values[0], values[1] % len(rows)
        row = rows[number]
        if how == "null":
            row.update(dict.fromkeys([key for key in row if key.startswith("videos/")]))
        return {
            "twice": [*rows, row],
            "gone": rows[:number] + rows[number + 1 :],
            "reversed": rows[::-1],
        }.get(how)
    if begin not in rows[0]:
        return None
    if kind == "places":
        one, other = (rows[number % len(rows)] for number in values)
        for key in {begin, end} & rows[0].keys():
            one[key], other[key] = other[key], one[key]
        return None
    for number, row in enumerate(rows):
        if row[begin] is None:  # another mutation removed it
            continue
        shift = (
            values[0] * number
            if kind == "drift"
            else values[1] * (number >= values[0] if kind.endswith(" on") else number == values[0])
        )
        both = values[1] if kind == "drift" else kind.startswith("both")
        row[begin] += shift / 10 * (kind != "to")
        if row.get(end) is not None:
            row[end] += shift / 10 * (both or kind == "to")
    return None


def _add(rows: list[dict], key: str, number: int, by: int) -> None:
    if key in rows[0]:
        rows[number % len(rows)][key] += by


def _film_again(path: Path, kind: str, how, number: int = 0) -> None:
    """The video with other frames or times."""
    shown = list(range(sum(LENGTHS)))
    ticks = [1000 * i for i in shown]
    if kind == "rate":
        ticks = [round(i * 10000 / how) for i in shown]
    elif kind == "ticks":
        ticks = [tick + max(0, round(1000 * min(how, 50))) for tick in ticks]
    elif how == "late":
        ticks[number] += 400
    elif how == "doubled":
        shown.insert(number, number)
        ticks.append(ticks[-1] + 1000)
    else:
        del shown[number], ticks[number if how == "lost" else -1]
    write_video(path, [draw(i, 0, SIZE) for i in shown], ticks=ticks)


def _edit_info(root: Path, kind: str, value, names=None) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    if kind == "fps":
        info["fps"] = value
    else:
        info["features"][CAMERA].update(shape=value, names=names)
    path.write_text(json.dumps(info))


def _cells(rows: list[dict], how: str, number: int) -> list:
    """An image column with another kind of image, in some rows or all."""
    import io

    start = sum(LENGTHS[:number])
    if how == "array":
        return [np.asarray(Image.open(io.BytesIO(row["bytes"]))).tolist() for row in rows]
    if how == "text":
        return [row["path"] for row in rows]
    for row in rows[start:]:
        image = Image.open(io.BytesIO(row["bytes"]))
        file = io.BytesIO()
        if how == "deep":
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16).save(file, "PNG")
        else:
            (image.convert("L") if how == "grey" else image.quantize(16, dither=0)).save(file, "PNG")
        row["bytes"] = file.getvalue()
    return rows


def _extra(root: Path, how: str) -> None:
    """Stray files next to the tables."""
    for file in [*(root / "data").rglob("*.parquet"), *(root / "meta").rglob("*.parquet")]:
        if how == "capital":
            file.rename(file.with_suffix(".PARQUET"))
        elif how == "hidden":
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")
        else:
            place = (
                file.with_name(".ipynb_checkpoints") / file.name
                if how == "folder"
                else file.with_stem("copy")
            )
            place.parent.mkdir(exist_ok=True)
            shutil.copy(file, place)


def check(root: Path, store) -> None:
    """Check that every step of a store shows its own picture, in the order of the data files."""
    images = store.images(np.arange(store.num_steps)).numpy()[:, 0]
    steps = store.state[:, 0].round().astype(int).tolist()
    assert [read(image)[0] for image in images] == steps
    files = [file for file in (root / "data").rglob("*") if file.suffix.lower() == ".parquet"]
    table = pq.read_table(
        min(file for file in files if file.name[0] != "."), columns=["episode_index", STATE]
    )
    labels = dict(
        zip((row[0] for row in table[STATE].to_pylist()), table["episode_index"].to_pylist(), strict=True)
    )
    starts = store.episode_starts
    for number, first, last in zip(store.episode_indices.tolist(), starts[:-1], starts[1:], strict=True):
        assert {labels[value] for value in store.state[first:last, 0].tolist()} == {number}
        assert last - first == sum(label == number for label in labels.values())
