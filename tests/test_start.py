"""What a start computes once and caches (statistics next to the store, checksums), and never trusts."""

import ast
import json
import os
import resource
import runpy
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_factory import make_dataset

from common import files
from common.data import ChunkDataset, DataConfig, open_dataset
from common.data.motion import Motion, without_extremes
from common.data.store import EpisodeStore
from common.errors import UserError, explain
from common.files import computed_once, unchanged_while
from common.normalize import STATISTICS, Normalizer, fit_statistics


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once."""
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def store(dataset, tmp_path):
    return open_dataset(DataConfig((str(dataset),), cache_dir=tmp_path))


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


# Values that are computed once


def test_a_value_is_computed_once_for_a_key(tmp_path):
    values = iter([[1, 0.1], "two", None])
    path = tmp_path / "below" / "value.json"

    def get(key):
        return computed_once(path, key, lambda: next(values))

    assert get(["a", 1]) == get(["a", 1]) == [1, 0.1]
    assert get(["a", 2]) == get(["a", 2]) == "two"
    assert get(None) is None


@pytest.mark.parametrize("damage", ["digit", "cut", "empty", "other", "list"])
def test_a_damaged_or_foreign_value_is_computed_again(tmp_path, damage):
    path = tmp_path / "value.json"
    computed_once(path, "key", lambda: [1.25, 2.5])
    content = path.read_bytes()
    changed = {
        "digit": content.replace(b"1.25", b"1.75"),
        "cut": content[:-9],
        "empty": b"",
        "list": b"[1, 2]",
    }
    if damage == "other":
        computed_once(tmp_path / "other.json", "another key", lambda: [7])
        changed["other"] = (tmp_path / "other.json").read_bytes()
    path.write_bytes(changed[damage])
    assert computed_once(path, "key", lambda: [1.25, 2.5]) == [1.25, 2.5]
    assert path.read_bytes() == content


def test_others_wait_for_the_one_that_computes(tmp_path):
    began, go_on, found = threading.Event(), threading.Event(), []

    def compute():
        began.set()
        go_on.wait(10)
        return 5

    def ask(compute):
        found.append(computed_once(tmp_path / "value.json", "key", compute))

    threads = [threading.Thread(target=ask, args=(compute,))]
    threads[0].start()
    assert began.wait(10)
    threads += [threading.Thread(target=ask, args=(lambda: pytest.fail("computed twice"),)) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [5] * 4


def test_where_nothing_can_be_written_a_value_is_computed_each_time(tmp_path):
    (tmp_path / "file").touch()
    values = iter([1, 2])
    path = tmp_path / "file" / "value.json"  # no folder can be below a file
    assert [computed_once(path, "key", lambda: next(values)) for _ in range(2)] == [1, 2]


def test_what_stays_while_files_do(tmp_path, settled):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1"), two.write_text("2")
    before = unchanged_while([one, two])
    assert before == unchanged_while([one, two])
    one.read_text()
    assert before == unchanged_while([one, two])
    two.replace(tmp_path / "three"), two.write_text("3")
    assert before != unchanged_while([one, two])


def test_nothing_tells_that_a_file_stays_which_has_just_been_written(tmp_path):
    (tmp_path / "one").touch()
    assert unchanged_while([tmp_path / "one"]) is None


# The store


def test_arrays_are_mapped_and_their_checksum_is_taken_once(store, settled, monkeypatch):
    again = EpisodeStore.open(store.path)
    arrays = str(store.path / "arrays.safetensors")
    assert arrays in Path("/proc/self/maps").read_text()
    assert again.state.tobytes() == store.state.tobytes()
    monkeypatch.setattr("common.data.store.checksum", lambda path: pytest.fail("read again"))
    EpisodeStore.open(store.path)


def test_arrays_that_changed_since_are_refused(store, settled):
    EpisodeStore.open(store.path)  # records that the arrays are intact
    flip(store.path / "arrays.safetensors", at=-3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"arrays\.safetensors is not what was written"):
            EpisodeStore.open(store.path)


def test_rows_of_steps_follow_from_their_episodes(store):
    moved = replace(store, episode_rows=store.episode_rows[::-1].copy())
    expected = np.concatenate(
        [row + np.arange(n) for row, n in zip(moved.episode_rows, np.diff(store.episode_starts), strict=True)]
    )
    assert moved.places(np.arange(store.num_steps)).tolist() == expected.tolist()


def test_more_datasets_than_files_may_be_open_at_first(dataset, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        store = open_dataset(DataConfig((str(dataset),) * 40, cache_dir=tmp_path))
        assert (len(store.frames), store.num_episodes) == (40, 160)
        last = store.images(np.array([store.num_steps - 1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(last, store.images(np.array([store.num_steps // 40 - 1])))


def test_the_hashes_of_tables_are_kept_until_one_changes(tmp_path, settled, monkeypatch):
    config = DataConfig((str(make_dataset(tmp_path / "d", video=False)),), cache_dir=tmp_path / "cache")
    first = open_dataset(config)
    digests = []
    real = files.hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *args: digests.append(1) or real(*args))
    assert open_dataset(config).fingerprint == first.fingerprint
    assert not digests
    table = next((tmp_path / "d" / "meta").rglob("*.parquet"))
    table.write_bytes(table.read_bytes())
    assert open_dataset(config).fingerprint == first.fingerprint
    assert digests
    flip(next((tmp_path / "d" / "data").rglob("*.parquet")), at=200)
    assert config_fingerprint(config) != first.source_fingerprint


def config_fingerprint(config):
    from common.data import open_source

    return open_source(config.dataset[0], config).info().fingerprint


# Statistics


@pytest.mark.parametrize("dims", [1, 2, 3, 4, 7])
def test_statistics_of_a_few_dimensions_at_a_time_are_those_of_all_bit_for_bit(dims):
    rng = np.random.default_rng(dims)
    values = (rng.normal(size=(20_011, dims)) * 10.0 ** rng.uniform(-4, 3, dims)).astype(np.float32)
    exact = values.astype(np.float64)
    low, high = np.quantile(exact, [0.01, 0.99], axis=0)
    expected = exact.mean(0), exact.std(0), exact.min(0), exact.max(0), low, high
    found = fit_statistics(values)
    for name, value in zip(STATISTICS, expected, strict=True):
        assert found[name].numpy().tobytes() == value.astype(np.float32).tobytes()
    episodes = np.arange(len(values)) // 100
    motion, exact = Motion.of(values, episodes), without_extremes(values)
    steps = np.diff(exact, axis=0)[np.diff(episodes) == 0]
    noise = np.sqrt((steps**2).sum(0) / len(steps))
    expected = exact.std(0), noise, np.abs(exact.mean(0)), np.ones(dims, bool)
    assert [x.tobytes() for x in motion] == [x.tobytes() for x in expected]


OPTIONS = ("mean-std", True, 0.1, ("action_2",), False)


def samples(store, **changes):
    return ChunkDataset(store, **({"episodes": [0, 2], "horizon": 4, "action_offset": 1} | changes))


@pytest.fixture
def fits(monkeypatch):
    """Counts how often statistics are computed."""
    calls, fit = [], Normalizer.fit.__func__
    monkeypatch.setattr(
        Normalizer, "fit", classmethod(lambda *args, **rest: calls.append(1) or fit(*args, **rest))
    )
    return calls


def same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name])


@pytest.mark.parametrize("options", [("mean-std",), ("quantile", False, 0.5), OPTIONS])
def test_statistics_are_kept_bit_for_bit_and_say_the_same(store, fits, capsys, options):
    capsys.readouterr()
    fitted = Normalizer.fit(samples(store), *options)
    said = [capsys.readouterr().out]
    for _ in range(2):
        kept = Normalizer.fit_once(samples(store), *options)
        same(kept.tensors(), fitted.tensors())
        same(dict(kept.named_buffers()), dict(fitted.named_buffers()))
        said.append(capsys.readouterr().out)
    assert said == [said[0]] * 3
    assert len(fits) == 2  # once directly, and once for the cache


@pytest.mark.parametrize(
    "change",
    ["mode", "relative", "floor", "mask", "episodes", "offset", "horizon", "chosen", "names", "numbers"],
)
def test_whatever_changes_statistics_has_them_computed_again(store, fits, change):
    """Both stay cached: going back to the first computes nothing."""
    Normalizer.fit_once(samples(store), *OPTIONS)
    options = {
        "mode": ("min-max", *OPTIONS[1:]),
        "relative": ("mean-std", False, *OPTIONS[2:]),
        "floor": ("mean-std", True, 0.2, *OPTIONS[3:]),
        "mask": ("mean-std", True, 0.1, ("action_1",), False),
    }.get(change, OPTIONS)
    shape = {"episodes": {"episodes": [0, 1]}, "offset": {"action_offset": 0}, "horizon": {"horizon": 5}}
    changed = {
        "chosen": lambda: store.select([0, 1, 2]),
        "names": lambda: replace(store, state_names=store.action_names[::-1]),
        "numbers": lambda: replace(store, arrays_checksums=(1,)),
    }.get(change, lambda: store)()
    other = samples(changed, **shape.get(change, {}))
    kept = Normalizer.fit_once(other, *options)
    assert len(fits) == 2
    same(kept.tensors(), Normalizer.fit(other, *options).tensors())
    fits.clear()
    Normalizer.fit_once(samples(store), *OPTIONS)
    assert not fits


def test_the_horizon_of_absolute_actions_changes_no_statistics(store, fits):
    Normalizer.fit_once(samples(store), "mean-std")
    Normalizer.fit_once(samples(store, horizon=7), "mean-std")
    assert len(fits) == 1


def test_damaged_and_foreign_statistics_are_computed_again(store, fits):
    first = Normalizer.fit_once(samples(store), *OPTIONS).tensors()
    (file,) = store.path.glob("statistics-*.json")
    kept = json.loads(file.read_text())
    kept["value"][1]["state.mean"][0] += 1e-3
    file.write_text(json.dumps(kept))
    same(Normalizer.fit_once(samples(store), *OPTIONS).tensors(), first)
    other = Normalizer.fit_once(samples(store), "min-max")
    (foreign,) = set(store.path.glob("statistics-*.json")) - {file}
    file.write_bytes(foreign.read_bytes())
    same(Normalizer.fit_once(samples(store), *OPTIONS).tensors(), first)
    assert len(fits) == 4
    same(Normalizer.fit_once(samples(store), "min-max").tensors(), other.tensors())


def test_an_action_that_never_changes_is_refused_at_every_start(store):
    still = replace(store, action=np.ones_like(store.action), arrays_checksums=(2,))
    for _ in range(2):
        with pytest.raises(UserError, match="never changes"):
            Normalizer.fit_once(samples(still), "mean-std")
    assert not list(store.path.glob("statistics-*.json"))


def test_too_many_open_files_are_explained():
    said, code = explain(OSError(24, "Too many open files", "/data/frames.bin"))
    assert said == "Too many files are open (/data/frames.bin): allow more with `ulimit -n`."
    assert code == 1


# Threads

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(path.name for path in ROOT.glob("train_*.py")), "evaluate.py", "serve.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_how_threads_wait_before_they_import_torch(script):
    imports = [
        x for x in ast.parse((ROOT / script).read_text()).body if isinstance(x, ast.Import | ast.ImportFrom)
    ]
    first = next(x for x in imports if getattr(x, "module", None) != "__future__")
    assert ast.unparse(first) == "import common"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5"}),
    ],
)
def test_threads_spin_briefly_before_they_sleep_unless_a_user_says_otherwise(monkeypatch, before, after):
    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    runpy.run_path(str(ROOT / "common" / "__init__.py"))
    assert os.environ == after


def test_progress_bars_are_seldom_written_to_a_file():
    lines = "import common, time, tqdm; [time.sleep(0.02) for _ in tqdm.tqdm(range(50))]"
    shown = subprocess.run([sys.executable, "-c", lines], stderr=subprocess.PIPE, text=True, cwd=ROOT).stderr
    assert shown.count("\r") <= 3
    assert "50/50" in shown


STARTS = """
import sys
import {script} as script
from common.config import cli
cli(script.main, script.Config)
slow = {{"sympy", "torch._dynamo"}} & sys.modules.keys()
assert not slow, slow
"""


@pytest.mark.parametrize("script", ["train_naive_fm", "train_vfp"])  # with schedule-free and AdamW
def test_a_run_imports_nothing_of_pytorch_that_takes_seconds(script, tiny, tmp_path):
    command = [sys.executable, "-c", STARTS.format(script=script), *tiny, "--run-dir", tmp_path / "run"]
    command += ["--steps", "1"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
