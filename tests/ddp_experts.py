"""Run by torchrun from test_launch.py: train experts, compare their statistics between processes.

Arguments: those of train_vfp_moe.py.
"""

import sys

import torch

import train_vfp_moe
from common.config import parse
from common.run import Run
from train_vfp_moe import Gate


def main(argv: list[str]) -> None:
    counted, own = [], []

    def compute_loss(*args, train, original=train_vfp_moe.compute_loss, **options):
        loss, metrics = original(*args, train=train, **options)
        if train:
            own.append(metrics["experts"].clone())
        return loss, metrics

    def end_window(gate, original=Gate.end_window):
        counted.append(gate.usage.counts.clone())
        return original(gate)

    def close(run, original=Run.close):
        everyone = run.accelerator.gather(torch.stack(counted)[None])
        assert all(torch.equal(theirs, everyone[0]) for theirs in everyone), "processes differ"
        together = run.accelerator.gather(torch.stack(own)[None].float()).sum(dim=0)  # a line per step
        assert torch.equal(together, torch.stack(counted)), "counts are not those of all processes"
        run.accelerator.print(f"samples {int(together.sum())}")
        original(run)

    train_vfp_moe.compute_loss, Gate.end_window, Run.close = compute_loss, end_window, close
    train_vfp_moe.main(parse(train_vfp_moe.Config, argv, "train_vfp_moe.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
