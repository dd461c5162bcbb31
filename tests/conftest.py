import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from lerobot_factory import make_dataset

from common.data.workers import kept_pool

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Skip slow parts that most tests do not check: git, waiting for the disk, curves.

    `@pytest.mark.real("git", "fsync", "drawing")` keeps the parts that it names.
    """
    real = {what for mark in request.node.iter_markers("real") for what in mark.args}
    if "git" not in real:
        monkeypatch.setattr("common.run._git", lambda: ({}, ""))
    if "fsync" not in real:
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
    if "drawing" not in real:
        monkeypatch.setattr("common.tracking.draw_curves", lambda path, picture: None)


@pytest.fixture(autouse=True)
def ordinary_priority():
    """The AV1 encoder makes root's thread real-time, and what that starts: other tests would starve."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session", autouse=True)
def reading_processes():
    """All tests share the processes that read HDF5, because they take seconds to start."""
    with kept_pool():
        yield


@pytest.fixture
def accelerate_reset():
    """Accelerate keeps its settings for the life of a process; a test that trains needs fresh ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A LeRobot dataset of three cameras and four short episodes."""
    cameras = [f"observation.images.cam_{name}" for name in ("head", "left", "right")]
    sizes = dict.fromkeys(cameras, (32, 32))
    root = tmp_path_factory.mktemp("data") / "towel"
    return make_dataset(root, (12, 9, 15, 11), sizes, video=False, dims=(3, 3), names=None)


@pytest.fixture
def tiny_depth(monkeypatch):
    """A small network in place of Depth Anything 3 SMALL."""
    from common import depth

    architecture = depth.Architecture("da3-small", 32, 4, 2, 2)
    monkeypatch.setitem(depth.ARCHITECTURES, "small", architecture)
    return architecture


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(dataset, cache_dir):
    """Flags for a run that takes a second."""
    flags = {
        "--dataset": dataset,
        "--cache-dir": cache_dir,
        "--horizon": 4,
        "--d-model": 16,
        "--num-heads": 2,
        "--encoder-layers": 1,
        "--decoder-layers": 1,
        "--flow-samples": 2,
        "--batch-size": 4,
        "--ingest-workers": 1,
        "--val-fraction": 0.25,
        "--sample-steps": 2,
        "--log-every": 1,
        "--hang-timeout": 0,
    }
    return [str(part) for pair in flags.items() for part in pair]
