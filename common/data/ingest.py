"""Writing an episode store: episodes decoded in parallel, exactly once, whatever interrupts it.

A shard is filled under a temporary name, flushed to the disk and renamed; a small JSON file beside it then
says which episodes it holds. An interrupted ingest leaves its finished shards, and the next one decodes only
what is missing. Where a dataset has grown, its earlier store moves to the new name and is completed there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from common.console import say
from common.data.shards import SHARDS, Storage, as_jpeg, encode_jpeg, write_jpeg
from common.data.source import BadEpisode, Episode, Info, Source, existing
from common.data.store import ARRAYS, FORMAT, META, EpisodeStore, defect
from common.data.workers import Died, cores, guarded_map, refuse_inside_worker
from common.errors import UserError
from common.files import checksum, read_json, require_space, sync_one, write_whole, writing_below

SHARD_BYTES = 2**30
FRAMES_PER_WORKER = 2500  # a worker takes some seconds to start: fewer frames are not worth one more
SECONDS_PER_FRAME = 0.5  # slower than any disk: reading that takes longer hangs
JPEG_RATIO = 5  # raw bytes per JPEG byte, at least: for the free space to ask for
Entry = dict[str, Any]  # what the JSON file beside a shard says


@dataclass(frozen=True)
class StoreRequest:
    """A store as it is asked for.

    Attributes:
        storage: how to keep frames; `auto` takes what is there already, else raw pixels if they take at most
            half of the free disk.
        episodes: numbers of those to keep, ascending; None: all.
        workers: processes that decode; None: as many as are worth it.
    """

    source: Source
    info: Info
    storage: Storage | Literal["auto"] = "raw"
    episodes: tuple[int, ...] | None = None
    skip_bad: bool = False
    workers: int | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W): what one step's frames are."""
        return (len(self.info.cameras), 3, *self.info.image_size)

    def found_below(self, root: Path) -> StoreRequest | None:
        """The request, with the storage of the store that is there or begun; None if there is none."""
        storages = SHARDS if self.storage == "auto" else [self.storage]
        requests = [replace(self, storage=storage) for storage in storages]
        return next((request for request in requests if request.folder(root).is_dir()), None)

    def choices(self) -> dict[str, Any]:
        """Everything chosen that a store's content follows from, as JSON gives it back."""
        chosen = {name: getattr(self.info, name) for name in ("image_size", "fps", "choices")}
        chosen |= {"cameras": [camera.key for camera in self.info.cameras]}
        chosen |= {"storage": self.storage, "episodes": self.episodes}
        return json.loads(json.dumps(chosen))

    def folder(self, root: Path) -> Path:
        """The store's folder: named after the source for people, found by its content's hash alone."""
        content = json.dumps([FORMAT, self.info.fingerprint, self.choices()], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        present = [path for path in root.glob(f"*-{key}") if path.is_dir()]
        name = "".join(c if c.isalnum() or c in "_." else "-" for c in Path(self.info.source).name)[:60]
        return min(present, default=root / f"{name}-{key}")


def ensure_store(root: Path, request: StoreRequest) -> EpisodeStore:
    """The store below `root`, built if it is not there; several processes at once build it once.

    A store of all episodes serves when some of them are asked for, too.

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
    store = EpisodeStore.open(path)
    there = store.episode_indices.tolist()
    if not store.skipped:
        existing(request.episodes, there, store.source)
    missing = set(request.episodes or ()) - set(there)
    left_out = len(store.skipped if request.episodes is None else missing)
    if left_out and not request.skip_bad:
        raise _refusal(store.skipped)
    if missing == set(request.episodes or (None,)):
        raise _none_left(store.source, store.skipped)
    if left_out:
        total = len(request.episodes or ()) or store.num_episodes + left_out
        say(f"left out {left_out} of {total} episodes; what is unusable:")
        for reason in store.skipped:
            say(f"  {reason}")
    return store if request.episodes is None else store.select(request.episodes)


def _settle_storage(root: Path, request: StoreRequest) -> StoreRequest:
    """Decide `auto`, once: the first of several processes leaves a folder that shows it."""
    if request.storage != "auto":
        return request
    with _locked(root / f"choice-{request.info.fingerprint[:20]}"):
        if found := request.found_below(root):
            return found
        needed = sum(map(len, request.source.episodes(request.episodes)[0])) * math.prod(request.row_shape)
        free = shutil.disk_usage(root).free
        request = replace(request, storage="raw" if needed <= free / 2 else "jpeg")
        sizes = f"raw frames need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        say(f"store: {request.storage} ({sizes}; JPEG above half of that, or by --store jpeg)")
        request.folder(root).mkdir(parents=True, exist_ok=True)
        return request


def lock_file(path: Path) -> Path:
    """What whoever builds, moves or deletes the store `path` locks."""
    return path.with_name(f".{path.name.rpartition('-')[2]}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from building the same store."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file(path))
    with writing_below(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process, which is building the episode store {path}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refusal(reasons: Sequence[str]) -> UserError:
    others = [reason.split()[1].strip(",:") for reason in reasons[1:]]  # a clause begins with "Episode 3"
    some = ", ".join(others[:30]) + f" and {len(others) - 30} more" * (len(others) > 30)
    more = f" (unusable, too: {some})" if others else ""
    return UserError(f"{reasons[0]}{more}: repair it, or leave it out with --skip-bad-episodes.")


def _none_left(source: str, reasons: Sequence[str]) -> UserError:
    return UserError(f"{source} has no usable episode left ({reasons[0] if reasons else 'it is empty'}).")


@dataclass
class _Shard:
    """A file of frames that is being filled, under the name `part`."""

    part: Path
    places: list[tuple[Episode, int]] = field(default_factory=list)  # its episodes and their first rows
    rows: int = 0
    encoded: list[bytes | None] = field(default_factory=list)  # JPEG frames, camera by camera in a row


def _build(path: Path, request: StoreRequest) -> None:
    """Decode what is missing, then write the arrays and last `meta.json`."""
    usable, bad = request.source.episodes(request.episodes)
    if bad and not request.skip_bad:
        raise _refusal(bad)
    episodes = {episode.index: episode for episode in usable}
    if not _finished_shards(path, episodes):
        _take_over(path, request, episodes)
    finished = _finished_shards(path, episodes)
    kept = [entry for entry in finished if _same_frames(path, entry, request, episodes)]
    have = {record["index"] for entry in kept for record in entry["episodes"]}
    first_free = 1 + max((int(entry["file"][7:12]) for entry in kept), default=-1)
    shards = _plan(path, [e for e in usable if e.index not in have], request, first_free)
    needed = sum(shard.rows for shard in shards) * math.prod(request.row_shape)
    needed = needed // JPEG_RATIO if request.storage == "jpeg" else needed
    needed += sum(e.state.nbytes + e.action.nbytes + e.timestamps.nbytes for e in usable)
    remedy = "a smaller --image-size" + " or --store jpeg" * (request.storage == "raw")
    require_space(path.parent, needed, "The episode store needs", remedy)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with writing_below(path.parent, remedy):
            names = {name for entry in kept for name in (entry["file"], f"{entry['file'][:-4]}.json")}
            for file in path.iterdir():
                if file.is_file() and file.name not in names:  # features lie in folders
                    file.unlink()
            new, failed = _decode(shards, request)
            _finish(path, request, episodes, kept + new, bad + failed)
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


def _finished_shards(path: Path, episodes: dict[int, Episode]) -> list[Entry]:
    """The whole shards in a folder whose episodes are all wanted, and have the same numbers still."""
    found = []
    for file in sorted(path.glob("frames-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or an episode that is not wanted
            entry = read_json(file)
            same = all(episodes[record["index"]].digest() == record["digest"] for record in entry["episodes"])
            if same and (path / entry["file"]).stat().st_size == entry["bytes"]:
                found.append(entry)
    return found


def _same_frames(path: Path, entry: Entry, request: StoreRequest, episodes: dict[int, Episode]) -> bool:
    """Whether every episode of a shard still begins with the same frames: equal numbers do not prove it."""
    if request.source.isolated:
        return True  # the digests of its episodes hold a hash of their files
    shard = SHARDS[request.storage](path / entry["file"], request.row_shape)
    stored = np.empty((1, *request.row_shape), np.uint8)
    try:
        for record in entry["episodes"]:
            shard.read(np.array([record["row"]]), stored, np.array([0]))
            if another_frame(stored, episodes[record["index"]], request):
                return False
    except (BadEpisode, OSError):
        return False
    return True


def another_frame(stored: Iterable[np.ndarray], episode: Episode, request: StoreRequest) -> str | None:
    """Where the frames (N, 3, H, W) of an episode's first steps are not what its source gives."""
    views = [request.source.frames(episode, camera) for camera in range(len(request.info.cameras))]
    for step, frames in enumerate(stored):
        for camera, mine, view in zip(request.info.cameras, frames, views, strict=True):
            frame = next(view, None)
            if frame is not None and request.storage == "jpeg":
                frame = as_jpeg(frame)
            if not np.array_equal(mine, frame):
                return f"camera {camera.short} at step {step}"
    return None


def _take_over(path: Path, request: StoreRequest, episodes: dict[int, Episode]) -> None:
    """Move the dataset's earlier store here, of several the one that holds most of the episodes.

    It loses `meta.json` first, so that it is never taken for finished. Whoever reads it keeps its files.
    """
    from filelock import FileLock, Timeout

    mine, found = request.choices(), []
    for file in path.parent.glob(f"*/{META}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged
            meta = read_json(file)
            theirs = meta["choices"] | ({"episodes": None} if request.episodes is None else {})
            if (meta["format"], meta["source"], theirs) == (FORMAT, request.info.source, mine):
                shards = _finished_shards(file.parent, episodes)
                found.append((sum(len(entry["episodes"]) for entry in shards), file))
    count, file = max(found, default=(0, None))
    if count in (0, len(episodes)):  # all of them in a dataset that is another: it has not grown, but changed
        return
    with suppress(Timeout, FileNotFoundError), FileLock(lock_file(file.parent), timeout=0):
        file.unlink()  # not found: another process has taken it
        shutil.rmtree(path, ignore_errors=True)
        file.parent.rename(path)


# What is missing


def _plan(path: Path, episodes: list[Episode], request: StoreRequest, number: int) -> list[_Shard]:
    """Consecutive whole episodes to shards of about SHARD_BYTES, numbered from `number` on."""
    shards: list[_Shard] = []
    most_rows = SHARD_BYTES // math.prod(request.row_shape)
    for episode in episodes:
        if not shards or shards[-1].rows + len(episode) > most_rows:
            shards.append(_Shard(path / f"frames-{number + len(shards):05d}.bin.part"))
        shards[-1].places.append((episode, shards[-1].rows))
        shards[-1].rows += len(episode)
    return shards


class _Task(NamedTuple):
    """One camera of one episode, whose frames go to the shard `part` from a row on."""

    part: Path
    episode: Episode
    row: int
    camera: int
    request: StoreRequest


def _decode(shards: list[_Shard], request: StoreRequest) -> tuple[list[Entry], list[str]]:
    """Fill the shards and finish each one as its last episode arrives; also says what has failed."""
    cameras, tasks = len(request.info.cameras), []
    for shard in shards:
        if request.storage == "raw":
            with shard.part.open("wb") as file:
                file.truncate(shard.rows * math.prod(request.row_shape))
        else:
            shard.encoded = [None] * (shard.rows * cameras)
        tasks += [_Task(shard.part, e, row, c, request) for e, row in shard.places for c in range(cameras)]
    by_part, left = {shard.part: shard for shard in shards}, Counter(task.part for task in tasks)
    failed: dict[int, str] = {}
    finished: list[Entry] = []
    with closing(_run(tasks, request)) as results:
        for task, fault, encoded in results:
            shard, first = by_part[task.part], task.row * cameras + task.camera
            shard.encoded[first : first + len(encoded) * cameras : cameras] = encoded
            if fault:
                failed.setdefault(task.episode.index, fault)
                if not request.skip_bad:
                    raise _refusal([fault])
            left[task.part] -= 1
            if left[task.part] == 0:
                shard.places = [(e, row) for e, row in shard.places if e.index not in failed]
                finished += _finish_shard(shard, request)
    return finished, [failed[index] for index in sorted(failed)]


def _finish_shard(shard: _Shard, request: StoreRequest) -> list[Entry]:
    """Make a filled shard permanent; rows of failed episodes, which have no place, belong to nobody."""
    part, file = shard.part, shard.part.with_suffix("")
    if not shard.places:
        part.unlink(missing_ok=True)
        return []
    if request.storage == "jpeg":
        write_jpeg(shard.encoded, part)
        shard.encoded = []
    records = [
        {"index": episode.index, "row": row, "length": len(episode), "digest": episode.digest()}
        for episode, row in shard.places
    ]
    size = part.stat().st_size
    entry = {"file": file.name, "bytes": size, "crc32": checksum(part), "episodes": records}
    sync_one(part)
    part.rename(file)
    write_whole(file.with_suffix(".json"), json.dumps(entry).encode())
    return [entry]


def _finish(
    path: Path, request: StoreRequest, episodes: dict[int, Episode], entries: list[Entry], bad: list[str]
) -> None:
    """Write the arrays, and with `meta.json` finish the store."""
    from safetensors.numpy import save

    entries = sorted(entries, key=lambda entry: entry["file"])
    places = sorted(
        (record["index"], shard, record["row"])
        for shard, entry in enumerate(entries)
        for record in entry["episodes"]
    )
    if not places:
        raise _none_left(request.info.source, bad)
    found = [episodes[index] for index, _, _ in places]
    columns = zip(*places, strict=True)
    names = ("episode_indices", "episode_shard", "episode_row")
    arrays = {name: np.array(column, np.int64) for name, column in zip(names, columns, strict=True)}
    arrays |= {
        "state": np.concatenate([episode.state for episode in found]),
        "action": np.concatenate([episode.action for episode in found]),
        "timestamps": np.concatenate([episode.timestamps for episode in found]),
        "episode_starts": np.cumsum([0, *map(len, found)], dtype=np.int64),
    }
    payload = save(arrays)
    write_whole(path / ARRAYS, payload)
    meta = {
        "format": FORMAT,
        **asdict(request.info),
        "storage": request.storage,
        "choices": request.choices(),
        "skipped": bad,
        "episode_tasks": [e.task for e in found],
        "arrays": {"file": ARRAYS, "bytes": len(payload), "crc32": zlib.crc32(payload)},
        "shards": entries,
    }
    write_whole(path / META, json.dumps(meta, indent=1).encode())


# Frames


def _read_frames(
    part: Path, episode: Episode, row: int, camera: int, request: StoreRequest
) -> tuple[str | None, list[bytes]]:
    """What is wrong with the frames of a task, and the frames as JPEG; raw ones are written to `part`."""
    name, steps = f"Episode {episode.index}", len(episode)
    short, cameras = request.info.cameras[camera].short, len(request.info.cameras)
    count, encoded = 0, []
    try:
        with part.open("r+b") if request.storage == "raw" else nullcontext() as file:
            for frame in request.source.frames(episode, camera):
                if count == steps:
                    return f"{name} has more {short} frames than its {steps} steps", []
                if file is None:
                    encoded.append(encode_jpeg(frame))
                else:
                    file.seek(((row + count) * cameras + camera) * frame.nbytes)
                    file.write(frame)
                count += 1
    except BadEpisode as error:
        return str(error), []
    return f"{name} has {count} {short} frames for its {steps} steps" if count < steps else None, encoded


def _run(tasks: list[_Task], request: StoreRequest) -> Iterator[tuple[_Task, str | None, list[bytes]]]:
    """Do the tasks, in this process or in several, under one progress bar."""
    from tqdm import tqdm

    isolated, workers = request.source.isolated, request.workers
    frames = sum(len(task.episode) for task in tasks)
    if workers is None:  # isolated sources have started their processes already
        workers = cores() if isolated else min(cores(), frames // FRAMES_PER_WORKER)
    workers = max(1, min(workers, len(tasks)))
    if workers == 1 and not isolated:
        results = ((task, _read_frames(*task)) for task in tasks)
    else:
        results = guarded_map(
            _read_frames, tasks, workers, lambda task: SECONDS_PER_FRAME * len(task.episode)
        )
    name = Path(request.info.source).name
    with tqdm(total=frames, unit="frame", desc=f"ingest {name}") as bar, closing(results):
        for task, result in results:
            if isinstance(result, Died):
                short = request.info.cameras[task.camera].short
                result = f"Episode {task.episode.index}, camera {short}: {result}", []
            yield task, *result
            bar.update(len(task.episode))
