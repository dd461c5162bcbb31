"""Depth Anything 3 (Lin et al. 2025) as a frozen feature extractor: images in, tokens out.

`DepthNetwork` is the single-view backbone of DA3, a DINOv2 vision transformer with changes, and loads the
official files; its own package cannot be installed together with LeRobot. Policies use `DepthBackbone`.
Since it is frozen and sees images that are not augmented, `cached` can compute all features once.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.config import MayChange, options
from common.console import say
from common.data import EpisodeStore
from common.data.cameras import known_name
from common.data.features import ensure_features
from common.errors import UserError
from common.files import read_json
from common.vision import IMAGENET_MEAN, IMAGENET_STD, brief, hub_answers

PATCH = 14
PREFIX = "model.backbone.pretrained."  # prefix of the backbone's weights in official files


@options
class DepthConfig:
    """Depth Anything 3 as an additional visual stream."""

    depth_model: Literal["small", "base", "large", "mono", "metric"] = "small"
    """Depth Anything 3 model. small and base, and mono and metric (as big as large), are Apache-2.0; large's
    weights may not be used commercially (CC BY-NC 4.0)."""
    depth_weights: str | None = None
    """Its weights: a folder with the official config.json and model.safetensors, a hub name, or `random`
    (`random:SEED`), which works but makes the features meaningless. Default: the official ones. A run that
    starts from another with depth (--init-from) has that run's."""
    depth_layers: tuple[int, ...] = ()
    """Blocks whose tokens become features, counted from 0, concatenated. Default: the last."""
    depth_pool: PositiveInt = 1
    """Tokens to average along each side of the image: 2 leaves a quarter of the features."""
    depth_cameras: tuple[str, ...] = ()
    """Cameras that get depth features. Default: the head camera."""
    depth_cache: MayChange[Literal["on", "off"]] = "on"
    """Compute features once per frame and keep them by the episode store, or compute them every step."""


@dataclass(frozen=True)
class Architecture:
    """Shape of a DA3 backbone, by the name in its official config.json."""

    name: str
    dim: int
    num_blocks: int
    num_heads: int
    alt_start: float = math.inf
    """The block from which odd blocks are global, the class token is the camera's, and queries and keys are
    normalized and rotated; there is none in models for a single view."""

    @property
    def hub(self) -> str:
        """Hub name of the official weights."""
        return f"depth-anything/{self.name.upper()}" + "-1.1" * (self.name == "da3-large")

    def is_global(self, block: int) -> bool:
        return block >= self.alt_start and block % 2 == 1


ARCHITECTURES = {
    "small": Architecture("da3-small", 384, 12, 6, 4),
    "base": Architecture("da3-base", 768, 12, 12, 4),
    "large": Architecture("da3-large", 1024, 24, 16, 8),
    "mono": Architecture("da3mono-large", 1024, 24, 16),
    "metric": Architecture("da3metric-large", 1024, 24, 16),
}


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(dim // num_heads), norm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        # Under autocast, norms return float32 while v stays in half precision.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads, qk_norm)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation) * self.ls1["gamma"]
        return x + self.mlp(self.norm2(x)) * self.ls2["gamma"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, L, head_dim), each half on its own."""
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class DepthNetwork(nn.Module):
    """The single-view backbone of Depth Anything 3; parameter names match the official files."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.architecture, dim = architecture, architecture.dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 37 * 37 + 1, dim) * 0.02)
        if architecture.alt_start < math.inf:
            self.camera_token = nn.Parameter(torch.randn(1, 2, dim) * 0.02)
        self.blocks = nn.ModuleList(
            _Block(dim, architecture.num_heads, qk_norm=i >= architecture.alt_start)
            for i in range(architecture.num_blocks)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Outputs (B, L, dim) of these blocks, in order, for images (B, 3, H, W), normalized.

        The sides of images are multiples of 14.
        """
        architecture = self.architecture
        grid = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self._positions(grid).to(x.dtype)
        rotations, outputs = self._rotations(grid, x.device), []
        for i, block in enumerate(self.blocks[: max(layers) + 1]):
            if i == architecture.alt_start:
                x = torch.cat([self.camera_token[:, :1].expand(len(x), -1, -1).to(x.dtype), x[:, 1:]], dim=1)
            x = block(x, rotations[architecture.is_global(i)] if i >= architecture.alt_start else None)
            if i in layers:
                outputs.append(self.norm(x)[:, 1:])
        return outputs

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned positions (one for the class token, and 37 x 37), resized to another grid."""
        if grid == (37, 37):
            return self.pos_embed
        of_class, of_patches = self.pos_embed.float().split([1, 37 * 37], dim=1)
        of_patches = of_patches.transpose(1, 2).unflatten(2, (37, 37))
        # The network was trained with this tenth: without it positions scale slightly differently.
        scale = tuple((side + 0.1) / 37 for side in grid)
        of_patches = F.interpolate(of_patches, scale_factor=scale, mode="bicubic")
        return torch.cat([of_class, of_patches.flatten(2).transpose(1, 2)], dim=1)

    def _rotations(self, grid: tuple[int, int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines (L, head_dim) of rotary embedding (Su et al. 2021), for local and global blocks.

        Between views, the patches of one have no order.
        """
        y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
        local = F.pad(torch.stack([y, x], dim=-1).flatten(0, 1) + 1, (0, 0, 1, 0))  # class token at (0, 0)
        quarter = self.architecture.dim // self.architecture.num_heads // 4
        frequencies = 1.0 / 100.0 ** (torch.arange(quarter, device=device) / quarter)
        rotations = []
        for positions in (local, local.clamp(max=1)):
            angles = positions.float().unsqueeze(-1) * frequencies  # (L, 2, quarter)
            angles = angles.repeat(1, 1, 2).flatten(1)  # y y x x
            rotations.append((angles.cos(), angles.sin()))
        return rotations


class DepthBackbone(nn.Module):
    """Frozen features of Depth Anything 3, for policies: `num_tokens` in a `feature_grid`, of `token_dim`."""

    def __init__(self, config: DepthConfig, image_size: tuple[int, int], pretrained: bool = True):
        """If not `pretrained`, the checkpoint that is loaded next provides the weights.

        A UserError names weights that cannot be loaded, or layers that the model does not have.
        """
        super().__init__()
        architecture = ARCHITECTURES[config.depth_model]
        self.layers = tuple(sorted(set(config.depth_layers))) or (architecture.num_blocks - 1,)
        if not 0 <= self.layers[0] <= self.layers[-1] < architecture.num_blocks:
            raise UserError(
                f"--depth-layers {' '.join(map(str, config.depth_layers))}: --depth-model "
                f"{config.depth_model} has blocks 0 to {architecture.num_blocks - 1}."
            )
        self.pool = config.depth_pool
        self.grid = tuple(max(round(side / PATCH), 1) for side in image_size)
        self.input_size = tuple(PATCH * side for side in self.grid)  # of the images that the network sees
        self.token_dim = architecture.dim * len(self.layers)
        self.feature_grid = tuple(math.ceil(side / self.pool) for side in self.grid)
        self.num_tokens = math.prod(self.feature_grid)
        self.network = _load_network(config, architecture) if pretrained else DepthNetwork(architecture)
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        if pretrained and self.input_size != image_size:
            given, taken = ("x".join(map(str, size)) for size in (image_size, self.input_size))
            say(f"depth: images of {given} are resized to {taken}, multiples of {PATCH}")

    def train(self, mode: bool = True) -> "DepthBackbone":
        return super().train(False)

    def __deepcopy__(self, memo: dict) -> "DepthBackbone":
        return self  # never changes: averages of a policy's weights share it

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, L, token_dim) float32 of images (B, 3, H, W), uint8 or float in [0, 1]."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[-2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bilinear", antialias=True)
        device = images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            layers = self.network((images - self.mean) / self.std, self.layers)
        features = torch.cat(layers, dim=-1).float()
        if self.pool > 1:
            features = features.transpose(1, 2).unflatten(2, self.grid)
            features = F.avg_pool2d(features, self.pool, ceil_mode=True, count_include_pad=False)
            features = features.flatten(2).transpose(1, 2)
        return features

    def of_cameras(self, images: Tensor, cameras: Sequence[int]) -> Tensor:
        """Features (B, C, L, token_dim) of C cameras of images (B, N, 3, H, W)."""
        # Slices: an index that comes as a list is copied to the device, which is waited for.
        chosen = torch.stack([images[:, n] for n in cameras], dim=1)
        return self(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])

    def identity(self) -> dict:
        """Everything that determines features, except the images: settings and a hash of the weights."""
        sha = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.cpu().numpy())
        return {
            "network": self.network.architecture.name,
            "weights": sha.hexdigest(),
            "layers": list(self.layers),
            "pool": self.pool,
            "input_size": list(self.input_size),
            "precision": "bfloat16" if self.mean.device.type == "cuda" else "float32",
        }


def _load_network(config: DepthConfig, architecture: Architecture) -> DepthNetwork:
    source = config.depth_weights or architecture.hub
    kind, _, seed = source.partition(":")
    if kind == "random":
        if not (seed or "0").isdigit():
            raise UserError(f"--depth-weights {source}: write it as random:SEED, with a whole number.")
        say("depth: the weights of Depth Anything 3 are RANDOM, its features are meaningless")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed or 0))
            return DepthNetwork(architecture)
    folder = _snapshot(source, architecture)
    _check_model_name(folder / "config.json", architecture)
    file = folder / "model.safetensors"
    with torch.device("meta"):
        network = DepthNetwork(architecture)
    try:
        with safe_open(file, "pt") as content:  # without the heads
            names = [name for name in content.keys() if name.startswith(PREFIX)]  # noqa: SIM118, no mapping
            weights = {name.removeprefix(PREFIX): content.get_tensor(name) for name in names}
        network.load_state_dict(weights, assign=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        why = f"{file} is damaged or not {architecture.name} ({brief(error)})"
        raise UserError(f"{why}: download it again, or give another --depth-weights.") from None
    if config.depth_model == "large":
        say("depth: large is licensed CC BY-NC 4.0: no commercial use, also of policies trained with it")
    return network.float()


def _snapshot(source: str, architecture: Architecture) -> Path:
    """Folder with config.json and model.safetensors; a hub name is downloaded."""
    path, names = Path(source).expanduser(), ["config.json", "model.safetensors"]
    if path.exists() or source.startswith(("/", ".", "~")) or source.count("/") != 1:
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            what = f"has no {' and no '.join(absent)}" if path.exists() else "does not exist"
            raise UserError(f"--depth-weights {source} {what}: give a snapshot of {architecture.hub}.")
        return path
    from huggingface_hub import snapshot_download

    far = not hub_answers(source)
    try:
        return Path(snapshot_download(source, allow_patterns=names, local_files_only=far))
    except Exception as error:
        reason = "it is not in the hub's cache here, and there is no connection" if far else brief(error)
        raise UserError(
            f"Depth Anything 3 cannot be loaded from {source} ({reason}): download it where there is a "
            f"connection and give its folder as --depth-weights, or try without it: --depth-weights random."
        ) from None


def _check_model_name(path: Path, wanted: Architecture) -> None:
    try:
        name = read_json(path)["model_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "an unknown model"
    if name != wanted.name:
        known = [key for key, architecture in ARCHITECTURES.items() if architecture.name == name]
        way = f"--depth-model {known[0]}" if known else "an official snapshot as --depth-weights"
        raise UserError(f"{path} is of {name}, not {wanted.name}: give {way}.")


def camera_numbers(config: DepthConfig, cameras: Sequence[str]) -> list[int]:
    """Indices of the cameras with depth among a policy's cameras; a UserError names a missing one."""
    names = [known_name(name, cameras) for name in config.depth_cameras]
    for name in set(names) - set(cameras):
        raise UserError(f"--depth-cameras {name}: there is no such camera; there are {', '.join(cameras)}.")
    return [cameras.index(name) for name in dict.fromkeys(names or cameras[:1])]


def cached(
    store: EpisodeStore, backbone: DepthBackbone, cameras: Sequence[int], device: torch.device
) -> EpisodeStore:
    """The store with the features of these cameras, float16, computed now if missing."""
    backbone.to(device)

    def compute(images: Tensor) -> Tensor:
        return backbone.of_cameras(images[:, list(cameras)].to(device), range(len(cameras))).half().cpu()

    identity = {**backbone.identity(), "cameras": [store.cameras[n] for n in cameras]}
    shape = (len(cameras), backbone.num_tokens, backbone.token_dim)
    remedy = "--depth-pool 2, fewer --depth-layers, --depth-cache off"
    batch_size = 256 if device.type == "cuda" else 16
    return ensure_features(store, "depth", identity, shape, compute, batch_size, remedy)
