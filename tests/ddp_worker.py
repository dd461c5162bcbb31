"""Run by torchrun from test_launch.py: gradients of one step, each process with its share of one batch.

Arguments: the folder of a dataset, its cache folder, where process 0 writes the gradients.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import train_vfp
from common import checkpoint
from common.config import RunConfig, parse
from common.data import ChunkDataset, open_dataset
from common.launch import make_accelerator
from common.normalize import Normalizer


def main(dataset: str, cache_dir: str, out: str) -> None:
    flags = (
        f"--dataset {dataset} --cache-dir {cache_dir} --horizon 6 --d-model 16 --num-heads 2 "
        "--encoder-layers 1 --decoder-layers 1 --camera-dropout 0 --ingest-workers 1"
    )
    config = parse(train_vfp.Config, flags.split(), "train_vfp.py")
    accelerator = make_accelerator(RunConfig())
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    normalizer = Normalizer.fit(data)
    torch.manual_seed(0)
    policy = train_vfp.Policy(config, checkpoint.PolicySpec.of(data))
    with torch.no_grad():  # zero-initialised projections would hide most gradients
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ddp_policy = accelerator.prepare(policy)

    # The first half of the global batch has no padding, the second is mostly padding.
    ends = [int(start) for start in store.episode_starts[1:]]
    rows = [0, 1, 2, 3, ends[0] - 1, ends[1] - 1, ends[2] - 2, ends[3] - 1]
    draws = 2
    x_0 = torch.randn(len(rows) * draws, config.horizon, store.action.shape[1])
    t = torch.rand(len(rows) * draws)
    share = len(rows) // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    wide = slice(mine.start * draws, mine.stop * draws)
    batch = data.__getitems__(rows[mine])
    count = accelerator.reduce((~batch.is_pad).sum().float(), "mean")
    loss = train_vfp.compute_loss(ddp_policy, batch, normalizer, config, (x_0[wide], t[wide]), count)
    accelerator.backward(loss)
    if accelerator.is_main_process:
        save_file({name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, Path(out))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
