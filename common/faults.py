"""What keeps a run from being lost: signals, time limits, steps without numbers, processes that hang or die.

Exit codes of the scripts: 0 done, 1 an error that the user can put right, 2 a bad flag, 70 a process hung or
was lost, 71 out of memory, 75 stopped early with everything saved (the same command with `--resume auto` goes
on), 128 + the signal's number when it came twice or before training began.
"""

from __future__ import annotations

import errno
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from common.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

EXIT_HUNG = 70
EXIT_OUT_OF_MEMORY = 71
EXIT_STOPPED = 75
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_REQUEST_SECONDS = 2.0  # a terminal's Ctrl-C reaches a process directly and once more by its launcher
POLL_SECONDS = 5.0

_started = time.monotonic()  # of the process: --max-time counts from here


def say(text: str) -> None:
    """Print a line above the progress bar. A full disk, or a reader that has gone, cannot end a run."""
    with suppress(OSError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


OUT_OF_MEMORY = r"DefaultCPUAllocator: can|out of memory|CU\w+_STATUS_ALLOC_FAILED"
LOST = (
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket closed|ncclRemoteError|"
    r"NCCL communicator was aborted|Timed out waiting"
)


def explain(error: Exception, batch_size: int | None = None) -> tuple[str, int] | None:
    """What to tell a user about an error that the machine made, and the exit code; None for any other."""
    text = " ".join(str(error).split())
    runtime = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (runtime and re.search(OUT_OF_MEMORY, text)):
        smaller = "" if batch_size is None else f" with --batch-size {batch_size}"
        return (
            f"Out of memory{smaller} ({text[:150]}): lower --batch-size and raise --grad-accumulation by as "
            f"much, lower --flow-samples or --image-size, use --mixed-precision bf16, or find what fits with "
            f"--find-batch-size."
        ), EXIT_OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"The disk is full ({error.filename or text}): make room and start again.", 1
    if runtime and re.search(r"DataLoader worker \(pid", text):
        return (
            f"A process that loads data has died ({text[:200]}), as the system does to it when memory is "
            f"short: lower --num-workers, and go on with --resume."
        ), EXIT_HUNG
    if runtime and "does not have a deterministic implementation" in text:
        return f"--deterministic: {text[:200]}: leave the flag out, or what needs this.", 1
    if runtime and re.search(LOST, text):
        return (
            f"The connection to another process was lost ({text[:150]}): its own message says why; go on "
            f"from the last checkpoint with --resume."
        ), EXIT_HUNG
    return None


def or_nan(loss: Tensor) -> Tensor:
    """The loss, or NaN with a gradient of NaN everywhere if it is not finite.

    A loss that has overflown can have a finite gradient. Made NaN, it makes that of all processes NaN when
    DDP averages them, and `GradientClipper` skips the step everywhere, at no further communication.
    """
    # Not `where` on the loss itself: the branch that is not taken would send back 0 * NaN.
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class GradientClipper:
    """Scales gradients to a largest norm, and lets steps whose gradient is not finite do nothing.

    Nothing here waits for the device: what is to be skipped is decided there. After DDP's all-reduce every
    process holds the same gradient, hence all decide alike. Weights, moments and step count stay as they
    were, and so do buffers, which the forward pass has changed already (statistics of batch norm, counts of
    codes). Schedule-free RAdam cannot be told to skip: it takes a step with zero gradient.

    Args:
        policy: its children are the components whose norms are reported.
        optimizer: over their parameters.
        max_norm: of the gradient of all.
    """

    def __init__(self, policy: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        self.policy, self.optimizer, self.max_norm = policy, optimizer, max_norm
        saved = policy.state_dict().keys()  # buffers that are not saved are constants
        self.buffers = [buffer for name, buffer in policy.named_buffers() if name in saved]
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Clip; called once a step, when gradients are complete.

        Returns:
            Norms before clipping: `grad_norm` of the whole, `grad_norm/<component>` of each trained
            component, and `bad_step`, 1 where the gradient was not finite. Scalars on the device.
        """
        norms, parameters = {}, []
        for name, component in self.policy.named_children():
            trained = [p for p in component.parameters() if p.grad is not None]
            if trained:
                norms[f"grad_norm/{name}"] = nn.utils.get_total_norm([p.grad for p in trained])
                parameters += trained
        total = torch.stack(list(norms.values())).norm()
        bad = ~torch.isfinite(total)
        nn.utils.clip_grads_with_norm_(parameters, self.max_norm, total)
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = bad.float()  # the fused kernel leaves everything alone
            self.optimizer.grad_scale = None
        else:
            for parameter in parameters:
                parameter.grad = torch.where(bad, 0.0, parameter.grad)
        if self.buffers:
            pairs = zip(self.before, self.buffers, strict=True)
            torch._foreach_copy_(self.buffers, [torch.where(bad, before, now) for before, now in pairs])
        return {"grad_norm": total, **norms, "bad_step": bad.float()}

    @torch.no_grad()
    def remember(self) -> None:
        """Note the buffers to which a bad step goes back; called at the end of every step."""
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)


class Guard:
    """Ends a run in good order: on a signal, when its time is over, or when a process hangs.

    SIGTERM, SIGINT and SIGUSR1 let the step finish; all processes agree on the step, save and leave with
    code 75. A second signal exits at once. A thread watches over progress, whose absence for
    `hang_timeout` seconds ends the process with code 70 and a message that names the process to blame.

    Args:
        accelerator: processes; all of them make one.
        run: `RunConfig`; its `max_time` and `hang_timeout` are heeded.
        tracker: knows what this process does now.
    """

    def __init__(self, accelerator: Accelerator, run, tracker):
        self.stopping = False
        """Whether all processes have agreed to stop after the present step."""
        self._rank, self._world = accelerator.process_index, accelerator.num_processes
        self._tracker = tracker
        self._deadline = None if run.max_time is None else _started + 3600 * run.max_time
        self._signal: str | None = None
        self._group = self._pending = None
        if self._world > 1:
            # On the CPU, so that nothing waits for the device. The watch speaks first: it can name who hangs.
            patience = timedelta(seconds=2 * run.hang_timeout or 10**7)
            self._group = distributed.new_group(backend="gloo", timeout=patience)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._listen()
        timeout = run.hang_timeout
        self._watch = _Watch(tracker, self._rank, self._world, timeout) if timeout else None

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
        if self._signal is None:
            self._signal = signal.Signals(number).name
            if self._rank == 0:  # not `print`, which a signal may have interrupted
                _write_raw(f"\n{self._signal}: the step is finished and saved; once more to exit at once\n")

    def end_step(self) -> None:
        """Agree with the other processes whether to stop; called once a step by all of them.

        With several processes the answer is that of the step before: it has crossed the network meanwhile.
        """
        if self._signal is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._signal = "time is over"
        if self._group is None:
            self.stopping = self._signal is not None
            return
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            self.stopping = bool(flag.item())
        flag = torch.tensor([int(self._signal is not None)])
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group, async_op=True)
        self._pending = work, flag

    def close(self, step: int, total_steps: int, run_dir: Path) -> None:
        """Stop watching. Exits with code 75 if the run was stopped before its end.

        Raises:
            UserError: if the last checkpoint could not be written.
        """
        leaving = self.stopping and step < total_steps
        if self._pending is not None:
            self._pending[0].wait()
            distributed.barrier(self._group)  # a launcher ends the others as soon as the first has left
        if self._watch is not None:
            self._watch.stop()
        if self._handlers:
            for number, handler in self._handlers.items():
                # One who leaves anyway is not to be ended by a signal that others have had already.
                signal.signal(number, signal.SIG_IGN if leaving else handler)
            signal.set_wakeup_fd(-1)
            self._sending.close()
        if self._rank == 0 and self._tracker.saved_step != step:
            raise UserError(
                f"Step {step}, the last, could not be saved: make room, and go on from the checkpoint before "
                f"it with --resume {run_dir}."
            )
        if leaving:
            if self._rank == 0:
                why = self._signal or "another process was told to"
                say(f"stopped after step {step} of {total_steps} ({why}): go on with --resume {run_dir}")
            sys.exit(EXIT_STOPPED)


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


class _Watch:
    """A thread that ends the process when it makes no progress, and says who is to blame.

    Each process tells the others, through the store by which they found each other, how far it is and that
    its thread lives. All wait for the one that is behind. Time that the whole process was stopped for
    (Ctrl-Z, a laptop's lid) does not count.
    """

    def __init__(self, tracker, rank: int, world: int, timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        self.tracker = weakref.ref(tracker)  # a run that ended by an exception is not watched any more
        self.interval = min(POLL_SECONDS, timeout / 4)
        self.done = threading.Event()
        self.store = None
        if world > 1:
            self.store = distributed.distributed_c10d._get_default_store().clone()
            self.store.set_timeout(timedelta(seconds=max(self.interval, 1.0)))
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.done.set()
        self.thread.join()

    def _run(self) -> None:
        stalled, seen, ticks, earlier = 0.0, -1, 0, None
        while True:
            before = time.monotonic()
            if self.done.wait(self.interval):
                return
            tracker = self.tracker()
            if tracker is None:
                return
            self.progress = tracker.progress
            del tracker
            count, _ = self.progress
            # Not more than two intervals at once: this thread may have been stopped along with the rest.
            stalled += min(time.monotonic() - before, 2 * self.interval)
            if count != seen:
                stalled, seen, earlier = 0.0, count, None
            ticks += 1
            self._tell(ticks)
            if earlier is None and stalled > self.timeout / 2:
                earlier = self._others()
            if stalled > self.timeout:
                self._end(stalled, earlier or {})

    def _tell(self, ticks: int) -> None:
        if self.store is not None:
            count, where = self.progress
            with suppress(RuntimeError):  # who keeps the store may be gone or stopped: `_others` will tell
                self.store.set(f"watch/{self.rank}", f"{ticks} {count} {where}")

    def _others(self) -> dict[int, tuple[int, int, str]]:
        """Ticks of its thread, progress, and whereabouts of each process that can be asked about."""
        if self.store is None:
            return {0: (0, *self.progress)}
        found = {}
        try:
            for rank in range(self.world):
                if self.store.check([f"watch/{rank}"]):
                    ticks, count, where = self.store.get(f"watch/{rank}").decode().split(" ", 2)
                    found[rank] = int(ticks), int(count), where
        except RuntimeError:
            pass
        return found

    def _end(self, stalled: float, earlier: dict[int, tuple[int, int, str]]) -> None:
        now = self._others()
        silent = [
            rank
            for rank in range(self.world)
            if rank not in now or now[rank][0] == earlier.get(rank, (-1,))[0]
        ]
        silent = [] if self.world == 1 else [rank for rank in silent if rank != self.rank]
        least = min((count for _, count, _ in now.values()), default=0)
        behind = [rank for rank, (_, count, _) in now.items() if count == least]
        if silent:
            what = f"process {_listed(silent)} of {self.world} does not answer (it hangs, or is lost)"
        else:
            where = now[behind[0]][2] if behind else "starting"
            what = f"process {_listed(behind)} of {self.world} has not come further than {where!r}"
        first = min(set(range(self.world)) - set(silent))
        if self.rank == first:
            _write_raw(
                f"error: {what}; nothing has moved for {stalled:.0f} s (--hang-timeout): the job ends here, "
                f"go on from the last checkpoint with --resume.\n"
            )
        if self.rank == first or self.rank in behind:
            _write_raw(f"where process {self.rank} stands:\n")
            faulthandler.dump_traceback(sys.__stderr__.fileno())
        time.sleep(self.interval)  # the others speak as well before a launcher ends them
        os._exit(EXIT_HUNG)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _write_raw(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
