"""Whether a video file holds the episodes that `meta/episodes` places in it, one after the other.

LeRobot says by times alone where an episode lies in a file of many, and within half a step of any time lies
some frame. So the times of all frames, read without decoding, are held against everything that is known: each
step has a frame at its own time, the stretches follow each other in the order of the episodes, without gap or
overlap, from the first frame to the last, and each is as long as its episode's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# How far a frame may lie from its step's time, in steps. LeRobot writes multiples of 1/fps, in ticks of at
# most 0.1 ms; joining files rounds the length of each to a microsecond, which adds up in thousands.
TOLERANCE = 0.05


class Segment(NamedTuple):
    """An episode's place in a file: its number, its steps, when it begins and ends (None: not stated)."""

    episode: int
    steps: int
    start: float
    end: float | None


def clock_faults(
    file: str, times: np.ndarray, segments: Sequence[Segment], fps: float, missing: Callable[[int], bool]
) -> dict[int, str]:
    """What contradicts itself, as a clause for every episode concerned, by its number.

    Args:
        file: what to call the file.
        times: of its frames, (N,), ascending, in seconds.
        segments: all of the file, in the order of their episodes.
        fps: control steps per second.
        missing: whether an episode of that number is absent from `meta/episodes`, which explains frames that
            belong to nobody.
    """
    if not len(times):
        return {segment.episode: f"Episode {segment.episode}: {file} has no frames" for segment in segments}
    rate = 1 / max(np.median(np.diff(times)), 1e-9) if len(times) > 1 else fps
    if abs(rate / fps - 1) > TOLERANCE:
        said = f"has {rate:.4g} frames a second, and info.json says {fps:g}"
        return {segment.episode: f"Episode {segment.episode}: {file} {said}" for segment in segments}
    faults = {}
    for segment in segments:
        if fault := _own_fault(file, times, segment, fps):
            faults[segment.episode] = f"Episode {segment.episode} {fault}"
    for episode, fault in _order_faults(file, times, segments, fps, missing).items():
        faults.setdefault(episode, f"Episode {episode} {fault}")
    return faults


def _own_fault(file: str, times: np.ndarray, segment: Segment, fps: float) -> str | None:
    """What is wrong with a segment seen alone."""
    _, steps, start, end = segment
    if end is not None and not abs((end - start) * fps - steps) <= TOLERANCE:
        return f"lies at {start:.6g} to {end:.6g} s of {file}, and its {steps} steps take {steps / fps:.6g} s"
    first = int(np.abs(times - start).argmin())
    wanted, found = start + np.arange(steps) / fps, times[first : first + steps]
    off = ~(np.abs(found - wanted[: len(found)]) * fps <= TOLERANCE)
    if off.any():
        step = off.argmax()
        where = f"{wanted[step]:.6g} s of {file}, and the nearest frame is at {found[step]:.6g} s"
        return f"has its step {step} at {where}"
    if len(found) < steps:
        return f"is cut short: {file} ends after {len(found)} of its {steps} frames"
    return None


def _order_faults(
    file: str, times: np.ndarray, segments: Sequence[Segment], fps: float, missing: Callable[[int], bool]
) -> dict[int, str]:
    """Overlaps, gaps and leftovers among segments, in frames from the file's first one on."""
    count = _frames(times[-1] - times[0], fps) + 1
    faults: dict[int, str] = {}
    reached, before = 0, None  # the frame up to which there are episodes, and the one that reaches there
    steps, drift = 0, None  # of the episodes so far; how an episode lies behind them
    for segment in segments:
        episode, first = segment.episode, _frames(segment.start - times[0], fps)
        length = segment.steps if segment.end is None else _frames(segment.end - segment.start, fps)
        inside = 0 <= first <= count - length  # what is not has a fault of its own
        if inside and first < reached:
            faults.setdefault(before, f"overlaps with episode {episode} in {file}")
            faults.setdefault(episode, f"overlaps with episode {before} in {file}")
        elif inside and first not in (reached, steps) and not missing(episode - 1):
            frames = f"{first - reached} frame{'s' * (first - reached > 1)}"
            drift = drift or f"{frames} that belong to no episode, before episode {episode}"
        if drift:
            faults.setdefault(episode, f"comes after {drift}, in {file}")
        if inside and first + length > reached:
            reached, before = first + length, episode
        steps += segment.steps
    if count not in (reached, steps) and not (reached < count and missing(segments[-1].episode + 1)):
        for segment in segments:
            counts = f"{file} has {count} frames and its episodes have {steps}"
            faults.setdefault(segment.episode, f"cannot be told from the others: {counts}")
    return faults


def _frames(seconds: float, fps: float) -> int:
    """A time as a number of frames; no number is so large that it takes long."""
    return round(min(max(seconds * fps, -1e9), 1e9))
