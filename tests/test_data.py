"""Options that decide what a run learns from, for every source of data."""

import json
import shutil

import numpy as np
import pytest
import torch
from hdf5_factory import make_hdf5
from lerobot_factory import make_dataset

from common.checkpoint import PolicySpec
from common.data import (
    ChunkDataset,
    DataConfig,
    SampleStream,
    chosen_episodes,
    make_loader,
    open_dataset,
    split_episodes,
)
from common.data.layout import READ_BYTES, rows_of
from common.data.store import EpisodeStore
from common.errors import UserError
from common.normalize import Normalizer, fit_statistics, shared_dimensions

LENGTHS = (12, 9, 15, 6)
CAMERAS = ("high", "left")
KEYS = [f"observation.images.cam_{camera}" for camera in CAMERAS]


@pytest.fixture
def lerobot(tmp_path):
    return make_dataset(tmp_path / "lerobot", LENGTHS, KEYS, video=False, dims=(3, 3), names=None)


@pytest.fixture
def hdf5(tmp_path):
    return make_hdf5(tmp_path / "hdf5", LENGTHS, CAMERAS)


@pytest.fixture(params=["lerobot", "hdf5"])
def root(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_(tmp_path):
    def open_(*roots, **options):
        return open_dataset(DataConfig(tuple(map(str, roots)), cache_dir=tmp_path / "cache", **options))

    return open_


def whole(store, **options):
    dataset = ChunkDataset(store, range(store.num_episodes), 4, **options)
    return dataset.__getitems__(np.arange(len(dataset)))


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))


# Which episodes


def test_chosen_episodes_are_the_same_from_their_own_store_and_from_the_whole(root, open_):
    own = open_(root, episodes=("1", "3"))
    assert len(list(own.path.parent.glob("*/meta.json"))) == 1
    assert own.episode_indices.tolist() == [1, 3]
    full = open_(root)
    chosen = open_(root, episodes=("3", "1"))
    assert chosen.path == full.path != own.path
    assert chosen.episode_indices.tolist() == [1, 3]
    assert equal(whole(own), whole(chosen))
    assert own.fingerprint == chosen.fingerprint != full.fingerprint  # a resumed run has the same episodes
    starts = full.episode_starts
    rows = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in (1, 3)])
    assert torch.equal(whole(own).images, full.images(rows))
    assert (own.state == full.state[rows]).all()


def test_a_store_of_some_episodes_grows_to_one_of_all(root, open_):
    some = open_(root, episodes=("0-1",))
    inode, pixels = some.frame_files[0].stat().st_ino, whole(some).images
    full = open_(root)
    assert full.num_episodes == 4
    assert inode == full.frame_files[0].stat().st_ino  # these were not decoded again
    assert torch.equal(whole(full).images[: len(pixels)], pixels)
    assert open_(root, episodes=("0-1",)).path == full.path != some.path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 2\n3\n", (0, 2, 3)),
        ("# the best\n1-3, 0 # and more\n", (0, 1, 2, 3)),
        (json.dumps([3, 1]), (1, 3)),
    ],
)
def test_episodes_in_a_file(tmp_path, text, expected):
    (tmp_path / "best.txt").write_text(text)
    assert chosen_episodes(DataConfig(episodes_file=tmp_path / "best.txt")) == expected


def test_episodes_that_are_none(tmp_path, root, open_):
    with pytest.raises(UserError, match=r"has no episode 7, 9: .* inspect"):
        open_(root, episodes=("1", "7", "9"))
    for word in ("x", "5-2", "-1", "1.5", "1-"):
        with pytest.raises(UserError, match=f"{word} is no episode number"):
            open_(root, episodes=(word,))
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no episode"):
        open_(root, episodes_file=tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        open_(root, episodes_file=tmp_path / "absent.txt")
    with pytest.raises(UserError, match="give one of them"):
        open_(root, episodes=("1",), episodes_file=tmp_path / "none.txt")
    with pytest.raises(UserError, match="--episodes and --episodes-file are for one dataset"):
        open_(root, root, episodes=("1",))
    open_(root)
    with pytest.raises(UserError, match="has no episode 7"):
        open_(root, episodes=("7",))


# Several datasets


def test_several_datasets_are_one_after_the_other(lerobot, hdf5, open_):
    parts = [open_(lerobot, state_keys=("observation.state",)), open_(hdf5)]
    with pytest.raises(UserError, match="have different dimensions of the state"):
        open_(lerobot, hdf5)
    twice = open_(hdf5, hdf5)
    assert twice.num_episodes == 8
    assert twice.part_episodes == (4, 4)
    assert twice.fingerprint not in {part.fingerprint for part in parts}
    one, two = whole(parts[1]), whole(twice)
    half = len(one.index)
    for a, b in zip(one[:4], two[:4], strict=True):
        assert torch.equal(torch.cat([a, a]), b)
    assert two.index.tolist() == list(range(2 * half))


def test_datasets_of_both_kinds_mix(tmp_path, hdf5, open_):
    names = [f"joint_{i}" for i in range(3)]  # the names in the ALOHA layout
    lerobot = make_dataset(tmp_path / "named", (5, 7), KEYS, video=False, dims=(3, 3))
    info = json.loads((lerobot / "meta/info.json").read_text())
    for key in ("observation.state", "action"):
        info["features"][key]["names"] = names
    (lerobot / "meta/info.json").write_text(json.dumps(info))
    mixed = open_(lerobot, hdf5)
    assert mixed.num_episodes == 6
    assert mixed.task is None
    separate = [open_(lerobot), open_(hdf5)]
    images = torch.cat([whole(store).images for store in separate])
    assert torch.equal(whole(mixed).images, images)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"cameras": ("high",)}, "different cameras, high left and high"),
        ({"cameras": {"high": (30, 48), "left": (30, 48)}}, "different image sizes .*32x48 and 30x48"),
        ({"dims": (3, 2)}, "different dimensions of the action"),
        ({"fps": 20.0}, "different control rates, 10 Hz and 20 Hz"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(tmp_path, hdf5, open_, options, pattern):
    other = make_hdf5(tmp_path / "other", (5,), **{"cameras": CAMERAS, **options})
    with pytest.raises(UserError, match=pattern) as caught:
        open_(hdf5, other)
    assert str(hdf5) in str(caught.value)
    assert str(other) in str(caught.value)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, 2.0, 3.0)])
def test_weights_that_are_none(hdf5, open_, weights):
    with pytest.raises(UserError, match="one positive number for each of the 2 datasets"):
        open_(hdf5, hdf5, weights=weights)


def test_weights_decide_how_often_a_dataset_is_drawn(tmp_path, hdf5, open_):
    small = make_hdf5(tmp_path / "small", (6, 5), CAMERAS)
    store = open_(hdf5, small, weights=(1.0, 3.0))
    dataset = ChunkDataset(store, range(store.num_episodes), 4)
    assert dataset.part_samples.tolist() == [42, 11]
    loader = iter(make_loader(dataset, 10, seed=0, num_workers=0))
    drawn = torch.cat([next(loader).index for _ in range(530)]).numpy()  # 100 epochs of 53
    counts = np.bincount(drawn, minlength=53)
    assert counts[:42].sum() == 100 * round(53 / 4)
    assert np.ptp(counts[:42]) <= 1  # within a dataset every sample is drawn equally often
    assert np.ptp(counts[42:]) <= 1


@pytest.mark.parametrize("start", [0, 1000, 10**7])
def test_a_weighted_stream_can_begin_anywhere(start):
    sizes, weights = [17, 5, 30], [0.2, 3.0, 1.0]
    whole = iter(SampleStream(sizes, 4, 7, start=start, weights=weights))
    drawn = [sample for _ in range(60) for sample in next(whole)]
    for skip in (1, 13, 14, 39):
        later = iter(SampleStream(sizes, 4, 7, start=start + 4 * skip, weights=weights))
        assert next(later) == drawn[4 * skip : 4 * skip + 4]
    ranks = [iter(SampleStream(sizes, 2, 7, rank, 2, start, weights)) for rank in (0, 1)]
    both = [sample for _ in range(10) for rank in ranks for sample in next(rank)]
    assert both == drawn[:40]


def test_every_dataset_holds_out_its_share(hdf5, open_, tmp_path):
    small = make_hdf5(tmp_path / "small", (6, 5), CAMERAS)
    alone = split_episodes(open_(hdf5), 0.25, seed=3)
    both = split_episodes(open_(hdf5, small), 0.25, seed=3)
    assert both[1][:-1].tolist() == alone[1].tolist()
    assert both[1][-1] in (4, 5)
    assert sorted([*both[0], *both[1]]) == list(range(6))


# Action chunks


@pytest.mark.parametrize(
    "options",
    [{"val_fraction": -0.1}, {"val_fraction": 1.0}, {"proprio_history": 0}, {"action_offset": -1}],
)
def test_counts_and_shares_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is "):
        DataConfig(**options)


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_the_first_action_lies_so_many_steps_ahead(root, open_, offset):
    store = open_(root)
    dataset = ChunkDataset(store, [0, 2], 4, action_offset=offset)
    batch = dataset.__getitems__(np.arange(len(dataset)))
    assert len(dataset) == LENGTHS[0] + LENGTHS[2] - 2 * offset
    starts = store.episode_starts
    for slot, row in enumerate(batch.index.tolist()):
        end = starts[1] if row < starts[1] else starts[3]
        for k in range(4):
            assert batch.is_pad[slot, k] == (row + offset + k >= end)
            expected = store.action[min(row + offset + k, end - 1)]
            assert (batch.actions[slot, k].numpy() == expected).all()
    assert not batch.is_pad[:, 0].any()


def test_an_offset_longer_than_the_episodes(root, open_):
    with pytest.raises(UserError, match="--action-offset 15 is longer than every episode"):
        ChunkDataset(open_(root), range(4), 4, action_offset=15)


def test_the_state_can_be_the_action(lerobot, open_):
    store = open_(lerobot, action_keys=("observation.state",))
    batch = whole(store, action_offset=1)
    assert store.shared_space
    assert torch.equal(batch.actions[0, 0], torch.from_numpy(store.state[1]))


@pytest.mark.parametrize("mode", ["mean-std", "min-max", "quantile"])
def test_relative_actions_are_normalized_by_their_own_statistics_and_restored(root, open_, tmp_path, mode):
    store = open_(root)
    dataset = ChunkDataset(store, [0, 1, 3], 5, proprio_history=2, action_offset=1)
    normalizer = Normalizer.fit(dataset, mode, relative=True)
    batch = dataset.__getitems__(np.arange(len(dataset)))
    differences = (batch.actions - batch.proprio[:, -1:])[~batch.is_pad]
    expected = fit_statistics(differences.numpy())
    for name, value in expected.items():
        torch.testing.assert_close(normalizer.statistics["action"][name], value, rtol=1e-5, atol=1e-6)
    normalized = normalizer.actions(batch.actions, batch.proprio)
    if mode == "mean-std":
        torch.testing.assert_close(normalized[~batch.is_pad].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalized[~batch.is_pad].std(0, correction=0), torch.ones(3))
    else:
        assert normalized[~batch.is_pad].abs().max() < 1.5
    restored = normalizer.unnormalize_actions(normalized, batch.proprio)
    torch.testing.assert_close(restored, batch.actions)
    low, high = normalizer.action_range
    assert (low.numpy() == store.action[dataset.rows + 1].min(0)).all()
    assert (high.numpy() == store.action[dataset.rows + 1].max(0)).all()
    normalizer.save(tmp_path / "stats.safetensors")
    again = Normalizer.load(tmp_path / "stats.safetensors", mode)
    assert torch.equal(again.actions(batch.actions, batch.proprio), normalized)
    assert torch.equal(again.action_range, normalizer.action_range)


def test_which_dimensions_are_the_same_thing():
    assert shared_dimensions(("a", "b", "c"), ("c", "x", "a")).tolist() == [2, -1, 0]
    assert shared_dimensions(("s0", "s1"), ("a0", "a1")).tolist() == [0, 1]
    assert shared_dimensions(("a", "b"), ("c",)).tolist() == [-1]


def test_dimensions_that_are_not_shared_stay_absolute(tmp_path, open_):
    info = make_hdf5(tmp_path / "d", (6, 5), CAMERAS, "grouped")
    store = open_(info, state_keys=("observation/joint_pos/left", "observation/force"))
    assert store.state_names == ("joint_pos/left", "force.0", "force.1")
    dataset = ChunkDataset(store, [0, 1], 3)
    normalizer = Normalizer.fit(dataset, "mean-std", relative=True)
    assert normalizer.relative_to.tolist() == [0, -1, -1]
    plain = Normalizer.fit(dataset, "mean-std")
    batch = dataset.__getitems__(np.arange(len(dataset)))
    one, two = (n.actions(batch.actions, batch.proprio) for n in (normalizer, plain))
    assert torch.equal(one[..., 1:], two[..., 1:])
    assert not torch.equal(one[..., 0], two[..., 0])
    apart = ChunkDataset(open_(info, state_keys=("observation/force",)), [0, 1], 3, hold=2)
    Normalizer.fit(apart, "mean-std")
    with pytest.raises(UserError, match="--relative-actions: no dimension of the action"):
        Normalizer.fit(apart, "mean-std", relative=True)


def test_what_a_policy_must_know_survives_its_file(tmp_path, open_):
    import h5py

    root = make_hdf5(tmp_path / "d", (6, 5), CAMERAS, "robomimic")
    with h5py.File(root / "demos.hdf5", "a") as file:
        for demo, steps in (("demo_0", 6), ("demo_1", 5)):
            file[f"data/{demo}/obs/robot0_eef_quat"] = np.tile([0.0, 0, 0, 1], (steps, 1))
    store = open_(root, rotation="quaternion->6d")
    spec = PolicySpec.of(ChunkDataset(store, [0], 4, proprio_history=3, action_offset=2))
    from dataclasses import asdict

    assert PolicySpec.from_json(json.loads(json.dumps(asdict(spec)))) == spec
    assert (spec.proprio_history, spec.action_offset, spec.state_dim) == (3, 2, 9)
    assert spec.state_rotations.recorded[3] == "robot0_eef_quat.0"


# Stored as JPEG


def test_frames_kept_as_jpeg_are_nearly_those_recorded(root, open_):
    raw, jpeg = open_(root), open_(root, store="jpeg")
    assert raw.path != jpeg.path
    assert jpeg.storage == "jpeg"
    one, two = whole(raw), whole(jpeg)
    for a, b in zip(one[1:5], two[1:5], strict=True):
        assert torch.equal(a, b)
    difference = (one.images.float() - two.images.float()).abs()
    assert difference.mean() < 3
    assert jpeg.frame_files[0].read_bytes().count(b"\xff\xd8\xff") == 2 * sum(LENGTHS)
    some = np.array([30, 3, 3, 17])
    assert torch.equal(jpeg.images(some), two.images[some])
    loader = make_loader(ChunkDataset(jpeg, range(4), 3), 4, seed=0)
    assert loader.num_workers > 0
    assert make_loader(ChunkDataset(raw, range(4), 3), 4, seed=0).num_workers == 0


def test_a_jpeg_store_of_several_episodes_and_a_bad_one(tmp_path, open_):
    from test_hdf5 import broken_jpeg

    root = make_hdf5(tmp_path / "d", LENGTHS, ("high",))
    broken_jpeg(root / "day_1/episode_1.hdf5")
    raw, jpeg = (open_(root, store=kind, skip_bad_episodes=True) for kind in ("raw", "jpeg"))
    assert raw.episode_indices.tolist() == jpeg.episode_indices.tolist() == [0, 2, 3]
    difference = (whole(raw).images.float() - whole(jpeg).images.float()).abs()
    assert difference.mean() < 3
    assert [path.suffix for path in sorted(jpeg.path.iterdir())].count(".part") == 0


def test_a_damaged_jpeg_store_is_named(root, open_):
    store = open_(root, store="jpeg")
    file = store.frame_files[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"frames.bin is damaged .* verify"):
        whole(EpisodeStore.open(store.path))


def test_auto_takes_raw_where_it_fits_and_says_so(root, open_, monkeypatch, capsys):
    usage = shutil.disk_usage(root)
    needed = sum(LENGTHS) * 2 * 3 * 32 * 48
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=2 * needed - 1))
    assert open_(root, store="auto").storage == "jpeg"
    assert "store: jpeg (raw frames need 0.0 GB, 0.0 GB are free" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert open_(root, store="auto").storage == "jpeg"  # uses the existing store
    assert open_(root, store="auto", image_size=(16, 24)).storage == "raw"
    assert "store: raw" in capsys.readouterr().out


def test_images_of_unknown_size_are_read_a_few_at_once():
    class Compressed(list):
        dtype, chunks, shape, largest = np.dtype(object), None, (6000,), 0

        def __getitem__(self, rows):
            self.largest = max(self.largest, rows.stop - rows.start)
            return super().__getitem__(rows)

    array = Compressed(range(6000))
    assert list(rows_of(array, 5, 6000)) == list(range(5, 6000))
    assert 1 < array.largest <= READ_BYTES / 2**18  # of a quarter of a megabyte each
