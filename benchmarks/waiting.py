"""The effect of how OpenMP's threads wait on training speed on a CPU, idle and busy.

    python benchmarks/waiting.py
    python benchmarks/waiting.py --busy 0 1 2 4

Three processes train the same policy: with threads that spin briefly and then sleep, as the scripts set
them, with threads that sleep at once, and with PyTorch's default. They take turns, so that other work on the
machine slows all equally; the results are medians over turns of the ratio of their speeds to the default's.
Meanwhile, `--busy` other processes compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

POLICIES = {
    "brief": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "default": {},
}


@dataclass(frozen=True)
class Options:
    """Compare ways for threads to wait."""

    busy: tuple[int, ...] = (0, 1, 2)
    """Numbers of other processes that compute meanwhile; each is measured."""
    rounds: int = 8
    """Turns of each."""
    turn_steps: int = 10
    """Steps per turn."""
    threads: int = os.cpu_count() or 1
    batch_size: int = 16
    child: bool = False
    """Used internally, for the processes that this one starts."""


def train(options: Options) -> None:
    """Train `turn_steps` steps for every line on stdin; answer with samples per second."""
    import torch  # before this project's modules, which set how its threads wait

    import train_vfp
    from benchmarks.step import bare_loop
    from common.run import start_run

    torch.set_num_threads(options.threads)
    config = train_vfp.Config()
    config = replace(config, optim=replace(config.optim, batch_size=options.batch_size))
    run = start_run(config, train_vfp.__file__)
    steps = bare_loop(config, run, run.load_data(config.horizon, config.normalization))
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(options.turn_steps):
            next(steps)
        print("speed", options.turn_steps * options.batch_size / (time.perf_counter() - began), flush=True)


def turn(process: subprocess.Popen) -> float:
    """Samples per second in the next turn of a process."""
    process.stdin.write("\n")
    process.stdin.flush()
    return next(float(line.split()[1]) for line in process.stdout if line.startswith("speed "))


def main(options: Options) -> None:
    if options.child:
        train(options)
        return
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    command = [sys.executable, *sys.argv, "--child"]
    trained = {
        name: subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment, **policy}
        )
        for name, policy in POLICIES.items()
    }
    print(f"samples/s of {options.threads} threads, batches of {options.batch_size} (and / the default's)")
    for count in options.busy:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            turns = [[turn(one) for one in trained.values()] for _ in range(options.rounds + 1)]
        finally:
            for process in busy:
                process.kill()
        speeds = np.array(turns[1:])
        shares = np.median(speeds / speeds[:, [-1]], axis=0)
        found = zip(trained, np.median(speeds, axis=0), shares, strict=True)
        listed = ", ".join(f"{name} {speed:.1f} ({share:.2f})" for name, speed, share in found)
        print(f"{count} other processes: {listed}", flush=True)
    for process in trained.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main(tyro.cli(Options))
