"""Untrained policies of nearly the same size, LeRobot's and ours, for `peers.py` and `latency.py`.

LeRobot's ACT and diffusion cannot be smaller than a ResNet-18, so there are two groups. In `resnet18` every
policy has a ResNet-18 backbone, except multi-task DiT, which supports only CLIP. In `conv` ours have their
own small network, and LeRobot's are as small as possible.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.methods import config_file, script_of
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import Batch
from common.inference import RobotPolicy, load_script
from common.normalize import Normalizer, fit_statistics

Group = Literal["resnet18", "conv"]
CAMERAS = ("observation.images.cam_head", "observation.images.cam_left", "observation.images.cam_right")
DIM, HORIZON = 14, 16  # dimensions of state and action; actions in a chunk
PARTNERS = {"act": "train_naive_fm", "diffusion": "train_vfp", "multi_task_dit": "train_naive_fm"}
"""LeRobot's policies, and ours to whose parameters they are matched: both have one backbone for all cameras,
or both have one per camera."""
WIDTHS = range(32, 265, 8)
CLIP_LAYERS = 8


def ours(method: str, group: Group, size: tuple[int, int], device: str = "cpu") -> RobotPolicy:
    """A policy of a training script, with the networks configured for the built-in task."""
    script, flags = load_script(script_of(method)), ["--backbone", group]
    if config_file(method).is_file():
        flags += ["--config", str(config_file(method))]
    if method == "train_vfp_depth":
        flags += ["--depth-weights", "random"]
    config = parse(script.Config, flags, script_of(method))
    names = tuple(f"joint_{i}" for i in range(DIM))
    cameras = tuple(key.rpartition("cam_")[2] for key in CAMERAS)
    spec = PolicySpec(cameras, size, names, names, 30.0, CAMERAS)
    recorded = fit_statistics(np.random.default_rng(0).normal(size=(1000, DIM)).astype(np.float32))
    action_range = torch.stack([recorded["min"], recorded["max"]])
    normalizer = Normalizer(recorded, recorded, action_range, config.normalization)
    torch.manual_seed(0)
    return RobotPolicy(script.Policy(config, spec), normalizer, config, spec, script, torch.device(device), 0)


class Peer(NamedTuple):
    """A LeRobot policy with its pre- and postprocessors."""

    model: Any
    before: Callable[[dict], dict]
    after: Callable[[Tensor], Tensor]


def peer(kind: str, options: dict[str, Any], size: tuple[int, int], device: str = "cpu") -> Peer:
    """A LeRobot policy; `options` are those of `widened`, and others of its configuration."""
    from lerobot.policies.factory import make_pre_post_processors

    model = network(kind, options, size, device).to(device)
    one = {"mean": torch.zeros(DIM), "std": torch.ones(DIM), "min": -torch.ones(DIM), "max": torch.ones(DIM)}
    channels = {name: value[:3, None, None] for name, value in one.items()}
    statistics = dict.fromkeys(("observation.state", "action"), one) | dict.fromkeys(CAMERAS, channels)
    return Peer(model, *make_pre_post_processors(model.config, dataset_stats=statistics))


def network(kind: str, options: dict[str, Any], size: tuple[int, int], device: str = "cpu") -> nn.Module:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config

    if kind == "multi_task_dit":
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # each half of CLIP is loaded alone and warns about the other's weights
        write_clip(Path(options["vision_encoder_name"]))
    config = make_policy_config(kind, device=device, push_to_hub=False, **options)
    visual = {key: PolicyFeature(FeatureType.VISUAL, (3, *seen(kind, size))) for key in CAMERAS}
    config.input_features = visual | {"observation.state": PolicyFeature(FeatureType.STATE, (DIM,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (DIM,))}
    torch.manual_seed(0)
    return get_policy_class(kind)(config)


def seen(kind: str, size: tuple[int, int]) -> tuple[int, int]:
    """The image size of a LeRobot policy: CLIP takes only squares, here with at least as many pixels."""
    if kind != "multi_task_dit":
        return size
    side = 16 * round((size[0] * size[1]) ** 0.5 / 16 + 0.49)  # in whole patches
    return side, side


def widened(kind: str, width: int, size: tuple[int, int], clips: Path, separate: bool = False) -> dict:
    """Options of a LeRobot policy: its default proportions at this width, chunk and observation as ours."""
    if kind == "act":
        wide = {"dim_model": width, "dim_feedforward": width * 25 // 4}
        return {"pretrained_backbone_weights": None, "chunk_size": HORIZON, "n_action_steps": HORIZON, **wide}
    chunk = {"n_obs_steps": 1, "horizon": HORIZON, "n_action_steps": HORIZON}
    if kind == "diffusion":
        wide = {"down_dims": [width, 2 * width, 4 * width], "use_separate_rgb_encoder_per_camera": separate}
        return {"pretrained_backbone_weights": None, "resize_shape": list(size), **chunk, **wide}
    encoder = str(clips / f"clip-{2 * width}-{seen(kind, size)[0]}")
    wide = {"hidden_dim": width, "num_heads": 4, "timestep_embed_dim": width}
    wide |= {"vision_encoder_name": encoder, "text_encoder_name": encoder, "image_crop_shape": None}
    return {"objective": "flow_matching", **chunk, **wide}


def write_clip(folder: Path) -> None:
    """Save a random CLIP with the width and image side in the folder's name; its tokens are letters."""
    if (folder / "model.safetensors").is_file():
        return
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    width, side = map(int, folder.name.split("-")[1:])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": CLIP_LAYERS}
    vision |= {"num_attention_heads": 4, "image_size": side, "patch_size": 16}
    text |= {"vocab_size": len(words), **ends}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)


def nearest(widths: Sequence[int], count: Callable[[int], int], target: int) -> int:
    """The width whose count is nearest to the target; `count` must increase with the width."""
    place = bisect_left(widths, target, key=count)
    return min(widths[max(place - 1, 0) : place + 1], key=lambda width: abs(count(width) - target))


def match(kind: str, group: Group, target: int, size: tuple[int, int], clips: Path) -> dict:
    """Options with which a LeRobot policy has about `target` parameters."""
    separate = kind == "diffusion" and group == "resnet18"  # its default, and as in its partner

    @cache
    def count(width: int) -> int:
        reads = kind == "multi_task_dit"  # reads CLIP's weights, so it cannot be on the meta device
        with nullcontext() if reads else torch.device("meta"):
            return parameters(network(kind, widened(kind, width, size, clips, separate), size))

    return widened(kind, nearest(WIDTHS, count, target), size, clips, separate)


def parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Arithmetic


def flops(compute: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions, including attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # knows no CPU kernels
        compute()
    return counter.get_total_flops()


def our_step(policy: RobotPolicy, batch_size: int) -> Callable[[], None]:
    """Loss and gradients of a batch."""
    size, policy.model = policy.spec.image_size, policy.model.train()
    images = torch.zeros(batch_size, len(CAMERAS), 3, *size, dtype=torch.uint8)
    proprio, actions = torch.randn(batch_size, 1, DIM), torch.randn(batch_size, HORIZON, DIM)
    is_pad = torch.zeros(batch_size, HORIZON, dtype=torch.bool)
    batch = Batch(images, proprio, actions, is_pad, torch.arange(batch_size))
    compute_loss = policy.script.compute_loss
    return lambda: compute_loss(policy.model, batch, policy.normalizer, policy.config, train=True)[
        0
    ].backward()


def their_step(found: Peer, kind: str, size: tuple[int, int], batch_size: int) -> Callable[[], None]:
    """Loss and gradients of a batch."""
    steps = () if kind == "act" else (1,)  # ACT's observations have no time dimension
    batch = dict.fromkeys(CAMERAS, torch.zeros(batch_size, *steps, 3, *seen(kind, size)))
    batch["observation.state"] = torch.randn(batch_size, *steps, DIM)
    batch |= {"action": torch.randn(batch_size, HORIZON, DIM), "task": ["measure"] * batch_size}
    batch["action_is_pad"] = torch.zeros(batch_size, HORIZON, dtype=torch.bool)
    found.model.train()
    return lambda: found.model(found.before(batch))[0].backward()
