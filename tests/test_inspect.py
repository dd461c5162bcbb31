import json
import os
import runpy
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from filelock import FileLock
from hdf5_factory import make_hdf5
from lerobot_factory import make_dataset
from PIL import Image
from safetensors.numpy import load_file, save

from common.config import parse
from common.data import DataConfig, ingest, inspect, open_dataset
from common.data.ingest import lock_file
from common.data.inspect import Inspect, Prune, Verify
from common.data.store import EpisodeStore
from common.data.workers import guarded_map
from common.errors import UserError

LENGTHS = (12, 9, 15, 11)
CAMERAS = ("high", "left")
HIGH = "observations/images/cam_high"


@pytest.fixture
def root(tmp_path):
    return make_hdf5(tmp_path / "d", LENGTHS, CAMERAS)


@pytest.fixture
def run(tmp_path):
    """Run a command from its parsed command line."""

    def run(name, *flags):
        function, options = {
            "inspect": (inspect.inspect, Inspect),
            "verify": (inspect.verify, Verify),
            "prune": (inspect.prune, Prune),
        }[name]
        argv = [*map(str, flags), "--cache-dir", str(tmp_path / "cache")]
        function(parse(options, argv, "store"))

    return run


def episode(root, number):
    return root / f"day_{number % 2}/episode_{number}.hdf5"


def test_a_dataset_with_every_flaw_is_described(tmp_path, root, run, capsys):
    with h5py.File(episode(root, 1), "a") as file:
        file[HIGH][:] = file[HIGH][0]  # a frozen camera
    with h5py.File(episode(root, 2), "a") as file:
        file["timestamps"] = np.arange(15) / 10 + np.where(np.arange(15) > 6, 0.35, 0)
    for number in range(4):
        with h5py.File(episode(root, number), "a") as file:
            file["action"][:, 1] = 0.25
            file["action"][:, 2] = np.where(np.arange(len(file["action"])) < 5, -1, file["action"][:, 2] / 99)
    run("inspect", root, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert f"{root}: 4 episodes, 47 steps, 0.1 minutes at 10 Hz" in out
    assert "lengths         9 to 15 steps, half of them 10 to 13, median 12" in out
    assert "camera high does not change in episodes 1" in out
    assert "camera left" not in out
    assert "episode 2: 0.45 s after step 6" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("joint_")}
    assert float(rows["joint_0"].split()[1]) == -46
    assert rows["joint_1"].endswith("constant")
    assert "rests at its low" in rows["joint_2"]
    assert "rests" not in rows["joint_0"]
    assert "shortest        episodes 1 (9), 3 (11), 0 (12), 2 (15)" in out
    for name in ("frames.png", "dimensions.png"):
        pixels = np.asarray(Image.open(tmp_path / "out" / name))
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].std() > 10


def test_a_sound_dataset_has_nothing_to_look_at(tmp_path, run, capsys):
    root = make_dataset(
        tmp_path / "d", (12, 9), [f"observation.images.cam_{c}" for c in CAMERAS], video=False
    )
    run("inspect", root, "--out", tmp_path / "out", "--store", "jpeg", "--image-size", "24")
    out = capsys.readouterr().out
    assert "look at" not in out
    assert "fold the towel" in out
    assert "at 24x24" in out
    assert "(jpeg" in out


def flip(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("storage", ["raw", "jpeg"])
def test_a_damaged_store_is_found_and_rebuilt(tmp_path, root, run, capsys, storage):
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", store=storage))
    flags = [root, "--store", storage]
    run("verify", *flags)
    assert "47 steps of 4 episodes equal" in capsys.readouterr().out
    before, pixels = store.frame_files[0].read_bytes(), store.images(np.arange(47))
    flip(
        store.frame_files[0],
        at=store.frames[0].spans(store.places(np.array([46])))[0, 1] - 100,
    )
    with pytest.raises(UserError, match=r"is damaged: episode 3 differs from its checksum.* --rebuild"):
        run("verify", *flags)
    run("verify", *flags, "--rebuild")
    assert "rebuilding: episode 3" in capsys.readouterr().out
    assert torch.equal(EpisodeStore.open(store.path).images(np.arange(47)), pixels)
    assert storage == "jpeg" or store.frame_files[0].read_bytes() == before
    flip(store.path / "arrays.safetensors")
    with pytest.raises(UserError, match=r"arrays.safetensors is not what was written"):
        open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", store=storage))
    run("verify", *flags, "--rebuild")
    for file in store.path.glob("frames.*"):
        content = file.read_bytes()
        file.write_bytes(content[:-5])
        with pytest.raises(UserError, match=rf"{file.name} has .* bytes instead of"):
            run("verify", *flags)
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} is missing"):
            run("verify", *flags)
        run("verify", *flags, "--rebuild")
        assert torch.equal(EpisodeStore.open(store.path).images(np.arange(47)), pixels)


@pytest.mark.parametrize("damage", ["one frame", "cut off"])
def test_only_the_damaged_part_is_decoded_again(tmp_path, root, run, monkeypatch, damage):
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    whole, decoded = store.images(np.arange(47)), []
    if damage == "one frame":
        flip(store.frame_files[0], at=13 * 2 * 3 * 32 * 48)  # in the second step of episode 1
    else:
        store.frame_files[0].write_bytes(store.frame_files[0].read_bytes()[:-1])
    damaged = {"one frame": 1, "cut off": 3}[damage]

    def watched(function, tasks, *options):
        decoded.extend(episode.index for episode, *_ in tasks)
        return guarded_map(function, tasks, *options)

    monkeypatch.setattr(ingest, "guarded_map", watched)
    run("verify", root, "--rebuild")
    assert decoded == [damaged]
    assert torch.equal(EpisodeStore.open(store.path).images(np.arange(47)), whole)


def test_a_store_whose_storage_was_chosen_by_itself_is_found(tmp_path, root, run, capsys):
    with pytest.raises(UserError, match="has no store yet"):
        run("verify", root, "--store", "auto")
    assert not list(tmp_path.glob("cache/stores/d-*"))
    open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", store="jpeg"))
    run("verify", root, "--store", "auto")
    assert "47 steps of 4 episodes equal" in capsys.readouterr().out


def test_a_store_that_differs_from_its_source(tmp_path, root, run):
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    flip(store.frame_files[0])
    arrays = load_file(store.path / "arrays.safetensors")
    arrays["episode_checksums"][3] = store.frames[0].checksum(36, 11)  # as if it had been written like that
    (store.path / "arrays.safetensors").write_bytes(save(arrays))
    meta = json.loads((store.path / "meta.json").read_text())
    meta["arrays_crc32"] = inspect.checksum(store.path / "arrays.safetensors")
    (store.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"differs from .* in episode 3, camera left at step 10"):
        run("verify", root)


def test_a_source_that_has_changed(tmp_path, root, run):
    open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    with h5py.File(episode(root, 0), "a") as file:
        file["action"][0, 0] = 5
    with pytest.raises(UserError, match="has no store yet"):
        run("verify", root)


def test_the_cache_is_listed_and_freed(tmp_path, root, run, capsys):
    whole = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    other = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache", image_size=(16,)))
    (other.path / "meta.json").unlink()
    run("prune")
    out = capsys.readouterr().out
    assert f"{whole.path.name}: raw, 2 cameras, from {root}" in out
    assert f"{other.path.name}: meta.json is missing" in out
    assert "2 stores" in out
    assert "delete with --all" in out
    run("prune", "--unfinished")
    assert not other.path.exists()
    assert whole.path.exists()
    run("prune", "--older-than", "1")
    assert whole.path.exists()
    for name in ("arrays.safetensors", "meta.json"):
        os.utime(whole.path / name, (1, 1))
    run("prune", "--older-than", "1")
    assert not whole.path.exists()
    again = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    run("prune", "--all")
    assert not again.path.exists()
    run("prune")
    assert "0 stores" in capsys.readouterr().out


def test_a_store_in_use_is_kept_where_the_disk_records_no_access(tmp_path, run):
    root = make_dataset(tmp_path / "d", (12, 9), ["observation.images.top"], video=False)
    config = DataConfig((str(root),), cache_dir=tmp_path / "cache", ingest_workers=1)
    path = open_dataset(config).path
    for file in path.iterdir():
        os.utime(file, (1, 1))
    open_dataset(config)
    os.utime(path / "arrays.safetensors", (1, 1))  # as if it had not been read
    run("prune", "--older-than", "1")
    assert path.exists()


def test_a_store_that_is_being_built_is_not_deleted(tmp_path, root, run):
    store = open_dataset(DataConfig((str(root),), cache_dir=tmp_path / "cache"))
    with FileLock(lock_file(store.path)), pytest.raises(UserError, match="is being built by another process"):
        run("prune", "--all")
    assert store.path.exists()


def test_the_commands_run_as_they_are_documented(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "common.data.store", "prune"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "0 stores, 0.00 GB" in done.stdout
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    "typed", ["common.data.inspect", "common.data.store inspect", "common.data.store prune", "common.envs"]
)
def test_help_names_the_program_as_it_was_typed(typed, monkeypatch, capsys):
    module, *command = typed.split()
    monkeypatch.setattr(sys, "argv", [module, *command, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith(f"usage: python -m {typed} [-h]")
