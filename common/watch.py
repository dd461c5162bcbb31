"""What keeps a run from being lost: signals, a time limit, processes that hang or die."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from common.errors import EXIT_HUNG

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_REQUEST_SECONDS = 2.0  # a terminal's Ctrl-C reaches a process directly and once more by its launcher
POLL_SECONDS = 5.0

_started = time.monotonic()  # of the process: --max-time counts from here


def patience(hang_timeout: float) -> timedelta:
    """How long collectives wait: longer than `HangWatch`, which can say what hangs."""
    return timedelta(seconds=2 * hang_timeout or 10**7)


class StopRequests:
    """Asks a run to stop: on SIGTERM, SIGINT or SIGUSR1, or when its time is over.

    The first signal lets the step finish; all processes agree on the step. A second one exits at once.

    Args:
        rank, world: this process and how many there are; all of them make one.
        max_time: hours that the process may take, if there is a limit.
        hang_timeout: see `patience`.
    """

    def __init__(self, rank: int, world: int, max_time: float | None, hang_timeout: float):
        self.reason: str | None = None
        """Why this process was asked to stop; None if it was not."""
        self._rank = rank
        self._deadline = None if max_time is None else _started + 3600 * max_time
        # On the CPU, so that nothing waits for the device.
        self._group = (
            distributed.new_group(backend="gloo", timeout=patience(hang_timeout)) if world > 1 else None
        )
        self._pending = None
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._listen()

    def _listen(self) -> None:
        """Take over signals.

        Their numbers are also written to a socket, at once: Python's own handlers wait until the main thread
        is back from C, where it may hang.
        """
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        receiving, self._sending = socket.socketpair()
        self._sending.setblocking(False)
        signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_exit_on_second, args=(receiving,), name="signals", daemon=True).start()

    def _note(self, number: int, frame) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self._rank == 0:  # not `print`, which a signal may have interrupted
                _write_raw(f"\n{self.reason}: the step is finished and saved; once more to exit at once\n")

    def agreed(self) -> bool:
        """Whether all processes stop after this step; called once a step by all of them.

        With several processes the answer is that of the step before: it has crossed the network meanwhile.
        """
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "time is over"
        if self._group is None:
            return self.reason is not None
        stop = self._answer()
        flag = torch.tensor([int(self.reason is not None)])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = work, flag
        return stop

    def _answer(self) -> bool:
        if self._pending is None:
            return False
        work, flag = self._pending
        work.wait()
        return bool(flag.item())

    def close(self, leaving: bool) -> None:
        """Give signals back.

        Args:
            leaving: the process is about to exit: a signal that others have had already must not end it.
        """
        if self._group is not None:
            self._answer()
            distributed.barrier(self._group)  # a launcher ends the others as soon as the first has left
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_IGN if leaving else handler)
            signal.set_wakeup_fd(-1)
            self._sending.close()


def _exit_on_second(receiving: socket.socket) -> None:
    """Read the numbers of signals that come; exit at the second one, if it is a request of its own."""
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
    """A thread that ends the process when a process of the run makes no progress, and names that process.

    The threads of all processes tell each other, every few seconds, how far their process is: all wait for
    the one that is behind, and a process that is lost, or stopped as a whole, does not answer.

    Args:
        run: its `progress_mark` is (count of what was done, what is being done now). Held weakly: a run that
            ended by an exception is not watched any more.
        rank, world: this process and how many there are.
        timeout: seconds without progress after which processes exit with code 70; 0 waits for ever.
    """

    def __init__(self, run, rank: int, world: int, timeout: float):
        self.run, self.rank, self.world, self.timeout = weakref.ref(run), rank, world, timeout
        self.interval = min(POLL_SECONDS, timeout / 4)
        self.closing = threading.Event()
        self.group = self.thread = None
        if timeout:
            if world > 1:
                limit = timedelta(seconds=timeout + 2 * self.interval)
                self.group = distributed.new_group(backend="gloo", timeout=limit)
            self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self.thread.start()

    def close(self) -> None:
        """Stop watching; called by all processes at about the same time."""
        self.closing.set()
        if self.thread is not None:
            self.thread.join()

    def _watch(self) -> None:
        stalled, seen, before = 0.0, None, time.monotonic()
        while True:
            closing = self.closing.wait(self.interval)
            run = self.run()
            if run is None:
                return
            mark = (*run.progress_mark, closing)
            del run
            try:
                marks = self._exchange(mark)
            except RuntimeError as error:
                self._end(*_blame(str(error)), stalled=self.timeout)
            if all(closing for _, _, closing in marks):
                return
            # Not more than two intervals at once: time in which the machine slept does not count.
            now = time.monotonic()
            stalled, before = stalled + min(now - before, 2 * self.interval), now
            if marks != seen:
                stalled, seen = 0.0, marks
            if stalled > self.timeout:
                behind = min(marks)[:2]
                ranks = [rank for rank, mark in enumerate(marks) if mark[:2] == behind]
                self._end(ranks, f"has not come further than {behind[1]!r}", stalled)

    def _exchange(self, mark: tuple[int, str, bool]) -> list[tuple[int, str, bool]]:
        """The marks of all processes. Raises RuntimeError if one does not answer."""
        if self.group is None:
            return [mark]
        limit = timedelta(seconds=self.timeout)
        distributed.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True)
        marks = [mark] * self.world
        distributed.all_gather_object(marks, mark, group=self.group)
        return marks

    def _end(self, blamed: list[int], what: str, stalled: float) -> None:
        """Say who is to blame, and exit."""
        speaker = min(set(range(self.world)) - set(blamed), default=0)
        if blamed and self.rank == speaker:
            shown = ", ".join(map(str, blamed[:8])) + (f" and {len(blamed) - 8} more" if blamed[8:] else "")
            _write_raw(
                f"error: process {shown} of {self.world} {what}; nothing has moved for {stalled:.0f} s "
                f"(--hang-timeout): the job ends here, continue from the last checkpoint with --resume.\n"
            )
        if self.rank in (speaker, *blamed):
            _write_raw(f"where process {self.rank} stands:\n")
            faulthandler.dump_traceback(sys.__stderr__.fileno())
        time.sleep(self.interval)  # the others speak as well before a launcher ends them
        os._exit(EXIT_HUNG)


def _blame(error: str) -> tuple[list[int], str]:
    """Ranks that torch says did not answer; none where another process has spoken already and left."""
    lost = "does not answer (it hangs, or is lost)"
    if found := re.search(r"Ranks? ([\d, ]+) failed to pass", error):
        return [int(rank) for rank in found[1].split(",")], lost
    return [0] if "Timed out" in error else [], lost


def _write_raw(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
