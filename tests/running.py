"""Run scripts inside a test, and read their files."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from common.config import parse

SMALL = {
    "train_vfp_depth": "--depth-weights random",
    "train_cfg_vqvae": "--num-codes 4 --latent-dim 4 --posterior-layers 1 --code-window 1",
    "train_vfp_moe": "--num-experts 2 --latent-dim 4 --posterior-layers 1",
}


def reset():
    """Reset Accelerate's state for the next run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fitting(script, flags):
    """The flags, without those of a flow and a decoder if the script has none; each flag has one value."""
    known = {f"--{f.name.replace('_', '-')}" for f in fields(script.Config)}
    absent = {"--flow-samples", "--sample-steps", "--decoder-layers"} - known
    return [f for i, f in enumerate(flags) if f not in absent and (i == 0 or flags[i - 1] not in absent)]


def train(script, tiny, run_dir, *more):
    reset()
    argv = (
        [*fitting(script, tiny), *SMALL.get(script.__name__, "").split(), "--run-dir", str(run_dir)]
        if run_dir
        else []
    )
    script.main(parse(script.Config, [*argv, *map(str, more)], Path(script.__file__).name))
    return run_dir


def lines(run_dir, split="train"):
    """Metrics by step, without those that depend on a clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "steps_per_s", "data_wait_share", "memory_gb", "elapsed_s", "eta_s", "split")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows if row["split"] == split]


def interrupt_after(run_dir, step, copy):
    """A copy of the run as it was right after the checkpoint of a step was written."""
    shutil.copytree(run_dir, copy, symlinks=True)
    for folder in (copy / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


def weights(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) > 3
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}
