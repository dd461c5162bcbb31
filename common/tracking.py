"""Metrics of a run: metrics.jsonl always, a tracker by choice, a progress bar, curves.png.

`metrics.jsonl` holds one JSON object a line: {"step", "split": "train" | "val", metrics...}. Training metrics are
means over the steps since the line before and over all processes.
"""

import json
import math
import os
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from common.config import to_dict
from common.errors import UserError


class Tracker:
    """Collects metrics without making the device wait, and writes them down now and then.

    Args:
        accelerator: processes and device; only the main process writes.
        run_dir: run folder.
        config: the script's configuration, told to the tracker; `config.run` names the tracker.
        total_steps: optimizer steps of the whole run.
        start_step, start_samples: where the run stands when it is resumed. Lines of later steps, written
            before an interruption, are removed: those steps are trained again.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        config,
        total_steps: int,
        start_step: int = 0,
        start_samples: int = 0,
    ):
        self.accelerator, self.run_dir, self.total_steps = accelerator, run_dir, total_steps
        self.path = run_dir / "metrics.jsonl"
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._waited = 0.0
        self._since = self._started = time.perf_counter()
        self._last = (start_step, start_samples)
        self._start_step = start_step
        self._bar = None
        if accelerator.is_main_process:
            keep_lines_up_to(self.path, start_step)
            self._file = self.path.open("a", buffering=1)
            self._bar = tqdm(
                total=total_steps, initial=start_step, unit="step", desc=run_dir.name, disable=not sys.stderr.isatty()
            )
        if config.run.tracker != "none":
            _start_tracker(accelerator, run_dir, config)

    @contextmanager
    def waiting(self):
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        """Leaves the time inside, for evaluating or saving, out of the training speed."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in scalars of one step; they stay on the device until the next `log`."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, step: int, samples: int, rates: dict[str, float]) -> dict[str, float]:
        """Write the means since the last call, with speed and memory; all processes call this.

        Args:
            step, samples: optimizer steps done and samples drawn by all processes.
            rates: learning rate of each component.
        """
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        if means:  # one copy from the device, whatever the number of metrics
            values = self.accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
            means = dict(zip(means, values, strict=True))
            if "bad_step" in means:
                means["bad_steps"] = round(means.pop("bad_step") * self._counts["bad_step"])
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._last[0]
        metrics = {
            **means,
            **{f"lr/{component}": rate for component, rate in rates.items()},
            "samples_per_s": (samples - self._last[1]) / seconds,
            "steps_per_s": steps / seconds,
            "data_wait_share": self._waited / seconds,
            "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "elapsed_s": now - self._started,
            "eta_s": (self.total_steps - step) * (now - self._started) / max(step - self._start_step, 1),
        }
        if self.accelerator.device.type == "cuda":
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums, self._counts, self._waited = {}, {}, 0.0
        self._since, self._last = now, (step, samples)
        self._write(step, "train", metrics)
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix(loss=f"{metrics.get('loss', math.nan):.4f}", refresh=True)
            if self._bar.disable:  # not a terminal: a line that reads well in a log file
                print(
                    f"step {step}/{self.total_steps}  loss {metrics.get('loss', math.nan):.4f}  "
                    f"{metrics['samples_per_s']:.0f} samples/s  {metrics['eta_s'] / 60:.1f} min left",
                    flush=True,
                )
        return metrics

    def log_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of held-out episodes and redraw the curves."""
        self._write(step, "val", metrics)
        if self.accelerator.is_main_process:
            text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"step {step}  held out: {text}")
            draw_curves(self.path, self.run_dir / "curves.png")

    def _write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps({"step": step, "split": split, **finite}, allow_nan=False) + "\n")
        self.accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Draw the curves a last time and release the file."""
        if self.accelerator.is_main_process:
            self._bar.close()
            self._file.close()
            draw_curves(self.path, self.run_dir / "curves.png")
        self.accelerator.end_training()


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off; replaces the file in one step."""
    if not path.exists():
        return
    kept = [line for line in _read(path) if line["step"] <= step] if step else []
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def _read(path: Path) -> list[dict]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # cut off when the process was killed
    return lines


def _start_tracker(accelerator: Accelerator, run_dir: Path, config) -> None:
    """Start wandb or TensorBoard through Accelerate; wandb without a login works offline and never asks."""
    options = {}
    if config.run.tracker == "wandb":
        options = {"wandb": {"name": run_dir.name, "id": run_dir.name, "dir": str(run_dir), "resume": "allow"}}
        if accelerator.is_main_process and not _wandb_login():
            os.environ["WANDB_MODE"] = "offline"
            print(f"wandb: not logged in, so this run is kept offline; send it with `wandb sync {run_dir}/wandb/*`")
    flat = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in _flatten(to_dict(config)).items()
    }
    try:
        accelerator.init_trackers(config.run.project, config=flat, init_kwargs=options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--tracker {config.run.tracker} does not start ({reason}): use --tracker none.") from None


def _flatten(values: dict) -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value) if isinstance(value, dict) else {name: value}
    return flat


def _wandb_login() -> bool:
    """Whether wandb can send without asking for a key."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    try:
        return bool(wandb.Api(api_key=None).api_key)
    except Exception:
        return False


def draw_curves(path: Path, picture: Path) -> None:
    """Draw metrics.jsonl: loss, held-out error, gradient norms, learning rates, speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = _read(path)
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    if not train:
        return
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True)
    _plot(axes[0, 0], train, ["loss"], "loss", log=True)
    for name in sorted({key for line in val for key in line} - {"step", "split"}):
        _plot(axes[0, 0], val, [name], "loss", log=True, label=f"held out: {name}", marker="o", ms=3)
    components = sorted({key for line in train for key in line if key.startswith("grad_norm/")})
    _plot(axes[0, 1], train, components, "gradient norm", log=True)
    _plot(axes[1, 0], train, sorted({k for line in train for k in line if k.startswith("lr/")}), "learning rate")
    _plot(axes[1, 1], train, ["samples_per_s"], "samples / s")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(path.parent.name)
    figure.tight_layout()
    temporary = picture.with_suffix(".new.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(picture)


def _plot(axis, lines: list[dict], names: list[str], title: str, log: bool = False, **style) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **{"lw": 1.2, "label": name.split("/")[-1], **style})
    axis.set_title(title, fontsize=10)
    if log and axis.lines:
        axis.set_yscale("log")
