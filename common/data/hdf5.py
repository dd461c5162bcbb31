"""Episodic HDF5: a folder of files, one or several episodes in each, or one such file.

What a scan finds in a file is remembered by the file's size and time, with a hash of its content, so a later
start reads nothing. `common/data/hdf5_files.py` does the reading,
`hdf5_layouts.py` knows the layouts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from common.console import is_quiet, say
from common.data.frames import as_rgb
from common.data.hdf5_files import (
    SCAN,
    TASK_ATTRIBUTES,
    explained,
    natural,
    no_scan,
    read_frames,
    read_numbers,
    scan_file,
    stated_task,
)
from common.data.hdf5_layouts import aloha_names, recognise, short_names
from common.data.layout import Array, Layout, choose_layout, listing
from common.data.numbering import Name, explain, number_names, read_name
from common.data.source import BadEpisode, Episode, Info, existing, refuse_unusable, step_times
from common.data.tasks import listed, wanted_tasks
from common.data.workers import Died, cores, guarded_map
from common.errors import UserError
from common.files import walk, write_whole, writing_below

if TYPE_CHECKING:
    from common.data import DataConfig

SUFFIXES = (".hdf5", ".h5")
SAID = 100  # most lines that say which number is which episode
TIMES = ("timestamp", "timestamps", "observations/timestamp", "observation/timestamp", "obs/timestamp")


class Place(NamedTuple):
    """Where an episode is: file below the root, its hash, group in it, its arrays or a problem, its task and
    the name of what states it.
    """

    name: Name
    file: str
    sha256: str | None
    group: str
    arrays: dict[str, Array]
    problem: str | None
    task: str | None = None
    task_by: str | None = None

    def named(self, index: int) -> str:
        """The episode's name in messages."""
        return f"Episode {index} ({self.file}{', ' + self.group.strip('/') if self.group else ''})"

    def steps(self, key: str) -> int:
        """Number of rows of an array that are steps.

        ManiSkill's trajectories, traj_<number>, end with an observation that no action follows.
        """
        rows, actions = self.arrays[key].shape[0], self.arrays.get("actions")
        if not re.match(r"(.*/)?traj_\d+/$", self.group) or actions is None or not actions.shape:
            return rows
        return rows - (rows == actions.shape[0] + 1)

    def suits(self, keys: set[str]) -> tuple[bool, bool, bool]:
        """How well an episode represents the others if these keys are used."""
        images = any(array.is_image for array in self.arrays.values())
        return keys <= self.arrays.keys(), recognise(self.arrays) is not None, images

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
        """The folder of all files and links."""
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
        """The episodes by number; only those of the chosen task, if any."""
        found = find_episodes(self.scans, self.config.task_key)
        numbers = number_names([place.name for place in found])
        places = dict(sorted(zip(numbers, found, strict=True), key=lambda item: item[0]))
        if self.config.task_key and not any(place.task for place in found):
            texts = dict.fromkeys(
                name for scan in self.scans.values() for at in scan["texts"].values() for name in at
            )
            raise UserError(
                f"--task-key {self.config.task_key}: {self.name} has no such text, only "
                f"{', '.join(text.strip('/') for text in texts) or 'none'}."
            )
        wanted = wanted_tasks(tasks_of(places.values()), self.config, self.name)
        silent = all(place.task is None for place in found)  # it goes by its name, if it is one of several
        every = not self.config.task or silent
        # What cannot be read may be of any task: it is reported, as without --task.
        return {number: p for number, p in places.items() if every or p.problem or p.task in wanted}

    @cached_property
    def layout(self) -> Layout:
        """The episode that defines what the others must look like: sound, with a known layout and cameras."""
        sound = [place for place in self.places.values() if place.problem is None]
        if not sound:
            problem = next((place.problem for place in self.places.values()), "its files hold no episode")
            raise UserError(f"{self.name} has no usable episode: {problem}.")
        options = (*self.config.state_keys, *self.config.action_keys, *self.config.camera_keys)
        keys = {key.strip("/") for key in options}
        first = next((place for place in sound if all(place.suits(keys))), None)
        first = first or max(sound, key=lambda place: place.suits(keys))
        known = recognise(first.arrays)
        names_of = aloha_names if known and known.name == "ALOHA" else short_names
        layout = choose_layout(first.arrays, known, self.config, self.name, first.file, names_of)
        return replace(layout, unused=(*layout.unused, *self._left_out(first)))

    @cached_property
    def fps(self) -> float:
        rates = {scan["fps"]: name for name, scan in self.scans.items() if scan["fps"]}
        if self.config.fps is not None:
            return self.config.fps
        if not rates:
            raise UserError(f"{self.name} does not state its control rate: give --fps.")
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
        lines = list(explain([place.name for place in self.places.values()], list(self.places)))
        for line in lines[:SAID] + [f"... and {len(lines) - SAID} more"] * (len(lines) > SAID):
            say(f"  {line}")
        self._say_doubts()
        if layout.name == "LIBERO" and not self.config.action_offset:
            say("  LIBERO's recorder stores what is seen after an action with it: if so, --action-offset 1")
        content = json.dumps([[file, scan["sha256"]] for file, scan in self.scans.items()])
        wanted = self.config.task
        chosen: dict[str, Any] = {"task": wanted[0] if len(wanted) == 1 else list(wanted)} if wanted else {}
        by = {place.task_by for place in self.places.values()} - {None, *TASK_ATTRIBUTES}
        if by:  # there may be stores without these instructions
            chosen["task_by"] = sorted(by)
        key = (self.config.task_key or "").strip("/")
        if key:
            chosen["task_key"] = key
        return layout.info(self.name, hashlib.sha256(content.encode()).hexdigest(), fps, **chosen)

    def _say_doubts(self) -> None:
        """Print the choices that the dataset leaves open and no option makes."""
        tasks = tasks_of(self.places.values())
        if len(tasks) > 1 and not self.config.task:
            say(f"  {len(tasks)} tasks ({listed(tasks)}); choose some with --task")
        stated = {scan["fps"] for scan in self.scans.values()} - {None, self.fps}
        if stated:
            rates = ", ".join(f"{rate:g}" for rate in sorted(stated))
            say(f"  --fps {self.fps:g} overrides {rates} Hz in the files")
        encoded = any(array.kind == "encoded" for array in self.layout.arrays.values())
        if encoded and self.config.color_order == "rgb":
            say("  images are read as RGB: if inspect shows red and blue swapped, give --color-order bgr")

    def _left_out(self, first: Place) -> Iterator[str]:
        """Lines about unused data other than the arrays of the first sound episode."""
        if any(first.steps(key) < array.shape[0] for key, array in first.arrays.items() if array.shape):
            yield "the observation after the last action of each episode"
        more = {key for place in self.places.values() for key in place.arrays} - first.arrays.keys()
        if more:
            yield f"{', '.join(sorted(more))}: only some episodes have it"
        masks, others = Counter(), {}
        for scan in self.scans.values():
            for key, array in as_arrays(scan["beside"]).items():
                if key.startswith("mask/") and array.shape:
                    masks[key] += array.shape[0]
                else:
                    others[f"{key} (a soft link)" if array.dtype == "link" else key] = None
        if masks:
            lists = ", ".join(f"{key} ({count})" for key, count in masks.items())
            yield f"{lists}: lists of episodes; --episodes chooses, --val-fraction holds out"
        if others:
            yield f"{', '.join(others)}: outside the episodes"

    def episodes(self, wanted: Sequence[int] | None = None) -> tuple[list[Episode], list[str]]:
        faults = {index: self._fault(index) for index in existing(wanted, self.places, self.name)}
        tasks, episodes = [], []
        for index in [index for index, fault in faults.items() if fault is None]:
            place = self.places[index]
            steps = place.steps(self.layout.keys["state"][0])
            task = (index, self.root / place.file, place.group, steps, place.times(), self.layout)
            tasks.append(task)
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
        except Exception as error:  # for a damaged file, h5py raises a dozen classes
            where = f"{key}, step {count} ({explained(error)})"
            raise BadEpisode(f"Episode {episode.index} ({file}) cannot be decoded: {where}") from None

    def _fault(self, index: int) -> str | None:
        """What is wrong with an episode according to the scan."""
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
            steps = place.steps(key) if steps is None else steps
            if place.steps(key) != steps:
                return f"{name} has {steps} steps in {first} and {array.shape[0]} in {key}"
            if not wanted.is_image and array.width != wanted.width:
                return f"{name} has {array.width} numbers a step in {key} instead of {wanted.width}"
            if array.is_image and (array.channels == 1) != (wanted.channels == 1):
                return f"{name} has {array.dtype} images of {array.channels} colours in {key}"
            if array.size != wanted.size:
                sizes = "{}x{} instead of {}x{}".format(*array.size, *wanted.size)
                return f"{name} has images of another size in {key}, {sizes}"
        return None

    def _episode(self, index: int, found: Any) -> Episode:
        """An episode made of what `read_numbers` found; raises BadEpisode."""
        place = self.places[index]
        name, fps = place.named(index), self.fps
        if isinstance(found, Died | str):
            raise BadEpisode(f"{name}: {found}")
        state, action, recorded = found
        given = self.config.fps is not None
        by = "--fps says" if given else "its files say"
        sure = given and fps == self.scans[place.file]["fps"]  # --fps has chosen between the two
        times = step_times(name, recorded, len(state), fps, by, sure)
        origin = [place.file, place.sha256, place.group]
        episode = Episode(index, state, action, times, origin, place.task)
        refuse_unusable(name, episode, self.layout.names)
        return episode


def tasks_of(places: Iterable[Place]) -> list[str]:
    """The distinct instructions of these episodes."""
    return list(dict.fromkeys(place.task for place in places if place.task))


def find_files(path: Path, source: str) -> list[Path]:
    """The HDF5 files in a folder, in natural order, with those that it links to."""
    root = path.resolve()
    if root.is_file():
        return [root]

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.")

    files, hidden = [], []
    for folder, below, names in walk(root, refuse):
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if not name.startswith(".") and not (folder / name).exists():
                raise UserError(f"{folder / name} links to nothing: mount its disk, or remove the link.")
            if name.lower().endswith(SUFFIXES):
                (hidden if name.startswith(".") else files).append(folder / name)
    if hidden:
        more = f" and {len(hidden) - 1} more" * (len(hidden) > 1)
        say(f"{source}: {hidden[0].name}{more} not read: hidden files are not episodes")
    if not files:
        inside = [*(path.parent.parent for path in root.glob("*/meta/info.json")), *root.glob("*.zarr*")]
        if inside:
            raise UserError(f"{source} is no dataset but contains some: give one, such as {min(inside)}.")
        raise UserError(
            f"{source} holds no demonstrations: it has neither LeRobot's meta/info.json nor any "
            f"*.hdf5 or *.h5 file."
        )
    return sorted(files, key=lambda file: natural(file.relative_to(root).as_posix()))


def scan_all(root: Path, files: Sequence[Path], memory: Path, workers: int) -> dict[str, dict[str, Any]]:
    """What each file holds, by its path below the root; the file `memory` keeps it between starts."""
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
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"scan {root.name}", disable=is_quiet())
        with bar:
            for (_, name), scan in results:
                if isinstance(scan, Died):
                    scan = no_scan(str(scan))
                # Without a hash, the machine may have been at fault: the next start tries again.
                known[name] = {"stamp": stamps[name] if scan["sha256"] else None, **scan}
                bar.update(stamps[name][1])
        known = {name: known[name] for name in stamps}
        with writing_below(memory.parent):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memory, json.dumps(known).encode())
    return {name: known[name] for name in stamps}


def find_episodes(scans: dict[str, dict[str, Any]], task_key: str | None) -> list[Place]:
    """Where the episodes are; an unreadable file counts as one."""
    found = []
    for file, scan in scans.items():
        if scan["problem"]:
            found.append(Place(read_name(file, "", True), file, None, "", {}, scan["problem"]))
        for group, arrays in scan["episodes"]:
            name = read_name(file, group, alone=len(scan["episodes"]) == 1)
            task = stated_task(scan["texts"], group, task_key) or (None, None)
            found.append(Place(name, file, scan["sha256"], group, as_arrays(arrays), None, *task))
    return found


def as_arrays(found: dict[str, Sequence[Any]]) -> dict[str, Array]:
    """Arrays by key, from what a scan stored."""
    return {key: Array(a[0], tuple(a[1]), a[2], tuple(a[3])) for key, a in found.items()}


def holds_hdf5(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.name.lower().endswith(SUFFIXES))
