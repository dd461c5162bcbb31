"""Run by torchrun from test_launch.py: train experts, compare their statistics between processes.

Arguments: those of train_vfp_moe.py.
"""

import sys

import torch

import train_vfp_moe
from common.config import parse


def main(argv: list[str]) -> None:
    counted, own = [], []
    count_loss, end_window = train_vfp_moe.compute_loss, train_vfp_moe.Gate.end_window

    def compute_loss(policy, *args, **options):
        loss = count_loss(policy, *args, **options)
        if policy.training:
            own.append(loss.experts.clone())
        return loss

    def look(gate):
        counted.append(gate.counts.clone())
        return end_window(gate)

    train_vfp_moe.compute_loss, train_vfp_moe.Gate.end_window = compute_loss, look
    close = train_vfp_moe.Tracker.close

    def compare(tracker):
        accelerator = tracker.accelerator
        everyone = accelerator.gather(torch.stack(counted)[None])
        assert all(torch.equal(theirs, everyone[0]) for theirs in everyone), "processes differ"
        together = accelerator.gather(torch.stack(own)[None].float()).sum(dim=0)  # one step a line
        assert torch.equal(together, torch.stack(counted)), "counts are not those of all processes"
        accelerator.print(f"samples {int(together.sum())}")
        close(tracker)

    train_vfp_moe.Tracker.close = compare
    train_vfp_moe.main(parse(train_vfp_moe.Config, argv, "train_vfp_moe.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
