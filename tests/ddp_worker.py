"""Run by torchrun from test_launch.py: gradients of one step, with one batch split over the processes.

For every script whose loss is a mean over samples, independent of the rest of the batch.

Arguments: the folder of a dataset, its cache folder, where process 0 writes the gradients.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import train_naive_fm
import train_vfp
import train_vfp_depth
from common import checkpoint, depth
from common.accelerator import make_accelerator
from common.config import RunConfig, parse
from common.data import ChunkDataset, open_dataset
from common.normalize import Normalizer


def main(dataset: str, cache_dir: str, out: str) -> None:
    accelerator = make_accelerator(RunConfig())
    grads = {}
    depth.ARCHITECTURES["small"] = depth.Architecture("da3-small", 32, 4, 2, 2)
    for script, flags in (
        (train_vfp, "--camera-dropout 0"),
        (train_vfp_depth, "--camera-dropout 0 --depth-weights random"),
        (train_naive_fm, ""),
    ):
        for name, grad in gradients(script, flags, dataset, cache_dir, accelerator).items():
            grads[f"{script.__name__}.{name}"] = grad
    if accelerator.is_main_process:
        save_file(grads, Path(out))
    accelerator.end_training()


def gradients(script, flags: str, dataset: str, cache_dir: str, accelerator) -> dict[str, torch.Tensor]:
    flags += (
        f" --dataset {dataset} --cache-dir {cache_dir} --horizon 6 --d-model 16 --num-heads 2 "
        "--encoder-layers 1 --decoder-layers 1 --ingest-workers 1"
    )
    config = parse(script.Config, flags.split(), f"{script.__name__}.py")
    store = open_dataset(config.data)
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    normalizer = Normalizer.fit(data)
    torch.manual_seed(0)
    policy = script.Policy(config, checkpoint.PolicySpec.of(data))
    with torch.no_grad():  # zero-initialized projections would hide most gradients
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ddp_policy = accelerator.prepare(policy)

    # The first half of the global batch has no padding, the second is mostly padding.
    ends = [int(start) for start in store.episode_starts[1:]]
    rows = [0, 1, 2, 3, ends[0] - 1, ends[1] - 1, ends[2] - 2, ends[3] - 1]
    flow_samples = 2
    x_0 = torch.randn(len(rows) * flow_samples, config.horizon, store.action.shape[1])
    t = torch.rand(len(rows) * flow_samples)
    share = len(rows) // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    wide = slice(mine.start * flow_samples, mine.stop * flow_samples)
    batch = data.__getitems__(rows[mine])
    if script is train_vfp_depth:
        batch = script.with_depth(batch, policy)
    count = accelerator.reduce((~batch.is_pad).sum().float(), "mean")
    noise = {"x_0": x_0[wide], "t": t[wide]}
    loss, _ = script.compute_loss(ddp_policy, batch, normalizer, config, train=True, count=count, **noise)
    accelerator.backward(loss)
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    main(*sys.argv[1:])
