"""Features of frozen networks beside an episode store, with a network that is a sum."""

import errno
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from test_store import INFO, LENGTHS, ROW_BYTES, Drawn, build, grown

from common.data import features, ingest
from common.data.inspect import damaged_files, delete
from common.data.samples import ChunkDataset
from common.data.store import EpisodeStore
from common.errors import UserError

STEPS = sum(LENGTHS)


class Network:
    """Features (B, 2): the sum of each camera's pixels, scaled; counts what it computes.

    Attributes:
        sizes: steps of each batch that was computed.
        fits: larger batches exceed the memory.
        stops_after: so many steps, as if killed.
    """

    def __init__(self, fits=99, stops_after=None, identity=1):
        self.sizes, self.fits, self.stops_after = [], fits, stops_after
        self.identity = {"weights": identity}

    def __call__(self, images):
        if self.stops_after is not None and sum(self.sizes) >= self.stops_after:
            raise KeyboardInterrupt
        self.sizes.append(len(images))
        if len(images) > self.fits:
            raise RuntimeError("CUDA out of memory.")
        return images.double().mean((2, 3, 4)).half() * self.identity["weights"]


def with_depth(store, network, batch_size=4):
    return features.ensure_features(
        store, "depth", network.identity, (2,), network, batch_size, "--depth-pool 2"
    )


def check(store, network):
    rows = np.arange(store.num_steps)
    assert torch.equal(store.extra("depth", rows), Network.__call__(network, store.images(rows)))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Episodes 0 and 1 in a file of frames, episode 2 and episode 3 in one each."""
    monkeypatch.setattr(ingest, "SHARD_BYTES", 9 * ROW_BYTES)
    return build(tmp_path)


def folder_of(store):
    return store.extras["depth"].files[0].parent


def test_features_are_computed_once_and_delivered_with_the_batch(store):
    network = Network()
    found = with_depth(store, network)
    assert sum(network.sizes) == STEPS
    check(found, network)
    again = Network()
    chosen = with_depth(store.select([1, 2]), again)
    assert again.sizes == []
    check(chosen, again)
    data = ChunkDataset(found, range(4), 4)
    batch = data.__getitems__([7, 3, 15])
    assert torch.equal(batch.extras["depth"], found.extra("depth", batch.index.numpy()))
    assert torch.equal(batch.images, store.images(batch.index.numpy()))
    assert torch.equal(data[3].extras["depth"], batch.extras["depth"][1])
    plain = ChunkDataset(store, range(4), 4)
    assert plain.__getitems__([1]).extras == {}
    assert torch.equal(plain.on(found).__getitems__([3]).extras["depth"], batch.extras["depth"][1:2])
    check(pickle.loads(pickle.dumps(found)), network)


def test_only_what_is_chosen_is_computed(store):
    network = Network()
    check(with_depth(store.select([2]), network), network)
    assert sum(network.sizes) == 2 * LENGTHS[2]  # `check` computed them, too


def test_other_networks_have_features_of_their_own(store):
    networks = [Network(identity=n) for n in (1, 2)]
    both = [with_depth(store, network) for network in networks]
    assert folder_of(both[0]) != folder_of(both[1])
    for found, network in zip(both, networks, strict=True):
        check(found, network)


@pytest.mark.parametrize("cut", [0, 1])
def test_an_interrupted_computation_continues(store, cut):
    stopped = Network(stops_after=11)
    with pytest.raises(KeyboardInterrupt):
        with_depth(store, stopped)
    before = sum(stopped.sizes)
    assert 11 <= before < STEPS
    (part,) = store.path.glob("features-*/*.part")
    part.write_bytes(part.read_bytes()[: -cut or None])  # the last row did not reach the disk
    network = Network()
    found = with_depth(store, network)
    assert sum(network.sizes) == STEPS - before + cut
    check(found, network)
    assert not list(folder_of(found).glob("*.part"))
    assert damaged_files(store.path) == {}


def test_a_part_of_other_frames_is_not_continued(store):
    with pytest.raises(KeyboardInterrupt):
        with_depth(store, Network(stops_after=11))
    (part,) = store.path.glob("features-*/*.part")
    part.rename(part.with_name(f"{part.name[:13]}00000000.part"))
    network = Network()
    found = with_depth(store, network)
    check(found, network)
    assert not list(folder_of(found).glob("*.part"))


def test_features_of_other_frames_or_another_network_are_computed_again(store):
    network = Network()
    file = with_depth(store, network).extras["depth"].files[0]
    note = json.loads(file.with_suffix(".json").read_text())
    for spoiled in (
        {**note, "source": {**note["source"], "crc32": 1}},
        {**note, "identity": {**note["identity"], "weights": "x"}},
        {**note, "bytes": note["bytes"] + 2},
        [],
    ):
        file.write_bytes(bytes(note["bytes"]))
        file.with_suffix(".json").write_text(json.dumps(spoiled))
        check(with_depth(store, network), network)


def test_verify_finds_damaged_features_and_prune_deletes_them(store):
    file = with_depth(store, Network()).extras["depth"].files[0]
    assert damaged_files(store.path) == {}
    content = bytearray(file.read_bytes())
    content[11] ^= 1
    file.write_bytes(content)
    name = f"{file.parent.name}/{file.name}"
    assert damaged_files(store.path) == {name: "has another checksum than was written"}
    delete(store.path)
    assert not store.path.exists()


@pytest.mark.parametrize("version", [0, 1])
def test_a_dataset_that_grew_keeps_the_features_of_frames_that_are_the_same(store, version):
    with_depth(store, Network())
    source, info = grown(version)
    whole = build(store.path.parent, source, info)
    network = Network()
    found = with_depth(whole, network)
    assert sum(network.sizes) == sum(source.lengths) - (STEPS if version == 0 else 0)
    check(found, network)


def test_rows_of_bad_episodes_are_passed_over(tmp_path):
    store, network = build(tmp_path, Drawn(bad=(0, 2)), skip_bad=True), Network()
    check(with_depth(store, network), network)


def test_joined_and_compressed_stores_have_features(store, tmp_path):
    network = Network()
    jpeg = build(tmp_path, info=INFO, storage="jpeg")
    check(with_depth(jpeg, network), network)
    both = EpisodeStore.concatenate([store.select([3, 1]), store])
    check(with_depth(both, network), network)
    assert EpisodeStore.concatenate([with_depth(store, network), store]).extras == {}


def test_memory_that_does_not_suffice_halves_the_batch_for_all_files(store):
    network = Network(fits=5)
    found = with_depth(store, network, batch_size=16)
    assert network.sizes == [7, 3, 3, 1, 3, 3, 3, 3, 1]  # seven steps are in the first file
    network.fits = 99
    check(found, network)
    with pytest.raises(RuntimeError, match="out of memory"):
        with_depth(store, Network(fits=0, identity=2))


def test_files_that_other_processes_work_on_are_left_to_them_and_waited_for(store, monkeypatch):
    found = with_depth(store, Network())
    notes = {path: path.read_bytes() for path in folder_of(found).glob("*.json")}
    for path in notes:
        path.unlink()
    acquire, waited = FileLock.acquire, []

    def slow(self, timeout=None, **options):
        if timeout == 0:  # somebody else holds it, and finishes in the meantime
            waited.append(self.lock_file)
            path = folder_of(found) / (Path(self.lock_file).stem.lstrip(".") + ".json")
            path.write_bytes(notes[path])
            raise Timeout(self.lock_file)
        return acquire(self, timeout=timeout, **options)

    monkeypatch.setattr(FileLock, "acquire", slow)
    network = Network()
    assert with_depth(store, network).extras == found.extras
    assert network.sizes == []
    assert len(waited) == len(notes) == 3


def test_every_store_is_opened_once(store, monkeypatch):
    opened, whole = [], EpisodeStore.open.__func__
    monkeypatch.setattr(
        EpisodeStore, "open", classmethod(lambda cls, path: opened.append(path) or whole(cls, path))
    )
    with_depth(store, Network())
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (errno.EACCES, "another --cache-dir, or --depth-cache off"),
        (errno.ENOSPC, "is full: .* --depth-pool 2"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named(store, monkeypatch, number, pattern):
    def refuse(*args, **options):
        raise OSError(number, "it failed")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=pattern):
        with_depth(store, Network())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(store, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"need 0\.00 GB .* choose --depth-pool 2"):
        with_depth(store, Network())
    assert not list(store.path.glob("features-*"))


def test_features_that_are_not_finite_are_refused(store):
    with pytest.raises(UserError, match="not finite"):
        with_depth(store, Network(identity=float("nan")))
