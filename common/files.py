"""Writes files whole or not at all, makes sure that they are on disk, and handles full disks."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from common.console import say
from common.errors import Busy, UserError

CHECKSUMS = "checksums.json"  # of a checkpoint: written after all its other files
WAIT_SILENTLY = 2.0  # seconds
LEFT_SECONDS = 90.0  # in which a file system gives up the locks of a machine that was lost
SETTLED_SECONDS = 2.0  # file systems round times to up to two seconds
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if interrupted or if other processes write it too."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all; numbers that are not finite are an error."""
    write_whole(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file; an OSError if it cannot be read, a ValueError if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def completed_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of a run's completely written checkpoints, by step; one may have been damaged since."""
    folder = (Path(run_dir).expanduser() / "checkpoints").resolve()
    return sorted(path for path in folder.glob("step_*") if (path / CHECKSUMS).is_file())


def checksum(path: Path) -> int:
    """CRC-32 of a file: detects damage, at several GB/s."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def unchanged_while(files: Iterable[Path]) -> list | None:
    """Names, sizes, inodes and times of files, as JSON: they stay the same as long as the files do.

    None if one was changed in the last seconds: another change right now could leave its times the same.
    """
    found = [(str(file), file.stat()) for file in files]
    if any(abs(time.time() - status.st_ctime) < SETTLED_SECONDS for _, status in found):
        return None
    return [[name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in found]


def computed_once(path: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """The value of `compute`, as JSON, cached in the file `path` for calls with the same key.

    Other processes that ask for it meanwhile wait, then read it. A file that is damaged or has another key is
    ignored and replaced. Without a key (None), or where nothing can be written, nothing is cached.
    """
    from filelock import FileLock, Timeout

    if key is None:
        return compute()
    key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if (value := _kept(path, key)) is not None:
        return value
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=WAIT_SILENTLY)
        except Timeout:
            say(f"waiting for another process, which computes {path}")
            held = lock.acquire()
    except OSError:  # a folder that cannot be written
        held = nullcontext()
    with held:
        if (value := _kept(path, key)) is None:
            value = compute()
            with suppress(OSError):
                content = {"key": key, "crc32": zlib.crc32(json.dumps(value).encode()), "value": value}
                write_whole(path, json.dumps(content).encode())
    return value


def _kept(path: Path, key: str) -> Any:
    """The value that `computed_once` cached under a key; None if there is none, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(path)
        if (found["key"], found["crc32"]) == (key, zlib.crc32(json.dumps(found["value"]).encode())):
            return found["value"]
    return None


def hold(lock: Path, folder: Path, patience: float = LEFT_SECONDS) -> IO[str]:
    """Keep other processes from using a folder, until the returned file is closed or this process ends.

    Waits up to `patience` seconds for a process that is ending, or a machine that was lost. Does nothing
    where the file system has no locks.

    Args:
        lock: the file to lock.

    Raises:
        Busy: if another process still uses it.
        UserError: if the lock cannot be written.
    """
    with writing_below(folder, elsewhere="another folder, such as a copy"):
        file = lock.open("a+")
    end, said = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept by forked children
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return file
        file.seek(0)
        holder = file.read() or "another process"
        if time.monotonic() >= end:
            file.close()
            raise Busy(f"{folder} is in use by {holder}: stop that one, or choose another folder.")
        if not said:
            say(f"waiting for {holder}, which uses {folder}")
            said = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def walk(
    root: Path, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`Path.walk` from the top, in order, which follows links to folders last.

    Each folder is visited once, and no link to one that contains it: links cannot lead in circles.
    """
    visited, starts = set(), [root]
    for start in starts:  # grows
        for folder, below, names in start.walk(on_error=on_error, follow_symlinks=True):
            real = folder.resolve()
            if real in visited:
                below.clear()
                continue
            visited.add(real)
            yield folder, below, names
            links = [folder / name for name in sorted(below) if (folder / name).is_symlink()]
            starts += [link for link in links if not real.is_relative_to(link.resolve())]
            below[:] = sorted({*below} - {link.name for link in links})


def sync(folder: Path) -> None:
    """Wait until all files below a folder are on disk, not only in the page cache."""
    for path in [*folder.rglob("*"), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """Wait until a file is on disk or, for a folder, the names of what it holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raise a UserError if the disk of a folder has no space for `needed` bytes.

    Its message begins with `what`, such as "The store needs", and suggests `remedy`, which needs less.
    """
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise UserError(
            f"{what} {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free: free disk "
            f"space, move --cache-dir, or choose {remedy}."
        )


def allow_many_open() -> None:
    """Raise the limit of open files to the system's maximum; it usually starts at 1,024."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a system that states no limit, but has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))


@contextmanager
def writing_below(
    folder: Path, smaller: str = "a smaller --image-size", elsewhere: str = "another --cache-dir"
) -> Iterator[None]:
    """In this block, a full or read-only disk is a UserError, which suggests the other arguments."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {folder} is full: free disk space, move --cache-dir, or choose {smaller}."
            ) from error
        if error.errno in READ_ONLY:
            raise UserError(f"{folder} cannot be written ({error.strerror}): choose {elsewhere}.") from error
        raise
