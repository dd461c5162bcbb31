"""Write an episode store: decodes episodes in parallel, each exactly once, and resumes if interrupted.

`episodes.jsonl` assigns rows to every episode before it is decoded, and records its checksum once its frames
are on the disk: an interrupted ingest decodes only episodes without a checksum. Rows are never reassigned,
since somebody may be reading them. If a dataset has grown, its earlier store moves to the new name and is
completed there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from common.console import is_quiet, say
from common.data.features import forget
from common.data.rows import ROWS, JpegRows, RawRows, Storage, as_jpeg, encode_jpeg
from common.data.source import BadEpisode, Episode, Info, Source, existing
from common.data.store import ARRAYS, FORMAT, FRAMES, META, OF_EPISODES, OF_STEPS, EpisodeStore, defect
from common.data.workers import Died, cores, guarded_map, refuse_inside_worker
from common.errors import UserError
from common.files import read_json, require_space, sync_one, write_whole, writing_below

RECORDS = "episodes.jsonl"
FRAMES_PER_WORKER = 2500  # a worker takes some seconds to start: fewer frames do not justify one more
SECONDS_PER_FRAME = 0.5  # slower than any disk: reading that takes longer has hung
JPEG_RATIO = 5  # raw bytes per JPEG byte, at least: to estimate the free space needed


@dataclass(frozen=True)
class StoreRequest:
    """A request for a store.

    Attributes:
        storage: how to keep frames; `auto` keeps what an existing store has, else takes raw pixels if they
            fill at most half of the free disk.
        episodes: numbers of the episodes to keep, ascending; None: all.
        workers: decoding processes; None: as many as are worth starting.
    """

    source: Source
    info: Info
    storage: Storage | Literal["auto"] = "raw"
    episodes: tuple[int, ...] | None = None
    skip_bad: bool = False
    workers: int | None = None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W), the frames of one step."""
        return (len(self.info.cameras), 3, *self.info.image_size)

    def rows(self, path: Path) -> RawRows:
        """The frames of the store in the folder `path`."""
        return ROWS[self.storage](path / FRAMES, self.row_shape)

    def found_below(self, root: Path) -> StoreRequest | None:
        """The request, with the storage of the finished or unfinished store; None without a store."""
        storages = ROWS if self.storage == "auto" else [self.storage]
        requests = [replace(self, storage=storage) for storage in storages]
        return next((request for request in requests if request.folder(root).is_dir()), None)

    def choices(self) -> dict[str, Any]:
        """All choices that determine a store's content, as they are after a round trip through JSON."""
        chosen = {name: getattr(self.info, name) for name in ("image_size", "fps", "choices")}
        chosen |= {"cameras": [camera.key for camera in self.info.cameras]}
        chosen |= {"storage": self.storage, "episodes": self.episodes}
        return json.loads(json.dumps(chosen))

    def folder(self, root: Path) -> Path:
        """The store's folder: named after the source for people, but found by its content's hash only."""
        content = json.dumps([FORMAT, self.info.fingerprint, self.choices()], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        present = [path for path in root.glob(f"*-{key}") if path.is_dir()]
        name = "".join(c if c.isalnum() or c in "_." else "-" for c in Path(self.info.source).name)[:60]
        return min(present, default=root / f"{name}-{key}")


def ensure_store(root: Path, request: StoreRequest) -> EpisodeStore:
    """The store below `root`, built if missing; only one of several processes builds it.

    A store of all episodes also serves a request for some of them.

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
            if defect(path) is not None:  # nobody else has built it in the meantime
                _build(path, request)
    store = EpisodeStore.open(path)
    if request.info.tables_fingerprint is not None:
        store = replace(store, source_fingerprint=request.info.tables_fingerprint)
    reasons = {int(_number(reason)): reason for reason in store.skipped}
    wanted = existing(request.episodes, [*store.episode_indices.tolist(), *reasons], store.source)
    chosen = store if request.episodes is None else store.select(request.episodes)
    left_out = [reason for number, reason in reasons.items() if number in wanted]
    if left_out and not request.skip_bad:
        raise _refusal(left_out)
    if not chosen.num_episodes:
        raise _none_left(store.source, left_out)
    if left_out:
        say(f"left out {len(left_out)} of {len(wanted)} episodes, which are unusable:")
        for reason in left_out:
            say(f"  {reason}")
    return chosen


def _settle_storage(root: Path, request: StoreRequest) -> StoreRequest:
    """Decide `auto`, once: the first of several processes creates a folder that records the choice."""
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
    """The lock file of the store `path`, for building, moving or deleting it."""
    return path.with_name(f".{path.name.rpartition('-')[2]}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from building the same store."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file(path))
    with writing_below(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process, which is building the episode store {path}")
            held = lock.acquire()
    with held:
        yield


def _refusal(reasons: Sequence[str]) -> UserError:
    others = [_number(reason) for reason in reasons[1:]]
    some = ", ".join(others[:30]) + f" and {len(others) - 30} more" * (len(others) > 30)
    more = f" (also unusable: {some})" if others else ""
    return UserError(f"{reasons[0]}{more}: repair it, or leave it out with --skip-bad-episodes.")


def _number(reason: str) -> str:
    """The episode that a clause is about: it begins with "Episode 3"."""
    return reason.split()[1].strip(",:")


def _none_left(source: str, reasons: Sequence[str]) -> UserError:
    return UserError(f"{source} has no usable episode left ({reasons[0] if reasons else 'it is empty'}).")


class Record(NamedTuple):
    """Where an episode's frames are, and the hash of everything else in it: a line of `episodes.jsonl`."""

    index: int
    digest: str
    row: int
    length: int
    crc32: int | None = None
    """Checksum of its rows; None until they are on the disk."""

    @property
    def end(self) -> int:
        return self.row + self.length


def read_records(path: Path) -> dict[int, Record]:
    """The episodes that have rows in the store `path`, by number; the last line about each counts."""
    records = {}
    with suppress(FileNotFoundError):
        for line in (path / RECORDS).read_text(errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # cut off by a kill
                record = Record(**json.loads(line))
                records[record.index] = record
    return records


def _lines(records: Iterable[Record]) -> str:
    return "".join(f"{json.dumps(record._asdict())}\n" for record in records)


def _build(path: Path, request: StoreRequest) -> None:
    """Decode missing episodes, then write the arrays and, last, `meta.json`."""
    usable, bad = request.source.episodes(request.episodes)
    if bad and not request.skip_bad:
        raise _refusal(bad)
    if (path / META).exists():
        _forget_damaged(path, request)
    if all(record.crc32 is None for record in read_records(path).values()):
        _take_over(path, request, usable)
    records = read_records(path)
    end = max((record.end for record in records.values()), default=0)
    for episode in usable:
        old, digest = records.get(episode.index), episode.digest()
        if old is None or old.digest != digest:
            records[episode.index] = Record(episode.index, digest, end, len(episode))
            end += len(episode)
    missing = [episode for episode in usable if records[episode.index].crc32 is None]
    needed = sum(map(len, missing)) * math.prod(request.row_shape)
    needed = needed // JPEG_RATIO if request.storage == "jpeg" else needed
    needed += sum(getattr(episode, name).nbytes for episode in usable for name in OF_STEPS)
    remedy = "a smaller --image-size" + " or --store jpeg" * (request.storage == "raw")
    require_space(path.parent, needed, "The episode store needs", remedy)
    try:
        with writing_below(path.parent, remedy):
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / RECORDS, _lines(records.values()).encode())
            ROWS[request.storage].make_room(path / FRAMES, end, request.row_shape)
            failed = _decode(path, request, missing, records)
            _finish(path, request, usable, bad + failed)
    finally:
        for leftover in path.glob("*.part"):
            leftover.unlink(missing_ok=True)
        if all(record.crc32 is None for record in read_records(path).values()):
            shutil.rmtree(path, ignore_errors=True)


# What is there already


def _forget_damaged(path: Path, request: StoreRequest) -> None:
    """Mark episodes of a finished store that differ from their checksums, to be decoded again."""
    records, whole = read_records(path), set()
    with suppress(OSError, ValueError):  # no frames at all
        rows = request.rows(path)
        whole = {r for r in records.values() if rows.checksum(r.row, r.length) == r.crc32}
    kept = [r if r in whole else r._replace(crc32=None) for r in records.values()]
    write_whole(path / RECORDS, _lines(kept).encode())
    for record in set(records.values()) - whole:
        for folder in path.glob("features-*"):
            forget(folder, np.arange(record.row, record.end))
    (path / META).unlink()


def _take_over(path: Path, request: StoreRequest, episodes: list[Episode]) -> None:
    """Move the store of an earlier state of the grown dataset here; of several, the one with most episodes.

    A dataset has grown if it still has everything that was stored, and more. The store loses `meta.json`
    first, so it never looks finished. Processes that read it keep its files.
    """
    from filelock import FileLock, Timeout

    mine, by_index = request.choices(), {episode.index: episode for episode in episodes}
    digests, found = {(episode.index, episode.digest()) for episode in episodes}, []
    for file in path.parent.glob(f"*/{META}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged
            meta = read_json(file)
            theirs = meta["choices"] | ({"episodes": None} if request.episodes is None else {})
            stored = [record for record in read_records(file.parent).values() if record.crc32 is not None]
            fits = (meta["format"], meta["source"], theirs) == (FORMAT, request.info.source, mine)
            if fits and stored and {(record.index, record.digest) for record in stored} < digests:
                found.append((len(stored), file, stored))
    _, file, stored = max(found, default=(0, None, []))
    if file is None or not _same_frames(file.parent, stored, by_index, request):
        return
    with suppress(Timeout, FileNotFoundError), FileLock(lock_file(file.parent), timeout=0):
        file.unlink()  # not found: another process has taken it
        shutil.rmtree(path, ignore_errors=True)
        file.parent.rename(path)


def _same_frames(
    path: Path, stored: list[Record], episodes: dict[int, Episode], request: StoreRequest
) -> bool:
    """Whether every stored episode still begins with the same frames: equal numbers do not prove it."""
    if request.source.isolated:
        return True  # the digests of its episodes hold a hash of their files
    frames = np.empty((1, *request.row_shape), np.uint8)
    try:
        rows = request.rows(path)
        for record in stored:
            rows.read(np.array([record.row]), frames, np.array([0]))
            if another_frame(frames, episodes[record.index], request):
                return False
    except (BadEpisode, OSError, ValueError):
        return False
    return True


def another_frame(stored: Iterable[np.ndarray], episode: Episode, request: StoreRequest) -> str | None:
    """Where the frames (N, 3, H, W) of an episode's first steps differ from the source; None if nowhere."""
    views = [request.source.frames(episode, camera) for camera in range(len(request.info.cameras))]
    for step, frames in enumerate(stored):
        for camera, mine, view in zip(request.info.cameras, frames, views, strict=True):
            frame = next(view, None)
            if frame is not None and request.storage == "jpeg":
                frame = as_jpeg(frame)
            if not np.array_equal(mine, frame):
                return f"camera {camera.short} at step {step}"
    return None


# What is missing


def _decode(
    path: Path, request: StoreRequest, missing: list[Episode], records: dict[int, Record]
) -> list[str]:
    """Decode episodes and record each one; returns what is wrong with those that cannot be decoded."""
    from tqdm import tqdm

    tasks = [(episode, records[episode.index].row, path, request) for episode in missing]
    isolated, workers, cameras = request.source.isolated, request.workers, len(request.info.cameras)
    frames, failed = sum(map(len, missing)) * cameras, []
    if workers is None:  # isolated sources have already started their processes
        workers = cores() if isolated else min(cores(), frames // FRAMES_PER_WORKER)
    workers = max(1, min(workers, len(tasks)))
    if workers == 1 and not isolated:
        results = ((task, _read_frames(*task)) for task in tasks)
    else:
        seconds = SECONDS_PER_FRAME * cameras
        results = guarded_map(_read_frames, tasks, workers, lambda task: seconds * len(task[0]))
    name = Path(request.info.source).name
    with tqdm(total=frames, unit="frame", desc=f"ingest {name}", disable=is_quiet()) as bar, closing(results):
        for (episode, *_), result in results:
            if isinstance(result, list):
                _keep(path, request, records[episode.index], result)
            else:
                fault = f"Episode {episode.index}: {result}" if isinstance(result, Died) else result
                failed.append((episode.index, fault))
                if not request.skip_bad:
                    raise _refusal([fault])
            bar.update(len(episode) * cameras)
    return [fault for _, fault in sorted(failed)]


def _read_frames(episode: Episode, row: int, path: Path, request: StoreRequest) -> list[list[bytes]] | str:
    """Write an episode's frames to the store, or return them as JPEG by camera, or return what is wrong."""
    cameras, raw = request.info.cameras, request.storage == "raw"
    encoded: list[list[bytes]] = [[] for _ in cameras]
    try:
        with (path / FRAMES).open("r+b") as file:
            for number, camera in enumerate(cameras):
                count = 0
                for frame in request.source.frames(episode, number):
                    if count < len(episode) and raw:
                        file.seek(((row + count) * len(cameras) + number) * frame.nbytes)
                        file.write(frame)
                    elif count < len(episode):
                        encoded[number].append(encode_jpeg(frame))
                    count += 1
                if count != len(episode):
                    frames = f"{count} {camera.short} frames for its {len(episode)} steps"
                    return f"Episode {episode.index} has {frames}"
    except BadEpisode as error:
        return str(error)
    return encoded


def _keep(path: Path, request: StoreRequest, record: Record, views: list[list[bytes]]) -> None:
    """Flush an episode's frames to the disk, and only then write its checksum to the records."""
    if request.storage == "jpeg":
        JpegRows.append(path / FRAMES, record.row, views)
    for file in ROWS[request.storage].files(path / FRAMES):
        sync_one(file)
    crc32 = request.rows(path).checksum(record.row, record.length)
    with (path / RECORDS).open("a") as file:
        file.write(_lines([record._replace(crc32=crc32)]))
        file.flush()
        os.fsync(file.fileno())


def _finish(path: Path, request: StoreRequest, usable: list[Episode], bad: list[str]) -> None:
    """Write the arrays, then `meta.json`, which marks the store as finished."""
    from safetensors.numpy import save

    records = read_records(path)
    found = [episode for episode in usable if records[episode.index].crc32 is not None]
    if not found:
        raise _none_left(request.info.source, bad)
    places = zip(*((e.index, records[e.index].row, records[e.index].crc32) for e in found), strict=True)
    arrays = {name: np.array(place, np.int64) for name, place in zip(OF_EPISODES, places, strict=True)}
    arrays |= {name: np.concatenate([getattr(episode, name) for episode in found]) for name in OF_STEPS}
    arrays["episode_starts"] = np.cumsum([0, *map(len, found)], dtype=np.int64)
    payload = save(arrays)
    write_whole(path / ARRAYS, payload)
    files = [path / ARRAYS, *ROWS[request.storage].files(path / FRAMES)]
    meta = {
        "format": FORMAT,
        **asdict(request.info),
        "storage": request.storage,
        "choices": request.choices(),
        "skipped": bad,
        "episode_tasks": [episode.task for episode in found],
        "bytes": {file.name: file.stat().st_size for file in files},
        "arrays_crc32": zlib.crc32(payload),
    }
    write_whole(path / META, json.dumps(meta, indent=1).encode())
