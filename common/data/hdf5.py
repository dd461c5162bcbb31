"""Episodic HDF5: a folder of files, one or several episodes in each, or one such file.

Recognised layouts (others by `--state-keys`, `--action-keys`, `--camera-keys`):

    ALOHA, ACT      /observations/qpos, /observations/images/<camera>, /action
    grouped         /observation/joint_pos/left, ..., /action/joint_pos/left, ...: what both groups have,
                    joints before hands before the rest, left before right
    robomimic       /data/demo_0/obs/..., /data/demo_0/actions; likewise episode_0, traj_0, ...

Images are arrays (L, H, W, 3) or (L, 3, H, W) uint8, or one JPEG or PNG a step, of variable length or padded.

What was found in a file is remembered by its size and time, with a hash of its content: on a later start
nothing is read. `common/data/hdf5_files.py` does the reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.data.cameras import Camera, closest, select_cameras, target_size, with_short_names
from common.data.hdf5_files import MAX_BYTES, SCAN, Hdf5Reader, natural, read_numbers, scan_file
from common.data.ingest import (
    BadEpisode,
    Episode,
    Load,
    Loaded,
    StoreInfo,
    absent_episodes,
    refuse_nonfinite,
    report,
)
from common.data.workers import Died, cores, guarded_map
from common.errors import UserError
from common.files import write_whole

if TYPE_CHECKING:
    from common.data import DataConfig

SUFFIXES = (".hdf5", ".h5")
TIMES = ("timestamp", "timestamps", "observations/timestamp", "observation/timestamp", "obs/timestamp")
MAX_STEPS, MAX_NUMBERS = 10_000_000, 4096  # of an episode; of a step
GROUPS = ("observations/", "observation/", "obs/", "actions/", "action/")
QUANTITIES = ("joint_pos", "hand_joint_pos", "gripper_pos", "gripper")
STATES = (  # of the robomimic family, under obs/; the first that is there
    ("robot{}_eef_pos", "robot{}_eef_quat", "robot{}_gripper_qpos"),
    ("ee_states", "gripper_states"),
    ("agent/qpos",),
)
ALOHA_JOINTS = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in (
        *("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"),
        "gripper",
    )
)


def describe(path: Path, source: str, config: DataConfig, stores: Path) -> tuple[StoreInfo, Load]:
    """What the store of a dataset is, and how its episodes are read.

    Args:
        path: a folder, searched recursively, or a file.
        source: what to call the dataset.
        stores: folder of all stores, where scans are remembered.

    Raises:
        UserError: whatever is wrong with the dataset or the choices.
    """
    root, files = find_files(path, source)
    scans = scan_all(root, files, stores, config.ingest_workers or cores())
    places = number_episodes(scans)
    sound = {index: place for index, place in places.items() if place.problem is None}
    if not sound:
        reason = next((place.problem for place in places.values()), "its files hold no episode")
        raise UserError(f"{source} has no usable episode: {reason}.")
    layout, cameras = _layout(next(iter(sound.values())), config, source)
    chosen = select_cameras(cameras, config.cameras, source)
    first = next(iter(sound.values())).datasets
    names = {
        part: tuple(name for key in keys for name in dimension_names(key, first[key]["shape"], layout.name))
        for part, keys in (("state", layout.state_keys), ("action", layout.action_keys))
    }
    widths = {key: math.prod(first[key]["shape"][1:]) for key in (*layout.state_keys, *layout.action_keys)}
    content = [[file, scan["sha256"]] for file, scan in scans.items()]
    info = StoreInfo(
        source=source,
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        cameras=tuple(camera.short for camera in chosen),
        camera_keys=tuple(camera.key for camera in chosen),
        image_size=target_size(chosen, config.image_size),
        fps=_rate(scans, config.fps, source),
        state_keys=layout.state_keys,
        action_keys=layout.action_keys,
        state_names=names["state"],
        action_names=names["action"],
        task=None,
        color_order=config.color_order,
    )
    _print_layout(layout, chosen, first, info, len(files), len(places))

    def load_episodes(wanted: Sequence[int] | None) -> Loaded:
        absent = set(wanted or ()) - places.keys()
        if absent:
            raise absent_episodes(source, sorted(absent))
        these = places if wanted is None else {index: places[index] for index in wanted}
        return load(root, info, chosen, these, widths, {f: s["sha256"] for f, s in scans.items()}, config)

    return info, load_episodes


# -- files


def find_files(path: Path, source: str) -> tuple[Path, list[Path]]:
    """The folder that everything must lie in, and the HDF5 files there, in natural order."""
    if path.is_file():
        return path.resolve().parent, [path.resolve()]
    root = path.resolve()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.")

    found = os.walk(root, onerror=refuse)  # links to folders are not followed
    files = [
        Path(folder, name) for folder, _, names in found for name in names if Path(name).suffix in SUFFIXES
    ]
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
    return root, sorted(files, key=lambda file: natural(file.relative_to(root).as_posix()))


def scan_all(root: Path, files: Sequence[Path], stores: Path, workers: int) -> dict[str, dict[str, Any]]:
    """What each file holds (see `scan_file`), by its path below the root; remembered between starts."""
    from tqdm import tqdm

    memory = stores / "scans" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:20]}.json"
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        known = {}
    stamps, missing = {}, []
    for file in files:
        name, status = file.relative_to(root).as_posix(), file.stat()
        stamps[name] = [SCAN, status.st_size, status.st_mtime_ns]
        if not (isinstance(known.get(name), dict) and known[name].get("stamp") == stamps[name]):
            missing.append((str(file), name))
    if not missing:
        return {name: known[name] for name in stamps}
    size = {name: stamp[1] for name, stamp in stamps.items()}
    total = sum(size[name] for _, name in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"scan {root.name}") as bar:
        results = guarded_map(scan_file, missing, workers, lambda task: size[task[1]] / 1e6)
        for (_, name), scan in results:
            if isinstance(scan, Died):
                scan = {"sha256": None, "problem": str(scan)}
            if scan["sha256"] is None:  # not remembered: the fault may have been the machine's
                stamps[name] = None
            known[name] = {"stamp": stamps[name], **scan}
            bar.update(size[name])
    known = {name: known[name] for name in stamps}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps(known).encode())
    except OSError as error:
        raise UserError(
            f"{stores} cannot be written ({error.strerror}): choose another --cache-dir."
        ) from None
    return known


def _rate(scans: dict[str, dict], given: float | None, source: str) -> float:
    rates = {scan["fps"]: name for name, scan in scans.items() if scan.get("fps")}
    if given is not None:
        return given
    if not rates:
        raise UserError(f"{source} does not say how many control steps a second it has: give --fps.")
    if len(rates) > 1:
        listing = ", ".join(f"{rate:g} Hz in {name}" for rate, name in list(rates.items())[:3])
        raise UserError(f"{source} has different control rates ({listing}): separate them, or give --fps.")
    return next(iter(rates))


# -- episodes and layout


class Place(NamedTuple):
    """Where an episode is: file below the root, group in it, and its datasets as scanned, or a problem."""

    file: str
    group: str
    datasets: dict[str, dict[str, Any]]
    problem: str | None


def number_episodes(scans: dict[str, dict[str, Any]]) -> dict[int, Place]:
    """Episodes in order; a file that is one episode and ends in a number of its own gives it that number."""
    places = []
    for file, scan in scans.items():
        if scan.get("problem"):
            places.append(Place(file, "", {}, scan["problem"]))
        places += [Place(file, e["group"], e["datasets"], None) for e in scan.get("episodes", ())]
    ends = [re.search(r"(\d{1,9})$", Path(place.file).stem) for place in places]
    numbers = [int(end[1]) for end in ends if end]
    if len(scans) == len(places) == len(set(numbers)):
        return dict(sorted(zip(numbers, places, strict=True)))
    return dict(enumerate(places))


class Layout(NamedTuple):
    """Which datasets make up an episode, by keys below its group."""

    name: str
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    camera_keys: tuple[str, ...]


def recognise(kinds: dict[str, str]) -> Layout | None:
    """The layout of an episode whose datasets are of these kinds; None if it is none of those known."""
    numbers = [key for key, kind in kinds.items() if kind == "numbers"]
    cameras = tuple(key for key, kind in kinds.items() if kind in ("pixels", "encoded"))
    if {"observations/qpos", "action"} <= set(numbers):
        return Layout("ALOHA", ("observations/qpos",), ("action",), cameras)
    if "actions" in numbers:
        for names in STATES:
            robots = range(10) if "{}" in names[0] else (0,)
            keys = [f"obs/{name.format(robot)}" for robot in robots for name in names]
            keys = tuple(key for key in keys if key in numbers)
            if keys:
                return Layout("robomimic", keys, ("actions",), cameras)
    shared = [key.partition("/")[2] for key in numbers if key.startswith("action/")]
    shared = sorted((key for key in shared if f"observation/{key}" in numbers), key=_grouped_order)
    if shared:
        state, action = (tuple(f"{group}/{key}" for key in shared) for group in ("observation", "action"))
        return Layout("grouped", state, action, cameras)
    return None


def _grouped_order(key: str) -> tuple:
    quantity, _, part = key.partition("/")
    rank = QUANTITIES.index(quantity) if quantity in QUANTITIES else len(QUANTITIES)
    side = {"left": 0, "right": 1}.get(part, 2)
    return rank, quantity, side, natural(part)


def _layout(place: Place, config: DataConfig, source: str) -> tuple[Layout, list[Camera]]:
    """The layout to use, flags before what is recognised, and all cameras in it.

    Raises:
        UserError: if it is neither recognised nor given, or a key does not exist; lists those that do.
    """
    kinds = {key: about["kind"] for key, about in place.datasets.items()}
    known = recognise(kinds)
    keys = {}
    for flag, given, found, wanted in (
        ("--state-keys", config.state_keys, known and known.state_keys, ("numbers",)),
        ("--action-keys", config.action_keys, known and known.action_keys, ("numbers",)),
        ("--camera-keys", config.camera_keys, known and known.camera_keys, ("pixels", "encoded")),
    ):
        keys[flag] = tuple(key.strip("/") for key in given) or found
        if keys[flag] is None and flag == "--camera-keys":
            keys[flag] = tuple(key for key, kind in kinds.items() if kind in wanted)
        if not keys[flag]:
            raise UserError(
                f"The layout of {source} is not one of those known: say with {flag} which datasets to use; "
                f"{place.file} has {_listing(place)}."
            )
        for key in keys[flag]:
            if kinds.get(key) not in wanted:
                what = "is not there" if key not in kinds else f"holds no {wanted[0]}"
                raise UserError(
                    f"{flag} {key} {what}{closest(key, kinds)}: {place.file} has {_listing(place)}."
                )
    name = known.name if known else "given"
    layout = Layout(name, *keys.values())
    cameras = [Camera(key, "", tuple(place.datasets[key]["size"])) for key in layout.camera_keys]
    return layout, with_short_names(cameras)


def _listing(place: Place) -> str:
    return (
        ", ".join(
            f"{key} {'x'.join(map(str, about['shape']))} {about['dtype']}"
            for key, about in list(place.datasets.items())[:40]
        )
        or "nothing"
    )


def dimension_names(key: str, shape: Sequence[int], layout: str) -> tuple[str, ...]:
    """One name per dimension; the same for state and action where they are the same thing."""
    count = math.prod(shape[1:])
    if layout == "ALOHA" and key in ("observations/qpos", "action"):
        return ALOHA_JOINTS if count == len(ALOHA_JOINTS) else tuple(f"joint_{i}" for i in range(count))
    group = next((group for group in GROUPS if key.startswith(group)), "")
    short = key.removeprefix(group)
    return (short,) if count == 1 else tuple(f"{short}.{i}" for i in range(count))


def _print_layout(layout: Layout, cameras, datasets, info: StoreInfo, files: int, episodes: int) -> None:
    report(f"{info.source}: HDF5, {layout.name} layout, {files} files, {episodes} episodes, {info.fps:g} Hz")
    for part, keys in (("state", layout.state_keys), ("action", layout.action_keys)):
        first = 0
        for key in keys:
            last = first + math.prod(datasets[key]["shape"][1:])
            report(f"  {part}[{first}:{last}]".ljust(18) + key)
            first = last
    for camera in cameras:
        about = datasets[camera.key]
        kind = "JPEG or PNG" if about["kind"] == "encoded" else about["dtype"]
        report(f"  {camera.short}".ljust(18) + f"{camera.key}, {camera.size[0]}x{camera.size[1]}, {kind}")


# -- content


def load(
    root: Path,
    info: StoreInfo,
    cameras: Sequence[Camera],
    places: dict[int, Place],
    widths: dict[str, int],
    hashes: dict[str, str],
    config: DataConfig,
) -> Loaded:
    """Episodes without their frames, a clause about each one that cannot be used, and the frames' reader."""
    faults = {index: _fault(index, place, widths, cameras) for index, place in places.items()}
    by_file: dict[str, list[int]] = {}
    for index, place in places.items():
        if faults[index] is None:
            by_file.setdefault(place.file, []).append(index)
    keys = (info.state_keys, info.action_keys)
    tasks = [
        (str(root / file), [(places[i].group, _times(places[i])) for i in these], *keys)
        for file, these in by_file.items()
    ]
    of_path, episodes = {str(root / file): these for file, these in by_file.items()}, []
    for task, result in guarded_map(read_numbers, tasks, config.ingest_workers or cores()):
        for slot, index in enumerate(of_path[task[0]]):
            place = places[index]
            found = str(result) if isinstance(result, Died) else result[slot]
            try:
                if isinstance(found, str):
                    raise BadEpisode(f"{_name(index, place)}: {found}")
                origin = json.dumps([place.file, place.group, hashes[place.file], keys, info.camera_keys])
                episodes.append(_episode(index, place, found, info, origin))
            except BadEpisode as error:
                faults[index] = str(error)
    reader = Hdf5Reader(
        root,
        tuple(cameras),
        info.image_size,
        info.color_order,
        {e.index: (places[e.index].file, places[e.index].group, len(e)) for e in episodes},
    )
    return sorted(episodes, key=lambda e: e.index), [fault for fault in faults.values() if fault], reader


def _name(index: int, place: Place) -> str:
    return f"Episode {index} ({place.file}{', ' + place.group.strip('/') if place.group else ''})"


def _times(place: Place) -> str | None:
    """The key of the recorded times, if there are any."""
    for key in TIMES:
        about = place.datasets.get(key)
        if about and about["kind"] == "numbers" and len(about["shape"]) == 1:
            return key
    return None


def _fault(index: int, place: Place, widths: dict[str, int], cameras: Sequence[Camera]) -> str | None:
    """What the scan already shows to be wrong with an episode.

    Args:
        widths: numbers a step in each dataset of state and action.
    """
    name, found = _name(index, place), place.datasets
    if place.problem:
        return f"{name} is unusable: {place.problem}"
    for key in (*widths, *(camera.key for camera in cameras)):
        if key not in found:
            return f"{name} has no {key}, it has {_listing(place)}"
    for key in widths:
        if found[key]["kind"] != "numbers":
            return f"{name} holds {found[key]['dtype']} instead of numbers in {key}"
    for camera in cameras:
        if found[camera.key]["kind"] not in ("pixels", "encoded"):
            return f"{name} has no images in {camera.key}, which is {found[camera.key]['dtype']}"
    first = next(iter(widths))
    steps = found[first]["shape"][0]
    for key in (*widths, *(camera.key for camera in cameras)):
        if found[key]["shape"][0] != steps:
            return f"{name} has {steps} steps in {first} and {found[key]['shape'][0]} in {key}"
    if not 2 <= steps <= MAX_STEPS:
        return f"{name} has {steps} step{'s' * (steps != 1)}, and 2 to {MAX_STEPS} are usable"
    for key, width in widths.items():
        count = math.prod(found[key]["shape"][1:])
        if count != width:
            return f"{name} has {count} numbers a step in {key} instead of {width}"
        if count > MAX_NUMBERS or steps * count * 8 > MAX_BYTES:
            return f"{name} has an absurd shape: {steps} steps of {count} numbers in {key}"
    for camera in cameras:
        if tuple(found[camera.key]["size"]) != camera.size:
            sizes = "{}x{} instead of {}x{}".format(*found[camera.key]["size"], *camera.size)
            return f"{name} has images of another size in {camera.key}, {sizes}"
    return None


def _episode(index: int, place: Place, found, info: StoreInfo, origin: str) -> Episode:
    """An episode of what was read; raises BadEpisode."""
    state, action, recorded = found
    name = _name(index, place)
    if state.shape[1:] != (len(info.state_names),) or action.shape != (len(state), len(info.action_names)):
        raise BadEpisode(f"{name} has another shape than when it was scanned")
    refuse_nonfinite(name, {"state": (state, info.state_names), "action": (action, info.action_names)})
    times = np.arange(len(state)) / info.fps
    if recorded is not None and len(recorded) == len(times) and np.isfinite(recorded).all():
        recorded = recorded.astype(np.float64) - float(recorded[0])
        step = np.median(np.diff(recorded))
        if (np.diff(recorded) > 0).all() and 0.5 < step * info.fps < 2:  # seconds, then
            times = recorded
    return Episode(index, state, action, times, origin)
