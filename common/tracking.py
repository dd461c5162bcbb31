"""Metrics of a run: metrics.jsonl always, a tracker by choice, a progress bar, curves.png.

`metrics.jsonl` holds one JSON object a line: {"step", "split": "train" | "val", metrics...}. Training
metrics are means over the steps since the line before and over all processes, of the values that were
finite; null if none was.
"""

import errno
import json
import math
import os
import resource
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from common.config import flat_options
from common.console import say
from common.errors import UserError
from common.files import read_json, write_whole
from common.plots import draw_curves, read_lines

SERVICE_SECONDS = 30.0
"""How long the start of a run waits for a tracker's server."""
FINISH_SECONDS = 300.0
"""How long the end of a run waits for a tracker's server to take the last metrics; they stay on disk."""
OFFLINE = {"mode": "offline", "resume": None, "settings": {"silent": True}}


class Tracker:
    """Collects metrics without making the device wait, and writes them down now and then.

    Only the main process writes. A resumed run stands at `start_step`, `start_samples`: lines of later steps,
    written before an interruption, are removed, since those steps are trained again.
    """

    def __init__(
        self, accelerator: Accelerator, run_dir: Path, config, total_steps: int, start_step=0, start_samples=0
    ):
        self.accelerator, self.run_dir, self.total_steps = accelerator, run_dir, total_steps
        self._new: dict[str, Tensor] = {}  # metrics since the last `flush`
        self._sums: dict[tuple[str, ...], Tensor] = {}  # of metrics flushed together: (2, n), sums and counts
        # Steps that were skipped: in a row until now, most in a row since the last line, the last of these.
        self._skipped = torch.zeros(3, device=accelerator.device)
        self._steps_seen = self._start_step = start_step
        self._last = (start_step, start_samples)
        self._waited = self._elapsed_before = 0.0
        if config.run.tracker != "none":
            start_tracker(accelerator, run_dir, config, start_step)
        self._since = self._started = self._paused = time.perf_counter()
        if accelerator.is_main_process:
            kept = keep_lines_up_to(run_dir / "metrics.jsonl", start_step)
            self._elapsed_before = max((line.get("elapsed_s", 0.0) for line in kept), default=0.0)
            self._lines = Lines(run_dir / "metrics.jsonl")
            quiet = not sys.stderr.isatty()
            self._bar = tqdm(None, run_dir.name, total_steps, initial=start_step, unit="step", disable=quiet)
        if start_step:
            self._restore(run_dir / "checkpoints" / f"step_{start_step:07d}" / "state")

    def save(self, folder: Path) -> None:
        """Write what has been collected since the last line, each process a file of its own.

        So a run that is resumed between two lines writes the same lines as one that was left alone.
        """
        self.flush()
        sums = [[list(names), values.tolist()] for names, values in self._sums.items()]
        content = {"sums": sums, "skipped": self._skipped.tolist()}
        file = folder / f"metrics_{self.accelerator.process_index}.json"
        file.write_text(json.dumps(content) + "\n")
        if self.accelerator.is_main_process:
            self._lines.sync()  # a checkpoint is not newer than the lines before it

    def _restore(self, folder: Path) -> None:
        """Take up what `save` wrote, if as many processes wrote it."""
        files = [folder / f"metrics_{n}.json" for n in range(self.accelerator.num_processes + 1)]
        if files[-2].is_file() and not files[-1].is_file():
            device = self.accelerator.device
            content = read_json(files[self.accelerator.process_index])
            self._sums = {tuple(names): torch.tensor(x, device=device) for names, x in content["sums"]}
            in_row, _, last = content["skipped"]
            self._skipped = torch.tensor([in_row, in_row, last], device=device)

    @contextmanager
    def waiting(self):
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def pause_clock(self) -> None:
        """Leave the time until `resume_clock`, for evaluating or saving, out of the training speed."""
        self._paused = time.perf_counter()

    def resume_clock(self) -> None:
        self._since += time.perf_counter() - self._paused

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Take in scalars, which are read by the next `flush`, and stay on the device until the next `log`.

        Values that are not finite are left out: one bad step does not blank its line.
        """
        if not self._new.keys().isdisjoint(metrics):  # of another micro-batch
            self.flush()
        self._new |= {name: x.detach() if torch.is_tensor(x) else x for name, x in metrics.items()}

    def flush(self) -> None:
        """Add what came in since the last call to the sums, in few launches; called at the end of a step."""
        if not self._new:
            return
        device, names = self.accelerator.device, tuple(self._new)
        values = torch.stack(
            [torch.as_tensor(x, dtype=torch.float32, device=device) for x in self._new.values()]
        )
        finite = values.isfinite()
        entry = torch.stack([torch.where(finite, values, 0.0), finite.float()])
        self._sums[names] = self._sums[names] + entry if names in self._sums else entry
        self._new = {}

    def count_skipped(self, bad: Tensor) -> None:
        """Take in whether a step was skipped, 1 or 0; called once a step."""
        in_row, most, last = self._skipped
        self._steps_seen += 1
        in_row = (in_row + 1) * bad
        last = torch.where(in_row > most, float(self._steps_seen), last)
        self._skipped = torch.stack([in_row, torch.maximum(in_row, most), last])
        self.add({"bad_step": bad})

    def log(self, step: int, samples: int, rates: dict[str, float]) -> tuple[dict[str, float], int, int]:
        """Write the means since the last call, with speed, memory and rates; all processes call this.

        Returns:
            What was written, how many steps in a row were skipped, and which was the last of them.
        """
        means, waited, most, last = self._take_means()
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        metrics = means | {f"lr/{component}": rate for component, rate in rates.items()}
        metrics |= {
            "samples_per_s": (samples - self._last[1]) / seconds,
            "steps_per_s": (step - self._last[0]) / seconds,
            "data_wait_share": waited / seconds,
            "memory_gb": _peak_memory_gb(),
            "elapsed_s": self._elapsed_before + now - self._started,
            "eta_s": (self.total_steps - step) * (now - self._started) / max(step - self._start_step, 1),
        }
        if self.accelerator.device.type == "cuda":
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._since, self._last = now, (step, samples)
        self._write(step, "train", metrics)
        if self.accelerator.is_main_process:
            self._show(step, metrics)
        if num := means.get("bad_steps"):
            say(f"step {step}  skipped {num} step{'s' * (num > 1)} whose loss or gradient was not finite")
        return metrics, most, last

    def _take_means(self) -> tuple[dict[str, float], float, int, int]:
        """Means over all processes, seconds waited for data, steps skipped in a row; then begins anew."""
        self.flush()
        sums = torch.cat([torch.zeros(2, 0, device=self.accelerator.device), *self._sums.values()], dim=1)
        waited = torch.tensor([self._waited], device=self.accelerator.device)
        # One copy from the device and one exchange between processes, whatever the number of metrics.
        numbers = self.accelerator.reduce(torch.cat([sums.flatten(), waited, self._skipped])).tolist()
        totals, counts = Counter(), Counter()  # a name is in several groups if it did not come at every step
        for i, name in enumerate(name for group in self._sums for name in group):
            totals[name] += numbers[i]
            counts[name] += numbers[sums.shape[1] + i]
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in totals.items()}
        world = self.accelerator.num_processes
        if "bad_step" in means:
            means["bad_steps"] = round(means.pop("bad_step") * counts["bad_step"] / world)
        waited, _, most, last = (number / world for number in numbers[sums.numel() :])
        self._skipped[1] = self._skipped[0]  # those in a row go on into the next line
        self._sums, self._waited = {}, 0.0
        return means, waited, round(most), round(last)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Refresh the progress bar or, where there is no terminal, print a line that suits a log file."""
        loss = f"{metrics.get('loss', math.nan):.4f}"
        rate = max((x for name, x in metrics.items() if name.startswith("lr/")), default=math.nan)
        self._bar.n = step
        self._bar.set_postfix(loss=loss, lr=f"{rate:.1e}", refresh=True)
        if self._bar.disable:
            say(
                f"step {step}/{self.total_steps}  loss {loss}  lr {rate:.1e}  "
                f"{metrics['samples_per_s']:.0f} samples/s  {metrics['eta_s'] / 60:.1f} min left"
            )

    def log_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of held-out episodes and redraw the curves."""
        self._write(step, "val", metrics)
        if self.accelerator.is_main_process:
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"step {step}  held out: {text}")
            draw_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")

    def _write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._lines.append({"step": step, "split": split, **finite})
        try:
            self.accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)
        except OSError as error:  # metrics.jsonl has them all
            say(f"warning: the tracker cannot write ({error.strerror or error})")

    def close(self) -> None:
        if self.accelerator.is_main_process:
            self._bar.close()
            self._lines.close()
            draw_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")
        self.accelerator.end_training()


def _peak_memory_gb() -> float:
    """Largest resident memory of this process so far; the kernel counts kB on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class Lines:
    """A file that grows by whole lines. While the disk is full, they wait in memory."""

    def __init__(self, path: Path):
        self.path, self._waiting = path, b""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, line: dict) -> None:
        full = bool(self._waiting)
        self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not full:
                say(f"warning: {self.path} cannot be written ({error.strerror}); its lines wait in memory")

    def sync(self) -> None:
        """Have all lines on disk; raises OSError if that cannot be."""
        self._flush()
        os.fsync(self._descriptor)

    def _flush(self) -> None:
        end = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, self._waiting) if self._waiting else 0
        if written < len(self._waiting):  # the disk took a part of it
            os.ftruncate(self._descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""

    def close(self) -> None:
        with suppress(OSError):
            self._flush()
        os.close(self._descriptor)


def keep_lines_up_to(path: Path, step: int) -> list[dict]:
    """Drop the lines of later steps, and a last line that was cut off; the lines that are left.

    None is left for step 0: a run that starts has no past.
    """
    if not path.exists():
        return []
    kept = [line for line in read_lines(path) if line["step"] <= step] if step else []
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def start_tracker(accelerator: Accelerator, run_dir: Path, config, start_step: int) -> None:
    """Start wandb or TensorBoard through Accelerate, both writing below the run folder.

    Raises:
        UserError: if it does not start.
    """
    name = config.run.tracker
    settings = {
        key: value if isinstance(value, int | float | str | bool) else json.dumps(value)
        for key, value in flat_options(config).items()
    }
    accelerator.log_with = [name]
    accelerator.project_configuration.logging_dir = str(run_dir)
    try:
        if name == "wandb":
            _start_wandb(accelerator, run_dir, config.run.project, settings, start_step)
        else:
            # Points of later steps, written before an interruption, are hidden: those steps come again.
            options = {"purge_step": start_step + 1} if start_step else {}
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": options})
            if accelerator.is_main_process:
                text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
                accelerator.get_tracker("tensorboard", unwrap=True).add_text("config", text, start_step)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--tracker {name} does not start ({reason}): use --tracker none.") from None


def _start_wandb(accelerator: Accelerator, run_dir: Path, project: str, settings: dict, start_step: int):
    """Start wandb, offline if its server has not answered after `SERVICE_SECONDS`.

    wandb's own `init_timeout` does not end the wait for a server that cannot be reached.
    """
    options = _wandb_options(run_dir, start_step) if accelerator.is_main_process else {}
    attempt: Future[None] = Future()

    def start(more: dict) -> None:
        accelerator.init_trackers(project, config=settings, init_kwargs={"wandb": options | more})

    def try_to_start() -> None:
        try:
            attempt.set_result(start({}))
        except Exception as error:
            attempt.set_exception(error)

    threading.Thread(target=try_to_start, name="wandb", daemon=True).start()
    try:
        attempt.result(SERVICE_SECONDS)
    except TimeoutError:
        import wandb

        # It makes the attempt fail, and then waits itself for the server.
        threading.Thread(target=wandb.teardown, name="wandb", daemon=True).start()
        wait([attempt], timeout=SERVICE_SECONDS)
        _say_offline(f"no answer from the server for {SERVICE_SECONDS:.0f} s", run_dir)
        accelerator.trackers.clear()  # or Accelerate would start the first one again
        start(OFFLINE)


def _wandb_options(run_dir: Path, start_step: int) -> dict:
    """Options of `wandb.init`. A resumed run continues the same wandb run; without a key it stays offline."""
    import wandb

    identity = run_dir / "wandb" / "id"
    if not (start_step and identity.is_file()):
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(uuid.uuid4().hex[:12])
    options = {"name": run_dir.name, "id": identity.read_text(), "dir": str(run_dir)}
    if wandb.setup().settings.mode in ("offline", "disabled") or wandb.api.api_key:
        return options | {"resume": "allow", "settings": {"finish_timeout": FINISH_SECONDS}}
    _say_offline("not logged in", run_dir)
    return options | OFFLINE


def _say_offline(why: str, run_dir: Path) -> None:
    say(f"wandb: {why}, so kept offline; send it with `wandb sync {run_dir}/wandb/offline-run-*`")
