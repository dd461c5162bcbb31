"""Run by torchrun from test_launch.py: train with codes that are replaced, compare them between processes.

Arguments: those of train_cfg_vqvae.py.
"""

import sys

import torch

import train_cfg_vqvae
from common.config import parse


def main(argv: list[str]) -> None:
    kept, real = {}, train_cfg_vqvae.end_window
    counted = []

    def end_window(codebook, prior_out, averaged, *args):
        samples = codebook.counts.sum().item()
        metrics = real(codebook, prior_out, averaged, *args)
        kept.update(codebook=codebook, averaged=averaged)
        counted.append((samples, int(metrics["codes/replaced"])))
        return metrics

    train_cfg_vqvae.end_window = end_window
    close = train_cfg_vqvae.Tracker.close

    def compare(tracker):
        accelerator, vectors = tracker.accelerator, kept["codebook"].vectors
        moments = kept["averaged"].optimizer.state[vectors]["exp_avg"]
        average = kept["averaged"].model.codebook.vectors
        mine = torch.stack([vectors.detach(), moments, average])
        everyone = accelerator.gather(mine[None])
        assert all(torch.equal(theirs, everyone[0]) for theirs in everyone), "processes differ"
        assert all(samples == 8 for samples, _ in counted), "counts are not those of all processes"
        accelerator.print(f"replaced {sum(replaced for _, replaced in counted)}")
        close(tracker)

    train_cfg_vqvae.Tracker.close = compare
    train_cfg_vqvae.main(parse(train_cfg_vqvae.Config, argv, "train_cfg_vqvae.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
