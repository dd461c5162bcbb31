"""Features of frozen networks, cached next to an episode store; the network here is a sum."""

import errno
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from test_store import INFO, LENGTHS, ROW_BYTES, Drawn, build, grown

from common.data import features
from common.data.inspect import damages, delete
from common.data.samples import ChunkDataset
from common.data.store import EpisodeStore
from common.errors import UserError

STEPS = sum(LENGTHS)


class Network:
    """Features (B, 2): the sum of each camera's pixels, scaled; counts what it computes.

    Attributes:
        sizes: steps of each batch that was computed.
        fits: largest batch that fits; larger ones raise an out-of-memory error.
        stops_after: stop after this many steps, as if killed.
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
    """Store the episodes in three blocks of rows: 0 to 6, 7 to 13, 14 to 19."""
    monkeypatch.setattr(features, "BLOCK", 7)
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
    assert sum(network.sizes) == 2 * LENGTHS[2]  # includes those that `check` computed


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
    (folder,) = store.path.glob("features-*")
    if cut:  # the last step was not marked as done on disk
        features.forget(folder, np.array([before - 1]))
    network = Network()
    found = with_depth(store, network)
    assert sum(network.sizes) == STEPS - before + cut
    check(found, network)
    assert damages(store.path) == []


@pytest.mark.parametrize("file", ["rows.bin", "done.bin"])
def test_features_whose_files_were_cut_off_are_computed_again(store, file):
    path = folder_of(with_depth(store, Network())) / file
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: -size // STEPS])  # cut off the last row
    network = Network()
    assert len(damages(store.path)) == 1
    check(with_depth(store, network), network)
    assert sum(network.sizes) == 1 + STEPS  # includes those that `check` computed
    path.unlink()
    assert len(damages(store.path)) == (file == "rows.bin")
    check(with_depth(store, network), network)
    assert sum(network.sizes) == 1 + 3 * STEPS


def test_features_of_other_frames_are_computed_again(store):
    network = Network()
    path = folder_of(with_depth(store, network)) / "done.bin"
    done = np.fromfile(path, np.int64).reshape(-1, 2)
    checksums = store.episode_checksums[[0, 1, 2, 3]].repeat(LENGTHS)
    assert (done[:, 0] == checksums + 1).all()
    done[5:7, 0] += 1  # as if episode 1 had been decoded differently
    done.tofile(path)
    network = Network()
    found = with_depth(store, network)
    assert network.sizes == [2]
    check(found, network)


def test_verify_finds_damaged_features_and_prune_deletes_them(store):
    file = with_depth(store, Network()).extras["depth"].files[0]
    assert damages(store.path) == []
    content = bytearray(file.read_bytes())
    content[11] ^= 1
    file.write_bytes(content)
    assert damages(store.path) == [f"1 rows of {file.parent.name} differ from their checksums"]
    delete(store.path)
    assert not store.path.exists()


def test_features_of_damaged_frames_are_computed_again(store):
    right = store.images(np.arange(STEPS))
    content = bytearray(store.frame_files[0].read_bytes())
    content[6 * ROW_BYTES] ^= 255  # in episode 1
    store.frame_files[0].write_bytes(content)
    with_depth(store, Network())
    (store.path / "arrays.safetensors").unlink()  # as `verify --rebuild` does
    again, network = build(store.path.parent), Network()
    assert torch.equal(again.images(np.arange(STEPS)), right)
    found = with_depth(again, network)
    assert sum(network.sizes) == LENGTHS[1]
    check(found, network)


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


def test_memory_that_does_not_suffice_halves_the_batch_for_all_blocks(store):
    network = Network(fits=5)
    found = with_depth(store, network, batch_size=16)
    assert network.sizes == [7, 3, 3, 1, 3, 3, 1, 3, 3]  # blocks of seven, seven and six steps
    network.fits = 99
    check(found, network)
    with pytest.raises(RuntimeError, match="out of memory"):
        with_depth(store, Network(fits=0, identity=2))


def test_blocks_that_other_processes_work_on_are_left_to_them_and_waited_for(store, monkeypatch):
    path = folder_of(with_depth(store, Network())) / "done.bin"
    done = np.fromfile(path, np.int64).reshape(-1, 2)
    np.zeros_like(done).tofile(path)
    acquire, waited = FileLock.acquire, []

    def slow(self, timeout=None, **options):
        block = int(Path(self.lock_file).stem.lstrip("."))
        if timeout == 0 and block != 1:  # another process holds the lock, and finishes now
            waited.append(block)
            marks = np.fromfile(path, np.int64).reshape(-1, 2)
            marks[7 * block : 7 * block + 7] = done[7 * block : 7 * block + 7]
            marks.tofile(path)
            raise Timeout(self.lock_file)
        return acquire(self, timeout=timeout, **options)

    monkeypatch.setattr(FileLock, "acquire", slow)
    network = Network()
    found = with_depth(store, network)
    assert sum(network.sizes) == 7
    assert waited == [0, 2]
    check(found, network)


def test_two_at_once_share_the_blocks(store):
    networks = [Network() for _ in range(2)]
    meet = threading.Barrier(2)

    def compute(network):
        def both(images):
            if not network.sizes:
                meet.wait(timeout=30)  # each has begun a block
            return network(images)

        return features.ensure_features(store, "depth", {"weights": 1}, (2,), both, 7, "")

    threads = [threading.Thread(target=compute, args=(network,)) for network in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sum(network.sizes) for network in networks) in ([6, 14], [7, 13])
    check(with_depth(store, Network()), Network())


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
