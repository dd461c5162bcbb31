"""Episodes that appear while a run trains: found, decoded, and learned from in an order that can be repeated.

Every entry of `--grow-from` is a dataset by itself, such as an HDF5 file or the folder of a LeRobot dataset;
or the folder is one LeRobot dataset that grows. A thread of the first process decodes what is new, each entry
into a store of its own. All processes take it in at the same step, and `growth.json` in the run folder says
at which: a resumed run, which reads that file, sees the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.console import quiet, say
from common.data.samples import ChunkDataset
from common.data.store import EpisodeStore
from common.data.tasks import listed
from common.data.workers import kept_pool
from common.errors import UserError
from common.files import read_json, walk, write_json

if TYPE_CHECKING:
    from common.data import DataConfig

LOG = "growth.json"
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10.0  # an entry that cannot be used, and has not changed for as long, is left out
RECORDING_SECONDS = 600.0  # without a change in a dataset that cannot be read, until it is an error
LEAVE_SECONDS = 10.0  # at the end of a run, for an entry that is being decoded
UNFINISHED = (".part", ".tmp", ".lock")  # endings of names of what is still being written


@dataclass(frozen=True)
class Entry:
    """A dataset below the folder, by its name there, or some episodes of the one that the folder is."""

    name: str
    episodes: str = ""
    """A range such as 12-15; empty: all."""
    fingerprint: str = ""
    """Of the content, once it has been read."""


class GrownDataset(ChunkDataset):
    """The samples of a dataset, and those of all episodes in further stores, drawn `weight` times as often.

    Raises:
        UserError: if the stores do not fit.
    """

    def __init__(self, base: ChunkDataset, stores: Sequence[EpisodeStore], weight: float):
        store = EpisodeStore.concatenate([base.store, *stores])
        more = np.arange(base.store.num_episodes, store.num_episodes)
        shape = (base.horizon, base.proprio_history, base.action_offset)
        frames = (base.image_history, base.image_stride)
        episodes = np.concatenate([base.episodes, more])
        super().__init__(store, episodes, *shape, base.told, *frames, base.hold)
        self.base, self.weight = base, weight

    def groups(self) -> dict[str, Any]:
        """Those of the first dataset, in the same proportions, and one of all that was added."""
        groups, first, more = self.base.groups(), len(self.base), len(self) - len(self.base)
        samples = [*groups["num_samples"], more]
        weights = groups["weights"]
        if weights is None and self.weight == 1:
            return groups | {"num_samples": samples}
        shares = np.array(groups["num_samples"] if weights is None else weights, float)
        groups |= {"num_samples": samples, "weights": [*shares / shares.sum() * first, self.weight * more]}
        if "order" in groups:
            groups["order"] = np.concatenate([groups["order"], np.arange(first, len(self))])
        return groups


def refuse_own_episodes(config: DataConfig) -> None:
    """Refuse a folder of new episodes with a dataset in it, or in one: a run would learn from each of its
    episodes twice, and from those that it holds out.
    """
    from common.data import BUILT_IN  # which imports this module
    from common.data.lerobot import recorded_here

    folder = config.grow_from.resolve()
    for name in (name for name in config.dataset if name not in BUILT_IN):
        path = Path(name).resolve() if Path(name).exists() else recorded_here(name)
        if path and (path.resolve().is_relative_to(folder) or folder.is_relative_to(path.resolve())):
            raise UserError(
                f"--grow-from {config.grow_from} and --dataset {name} share episodes, which would be learned "
                f"from twice, held-out ones too: give new episodes a folder of their own."
            )


class Growth:
    """What a run takes in from `--grow-from`.

    Args:
        base: the samples of `--dataset`.
        log: `growth.json` of the run folder: each time that episodes were taken in, with the `step`, the
            `samples` that the run had drawn, and the `entries`. What is there already is repeated first.
        writes: whether this process looks for entries, and writes the log.
    """

    def __init__(self, config: DataConfig, base: ChunkDataset, log: Path, writes: bool):
        self.config, self.folder, self.base = config, config.grow_from, base
        self.log, self.writes = log, writes
        self.stores: list[EpisodeStore] = []  # of all that was taken in
        self.ready: list[Entry] = []  # decoded, in the order in which it is to be taken in
        self.times: list[dict] = read_json(log) if log.exists() else []
        self.repeated = self.taken = 0  # of `times`, and of `ready`
        self._opened: dict[Entry, EpisodeStore] = {}
        known = [Entry(**entry) for time in self.times for entry in time["entries"]]
        self._known = {entry.name for entry in known}
        self._episodes = _after(known)
        self._bad: dict[int, list] = {}  # episodes of a dataset that grows, and what its files were like then
        self._seen: dict[str, list] = {}  # of each entry not yet decoded, what its files were like
        self._failed: dict[str, tuple[float, str]] = {}  # when and why it could not be used; 0: it was said
        self._opening = threading.Lock()  # decoding processes are shared
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="growth", daemon=True)

    # The first process looks

    def start(self) -> None:
        """Look for new entries from now on, in a thread."""
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)

    def _watch(self) -> None:
        said = ""
        with kept_pool():
            while not self._stopping.wait(POLL_SECONDS):
                try:
                    self.look()
                except OSError as error:  # a network's disk does not answer
                    if str(error) != said:
                        said = str(error)
                        say(f"warning: {self.folder} cannot be read ({said}): trying again")

    def look(self) -> None:
        """Decode what is new and has not changed since the last look. An entry that cannot be used is tried
        again when it changes; of a dataset that grows, good episodes are taken without the bad ones.
        """
        for entry in self._new():
            if self._stopping.is_set():
                return
            path = self.folder / entry.name
            files = _files(path)
            if self._seen.get(entry.name) != files:  # it may still be copied
                self._seen[entry.name] = files
                self._failed.pop(entry.name, None)
                continue
            partly, why = False, "no task in them lasts for two steps"
            if entry.name in self._failed:
                since, why = self._failed[entry.name]
                if not 0 < since < time.monotonic() - PATIENCE_SECONDS:
                    continue
                self._failed[entry.name] = (0.0, why)
                partly = bool(entry.episodes)
                if not partly:
                    say(f"warning: {path} is left out: {why}")
                    continue
            numbers = _numbers(entry)
            try:
                store = self.open(entry, partly)
                self.refuse_unfit(store)
            except Exception as error:  # files of others can be anything, and training must go on
                why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                if numbers and numbers[0] in self._bad:
                    self._bad[numbers[0]] = files
                elif partly:
                    say(f"warning: {path} is left out as it is now: {why}")
                else:
                    self._failed[entry.name] = (time.monotonic(), why)
                continue
            bad = sorted(set(numbers) - set(store.episode_indices.tolist()))
            if bad:
                say(f"warning: episodes {', '.join(map(str, bad))} of {path} are left out: {why}")
            self._failed.pop(entry.name, None)
            for number in numbers:
                self._bad.pop(number, None)
            self._bad |= dict.fromkeys(bad, files)
            self._known.add(entry.name)
            entry = replace(entry, fingerprint=_fingerprint(store))
            self._episodes = max(self._episodes, _after([entry]))
            self._opened[entry] = store
            self.ready.append(entry)

    def _new(self) -> list[Entry]:
        """What is there and has not been decoded, by name."""
        if (self.folder / "meta" / "info.json").is_file():
            total = 0
            with suppress(OSError, ValueError, TypeError, KeyError):  # it is being written
                total = int(read_json(self.folder / "meta" / "info.json")["total_episodes"])
            if total > self._episodes:
                return [Entry(".", f"{self._episodes}-{total - 1}")]
            files = _files(self.folder) if self._bad else []
            mended = [Entry(".", f"{number}-{number}") for number, had in self._bad.items() if had != files]
            return mended[:1]
        names = []
        with suppress(OSError):  # it does not exist yet, or a network's disk does not answer
            names = sorted(os.listdir(self.folder))
        return [
            Entry(name)
            for name in names
            if name not in self._known and not name.startswith(".") and not name.endswith(UNFINISHED)
        ]

    # All processes

    def open(self, entry: Entry, partly: bool = False) -> EpisodeStore:
        """The entry's episodes, decoded if no process has done it before; `partly`: without bad ones.

        What has been read before is waited for: a dataset cannot be read while more is recorded into it.
        """
        from common.data import open_dataset  # which imports this module

        if entry in self._opened:
            return self._opened.pop(entry)
        path, storage = self.folder / entry.name, self.base.store.storage
        before = bool(entry.fingerprint and entry.episodes)
        tried, files, said = time.monotonic(), [], False
        chosen = {"dataset": (str(path),), "episodes": (entry.episodes,) if entry.episodes else ()}
        if self.config.cameras:  # keys in the files of --dataset may not be this one's, but short names are
            chosen["cameras"] = self.base.store.cameras
        chosen |= {"weights": (), "task": (), "task_weights": (), "task_balance": 0.0, "episodes_file": None}
        while True:
            try:
                with self._opening, quiet():
                    store = open_dataset(
                        replace(self.config, **chosen, store=storage, skip_bad_episodes=partly or before)
                    )
                    if (partly or before) and (self.base.told or self.config.task):
                        store = self._without(store, self._others(store))
                break
            except Exception as error:
                if not before or time.monotonic() - tried > RECORDING_SECONDS:
                    raise
                if files != (now := _files(path)):
                    tried, files = time.monotonic(), now
                if not said:
                    say(f"waiting until {path}, from which the run has learned, can be read again: {error}")
                    said = True
                time.sleep(POLL_SECONDS)
        if entry.fingerprint and entry.fingerprint != _fingerprint(store):
            raise UserError(
                f"{path} has changed since the run has learned from it: restore it, or start a new run."
            )
        return store

    @staticmethod
    def _without(store: EpisodeStore, tasks: set[str | None]) -> EpisodeStore:
        """The store without the episodes of these tasks, unless they are all it has."""
        kept = np.flatnonzero([task not in tasks for task in store.episode_tasks])
        if len(kept) in (0, store.num_episodes):
            return store
        return store.cut(kept, store.episode_starts[kept], store.episode_starts[kept + 1])

    def _others(self, store: EpisodeStore) -> set[str | None]:
        """What the episodes are told that those of the dataset are not."""
        known = self.base.store.instructions
        return set(store.episode_tasks) - {*known, *(() if self.base.told else [None])} if known else set()

    def refuse_unfit(self, store: EpisodeStore) -> None:
        """Raise a UserError for episodes that do not fit the dataset."""
        self.base.store.refuse_unlike(store)
        known = listed(self.base.store.instructions)
        for other in sorted(map(str, self._others(store)))[:1]:
            if self.base.told or self.config.task:
                raise UserError(f'its instruction "{other}" is none of those in --dataset: {known}.')
            say(f'warning: the task of {store.source} is "{other}", that of --dataset {known}')

    def due(self, step: int, samples: int, ready: int, share: Callable[[Any], Any]) -> dict | None:
        """What is to be taken in before this step, as in the log; the same in all processes.

        Args:
            samples: that the run has drawn.
            ready: how many entries the first process has decoded.
            share: gives the first process's value to all of them.
        """
        if self.repeated < len(self.times):  # an earlier start of this run had got further
            found = self.times[self.repeated]
            if found["samples"] > samples:
                return None
        elif ready > self.taken:
            entries = [asdict(entry) for entry in self.ready[self.taken : ready]]
            found = share(self._logged({"step": step, "samples": samples, "entries": entries}))
            if found is None:
                return None
            self.times = [*self.times[: self.repeated], found]
            self.taken = ready
        else:
            return None
        self.repeated += 1
        return found

    def _logged(self, found: dict) -> dict | None:
        """Write it to the log; None if that is impossible, so that it is not taken in yet."""
        try:
            if self.writes:
                write_json(self.log, [*self.times, found])
        except OSError as error:
            say(f"warning: {self.log} cannot be written ({error.strerror}): new episodes wait")
            return None
        return found

    def take(self, found: dict) -> GrownDataset:
        """The dataset with these episodes, too."""
        self.stores += [self.open(Entry(**entry)) for entry in found["entries"]]
        return GrownDataset(self.base, self.stores, self.config.grow_weight)


def _fingerprint(store: EpisodeStore) -> str:
    """Hash of some episodes, whatever else their dataset holds by now."""
    sha = hashlib.sha256(json.dumps(store.episode_tasks).encode())
    for array in (store.state, store.action, store.timestamps, store.episode_starts, store.episode_checksums):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _numbers(entry: Entry) -> range:
    """The numbers of an entry's episodes, if it is some of a LeRobot dataset that grows; else none."""
    first, _, last = entry.episodes.partition("-")
    return range(int(first), int(last) + 1) if last else range(0)


def _after(entries: Sequence[Entry]) -> int:
    """The number after that of the last episode of a LeRobot dataset that grows."""
    return max((_numbers(entry).stop for entry in entries), default=0)


def _files(path: Path) -> list:
    """Names, sizes and times of a file, or of all that a folder holds."""
    found = []
    for file in sorted({path, *(folder / name for folder, _, names in walk(path) for name in (".", *names))}):
        with suppress(OSError):
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
