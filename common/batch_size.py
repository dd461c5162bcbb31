"""The largest batch size that fits into memory, by trial (`--find-batch-size`)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.config import to_dict
from common.errors import UserError
from common.faults import EXIT_OUT_OF_MEMORY
from common.files import write_json

STEPS = 3  # the optimizer's state is there from the second on


def find_batch_size(script: Path, config: Any) -> int:
    """Print, and return, the largest batch size with which a script trains; within a sixteenth.

    Every trial is a process of its own. One that has run out of memory does not leave it as it found it, and
    a trial that shared its process would fail too early.

    Args:
        script: the training script.
        config: its configuration; the search starts at its batch size.

    Raises:
        UserError: if even a single sample does not fit, or a trial fails for another reason.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--find-batch-size looks at one process: start it with python, without a launcher.")
    fits, too_large = 0, None
    size = config.optim.batch_size
    with tempfile.TemporaryDirectory(prefix="batch-size-") as folder:
        while too_large is None or too_large - fits > max(1, fits // 16):
            trained = _fits(script, config, size, Path(folder) / str(size))
            print(f"--batch-size {size}: {'fits' if trained else 'does not fit'}", flush=True)
            fits, too_large = (size, too_large) if trained else (fits, size)
            if too_large == 1:
                raise UserError(
                    "Not even --batch-size 1 fits into memory: lower --flow-samples, --image-size or "
                    "--d-model."
                )
            if too_large is None:
                size = 2 * fits
            elif not fits:
                size = too_large // 2
            else:
                size = (fits + too_large) // 2
    print(f"the largest that fits: --batch-size {fits} (leave some room: DDP and other batches need it)")
    return fits


def _fits(script: Path, config: Any, size: int, run_dir: Path) -> bool:
    """Whether some steps can be trained with a batch size."""
    steps = {"steps": 100 * STEPS, "epochs": None}  # it is stopped before
    optim = dataclasses.replace(config.optim, batch_size=size, grad_accumulation=1, **steps)
    changes = {"run_dir": None, "resume": None, "config": None, "tracker": "none", "log_every": 1}
    run = dataclasses.replace(config.run, find_batch_size=False, **changes)
    trial = dataclasses.replace(config, optim=optim, run=run)
    settings = run_dir.with_suffix(".json")
    write_json(settings, {"script": script.name, "config": to_dict(trial)})
    log = run_dir.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, script, "--config", settings, "--run-dir", run_dir], stdout=file, stderr=file
        )
    try:
        while process.poll() is None and not _has_trained(run_dir):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        pass  # it has trained, and does not save: that is not what is asked here
    finally:
        process.kill()
    process.wait()
    errors = log.read_text(errors="replace")
    if _has_trained(run_dir):
        return True
    if process.returncode in (EXIT_OUT_OF_MEMORY, -signal.SIGKILL):
        return False  # the second: the system's own way of saying so
    if "is larger than the" in errors:  # more than there are samples
        return False
    raise UserError(f"A trial with --batch-size {size} failed: {errors.strip()[-500:]}")


def _has_trained(run_dir: Path) -> bool:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return any(json.loads(line)["step"] >= STEPS for line in lines)
    except (OSError, ValueError):
        return False
