"""Depth Anything 3: the official network's numbers, loading, and the cache of features."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import depth_golden
import numpy as np
import pytest
import torch
from running import train
from safetensors.torch import load_file, save_file

import train_vfp_depth as script
from common import depth
from common.checkpoint import PolicySpec
from common.config import parse
from common.data import ChunkDataset, DataConfig, open_dataset
from common.depth import DepthBackbone, DepthConfig, DepthNetwork, cached, camera_numbers
from common.errors import UserError
from common.normalize import Normalizer

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def outputs_of(architecture, size):
    """Outputs of this project's network for the weights and images of the golden values."""
    network = DepthNetwork(architecture).eval()
    depth_golden.randomise(network)
    with torch.no_grad():
        layers = network(depth_golden.images(size), range(architecture.num_blocks))
    return {f"layer.{n}": x for n, x in enumerate(layers)}


def assert_golden(outputs, file, prefix):
    golden = {k.removeprefix(prefix): x for k, x in load_file(GOLDEN / file).items() if k.startswith(prefix)}
    assert outputs.keys() == golden.keys()
    assert golden[max(golden)].abs().mean() > 0.1
    for name, x in outputs.items():
        torch.testing.assert_close(x, golden[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", depth_golden.ARCHITECTURES)
def test_features_are_those_of_the_official_network(name):
    outputs = outputs_of(depth_golden.ARCHITECTURES[name], depth_golden.SIZE)
    assert_golden(outputs, "depth.safetensors", f"{name}.")


@pytest.mark.parametrize("size", depth_golden.LARGE_SIZES, ids=str)
@pytest.mark.parametrize("name", depth_golden.LARGE)
def test_features_are_those_of_the_official_network_at_its_sizes(name, size):
    outputs = depth_golden.sampled(outputs_of(depth_golden.LARGE[name], size))
    assert_golden(outputs, "depth_large.safetensors", f"{name}.{size[0]}x{size[1]}.")


def test_the_sizes_are_the_published_ones():
    with torch.device("meta"):
        millions = {
            name: sum(p.numel() for p in DepthNetwork(architecture).parameters()) / 1e6
            for name, architecture in depth.ARCHITECTURES.items()
        }
    assert millions["small"] == pytest.approx(22.06, abs=0.01)
    assert millions["base"] == pytest.approx(86.58, abs=0.01)
    assert millions["large"] == pytest.approx(304.37, abs=0.01)
    assert millions["mono"] == pytest.approx(304.37, abs=0.02)


# The backbone


def backbone(image_size=(32, 32), **options):
    return DepthBackbone(DepthConfig(**{"depth_weights": "random", **options}), image_size)


def test_other_sizes_are_resized_and_said(tiny_depth, capsys):
    network = backbone((32, 50))
    assert "images of 32x50 are resized to 28x56" in capsys.readouterr().out
    assert network.num_tokens == 8
    assert network(torch.zeros(3, 3, 32, 50, dtype=torch.uint8)).shape == (3, 8, tiny_depth.dim)
    backbone((28, 42))
    assert "resized" not in capsys.readouterr().out


def test_uint8_and_float_images_give_the_same(tiny_depth):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    network = backbone((28, 28))
    assert torch.equal(network(images), network(images.float() / 255))


def test_layers_lie_side_by_side_and_pooling_averages_neighbours(tiny_depth):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 42, 56)  # 3 x 4 patches
    first, last = (backbone((42, 56), depth_layers=(n,))(images) for n in (0, 3))
    assert not torch.allclose(first, last)
    assert torch.equal(backbone((42, 56))(images), last)
    assert torch.equal(backbone((42, 56), depth_layers=(3, 0))(images), torch.cat([first, last], dim=-1))
    pooled = backbone((42, 56), depth_pool=2)
    grid = last.unflatten(1, (3, 4))
    expected = torch.stack(
        [grid[:, r : r + 2, c : c + 2].mean(dim=(1, 2)) for r in (0, 2) for c in (0, 2)], dim=1
    )
    assert pooled.num_tokens == 4
    torch.testing.assert_close(pooled(images), expected)


def test_the_network_is_frozen_and_shared_by_averages(tiny_depth):
    network = backbone((28, 28))
    policy = torch.nn.ModuleDict({"depth": network}).train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert copy.deepcopy(policy)["depth"] is network
    assert not network(torch.rand(1, 3, 28, 28)).requires_grad


def test_random_weights_are_announced_and_follow_their_seed(tiny_depth, capsys):
    before = torch.get_rng_state()
    first, again, other = (backbone(depth_weights=w) for w in ("random", "random:0", "random:1"))
    assert "are meaningless" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(images), again(images))
    assert not torch.allclose(first(images), other(images))
    assert first.identity() == again.identity()
    assert first.identity() != other.identity()


def test_cameras_with_depth_are_named_or_the_head():
    cameras = ("head", "left", "right")
    assert camera_numbers(DepthConfig(), cameras) == [0]
    assert camera_numbers(DepthConfig(depth_cameras=("right", "observation.images.cam_head")), cameras) == [
        2,
        0,
    ]
    with pytest.raises(UserError, match="--depth-cameras top: there is no such camera; there are head, left"):
        camera_numbers(DepthConfig(depth_cameras=("top",)), cameras)


# Official files


@pytest.fixture
def snapshot(tmp_path, tiny_depth):
    """A folder like the official ones, and its weights."""
    torch.manual_seed(3)
    weights = DepthNetwork(tiny_depth).state_dict()
    write(tmp_path, weights)
    return tmp_path, weights


def write(folder, weights, model_name="da3-small"):
    named = {f"model.backbone.pretrained.{key}": value for key, value in weights.items()}
    save_file({**named, "model.head.scratch.weight": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_name": model_name, "config": {}}))


def test_an_official_snapshot_is_loaded_from_its_folder(snapshot):
    folder, weights = snapshot
    loaded = backbone(depth_weights=str(folder)).network.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert not any(tensor.is_meta for tensor in backbone(depth_weights=str(folder)).parameters())


def test_weights_that_may_not_be_used_commercially_are_announced(tmp_path, monkeypatch, capsys):
    tiny = depth.Architecture("da3-large", 32, 4, 2, 2)
    monkeypatch.setitem(depth.ARCHITECTURES, "large", tiny)
    write(tmp_path, DepthNetwork(tiny).state_dict(), "da3-large")
    backbone(depth_model="large", depth_weights=str(tmp_path))
    assert "CC BY-NC 4.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f, w: write(f, w, "da3-base"), "is of da3-base, not da3-small: give --depth-model base"),
        (lambda f, w: write(f, w, "da4"), "is of da4, not da3-small: give an official snapshot"),
        (lambda f, w: (f / "config.json").write_text("{"), "is of an unknown model, not da3-small"),
        (lambda f, w: (f / "config.json").write_text("[1]"), "is of an unknown model, not da3-small"),
        (lambda f, w: (f / "config.json").unlink(), "has no config.json"),
        (lambda f, w: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda f, w: write(f, {k: v for k, v in w.items() if k != "norm.bias"}),
            "not da3-small (Error(s) in loading state_dict for DepthNetwork: Missing key(s) in state_dict: "
            '"norm.bias"',
        ),
        (
            lambda f, w: write(f, {**w, "blocks.9.ls1.gamma": torch.ones(3), "mask": torch.ones(2)}),
            'Unexpected key(s) in state_dict: "mask", "blocks.9.ls1.gamma"',
        ),
        (
            lambda f, w: write(f, {**w, "norm.bias": torch.zeros(5)}),
            "size mismatch for norm.bias",
        ),
        (
            lambda f, w: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "is damaged",
        ),
        (lambda f, w: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged"),
        (lambda f, w: save_file({"x": torch.ones(1)}, f / "model.safetensors"), "Missing key(s)"),
    ],
)
def test_files_that_are_not_the_model_are_refused(snapshot, spoil, words):
    folder, weights = snapshot
    spoil(folder, weights)
    with pytest.raises(UserError) as error:
        backbone(depth_weights=str(folder))
    assert words in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth_weights": "/nowhere/da3"}, "/nowhere/da3 does not exist"),
        ({"depth_weights": "depth-anything/DA3-SMALL"}, "--depth-weights random"),
        ({"depth_weights": None}, "depth-anything/DA3-SMALL"),
        ({"depth_weights": "random:x"}, "write it as random:SEED"),
        ({"depth_layers": (4,)}, "has blocks 0 to 3"),
        ({"depth_layers": (-1,)}, "has blocks 0 to 3"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_a_way_out(tiny_depth, options, words):
    with pytest.raises(UserError) as error:
        backbone(**options)
    assert words in str(error.value)


# The cache; tests that hold for every network are in `test_features.py`


@pytest.fixture
def store(dataset, tmp_path):
    return open_dataset(DataConfig(dataset=(str(dataset),), cache_dir=tmp_path / "cache", ingest_workers=1))


def check(store, network, cameras=(0,)):
    rows = np.arange(store.num_steps)
    stored = store.extra("depth", rows)
    live = network.of_cameras(store.images(rows), cameras)
    torch.testing.assert_close(stored.float(), live, atol=5e-3, rtol=1e-3)


def test_cached_features_are_the_computed_ones(store, tiny_depth):
    network = backbone()
    with_features = cached(store, network, [2, 0], CPU)
    check(with_features, network, (2, 0))
    data = ChunkDataset(store, range(store.num_episodes), 4)
    batch, plain = (dataset.__getitems__([7, 3, 40]) for dataset in (data.on(with_features), data))
    assert torch.equal(batch.extras["depth"], with_features.extra("depth", batch.index.numpy()))
    assert torch.equal(batch.images, plain.images)
    assert batch.to("cpu").extras["depth"].dtype == torch.float16
    assert not plain.extras


def test_features_are_computed_once(store, tiny_depth, monkeypatch):
    network = backbone()
    cached(store, network, [0], CPU)
    with monkeypatch.context() as patch:
        patch.setattr(DepthBackbone, "of_cameras", lambda *args: pytest.fail("computed again"))
        again = cached(store, backbone(), [0], CPU)
        cached(store.select([1, 2]), network, [0], CPU)
    check(again, network)


@pytest.mark.parametrize(
    "other",
    [{"depth_weights": "random:5"}, {"depth_layers": (1,)}, {"depth_pool": 2}],
    ids=["weights", "layers", "pool"],
)
def test_other_networks_have_features_of_their_own(store, tiny_depth, other):
    first, second = backbone(), backbone(**other)
    both = [cached(store, network, [0], CPU) for network in (first, second)]
    assert both[0].extras["depth"].files != both[1].extras["depth"].files
    for with_features, network in zip(both, (first, second), strict=True):
        check(with_features, network)


def test_a_cache_that_cannot_be_used_says_what_else_there_is(store, tiny_depth, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="--depth-pool 2, fewer --depth-layers, --depth-cache off"):
        cached(store, backbone(), [0], CPU)


# The script


@pytest.fixture
def prepared(store, tiny, tiny_depth):
    """Configuration, policy, samples."""
    config = parse(script.Config, [*tiny, "--depth-weights", "random"], "train_vfp_depth.py")
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    return config, script.Policy(config, PolicySpec.of(data)).eval(), data


def test_the_loss_is_the_same_with_and_without_the_cache(prepared):
    config, policy, data = prepared
    with torch.no_grad():  # a projection that starts at zero would hide everything
        policy.action_decoder.velocity_out.weight.normal_()
    stored = data.on(cached(data.store, policy.depth_backbone, policy.depth_cameras, CPU))
    assert stored.__getitems__([0]).extras
    computed, loaded = (script.with_depth(d.__getitems__([0, 9, 20]), policy) for d in (data, stored))
    x_0, t, normalizer = torch.randn(3, config.horizon, 3), torch.rand(3), Normalizer.fit(data)

    def loss(batch):
        return script.compute_loss(policy, batch, normalizer, config, train=False, x_0=x_0, t=t)[0].item()

    assert loss(computed) == pytest.approx(loss(loaded), rel=1e-4)
    none = {"depth": torch.zeros_like(computed.extras["depth"])}
    assert loss(computed._replace(extras=none)) != loss(computed)


def test_a_dropped_head_camera_takes_its_depth_along(prepared):
    _, policy, data = prepared
    batch = script.with_depth(data.__getitems__([0, 9]), policy)
    images, proprio, depth = batch.images.float() / 255, batch.proprio, batch.extras["depth"]

    def summary(depth, *cameras):
        dropped = torch.zeros(2, 3, dtype=torch.bool)
        dropped[:, list(cameras)] = True
        return policy.observe(images, proprio, depth, dropped).summary

    other = torch.randn_like(depth)
    assert torch.equal(summary(depth, 0), summary(other, 0))
    assert not torch.equal(summary(depth, 1), summary(other, 1))


def test_cached_features_are_those_of_the_weights_that_a_checkpoint_brings(
    tiny, tiny_depth, tmp_path, accelerate_reset
):
    """On resume, and with --init-from, the network comes from the run, not from the options."""
    flags = ["--cache-dir", tmp_path / "cache", "--depth-weights", "random:5", "--save-every", 1]
    first = train(script, tiny, tmp_path / "first", *flags, "--steps", 2)
    folder = next((tmp_path / "cache" / "stores").glob("*/features-depth-*"))
    shutil.rmtree(first / "checkpoints" / "step_0000002")
    train(script, [], None, "--resume", first)
    train(script, tiny, tmp_path / "second", *flags[:2], "--init-from", first, "--steps", 1)
    assert list((tmp_path / "cache" / "stores").glob("*/features-depth-*")) == [folder]
