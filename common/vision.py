"""Camera images to tokens and a summary: backbones, earlier frames, augmentation, camera dropout."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import Share, options
from common.errors import UserError
from common.transformer import sincos_position_2d

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
SMALLEST_SIDE = {"conv": 16, "resnet18": 32, "resnet34": 32, "resnet50": 32}  # pixels, of those defined here
CONVOLUTIONAL = {"convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet"}  # without patches
View = tuple[Tensor, Tensor]
"""Tokens (B, L, D_v) and summary (B, D_s) of a frame."""


@options
class VisionConfig:
    """Vision backbone and augmentation of training images."""

    backbone: str = "conv"
    """`conv` (a small network for small images), `resnet18`, `resnet34`, `resnet50` (all from scratch), or
    a pretrained Hugging Face vision model by name or local path, for example `facebook/dinov2-base`."""
    aug_shift: Share = 0.0
    """Largest random shift, as a share of the image's side; the edge is repeated. 0.05 is a usual value."""
    aug_rotate: NonNegativeFloat = 0.0
    """Largest random rotation, degrees. 3 is a usual value."""
    aug_color: Share = 0.0
    """Strength of random brightness, contrast and saturation, in [0, 1]. 0.3 is a usual value."""
    aug_blur: NonNegativeFloat = 0.0
    """Largest standard deviation of a random Gaussian blur, pixels. 1 is a usual value."""


class Backbone(nn.Module):
    """Images (B, 3, H, W) to tokens (B, L, token_dim), one per region, and a summary (B, summary_dim).

    Images are float, in [0, 1]; each network normalizes the pixels itself. With a `film_dim`, `forward` also
    takes a scale and a shift of its features for each image, see `InfoEmbedder.film`.
    """

    token_dim: int
    summary_dim: int
    num_tokens: int
    """L, at the image size that the backbone was built for."""
    hf_config: dict | None = None
    """Architecture, if it is a Hugging Face model."""
    film_dim = 0
    """Channels, halfway through the network, that an instruction may scale and shift; 0: none."""
    _checkpoints = False

    def _modulated(self, x: Tensor, film: Tensor | None) -> Tensor:
        """Features (B, film_dim, H, W), scaled and shifted by (B, 2 film_dim)."""
        if film is None:
            return x
        scale, shift = film[..., None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift

    def checkpoint_activations(self) -> None:
        """In training, keep only the input of each stage, and recompute the rest for its gradient.

        The gradient is the same to the last bit: random numbers are drawn again as they were.
        """
        self._checkpoints = True

    def _stages(self, stages: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run the stages in order."""
        for stage in stages:
            x = checkpoint(stage, x, use_reentrant=False) if self._checkpoints and self.training else stage(x)
        return x


def build_backbone(
    name: str, image_size: tuple[int, int], pretrained: bool = True, hf_config: dict | None = None
) -> Backbone:
    """The backbone that `VisionConfig.backbone` names, for images of (H, W) pixels.

    Unless `pretrained`, a Hugging Face model has the architecture `hf_config` and random weights, to be
    replaced by a checkpoint's. A UserError says what cannot be loaded, or which image size does not fit.
    """
    if name not in SMALLEST_SIDE:
        return HuggingFaceBackbone(name, image_size, pretrained, hf_config)
    least = SMALLEST_SIDE[name]
    if min(image_size) < least:
        raise UserError(f"--backbone {name} needs at least {least}x{least} pixels: raise --image-size.")
    return ConvBackbone(image_size) if name == "conv" else ResNetBackbone(name, image_size)


def require_backbone(name: str, image_size: tuple[int, int]) -> None:
    """Raise the UserError that `build_backbone` will raise; changes no random state."""
    with torch.random.fork_rng(devices=[]):
        build_backbone(name, image_size)


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm: batch norm misbehaves with small batches, averaged weights and several processes."""
    return nn.GroupNorm(max(channels // 16, 1), channels)


def _conv(channels_in: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2)
    return nn.Sequential(convolution, _norm(channels), nn.SiLU())


class ConvBackbone(Backbone):
    """A small convolutional network, trained from scratch.

    The summary is the mean token and the expected image coordinates of 32 learned features (spatial softmax,
    Finn et al. 2016), which localise an object to a fraction of a pixel.
    """

    def __init__(self, image_size: tuple[int, int], num_keypoints: int = 32, max_tokens: int = 64):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 5, 2), _conv(32, 64, 3, 2), _conv(64, 64, 3, 1))
        self.keypoints = nn.Conv2d(64, num_keypoints, 1)
        with torch.no_grad():
            # By default, logits start out nearly equal: every keypoint sits in the middle of every image, and
            # hundreds of steps pass before the first one finds something to look at.
            self.keypoints.weight.mul_(4)
        grid = [math.ceil(side / 4) for side in image_size]
        coordinates = torch.cartesian_prod(*(torch.linspace(-1, 1, side) for side in grid))
        self.register_buffer("coordinates", coordinates, persistent=False)  # (H/4 * W/4, 2)
        stages, channels = [], 64
        while len(stages) < 2 or grid[0] * grid[1] > max_tokens:
            stages.append(_conv(channels, 128, 3, 2))
            channels, grid = 128, [math.ceil(side / 2) for side in grid]
        stages.append(nn.Conv2d(128, 128, 1))
        self.out = nn.Sequential(*stages)
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], 128) * 0.02)
        self.token_dim, self.summary_dim, self.num_tokens = 128, 2 * num_keypoints + 128, grid[0] * grid[1]
        self.film_dim = 64

    def forward(self, images: Tensor, film: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self._modulated(self._stages(self.stem, 2 * images - 1), film)
        attention = self.keypoints(features).float().flatten(2).softmax(dim=-1)  # (B, keypoints, H/4 * W/4)
        with torch.autocast(images.device.type, enabled=False):  # half precision would cost whole pixels
            keypoints = attention @ self.coordinates
        tokens = self._stages(self.out, features).flatten(2).transpose(1, 2) + self.position
        return tokens, torch.cat([keypoints.flatten(1), tokens.mean(dim=1)], dim=1)


class ResNetBackbone(Backbone):
    """torchvision's ResNet (He et al. 2016) with group normalization, trained from scratch."""

    def __init__(self, name: str, image_size: tuple[int, int]):
        super().__init__()
        from torchvision.models import resnet

        network = getattr(resnet, name)(weights=None, norm_layer=_norm)
        self.network = nn.Sequential(*list(network.children())[:-2])  # without pooling and classifier
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        grid = [math.ceil(side / 32) for side in image_size]
        self.token_dim = self.summary_dim = network.fc.in_features
        self.num_tokens = math.prod(grid)
        self.register_buffer("position", sincos_position_2d(*grid, self.token_dim), persistent=False)
        self.film_dim = self.token_dim // 4

    def forward(self, images: Tensor, film: Tensor | None = None) -> tuple[Tensor, Tensor]:
        half = len(self.network) - 2  # two stages of residual blocks before, two behind
        first = self.network[:4], *self.network[4:half]  # its ReLU overwrites the input, so not a stage alone
        features = self._stages(first, (images - self.mean) / self.std)
        features = self._stages(self.network[half:], self._modulated(features, film))
        tokens = features.flatten(2).transpose(1, 2)
        return tokens + self.position, tokens.mean(dim=1)


class HuggingFaceBackbone(Backbone):
    """Any Hugging Face vision model: DINOv2, DINOv3, SigLIP, CLIP, C-RADIO, ViT-MAE, Swin, ConvNeXt, ...

    Tokens are the patch tokens, without class and register tokens, or the last feature map of a convolutional
    model; the summary is the class token, the pooled output where there is no class token, else the mean.
    """

    def __init__(
        self, name: str, image_size: tuple[int, int], pretrained: bool = True, hf_config: dict | None = None
    ):
        super().__init__()
        self.network, processor, absent = _load_huggingface(name, None if pretrained else hf_config)
        config = self.network.config
        if config.model_type == "dinov3_vit":  # in training it would stretch the patches' positions at random
            config.pos_embed_shift = config.pos_embed_jitter = config.pos_embed_rescale = None
        self.hf_config = config.to_dict()
        knows_sizes = "interpolate_pos_encoding" in signature(self.network.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if knows_sizes else {}
        self._is_radio = config.model_type == "radio"
        patch = None if config.model_type in CONVOLUTIONAL else getattr(config, "patch_size", None)
        self._patch = patch = patch if isinstance(patch, int) else None
        if patch and any(side % patch for side in image_size):
            near = " or ".join(str(max(patch * (image_size[0] // patch + i), patch)) for i in (0, 1))
            raise UserError(
                f"--backbone {name} takes images whose sides are multiples of {patch}, not "
                f"{image_size[0]}x{image_size[1]}: choose --image-size {near}."
            )
        mean, std = (HALF, HALF) if "siglip" in config.model_type else (IMAGENET_MEAN, IMAGENET_STD)
        mean, std = processor.get("image_mean") or mean, processor.get("image_std") or std
        if self._is_radio:  # normalizes inside
            mean, std = (0.0,) * 3, (1.0,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self._leading: int | None = None  # tokens before those of the patches: the first forward counts them
        self._measure(name, image_size, absent)

    def checkpoint_activations(self) -> None:
        """The same, with the network's own checkpointing; a UserError if it has none."""
        network = self.network
        # Batch norm would count every image twice.
        counts = any("BatchNorm" in type(module).__name__ for module in network.modules())
        if counts or not network.supports_gradient_checkpointing:
            raise UserError(
                f"--checkpoint-activations: a {network.config.model_type} cannot recompute activations: "
                f"leave the flag out, or choose another --backbone, for example a vision transformer."
            )
        old = network.gradient_checkpointing_enable  # its name in older versions of transformers
        getattr(network, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(pixel_values=(images - self.mean) / self.std, **self._options)
        if self._is_radio:
            return out.features, out.summary
        hidden = out.last_hidden_state
        if hidden.ndim == 4:  # a feature map
            tokens = hidden.flatten(2).transpose(1, 2)
            return tokens, tokens.mean(dim=1)
        if self._leading is None:
            self._leading = self._count_leading(hidden.shape[1], images.shape[-2:])
        tokens = hidden[:, self._leading :]
        if self._leading:
            return tokens, hidden[:, 0]
        pooled = getattr(out, "pooler_output", None)
        return tokens, tokens.mean(dim=1) if pooled is None else pooled.flatten(1)

    def _count_leading(self, length: int, image_size: tuple[int, int]) -> int:
        """How many tokens of a sequence come before those of the image's regions."""
        registers = getattr(self.network.config, "num_register_tokens", None) or 0
        for stride in [(self._patch or 4) * 2**k for k in range(6)]:  # some networks merge patches
            extra = length - math.prod(math.ceil(side / stride) for side in image_size)
            if extra in {0, 1, 2, registers, 1 + registers}:
                return extra
        raise ValueError(f"its {length} tokens form no grid")

    def _measure(self, name: str, image_size: tuple[int, int], absent: set[str]) -> None:
        """Run once: learn the layout of the tokens, and freeze weights that get no gradient.

        DistributedDataParallel would wait for the gradients of such weights (mask tokens, unused heads).
        """
        named = dict(self.network.named_parameters())
        self.network.eval()  # in training, batch norm refuses one image of one pixel
        try:
            with torch.enable_grad():
                tokens, summary = self(torch.zeros(1, 3, *image_size))
                output = tokens.sum() + summary.sum()
                grads = torch.autograd.grad(output, list(named.values()), allow_unused=True)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"--backbone {name} cannot take images of {image_size[0]}x{image_size[1]} "
                f"({brief(error)}): choose another --image-size, or another backbone."
            ) from None
        for parameter, grad in zip(named.values(), grads, strict=True):
            parameter.requires_grad_(grad is not None)
        unset = sorted(absent & {key for key, parameter in named.items() if parameter.requires_grad})
        if unset:
            raise UserError(
                f"--backbone {name} holds no weights for {len(unset)} parts of its vision network "
                f"({unset[0]}, ...), which would be random: give the vision model itself, for example "
                f"openai/clip-vit-base-patch16."
            )
        self.num_tokens, self.token_dim, self.summary_dim = tokens.shape[1], tokens.shape[2], summary.shape[1]


def brief(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200].rstrip(".")


@contextmanager
def silence() -> Iterator[None]:
    """In this block, loading a model shows no progress bars or warnings."""
    from transformers.utils import logging as bars

    shown, disabled = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()


def hub_answers(name: str) -> bool:
    """Whether the hub can be asked for a model now: one request; its client would try for 23 seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=3)
    except Exception as error:  # offline, or no connection
        return isinstance(error, HfHubHTTPError)  # an answer, even if there is no such model
    return True


def model_source(name: str, look: bool = True) -> tuple[str, dict[str, bool], bool]:
    """Where a Hugging Face model is: path or name, how to load it, and whether the hub is out of reach.

    Nothing that is loaded can run code. A local path is never looked up on the hub; without `look`, nothing
    is.
    """
    path = Path(name).expanduser()
    is_path = path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1
    source, far = (str(path), False) if is_path else (name, look and not hub_answers(name))
    return source, {"local_files_only": is_path or far, "trust_remote_code": False}, far


def _load_huggingface(name: str, hf_config: dict | None):
    """The vision part of a model, its image processor's settings, and the weights that its files lack.

    With an `hf_config`, random weights. Nothing that is loaded can run code: weights must be safetensors, and
    a model's own code is not used. A local path is never looked up on the hub.
    """
    from transformers import AutoConfig, AutoModel, ViTConfig
    from transformers.image_processing_base import ImageProcessingMixin

    source, where, far = model_source(name, look=hf_config is None)
    try:
        with silence():
            if hf_config is not None:
                settings = dict(hf_config)
                config = AutoConfig.for_model(settings.pop("model_type"), **settings)
                return AutoModel.from_config(config), {}, set()
            if where["local_files_only"] and not far and not Path(source).exists():
                raise OSError("there is no such folder")
            config = AutoConfig.from_pretrained(source, **where)
            config = getattr(config, "vision_config", config)  # SigLIP and CLIP come with a text model
            if config.model_type == "vit_mae":  # the plain network: the other drops and shuffles patches
                known = ViTConfig().to_dict().keys() - {"model_type", "architectures"}
                config = ViTConfig(**{key: getattr(config, key) for key in known if hasattr(config, key)})
            network, report = AutoModel.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True, **where
            )
    except Exception as error:
        reason = "it is not in the hub's cache here, and there is no connection: " * far + brief(error)
        raise UserError(
            f"--backbone {name} cannot be loaded ({type(error).__name__}: {reason}): give the folder of a "
            f"downloaded model, or choose another, for example --backbone resnet18."
        ) from None
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source, **where)
    except OSError:
        processor = {}
    return network.float(), processor, set(report["missing_keys"])


def look(backbones: Sequence[Backbone], images: Tensor, film: Sequence[Tensor] = ()) -> list[View]:
    """The views of all cameras, in order; of each camera the present frame first, then the one before it.

    Args:
        backbones: one for each camera, or one for all, which then runs once.
        images: (B, N, 3, H, W) float in [0, 1]; with earlier frames (B, N, F, 3, H, W), the present one last;
            or (B, N, F, W), the output of `features` for these.
        film: for each backbone, (B, 2 film_dim), see `InfoEmbedder.film`.
    """
    if images.ndim == 4:
        one = backbones[0]  # they differ in weights alone
        split = [one.num_tokens * one.token_dim, one.summary_dim]
        parts = [part.split(split, dim=-1) for part in images.flip(2).flatten(1, 2).unbind(1)]
        return [(tokens.unflatten(1, (-1, one.token_dim)), summary) for tokens, summary in parts]
    frames = images.shape[2] if images.ndim == 6 else 1
    groups = [images] if len(backbones) == 1 else images.unbind(1)  # (B, ..., 3, H, W) each
    views: list[View] = []
    for n, (backbone, group) in enumerate(zip(backbones, groups, strict=True)):
        group = group.flatten(0, -4)  # all in one batch
        more = [film[n].repeat_interleave(len(group) // len(images), dim=0)] if film else []
        tokens, summary = backbone(group, *more)
        tokens, summary = (x.unflatten(0, (len(images), -1)).unbind(1) for x in (tokens, summary))
        views += zip(tokens, summary, strict=True)
    return [view for n in range(0, len(views), frames) for view in views[n : n + frames][::-1]]


@torch.no_grad()
def features(backbones: Sequence[Backbone], images: Tensor, film: Sequence[Tensor] = ()) -> Tensor:
    """(B, N, 3, H, W) float to (B, N, W): tokens and summary of a frame side by side, to keep for `look`."""
    views = look(backbones, images, film)
    return torch.stack([torch.cat([t.flatten(1), s], dim=1) for t, s in views], dim=1)


def backbones_of(policy: nn.Module) -> list[Backbone]:
    """The backbones of a policy, in the order of its cameras; one, if it looks at all of them."""
    return [child for child in policy.children() if isinstance(child, Backbone)]


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; `features` as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def augment(images: Tensor, config: VisionConfig, generator: torch.Generator | None = None) -> Tensor:
    """(B, N, [F,] 3, H, W) uint8 to float32 in [0, 1], with a shift, rotation, colour and blur.

    They are drawn for each camera of a sample; all frames of a camera get the same.
    """
    x = to_float(images).flatten(0, -4)  # (B * N * F, 3, H, W)
    frames = images.shape[2] if images.ndim == 6 else 1

    def draw(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(x) // frames, 1, 1, 1, device=x.device, generator=generator)
        return (low + (high - low) * drawn).repeat_interleave(frames, dim=0)

    with torch.autocast(x.device.type, enabled=False):
        if config.aug_shift or config.aug_rotate:
            x = _shift_rotate(x, draw, config.aug_shift, config.aug_rotate)
        if config.aug_color:
            s = config.aug_color
            x = x * draw(1 - s, 1 + s)
            x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, draw(1 - s, 1 + s))
            luma = 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
            x = torch.lerp(luma, x, draw(1 - s, 1 + s)).clamp(0, 1)
        if config.aug_blur:
            x = _blur(x, draw(0, config.aug_blur), config.aug_blur)
    return x.view(images.shape)


def _shift_rotate(x: Tensor, draw, shift: float, degrees: float) -> Tensor:
    """Rotate about the centre, then shift; outside the image, its edge is repeated."""
    height, width = x.shape[-2:]
    angle = draw(-math.pi / 180 * degrees, math.pi / 180 * degrees).flatten()
    dx, dy = 2 * draw(-shift, shift).flatten(), 2 * draw(-shift, shift).flatten()  # the grid spans [-1, 1]
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos, -sin * height / width, dx, sin * width / height, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Separable Gaussian blur, each image with its own sigma (B, 1, 1, 1)."""
    radius = max(math.ceil(2 * largest), 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma.flatten()[:, None].clamp(min=1e-3) ** 2))  # (B, taps)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None, None]
    planes = F.pad(x, [radius] * 4, mode="replicate").flatten(0, 1)[None]  # (1, B * 3, H + 2 r, W + 2 r)
    for weight in (kernel, kernel.mT):  # along x, along y
        planes = F.conv2d(planes, weight, groups=len(kernel))
    return planes.view(x.shape)


def random_camera_dropout(batch_size: int, num_cameras: int, p: float, device: torch.device) -> Tensor:
    """Which cameras samples lose, (B, N) bool: with probability p one of them; never the only one."""
    if num_cameras == 1:
        return torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
    lost = torch.randint(num_cameras, (batch_size, 1), device=device)
    loses = torch.rand(batch_size, 1, device=device) < p
    return (torch.arange(num_cameras, device=device) == lost) & loses
