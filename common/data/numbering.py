"""Numbers of the episodes in files: taken from their names, never from their position.

A number that two episodes share, or a name without a number, does not identify an episode. Such episodes get
a nine-digit number that depends on their name only: adding, removing or damaging other files does not change
it. If several series have the same numbers (`a.hdf5` and `b.hdf5`, each with demo_0, demo_1, ...), each
starts at its own number, and its episodes follow in order.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from common.data.cameras import distinct

WORD = r"(demo|episode|ep|traj|trajectory)"
EPISODE = re.compile(rf"{WORD}[ _.-]?\d+", re.IGNORECASE)  # a name that marks an episode
NUMBERS = (re.compile(rf"{WORD}[ _.-]?(?P<number>\d+)", re.IGNORECASE), re.compile(r"(?P<number>\d+)$"))
SERIES = 10_000  # numbers between the starts of two series


class Name(NamedTuple):
    """An episode's name, taken apart.

    Attributes:
        whole: file, and the group in it.
        series: the name with {} in place of the number.
        rank: 0 for an episode among several in a file, 1 for a file named like episode_3, 2 for any other
            with a number, 3 for one without. Only the lowest rank present keeps its numbers: a
            calibration_3.h5 next to episode_3.hdf5 does not compete with it.
    """

    whole: str
    series: str
    number: int | None
    rank: int


def read_name(file: str, group: str, alone: bool) -> Name:
    """The name of the episode in a group of a file; `alone` if it is the only one there."""
    path, whole = PurePosixPath(file), f"{file}, {group.strip('/')}".removesuffix(", ")
    episode_file = bool(EPISODE.fullmatch(path.stem))
    if group and not (alone and episode_file):
        parent, _, last = group.strip("/").rpartition("/")
        head, number = re.fullmatch(r"(.*?)(\d+)", last).groups()
        return Name(whole, f"{file}, {parent}{'/' * bool(parent)}{head}{{}}", int(number), 0)
    parts = [*path.parts[:-1], path.stem]
    for place in reversed(range(len(parts))):
        matches = [match for pattern in NUMBERS for match in pattern.finditer(parts[place])]
        if matches:
            first, last = matches[0].span("number")
            series = [*parts[:place], f"{parts[place][:first]}{{}}{parts[place][last:]}", *parts[place + 1 :]]
            rank = 1 if EPISODE.fullmatch(parts[place]) else 2
            return Name(whole, "/".join(series) + path.suffix, int(parts[place][first:last]), rank)
    return Name(whole, whole, None, 3)


def number_names(names: Sequence[Name]) -> list[int]:
    """The number of each episode."""
    if [name.rank for name in names] == [3]:
        return [0]
    lowest = min((name.rank for name in names), default=3)
    leading = [name for name in names if name.rank == lowest < 3]
    clash = max(Counter(name.number for name in leading).values(), default=1) > 1
    candidates = []
    for name in names:
        own: list[int] = []
        if name in leading and not clash and name.number < 10**9:
            own.append(name.number)
        elif name in leading and name.number < SERIES:
            own.append((10**4 + _hashed(name.series) % (9 * 10**4)) * SERIES + name.number)
        candidates.append([*own, *(10**8 + _hashed(f"{name.whole}{i}") % (9 * 10**8) for i in range(3))])
    return distinct(candidates)


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big")


def explain(names: Sequence[Name], numbers: Sequence[int]) -> Iterator[str]:
    """Lines that map numbers to episodes, for those not named episode_<number>."""
    said = {}
    for name, number in zip(names, numbers, strict=True):
        begin = number - (name.number or 0)
        in_series = name.number is not None and begin % SERIES == 0
        if not in_series:
            said[f"episode {number}"] = name.whole
        elif begin or name.rank > 1:
            said[f"episode {f'{begin} + ' if begin else ''}N"] = name.series.format("N")
    yield from (f"{number}: {name}" for number, name in said.items())
