"""Processes that read datasets. One that dies or hangs on a damaged file costs that file, not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from common.errors import UserError

STALL_SECONDS = 60.0  # a task counts as hung after this, plus the time it says it needs


class Died(Exception):
    """A task killed its process or hung; the message, a clause, says which."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_inside_worker() -> None:
    """Refuse to open a dataset while a worker imports the program: it would wait for its own parent."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError("A program that opens a dataset must do so under `if __name__ == '__main__':`.")


@contextmanager
def kept_pool() -> Iterator[None]:
    """In this block, calls of `guarded_map` share their processes, which take seconds to start."""
    _pool.users += 1
    try:
        yield
    finally:
        _pool.users -= 1
        if _pool.users == 0:
            _pool.stop()


def guarded_map(
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    workers: int,
    seconds: Callable[[tuple], float] = lambda task: 0.0,
) -> Iterator[tuple[tuple, Any]]:
    """Call `function(*task)` for every task in other processes; yields (task, result) as they finish.

    Tasks start in order. Closing the iterator stops the running ones. The result is a `Died` if a task
    killed its process or took `seconds(task)` longer than `STALL_SECONDS`; other exceptions are raised here.
    """
    from pebble import ProcessExpired

    with kept_pool():
        pool, pending = _pool.of_size(workers), {}
        try:
            for task in tasks:
                limit = STALL_SECONDS + seconds(task)
                pending[pool.schedule(function, task, timeout=limit)] = task, limit
            for future in as_completed(pending):
                task, limit = pending.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise UserError(
                        "The processes that read the dataset die at once, usually from lack of memory: start "
                        "again with fewer --ingest-workers; finished work is kept."
                    ) from error
                except TimeoutError:
                    result = Died(f"reading did not end within {limit:.0f} s")
                except ProcessExpired as error:
                    code = error.exitcode or 0
                    by = f"signal {-code}" if code < 0 else f"exit code {code}"
                    result = Died(f"the process that read it ended with {by}: damage or too little memory")
                yield task, result
        finally:
            for future in pending:
                future.cancel()


class _Pool:
    """The processes, as long as anyone uses them."""

    users, size, pool = 0, 0, None

    def of_size(self, size: int):
        from pebble import ProcessPool

        refuse_inside_worker()
        if self.pool is not None and (size > self.size or not self.pool.active):
            self.stop()
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
            self.size, self.pool = size, ProcessPool(size, initializer=_start, context=context)
        return self.pool

    def stop(self) -> None:
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
            self.pool = None


_pool = _Pool()


def _start() -> None:
    """In a worker: leave Ctrl-C to the parent, and exit with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
