import errno
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from common.data import ingest
from common.data.ingest import StoreRequest, ensure_store
from common.data.samples import (
    Ahead,
    Batch,
    ChunkDataset,
    SampleStream,
    evenly_spaced,
    make_loader,
    split_episodes,
)
from common.data.source import BadEpisode, Camera, Episode, Info
from common.data.store import EpisodeStore
from common.errors import UserError
from common.files import write_whole

LENGTHS = (5, 2, 9, 4)
CAMERAS, SIZE = ("head", "left"), (6, 8)
ROW_BYTES = len(CAMERAS) * 3 * SIZE[0] * SIZE[1]
INFO = Info(
    source="/somewhere/towel",
    fingerprint="1",
    cameras=tuple(Camera(f"observation.images.cam_{name}", name, SIZE) for name in CAMERAS),
    image_size=SIZE,
    fps=10.0,
    state_names=("x", "y"),
    action_names=("x", "y"),
    choices={"task": "fold"},
)


def pixels(episode, camera, step, version=0):
    """A frame that no other step has: (3, H, W)."""
    return np.random.default_rng((episode, camera, step, version)).integers(0, 256, (3, *SIZE), np.uint8)


@dataclass
class Drawn:
    """A source of frames from `pixels`, with faults and a record of what was decoded to the end.

    Attributes:
        lengths: steps of each episode.
        frames_of: number of frames of the episodes where it differs from the number of steps.
        unusable: why other episodes are unusable, as clauses of a message.
    """

    lengths: tuple[int, ...] = LENGTHS
    frames_of: dict | None = None
    bad: tuple[int, ...] = ()
    unusable: tuple[str, ...] = ()
    stops_at: int | None = None
    error: BaseException | None = None
    version: int = 0
    delay: float = 0.0
    decoded: list | None = None
    isolated = False

    def episodes(self, wanted=None):
        rng = np.random.default_rng(0)
        found = []
        for index, length in enumerate(self.lengths):
            state, action = rng.normal(size=(2, length, 2)).astype(np.float32)
            found.append(Episode(index, state, action, np.arange(length) / 10, f"video {index}", "fold"))
        return [e for e in found if wanted is None or e.index in wanted], list(self.unusable)

    def frames(self, episode, camera):
        if episode.index == self.stops_at:
            raise self.error
        for step in range((self.frames_of or {}).get(episode.index, len(episode))):
            if episode.index in self.bad and step == 1:
                raise BadEpisode(f"Episode {episode.index} is broken")
            time.sleep(self.delay)
            yield pixels(episode.index, camera, step, self.version)
        if self.decoded is not None:
            self.decoded.append((episode.index, camera))


def build(root, source=None, info=INFO, **options):
    return ensure_store(root, StoreRequest(source or Drawn(), info, **{"workers": 1, **options}))


@pytest.fixture(params=["one", "grown", "joined"])
def store(request, tmp_path):
    """The episodes in a file, in a file that does not hold them in their order, or in two."""
    if request.param == "joined":
        first, second = build(tmp_path, episodes=(0, 1)), build(tmp_path, episodes=(2, 3))
        return replace(EpisodeStore.concatenate([first, second]), part_weights=None)
    if request.param == "grown":
        build(tmp_path, episodes=(1, 2))
        store = build(tmp_path)
        assert store.episode_rows.tolist() == [11, 0, 2, 16]
        return store
    return build(tmp_path)


# Reading


@pytest.mark.parametrize(("horizon", "history", "hold"), [(1, 1, 0), (4, 3, 2), (20, 20, 3)])
def test_every_sample_equals_a_walk_through_its_episode(store, horizon, history, hold):
    chosen = [0, 1, 3]
    dataset = ChunkDataset(store, chosen, horizon, history, hold=hold)
    samples = [(e, step) for e in chosen for step in range(LENGTHS[e])]
    assert len(dataset) == len(samples)
    order = np.random.default_rng(0).permutation(len(samples))
    batch = dataset.__getitems__([*order, order[0]])  # any order, with a repetition
    recorded = Drawn().episodes()[0]
    for slot, sample in enumerate([*order, order[0]]):
        e, step = samples[sample]
        for camera in range(len(CAMERAS)):
            assert (batch.images[slot, camera].numpy() == pixels(e, camera, step)).all()
        last = LENGTHS[e] - 1
        expected = [recorded[e].action[min(step + k, last)] for k in range(horizon)]
        assert (batch.actions[slot].numpy() == expected).all()
        assert batch.is_pad[slot].tolist() == [step + k > last + hold for k in range(horizon)]
        expected = [recorded[e].state[max(0, step - k)] for k in reversed(range(history))]
        assert (batch.proprio[slot].numpy() == expected).all()
        assert batch.index[slot] == sum(LENGTHS[:e]) + step
    assert batch.images.shape == (len(samples) + 1, 2, 3, *SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.actions.dtype == batch.proprio.dtype == torch.float32
    assert batch.index.dtype == torch.int64


@pytest.mark.parametrize(("frames", "stride"), [(2, 1), (3, 2), (2, 20)])
def test_earlier_frames_are_those_of_the_same_episode(store, frames, stride):
    dataset = ChunkDataset(store, [0, 1, 3], 4, image_history=frames, image_stride=stride)
    samples = [(e, step) for e in (0, 1, 3) for step in range(LENGTHS[e])]
    order = np.random.default_rng(0).permutation(len(samples))
    batch = dataset.__getitems__(order)
    assert batch.images.shape == (len(samples), 2, frames, 3, *SIZE)
    for slot, sample in enumerate(order):
        e, step = samples[sample]
        for camera in range(len(CAMERAS)):
            for back in range(frames):
                frame = batch.images[slot, camera, frames - 1 - back].numpy()
                assert (frame == pixels(e, camera, max(step - stride * back, 0))).all()
    plain = ChunkDataset(store, [0, 1, 3], 4).__getitems__(order)
    assert torch.equal(plain.images, batch.images[:, :, -1])
    for name in ("proprio", "actions", "is_pad", "index"):
        assert torch.equal(getattr(plain, name), getattr(batch, name))
    assert torch.equal(dataset.on(store).__getitems__([2]).images, dataset.__getitems__([2]).images)


def test_frames_come_in_the_order_asked_for_wherever_they_lie(store):
    starts = np.cumsum([0, *LENGTHS])
    for rows in (
        [6, 2, 4, 0, 2],
        [15, 8, 15],
        [19, 3, 16, 0],
    ):  # chosen from the first dataset, the second, both
        for slot, row in enumerate(rows):
            e = np.searchsorted(starts, row, side="right") - 1
            frame = store.images(np.array(rows))[slot, 1].numpy()
            assert (frame == pixels(e, 1, row - starts[e])).all()


def test_one_sample_is_a_batch_without_its_first_dimension(store):
    dataset = ChunkDataset(store, range(4), 3)
    for one, many in zip(dataset[7][:5], dataset.__getitems__([7])[:5], strict=True):
        assert torch.equal(one, many[0])
    assert dataset[7].extras == {}


def test_attributes_say_what_was_recorded(store):
    assert (store.num_episodes, store.num_steps) == (4, sum(LENGTHS))
    assert store.episode_starts.tolist() == [0, 5, 7, 16, 20]
    assert store.episode_indices.tolist() == [0, 1, 2, 3]
    assert store.cameras == CAMERAS
    assert store.image_size == SIZE
    assert store.shared_space
    assert store.skipped == ()
    np.testing.assert_allclose(store.timestamps[5:8], [0, 0.1, 0])


def test_a_pickled_store_maps_the_same_files(store):
    rows = np.array([19, 0, 6])
    clone = pickle.loads(pickle.dumps(ChunkDataset(store, range(4), 3)))
    assert torch.equal(clone.store.images(rows), store.images(rows))
    assert len(pickle.dumps(store)) < 5000 + store.num_steps * 50  # frames are not pickled


def test_a_batch_that_is_held_is_never_overwritten(store):
    dataset = ChunkDataset(store, range(4), 2)
    held, copies = [], []
    for k in range(12):
        batch = dataset.__getitems__([k, k + 1])
        held.append(batch.images[1:].float if k % 3 == 0 else batch.images[1])  # also if only a view is held
        copies.append(batch.images[1].clone())
        del batch
    for view, copy in zip(held, copies, strict=True):
        view = view().byte()[0] if callable(view) else view
        assert torch.equal(view, copy)


def test_a_thread_that_gathers_ahead_gives_the_same_batches_beside_others(store):
    samples = ChunkDataset(store, range(store.num_episodes), 4)
    expected = iter(make_loader(samples, 4, 0, 0))
    ahead = Ahead(iter(make_loader(samples, 4, 0, 0)))
    rows = np.arange(4)
    for _ in range(300):
        batch, other = next(ahead), samples.__getitems__(rows)  # while the thread gathers the next batch
        wanted = next(expected)
        assert all(map(torch.equal, batch[:-1], wanted[:-1]))
        assert torch.equal(other.images, store.images(samples.rows[rows]))


def test_what_fails_ahead_is_raised_when_it_is_due():
    ahead = Ahead(iter([1, 2]))
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)


def test_a_batch_that_nobody_holds_lends_its_memory_to_the_next(store):
    dataset = ChunkDataset(store, range(4), 2)
    places = {dataset.__getitems__([k, 0]).images.data_ptr() for k in range(10)}
    assert len(places) == 1


def test_batch_moves_to_a_device(store):
    batch = ChunkDataset(store, range(4), 2).__getitems__([0, 1]).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch[:5])
    assert batch.extras == {}


def test_what_is_done_to_a_batch_is_done_to_its_extras():
    batch = Batch(*(torch.arange(3) for _ in range(5)), {"depth": torch.ones(3, 2)})
    first = batch.each(lambda tensor: tensor[0])
    assert first.index.shape == ()
    assert first.extras["depth"].tolist() == [1, 1]
    assert batch.to("meta").extras["depth"].device.type == "meta"
    assert Batch(*batch[:5]).extras == {}


def test_every_episode_keeps_its_task(store):
    assert store.episode_tasks == ("fold",) * 4
    assert store.task == "fold"
    other = replace(store, episode_tasks=("fold", "open", "fold", None))
    assert other.task is None
    assert other.select([1]).task == "open"
    assert other.select([0, 2]).task == "fold"
    both = EpisodeStore.concatenate([other.select([1]), store])
    assert both.episode_tasks == ("open", *store.episode_tasks)
    assert both.task is None


@pytest.mark.parametrize("damage", ["frames", "arrays", "meta", "missing", "format"])
def test_a_damaged_store_is_not_opened_but_rebuilt(tmp_path, damage):
    store = build(tmp_path)
    file = {"frames": "frames.bin", "arrays": "arrays.safetensors"}.get(damage, "meta.json")
    content = (store.path / file).read_bytes()
    if damage == "missing":
        (store.path / file).unlink()
    elif damage == "format":
        (store.path / file).write_bytes(content.replace(b'"format": 4', b'"format": 3'))
    else:
        (store.path / file).write_bytes(content[:-7])
    with pytest.raises(UserError, match="delete it"):
        EpisodeStore.open(store.path)
    source = Drawn(decoded=[])
    check_whole(build(tmp_path, source))
    assert source.decoded == ([(3, 0), (3, 1)] if damage == "frames" else [])


# Order of samples


def positions(batches, batch_size, start, rank, world):
    """Global position in the stream of every sample of a rank's first batches."""
    first = start + rank * batch_size
    return [first + k * batch_size * world + i for k in range(batches) for i in range(batch_size)]


@pytest.mark.parametrize("start", [0, 7, 1234])
@pytest.mark.parametrize("world", [1, 3])
def test_ranks_share_one_stream_of_shuffled_epochs(start, world):
    n, batch_size, batches = 11, 4, 9
    whole = {}
    for rank in range(world):
        stream = iter(SampleStream([n], batch_size, 5, rank, world, start))
        drawn = [sample for _ in range(batches) for sample in next(stream)]
        whole |= dict(zip(positions(batches, batch_size, start, rank, world), drawn, strict=True))
    assert sorted(whole) == list(range(start, start + batches * batch_size * world))
    epochs = range(-(-start // n), (start + batches * batch_size * world) // n)
    assert len(epochs) >= 2
    orders = [tuple(whole[epoch * n + i] for i in range(n)) for epoch in epochs]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(orders)) == len(orders)  # every epoch has a different order


def test_the_stream_continues_from_any_position():
    n, batch_size = 10, 4
    begin = iter(SampleStream([n], batch_size, 3))
    drawn = [next(begin) for _ in range(8)]
    assert [next(begin) for _ in range(2)] == [
        next(stream) for stream in [iter(SampleStream([n], batch_size, 3, start=32))] for _ in range(2)
    ]
    assert next(iter(SampleStream([n], batch_size, 3, start=20))) == drawn[5]
    assert drawn[0] != next(iter(SampleStream([n], batch_size, 4)))


def of_episodes(*counts):
    numbers = np.arange(sum(counts))
    return SimpleNamespace(
        part_episodes=counts, episode_indices=numbers, episode_task_numbers=np.full(len(numbers), -1)
    )


@pytest.mark.parametrize(("n", "fraction", "held"), [(10, 0.1, 1), (10, 0.34, 3), (4, 0.01, 1), (2, 0.9, 1)])
def test_split_holds_out_at_least_one_and_leaves_one(n, fraction, held):
    train, val = split_episodes(of_episodes(n), fraction, seed=1)
    assert len(val) == held
    assert sorted([*train, *val]) == list(range(n))
    assert (np.diff(train) > 0).all()
    again = split_episodes(of_episodes(n), fraction, seed=1)
    assert (again[1] == val).all()


def test_split_without_a_held_out_part():
    assert len(split_episodes(of_episodes(5), 0.0, 0)[1]) == 0
    assert len(split_episodes(of_episodes(1), 0.5, 0)[1]) == 0
    assert len({tuple(split_episodes(of_episodes(20), 0.1, seed)[1]) for seed in range(8)}) > 1


def test_the_last_of_very_many_samples_is_inside():
    class Many(list):
        __len__ = lambda self: 17_000_004  # noqa: E731

        def __getitems__(self, rows):
            return rows

    ((_, rows),) = evenly_spaced(Many(), 3, 8)
    assert rows == [0, 8_500_001, 17_000_003]


@pytest.mark.parametrize("world", [1, 3, 9])
def test_evaluation_sees_evenly_spaced_samples_once_whatever_the_processes(store, world):
    dataset = ChunkDataset(store, range(4), 3)
    seen = {}
    for rank in range(world):
        for rows, batch in evenly_spaced(dataset, 7, 2, rank, world):
            assert 1 <= len(rows) <= 2
            assert len(batch.index) == len(rows)
            seen |= dict(zip(rows.tolist(), batch.index.tolist(), strict=True))
    # 7 of 20 samples, including the first and the last; of 9 processes, two get none
    assert [seen[row] for row in range(7)] == [0, 3, 6, 9, 12, 15, 19]
    assert len(seen) == 7


def test_loader_follows_the_stream_and_leaves_the_global_generator_alone(store):
    dataset = ChunkDataset(store, range(4), 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = iter(make_loader(dataset, 3, seed=2, num_workers=0, rank=1, world=2, start=5))
    stream = iter(SampleStream([len(dataset)], 3, 2, 1, 2, 5))
    for _ in range(8):
        assert next(loader).index.tolist() == dataset.rows[next(stream)].tolist()
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_workers_give_the_same_batches(store):
    dataset = ChunkDataset(store, range(4), 3)
    alone, helped = (iter(make_loader(dataset, 4, seed=2, num_workers=n)) for n in (0, 2))
    for _ in range(6):
        for one, two in zip(next(alone)[:5], next(helped)[:5], strict=True):
            assert torch.equal(one, two)


def test_a_batch_larger_than_the_data_is_refused(store):
    dataset = ChunkDataset(store, [0, 1], 3)
    make_loader(dataset, 7, seed=0, num_workers=0)
    with pytest.raises(UserError, match="larger than the 7 training samples"):
        make_loader(dataset, 8, seed=0)
    with pytest.raises(UserError, match="lower --batch-size to at most 3"):
        make_loader(dataset, 4, seed=0, world=2)


# Building


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.name.endswith(".lock"))


def check_whole(store, lengths=LENGTHS, version=0):
    starts = np.cumsum([0, *lengths])
    assert store.episode_starts.tolist() == starts.tolist()
    images = store.images(np.arange(store.num_steps)).numpy()
    for e, length in enumerate(lengths):
        for step in range(length):
            for camera in range(len(CAMERAS)):
                assert (images[starts[e] + step, camera] == pixels(e, camera, step, version)).all()
    assert (store.state == np.concatenate([episode.state for episode in Drawn(lengths).episodes()[0]])).all()
    assert not list(store.path.glob("*.part"))


def test_a_finished_store_is_only_opened(tmp_path):
    build(tmp_path)
    store = build(tmp_path, SimpleNamespace(episodes=lambda wanted: pytest.fail("read again")))
    check_whole(store)


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_interrupted_ingest_continues_with_what_is_missing(tmp_path, error):
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="disk" if expected is UserError else None):
        build(tmp_path, Drawn(stops_at=3, error=error))
    assert [Path(file).name for file in files(tmp_path)][1:] == ["episodes.jsonl", "frames.bin"]
    source = Drawn(decoded=[])
    check_whole(build(tmp_path, source))
    assert source.decoded == [(3, 0), (3, 1)]


def test_an_ingest_that_finished_nothing_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"^Episode 0 is broken: .*--skip-bad-episodes"):
        build(tmp_path, Drawn(bad=(0,)))
    assert files(tmp_path) == []


def test_what_was_decoded_before_a_bad_episode_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"^Episode 2 is broken: .*--skip-bad-episodes"):
        build(tmp_path, Drawn(bad=(2,)))
    source = Drawn(bad=(2,), decoded=[])
    assert build(tmp_path, source, skip_bad=True).episode_indices.tolist() == [0, 1, 3]
    assert source.decoded == [(3, 0), (3, 1)]


def test_a_killed_ingest_continues(tmp_path):
    program = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
        import test_store
        test_store.build(test_store.Path({str(tmp_path)!r}), test_store.Drawn(delay=0.05))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    finished = []
    while not finished and time.time() < deadline:
        time.sleep(0.01)
        for path in tmp_path.glob("*/episodes.jsonl"):
            finished = [r.index for r in ingest.read_records(path.parent).values() if r.crc32 is not None]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 not in finished, "killed in the middle"
    (path,) = tmp_path.glob("*/episodes.jsonl")
    assert not list(tmp_path.glob("*/meta.json"))
    with path.open("a") as file:
        file.write('{"index": 3, "dig')  # killed while writing a line
    source = Drawn(decoded=[])
    check_whole(build(tmp_path, source))
    assert (0, 0) not in source.decoded
    assert (3, 0) in source.decoded
    assert ingest.read_records(path.parent)[3].crc32 is not None


def test_several_processes_decode_the_same(tmp_path):
    store = build(tmp_path, Drawn((*LENGTHS, 3), bad=(4,)), workers=2, skip_bad=True)
    check_whole(store)
    assert store.skipped == ("Episode 4 is broken",)


def test_two_that_ingest_at_once_build_it_once(tmp_path, capfd):
    sources, stores = [Drawn(delay=0.01, decoded=[]) for _ in range(2)], {}
    threads = [
        threading.Thread(target=lambda i=i: stores.update({i: build(tmp_path, sources[i])})) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(source.decoded) for source in sources) == [0, 2 * len(LENGTHS)]
    for store in stores.values():
        check_whole(store)
    assert "waiting for another process" in capfd.readouterr().out


def grown(version=0, bad=()):
    """The dataset after two more episodes were recorded."""
    return Drawn((*LENGTHS, 3, 6), version=version, decoded=[], bad=bad), replace(INFO, fingerprint="2")


def test_a_dataset_that_grew_decodes_only_its_new_episodes(tmp_path):
    first = build(tmp_path)
    inode = first.frame_files[0].stat().st_ino
    (first.path / "features-x").mkdir()
    (first.path / "features-x/rows.bin").write_bytes(b"features")
    source, info = grown()
    second = build(tmp_path, source, info)
    assert second.path != first.path
    check_whole(second, source.lengths)
    check_whole(first)  # opened before: its files are mapped
    assert sorted(source.decoded) == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert second.frame_files[0].stat().st_ino == inode
    assert (second.path / "features-x/rows.bin").read_bytes() == b"features"
    assert not first.path.exists()
    check_whole(build(tmp_path, source, info), source.lengths)


def test_a_growth_that_is_interrupted_continues(tmp_path):
    build(tmp_path)
    source, info = grown()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, replace(source, stops_at=4, error=KeyboardInterrupt()), info)
    check_whole(build(tmp_path, source, info), source.lengths)
    assert sorted(source.decoded) == [(4, 0), (4, 1), (5, 0), (5, 1)]


def test_a_jpeg_store_that_was_interrupted_and_grew_is_as_one_built_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Drawn(stops_at=2, error=KeyboardInterrupt()), storage="jpeg")
    (frames,) = tmp_path.glob("*/frames.bin")
    frames.write_bytes(frames.read_bytes() + b"cut off")  # frames whose index was not written
    first, (source, info) = build(tmp_path, storage="jpeg"), grown()
    before = first.images(np.arange(first.num_steps))
    second = build(tmp_path, source, info, storage="jpeg")
    assert sorted(source.decoded) == [(4, 0), (4, 1), (5, 0), (5, 1)]
    whole = build(tmp_path / "other", source, info, storage="jpeg")
    rows = np.arange(whole.num_steps)
    assert torch.equal(second.images(rows), whole.images(rows))
    assert torch.equal(first.images(rows[:20]), before)  # opened before
    assert torch.equal(before, whole.images(rows[:20]))


def test_frames_that_changed_are_decoded_again_though_the_numbers_are_the_same(tmp_path):
    first = build(tmp_path)
    source, info = grown(version=1)
    check_whole(build(tmp_path, source, info), source.lengths, version=1)
    check_whole(first)  # open readers are not disturbed
    check_whole(EpisodeStore.open(first.path))


@pytest.mark.parametrize("other", ["source", "choices", "numbers", "frames", "chosen", "locked"])
def test_a_store_is_taken_over_by_the_same_dataset_that_grew_only(tmp_path, other):
    first = build(tmp_path, episodes=(0, 1, 2) if other == "chosen" else None)
    source, info = grown()
    if other in ("source", "choices"):
        info = replace(info, **{other: {"source": "/elsewhere", "choices": {"task": "open"}}[other]})
    if other == "numbers":
        source.lengths = (6, *source.lengths)
    if other == "frames":  # it has changed, not grown
        source = Drawn(version=1)
    episodes = (1, 2) if other == "chosen" else None
    with FileLock(ingest.lock_file(first.path)) if other == "locked" else nullcontext():
        second = build(tmp_path, source, info, episodes=episodes)
    assert second.num_episodes == len(episodes or source.lengths)
    check_whole(EpisodeStore.open(first.path), LENGTHS[:3] if other == "chosen" else LENGTHS)


def test_of_several_earlier_stores_the_one_that_saves_most_is_taken_over(tmp_path):
    few, many = build(tmp_path, episodes=(0,)), build(tmp_path, episodes=(0, 1, 3))
    source = Drawn(decoded=[])
    check_whole(build(tmp_path, source))
    assert source.decoded == [(2, 0), (2, 1)]
    assert few.path.exists()
    assert not many.path.exists()


@pytest.mark.parametrize(
    "change",
    [{"image_size": (6, 9)}, {"cameras": (Camera("a", "head", SIZE),)}, {"choices": {"task": "other"}}],
)
def test_what_is_chosen_decides_which_store_it_is(tmp_path, change):
    def folder(**changes):
        return StoreRequest(Drawn(), replace(INFO, **changes)).folder(tmp_path)

    assert folder(**change) != folder()
    assert folder(source="/moved/to").name.startswith("to-")
    path = build(tmp_path).path
    assert folder(source="/moved/to") == path  # the content counts, not the location


def test_bad_episodes_are_left_out_on_request(tmp_path, capsys):
    store = build(tmp_path, Drawn(bad=(1,), unusable=("Episode 9 is too short",)), skip_bad=True)
    assert store.episode_indices.tolist() == [0, 2, 3]
    assert store.skipped == ("Episode 9 is too short", "Episode 1 is broken")
    assert "left out 2 of 5 episodes" in capsys.readouterr().out
    assert (store.images(np.array([5]))[0, 1].numpy() == pixels(2, 1, 0)).all()
    with pytest.raises(UserError, match="Episode 9 is too short"):
        build(tmp_path)
    with pytest.raises(UserError, match=r"no usable episode left \(Episode 1 is broken"):
        build(tmp_path, skip_bad=True, episodes=(1,))
    with pytest.raises(UserError, match="no usable episode"):
        build(tmp_path / "other", Drawn(bad=(0, 1, 2, 3)), skip_bad=True)
    assert files(tmp_path / "other") == []


def test_an_episode_that_was_left_out_is_not_one_that_never_existed(tmp_path, capsys):
    source = Drawn(bad=(1,), unusable=("Episode 9 is too short",))
    build(tmp_path, source, skip_bad=True)
    for skip_bad in (True, False):
        with pytest.raises(UserError, match=r"has no episode 7, 12: .* lists them"):
            build(tmp_path, source, skip_bad=skip_bad, episodes=(0, 1, 7, 12))
    with pytest.raises(UserError, match=r"^Episode 1 is broken: repair it"):
        build(tmp_path, source, episodes=(0, 1))
    capsys.readouterr()
    assert build(tmp_path, source, skip_bad=True, episodes=(0, 1)).episode_indices.tolist() == [0]
    said = capsys.readouterr().out
    assert "left out 1 of 2 episodes" in said
    assert "Episode 9" not in said


def test_other_episodes_left_out_are_other_data(tmp_path):
    """An episode that only this machine cannot decode must not pass for one that others could."""
    stores = [build(tmp_path / str(bad), Drawn(bad=bad), skip_bad=True) for bad in ((), (1,), (2,), (2,))]
    found = [store.fingerprint for store in stores]
    assert len(set(found)) == 3
    assert found[2] == found[3]
    assert len({store.source_fingerprint for store in stores}) == 1


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_number_of_frames_is_a_fault(tmp_path, wrong):
    with pytest.raises(UserError, match=r"Episode 2 has .* head frames"):
        build(tmp_path, Drawn(frames_of={2: 9 + wrong}))


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB .* --cache-dir"):
        build(tmp_path)
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --cache-dir"):
        build(tmp_path / "file" / "stores")


def test_a_file_that_several_write_at_once_is_always_whole(tmp_path):
    contents = [bytes([n]) * (1000 + n) for n in range(4)]
    path, problems = tmp_path / "scan.json", []

    def write(content):
        try:
            for _ in range(50):
                write_whole(path, content)
                assert path.read_bytes() in contents
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert [file.name for file in tmp_path.iterdir()] == ["scan.json"]
