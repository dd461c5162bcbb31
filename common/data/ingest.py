"""Writing an episode store: episodes decoded in parallel, exactly once, whatever interrupts it.

A shard is filled under a temporary name, flushed to the disk and renamed; a small JSON file beside it then
says which episodes it holds. An interrupted ingest leaves its finished shards, and the next one decodes only
what is missing. Where a dataset has grown, its earlier store moves to the new name and is completed there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from common.console import say
from common.data.shards import SHARDS, Storage, as_jpeg, encode_jpeg, write_jpeg
from common.data.source import BadEpisode, Episode, Info, Source, absent_episodes
from common.data.store import ARRAYS, FORMAT, META, EpisodeStore, defect
from common.data.workers import Died, cores, guarded_map, refuse_inside_worker
from common.errors import UserError
from common.files import checksum, read_json, sync_one, write_whole

SHARD_BYTES = 2**30
FRAMES_PER_WORKER = 2500  # a worker takes some seconds to start: fewer frames are not worth one more
SECONDS_PER_FRAME = 0.5  # slower than any disk: reading that takes longer hangs
JPEG_RATIO = 5  # raw bytes per JPEG byte, at least: for the free space to ask for
Entry = dict[str, Any]  # what the JSON file beside a shard says


@dataclass(frozen=True)
class StoreRequest:
    """A store as it is asked for.

    Attributes:
        source, info: the dataset, and what it says about itself.
        storage: how to keep frames; `auto` takes what is there already, else raw pixels if they take at most
            half of the free disk.
        episodes: numbers of those to keep, ascending; None: all.
        options: the data options that lead to this store, for `python -m common.data.store verify`.
        skip_bad: leave unusable episodes out instead of stopping.
        workers: processes that decode; None: as many as are worth it.
    """

    source: Source
    info: Info
    storage: Storage | Literal["auto"] = "raw"
    episodes: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    skip_bad: bool = False
    workers: int | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W): what one step's frames are."""
        return (len(self.info.cameras), 3, *self.info.image_size)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape))

    def candidates(self) -> list[StoreRequest]:
        """What the request can become: `auto` is either storage."""
        storages = SHARDS if self.storage == "auto" else [self.storage]
        return [replace(self, storage=storage) for storage in storages]

    def choices(self) -> dict[str, Any]:
        """Everything chosen that a store's content follows from, as JSON gives it back."""
        chosen = {
            "cameras": [camera.key for camera in self.info.cameras],
            "image_size": self.info.image_size,
            "fps": self.info.fps,
            "source": self.info.choices,
            "storage": self.storage,
            "episodes": self.episodes,
        }
        return json.loads(json.dumps(chosen))

    def folder(self, root: Path) -> Path:
        """The store's folder: named after the source for people, found by its content's hash alone."""
        content = json.dumps([FORMAT, self.info.fingerprint, self.choices()], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        present = [path for path in root.glob(f"*-{key}") if path.is_dir()]
        name = "".join(c if c.isalnum() or c in "_." else "-" for c in Path(self.info.source).name)[:60]
        return min(present, default=root / f"{name}-{key}")


def ensure_store(root: Path, request: StoreRequest) -> EpisodeStore:
    """The store, built if it is not there; several processes at once build it once.

    A store of all episodes serves when some of them are asked for, too.

    Args:
        root: folder of all stores.

    Raises:
        UserError: if an episode is unusable, or the disk too small.
    """
    request = _settle_storage(root, request)
    path, whole = request.folder(root), replace(request, episodes=None).folder(root)
    if defect(whole) is None:
        path = whole
    if defect(path) is not None:
        refuse_inside_worker()
        with _locked(path):
            if defect(path) is not None:  # nobody else has built it meanwhile
                _build(path, request)
    store, wanted = EpisodeStore.open(path), request.episodes
    left_out = store.skipped
    if wanted is not None:
        left_out = sorted(set(wanted) - set(store.episode_indices.tolist()))
        store = store.select(wanted)
    if left_out and not store.skipped:
        raise absent_episodes(store.source, left_out)
    if left_out and not request.skip_bad:
        raise _refusal(store.skipped)
    if left_out:
        say(f"left out {len(left_out)} of {store.num_episodes + len(left_out)} episodes; unusable are:")
        for reason in store.skipped:
            say(f"  {reason}")
    return store


def _settle_storage(root: Path, request: StoreRequest) -> StoreRequest:
    """Decide `auto`, once: the first of several processes leaves a folder that shows it."""
    choices = request.candidates()
    if len(choices) == 1:
        return request
    with _locked(root / f"choice-{request.info.fingerprint[:20]}"):
        for choice in choices:
            if choice.folder(root).is_dir():
                return choice
        needed = sum(map(len, request.source.episodes(request.episodes)[0])) * request.row_bytes
        free = shutil.disk_usage(root).free
        choice = choices[needed > free / 2]
        sizes = f"raw frames need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        say(f"store: {choice.storage} ({sizes}; JPEG above half of that, or by --store jpeg)")
        choice.folder(root).mkdir(parents=True, exist_ok=True)
        return choice


def lock_file(path: Path) -> Path:
    """What whoever builds, moves or deletes the store `path` locks."""
    return path.with_name(f".{path.name.rpartition('-')[2]}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from building the same store."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process, which is building the episode store {path}")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}): choose another --cache-dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refusal(reasons: Sequence[str]) -> UserError:
    more = f" ({len(reasons) - 1} more episodes are unusable, too)" if len(reasons) > 1 else ""
    return UserError(f"{reasons[0]}{more}: repair it, or leave it out with --skip-bad-episodes.")


@dataclass
class _Shard:
    """A file of frames that is being filled.

    Attributes:
        part: where, until it is complete.
        episodes: those that it shall hold.
        records: of each, what the file's entry says: number, first row, length, digest.
        rows: in all.
        encoded: its JPEG frames by number, row by row and camera by camera.
    """

    part: Path
    episodes: list[Episode] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    encoded: dict[int, bytes] = field(default_factory=dict)


def _build(path: Path, request: StoreRequest) -> None:
    """Decode what is missing, then write the arrays and last `meta.json`."""
    episodes, bad = request.source.episodes(request.episodes)
    if bad and not request.skip_bad:
        raise _refusal(bad)
    digests = {episode.index: episode.digest() for episode in episodes}
    if not _finished_shards(path, digests):
        _take_over(path, request, digests)
    kept = _finished_shards(path, digests)
    kept = [entry for entry in kept if _same_frames(path, entry, request, episodes)]
    have = {record["index"] for entry in kept for record in entry["episodes"]}
    missing = [episode for episode in episodes if episode.index not in have]
    first_free = 1 + max((int(entry["file"][7:12]) for entry in kept), default=-1)
    shards = _plan(path, missing, digests, request.row_bytes, first_free)
    _check_disk(path, request, shards, episodes)
    path.mkdir(parents=True, exist_ok=True)
    try:
        _keep_only(path, kept)
        new, failed = _decode(shards, request)
        _finish(path, request, episodes, kept + new, bad + failed)
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


# What is there already


def _finished_shards(path: Path, digests: dict[int, str]) -> list[Entry]:
    """The whole shards in a folder whose episodes are all wanted."""
    found = []
    for file in sorted(path.glob("frames-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged
            entry = read_json(file)
            known = all(digests.get(record["index"]) == record["digest"] for record in entry["episodes"])
            if known and (path / entry["file"]).stat().st_size == entry["bytes"]:
                found.append(entry)
    return found


def _same_frames(path: Path, entry: Entry, request: StoreRequest, episodes: list[Episode]) -> bool:
    """Whether every episode of a shard still begins with the same frames: equal numbers do not prove it."""
    if request.source.isolated:
        return True  # the digests of its episodes hold a hash of their files
    shard = SHARDS[request.storage](path / entry["file"], request.row_shape)
    stored, by_index = np.empty((1, *request.row_shape), np.uint8), {e.index: e for e in episodes}
    try:
        for record in entry["episodes"]:
            shard.read(np.array([record["row"]]), stored, np.array([0]))
            for camera, mine in enumerate(stored[0]):
                frame = next(iter(request.source.frames(by_index[record["index"]], camera)))
                if not np.array_equal(as_jpeg(frame) if request.storage == "jpeg" else frame, mine):
                    return False
    except (BadEpisode, OSError, StopIteration):
        return False
    return True


def _take_over(path: Path, request: StoreRequest, digests: dict[int, str]) -> None:
    """Move the dataset's earlier store here, of several the one that holds most of the episodes.

    It loses `meta.json` first, so that it is never taken for finished. Whoever reads it keeps its files.
    """
    from filelock import FileLock, Timeout

    def shared(folder: Path) -> int:
        """How many of the episodes a store holds, if it is of this dataset and was made as this one shall."""
        mine = request.choices()
        try:
            meta = read_json(folder / META)
            theirs = meta["choices"]
            related = meta["format"] == FORMAT and meta["source"] == request.info.source
            related &= {**theirs, "episodes": None} == {**mine, "episodes": None}
            related &= mine["episodes"] in (None, theirs["episodes"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return related and sum(len(e["episodes"]) for e in _finished_shards(folder, digests))

    earlier = max(path.parent.glob("*/"), key=shared, default=path)
    if not shared(earlier):
        return
    with suppress(Timeout), FileLock(lock_file(earlier), timeout=0):
        if (earlier / META).is_file():  # nobody else has taken it
            (earlier / META).unlink()
            shutil.rmtree(path, ignore_errors=True)
            earlier.rename(path)


def _keep_only(path: Path, entries: list[Entry]) -> None:
    """Remove every file but these shards from an unfinished store; features lie in folders."""
    names = {name for entry in entries for name in (entry["file"], entry["file"].replace(".bin", ".json"))}
    for file in path.iterdir():
        if file.is_file() and file.name not in names:
            file.unlink()


# What is missing


def _plan(
    path: Path, episodes: list[Episode], digests: dict[int, str], row_bytes: int, number: int
) -> list[_Shard]:
    """Consecutive whole episodes to shards of about SHARD_BYTES, numbered from `number` on."""
    shards: list[_Shard] = []
    for episode in episodes:
        index, length = episode.index, len(episode)
        if not shards or (shards[-1].rows + length) * row_bytes > SHARD_BYTES:
            shards.append(_Shard(path / f"frames-{number + len(shards):05d}.bin.part"))
        shard = shards[-1]
        shard.episodes.append(episode)
        shard.records.append({"index": index, "row": shard.rows, "length": length, "digest": digests[index]})
        shard.rows += length
    return shards


def _check_disk(path: Path, request: StoreRequest, shards: list[_Shard], episodes: list[Episode]) -> None:
    ratio = JPEG_RATIO if request.storage == "jpeg" else 1
    needed = sum(shard.rows for shard in shards) * request.row_bytes // ratio
    needed += sum(e.state.nbytes + e.action.nbytes + e.timestamps.nbytes for e in episodes)
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        other = ", --store jpeg" if request.storage == "raw" else ""
        raise UserError(
            f"The episode store needs {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB "
            f"free: free some, move --cache-dir, or choose a smaller --image-size{other}."
        )


def _decode(shards: list[_Shard], request: StoreRequest) -> tuple[list[Entry], list[str]]:
    """Fill the shards and finish each one as its last episode arrives; also says what has failed."""
    cameras, tasks = request.info.cameras, []
    for number, shard in enumerate(shards):
        if request.storage == "raw":
            with shard.part.open("wb") as file:
                file.truncate(shard.rows * request.row_bytes)
        tasks += [
            _Task(number, episode, c, camera.short, record["row"] * len(cameras) + c, len(cameras))
            for episode, record in zip(shard.episodes, shard.records, strict=True)
            for c, camera in enumerate(cameras)
        ]
    left = [len(shard.episodes) * len(cameras) for shard in shards]
    failed: dict[int, str] = {}
    finished = []
    # Checksums and flushing take turns with nobody: a thread does them while the next shard is decoded.
    with ThreadPoolExecutor(1) as finisher, closing(_run(tasks, shards, request)) as results:
        for task, fault, encoded in results:
            if fault:
                failed.setdefault(task.episode.index, fault)
                if not request.skip_bad:
                    raise _refusal([fault])
            shard = shards[task.shard]
            shard.encoded.update(zip(count(task.first, task.stride), encoded))
            left[task.shard] -= 1
            if left[task.shard] == 0:
                good = [record for record in shard.records if record["index"] not in failed]
                finished.append(finisher.submit(_finish_shard, shard, good, request))
    faults = [failed[index] for index in sorted(failed)]
    return [entry for future in finished for entry in future.result()], faults


def _finish_shard(shard: _Shard, records: list[dict[str, Any]], request: StoreRequest) -> list[Entry]:
    """Make a filled shard permanent; rows of failed episodes, which have no record, stay empty."""
    part = shard.part
    if not records:
        part.unlink(missing_ok=True)
        return []
    if request.storage == "jpeg":
        write_jpeg([shard.encoded.get(n) for n in range(shard.rows * len(request.info.cameras))], part)
        shard.encoded.clear()
    file = part.with_suffix("")
    entry = {"file": file.name, "bytes": part.stat().st_size, "crc32": checksum(part), "episodes": records}
    sync_one(part)
    part.rename(file)
    write_whole(file.with_suffix(".json"), json.dumps(entry).encode())
    return [entry]


def _finish(
    path: Path, request: StoreRequest, episodes: list[Episode], entries: list[Entry], bad: list[str]
) -> None:
    """Write the arrays, and with `meta.json` finish the store."""
    from safetensors.numpy import save

    info, entries = request.info, sorted(entries, key=lambda entry: entry["file"])
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
    meta = {
        "format": FORMAT,
        **asdict(info),
        "storage": request.storage,
        "choices": request.choices(),
        "options": request.options,
        "skipped": bad,
        "episode_tasks": [e.task for e in episodes],
        "arrays": {"file": ARRAYS, "bytes": len(payload), "crc32": zlib.crc32(payload)},
        "shards": entries,
    }
    write_whole(path / META, json.dumps(meta, indent=1).encode())


# Frames


class _Task(NamedTuple):
    """One camera of one episode.

    Attributes:
        shard: where its frames go, in the order of the plan.
        camera, name: its number and short name.
        first, stride: the number of its first frame in the shard, and how far apart they are.
    """

    shard: int
    episode: Episode
    camera: int
    name: str
    first: int
    stride: int


def _read_frames(task: _Task, part: Path, storage: Storage, source: Source) -> tuple[str | None, list[bytes]]:
    """Decode a task's frames; gives a clause if the episode is bad, and the frames if they are JPEG.

    Raw frames are written to their places in `part`.
    """
    index, steps, written, encoded = task.episode.index, len(task.episode), 0, []
    try:
        with part.open("r+b", buffering=0) if storage == "raw" else nullcontext() as file:
            for frame in source.frames(task.episode, task.camera):
                if written == steps:
                    return f"Episode {index} has more {task.name} frames than its {steps} steps", []
                if file is None:
                    encoded.append(encode_jpeg(frame))
                else:
                    file.seek((task.first + written * task.stride) * frame.nbytes)
                    if file.write(frame) != frame.nbytes:
                        raise OSError(errno.ENOSPC, "no room for a frame")
                written += 1
    except BadEpisode as error:
        return str(error), []
    short = f"Episode {index} has {written} {task.name} frames for its {steps} steps"
    return (short if written < steps else None), encoded


def _run(
    tasks: list[_Task], shards: list[_Shard], request: StoreRequest
) -> Iterator[tuple[_Task, str | None, list[bytes]]]:
    """Do the tasks, in this process or in several, under one progress bar."""
    from tqdm import tqdm

    source, workers = request.source, request.workers
    frames = sum(len(task.episode) for task in tasks)
    if workers is None:  # isolated sources have started their processes already
        workers = cores() if source.isolated else min(cores(), frames // FRAMES_PER_WORKER)
    workers = max(1, min(workers, len(tasks)))
    calls = [(task, shards[task.shard].part, request.storage, source) for task in tasks]
    if workers == 1 and not source.isolated:
        results = ((call, _read_frames(*call)) for call in calls)
    else:
        results = guarded_map(
            _read_frames, calls, workers, lambda call: SECONDS_PER_FRAME * len(call[0].episode)
        )
    name = Path(request.info.source).name
    with tqdm(total=frames, unit="frame", desc=f"ingest {name}") as bar, closing(results):
        for (task, *_), result in results:
            if isinstance(result, Died):
                result = f"Episode {task.episode.index}, camera {task.name}: {result}", []
            yield task, *result
            bar.update(len(task.episode))
