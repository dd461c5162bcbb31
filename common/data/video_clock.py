"""Check that a video file holds the episodes that `meta/episodes` places in it, one after the other.

LeRobot locates an episode in a shared file by times alone, and some frame is always within half a step of any
time. So the times of all frames, read without decoding, are checked against everything that is known: each
step has a frame at its own time, the stretches follow each other in the order of the episodes, without gap or
overlap, from the first frame to the last, and each is as long as its episode's steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# How far a frame may be from its step's time, in steps. LeRobot writes multiples of 1/fps, in ticks of at
# most 0.1 ms; joining files rounds each length to a microsecond, which adds up over thousands.
TOLERANCE = 0.05


class Segment(NamedTuple):
    """An episode's place in a file: its number, its steps, its start and end (None: not stated)."""

    episode: int
    steps: int
    start: float
    end: float | None


def clock_faults(
    file: str, times: np.ndarray, segments: Sequence[Segment], fps: float, absent: Collection[int]
) -> dict[int, str]:
    """Contradictions, as a clause for each affected episode, by its number.

    Args:
        file: its name in messages.
        times: of its frames, (N,), ascending, in seconds.
        segments: all those of the file, in the order of their episodes.
        fps: control steps per second.
        absent: adjacent episode numbers that `meta/episodes` lacks, which explains frames without an episode.
    """
    if not len(times):
        return {segment.episode: f"Episode {segment.episode}: {file} has no frames" for segment in segments}
    rate = 1 / max(np.median(np.diff(times)), 1e-9) if len(times) > 1 else fps
    if abs(rate / fps - 1) > TOLERANCE:
        said = f"has {rate:.4g} frames a second, but info.json says {fps:g}"
        return {segment.episode: f"Episode {segment.episode}: {file} {said}" for segment in segments}
    faults = {}
    for segment in segments:
        if fault := _own_fault(file, times, segment, fps):
            faults[segment.episode] = f"Episode {segment.episode} {fault}"
    for episode, fault in _order_faults(file, times, segments, fps, absent).items():
        faults.setdefault(episode, f"Episode {episode} {fault}")
    return faults


def _own_fault(file: str, times: np.ndarray, segment: Segment, fps: float) -> str | None:
    """What is wrong with a segment on its own."""
    _, steps, start, end = segment
    if end is not None and not abs((end - start) * fps - steps) <= TOLERANCE:
        return f"lies at {start:.6g} to {end:.6g} s of {file}, but its {steps} steps take {steps / fps:.6g} s"
    first = int(np.searchsorted(times, start - TOLERANCE / fps))
    wanted, found = start + np.arange(steps) / fps, times[first : first + steps]
    off = ~(np.abs(found - wanted[: len(found)]) * fps <= TOLERANCE)
    if off.any():
        step = off.argmax()
        where = f"{wanted[step]:.6g} s of {file}, but the next frame is at {found[step]:.6g} s"
        return f"has its step {step} at {where}"
    if len(found) < steps:
        return f"is cut short: {file} ends after {len(found)} of its {steps} frames"
    return None


def _order_faults(
    file: str, times: np.ndarray, segments: Sequence[Segment], fps: float, absent: Collection[int]
) -> dict[int, str]:
    """Overlaps, gaps and leftovers among segments, counted in frames from the file's first."""
    count = _frames(times[-1] - times[0], fps) + 1
    firsts = [_frames(segment.start - times[0], fps) for segment in segments]
    steps = [segment.steps for segment in segments]
    stated = [s.steps if s.end is None else max(0, _frames(s.end - s.start, fps)) for s in segments]
    is_free = [segment.episode - 1 in absent for segment in segments]
    leftover = segments[-1].episode + 1 in absent
    expected, total = _places(firsts, steps, is_free)
    if total != count:  # an episode's video may lack frames, if all times agree
        by_times, total_by_times = _places(firsts, stated, is_free)
        expected, total = (by_times, count) if total_by_times == count else (expected, total)
    faults: dict[int, str] = {}
    for one, other in _overlaps(firsts, np.maximum(steps, stated)):
        faults.setdefault(segments[one].episode, f"overlaps with episode {segments[other].episode} in {file}")
    for segment, first, place in zip(segments, firsts, expected, strict=True):
        if first != place:
            where = f"frame {first} of {file}, but the episodes before it have {place}"
            faults.setdefault(segment.episode, f"begins at {where}")
        if total != count and not (total < count and leftover):
            counts = f"{file} has {count} frames but its episodes have {total}"
            faults.setdefault(segment.episode, f"cannot be told from the others: {counts}")
    return faults


def _places(firsts: Sequence[int], lengths: Sequence[int], is_free: Sequence[bool]) -> tuple[list[int], int]:
    """The frames at which the segments should begin, in order, and at which the last one ends.

    A free one, with an absent episode before it, begins where it says, unless that is too early.
    """
    places, reached = [], 0
    for first, length, free in zip(firsts, lengths, is_free, strict=True):
        places.append(max(first, reached) if free else reached)
        reached = places[-1] + length
    return places, reached


def _overlaps(firsts: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of segments that overlap, in both orders."""
    reached, holder = 0, None
    for number in sorted(range(len(firsts)), key=firsts.__getitem__):
        if holder is not None and firsts[number] < reached:
            yield number, holder
            yield holder, number
        if holder is None or firsts[number] + lengths[number] > reached:
            reached, holder = firsts[number] + lengths[number], number


def _frames(seconds: float, fps: float) -> int:
    """A time as a number of frames, capped so that huge ones cost no time."""
    return round(min(max(seconds * fps, -1e9), 1e9))
