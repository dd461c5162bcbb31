"""Episodic HDF5: a folder of files, one or several episodes in each, or one such file.

Recognised layouts (others by `--state-keys`, `--action-keys`, `--camera-keys`):

    ALOHA, ACT      /observations/qpos, /observations/images/<camera>, /action
    grouped         /observation/joint_pos/left, ..., /action/joint_pos/left, ...: what both groups have,
                    joints before hands before the rest, left before right
    robomimic       /data/demo_0/obs/..., /data/demo_0/actions; likewise episode_0, traj_0, ...

What was found in a file is remembered by its size and time, with a hash of its content: on a later start
nothing is read. `common/data/hdf5_files.py` does the reading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from common.data.frames import as_rgb
from common.data.hdf5_files import SCAN, natural, read_frames, read_numbers, scan_file
from common.data.layout import Array, Known, Layout, choose_layout, listing, numbered
from common.data.source import BadEpisode, Episode, Info, existing, reason, refuse_unusable
from common.data.workers import Died, cores, guarded_map
from common.errors import UserError
from common.files import write_whole, writing_below

if TYPE_CHECKING:
    from common.data import DataConfig

SUFFIXES = (".hdf5", ".h5")
TIMES = ("timestamp", "timestamps", "observations/timestamp", "observation/timestamp", "obs/timestamp")
GROUPS = ("observations/", "observation/", "obs/", "actions/", "action/")
QUANTITIES = ("joint_pos", "hand_joint_pos", "gripper_pos", "gripper")
STATES = (  # of the robomimic family, under obs/; the first that is there
    ("robot{}_eef_pos", "robot{}_eef_quat", "robot{}_gripper_qpos"),
    ("ee_states", "gripper_states"),
    ("agent/qpos",),
)
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ALOHA_JOINTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ARM)


class Place(NamedTuple):
    """Where an episode is: file below the root, its hash, group in it, and its arrays, or a problem."""

    file: str
    sha256: str | None
    group: str
    arrays: dict[str, Array]
    problem: str | None

    def named(self, index: int) -> str:
        """What messages call the episode."""
        return f"Episode {index} ({self.file}{', ' + self.group.strip('/') if self.group else ''})"

    def times(self) -> str | None:
        """The key of the recorded times, if there are any."""
        found = [(key, self.arrays[key]) for key in TIMES if key in self.arrays]
        return next((key for key, a in found if a.kind == "numbers" and len(a.shape) == 1), None)


@dataclass(frozen=True)
class Hdf5Source:
    """A folder of demonstrations, searched recursively, or a file of them (see `Source`)."""

    path: Path
    name: str
    config: DataConfig

    isolated: ClassVar[bool] = True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("scans", "places")}

    @property
    def root(self) -> Path:
        """The folder that everything must lie in."""
        return self.path.resolve() if self.path.is_dir() else self.path.resolve().parent

    @property
    def _workers(self) -> int:
        return self.config.ingest_workers or cores()

    @cached_property
    def scans(self) -> dict[str, dict[str, Any]]:
        """What each file holds (see `scan_file`), by its path below the root."""
        place = hashlib.sha256(str(self.root).encode()).hexdigest()[:20]
        memory = self.config.cache_dir / "scans" / f"{place}.json"
        return scan_all(self.root, find_files(self.path, self.name), memory, self._workers)

    @cached_property
    def places(self) -> dict[int, Place]:
        return number_episodes(self.scans)

    @cached_property
    def layout(self) -> Layout:
        """What the first sound episode shows that the others shall be."""
        first = next((place for place in self.places.values() if place.problem is None), None)
        if first is None:
            problem = next((place.problem for place in self.places.values()), "its files hold no episode")
            raise UserError(f"{self.name} has no usable episode: {problem}.")
        known = recognise(first.arrays)
        names_of = aloha_names if known and known.name == "ALOHA" else short_names
        return choose_layout(first.arrays, known, self.config, self.name, first.file, names_of)

    @cached_property
    def fps(self) -> float:
        rates = {scan["fps"]: name for name, scan in self.scans.items() if scan["fps"]}
        if self.config.fps is not None:
            return self.config.fps
        if not rates:
            raise UserError(f"{self.name} does not say how many control steps a second it has: give --fps.")
        if len(rates) > 1:
            found = ", ".join(f"{rate:g} Hz in {name}" for rate, name in list(rates.items())[:3])
            raise UserError(
                f"{self.name} has different control rates ({found}): separate them, or give --fps."
            )
        return next(iter(rates))

    def info(self) -> Info:
        layout, fps = self.layout, self.fps
        found = f"{len(self.scans)} files, {len(self.places)} episodes, {fps:g} Hz"
        layout.say(f"{self.name}: HDF5, {layout.name} layout, {found}")
        content = json.dumps([[file, scan["sha256"]] for file, scan in self.scans.items()])
        return layout.info(self.name, hashlib.sha256(content.encode()).hexdigest(), fps)

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        faults = {index: self._fault(index) for index in existing(wanted, self.places, self.name)}
        tasks, episodes = [], []
        for index in [index for index, fault in faults.items() if fault is None]:
            place = self.places[index]
            tasks.append((index, self.root / place.file, place.group, place.times(), self.layout))
        for (index, *_), found in guarded_map(read_numbers, tasks, self._workers):
            try:
                episodes.append(self._episode(index, found))
            except BadEpisode as error:
                faults[index] = str(error)
        return sorted(episodes, key=lambda e: e.index), [fault for fault in faults.values() if fault]

    def frames(self, episode: Episode, camera: int) -> Iterator[np.ndarray]:
        (file, _, group), (key, _, recorded), count = episode.origin, self.layout.cameras[camera], 0
        try:
            for frame in read_frames(self.root / file, group + key, len(episode), recorded, self.layout.size):
                yield as_rgb(frame, self.layout.color_order)
                count += 1
        except Exception as error:  # of a damaged file, h5py raises a dozen classes
            raise BadEpisode(
                f"Episode {episode.index} ({file}) cannot be decoded: {key}, step {count} ({reason(error)})"
            ) from None

    def _fault(self, index: int) -> str | None:
        """What the scan already shows to be wrong with an episode."""
        place = self.places[index]
        name, found = place.named(index), place.arrays
        if place.problem:
            return f"{name} is unusable: {place.problem}"
        first, steps = self.layout.keys["state"][0], None
        for key, wanted in self.layout.arrays.items():
            if key not in found:
                return f"{name} has no {key}, it has {listing(found)}"
            array, what = found[key], "images" if wanted.is_image else "numbers"
            if array.is_image != wanted.is_image or array.kind == "other" or not array.shape:
                return f"{name} holds {array.dtype} instead of {what} in {key}"
            steps = array.shape[0] if steps is None else steps
            if array.shape[0] != steps:
                return f"{name} has {steps} steps in {first} and {array.shape[0]} in {key}"
            if not wanted.is_image and array.width != wanted.width:
                return f"{name} has {array.width} numbers a step in {key} instead of {wanted.width}"
            if array.size != wanted.size:
                sizes = "{}x{} instead of {}x{}".format(*array.size, *wanted.size)
                return f"{name} has images of another size in {key}, {sizes}"
        return None

    def _episode(self, index: int, found: Any) -> Episode:
        """An episode of what `read_numbers` found; raises BadEpisode."""
        place = self.places[index]
        name, fps = place.named(index), self.fps
        if isinstance(found, Died | str):
            raise BadEpisode(f"{name}: {found}")
        state, action, recorded = found
        times = np.arange(len(state)) / fps
        if recorded is not None and len(recorded) == len(times) > 1 and np.isfinite(recorded).all():
            recorded = recorded.astype(np.float64) - float(recorded[0])
            step = np.median(np.diff(recorded))
            if (np.diff(recorded) > 0).all() and 0.5 < step * fps < 2:  # seconds, then
                times = recorded
        episode = Episode(index, state, action, times, [place.file, place.sha256, place.group])
        refuse_unusable(name, episode, self.layout.names)
        return episode


def find_files(path: Path, source: str) -> list[Path]:
    """The HDF5 files in a folder, in natural order."""
    root = path.resolve()
    if root.is_file():
        return [root]

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.")

    folders = root.walk(on_error=refuse)  # links to folders are not followed
    files = [folder / name for folder, _, names in folders for name in names if name.endswith(SUFFIXES)]
    if not files:
        raise UserError(
            f"{source} holds no demonstrations: it has no meta/info.json, as a LeRobot dataset has, and no "
            f"*.hdf5 or *.h5 file."
        )
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise UserError(
                f"{file} leads out of {source}: a dataset must not read other files, put a copy in its place."
            )
    return sorted(files, key=lambda file: natural(file.relative_to(root).as_posix()))


def scan_all(root: Path, files: Sequence[Path], memory: Path, workers: int) -> dict[str, dict[str, Any]]:
    """What each file holds, by its path below the root; remembered in the file `memory` between starts."""
    from tqdm import tqdm

    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        known = {}
    stamps, missing = {}, []
    for file in files:
        name, status = file.relative_to(root).as_posix(), file.stat()
        stamps[name] = [SCAN, status.st_size, status.st_mtime_ns]
        if known.get(name, {}).get("stamp") != stamps[name]:
            missing.append((str(file), name))
    if missing:
        results = guarded_map(scan_file, missing, workers, lambda task: stamps[task[1]][1] / 1e6)
        total = sum(stamps[name][1] for _, name in missing)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"scan {root.name}") as bar:
            for (_, name), scan in results:
                if isinstance(scan, Died):
                    scan = {"sha256": None, "problem": str(scan), "fps": None, "episodes": []}
                # Where there is no hash, the fault may have been the machine's: the next start tries again.
                known[name] = {"stamp": stamps[name] if scan["sha256"] else None, **scan}
                bar.update(stamps[name][1])
        known = {name: known[name] for name in stamps}
        with writing_below(memory.parent):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memory, json.dumps(known).encode())
    return {name: known[name] for name in stamps}


def number_episodes(scans: dict[str, dict[str, Any]]) -> dict[int, Place]:
    """Episodes in order; a file that is one episode and ends in a number of its own gives it that number."""
    places = []
    for file, scan in scans.items():
        if scan["problem"]:
            places.append(Place(file, None, "", {}, scan["problem"]))
        for group, found in scan["episodes"]:
            arrays = {
                key: Array(kind, tuple(shape), dtype, tuple(size))
                for key, (kind, shape, dtype, size) in found.items()
            }
            places.append(Place(file, scan["sha256"], group, arrays, None))
    ends = [re.search(r"(\d{1,9})$", Path(place.file).stem) for place in places]
    numbers = [int(end[1]) for end in ends if end]
    if len(scans) == len(places) == len(set(numbers)):
        return dict(sorted(zip(numbers, places, strict=True)))
    return dict(enumerate(places))


def recognise(arrays: dict[str, Array]) -> Known | None:
    """The layout of an episode with these arrays; None if it is none of those known."""
    numbers = [key for key, array in arrays.items() if array.kind == "numbers"]
    if {"observations/qpos", "action"} <= set(numbers):
        return Known("ALOHA", ("observations/qpos",), ("action",))
    if "actions" in numbers:
        for names in STATES:
            robots = range(10) if "{}" in names[0] else (0,)
            keys = [f"obs/{name.format(robot)}" for robot in robots for name in names]
            keys = tuple(key for key in keys if key in numbers)
            if keys:
                return Known("robomimic", keys, ("actions",))
    shared = [key.partition("/")[2] for key in numbers if key.startswith("action/")]
    shared = sorted((key for key in shared if f"observation/{key}" in numbers), key=_grouped_order)
    if shared:
        state, action = (tuple(f"{group}/{key}" for key in shared) for group in ("observation", "action"))
        return Known("grouped", state, action)
    return None


def _grouped_order(key: str) -> tuple:
    quantity, _, part = key.partition("/")
    rank = QUANTITIES.index(quantity) if quantity in QUANTITIES else len(QUANTITIES)
    side = {"left": 0, "right": 1}.get(part, 2)
    return rank, quantity, side, natural(part)


def short_names(key: str, width: int) -> Sequence[str]:
    """Names of an array's dimensions; the same for state and action where they are the same thing."""
    group = next((group for group in GROUPS if key.startswith(group)), "")
    return numbered(key.removeprefix(group), width)


def aloha_names(key: str, width: int) -> Sequence[str]:
    if key not in ("observations/qpos", "action"):
        return short_names(key, width)
    return ALOHA_JOINTS if width == len(ALOHA_JOINTS) else [f"joint_{i}" for i in range(width)]


def holds_hdf5(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.suffix in SUFFIXES)
