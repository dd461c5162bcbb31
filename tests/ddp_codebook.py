"""Run by torchrun from test_launch.py: train with codes that get replaced, compare them between processes.

Arguments: those of train_cfg_vqvae.py.
"""

import sys

import torch

import train_cfg_vqvae
from common import accelerator
from common.config import parse
from common.latent import CodebookLatent
from common.run import Run


def main(argv: list[str]) -> None:
    kept, counted = {}, []

    def end_window(latent, prior_out, average, *args, original=CodebookLatent.end_window):
        samples = latent.usage.counts.sum().item()
        metrics = original(latent, prior_out, average, *args)
        kept.update(latent=latent, average=average)
        counted.append((samples, int(metrics["codes/replaced"])))
        return metrics

    def close(run, original=Run.close):
        vectors, average = kept["latent"].vectors, kept["average"]
        moments = average.optimizer.state[vectors]["exp_avg"]
        mine = torch.stack([vectors.detach(), moments, average.model.latent.vectors])
        everyone = run.accelerator.gather(mine[None])
        assert all(torch.equal(theirs, everyone[0]) for theirs in everyone), "processes differ"
        buffers = torch.cat([x.flatten().float() for x in run.accelerator.unwrap_model(run.model).buffers()])
        everyone = run.accelerator.gather(buffers[None])
        assert all(torch.equal(theirs, everyone[0]) for theirs in everyone), "processes differ in buffers"
        assert all(samples == 8 for samples, _ in counted), "counts are not those of all processes"
        run.accelerator.print(f"replaced {sum(replaced for _, replaced in counted)}")
        original(run)

    CodebookLatent.end_window, Run.close = end_window, close
    handler = accelerator.DistributedDataParallelKwargs  # as on a GPU, where DDP does not send buffers
    accelerator.DistributedDataParallelKwargs = lambda **kw: handler(**{**kw, "broadcast_buffers": False})
    train_cfg_vqvae.main(parse(train_cfg_vqvae.Config, argv, "train_cfg_vqvae.py"))


if __name__ == "__main__":
    main(sys.argv[1:])
