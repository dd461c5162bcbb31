"""The cost of depth features: the cache, and a training step with and without it.

    python benchmarks/depth.py
    python benchmarks/depth.py --image-size 224 --batch-size 32 --mixed-precision bf16

Weights are random, which does not change timings. All loops take turns in one process, so that other work on
the machine slows all of them equally; a ratio is the median over turns. A step with depth is compared with
`train_vfp.py`, and with `train_vfp.py` given an extra view of as many tokens as the features have, which
costs nothing to compute. The remaining difference is the cost of reading and projecting features.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import field, replace
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_vfp
import train_vfp_depth
from common.accelerator import make_accelerator
from common.checkpoint import PolicySpec
from common.config import Flat, cli, options
from common.data import ChunkDataset, EpisodeStore, make_loader, open_dataset
from common.data.demo import demonstrate, record
from common.depth import DepthBackbone, DepthConfig, cached
from common.normalize import Normalizer
from common.optim import AveragedPolicy, GradientClipper, build_optimizer
from common.transformer import InfoEmbedder, Size


@options
class Config:
    """Measure the cost of depth features."""

    script: Flat[train_vfp_depth.Config] = field(
        default_factory=lambda: train_vfp_depth.Config(depth=DepthConfig(depth_weights="random"))
    )
    models: tuple[str, ...] = ("small", "base")
    """Depth Anything 3 models."""
    rounds: PositiveInt = 10
    """Turns of each loop."""
    turn_steps: PositiveInt = 4
    """Steps per turn."""


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:  # build the cache from scratch
        data = replace(config.script.data, cache_dir=Path(folder))
        if data.dataset == ("demo",):  # use a few of its episodes
            data = replace(data, dataset=(str(record(Path(folder) / "demo", demonstrate(5, seed=0))),))
        compare(replace(config, script=replace(config.script, data=data)))


def compare(config: Config) -> None:
    script = config.script
    accelerator = make_accelerator(script.run)
    device = accelerator.device
    store = open_dataset(script.data)
    data = ChunkDataset(store, range(store.num_episodes), script.horizon)
    normalizer = Normalizer.fit(data).to(device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{name}, batch {script.optim.batch_size}, {len(store.cameras)} cameras of {store.image_size[0]}x"
        f"{store.image_size[1]}, {accelerator.mixed_precision}"
    )
    loops = {"train_vfp": steps(train_vfp, vfp_config(script), data, normalizer, accelerator)}
    for model in config.models:
        with_depth = replace(script, depth=replace(script.depth, depth_model=model))
        backbone = DepthBackbone(with_depth.depth, store.image_size).to(device)
        measure_cache(store, backbone, device)
        stored = cached(store, backbone, [0], device)
        for loop, dataset in (("cached", data.on(stored)), ("live", data)):
            loops[f"{model}, {loop}"] = steps(train_vfp_depth, with_depth, dataset, normalizer, accelerator)
        loops[f"{model}, tokens for nothing"] = steps(
            train_vfp, vfp_config(script), data, normalizer, accelerator, stored.extras["depth"].shape
        )
    times = {name: [] for name in loops}
    for turn in range(config.rounds + 1):
        for name, loop in loops.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(config.turn_steps):
                next(loop)
            synchronize(device)
            if turn:  # the first turn is a warm-up
                times[name].append((time.perf_counter() - start) / config.turn_steps * 1000)
    print(f"{'':<28} {'ms / step':>9} {'/ train_vfp':>13} {'/ as many tokens':>18}")
    for name, values in times.items():
        ratio = median_ratio(values, times["train_vfp"])
        model, _, loop = name.partition(", ")
        equal = ""
        if loop in ("cached", "live"):
            equal = f"{median_ratio(values, times[f'{model}, tokens for nothing']):.3f}"
        print(f"{name:<28} {statistics.median(values):9.1f} {ratio:13.3f} {equal:>18}")


def median_ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def measure_cache(store: EpisodeStore, backbone: DepthBackbone, device: torch.device) -> None:
    """Build a cache from scratch; print its speed and size."""
    backbone(torch.zeros(1, 3, *store.image_size, device=device))
    before = folder_size(store.path)
    start = time.perf_counter()
    cached(store, backbone, [0], device)
    seconds = time.perf_counter() - start
    size = (folder_size(store.path) - before) / store.num_steps
    print(
        f"cache, {backbone.network.architecture.name}: {store.num_steps / seconds:.1f} frames/s, {size:,.0f} "
        f"bytes a frame ({backbone.num_tokens} tokens of {backbone.token_dim})"
    )


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def vfp_config(script: train_vfp_depth.Config) -> train_vfp.Config:
    """The same options for the script without depth."""
    values = {key: value for key, value in vars(script).items() if key != "depth"}
    return train_vfp.Config(**values)


class MoreTokens(train_vfp.Policy):
    """The policy of train_vfp.py with extra views that never change."""

    def __init__(self, config, spec, shape: tuple[int, ...]):
        """`shape` is the shape of the extra views: (C, L, D)."""
        super().__init__(config, spec)
        backbones = [getattr(self, f"{camera}_backbone") for camera in self.cameras]
        widths = [(b.token_dim, b.summary_dim) for b in backbones] + [(shape[-1],) * 2] * shape[0]
        proprio, size = (spec.proprio_history, spec.state_dim), Size(config.d_model, config.num_heads)
        self.info_embedder = InfoEmbedder(widths, proprio, size, config.encoder_layers, droppable=True)
        self.register_buffer("more", torch.randn(config.optim.batch_size, *shape))

    def observe(self, images: Tensor, proprio: Tensor, dropped: Tensor | None = None):
        views = [getattr(self, f"{c}_backbone")(images[:, n]) for n, c in enumerate(self.cameras)]
        views += [(tokens, tokens.mean(dim=1)) for tokens in self.more.unbind(1)]
        dropped = torch.cat([dropped, *[dropped[:, :1]] * self.more.shape[1]], dim=1)
        return self.action_decoder.context(self.info_embedder(views, proprio, dropped))


def steps(module, config, data: ChunkDataset, normalizer, accelerator, shape=None):
    """A training loop; yields after every step."""
    torch.manual_seed(0)
    device, spec = accelerator.device, PolicySpec.of(data)
    policy: nn.Module = module.Policy(config, spec) if shape is None else MoreTokens(config, spec, shape)
    policy.to(device).train()
    optimizer = build_optimizer(policy, config.optim)
    clip = GradientClipper(policy, optimizer, config.optim.grad_clip)
    averaged = AveragedPolicy(policy, optimizer, config.optim.ema_decay)
    batches = iter(make_loader(data, config.optim.batch_size, 0, pin_memory=device.type == "cuda"))
    while True:
        clip.begin_step()
        batch = next(batches).to(device)
        if module is train_vfp_depth:
            batch = module.with_depth(batch, policy)
        with accelerator.autocast():
            loss, _ = module.compute_loss(policy, batch, normalizer, config, train=True)
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()
        yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli(main, Config)
