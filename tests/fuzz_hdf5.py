"""Fuzz the reader with HDF5 files as people might arrange them: it reads what was written, or refuses.

Every example draws an arrangement (layout, cameras and their names and types, other vectors, copies of the
next step, one more observation, extra and damaged files) and writes it, so it knows the right result.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import numpy as np
from hdf5_factory import encode
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from common.data import DataConfig, open_dataset, workers
from common.errors import UserError

SIZE = (8, 12)
CAMERAS = ("cam_high", "high", "high_rgb", "High", "left", "a.b", "a_b", "b/c", "b_c", "front/rgb")
HIDDEN = ("goal", "front_depth", "next_high", "seg")  # no cameras by their names
KINDS = ("array", "channels first", "float32", "uint16", "PNG", "RGBA")
NOT_COLOUR = ("grey", "depth", "unit", "flat", "grey PNG", "16-bit PNG")
VECTORS = ("qvel", "effort", "gripper", "base_velocity", "action_eef", "wide")
FOREIGN = ("stats.h5", "calibration_1.h5", "episode_1 copy.hdf5", "._episode_1.hdf5", ".old/episode_1.hdf5")


def names(pool, largest):
    return st.lists(st.sampled_from(pool), max_size=largest, unique=True)


camera = st.tuples(st.sampled_from(CAMERAS), st.sampled_from(KINDS))
arrangement = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["aloha", "grouped", "robomimic", "maniskill"]),
        "episodes": st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True),
        "cameras": st.lists(camera, min_size=1, max_size=3, unique_by=lambda drawn: drawn[0]),
        "hidden": names(HIDDEN, 2),
        "no colour": st.lists(st.sampled_from(NOT_COLOUR), max_size=2, unique=True),
        "vectors": names(VECTORS, 3),
        "base": st.booleans(),
        "next": st.booleans(),
        "more": st.sampled_from([0, 0, 1, 1, 2]),  # observations after the last action
        "foreign": names(FOREIGN, 2),
        "broken": st.booleans(),
        "files": st.integers(1, 2),
    }
)


def picture(step: int, camera: int) -> np.ndarray:
    return np.random.default_rng((step, camera)).integers(2, 255, (*SIZE, 3), np.uint8)


def stored(pictures: np.ndarray, kind: str) -> np.ndarray:
    """Images (L, H, W, 3) as one of `KINDS` or `NOT_COLOUR`."""
    grey = pictures[..., :1]
    if "PNG" in kind:
        deep = kind.startswith("16") * 1
        cells = [(grey[..., 0] if kind != "PNG" else pictures)[i] for i in range(len(pictures))]
        files = [encode(cell.astype(np.uint16) * 200 if deep else cell) for cell in cells]
        width = max(64, *map(len, files))
        return np.stack([np.frombuffer(file.ljust(width, b"\0"), np.uint8) for file in files])
    return (
        {
            "array": pictures,
            "channels first": pictures.transpose(0, 3, 1, 2),
            "RGBA": np.concatenate([pictures, grey], -1),
            "grey": grey,
            "depth": grey.astype(np.uint16) * 20,
            "unit": pictures / np.float32(255),
            "flat": grey[..., 0],
        }.get(kind)
        if kind not in ("float32", "uint16")
        else pictures.astype(kind)
    )


class Written:
    """The content of an arrangement's files, and what the reader should find."""

    def __init__(self, case: dict, root: Path):
        self.case, self.root, self.layout = case, root, case["layout"]
        self.many = self.layout in ("robomimic", "maniskill")
        self.prefix = "observation/images/" if self.layout == "grouped" else "obs/"
        self.prefix = "observations/images/" if self.layout == "aloha" else self.prefix
        self.cameras = {self.prefix + name: kind for name, kind in case["cameras"]}
        self.odd = {f"{self.prefix}odd_{i}": kind for i, kind in enumerate(case["no colour"])}
        self.episodes: dict[tuple[int, int], dict[str, np.ndarray]] = {}  # by file and number
        for file in range(case["files"]):
            for place, number in enumerate(case["episodes"]):
                self.episodes[file, number] = self.write(file, number, 3 + place)
        for name in case["foreign"]:
            path = root / name
            path.parent.mkdir(exist_ok=True)
            with h5py.File(path, "w") as foreign:
                foreign["matrix"] = np.eye(4)
        if case["broken"]:
            (root / "broken_7.hdf5").write_bytes(b"\x89HDF, but not for long")

    def write(self, file: int, number: int, steps: int) -> dict[str, np.ndarray]:
        """Write an episode; record its state, action and images by camera key."""
        more = self.case["more"] if self.many else 0
        rng = np.random.default_rng((file, number))
        state, action = rng.random((2, steps + more, 5)).astype(np.float32)
        action, base = action[:steps], rng.random((steps, 2)).astype(np.float32)
        name = f"set_{'ab'[file]}.hdf5" if self.many else f"{'ab'[file]}/episode_{number}.hdf5"
        (self.root / name).parent.mkdir(exist_ok=True, parents=True)
        right = {"state": state[:steps], "action": action}
        with h5py.File(self.root / name, "a") as opened:
            opened.attrs["fps"] = np.bytes_(b"10")
            group = opened
            if self.many:
                place = "data/demo_{}" if self.layout == "robomimic" else "traj_{}"
                group = opened.create_group(place.format(number))
                opened.require_group("mask")
                if "train" not in opened["mask"]:
                    opened["mask/train"] = np.array([b"demo_0"])
            if self.layout == "grouped":
                for part, values in (("observation", state), ("action", action)):
                    group[f"{part}/joint_pos/left"] = values[:, :4]
                    group[f"{part}/gripper/left"] = values[:, 4:]
            else:
                keys = {"aloha": ("observations/qpos", "action"), "robomimic": ("obs/ee_states", "actions")}
                first, second = keys.get(self.layout, ("obs/agent/qpos", "actions"))
                group[first], group[second] = state, action
            if self.case["base"] and not self.many:
                group["base_action" if self.layout == "aloha" else "action/base_velocity"] = base
                right["action"] = np.concatenate([action, base], 1)
            for number_, (key, kind) in enumerate([*self.cameras.items(), *self.odd.items()]):
                shown = np.stack([picture(1000 * number + step, number_) for step in range(steps + more)])
                group[key] = stored(shown, kind)
                right[key] = shown[:steps]
            for key in self.case["hidden"]:
                group[f"{self.prefix}{key}"] = shown_later(steps + more)
            if self.case["next"]:
                for key in self.cameras:
                    group[f"next_obs/{key}"] = shown_later(steps + more)
            for key in self.case["vectors"]:
                group[key] = rng.random((steps, 8, 2) if key == "wide" else (steps, 2))
        return right

    @property
    def readable(self) -> bool:
        """Whether the episodes themselves can be read."""
        extra = self.case["more"] if self.many else 0
        return bool(self.cameras) and extra <= (self.layout == "maniskill")


def shown_later(steps: int) -> np.ndarray:
    return np.stack([picture(step + 1, 99) for step in range(steps)])


def check(written: Written, store, said: str) -> None:
    """Check that the store holds what was written, numbers and names too, and that the rest was named."""
    case = written.case
    assert written.readable, "what cannot be right was accepted"
    assert len(store.episode_indices) == len(written.episodes)
    numbers = sorted(number for _, number in written.episodes)
    if case["files"] == 1:
        assert store.episode_indices.tolist() == numbers
    found = set(store.camera_keys)
    assert found == set(written.cameras), found
    assert len({name.casefold() for name in store.cameras}) == len(found)
    unread = dict(enumerate(store.episode_indices.tolist()))
    edges = [*store.episode_starts.tolist(), store.num_steps]
    edges = edges if len(edges) == len(unread) + 1 else edges[:-1]
    images = store.images(np.arange(store.num_steps)).numpy()
    for place, index in unread.items():
        steps = slice(edges[place], edges[place + 1])
        matches = [key for key, right in written.episodes.items() if same(store.state[steps], right["state"])]
        assert len(matches) == 1, (index, matches)
        right = written.episodes[matches[0]]
        assert index == matches[0][1] or (case["files"] == 2 and index % 10_000 == matches[0][1])
        assert same(store.action[steps], right["action"])
        for camera, key in enumerate(store.camera_keys):
            assert same(images[steps, camera], right[key].transpose(0, 3, 1, 2)), key
    keys = json.loads((store.path / "meta.json").read_text())["choices"]["choices"]["keys"]
    used = {*keys["state"], *keys["action"], *store.camera_keys}
    left = " ".join(re.findall(r"^  not used +(.*)$", said, re.MULTILINE))
    for key in [*written.odd, *case["vectors"], *(written.prefix + key for key in case["hidden"])]:
        assert key not in used, key
        assert key in left, (key, left)
    assert not case["next"] or "next_obs/*" in left


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool((one == other).all())


class FuzzLayouts:
    """Writes arrangements, opens them, and counts the outcomes."""

    def __init__(self, folder: Path):
        self.folder, self.outcomes = folder, Counter()

    def __call__(self, case: dict) -> None:
        work = self.folder / "layouts"
        shutil.rmtree(work, ignore_errors=True)
        (work / "d").mkdir(parents=True)
        written, said = Written(case, work / "d"), io.StringIO()
        skip = case["broken"] or bool(case["foreign"])
        options = {"cache_dir": work / "cache", "ingest_workers": 1, "skip_bad_episodes": skip}
        refusal = None
        try:
            with redirect_stdout(said), redirect_stderr(io.StringIO()):
                store = open_dataset(DataConfig((str(work / "d"),), **options))
        except UserError as error:
            refusal = str(error)
        if refusal is not None:
            assert "\n" not in refusal, refusal
            assert not written.readable, f"refused: {refusal}"
            self.outcomes[f"{case['layout']}: refused"] += 1
            return
        check(written, store, said.getvalue())
        self.outcomes[f"{case['layout']}: accepted"] += 1


def fuzz_layouts(folder: Path, seconds: float, first_seed: int = 0, examples: int = 200) -> FuzzLayouts:
    """Fuzz for this long, or for this many examples; if one raises, print it and raise."""
    target, end, begun = FuzzLayouts(folder), time.monotonic() + seconds, 0
    with workers.kept_pool():
        while begun < examples and time.monotonic() < end:  # hypothesis cannot end a run by the clock
            count = min(20, examples - begun)

            @seed(first_seed + begun)
            @settings(
                max_examples=count,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(arrangement)
            def run(case):
                target(case)

            run()
            begun += count
    return target
