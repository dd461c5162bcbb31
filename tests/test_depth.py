"""Depth Anything 3: the official network's numbers, loading, and the cache of features."""

import json
from dataclasses import replace
from pathlib import Path

import depth_golden
import numpy as np
import pytest
import torch
from lerobot_factory import make_dataset
from safetensors.torch import load_file, save_file

from common import depth
from common.config import parse
from common.data import ChunkDataset, DataConfig, EpisodeStore, features, open_dataset
from common.data.inspect import damaged_files, delete
from common.depth import DepthBackbone, DepthConfig, DepthNetwork, cached, camera_numbers
from common.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def compare(architecture, outputs, size, weights=None):
    """Largest difference from the official outputs."""
    network = DepthNetwork(architecture).eval()
    if weights is None:
        depth_golden.randomise(network)
    else:
        network.load_state_dict(weights)
    with torch.no_grad():
        feats, layers = network(depth_golden.images(size), range(architecture.num_blocks))
    assert len(feats) == len(architecture.out_layers)
    mine = {f"feats.{n}": x for n, x in enumerate(feats)} | {f"layer.{n}": x for n, x in enumerate(layers)}
    assert mine.keys() == outputs.keys()
    assert all(mine[key].shape == outputs[key].shape for key in mine)
    return max((mine[key] - outputs[key]).abs().max().item() for key in mine)


@pytest.mark.parametrize("name", depth_golden.ARCHITECTURES)
def test_features_are_those_of_the_official_network(name):
    golden = load_file(GOLDEN / "depth.safetensors")
    outputs = {key.removeprefix(f"{name}."): x for key, x in golden.items() if key.partition(".")[0] == name}
    assert outputs["feats.2"].abs().mean() > 0.1
    assert compare(depth_golden.ARCHITECTURES[name], outputs, depth_golden.SIZE) < 1e-4


@pytest.mark.parametrize("size", [(224, 224), (518, 518), (252, 336)], ids=str)
@pytest.mark.parametrize("name", ["small", "mono-like"])
def test_features_equal_the_official_network_where_it_is_installed(name, size, capsys):
    """See depth_golden.py for how to install it."""
    pytest.importorskip("depth_anything_3")
    if name == "small":
        architecture = depth.ARCHITECTURES["small"]
    else:  # LARGE has 304 million parameters: six blocks say as much
        architecture = depth.Architecture("few", 1024, 6, 16, (1, 3, 4, 5))
    network = depth_golden.official(architecture)
    depth_golden.randomise(network)
    outputs = depth_golden.run(network, architecture, size)
    difference = compare(architecture, outputs, size, network.state_dict())
    with capsys.disabled():
        print(f"\n{name} at {size[0]}x{size[1]}: largest difference {difference:.2g}")
    assert difference < 1e-4


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
    import copy

    network = backbone((28, 28))
    policy = torch.nn.ModuleDict({"depth": network}).train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert copy.deepcopy(policy)["depth"] is network
    assert not network(torch.rand(1, 3, 28, 28)).requires_grad


def test_random_weights_are_announced_and_follow_their_seed(tiny_depth, capsys):
    before = torch.get_rng_state()
    first, again, other = (backbone(depth_weights=w) for w in ("random", "random:0", "random:1"))
    assert "mean nothing" in capsys.readouterr().out
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
    """A folder as the official ones are, and the weights in it."""
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
    tiny = depth.Architecture("da3-large", 32, 4, 2, (1, 3), 2)
    monkeypatch.setitem(depth.ARCHITECTURES, "large", tiny)
    write(tmp_path, DepthNetwork(tiny).state_dict(), "da3-large")
    backbone(depth_model="large", depth_weights=str(tmp_path))
    assert "CC BY-NC 4.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f, w: write(f, w, "da3-base"), "is da3-base, not da3-small: give --depth-model base"),
        (lambda f, w: write(f, w, "da4"), "is da4, not da3-small: only small, base, large"),
        (lambda f, w: (f / "config.json").write_text("{"), "does not name a Depth Anything 3 model"),
        (lambda f, w: (f / "config.json").write_text("[1]"), "does not name a Depth Anything 3 model"),
        (lambda f, w: (f / "config.json").unlink(), "has no config.json"),
        (lambda f, w: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda f, w: write(f, {k: v for k, v in w.items() if k != "norm.bias"}),
            "below model.backbone.pretrained. it lacks norm.bias",
        ),
        (
            lambda f, w: write(f, {**w, "blocks.9.ls1.gamma": torch.ones(3), "mask": torch.ones(2)}),
            "has the unknown blocks.9.ls1.gamma and 1 more",
        ),
        (
            lambda f, w: write(f, {**w, "norm.bias": torch.zeros(5)}),
            "has another shape of norm.bias",
        ),
        (
            lambda f, w: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "is damaged",
        ),
        (lambda f, w: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged"),
        (lambda f, w: save_file({"x": torch.ones(1)}, f / "model.safetensors"), "lacks"),
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
        ({"depth_layers": (4,)}, "has the blocks 0 to 3"),
        ({"depth_layers": (-1,)}, "has the blocks 0 to 3"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_a_way_out(tiny_depth, options, words):
    with pytest.raises(UserError) as error:
        backbone(**options)
    assert words in str(error.value)


# The cache


@pytest.fixture
def data_config(dataset, tmp_path):
    return DataConfig(dataset=(str(dataset),), cache_dir=tmp_path / "cache", ingest_workers=1)


@pytest.fixture
def store(data_config):
    return open_dataset(data_config)


@pytest.fixture
def several_files(monkeypatch):
    """One episode a file of frames."""
    from common.data import ingest

    monkeypatch.setattr(ingest, "SHARD_BYTES", 1)


def live(store, network, cameras=(0,)):
    return network.of_cameras(store.images(np.arange(store.num_steps)), cameras)


def check(store, network, cameras=(0,)):
    stored = store.features(np.arange(store.num_steps))
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), live(store, network, cameras), atol=5e-3, rtol=1e-3)


def test_cached_features_are_the_computed_ones(several_files, store, tiny_depth):
    network = backbone()
    with_features = cached(store, network, [2, 0], CPU)
    assert len(with_features.shard_files) > 1
    check(with_features, network, (2, 0))
    dataset = ChunkDataset(with_features, range(with_features.num_episodes), 4)
    batch = dataset.__getitems__([7, 3, 40])
    assert torch.equal(batch.features, with_features.features(batch.index.numpy()))
    assert torch.equal(batch.images, store.images(batch.index.numpy()))
    assert torch.equal(dataset[3].features, batch.features[1])
    assert batch.to("cpu").features.dtype == torch.float16
    plain = ChunkDataset(store, range(store.num_episodes), 4)
    assert plain.__getitems__([1]).features is None
    assert torch.equal(plain.on(with_features).__getitems__([1]).images, plain.__getitems__([1]).images)


def count_computed(monkeypatch, network, fail_after=None):
    """Count frames as they are computed; stop, as if killed, after some."""
    counts = []
    whole = type(network).of_cameras

    def of_cameras(self, images, cameras):
        if fail_after is not None and sum(counts) >= fail_after:
            raise KeyboardInterrupt
        counts.append(len(images))
        return whole(self, images, cameras)

    monkeypatch.setattr(type(network), "of_cameras", of_cameras)
    return counts


def test_features_are_computed_once(store, tiny_depth, monkeypatch):
    network = backbone()
    counts = count_computed(monkeypatch, network)
    cached(store, network, [0], CPU)
    assert sum(counts) == store.num_steps
    check(cached(store, backbone(), [0], CPU), network)
    chosen = cached(store.select([1, 2]), network, [0], CPU)
    assert sum(counts) == 2 * store.num_steps  # `check` computed them, too
    check(chosen, network)


@pytest.mark.parametrize(
    "other",
    [{"depth_weights": "random:5"}, {"depth_layers": (1,)}, {"depth_pool": 2}],
    ids=["weights", "layers", "pool"],
)
def test_other_networks_have_features_of_their_own(store, tiny_depth, other):
    first, second = backbone(), backbone(**other)
    both = [cached(store, network, [0], CPU) for network in (first, second)]
    assert both[0].feature_files != both[1].feature_files
    for with_features, network in zip(both, (first, second), strict=True):
        check(with_features, network)


def test_an_interrupted_computation_goes_on_where_it_was(several_files, store, tiny_depth, monkeypatch):
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    network = backbone()
    with monkeypatch.context() as patch:
        counts = count_computed(patch, network, fail_after=20)
        with pytest.raises(KeyboardInterrupt):
            cached(store, network, [0], CPU)
        before = sum(counts)
    assert 20 <= before < store.num_steps
    with monkeypatch.context() as patch:
        counts = count_computed(patch, network)
        with_features = cached(store, network, [0], CPU)
        assert sum(counts) == store.num_steps - before
    check(with_features, network)
    folder = with_features.feature_files[0].parent
    assert not [path.name for path in folder.iterdir() if path.suffix in (".part", ".progress")]
    assert damaged_files(store.path) == {}


def test_a_part_that_lost_its_end_is_computed_again(store, tiny_depth, monkeypatch):
    monkeypatch.setattr(features, "SAVE_EVERY", 0.0)
    network = backbone()
    with monkeypatch.context() as patch:
        count_computed(patch, network, fail_after=16)
        with pytest.raises(KeyboardInterrupt):
            cached(store, network, [0], CPU)
    (part,) = store.path.glob("features-*/*.part")
    part.write_bytes(part.read_bytes()[:-1])
    check(cached(store, network, [0], CPU), network)


def test_features_of_other_frames_or_another_network_are_computed_again(store, tiny_depth):
    network = backbone()
    file = cached(store, network, [0], CPU).feature_files[0]
    note = json.loads(file.with_suffix(".json").read_text())
    for spoiled in (
        {**note, "source": {**note["source"], "crc32": 1}},
        {**note, "identity": {**note["identity"], "weights": "x"}},
        {**note, "bytes": note["bytes"] + 2},
        [],
    ):
        file.write_bytes(bytes(note["bytes"]))
        file.with_suffix(".json").write_text(json.dumps(spoiled))
        check(cached(store, network, [0], CPU), network)


def test_verify_finds_damaged_features(store, tiny_depth):
    file = cached(store, backbone(), [0], CPU).feature_files[0]
    assert damaged_files(store.path) == {}
    content = bytearray(file.read_bytes())
    content[11] ^= 1
    file.write_bytes(content)
    name = f"{file.parent.name}/{file.name}"
    assert damaged_files(store.path) == {name: "has another checksum than was written"}


def test_features_go_with_their_store(store, tiny_depth):
    cached(store, backbone(), [0], CPU)
    delete(store.path.parent, store.path)
    assert not store.path.exists()


def test_a_grown_dataset_keeps_its_features(several_files, tmp_path, tiny_depth, monkeypatch):
    sizes = {"observation.images.cam_head": (32, 32)}
    root = make_dataset(tmp_path / "a", (8, 9), sizes, video=False, dims=(3, 3), names=None)
    config = DataConfig(dataset=(str(root),), cache_dir=tmp_path / "cache", ingest_workers=1, episodes=("0",))
    network = backbone()
    small = cached(open_dataset(config), network, [0], CPU)
    whole = open_dataset(replace(config, episodes=()))
    assert whole.path != small.path
    with monkeypatch.context() as patch:
        counts = count_computed(patch, network)
        whole = cached(whole, network, [0], CPU)
        assert sum(counts) == 9
    check(whole, network)


def test_joined_and_compressed_stores_have_features(tmp_path, data_config, tiny_depth):
    network = backbone()
    jpeg = open_dataset(replace(data_config, store="jpeg"))
    check(cached(jpeg, network, [0], CPU), network)
    first, second = open_dataset(data_config), open_dataset(data_config).select([3, 1])
    both = EpisodeStore.concatenate([second, first])
    check(cached(both, network, [1], CPU), network, (1,))
    assert EpisodeStore.concatenate([cached(first, network, [0], CPU), second]).feature_files == ()


def test_a_store_with_features_can_be_sent_to_a_worker(store, tiny_depth):
    import pickle

    network = backbone()
    check(pickle.loads(pickle.dumps(cached(store, network, [0], CPU))), network)


def test_memory_that_does_not_suffice_halves_the_batch(store, tiny_depth, monkeypatch):
    network, sizes = backbone(), []
    whole = type(network).of_cameras

    def of_cameras(self, images, cameras):
        sizes.append(len(images))
        if len(images) > 5:
            raise RuntimeError("CUDA out of memory.")
        return whole(self, images, cameras)

    monkeypatch.setattr(type(network), "of_cameras", of_cameras)
    with_features = cached(store, network, [0], CPU)
    assert sizes[:3] == [16, 8, 4]
    assert set(sizes[3:]) <= {4, store.num_steps % 4}
    monkeypatch.setattr(type(network), "of_cameras", whole)
    check(with_features, network)


def test_files_after_the_first_begin_with_the_batch_that_memory_sufficed_for(
    several_files, store, tiny_depth, monkeypatch
):
    network, sizes = backbone(), []
    whole = type(network).of_cameras

    def of_cameras(self, images, cameras):
        sizes.append(len(images))
        if len(images) > 5:
            raise RuntimeError("CUDA out of memory.")
        return whole(self, images, cameras)

    monkeypatch.setattr(type(network), "of_cameras", of_cameras)
    cached(store, network, [0], CPU)
    assert sum(size > 5 for size in sizes) <= 2


def test_features_that_another_process_has_made_meanwhile_are_taken(
    several_files, store, tiny_depth, monkeypatch
):
    """The others' locks are waited for, and what they have finished is not computed again."""
    from filelock import FileLock

    network, locks = backbone(), []
    cached(store, network, [0], CPU)
    folder = next(store.path.glob("features-*"))
    notes = {path: path.read_bytes() for path in folder.glob("*.json")}
    for path in notes:
        path.unlink()
    acquire = FileLock.acquire

    def slow(self, timeout=None, **options):
        if timeout == 0 and len(locks) < len(notes):  # somebody else holds it, and finishes in the meantime
            locks.append(self)
            path = folder / (Path(self.lock_file).stem.lstrip(".") + ".json")
            path.write_bytes(notes[path])
            raise features_timeout(self.lock_file)
        return acquire(self, timeout=timeout, **options)

    from filelock import Timeout as features_timeout

    monkeypatch.setattr(FileLock, "acquire", slow)
    counts = count_computed(monkeypatch, network)
    with_features = cached(store, network, [0], CPU)
    assert sum(counts) == 0
    monkeypatch.undo()
    assert len(locks) == len(notes) > 1
    assert with_features.features(np.array([0])).shape[0] == 1


def test_a_cache_that_cannot_be_written_is_named(store, tiny_depth, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="--depth-cache off"):
        cached(store, backbone(), [0], CPU)


def test_many_files_of_frames_are_opened_once(several_files, store, tiny_depth, monkeypatch):
    opened, whole = [], EpisodeStore.open.__func__
    monkeypatch.setattr(
        EpisodeStore, "open", classmethod(lambda cls, path: opened.append(path) or whole(cls, path))
    )
    cached(store, backbone(), [0], CPU)
    assert len(opened) == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(store, tiny_depth, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="--depth-pool 2, fewer --depth-layers, --depth-cache off"):
        cached(store, backbone(), [0], CPU)
    assert not list(store.path.glob("features-*"))


def test_features_that_are_not_finite_are_refused(store, tiny_depth):
    network = backbone()
    network.network.norm.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        cached(store, network, [0], CPU)


# The script


def test_the_loss_is_the_same_with_and_without_the_cache(store, tiny, tiny_depth):
    import train_vfp_depth as script
    from common.normalize import Normalizer

    config = parse(script.Config, [*tiny, "--depth-weights", "random"], "train_vfp_depth.py")
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = script.Policy(config, script.checkpoint.PolicySpec.of(data)).eval()
    with torch.no_grad():  # a projection that starts at zero would hide everything
        policy.action_decoder.velocity_out.weight.normal_()
    stored = data.on(cached(store, policy.depth_backbone, policy.depth_cameras, CPU))
    batches = [script.with_depth(d.__getitems__([0, 9, 20]), policy) for d in (data, stored)]
    assert batches[1].features is not None
    torch.manual_seed(1)
    draws = torch.randn(3, config.horizon, 3), torch.rand(3)
    normalizer = Normalizer.fit(data)
    losses = [script.compute_loss(policy, batch, normalizer, config, draws) for batch in batches]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    none = batches[0]._replace(features=torch.zeros_like(batches[0].features))
    assert script.compute_loss(policy, none, normalizer, config, draws) != losses[0]


def test_a_dropped_head_camera_takes_its_depth_along(store, tiny, tiny_depth):
    import train_vfp_depth as script

    config = parse(script.Config, [*tiny, "--depth-weights", "random"], "train_vfp_depth.py")
    data = ChunkDataset(store, range(store.num_episodes), config.horizon)
    torch.manual_seed(0)
    policy = script.Policy(config, script.checkpoint.PolicySpec.of(data)).eval()
    batch = script.with_depth(data.__getitems__([0, 9]), policy)
    images, proprio = batch.images.float() / 255, batch.proprio

    def summary(depth, *cameras):
        dropped = torch.zeros(2, 3, dtype=torch.bool)
        dropped[:, list(cameras)] = True
        return policy.observe(images, proprio, depth, dropped).summary

    other = torch.randn_like(batch.features)
    assert torch.equal(summary(batch.features, 0), summary(other, 0))
    assert not torch.equal(summary(batch.features, 1), summary(other, 1))
