"""How long a checkpoint stops training: written by a thread, or written while training waits.

    python benchmarks/saving.py                            # a state of about 1 GB, some minutes on two cores
    python benchmarks/saving.py --saves 1 --seconds 1 --d-model 16 --doc none

One run in one process saves in both ways, taking turns, below TMPDIR. After each save it trains for
`--seconds`, then waits for what is still being written. Training is stopped during the save and that wait.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import field, replace
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_vfp
from benchmarks.methods import ROOT, insert
from benchmarks.step import script_loop
from common.config import Flat, cli, options
from common.optim import OptimConfig
from common.run import Run, start_run


def large() -> train_vfp.Config:
    optim = OptimConfig(batch_size=2, steps=10**6)
    return train_vfp.Config(optim=optim, d_model=512, num_heads=8, encoder_layers=8, decoder_layers=8)


@options
class Config:
    """Compare ways of saving."""

    script: Flat[train_vfp.Config] = field(default_factory=large)
    saves: PositiveInt = 5
    """Checkpoints of each kind."""
    seconds: PositiveFloat = 30.0
    """Training time between two of them."""
    doc: Path = ROOT / "docs" / "faults.md"
    """Page to insert the result into; `none`: only print it."""


def main(config: Config) -> None:
    still = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        script = replace(config.script, run=replace(config.script.run, run_dir=Path(folder) / "run"))
        run = start_run(script, train_vfp.__file__)
        loop = script_loop(script, run, run.load_data(script.horizon, script.normalization))
        next(loop)
        for turn in range(2 * config.saves + 2):
            background = turn % 2 == 0
            run.config = replace(script, run=replace(script.run, background_saving=background))
            seconds = stand_still(run, loop, config.seconds)
            if turn > 1:  # the first of each is a warm-up
                still[background].append(seconds)
        newest = (run.folder / "checkpoints" / "last").rglob("*")
        size = sum(path.stat().st_size for path in newest if path.is_file()) / 1e9
        loop.close()
    rows = [("training waits (`--no-background-saving`)", still[False]), ("a thread writes", still[True])]
    lines = [f"| checkpoint of {size:.2f} GB, every {config.seconds:.0f} s | training stops for | share |"]
    lines += ["| --- | --- | --- |"]
    for what, values in rows:
        seconds = statistics.median(values)
        share = seconds / (seconds + config.seconds)
        lines.append(f"| {what} | {seconds:.2f} s ({min(values):.2f} to {max(values):.2f}) | {share:.1%} |")
    table = "\n".join(lines)
    print(table)
    if config.doc.name != "none":
        insert(config.doc, f"{table}\n\n`python benchmarks/saving.py`, medians of {config.saves} on a CPU.")


def stand_still(run: Run, loop, seconds: float) -> float:
    """Save, then train for `seconds`; returns the seconds without training, before and after."""
    start = time.perf_counter()
    run.save()
    saved = time.perf_counter()
    while time.perf_counter() < saved + seconds:
        next(loop)
    trained = time.perf_counter()
    run._finish_saving()
    return saved - start + time.perf_counter() - trained


if __name__ == "__main__":
    cli(main, Config)
