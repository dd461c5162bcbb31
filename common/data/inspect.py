"""Look at a dataset, check its store, and list or delete the stores in the cache.

    python -m common.data.store inspect DATASET [--out FOLDER]   numbers, and pictures to look at
    python -m common.data.store verify DATASET [--rebuild]       check its store against checksums and source
    python -m common.data.store prune [--all]                    list the cache; free space in it

DATASET and its flags are those of the training scripts.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from pydantic import NonNegativeFloat

from common.config import AbsolutePath, Flat, UserPath, cli, options
from common.data import DataConfig, default_cache_dir, open_dataset, request_store, stores_folder
from common.data.features import damaged_rows, forget
from common.data.ingest import StoreRequest, another_frame, ensure_store, lock_file
from common.data.motion import episode_of_steps, idle_dimensions, oddities
from common.data.source import BadEpisode
from common.data.store import ARRAYS, META, EpisodeStore, defect
from common.data.tasks import summary
from common.errors import UserError
from common.files import checksum, read_json

EDGE_SHARE = 0.2  # of the steps exactly at the lowest or highest value: the dimension saturates
FROZEN_FRAMES, FROZEN_EPISODES = 17, 500  # frames compared per episode, and most episodes


@options
class Inspect:
    """Describe a dataset: episodes, dimensions, cameras, anything unusual, with pictures."""

    name: Annotated[str, tyro.conf.Positional]
    """Dataset, as for training: a folder, a file, a hub name, or demo."""
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    out: UserPath | None = None
    """Folder for the pictures. Default: inspection/ and the dataset's name."""


@options
class Verify:
    """Compare a dataset's store with its checksums, and frame by frame with the source."""

    name: Annotated[str, tyro.conf.Positional]
    """Dataset, as for training."""
    data: Flat[DataConfig] = field(default_factory=DataConfig)
    rebuild: bool = False
    """Decode damaged parts again."""


@options
class Prune:
    """List the stores in the cache, and delete those chosen by flags."""

    cache_dir: AbsolutePath = field(default_factory=default_cache_dir)
    """The cache of the training scripts."""
    all: bool = False
    """Delete every store; they are rebuilt when needed."""
    unfinished: bool = False
    """Delete stores that are unfinished, damaged, or in an older format."""
    older_than: NonNegativeFloat | None = None
    """Delete stores that nobody opened for this many days."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `python -m common.data.store`."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"inspect": (inspect, Inspect), "verify": (verify, Verify), "prune": (prune, Prune)}
    if not argv or argv[0] not in commands:
        print(__doc__.strip())
        sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
    cli(*commands[argv[0]], argv[1:], f"python -m common.data.store {argv[0]}")


def inspect(config: Inspect) -> None:
    """Print a dataset's description, and draw it."""
    from common import plots

    store = open_dataset(replace(config.data, dataset=(config.name,)))
    print("\n".join(describe(store)))
    out = config.out or Path("inspection") / Path(store.source).name
    out.mkdir(parents=True, exist_ok=True)
    plots.draw_sheet(store, out / "frames.png")
    plots.draw_histograms(store, out / "dimensions.png")
    print(f"pictures: {out / 'frames.png'}, {out / 'dimensions.png'}")


def describe(store: EpisodeStore) -> list[str]:
    """What a store holds, and anything unusual in it, in lines for people."""
    lengths = np.diff(store.episode_starts)
    low, q25, median, q75, high = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    shortest = [f"{store.episode_indices[e]} ({lengths[e]})" for e in np.argsort(lengths, kind="stable")[:5]]
    gigabytes = sum(file.stat().st_size for file in store.frame_files) / 1e9
    problems = [f"left out: {reason}" for reason in store.skipped]
    for camera, episodes in frozen_cameras(store).items():
        problems.append(f"camera {camera} does not change in episodes {_some(episodes)}")
    problems += time_gaps(store) + oddities(store)
    return [
        f"{store.source}: {store.num_episodes} episodes, {store.num_steps} steps, "
        f"{store.num_steps / store.fps / 60:.1f} minutes at {store.fps:g} Hz",
        *summary(store),
        f"  lengths         {low:.0f} to {high:.0f} steps, half of them {q25:.0f} to {q75:.0f}, "
        f"median {median:.0f}",
        f"  shortest        episodes {', '.join(shortest)}",
        f"  cameras         {', '.join(store.cameras)} at {'x'.join(map(str, store.image_size))}",
        f"  store           {store.path} ({store.storage}, {gigabytes:.2f} GB)",
        *dimension_table("state", store.state_names, store.state, episode_of_steps(store)),
        *dimension_table("action", store.action_names, store.action, episode_of_steps(store)),
        *(f"  look at: {problem}" for problem in problems),
    ]


def dimension_table(part: str, names: Sequence[str], values: np.ndarray, episodes: np.ndarray) -> list[str]:
    """Range of each dimension of `values`, (S, D), and whether it is constant, idle, or rests at an end."""
    idle = idle_dimensions(values, episodes)
    values, width = values.astype(np.float64), max(map(len, names))
    low, q01, q99, high = np.quantile(values, [0, 0.01, 0.99, 1], axis=0)
    columns = {"min": low, "q01": q01, "mean": values.mean(0), "q99": q99, "max": high}
    constant = high - low <= 1e-6 * np.maximum(np.maximum(abs(low), abs(high)), 1e-6)
    margin = 1e-4 * (high - low)
    rests = {"low": (values <= low + margin).mean(0), "high": (values >= high - margin).mean(0)}
    lines = [f"  {part:<6} {'':<{width}} {' '.join(f'{column:>10}' for column in columns)}"]
    for i, name in enumerate(names):
        numbers = " ".join(f"{column[i]:>10.4g}" for column in columns.values())
        notes = [f"rests at its {edge}" for edge, share in rests.items() if share[i] >= EDGE_SHARE]
        notes = ["constant"] if constant[i] else ["only noise"] if idle[i] else notes
        lines.append(f"         {name:<{width}} {numbers}  {', '.join(notes)}".rstrip())
    return lines


def frozen_cameras(store: EpisodeStore) -> dict[str, list[int]]:
    """Cameras whose picture freezes in an episode while the robot moves, and these episodes."""
    frozen: dict[str, list[int]] = {}
    count = min(store.num_episodes, FROZEN_EPISODES)
    for episode in np.linspace(0, store.num_episodes - 1, count).astype(int):
        first, last = store.episode_starts[episode], store.episode_starts[episode + 1] - 1
        rows = np.unique(np.linspace(first, last, FROZEN_FRAMES).astype(int))
        if (store.state[rows] == store.state[first]).all() or len(rows) < 3:
            continue
        images = store.images(rows).flatten(2)
        for camera in (images == images[:1]).all(2).all(0).nonzero().flatten().tolist():
            frozen.setdefault(store.cameras[camera], []).append(int(store.episode_indices[episode]))
    return frozen


def time_gaps(store: EpisodeStore, most: int = 10) -> list[str]:
    """Steps more than one and a half control steps apart, in lines for people."""
    seconds = np.diff(store.timestamps)
    seconds[store.episode_starts[1:-1] - 1] = 0  # from one episode to the next
    rows = np.flatnonzero(seconds > 1.5 / store.fps)
    episodes = store.episode_of(rows)
    gaps = [
        f"episode {store.episode_indices[e]}: {seconds[row]:.3g} s after step {row - store.episode_starts[e]}"
        for row, e in zip(rows[:most], episodes[:most], strict=True)
    ]
    return gaps + [f"{len(rows) - most} more gaps in time"] * (len(rows) > most)


def _some(numbers: list[int], count: int = 12) -> str:
    more = f" and {len(numbers) - count} more" if len(numbers) > count else ""
    return ", ".join(map(str, numbers[:count])) + more


def verify(config: Verify) -> None:
    """Check a store; a UserError names damaged files, or the first frame that differs from the source."""
    data = replace(config.data, dataset=(config.name,))
    root = stores_folder(data)
    request = request_store(config.name, data).found_below(root)
    if request is None:
        raise UserError(f"{config.name} has no store yet: the first use of the dataset makes it.")
    path = request.folder(root)
    damaged = "; ".join(damages(path))
    if damaged and not config.rebuild:
        raise UserError(f"{path} is damaged: {damaged}; give --rebuild to decode that part again.")
    if damaged:
        print(f"rebuilding: {damaged}")
        for folder in path.glob("features-*"):
            forget(folder, damaged_rows(folder))
        (path / ARRAYS).unlink(missing_ok=True)  # then ingest decodes whatever has a different checksum
    store = ensure_store(root, request)
    try:
        steps = compare_with_source(store, request)
    except BadEpisode as error:
        raise UserError(f"{error}: the store was made when it could be; restore the dataset.") from None
    print(
        f"{store.path} is whole: its frames have their checksums, and {steps} steps of {store.num_episodes} "
        f"episodes equal {store.source}"
    )


def damages(path: Path) -> list[str]:
    """Parts of a store that differ from what was written, as clauses."""
    from tqdm import tqdm

    if problem := defect(path):
        return [problem]
    if checksum(path / ARRAYS) != read_json(path / META)["arrays_crc32"]:
        return [f"{ARRAYS} differs from its checksum"]
    store, found = EpisodeStore.open(path), []
    rows, lengths = store.episode_rows.tolist(), np.diff(store.episode_starts).tolist()
    for e in tqdm(range(store.num_episodes), unit="episode", desc="checksums"):
        if store.frames[0].checksum(rows[e], lengths[e]) != store.episode_checksums[e]:
            found.append(f"episode {store.episode_indices[e]} differs from its checksum")
    for folder in sorted(path.glob("features-*")):
        if count := len(damaged_rows(folder)):
            found.append(f"{count} rows of {folder.name} differ from their checksums")
    return found


def compare_with_source(store: EpisodeStore, request: StoreRequest) -> int:
    """Decode the source again and compare everything; returns the number of steps."""
    from tqdm import tqdm

    def refuse(index: int, what: str) -> None:
        raise UserError(
            f"{store.path} differs from {store.source} in episode {index}, {what}: delete that folder to "
            f"rebuild it."
        )

    found = {episode.index: episode for episode in request.source.episodes(request.episodes)[0]}
    for e, index in enumerate(tqdm(store.episode_indices.tolist(), unit="episode", desc="compare")):
        episode, (first, last) = found.get(index), store.episode_starts[e : e + 2]
        if episode is None:
            refuse(index, "which is no longer there")
        for what in ("state", "action"):
            if not np.array_equal(getattr(store, what)[first:last], getattr(episode, what)):
                refuse(index, what)
        stored = (store.images(np.array([row]))[0].numpy() for row in range(first, last))
        if where := another_frame(stored, episode, request):
            refuse(index, where)
    return store.num_steps


def prune(config: Prune) -> None:
    """List the stores; delete the chosen ones."""
    root = config.cache_dir / "stores"
    stores = sorted(path for path in root.glob("*") if path.is_dir())
    asked = config.all or config.unfinished or config.older_than is not None
    total = freed = 0
    for path in stores:
        size, fault = sum(file.stat().st_blocks * 512 for file in path.rglob("*")), defect(path)
        status = (path / ARRAYS if (path / ARRAYS).exists() else path).stat()
        opened = (path / META).stat().st_mtime if fault is None else 0
        days = (time.time() - max(status.st_atime, status.st_mtime, opened)) / 86400
        old = config.older_than is not None and days > config.older_than
        doomed = config.all or old or (config.unfinished and fault is not None)
        if not (state := fault):
            meta = read_json(path / META)
            state = f"{meta['storage']}, {len(meta['cameras'])} cameras, from {meta['source']}"
        verb = "delete" if doomed else "keep"
        print(f"{verb:<7} {size / 1e9:8.2f} GB {days:6.1f} days  {path.name}: {state}")
        if doomed:
            delete(path)
            freed += size
        total += size
    print(f"{len(stores)} stores, {total / 1e9:.2f} GB in {root}; freed {freed / 1e9:.2f} GB")
    if stores and not asked:
        print("delete with --all, --unfinished, or --older-than DAYS")


def delete(path: Path) -> None:
    """Remove a store, unless somebody is building it."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock_file(path), timeout=0):
            (path / META).unlink(missing_ok=True)  # first, so that a half-deleted store never looks finished
            shutil.rmtree(path)
    except Timeout:
        raise UserError(f"{path} is being built by another process: wait for it, then prune again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be deleted ({error.strerror}).") from None


if __name__ == "__main__":
    cli(inspect, Inspect)
