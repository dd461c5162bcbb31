"""What keeps a run from being lost: signals, a time limit, processes that hang or die."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from common.errors import EXIT_HUNG

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_REQUEST_SECONDS = 2.0  # a terminal's Ctrl-C reaches a process directly and again through its launcher
POLL_SECONDS = 5.0
PREPARING = "preparing the data"
"""Work that may take hours: no watch ends the process that does it, nor those that wait for it."""

Told = dict[int, tuple[int, int, str]]
"""For each process: ticks of its watch, count of what it has done, what it does now."""

_started = time.monotonic()  # of the process: --max-time counts from here


def patience(hang_timeout: float) -> timedelta:
    """How long collectives wait: longer than `HangWatch`, which can say what hangs."""
    return timedelta(seconds=2 * hang_timeout or 10**7)


@contextmanager
def meeting(hang_timeout: float) -> Iterator[None]:
    """In this block, processes find each other: one that waits longer than `hang_timeout` exits with code 70.

    Before they have met, none can tell which one is missing.
    """
    me, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")

    def give_up() -> None:
        _write_raw(
            f"error: process {me} of {world} has waited {hang_timeout:.0f} s for the others to start "
            f"(--hang-timeout): look at their logs, and at the address and port that all were given.\n"
        )
        os._exit(EXIT_HUNG)

    timer = threading.Timer(hang_timeout, give_up)
    timer.daemon = True
    if hang_timeout:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class StopRequests:
    """Asks a run to stop: on SIGTERM, SIGINT or SIGUSR1, or after `max_time` hours.

    The first signal lets the step finish; all processes agree on the step. A second one exits at once.
    """

    def __init__(self, rank: int, world: int, max_time: float | None, hang_timeout: float):
        self.reason: str | None = None
        """Why this process was asked to stop; None if it was not."""
        self.ready = 0
        """The largest number that a process has given to `agreed`, the same in all of them."""
        self._rank = rank
        self._deadline = None if max_time is None else _started + 3600 * max_time
        self._group = self._pending = None
        if world > 1:  # on the CPU, so that nothing waits for the device
            self._group = distributed.new_group(backend="gloo", timeout=patience(hang_timeout))
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
            # Python's own handlers run only once the main thread is back from C, where it may hang; signal
            # numbers are written to this socket at once.
            receiving, self._sending = socket.socketpair()
            self._sending.setblocking(False)
            signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=_exit_on_second, args=(receiving,), name="signals", daemon=True).start()

    def _note(self, number: int, frame) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self._rank == 0:  # not `print`, which a signal may have interrupted
                _write_raw(f"\n{self.reason}: finishing this step, then saving; once more to exit at once\n")

    def agreed(self, ready: int = 0) -> bool:
        """Whether all processes stop after this step; called once a step by all of them. Also sets `ready`.

        With several processes the answer is from the step before, and has crossed the network meanwhile.
        """
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "time is over"
        if self._group is None:
            self.ready = ready
            return self.reason is not None
        stop = self._answer()
        told = torch.tensor([int(self.reason is not None), ready])
        work = distributed.all_reduce(told, distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = work, told
        return stop

    def _answer(self) -> bool:
        if self._pending is None:
            return False
        work, told = self._pending
        work.wait()
        stop, self.ready = told.tolist()
        return bool(stop)

    def close(self, leaving: bool) -> None:
        """Restore signal handlers; if `leaving`, about to exit, ignore signals that others already got."""
        if self._group is not None:
            self._answer()
            distributed.barrier(self._group)  # a launcher ends the others as soon as the first has left
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_IGN if leaving else handler)
            signal.set_wakeup_fd(-1)
            self._sending.close()


def _exit_on_second(receiving: socket.socket) -> None:
    """Read the numbers of signals that come; exit at the second one, if it is a separate request."""
    first = None
    while received := receiving.recv(1):
        if received[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > SAME_REQUEST_SECONDS:
            os._exit(128 + received[0])


class HangWatch:
    """A thread that ends the process when it makes no progress, and names the process to blame.

    Each process tells the others, through the store by which they found each other, how far it is and that
    its thread is alive. All wait for the one that is behind. Time during which the whole process was stopped
    (Ctrl-Z, a laptop's lid) does not count.

    It watches a run from the moment its processes have met (before that: `meeting`) to its end. It ignores
    only what a script does before `Run.prepare`: reading or decoding data, computing features and downloading
    models take as long as they take, and downloads have their own time limits.

    Args:
        run: its `progress_mark` is (count of what was done, what is being done now). Held weakly: a run that
            ended by an exception is not watched any more.
        timeout: seconds without progress after which the process exits with code 70; 0 waits forever.
    """

    def __init__(self, run, rank: int, world: int, timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        self.run = weakref.ref(run)
        self.interval = min(POLL_SECONDS, timeout / 4)
        self.done = threading.Event()
        self.store = None
        if world > 1 and timeout:
            self.store = distributed.distributed_c10d._get_default_store().clone()
            self.store.set_timeout(timedelta(seconds=max(self.interval, 1.0)))
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        if timeout:
            self.thread.start()

    def close(self) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        stalled, seen, ticks, earlier = 0.0, -1, 0, None
        while True:
            before = time.monotonic()
            if self.done.wait(self.interval):
                return
            run = self.run()
            if run is None:
                return
            self.progress = run.progress_mark
            del run
            count, where = self.progress
            # Not more than two intervals at once: this thread may have been stopped along with the rest.
            stalled += min(time.monotonic() - before, 2 * self.interval)
            if count != seen or where == PREPARING:
                stalled, seen, earlier = 0.0, count, None
            ticks += 1
            self._tell(ticks)
            if earlier is None and stalled > self.timeout / 2:
                earlier = self._others()
            if stalled > self.timeout:
                now = self._others()
                others = (rank for rank in range(self.world) if rank != self.rank)
                silent = [r for r in others if r not in now or now[r][0] == earlier.get(r, (-1,))[0]]
                if any(at == PREPARING for rank, (_, _, at) in now.items() if rank not in silent):
                    stalled, earlier = 0.0, None
                else:
                    self._end(stalled, silent, now)

    def _tell(self, ticks: int) -> None:
        if self.store is not None:
            count, where = self.progress
            with suppress(RuntimeError):  # the store's process may be gone or stopped: `_others` will show
                self.store.set(f"watch/{self.rank}", f"{ticks} {count} {where}")

    def _others(self) -> Told:
        """Of each process that has reported: ticks of its thread, progress, and whereabouts."""
        if self.store is None:
            return {0: (0, *self.progress)}
        found = {}
        with suppress(RuntimeError):
            for rank in range(self.world):
                if self.store.check([f"watch/{rank}"]):
                    ticks, count, where = self.store.get(f"watch/{rank}").decode().split(" ", 2)
                    found[rank] = int(ticks), int(count), where
        return found

    def _end(self, stalled: float, silent: list[int], now: Told) -> None:
        """Say who is silent or behind, and exit."""
        least = min((count for _, count, _ in now.values()), default=0)
        behind = [rank for rank, (_, count, _) in now.items() if count == least]
        if silent:
            what = f"process {_listed(silent)} of {self.world} does not answer (it hangs, or is lost)"
        else:
            where = now[behind[0]][2] if behind else "starting"
            what = f"process {_listed(behind)} of {self.world} has not got past {where!r}"
        first = self._is_first()
        if first:
            _write_raw(
                f"error: {what}; nothing has moved for {stalled:.0f} s (--hang-timeout): the job ends here, "
                f"continue from the last checkpoint with --resume.\n"
            )
        if first or self.rank in behind:
            _write_raw(f"where process {self.rank} stands:\n")
            faulthandler.dump_traceback(sys.__stderr__.fileno())
        time.sleep(2 * self.interval)  # others, which began to wait later, report as well
        os._exit(EXIT_HUNG)

    def _is_first(self) -> bool:
        """Whether this is the first process to end the job: one message is enough."""
        if self.store is not None:
            with suppress(RuntimeError):
                return self.store.add("watch/ended", 1) == 1
        return True


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _write_raw(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
