"""Writing an episode store: episodes decoded in parallel, exactly once, whatever interrupts it.

A shard is filled under a temporary name, flushed to the disk and renamed; a small JSON file beside it then
says which episodes it holds. An interrupted ingest leaves its finished shards, and the next one decodes only
what is missing. A dataset that grew starts from hard links to the shards of its earlier store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.data.shards import (
    SHARDS,
    Storage,
    decode_jpeg,
    encode_jpeg,
    join_jpeg,
    write_jpeg,
)
from common.data.store import ARRAYS, FORMAT, META, EpisodeStore, defect
from common.data.workers import Died, advance, cores, guarded_map, refuse_inside_worker
from common.errors import UserError
from common.files import checksum, write_whole

SHARD_BYTES = 2**30
FRAMES_PER_WORKER = 2500  # a worker takes some seconds to start: fewer frames are not worth one more
SECONDS_PER_FRAME = 0.5  # slower than any disk: reading that takes longer hangs
JPEG_RATIO = 5  # raw bytes per JPEG byte, at least: for the free space to ask for


class BadEpisode(Exception):
    """One episode cannot be used; the message, a clause, names it and says why."""


@dataclass(frozen=True)
class Episode:
    """What an episode has besides frames.

    Attributes:
        index: its number in the source.
        state, action: (L, P) and (L, A) float32.
        timestamps: (L,) float64, seconds since its first step.
        origin: where its frames lie in the source.
    """

    index: int
    state: np.ndarray
    action: np.ndarray
    timestamps: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.state)

    def digest(self) -> str:
        """Hash of everything here: an episode with the same digest need not be decoded again."""
        sha = hashlib.sha256(self.origin.encode())
        for array in (self.state, self.action, self.timestamps):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def refuse_nonfinite(name: str, vectors: dict[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Raise BadEpisode for a NaN or infinity.

    Args:
        name: the episode.
        vectors: values (L, D) and their dimensions' names, by what they are.
    """
    for what, (values, names) in vectors.items():
        broken = np.argwhere(~np.isfinite(values))
        if len(broken):
            step, dim = broken[0]
            value = values[step, dim]
            raise BadEpisode(f"{name} has {value} in {what}, dimension {names[dim]}, at step {step}")


class FrameReader(Protocol):
    """The frames of a source; pickled to the worker processes.

    Attributes:
        isolated: read in other processes always, because damaged files can crash or hang the library.
    """

    isolated: bool

    def frames(self, episode: int, camera: int) -> Iterator[np.ndarray]:
        """All frames of one camera in order, each (3, H, W) uint8, RGB. Raises BadEpisode."""

    def only(self, episode: int) -> FrameReader:
        """A reader of this episode alone, small enough to be sent to a process."""


@dataclass(frozen=True)
class StoreInfo:
    """What a store says about itself; with the fingerprint, everything that its content follows from."""

    source: str
    fingerprint: str
    cameras: tuple[str, ...]
    camera_keys: tuple[str, ...]
    image_size: tuple[int, int]
    fps: float
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    task: str | None
    color_order: str = "rgb"
    storage: Storage = "raw"
    episodes: tuple[int, ...] | None = None
    """Only these episodes were asked for when the store was made; None: all."""
    options: dict[str, Any] | None = None
    """The data options that lead to this store, for `python -m common.data.store verify`."""

    @property
    def frame_bytes(self) -> int:
        return 3 * self.image_size[0] * self.image_size[1]

    @property
    def row_bytes(self) -> int:
        return len(self.cameras) * self.frame_bytes

    def choices(self) -> dict[str, Any]:
        """What was chosen, apart from the data themselves."""
        names = ("camera_keys", "image_size", "fps", "state_keys", "action_keys", "task", "color_order")
        return {name: _plain(getattr(self, name)) for name in (*names, "storage", "episodes")}

    def folder(self, root: Path) -> Path:
        """The store's folder: named after the source for people, found by the content's hash alone."""
        content = [FORMAT, self.fingerprint, self.choices()]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
        present = [path for path in root.glob(f"*-{key}") if path.is_dir()]
        name = "".join(c if c.isalnum() or c in "_." else "-" for c in Path(self.source).name)[:60]
        return min(present, default=root / f"{name}-{key}")


Loaded = tuple[list[Episode], list[str], FrameReader]
Load = Callable[[Sequence[int] | None], Loaded]
Entry = dict[str, Any]  # what the JSON file beside a shard says


def ensure_store(
    root: Path, info: StoreInfo, load: Load, skip_bad: bool = False, workers: int | None = None
) -> EpisodeStore:
    """The store for `info` below `root`, built if it is not there; several processes at once build it once.

    A store of all episodes serves when some of them are asked for, too.

    Args:
        root: folder of all stores.
        load: gives the usable ones of these episodes (None: of all), a clause about each that is not, and
            the reader of the frames.
        skip_bad: leave unusable episodes out instead of stopping.
        workers: processes that decode; None uses every core.

    Raises:
        UserError: if an episode is unusable, or the disk too small.
    """
    path, whole = info.folder(root), replace(info, episodes=None).folder(root)
    if info.episodes is not None and defect(whole) is None:
        return _select(EpisodeStore.open(whole), info.episodes, skip_bad)
    if defect(path) is not None:
        refuse_inside_worker()
        with _lock(root, path):
            if defect(path) is not None:  # nobody else has built it meanwhile
                _build(path, info, *load(info.episodes), skip_bad, workers)
    store = EpisodeStore.open(path)
    if store.skipped and not skip_bad:
        raise _refusal(store.skipped)
    if info.episodes is not None:
        store = store.select(info.episodes)
    if store.skipped:
        report(f"left out {len(store.skipped)} of {store.num_episodes + len(store.skipped)} episodes:")
        for reason in store.skipped:
            report(f"  {reason}")
    return store


def _select(store: EpisodeStore, episodes: Sequence[int], skip_bad: bool) -> EpisodeStore:
    missing = sorted(set(episodes) - set(store.episode_indices.tolist()))
    if missing and not (skip_bad and store.skipped):
        raise _refusal(store.skipped) if store.skipped else absent_episodes(store.source, missing)
    if missing:
        report(f"left out: episodes {', '.join(map(str, missing))}, which cannot be used")
    return store.select(episodes)


def absent_episodes(source: str, missing: Sequence[int]) -> UserError:
    """The refusal of episodes that a dataset does not have."""
    names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
    return UserError(
        f"{source} has no episode {names}: `python -m common.data.store inspect` lists what there is."
    )


def choose_storage(root: Path, info: StoreInfo, load: Load) -> Storage:
    """`--store auto`: what is there already, else raw pixels if they take at most half of the free disk.

    The choice is made once, by the first of several processes, and leaves a folder that shows it.
    """
    choices: tuple[Storage, ...] = ("raw", "jpeg")
    with _lock(root, info.folder(root).with_name("choice-" + info.fingerprint[:20])):
        for storage in choices:
            if replace(info, storage=storage).folder(root).is_dir():
                return storage
        needed = sum(map(len, load(info.episodes)[0])) * info.row_bytes
        free = shutil.disk_usage(root).free
        storage = choices[needed > free / 2]
        sizes = f"raw frames need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        report(f"store: {storage} ({sizes}; JPEG above half of that, or by --store jpeg)")
        replace(info, storage=storage).folder(root).mkdir(parents=True, exist_ok=True)
        return storage


@contextmanager
def _lock(root: Path, path: Path) -> Iterator[None]:
    """Keep other processes from building the same store."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / f".{path.name.rpartition('-')[2]}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which is building the episode store {path}", flush=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror}): choose another --cache-dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def report(line: str) -> None:
    """Print on the main process of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _refusal(reasons: Sequence[str]) -> UserError:
    more = f" ({len(reasons) - 1} more episodes are unusable, too)" if len(reasons) > 1 else ""
    return UserError(f"{reasons[0]}{more}: repair it, or leave it out with --skip-bad-episodes.")


class _Shard(NamedTuple):
    """A frames file that is being filled: its number, and (episode, first row) for each episode."""

    number: int
    episodes: list[tuple[Episode, int]]
    rows: int


def _build(
    path: Path,
    info: StoreInfo,
    episodes: list[Episode],
    bad: list[str],
    reader: FrameReader,
    skip_bad: bool,
    workers: int | None,
) -> None:
    """Decode what is missing, then write the arrays and last `meta.json`."""
    if bad and not skip_bad:
        raise _refusal(bad)
    digests = {episode.index: episode.digest() for episode in episodes}
    kept = _finished_shards(path, info, digests) or _earlier_shards(path, info, digests, reader)
    have = {record["index"] for entry, _ in kept for record in entry["episodes"]}
    missing = [episode for episode in episodes if episode.index not in have]
    first_free = 1 + max((int(entry["file"][7:12]) for entry, _ in kept), default=-1)
    shards = _plan(missing, info.row_bytes, first_free)
    ratio = JPEG_RATIO if info.storage == "jpeg" else 1
    pixels = sum(shard.rows for shard in shards) * info.row_bytes // ratio
    _check_disk(path, pixels + sum(map(_array_bytes, episodes)), info.storage)
    path.mkdir(parents=True, exist_ok=True)
    try:
        _keep_only(path, [entry for entry, folder in kept if folder == path])
        for entry, folder in kept:
            if folder != path:
                _link(folder / entry["file"], path / entry["file"])
                write_whole(path / entry["file"].replace(".bin", ".json"), json.dumps(entry).encode())
        new = _decode(path, info, shards, digests, reader, skip_bad, workers, bad)
        _finish(path, info, episodes, [entry for entry, _ in kept] + new, bad)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"The disk of {path.parent} is full: free some, or move --cache-dir.") from error
    except BrokenProcessPool as error:
        raise UserError(
            "The processes that decode frames die at once, most often for want of memory: "
            "start again with fewer --ingest-workers, what is finished is kept."
        ) from error
    finally:
        for leftover in path.glob("*.part"):
            leftover.unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()


def _keep_only(path: Path, entries: list[Entry]) -> None:
    """Remove everything but these shards from an unfinished store."""
    names = {name for entry in entries for name in (entry["file"], entry["file"].replace(".bin", ".json"))}
    for file in path.iterdir():
        if file.is_file() and file.name not in names:
            file.unlink()


def _finished_shards(path: Path, info: StoreInfo, digests: dict[int, str]) -> list[tuple[Entry, Path]]:
    """The whole shards in a folder whose episodes are all wanted, with that folder."""
    found = []
    for file in sorted(path.glob("frames-*.json")):
        try:
            entry = json.loads(file.read_bytes())
            rows = sum(record["length"] for record in entry["episodes"])
            whole = (path / entry["file"]).stat().st_size == entry["bytes"] > 0
            whole &= info.storage == "jpeg" or entry["bytes"] >= rows * info.row_bytes
            known = all(digests.get(record["index"]) == record["digest"] for record in entry["episodes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if whole and known:
            found.append((entry, path))
    return found


def _earlier_shards(
    path: Path, info: StoreInfo, digests: dict[int, str], reader: FrameReader
) -> list[tuple[Entry, Path]]:
    """Shards of an earlier, smaller store of this source, with their folder.

    Equal numbers do not prove equal frames, so the first frame of every episode is decoded and compared.
    """
    found: list[tuple[Entry, Path]] = []
    for folder in path.parent.glob("*/"):
        try:
            meta = json.loads((folder / META).read_bytes())
            alike = {**meta["choices"], "episodes": None} == {**info.choices(), "episodes": None}
            related = meta["source"] == info.source and alike
            count = sum(len(entry["episodes"]) for entry in meta["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if related and count < len(digests) and defect(folder) is None:
            shards = _finished_shards(folder, info, digests)
            found = max(found, shards, key=lambda s: sum(len(entry["episodes"]) for entry, _ in s))
    return [(entry, folder) for entry, folder in found if _same_frames(folder, entry, info, reader)]


def _same_frames(folder: Path, entry: Entry, info: StoreInfo, reader: FrameReader) -> bool:
    if reader.isolated:
        return True  # the digests of its episodes hold a hash of their files
    shape = (len(info.cameras), 3, *info.image_size)
    shard, stored = SHARDS[info.storage](folder / entry["file"], shape), np.empty((1, *shape), np.uint8)
    try:
        for record in entry["episodes"]:
            shard.read(np.array([record["row"]]), stored, np.array([0]))
            for camera in range(len(info.cameras)):
                frame = next(iter(reader.frames(record["index"], camera)))
                if info.storage == "jpeg":
                    encoded, frame = encode_jpeg(frame), np.empty_like(frame)
                    decode_jpeg(np.frombuffer(encoded, np.uint8), frame, folder)
                if not np.array_equal(frame, stored[0, camera]):
                    return False
    except (BadEpisode, OSError, StopIteration):
        return False
    return True


def _plan(episodes: list[Episode], row_bytes: int, number: int) -> list[_Shard]:
    """Consecutive whole episodes to shards of about SHARD_BYTES."""
    shards: list[_Shard] = []
    for episode in episodes:
        rows = shards[-1].rows if shards else 0
        if not shards or (rows + len(episode)) * row_bytes > SHARD_BYTES:
            shards.append(_Shard(number + len(shards), [], rows := 0))
        shards[-1].episodes.append((episode, rows))
        shards[-1] = shards[-1]._replace(rows=rows + len(episode))
    return shards


def _array_bytes(episode: Episode) -> int:
    return episode.state.nbytes + episode.action.nbytes + episode.timestamps.nbytes


def _check_disk(path: Path, needed: int, storage: Storage) -> None:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        other = ", --store jpeg" if storage == "raw" else ""
        raise UserError(
            f"The episode store needs {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB "
            f"free: free some, move --cache-dir, or choose a smaller --image-size{other}."
        )


def _decode(path, info, shards, digests, reader, skip_bad, workers, bad) -> list[Entry]:
    """Fill the shards and finish each one as its last episode arrives; extends `bad` by what failed."""
    tasks, left, failed, finished = [], {}, {}, []
    for shard in shards:
        part = _part(path, shard)
        if info.storage == "raw":
            with part.open("wb") as file:
                file.truncate(shard.rows * info.row_bytes)
        left[shard.number] = len(shard.episodes) * len(info.cameras)
        for episode, row in shard.episodes:
            tasks += [
                _Task(part, shard.number, episode.index, len(episode), row, camera)
                for camera in range(len(info.cameras))
            ]
    by_number = {shard.number: shard for shard in shards}
    # Checksums and flushing take turns with nobody: a thread does them while the next shard is decoded.
    with ThreadPoolExecutor(1) as finisher, closing(_run(tasks, reader, info, workers)) as results:
        for task, fault in results:
            if fault:
                failed.setdefault(task.episode, fault)
                if not skip_bad:
                    raise _refusal([fault])
            left[task.shard] -= 1
            if left[task.shard] == 0:
                shard = by_number[task.shard]
                finished.append(finisher.submit(_finish_shard, path, shard, info, digests, dict(failed)))
    bad += [failed[index] for index in sorted(failed)]
    return [entry for future in finished for entry in future.result()]


def _part(path: Path, shard: _Shard) -> Path:
    return path / f"frames-{shard.number:05d}.bin.part"


def _jpeg_part(part: Path, episode: int, camera: int) -> Path:
    """Where the JPEG frames of one camera and episode wait for the rest of their shard."""
    return part.with_name(f"{part.stem}-{episode}-{camera}.part")


def _finish_shard(path: Path, shard: _Shard, info: StoreInfo, digests, failed) -> list[Entry]:
    """Make a filled shard permanent; rows of failed episodes stay as a hole in the file."""
    part = _part(path, shard)
    good = [(episode, row) for episode, row in shard.episodes if episode.index not in failed]
    if not good:
        part.unlink(missing_ok=True)
        return []
    if info.storage == "jpeg":
        count = len(info.cameras)
        places = {
            _jpeg_part(part, episode.index, camera): row * count + camera
            for episode, row in good
            for camera in range(count)
        }
        join_jpeg(list(places), list(places.values()), shard.rows, count, part)
        for piece in places:
            piece.unlink()
    file = part.with_suffix("")
    entry = {
        "file": file.name,
        "bytes": part.stat().st_size,
        "crc32": checksum(part),
        "episodes": [
            {"index": episode.index, "row": row, "length": len(episode), "digest": digests[episode.index]}
            for episode, row in good
        ],
    }
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.rename(file)
    write_whole(file.with_suffix(".json"), json.dumps(entry).encode())
    return [entry]


def _finish(path: Path, info: StoreInfo, episodes: list[Episode], entries, bad: list[str]) -> None:
    from safetensors.numpy import save

    entries = sorted(entries, key=lambda entry: entry["file"])
    places = {
        record["index"]: (shard, record["row"])
        for shard, entry in enumerate(entries)
        for record in entry["episodes"]
    }
    episodes = sorted((e for e in episodes if e.index in places), key=lambda e: e.index)
    if not episodes:
        raise UserError(f"{info.source} has no usable episode left ({bad[0] if bad else 'it is empty'}).")
    arrays = {
        "state": np.concatenate([e.state for e in episodes]).astype(np.float32),
        "action": np.concatenate([e.action for e in episodes]).astype(np.float32),
        "timestamps": np.concatenate([e.timestamps for e in episodes]).astype(np.float64),
        "episode_starts": np.cumsum([0, *map(len, episodes)], dtype=np.int64),
        "episode_indices": np.array([e.index for e in episodes], np.int64),
        "episode_shard": np.array([places[e.index][0] for e in episodes], np.int64),
        "episode_row": np.array([places[e.index][1] for e in episodes], np.int64),
    }
    payload = save(arrays)
    write_whole(path / ARRAYS, payload)
    meta = {"format": FORMAT, **asdict(info), "choices": info.choices(), "skipped": bad}
    meta["arrays"] = {"file": ARRAYS, "bytes": len(payload), "crc32": zlib.crc32(payload)}
    meta["shards"] = entries
    write_whole(path / META, json.dumps(meta, indent=1).encode())


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        part = target.with_name(target.name + ".part")
        shutil.copyfile(source, part)
        part.replace(target)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Task(NamedTuple):
    """One camera of one episode, to be written to a shard from a row on."""

    part: Path
    shard: int
    episode: int
    length: int
    row: int
    camera: int


def _write_frames(
    task: _Task, reader: FrameReader, info: StoreInfo, advance: Callable[[int], Any]
) -> str | None:
    """Decode a task's frames into their place; returns a clause if the episode is bad."""
    camera, written, encoded = info.cameras[task.camera], 0, []
    try:
        with task.part.open("r+b", buffering=0) if info.storage == "raw" else nullcontext() as file:
            for frame in reader.frames(task.episode, task.camera):
                if written == task.length:
                    return f"Episode {task.episode} has more {camera} frames than its {task.length} steps"
                if file is None:
                    encoded.append(encode_jpeg(frame))
                else:
                    file.seek((task.row + written) * info.row_bytes + task.camera * info.frame_bytes)
                    if file.write(frame) != info.frame_bytes:
                        raise OSError(errno.ENOSPC, "no room for a frame")
                written += 1
                advance(1)
        if written < task.length:
            return f"Episode {task.episode} has {written} {camera} frames for its {task.length} steps"
        if info.storage == "jpeg":
            write_jpeg(encoded, _jpeg_part(task.part, task.episode, task.camera))
    except BadEpisode as error:
        return str(error)
    finally:
        advance(task.length - written)
    return None


def _run(
    tasks: list[_Task], reader: FrameReader, info: StoreInfo, workers: int | None
) -> Iterator[tuple[_Task, str | None]]:
    """Do the tasks, in this process or in several, under one progress bar; yields each with its fault."""
    from tqdm import tqdm

    frames = sum(task.length for task in tasks)
    if workers is None:  # isolated readers have started their processes already
        workers = cores() if reader.isolated else min(cores(), frames // FRAMES_PER_WORKER)
    workers = max(1, min(workers, len(tasks)))
    bar = tqdm(total=frames, unit="frame", desc=f"ingest {Path(info.source).name}", smoothing=0.05)
    with bar:
        if workers == 1 and not reader.isolated:
            for task in tasks:
                yield task, _write_frames(task, reader, info, bar.update)
            return
        results = guarded_map(
            _work,
            ((task, reader.only(task.episode), info) for task in tasks),
            workers,
            lambda task: SECONDS_PER_FRAME * task[0].length,
            lambda done: bar.update(done - bar.n),
        )
        with closing(results):
            for (task, _, _), fault in results:
                if isinstance(fault, Died):
                    fault = f"Episode {task.episode}, camera {info.cameras[task.camera]}: {fault}"
                yield task, fault


def _work(task: _Task, reader: FrameReader, info: StoreInfo) -> str | None:
    return _write_frames(task, reader, info, advance)
