"""What a dataset is, whether its store is whole, and which stores the cache holds.

    python -m common.data.store inspect DATASET [--out FOLDER]   numbers, and pictures to look at
    python -m common.data.store verify DATASET [--rebuild]       its store against checksums and source
    python -m common.data.store prune [--all]                    list the cache; free it

DATASET is what a training script takes; the flags that a training script takes for data work here, too.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from common.config import Flat, cli, from_dict
from common.data import DataConfig, default_cache_dir, describe, open_dataset, stores_folder
from common.data.ingest import BadEpisode, Load, StoreInfo, ensure_store
from common.data.shards import decode_jpeg, encode_jpeg
from common.data.store import ARRAYS, META, EpisodeStore, defect
from common.errors import UserError
from common.files import checksum, read_json

EDGE_SHARE = 0.2  # of the steps at the very lowest or highest value: a dimension saturates
FROZEN_FRAMES, FROZEN_EPISODES = 17, 500  # frames that are compared in an episode, and in how many episodes
SHEET_EPISODES, SHEET_MOMENTS = 6, 5


@dataclass(frozen=True)
class Inspect:
    """What a dataset is: episodes, dimensions, cameras, what looks wrong; pictures of all of it."""

    name: Annotated[str, tyro.conf.Positional]
    """Dataset, as for training: a folder, a file, a hub name, or demo."""
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    out: Path | None = None
    """Folder for the pictures. Default: inspection/ and the dataset's name."""


@dataclass(frozen=True)
class Verify:
    """Compare a dataset's store with its checksums, then, frame by frame, with the source."""

    name: Annotated[str, tyro.conf.Positional]
    """Dataset, or the folder of a store."""
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    rebuild: bool = False
    """Decode again what is damaged."""


@dataclass(frozen=True)
class Prune:
    """List the stores in the cache, and delete those that are asked for."""

    cache_dir: Path = field(default_factory=default_cache_dir)
    """The cache of the training scripts."""
    all: bool = False
    """Delete every store; they are made again when they are needed."""
    unfinished: bool = False
    """Delete stores that were never finished, are damaged, or are of an older format."""
    older_than: float | None = None
    """Delete stores that were not opened for so many days."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m common.data.store`."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"inspect": (inspect, Inspect), "verify": (verify, Verify), "prune": (prune, Prune)}
    if not argv or argv[0] not in commands:
        print(__doc__.strip())
        sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
    function, options = commands[argv[0]]
    cli(function, options, argv[1:])


# inspect


def inspect(options: Inspect) -> None:
    """Print what a dataset is, and draw it."""
    store = open_dataset(replace(options.data, dataset=(options.name,)))
    summary = summarize(store)
    print("\n".join(describe_summary(summary)))
    out = options.out or Path("inspection") / Path(store.source).name
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_sheet(store, out / "frames.png")
    draw_histograms(store, out / "dimensions.png")
    print(f"pictures: {out / 'frames.png'}, {out / 'dimensions.png'}")


def summarize(store: EpisodeStore) -> dict[str, Any]:
    """What a store holds and what looks wrong in it, as JSON can hold it."""
    lengths = np.diff(store.episode_starts)
    quartiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    numbers = {int(n): e for e, n in enumerate(store.episode_indices)}
    dimensions = {
        part: [_dimension(name, values[:, d]) for d, name in enumerate(names)]
        for part, names, values in (
            ("state", store.state_names, store.state),
            ("action", store.action_names, store.action),
        )
    }
    return {
        "source": store.source,
        "store": str(store.path),
        "storage": store.storage,
        "gigabytes": sum(file.stat().st_size for file in store.shard_files) / 1e9,
        "fps": store.fps,
        "task": store.task,
        "episodes": store.num_episodes,
        "steps": store.num_steps,
        "minutes": store.num_steps / store.fps / 60,
        "lengths": dict(zip(("min", "q25", "median", "q75", "max"), quartiles.tolist(), strict=True)),
        "shortest": _extremes(numbers, lengths, 5),
        "cameras": dict(zip(store.cameras, store.camera_keys, strict=True)),
        "image_size": list(store.image_size),
        "skipped": list(store.skipped),
        "dimensions": dimensions,
        "frozen_cameras": frozen_cameras(store),
        "time_gaps": time_gaps(store),
    }


def _extremes(numbers: dict[int, int], lengths: np.ndarray, count: int) -> dict[str, int]:
    shortest = sorted(numbers, key=lambda n: lengths[numbers[n]])[:count]
    return {str(n): int(lengths[numbers[n]]) for n in shortest}


def _dimension(name: str, values: np.ndarray) -> dict[str, Any]:
    """Range of a dimension, and whether it is constant or rests at an end of its range."""
    low, high = float(values.min()), float(values.max())
    quantiles = np.quantile(values.astype(np.float64), [0.01, 0.99])
    constant = high - low <= 1e-6 * max(abs(low), abs(high), 1e-6)
    margin = 1e-4 * (high - low)
    edges = {"low": (values <= low + margin).mean(), "high": (values >= high - margin).mean()}
    found = {"name": name, "min": low, "max": high, "mean": float(values.astype(np.float64).mean())}
    found |= {"std": float(values.astype(np.float64).std()), "q01": quantiles[0], "q99": quantiles[1]}
    saturated = [] if constant else [edge for edge, share in edges.items() if share >= EDGE_SHARE]
    return {**found, "constant": bool(constant), "saturated": saturated}


def frozen_cameras(store: EpisodeStore) -> dict[str, list[int]]:
    """Cameras whose picture does not change in an episode although the robot moves, and these episodes."""
    frozen: dict[str, list[int]] = {camera: [] for camera in store.cameras}
    count = min(store.num_episodes, FROZEN_EPISODES)
    for episode in np.linspace(0, store.num_episodes - 1, count).astype(int):
        first, last = store.episode_starts[episode], store.episode_starts[episode + 1] - 1
        rows = np.unique(np.linspace(first, last, FROZEN_FRAMES).astype(int))
        if (store.state[rows] == store.state[first]).all() or len(rows) < 3:
            continue
        images = store.images(rows)
        still = (images == images[:1]).flatten(2).all(dim=2).all(dim=0)
        for camera, is_still in zip(store.cameras, still.tolist(), strict=True):
            if is_still:
                frozen[camera].append(int(store.episode_indices[episode]))
    return {camera: episodes for camera, episodes in frozen.items() if episodes}


def time_gaps(store: EpisodeStore) -> list[dict[str, float]]:
    """Steps that lie more than one and a half control steps apart."""
    steps = np.diff(store.timestamps)
    steps[store.episode_starts[1:-1] - 1] = 0  # from one episode to the next
    found = np.flatnonzero(steps > 1.5 / store.fps)
    episodes = store.episode_of(found)
    return [
        {
            "episode": int(store.episode_indices[episode]),
            "step": int(row - store.episode_starts[episode]),
            "seconds": float(steps[row]),
        }
        for row, episode in zip(found.tolist(), episodes.tolist(), strict=True)
    ]


def describe_summary(summary: dict[str, Any]) -> list[str]:
    """The summary in lines for people."""
    lengths = summary["lengths"]
    lines = [
        f"{summary['source']}: {summary['episodes']} episodes, {summary['steps']} steps, "
        f"{summary['minutes']:.1f} minutes at {summary['fps']:g} Hz",
        f"  task            {summary['task'] or 'none stated'}",
        f"  lengths         {lengths['min']:.0f} to {lengths['max']:.0f} steps, "
        f"half of them {lengths['q25']:.0f} to {lengths['q75']:.0f}, median {lengths['median']:.0f}",
        f"  cameras         {', '.join(summary['cameras'])} at {'x'.join(map(str, summary['image_size']))}",
        f"  store           {summary['store']} ({summary['storage']}, {summary['gigabytes']:.2f} GB)",
    ]
    for part, dimensions in summary["dimensions"].items():
        width = max(len(d["name"]) for d in dimensions)
        lines.append(
            f"  {part:<6} {'':<{width}} {'min':>10} {'q01':>10} {'mean':>10} {'q99':>10} {'max':>10}"
        )
        for d in dimensions:
            numbers = " ".join(f"{d[key]:>10.4g}" for key in ("min", "q01", "mean", "q99", "max"))
            notes = ["constant"] * d["constant"] + [f"rests at its {edge}" for edge in d["saturated"]]
            lines.append(f"         {d['name']:<{width}} {numbers}  {', '.join(notes)}".rstrip())
    problems = [f"left out: {reason}" for reason in summary["skipped"]]
    for camera, episodes in summary["frozen_cameras"].items():
        problems.append(f"camera {camera} does not change in episodes {_some(episodes)}")
    for gap in summary["time_gaps"][:10]:
        problems.append(f"episode {gap['episode']}: {gap['seconds']:.3g} s after step {gap['step']}")
    if len(summary["time_gaps"]) > 10:
        problems.append(f"{len(summary['time_gaps']) - 10} more gaps in time, see summary.json")
    return lines + [f"  look at: {problem}" for problem in problems]


def _some(numbers: list[int], count: int = 12) -> str:
    more = f" and {len(numbers) - count} more" if len(numbers) > count else ""
    return ", ".join(map(str, numbers[:count])) + more


def draw_sheet(store: EpisodeStore, path: Path) -> None:
    """Frames of some episodes: a row an episode and camera, from its beginning to its end."""
    plt = _pyplot()
    episodes = np.unique(np.linspace(0, store.num_episodes - 1, SHEET_EPISODES).astype(int))
    rows = len(episodes) * len(store.cameras)
    aspect = store.image_size[0] / store.image_size[1]
    figure, axes = plt.subplots(
        rows, SHEET_MOMENTS, figsize=(2 * SHEET_MOMENTS, 2 * aspect * rows + 0.5), squeeze=False
    )
    for place, episode in enumerate(episodes):
        first, last = store.episode_starts[episode], store.episode_starts[episode + 1] - 1
        moments = np.linspace(first, last, SHEET_MOMENTS).astype(int)
        images = store.images(moments).permute(0, 1, 3, 4, 2).numpy()
        for camera, name in enumerate(store.cameras):
            for moment, axis in enumerate(axes[place * len(store.cameras) + camera]):
                axis.imshow(images[moment, camera])
                axis.set(xticks=[], yticks=[])
                seconds = store.timestamps[moments[moment]]
                axis.set_title(f"{seconds:.1f} s", fontsize=6, pad=2)
                if moment == 0:
                    axis.set_ylabel(f"{store.episode_indices[episode]} {name}", fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_histograms(store: EpisodeStore, path: Path) -> None:
    """Distribution of every dimension of state and action, and of the episodes' lengths."""
    plt = _pyplot()
    panels = [("episode length (steps)", np.diff(store.episode_starts), "0.4")]
    for color, what, names, values in (
        ("tab:blue", "state", store.state_names, store.state),
        ("tab:orange", "action", store.action_names, store.action),
    ):
        panels += [(f"{what}: {name}", values[:, d], color) for d, name in enumerate(names)]
    columns = min(7, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 1.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, values, color) in zip(axes.flat, panels, strict=False):
        axis.hist(values, bins=50, color=color)
        axis.set_title(title, fontsize=7)
        axis.tick_params(labelsize=6)
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


# verify


def verify(options: Verify) -> None:
    """Check a store; exits with 1 if it is damaged and not rebuilt.

    Raises:
        UserError: names the first damaged file, or the first frame that differs from the source.
    """
    config, info, load = _described(options)
    path = info.folder(stores_folder(config))
    if not path.is_dir():
        raise UserError(f"{options.name} has no store yet: it is made when the dataset is first used.")
    damaged = damaged_files(path)
    if damaged:
        if not options.rebuild:
            raise UserError(
                f"{path} is damaged: {', '.join(f'{name} {fault}' for name, fault in damaged.items())}; "
                f"give --rebuild to decode that part again."
            )
        for name in damaged:
            (path / name).unlink(missing_ok=True)
            (path / name).with_suffix(".json").unlink(missing_ok=True)
        (path / META).unlink(missing_ok=True)
        print(f"rebuilding {', '.join(damaged)}")
    store = ensure_store(stores_folder(config), info, load, config.skip_bad_episodes, config.ingest_workers)
    try:
        steps = compare_with_source(store, info, load)
    except BadEpisode as error:
        raise UserError(f"{error}: the store was made when it could be; restore the dataset.") from None
    print(
        f"{store.path} is whole: {len(store.shard_files)} files of frames have their checksum, and {steps} "
        f"steps of {store.num_episodes} episodes equal {store.source}"
    )


def _described(options: Verify) -> tuple[DataConfig, StoreInfo, Load]:
    """The data options of a store, named itself or by its dataset, and what it is made from."""
    path, config = Path(options.name).expanduser(), replace(options.data, dataset=(options.name,))
    if not (path / META).is_file():
        return config, *describe(config.dataset[0], config)
    try:
        meta = read_json(path / META)
        cache = {"cache_dir": str(path.resolve().parent.parent), "store": meta["storage"]}
        config, made_from = from_dict(DataConfig, {**meta["options"], **cache}), meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path / META} is damaged: name the dataset instead of the store, or delete the store."
        ) from None
    info, load = describe(config.dataset[0], config)
    if info.fingerprint != made_from:
        raise UserError(
            f"{info.source} has changed since {path} was made from it: training makes another store; delete "
            f"this one, or restore the dataset."
        )
    return config, info, load


def damaged_files(path: Path) -> dict[str, str]:
    """Files of a store that are not what was written, and why."""
    from tqdm import tqdm

    try:
        meta = read_json(path / META)
        entries = [*meta["shards"], meta["arrays"]]
        for note in sorted(path.glob("features-*/frames-*.json")):
            name = f"{note.parent.name}/{note.stem}.bin"
            entries.append({**read_json(note), "file": name})
    except (OSError, ValueError, KeyError, TypeError):
        return {META: defect(path) or "is damaged"}
    damaged = {}
    total = sum(entry["bytes"] for entry in entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checksums") as bar:
        for entry in entries:
            file = path / entry["file"]
            if not file.is_file():
                damaged[entry["file"]] = "is missing"
            elif file.stat().st_size != entry["bytes"]:
                damaged[entry["file"]] = f"has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif checksum(file) != entry["crc32"]:
                damaged[entry["file"]] = "has another checksum than was written"
            bar.update(entry["bytes"])
    return damaged


def compare_with_source(store: EpisodeStore, info: StoreInfo, load: Load) -> int:
    """Decode the source again and compare everything; returns the number of steps."""
    from tqdm import tqdm

    episodes, _, reader = load(info.episodes)
    if len(episodes) < store.num_episodes:
        raise UserError(f"{store.source} has lost episodes that {store.path} has: restore the dataset.")
    place = {int(index): e for e, index in enumerate(store.episode_indices)}
    episodes = [episode for episode in episodes if episode.index in place]
    with tqdm(total=sum(map(len, episodes)), unit="step", desc="compare") as bar:
        for episode in episodes:
            e = place[episode.index]
            first, last = store.episode_starts[e], store.episode_starts[e + 1]
            for what, stored, source in (
                ("state", store.state, episode.state),
                ("action", store.action, episode.action),
            ):
                if not np.array_equal(stored[first:last], source):
                    raise UserError(_differs(store, episode.index, what))
            views = [iter(reader.frames(episode.index, c)) for c in range(len(store.cameras))]
            for row in range(first, last):
                stored = store.images(np.array([row]))[0].numpy()
                for camera, view in enumerate(views):
                    frame = next(view, None)
                    if frame is not None and store.storage == "jpeg":
                        encoded, frame = encode_jpeg(frame), np.empty_like(frame)
                        decode_jpeg(np.frombuffer(encoded, np.uint8), frame, store.path)
                    if not np.array_equal(stored[camera], frame):
                        where = f"camera {store.cameras[camera]} at step {row - first}"
                        raise UserError(_differs(store, episode.index, where))
                bar.update()
    return store.num_steps


def _differs(store: EpisodeStore, episode: int, what: str) -> str:
    return (
        f"{store.path} differs from {store.source} in episode {episode}, {what}: delete that folder to have "
        f"it made again."
    )


# prune


def prune(options: Prune) -> None:
    """List the stores; delete what is asked for."""
    root = options.cache_dir.expanduser() / "stores"
    stores = sorted(path for path in root.glob("*") if path.is_dir() and path.name != "scans")
    total = freed = 0
    for path in stores:
        size, fault = folder_size(path), defect(path)
        meta = {} if fault else read_json(path / META)
        days = (time.time() - last_used(path)) / 86400
        doomed = options.all or (options.unfinished and fault is not None)
        doomed = doomed or (options.older_than is not None and days > options.older_than)
        state = fault or f"{meta['storage']}, {len(meta['cameras'])} cameras, from {meta['source']}"
        print(
            f"{'delete' if doomed else 'keep':<7} {size / 1e9:8.2f} GB {days:6.1f} days  {path.name}: {state}"
        )
        if doomed:
            delete(root, path)
            freed += size
        total += size
    print(f"{len(stores)} stores, {total / 1e9:.2f} GB in {root}; freed {freed / 1e9:.2f} GB")
    if stores and not (options.all or options.unfinished or options.older_than is not None):
        print("delete with --all, --unfinished, or --older-than DAYS")


def folder_size(path: Path) -> int:
    """Bytes on the disk, files that other stores share counted once here, too."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def last_used(path: Path) -> float:
    """When a store was last opened, or else changed, in seconds since 1970."""
    file = path / ARRAYS if (path / ARRAYS).exists() else path
    status = file.stat()
    return max(status.st_atime, status.st_mtime)


def delete(root: Path, path: Path) -> None:
    """Remove a store, unless somebody is building it."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(root / f".{path.name.rpartition('-')[2]}.lock", timeout=0):
            (path / META).unlink(missing_ok=True)  # first: what is half deleted never looks finished
            shutil.rmtree(path)
    except Timeout:
        raise UserError(f"{path} is being built by another process: wait for it, then prune again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be deleted ({error.strerror}).") from None
