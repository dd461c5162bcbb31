"""Processes that read datasets. One that dies or hangs on a damaged file costs that file, not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from contextlib import contextmanager
from typing import Any

from common.errors import UserError

STALL_SECONDS = 60.0  # a task may take so long, and what it says it needs on top, before it counts as hung


class Died(Exception):
    """A task ended its process, or would not end; the message, a clause, says which."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_inside_worker() -> None:
    """A worker imports the program anew; to wait there for its own parent would never end."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError("A program that opens a dataset must do so below `if __name__ == '__main__':`.")


@contextmanager
def kept_pool() -> Iterator[None]:
    """Within, calls of `guarded_map` share their processes, which take seconds to start."""
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
    show: Callable[[int], Any] | None = None,
) -> Iterator[tuple[tuple, Any]]:
    """Call `function(*task)` for every task in other processes; yields (task, result) as they come.

    Tasks start in order. Closing the iterator stops those that run.

    Args:
        seconds: what a task may take besides `STALL_SECONDS`.
        show: called about twice a second with the sum of what tasks have passed to `advance`.

    Returns:
        The result is a `Died` where a task killed its process or took too long. Other exceptions of
        `function` are raised here.
    """
    from pebble import ProcessExpired

    queue, pending = iter(tasks), {}
    with kept_pool():
        pool = _pool.of_size(workers)
        before = _pool.done.value

        def submit(count: int) -> None:
            for _, task in zip(range(count), queue, strict=False):
                limit = STALL_SECONDS + seconds(task)
                pending[pool.schedule(function, task, timeout=limit)] = task, limit

        try:
            submit(4 * workers)  # so many and no more, that what belongs together ends together
            while pending:
                finished = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done
                if show:
                    show(_pool.done.value - before)
                for future in finished:
                    task, limit = pending.pop(future)
                    try:
                        yield task, future.result()
                    except TimeoutError:
                        yield task, Died(f"reading did not end within {limit:.0f} s")
                    except ProcessExpired as error:
                        number = -(error.exitcode or 0)
                        by = f"signal {number}" if number > 0 else f"exit code {error.exitcode}"
                        yield (
                            task,
                            Died(f"the process that read it ended with {by}, damage or too little memory"),
                        )
                submit(len(finished))
        finally:
            for future in pending:
                future.cancel()


class _Pool:
    """The processes, while anybody uses them."""

    def __init__(self):
        self.users, self.pool, self.size, self.done = 0, None, 0, None

    def of_size(self, size: int):
        from pebble import ProcessPool

        refuse_inside_worker()
        if self.pool is not None and (size > self.size or not self.pool.active):
            self.stop()
        if self.pool is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
            self.size, self.done = size, context.Value("q", 0)
            self.pool = ProcessPool(size, initializer=_start, initargs=(self.done,), context=context)
        return self.pool

    def stop(self) -> None:
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
            self.pool = None


_pool = _Pool()
_done: Any = None


def advance(count: int) -> None:
    """In a worker: report progress."""
    lock = _done.get_lock()
    if lock.acquire(timeout=1):  # its holder may have been killed
        _done.value += count
        lock.release()


def _start(done) -> None:
    global _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()  # a killed parent cannot stop us
    _done = done
