import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from common import vision
from common.data.demo import Simulator, render
from common.errors import UserError

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_model(folder, kind):
    """A small random model of a family, saved by `save_pretrained`."""
    t = transformers
    if kind == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**TINY, patch_size=14, image_size=56))
    elif kind == "dinov2-registers":
        model = t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**TINY, patch_size=14, image_size=56, num_register_tokens=4)
        )
    elif kind == "dinov3":
        model = t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**TINY, patch_size=16, image_size=64, num_register_tokens=4)
        )
    elif kind == "siglip-vision":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**TINY, patch_size=16, image_size=64))
    elif kind == "siglip":
        text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
        model = t.SiglipModel(
            t.SiglipConfig(text_config=text, vision_config={**TINY, "patch_size": 16, "image_size": 64})
        )
    elif kind == "clip":
        text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
        model = t.CLIPModel(
            t.CLIPConfig(
                text_config=text, vision_config={**TINY, "patch_size": 16, "image_size": 64}, projection_dim=8
            )
        )
    elif kind == "radio":
        if not hasattr(t, "RadioModel"):
            pytest.skip("this version of transformers has no C-RADIO")
        model = t.RadioModel(
            t.RadioConfig(**{k: v for k, v in TINY.items() if k != "intermediate_size"}, max_img_size=128)
        )
    elif kind == "dinov3-convnext":
        model = t.DINOv3ConvNextModel(
            t.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        )
    elif kind == "resnet":
        model = t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
        )
    elif kind == "vit-mae":
        model = t.ViTMAEForPreTraining(
            t.ViTMAEConfig(
                **TINY, patch_size=16, image_size=64, decoder_hidden_size=8, decoder_num_attention_heads=2
            )
        )
    elif kind == "swin":
        model = t.SwinModel(
            t.SwinConfig(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, image_size=64)
        )
    elif kind == "deit":
        model = t.DeiTModel(t.DeiTConfig(**TINY, patch_size=16, image_size=64))
    elif kind == "beit":
        model = t.BeitModel(t.BeitConfig(**TINY, patch_size=16, image_size=64))
    elif kind == "ijepa":
        model = t.IJepaModel(t.IJepaConfig(**TINY, patch_size=16, image_size=64))
    elif kind == "convnext":
        model = t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]))
    elif kind == "llava":
        vision_config = {**TINY, "model_type": "clip_vision_model", "patch_size": 16, "image_size": 64}
        text_config = {**TINY, "model_type": "llama", "vocab_size": 50, "num_key_value_heads": 2}
        model = t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=49)
        )
    elif kind == "siglip2-naflex":
        model = t.Siglip2VisionModel(t.Siglip2VisionConfig(**TINY, patch_size=16, num_patches=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


FAMILIES = {  # image size, tokens, token width, summary width
    "dinov2": ((42, 56), 12, 16, 16),
    "dinov2-registers": ((42, 56), 12, 16, 16),
    "dinov3": ((64, 96), 24, 16, 16),
    "siglip-vision": ((64, 96), 24, 16, 16),
    "siglip": ((64, 64), 16, 16, 16),
    "clip": ((64, 96), 24, 16, 16),
    "radio": ((64, 96), 24, 16, 32),
    "dinov3-convnext": ((64, 96), 6, 16, 16),
    "resnet": ((64, 96), 6, 16, 16),
    "convnext": ((64, 96), 6, 16, 16),
    "vit-mae": ((64, 96), 24, 16, 16),
    "swin": ((64, 96), 24, 32, 32),
    "deit": ((64, 96), 24, 16, 16),
    "beit": ((64, 96), 24, 16, 16),
    "ijepa": ((64, 96), 24, 16, 16),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_pretrained_models(kind, tmp_path):
    reference = save_model(tmp_path / kind, kind)
    size, num_tokens, token_dim, summary_dim = FAMILIES[kind]
    backbone = vision.build_backbone(str(tmp_path / kind), size).eval()
    images = torch.rand(2, 3, *size)
    tokens, summary = backbone(images)
    assert (backbone.num_tokens, backbone.token_dim, backbone.summary_dim) == (
        num_tokens,
        token_dim,
        summary_dim,
    )
    assert tokens.shape == (2, num_tokens, token_dim)
    assert summary.shape == (2, summary_dim)
    # the saved weights were loaded
    saved = {k: v for k, v in reference.state_dict().items() if v.dtype.is_floating_point}
    mine = backbone.network.state_dict()
    prefix = next((p for p in ("", "vision_model.", "vit.") if any(p + key in saved for key in mine)), "")
    shared = [key for key in mine if prefix + key in saved]
    assert len(shared) > 10
    for key in shared:
        torch.testing.assert_close(mine[key], saved[prefix + key])
    # every trainable weight gets a gradient: DistributedDataParallel waits for all of them
    (tokens.sum() + summary.square().sum()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    # a checkpoint brings architecture and weights, no model folder is needed
    again = vision.build_backbone("gone/away", size, pretrained=False, hf_config=backbone.hf_config).eval()
    again.load_state_dict(backbone.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(images), backbone(images), strict=True))


def test_a_network_with_batch_norm_comes_back_at_its_smallest_size(tmp_path):
    save_model(tmp_path / "m", "resnet")
    backbone = vision.build_backbone(str(tmp_path / "m"), (32, 32))
    again = vision.build_backbone("gone/away", (32, 32), pretrained=False, hf_config=backbone.hf_config)
    assert (again.num_tokens, again.token_dim) == (backbone.num_tokens, backbone.token_dim) == (1, 16)
    again.load_state_dict(backbone.state_dict())


def test_patch_tokens_are_the_patches_in_row_major_order(tmp_path):
    """Changing one patch of the image changes its token most."""
    save_model(tmp_path / "m", "dinov2-registers")
    backbone = vision.build_backbone(str(tmp_path / "m"), (42, 56)).eval()
    images = torch.zeros(1, 3, 42, 56)
    changed = images.clone()
    changed[..., 14:28, 28:42] = 1
    moved = (backbone(changed)[0] - backbone(images)[0]).norm(dim=-1)[0]
    assert moved.argmax() == 1 * 4 + 2


@pytest.mark.parametrize(
    "kind", ["vit-mae", "swin", "deit", "ijepa", "siglip", "dinov3", "dinov3-convnext", "radio"]
)
def test_tokens_lie_where_their_part_of_the_image_is(kind, tmp_path):
    """It is deterministic, and a change in a corner changes that corner's token most."""
    save_model(tmp_path / "m", kind)
    size = (128, 128) if "conv" in kind or kind == "swin" else (64, 64)
    backbone = vision.build_backbone(str(tmp_path / "m"), size).eval()
    images = torch.full((1, 3, *size), 0.5)
    tokens, summary = backbone(images)
    assert torch.equal(backbone(images)[0], tokens)
    side = round(backbone.num_tokens**0.5)
    assert side**2 == backbone.num_tokens
    cell = size[0] // side
    for row, column in ((0, 0), (0, side - 1), (side - 1, 0)):
        changed = images.clone()
        changed[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1
        moved, summary_moved = backbone(changed)[0] - tokens, backbone(changed)[1] - summary
        assert moved.norm(dim=-1)[0].argmax() == row * side + column
        assert summary_moved.norm() > 0


def test_patches_are_where_they_are_also_in_training(tmp_path):
    save_model(tmp_path, "dinov3")
    backbone, images = vision.build_backbone(str(tmp_path), (64, 96)), torch.rand(2, 3, 64, 96)
    expected = backbone.eval()(images)
    torch.testing.assert_close(backbone.train()(images), expected, rtol=0, atol=0)


def test_weights_that_a_model_does_not_have_are_never_random(tmp_path):
    save_model(tmp_path / "llava", "llava")
    with pytest.raises(UserError, match=r"no weights for .* parts of its vision network|cannot be loaded"):
        vision.build_backbone(str(tmp_path / "llava"), (64, 64))
    from safetensors.torch import load_file, save_file

    save_model(tmp_path / "dino", "dinov2")
    weights = load_file(tmp_path / "dino/model.safetensors")
    kept = {key: value for key, value in weights.items() if "layer.1.norm1" not in key}
    save_file(kept, tmp_path / "dino/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"2 parts of its vision network .*norm1"):
        vision.build_backbone(str(tmp_path / "dino"), (56, 56))
    kept = {key: value for key, value in weights.items() if "mask_token" not in key}  # used only in training
    save_file(kept, tmp_path / "dino/model.safetensors", metadata={"format": "pt"})
    vision.build_backbone(str(tmp_path / "dino"), (56, 56))


def test_models_that_do_not_take_plain_images_are_refused(tmp_path):
    save_model(tmp_path / "naflex", "siglip2-naflex")
    with pytest.raises(UserError, match=r"cannot take images of 64x64 .*another backbone"):
        vision.build_backbone(str(tmp_path / "naflex"), (64, 64))


def test_loading_is_silent_and_leaves_the_users_settings(tmp_path, capfd):
    from transformers.utils import logging

    save_model(tmp_path / "m", "dinov2")
    capfd.readouterr()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    vision.build_backbone(str(tmp_path / "m"), (56, 56))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()


def test_a_hub_that_is_far_costs_seconds(monkeypatch):
    import time

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"nobody/model cannot be loaded .*there is no connection"):
        vision.build_backbone("nobody/model", (56, 56))
    assert time.monotonic() - began < 10


def test_pixels_are_normalized_as_the_model_says(tmp_path):
    model = save_model(tmp_path / "m", "dinov2")
    (tmp_path / "m" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}'
    )
    images = torch.rand(2, 3, 56, 56)
    expected = model(
        (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    )
    tokens, summary = vision.build_backbone(str(tmp_path / "m"), (56, 56)).eval()(images)
    torch.testing.assert_close(tokens, expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(summary, expected.last_hidden_state[:, 0])


def test_backbones_that_cannot_be_loaded_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken").mkdir()
    save_model(tmp_path / "broken", "dinov2")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in (str(tmp_path / "absent"), str(tmp_path / "broken"), "nobody/no-such-model"):
        with pytest.raises(UserError, match="cannot be loaded"):
            vision.build_backbone(name, (56, 56))
    assert not (tmp_path / "absent").exists()


def test_image_sizes_that_do_not_fit_are_refused(tmp_path):
    save_model(tmp_path / "m", "dinov2")
    with pytest.raises(UserError, match=r"multiples of 14.*56 or 70"):
        vision.build_backbone(str(tmp_path / "m"), (64, 64))
    for name in ("conv", "resnet18"):
        with pytest.raises(UserError, match="--image-size"):
            vision.build_backbone(name, (8, 8))


@pytest.mark.parametrize("name", ["conv", "resnet18"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (224, 224)])
def test_networks_from_scratch(name, size):
    backbone = vision.build_backbone(name, size)
    tokens, summary = backbone(torch.rand(2, 3, *size))
    assert tokens.shape == (2, backbone.num_tokens, backbone.token_dim)
    assert summary.shape == (2, backbone.summary_dim)
    assert backbone.num_tokens <= 64
    (tokens.sum() + summary.sum()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_an_instruction_modulates_the_features_of_its_own_images(name):
    backbone, images = vision.build_backbone(name, (64, 64)).eval(), torch.rand(2, 2, 3, 64, 64)
    film = torch.zeros(2, 2 * backbone.film_dim)
    plain = vision.look([backbone], images)
    for view, same in zip(vision.look([backbone], images, [film]), plain, strict=True):
        torch.testing.assert_close(view, same)
    film = torch.randn(2, 2 * backbone.film_dim)
    changed = film.clone()
    changed[1] += torch.randn(2 * backbone.film_dim)
    for view, other in zip(*(vision.look([backbone], images, [x]) for x in (film, changed)), strict=True):
        for one, another in zip(view, other, strict=True):  # tokens and summary
            torch.testing.assert_close(one[0], another[0])
            assert not torch.allclose(one[1], another[1])
    kept = vision.features([backbone], images, [film]).unsqueeze(2)
    for view, same in zip(
        vision.look([backbone], images, [film]), vision.look([backbone], kept), strict=True
    ):
        torch.testing.assert_close(view, same)


def test_the_small_network_localises_a_disc_to_a_fraction_of_a_pixel():
    torch.manual_seed(0)
    simulator = Simulator(1200, seed=0)
    images = (
        torch.from_numpy(render(simulator.hands, simulator.targets)[:, 0]).permute(0, 3, 1, 2).float() / 255
    )
    positions = torch.from_numpy(simulator.targets.reshape(-1, 4)).float()
    backbone = vision.build_backbone("conv", (64, 64))
    head = torch.nn.Linear(backbone.summary_dim, 4)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=150)
    for step in range(150):
        rows = torch.arange(32) + 32 * (step % 31)
        F.mse_loss(head(backbone(images[rows])[1]), positions[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        error = (head(backbone(images[1000:])[1]) - positions[1000:]).abs().mean().item()
    pixel = 2 * 1.1 / 64
    assert error < 0.75 * pixel


# Augmentation


@pytest.fixture
def images():
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(6, 3, 5, 5), size=(32, 40), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).view(3, 2, 3, 32, 40)


def test_without_strength_images_are_only_converted(images):
    assert torch.equal(vision.augment(images, vision.VisionConfig()), images.float() / 255)


@pytest.mark.parametrize("option", ["aug_shift", "aug_rotate", "aug_color", "aug_blur"])
def test_each_augmentation_differs_by_sample_and_camera_and_repeats_with_its_generator(images, option):
    config = vision.VisionConfig(**{option: {"aug_rotate": 20.0, "aug_blur": 2.0}.get(option, 0.3)})
    same = images[:1, :1].expand(4, 2, 3, 32, 40)
    out = vision.augment(same, config, torch.Generator().manual_seed(1))
    assert out.shape == same.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    views = out.flatten(0, 1)
    for i in range(8):
        for j in range(i):
            assert not torch.equal(views[i], views[j])
    assert torch.equal(out, vision.augment(same, config, torch.Generator().manual_seed(1)))


def test_shift_moves_by_at_most_its_share_and_keeps_the_picture():
    image = torch.zeros(64, 1, 3, 41, 41, dtype=torch.uint8)
    image[..., 20, 20] = 255
    out = vision.augment(image, vision.VisionConfig(aug_shift=0.2), torch.Generator().manual_seed(0))[:, 0, 0]
    coordinates = torch.arange(41.0)
    x = (out.sum(1) * coordinates).sum(1) / out.sum((1, 2))
    y = (out.sum(2) * coordinates).sum(1) / out.sum((1, 2))
    for moved in (x - 20, y - 20):
        assert moved.abs().max() <= 0.2 * 41 + 0.1
        assert moved.std().item() == pytest.approx(0.2 * 41 / math.sqrt(3), rel=0.25)
    torch.testing.assert_close(out.sum((1, 2)), torch.ones(64), atol=1e-3, rtol=0)


def test_rotation_turns_about_the_centre_also_in_wide_images():
    image = torch.zeros(32, 1, 3, 31, 61, dtype=torch.uint8)
    image[..., 15, 42] = 255  # 12 pixels right of the centre
    out = vision.augment(image, vision.VisionConfig(aug_rotate=40.0), torch.Generator().manual_seed(0))[
        :, 0, 0
    ]
    weight = out.sum((1, 2))
    x = (out.sum(1) * torch.arange(61.0)).sum(1) / weight - 30
    y = (out.sum(2) * torch.arange(31.0)).sum(1) / weight - 15
    torch.testing.assert_close(torch.hypot(x, y), torch.full((32,), 12.0), atol=0.35, rtol=0)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().max() <= 41
    assert angles.std() > 15


def test_colour_jitter_keeps_grey_grey_and_blur_keeps_the_mean(images):
    grey = images[:, :, :1].expand_as(images)
    out = vision.augment(grey, vision.VisionConfig(aug_color=0.3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(out[:, :, 0], out[:, :, 2], atol=1e-5, rtol=0)
    blurred = vision.augment(images, vision.VisionConfig(aug_blur=2.0), torch.Generator().manual_seed(0))
    original = images.float() / 255
    torch.testing.assert_close(blurred.mean((-1, -2)), original.mean((-1, -2)), atol=0.02, rtol=0)
    assert (
        blurred.diff(dim=-1).abs().mean((-1, -2, -3)) < original.diff(dim=-1).abs().mean((-1, -2, -3)) + 1e-6
    ).all()


def test_augmentation_leaves_the_global_generator_alone_and_float32_under_autocast(images):
    config = vision.VisionConfig(aug_shift=0.1, aug_rotate=5, aug_color=0.2, aug_blur=1)
    before = torch.get_rng_state()
    plain = vision.augment(images, config, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = vision.augment(images, config, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(plain, cast)


def test_camera_dropout_loses_one_camera_with_its_probability():
    torch.manual_seed(0)
    dropped = vision.random_camera_dropout(30_000, 3, 0.15, "cpu")
    assert (dropped.sum(1) <= 1).all()
    assert dropped.any(1).float().mean().item() == pytest.approx(0.15, abs=0.01)
    shares = dropped.float().mean(0)
    torch.testing.assert_close(shares, torch.full((3,), 0.05), atol=0.005, rtol=0)
    assert not vision.random_camera_dropout(100, 1, 1.0, "cpu").any()


def step(backbone, images, seed=0):
    """One step with seeded random numbers: result, gradients, and the bytes kept for the gradient."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(seed)
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        tokens, summary = backbone(images)
        loss = tokens.square().mean() + summary.square().mean()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.zero_grad()
    return loss, grads, sum(size for where, size in kept.items() if where not in weights)


@pytest.mark.parametrize("kind", ["conv", "resnet18", "dinov2", "dinov3", "siglip-vision", "swin"])
def test_activations_computed_again_give_the_same_gradient_in_less_memory(kind, tmp_path, monkeypatch):
    name, size = kind, (32, 32)
    if kind in FAMILIES:
        monkeypatch.setitem(TINY, "num_hidden_layers", 12)
        config = save_model(tmp_path, kind).config
        for dropout in ("drop_path_rate", "attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(config, dropout):
                setattr(config, dropout, 0.3)
        config.save_pretrained(tmp_path)
        name, size = str(tmp_path), FAMILIES[kind][0]
    backbone = vision.build_backbone(name, size).train()
    images = torch.rand(2, 3, *size)
    loss, grads, kept = step(backbone, images)
    assert torch.equal(loss, step(backbone, images)[0])
    if kind in FAMILIES:  # these draw random numbers
        assert not torch.equal(loss, step(backbone, images, seed=1)[0])
    backbone.checkpoint_activations()
    again, recomputed, kept_now = step(backbone, images)
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[key], grad) for key, grad in grads.items())
    assert kept_now < 0.5 * kept
    backbone(images)[0].sum().backward()  # without hooks, PyTorch refuses what was overwritten


@pytest.mark.parametrize("kind", ["resnet", "convnext", "dinov3-convnext"])
def test_networks_that_cannot_compute_again_say_so(kind, tmp_path):
    save_model(tmp_path / kind, kind)
    backbone = vision.build_backbone(str(tmp_path / kind), (64, 96))
    with pytest.raises(UserError, match=r"--checkpoint-activations: a .*: leave the flag out, or choose"):
        backbone.checkpoint_activations()
