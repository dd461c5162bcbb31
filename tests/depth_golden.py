"""How `golden/depth*.safetensors` were made: outputs of the official Depth Anything 3 for seeded weights.

    uv pip install --target official --no-deps depth-anything-3 omegaconf addict einops antlr4-python3-runtime
    PYTHONPATH=official python tests/depth_golden.py

Its dependencies are left out since they conflict with LeRobot's; the backbone needs none of them.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import depth
from common.depth import Architecture

SIZE = (56, 84)  # pixels
ARCHITECTURES = {
    "views": Architecture("golden", 64, 6, 2, 2),  # as small, base and large are
    "one_view": Architecture("golden", 64, 6, 2),  # as mono and metric are
}
LARGE_SIZES = ((224, 224), (518, 518), (252, 336))
LARGE = {  # the published widths; six of the 24 blocks are enough
    "small": depth.ARCHITECTURES["small"],
    "few": Architecture("few", 1024, 6, 16),
}


def official(architecture: Architecture) -> torch.nn.Module:
    """The official network with this architecture."""
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer

    views = architecture.alt_start < math.inf
    start = architecture.alt_start if views else -1
    return DinoVisionTransformer(
        img_size=518,
        patch_size=14,
        embed_dim=architecture.dim,
        depth=architecture.num_blocks,
        num_heads=architecture.num_heads,
        alt_start=start,
        qknorm_start=start,
        rope_start=start,
        cat_token=views,
    ).eval()


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    """Fill every parameter: initial unit scales and zero positions would hide mistakes."""
    random = np.random.default_rng(0)
    for _, parameter in sorted(network.named_parameters()):
        values = torch.from_numpy(random.standard_normal(parameter.shape).astype(np.float32))
        parameter.copy_(0.1 * values if parameter.ndim > 1 else 0.5 + 0.3 * values)


def images(size: tuple[int, int] = SIZE) -> torch.Tensor:
    """(1, 3, H, W), like a normalized image."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, *size)).astype(np.float32))


@torch.no_grad()
def run(network: torch.nn.Module, architecture: Architecture, size: tuple[int, int] = SIZE) -> dict:
    """Outputs of the official network: `layer` of every block."""
    blocks = list(range(architecture.num_blocks))
    _, layers = network.get_intermediate_layers(images(size)[:, None], blocks[-1:], export_feat_layers=blocks)
    return {f"layer.{n}": layer[:, 0] for n, layer in enumerate(layers)}


def sampled(outputs: dict, count: int = 64) -> dict:
    """Evenly spaced numbers of each output: all of them would take hundreds of megabytes."""
    return {
        name: x.flatten()[torch.linspace(0, x.numel() - 1, count, dtype=torch.float64).long()]
        for name, x in outputs.items()
    }


def main() -> None:
    folder = Path(__file__).parent / "golden"
    tensors, large = {}, {}
    for name, architecture in ARCHITECTURES.items():
        network = official(architecture)
        randomise(network)
        tensors |= {f"{name}.{key}": x.contiguous() for key, x in run(network, architecture).items()}
    for name, architecture in LARGE.items():
        network = official(architecture)
        randomise(network)
        for size in LARGE_SIZES:
            outputs = sampled(run(network, architecture, size))
            large |= {f"{name}.{size[0]}x{size[1]}.{key}": x for key, x in outputs.items()}
    save_file(tensors, folder / "depth.safetensors")
    save_file(large, folder / "depth_large.safetensors")


if __name__ == "__main__":
    main()
