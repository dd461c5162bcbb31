"""Metrics of a run: metrics.jsonl, an optional tracker, a line of progress, curves.png.

`metrics.jsonl` holds one JSON object a line: {"step", "split": "train" | "val", metrics...}. Training
metrics are means of the finite values since the previous line, over steps and processes; null if there were
none.

A tracker also gets every PNG and GIF in the run folder after an evaluation: `curves.png`, the method's
pictures, the film of the newest rollouts.
"""

import errno
import json
import math
import os
import resource
import sys
import textwrap
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.config import to_dict
from common.console import say
from common.errors import UserError
from common.files import checksum, read_json, write_whole
from common.plots import draw_curves, read_lines

SERVICE_SECONDS = 30.0
"""How long the start of a run waits for a tracker's server."""
FINISH_SECONDS = 300.0
"""How long the end of a run waits for a tracker's server to take the last metrics; they stay on disk."""
OFFLINE = {"mode": "offline", "resume": None, "settings": {"silent": True}}
SUCCESS = "rollout/success"  # see `common.rollout.success_rate`
PROGRESS = "{n_fmt}/{total_fmt} |{bar}| {remaining} left, {rate_fmt}{postfix}"  # fits in 80 columns


class Tracker:
    """Collects metrics without making the device wait, and writes them every `--log-every` steps.

    Only the main process writes. A resumed run starts from `start_step`, `start_samples`: lines of later
    steps, written before an interruption, are removed, because those steps are trained again.
    """

    def __init__(
        self, accelerator: Accelerator, run_dir: Path, config, total_steps: int, start_step=0, start_samples=0
    ):
        self.accelerator, self.run_dir, self.total_steps = accelerator, run_dir, total_steps
        self._new: dict[str, Tensor] = {}  # metrics since the last `flush`
        self._sums: dict[tuple[str, ...], Tensor] = {}  # of metrics flushed together: (2, n), sums and counts
        # Skipped steps: in a row until now, most in a row since the last line, the last step of that row.
        self._skipped = torch.zeros(3, device=accelerator.device)
        self._steps_seen = self._start_step = start_step
        self._last = (start_step, start_samples)
        self._waited = self._elapsed_before = 0.0
        if config.run.tracker != "none":
            start_tracker(accelerator, run_dir, config, start_step)
        self._since = self._started = self._paused = time.perf_counter()
        self._success: float | None = None  # of the newest rollouts
        self._step, self._evaluated, self._tracker_failed = start_step, False, False
        self._sent = _pictures(run_dir)
        quiet = not (accelerator.is_main_process and sys.stderr.isatty())
        options = {"initial": start_step, "smoothing": 0, "dynamic_ncols": True}
        self._bar = tqdm(total=total_steps, bar_format=PROGRESS, disable=quiet, **options)
        if accelerator.is_main_process:
            kept = keep_lines_up_to(run_dir / "metrics.jsonl", start_step)
            self._elapsed_before = max((line.get("elapsed_s", 0.0) for line in kept), default=0.0)
            self._success = next((x[SUCCESS] for x in reversed(kept) if SUCCESS in x), None)
            self._lines = Lines(run_dir / "metrics.jsonl")
        if start_step:
            self._restore(run_dir / "checkpoints" / f"step_{start_step:07d}" / "state")

    def save(self, folder: Path) -> None:
        """Write what has been collected since the last line, each process to its own file.

        So a run that is resumed between two lines writes the same lines as an uninterrupted one.
        """
        self.flush()
        sums = [[list(names), values.tolist()] for names, values in self._sums.items()]
        content = {"sums": sums, "skipped": self._skipped.tolist()}
        file = folder / f"metrics_{self.accelerator.process_index}.json"
        file.write_text(json.dumps(content) + "\n")
        if self.accelerator.is_main_process:
            self._lines.sync()  # a checkpoint is not newer than the lines before it

    def _restore(self, folder: Path) -> None:
        """Load what `save` wrote, if the number of processes is the same."""
        files = [folder / f"metrics_{n}.json" for n in range(self.accelerator.num_processes + 1)]
        if files[-2].is_file() and not files[-1].is_file():
            device = self.accelerator.device
            content = read_json(files[self.accelerator.process_index])
            self._sums = {tuple(names): torch.tensor(x, device=device) for names, x in content["sums"]}
            in_row, _, last = content["skipped"]
            self._skipped = torch.tensor([in_row, in_row, last], device=device)

    @contextmanager
    def waiting(self):
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def pause_clock(self) -> None:
        """Exclude the time until `resume_clock`, for evaluating or saving, from the training speed."""
        self._paused = time.perf_counter()

    def resume_clock(self) -> None:
        self._send_pictures()
        self._since += time.perf_counter() - self._paused

    def add(self, metrics: dict[str, Tensor | float]) -> None:
        """Collect scalars; the next `flush` reads them, and they stay on the device until the next `log`.

        Values that are not finite are left out, so that one bad step does not spoil its line.
        """
        if not self._new.keys().isdisjoint(metrics):  # from another micro-batch
            self.flush()
        self._new |= {name: x.detach() if torch.is_tensor(x) else x for name, x in metrics.items()}

    def flush(self) -> None:
        """Add what was collected since the last call to the sums, in few kernels; called after each step."""
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
        """Count a step, which was skipped if `bad` is 1 instead of 0; called once per step."""
        in_row, most, last = self._skipped
        self._steps_seen += 1
        self._bar.update()
        in_row = (in_row + 1) * bad
        last = torch.where(in_row > most, float(self._steps_seen), last)
        self._skipped = torch.stack([in_row, torch.maximum(in_row, most), last])
        self.add({"bad_step": bad})

    def log(self, step: int, samples: int, rates: dict[str, float]) -> tuple[dict[str, float], int, int]:
        """Write the means since the last call, with speed, memory and rates; all processes call this.

        Returns:
            What was written, how many steps in a row were skipped, and the last of them.
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
        """Means over all processes, seconds waited for data, steps skipped in a row; then starts over."""
        self.flush()
        sums = torch.cat([torch.zeros(2, 0, device=self.accelerator.device), *self._sums.values()], dim=1)
        waited = torch.tensor([self._waited], device=self.accelerator.device)
        # One copy from the device and one exchange between processes, whatever the number of metrics.
        numbers = self.accelerator.reduce(torch.cat([sums.flatten(), waited, self._skipped])).tolist()
        totals, counts = Counter(), Counter()  # a name is in several groups if some steps did not log it
        for i, name in enumerate(name for group in self._sums for name in group):
            totals[name] += numbers[i]
            counts[name] += numbers[sums.shape[1] + i]
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in totals.items()}
        world = self.accelerator.num_processes
        if "bad_step" in means:
            means["bad_steps"] = round(means.pop("bad_step") * counts["bad_step"] / world)
        waited, _, most, last = (number / world for number in numbers[sums.numel() :])
        self._skipped[1] = self._skipped[0]  # a row continues into the next line
        self._sums, self._waited = {}, 0.0
        return means, waited, round(most), round(last)

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Refresh the line of progress or, without a terminal, print a line for a log file."""
        rate = max((x for name, x in metrics.items() if name.startswith("lr/")), default=math.nan)
        success = "" if self._success is None else f"  success {100 * self._success:.0f} %"
        text = f"loss {metrics.get('loss', math.nan):.4f}{success}  lr {rate:.1e}"
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            speed = metrics["samples_per_s"]
            say(
                f"step {step}/{self.total_steps}  {text}  "
                f"{speed:.{int(speed < 10)}f} samples/s  {metrics['eta_s'] / 60:.1f} min left"
            )

    def log_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of held-out episodes, or of rollouts, and redraw the curves."""
        self._write(step, "val", metrics)
        self._evaluated = True
        if self.accelerator.is_main_process:
            self._success = metrics.get(SUCCESS, self._success)
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"step {step}  {'acting' if SUCCESS in metrics else 'held out'}: {text}")
            draw_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")

    def _write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._lines.append({"step": step, "split": split, **finite})
        self._step = step
        with self._tracking():
            self.accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    @contextmanager
    def _tracking(self):
        """Turn an error of the tracker inside into a warning: the run folder has everything."""
        try:
            yield
            self._tracker_failed = False
        except Exception as error:  # also of a service that was killed
            if not self._tracker_failed:
                say(f"warning: the tracker cannot write ({getattr(error, 'strerror', None) or error})")
            self._tracker_failed = True

    def _send_pictures(self) -> None:
        """After an evaluation, give the tracker the pictures and films that are new since the last one."""
        trackers = self.accelerator.trackers if self.accelerator.is_main_process else []
        if not (trackers and self._evaluated):
            return
        self._evaluated, before, self._sent = False, self._sent, _pictures(self.run_dir)
        new = [path for path, content in self._sent.items() if content != before.get(path)]
        for tracker, path in product(trackers, new):
            with self._tracking():
                _send_picture(tracker, path, self._step)

    def close(self) -> None:
        self._bar.close()
        if self.accelerator.is_main_process:
            self._lines.close()
            draw_curves(self.run_dir / "metrics.jsonl", self.run_dir / "curves.png")
        self._evaluated = True
        self._send_pictures()
        for tracker in self.accelerator.trackers:
            with self._tracking():
                tracker.finish()
        self.accelerator.trackers = []
        self.accelerator.end_training()


def _pictures(run_dir: Path) -> dict[Path, int]:
    """Checksums of the pictures and films directly in a run folder."""
    paths = sorted(path for path in run_dir.iterdir() if path.suffix in (".png", ".gif"))
    return {path: checksum(path) for path in paths if path.is_file()}


def _send_picture(tracker: GeneralTracker, path: Path, step: int) -> None:
    """Give a tracker a PNG or GIF as it is on disk.

    TensorBoard plays a GIF that is logged as an image. Its `add_video` does the same but needs MoviePy.
    """
    name = f"media/{path.stem}"
    if tracker.name == "wandb":
        import wandb

        film = path.suffix == ".gif"
        tracker.log({name: wandb.Video(path, format="gif") if film else wandb.Image(path)}, step=step)
    else:
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        tracker.tracker.file_writer.add_summary(summary, step)


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
        """Bring all lines to disk; raises OSError if that fails."""
        self._flush()
        os.fsync(self._descriptor)

    def _flush(self) -> None:
        end = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, self._waiting) if self._waiting else 0
        if written < len(self._waiting):  # the disk took only a part of it
            os.ftruncate(self._descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""

    def close(self) -> None:
        with suppress(OSError):
            self._flush()
        os.close(self._descriptor)


def keep_lines_up_to(path: Path, step: int) -> list[dict]:
    """Drop the lines of later steps, and a last line that was cut off; returns the lines that are left.

    For step 0 none are left: a new run has no history.
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
    name, settings = config.run.tracker, to_dict(config)
    accelerator.log_with = [name]
    accelerator.project_configuration.logging_dir = str(run_dir)
    try:
        if name == "wandb":
            _start_wandb(accelerator, run_dir, config.run.project, settings, start_step)
        else:
            # Hide points of later steps, written before an interruption: those steps are trained again.
            options = {"purge_step": start_step + 1} if start_step else {}
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": options})
            if accelerator.is_main_process:
                text = textwrap.indent(json.dumps(settings, indent=2), "    ")  # a code block in Markdown
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

        # This makes the attempt fail, but then waits for the server itself.
        threading.Thread(target=wandb.teardown, name="wandb", daemon=True).start()
        wait([attempt], timeout=SERVICE_SECONDS)
        _say_offline(f"no answer from the server for {SERVICE_SECONDS:.0f} s", run_dir)
        accelerator.trackers.clear()  # otherwise Accelerate would start the first one again
        start(OFFLINE)


def _wandb_options(run_dir: Path, start_step: int) -> dict:
    """Options of `wandb.init`. A resumed run continues the same wandb run; without a key it stays offline."""
    import wandb

    identity = run_dir / "wandb" / "id"
    if not (start_step and identity.is_file()):
        identity.parent.mkdir(exist_ok=True)
        identity.write_text(uuid.uuid4().hex[:12])
    options = {"name": run_dir.name, "id": identity.read_text(), "dir": str(run_dir)}
    chosen = wandb.setup().settings.mode in ("offline", "disabled")
    if chosen or wandb.api.api_key:
        resume = None if chosen else "allow"
        return options | {"resume": resume, "settings": {"finish_timeout": FINISH_SECONDS}}
    _say_offline("not logged in", run_dir)
    return options | OFFLINE


def _say_offline(why: str, run_dir: Path) -> None:
    say(f"wandb: {why}, so kept offline; send it with `wandb sync --append {run_dir}/wandb/offline-run-*`")
