"""Writing an episode store: episodes decoded in parallel, exactly once, whatever interrupts it.

A shard is filled under a temporary name, flushed to the disk and renamed; a small JSON file beside it then
says which episodes it holds. An interrupted ingest leaves its finished shards, and the next one decodes only
what is missing. A dataset that grew starts from hard links to the shards of its earlier store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.data.store import ARRAYS, FORMAT, META, EpisodeStore, defect
from common.errors import UserError

SHARD_BYTES = 2**30
FRAMES_PER_WORKER = 2500  # a worker takes some seconds to start: fewer frames are not worth one more


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


class FrameReader(Protocol):
    """The frames of a source; pickled to the worker processes."""

    def frames(self, episode: int, camera: int) -> Iterator[np.ndarray]:
        """All frames of one camera in order, each (3, H, W) uint8, RGB. Raises BadEpisode."""


@dataclass(frozen=True)
class StoreInfo:
    """What a store says about itself; with the fingerprint, everything that its content follows from."""

    source: str
    fingerprint: str
    cameras: tuple[str, ...]
    camera_keys: tuple[str, ...]
    image_size: tuple[int, int]
    fps: float
    state_key: str
    action_key: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    task: str | None

    @property
    def frame_bytes(self) -> int:
        return 3 * self.image_size[0] * self.image_size[1]

    @property
    def row_bytes(self) -> int:
        return len(self.cameras) * self.frame_bytes

    def choices(self) -> dict[str, Any]:
        """What was chosen, apart from the data themselves."""
        names = ("camera_keys", "image_size", "state_key", "action_key", "task")
        return {name: _plain(getattr(self, name)) for name in names}

    def folder(self, root: Path) -> Path:
        """The store's folder: named after the source for people, found by the content's hash alone."""
        content = [FORMAT, self.fingerprint, self.choices()]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
        present = [path for path in root.glob(f"*-{key}") if path.is_dir()]
        name = "".join(c if c.isalnum() or c in "_." else "-" for c in Path(self.source).name)[:60]
        return min(present, default=root / f"{name}-{key}")


Loaded = tuple[list[Episode], list[str], FrameReader]
Entry = dict[str, Any]  # what the JSON file beside a shard says


def ensure_store(
    root: Path,
    info: StoreInfo,
    load: Callable[[], Loaded],
    skip_bad: bool = False,
    workers: int | None = None,
) -> EpisodeStore:
    """The store for `info` below `root`, built if it is not there; several processes at once build it once.

    Args:
        root: folder of all stores.
        load: gives the usable episodes, a clause about each one that is not, and the reader of the frames.
        skip_bad: leave unusable episodes out instead of stopping.
        workers: processes that decode; None uses every core.

    Raises:
        UserError: if an episode is unusable, or the disk too small.
    """
    path = info.folder(root)
    if defect(path) is not None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # A decoding process imports the program anew; to wait here for its own parent would never end.
            raise UserError("A program that opens a dataset must do so below `if __name__ == '__main__':`.")
        with _lock(root, path):
            if defect(path) is not None:  # nobody else has built it meanwhile
                _build(path, info, *load(), skip_bad, workers)
    store = EpisodeStore.open(path)
    if store.skipped and not skip_bad:
        raise _refusal(store.skipped)
    if store.skipped:
        report(f"left out {len(store.skipped)} of {store.num_episodes + len(store.skipped)} episodes:")
        for reason in store.skipped:
            report(f"  {reason}")
    return store


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
    _check_disk(path, sum(shard.rows for shard in shards) * info.row_bytes + sum(map(_array_bytes, episodes)))
    path.mkdir(parents=True, exist_ok=True)
    try:
        _keep_only(path, [entry for entry, folder in kept if folder == path])
        for entry, folder in kept:
            if folder != path:
                _link(folder / entry["file"], path / entry["file"])
                _write(path / entry["file"].replace(".bin", ".json"), json.dumps(entry).encode())
        new = _decode(path, info, shards, digests, reader, skip_bad, workers, bad)
        _finish(path, info, episodes, [entry for entry, _ in kept] + new, bad)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"The disk of {path.parent} is full: free some, or move --cache-dir.") from error
    except BrokenProcessPool as error:
        raise UserError(
            "A process that decodes frames died, most often for want of memory: "
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
        if file.name not in names:
            file.unlink()


def _finished_shards(path: Path, info: StoreInfo, digests: dict[int, str]) -> list[tuple[Entry, Path]]:
    """The whole shards in a folder whose episodes are all wanted, with that folder."""
    found = []
    for file in sorted(path.glob("frames-*.json")):
        try:
            entry = json.loads(file.read_bytes())
            rows = sum(record["length"] for record in entry["episodes"])
            whole = (path / entry["file"]).stat().st_size == entry["bytes"] >= rows * info.row_bytes > 0
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
            related = meta["source"] == info.source and meta["choices"] == info.choices()
            count = sum(len(entry["episodes"]) for entry in meta["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if related and count < len(digests) and defect(folder) is None:
            shards = _finished_shards(folder, info, digests)
            found = max(found, shards, key=lambda s: sum(len(entry["episodes"]) for entry, _ in s))
    return [(entry, folder) for entry, folder in found if _same_frames(folder, entry, info, reader)]


def _same_frames(folder: Path, entry: Entry, info: StoreInfo, reader: FrameReader) -> bool:
    stored = np.memmap(folder / entry["file"], np.uint8, "r").reshape(-1, len(info.cameras), info.frame_bytes)
    try:
        return all(
            np.array_equal(
                next(iter(reader.frames(record["index"], camera))).ravel(), stored[record["row"], camera]
            )
            for record in entry["episodes"]
            for camera in range(len(info.cameras))
        )
    except (BadEpisode, StopIteration):
        return False


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


def _check_disk(path: Path, needed: int) -> None:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise UserError(
            f"The episode store needs {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB "
            f"free: free some, move --cache-dir, or choose a smaller --image-size."
        )


def _decode(path, info, shards, digests, reader, skip_bad, workers, bad) -> list[Entry]:
    """Fill the shards and finish each one as its last episode arrives; extends `bad` by what failed."""
    tasks, left, failed, entries = [], {}, {}, []
    for shard in shards:
        part = _part(path, shard)
        with part.open("wb") as file:
            file.truncate(shard.rows * info.row_bytes)
        left[shard.number] = len(shard.episodes) * len(info.cameras)
        for episode, row in shard.episodes:
            tasks += [
                _Task(part, shard.number, episode.index, len(episode), row, camera)
                for camera in range(len(info.cameras))
            ]
    by_number = {shard.number: shard for shard in shards}
    with closing(_run(tasks, reader, info, workers)) as results:
        for task, fault in results:
            if fault:
                failed.setdefault(task.episode, fault)
                if not skip_bad:
                    raise _refusal([fault])
            left[task.shard] -= 1
            if left[task.shard] == 0:
                entries += _finish_shard(path, by_number[task.shard], info, digests, failed)
    bad += [failed[index] for index in sorted(failed)]
    return entries


def _part(path: Path, shard: _Shard) -> Path:
    return path / f"frames-{shard.number:05d}.bin.part"


def _finish_shard(path: Path, shard: _Shard, info: StoreInfo, digests, failed) -> list[Entry]:
    """Make a filled shard permanent; rows of failed episodes stay as a hole in the file."""
    part = _part(path, shard)
    good = [(episode, row) for episode, row in shard.episodes if episode.index not in failed]
    if not good:
        part.unlink()
        return []
    file = part.with_suffix("")
    entry = {
        "file": file.name,
        "bytes": shard.rows * info.row_bytes,
        "episodes": [
            {"index": episode.index, "row": row, "length": len(episode), "digest": digests[episode.index]}
            for episode, row in good
        ],
    }
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    part.rename(file)
    _write(file.with_suffix(".json"), json.dumps(entry).encode())
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
    _write(path / ARRAYS, payload)
    meta = {"format": FORMAT, **asdict(info), "choices": info.choices(), "skipped": bad}
    meta |= {"arrays_bytes": len(payload), "shards": entries}
    _write(path / META, json.dumps(meta, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent, whenever the machine stops."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


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
    task: _Task, reader: FrameReader, info: StoreInfo, advance: Callable[[int], None]
) -> str | None:
    """Decode a task's frames into their rows; returns a clause if the episode is bad."""
    camera, written = info.cameras[task.camera], 0
    try:
        with task.part.open("r+b", buffering=0) as file:
            for frame in reader.frames(task.episode, task.camera):
                if written == task.length:
                    return f"Episode {task.episode} has more {camera} frames than its {task.length} steps"
                file.seek((task.row + written) * info.row_bytes + task.camera * info.frame_bytes)
                if file.write(frame) != info.frame_bytes:
                    raise OSError(errno.ENOSPC, "no room for a frame")
                written += 1
                advance(1)
        if written < task.length:
            return f"Episode {task.episode} has {written} {camera} frames for its {task.length} steps"
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
    if workers is None:
        workers = min(cores(), frames // FRAMES_PER_WORKER)
    bar = tqdm(total=frames, unit="frame", desc=f"ingest {Path(info.source).name}", smoothing=0.05)
    with bar:
        if min(workers, len(tasks)) <= 1:
            for task in tasks:
                yield task, _write_frames(task, reader, info, bar.update)
            return
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
        done = context.Value("q", 0)
        workers = min(workers, len(tasks))
        pool = ProcessPoolExecutor(workers, context, _start_worker, (reader, info, done))
        try:
            yield from _results(pool, tasks, 4 * workers, lambda: bar.update(done.value - bar.n))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(pool: ProcessPoolExecutor, tasks: list[_Task], ahead: int, show: Callable[[], Any]):
    """Results as they come; tasks start in order, `ahead` of them queued, so that shards fill one by one."""
    queue, pending = iter(tasks), {}

    def submit(count: int) -> None:
        for _, task in zip(range(count), queue, strict=False):
            pending[pool.submit(_work, task)] = task

    submit(ahead)
    while pending:
        finished: set[Future] = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done
        show()
        for future in finished:
            yield pending.pop(future), future.result()
        submit(len(finished))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: dict[str, Any] = {}


def _start_worker(reader: FrameReader, info: StoreInfo, done) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()  # a killed parent cannot stop us

    def advance(count: int) -> None:
        with done.get_lock():
            done.value += count

    _worker.update(reader=reader, info=info, advance=advance)


def _work(task: _Task) -> str | None:
    return _write_frames(task, _worker["reader"], _worker["info"], _worker["advance"])
