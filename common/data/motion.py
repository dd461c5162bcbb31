"""What moves in a dataset: idle dimensions, idle ends of episodes, jumps, stuck commands."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.console import say
from common.data.store import EpisodeStore
from common.errors import UserError

REST_SECONDS = 0.5  # a robot that rests longer at an end of an episode is idle there
STUCK_SECONDS = 2.0  # an action that stays exactly the same for longer is suspicious
REST_SHARE = 1e-3  # of a dimension's range: smaller changes are not motion
EXTREME_SHARE = 1e-3  # of the steps, at either end of a dimension: these may be sensor failures
BLACK = 10  # a frame without a brighter pixel is black
FEW = 8  # episodes or dimensions to name in a line


def slabs(values: np.ndarray) -> Iterator[np.ndarray]:
    """(S, D) as float64, two or three dimensions at a time: all of them can be many gigabytes.

    Not one by one: NumPy adds up a single column in another order, and so rounds differently.
    """
    count = values.shape[1]
    edges = [*range(0, max(count - 1, 1), 2), count]
    return (values[:, first:last].astype(np.float64) for first, last in pairwise(edges))


def without_extremes(values: np.ndarray) -> np.ndarray:
    """(S, D) as float64 with the lowest and highest 0.1 % of each dimension, at least one value, clipped.

    A sensor that fails for a step can report thousands of times the usual value; motion lasts longer.
    """
    exact = np.asarray(values, np.float64)
    low = np.quantile(exact, EXTREME_SHARE, axis=0, method="higher")
    high = np.quantile(exact, 1 - EXTREME_SHARE, axis=0, method="lower")
    return np.clip(exact, np.minimum(low, high), np.maximum(low, high))


def usual_spread(spread: np.ndarray) -> float:
    """Median of the (D,) standard deviations that reach a hundredth of the largest."""
    return float(np.median(spread[spread >= 1e-2 * spread.max()]))


class Motion(NamedTuple):
    """How (S, D) recorded steps move, extremes apart: (D,) each."""

    spread: np.ndarray
    """Standard deviation."""
    noise: np.ndarray
    """Root mean square of the change from step to step."""
    level: np.ndarray
    """Absolute value of the mean."""
    varies: np.ndarray
    """Whether it is not constant, bool."""

    @classmethod
    def of(cls, values: np.ndarray, episodes: np.ndarray) -> Motion:
        """`episodes`, (S,), has the episode of each step."""
        within, parts = np.diff(episodes) == 0, []
        for exact in map(without_extremes, slabs(values)):
            steps = np.diff(exact, axis=0)[within]
            noise = np.sqrt((steps**2).sum(0) / max(len(steps), 1))
            parts.append((exact.std(0), noise, np.abs(exact.mean(0)), exact.max(0) > exact.min(0)))
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    @property
    def idle(self) -> np.ndarray:
        """See `idle_dimensions`."""
        spread, usual = self.spread, usual_spread(self.spread)
        noisy = (self.noise > 0.5 * spread) | (spread < 1e-3 * self.level)
        return ((spread < 1e-4 * usual) | ((spread < 1e-2 * usual) & noisy)) & self.varies


def idle_dimensions(values: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """Dimensions with nothing but sensor noise, compared to those that move: (D,) bool.

    A dimension is idle if its standard deviation is

    - below 1e-4 of the usual one: units as different as millimetres and radians differ by less, or
    - below 1e-2 of it, and noise: it varies as much from step to step as over the whole dataset, or by less
      than a thousandth of its resting value.

    A gripper that seldom moves, or is recorded in other units, is not idle, nor is a constant dimension, for
    which `common/normalize.py` has its own rule.

    Args:
        values: (S, D), recorded.
        episodes: (S,), the episode of each step.
    """
    return Motion.of(values, episodes).idle


@dataclass(frozen=True)
class Ends:
    """Steps without motion at the ends of each episode, (E,) int64 each.

    Attributes:
        head, tail: all of them, except one step of rest next to the motion.
        blank_head, blank_tail: those without content, zeros or black frames, which pad files of fixed
            length.
    """

    head: np.ndarray
    tail: np.ndarray
    blank_head: np.ndarray
    blank_tail: np.ndarray


def idle_ends(store: EpisodeStore) -> Ends:
    """Find the idle ends of all episodes; reads frames only if an episode ends in black."""
    values, episodes = np.concatenate([store.state, store.action], axis=1), episode_of_steps(store)
    idle = np.concatenate([idle_dimensions(part, episodes) for part in (store.state, store.action)])
    usual = np.concatenate([np.ptp(without_extremes(part), axis=0) for part in slabs(values)])
    # Beside one lost reading, all other motion would look like rest.
    ranges = np.minimum(np.ptp(values, axis=0), 2 * usual)
    tolerance = np.where(idle, np.inf, REST_SHARE * ranges)
    least = max(2, round(REST_SECONDS * store.fps))
    found = []
    for first, last in zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True):
        forward = np.arange(first, last)
        tail, blank_tail = _idle_from(forward[::-1], store, values, tolerance, least)
        head, blank_head = _idle_from(forward[: len(forward) - tail], store, values, tolerance, least)
        found.append((head, tail, blank_head, blank_tail))
    return Ends(*np.array(found, np.int64).reshape(-1, 4).T)


def episode_of_steps(store: EpisodeStore) -> np.ndarray:
    """The episode of every step, (S,) int64."""
    return np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts))


def _idle_from(
    rows: np.ndarray, store: EpisodeStore, values: np.ndarray, tolerance: np.ndarray, least: int
) -> tuple[int, int]:
    """Numbers of idle and of blank steps at the start of `rows`, which run inwards from an end."""
    blank = 0
    while blank < len(rows) and (not values[rows[blank]].any() or _is_black(store, rows[blank])):
        blank += 1
    inner = values[rows[blank:]]
    if not len(inner):
        return len(rows), blank
    moved = (np.abs(inner - inner[0]) > tolerance).any(1)
    rest = int(moved.argmax()) if moved.any() else len(inner)
    return blank + (rest - 1 if rest >= least else 0), blank


def _is_black(store: EpisodeStore, row: int) -> bool:
    return int(store.images(np.array([row])).max()) <= BLACK


def trim_idle(store: EpisodeStore) -> EpisodeStore:
    """The store without idle ends, and without episodes that are all idle; prints what it left out."""
    ends = idle_ends(store)
    first, last = store.episode_starts[:-1] + ends.head, store.episode_starts[1:] - ends.tail
    kept = np.flatnonzero(last - first >= 2)
    if not len(kept):
        raise UserError(f"--trim-idle: nothing moves in {store.source}: leave the flag out.")
    trimmed = store.cut(kept, first[kept], last[kept])
    left_out = store.num_episodes - len(kept)
    share = f"{store.num_steps - trimmed.num_steps} of {store.num_steps} steps"
    whole = f" and {left_out} episodes, in which nothing moves," * bool(left_out)
    say(f"--trim-idle: {share}{whole} of {store.source} are left out")
    return trimmed


def oddities(store: EpisodeStore) -> list[str]:
    """Anything suspicious about the motion, in lines for people."""
    ends, lines = idle_ends(store), []
    for where, idle, blank in (("begin", ends.head, ends.blank_head), ("end", ends.tail, ends.blank_tail)):
        for count, what in ((blank, "blank steps (zeros, or black frames)"), (idle - blank, "steps of rest")):
            episodes = np.flatnonzero(count >= 2)
            if len(episodes):
                least, most = count[episodes].min(), count[episodes].max()
                many = f"{most}" if least == most else f"{least} to {most}"
                verb = where if len(episodes) > 1 else f"{where}s"
                lines.append(f"{_named(store, episodes)} {verb} with {many} {what}: see --trim-idle")
    stuck = longest_constant(store)
    episodes = np.flatnonzero(stuck > STUCK_SECONDS * store.fps)
    if len(episodes):
        longest = stuck[episodes].max() / store.fps
        lines.append(f"the action does not change for up to {longest:.1f} s in {_named(store, episodes)}")
    lines += cautions(store)
    return lines + jumps("state", store.state, store) + jumps("action", store.action, store)


def copies(store: EpisodeStore) -> list[str]:
    """Episodes with the same numbers as an earlier one, in lines for people."""
    lengths = np.diff(store.episode_starts)
    middle = store.episode_starts[:-1] + lengths // 2  # one step of each: few that differ agree in it
    steps = zip(lengths.tolist(), store.state[middle], store.action[middle], strict=True)
    glimpses = [(length, state.tobytes(), action.tobytes()) for length, state, action in steps]
    often, found = Counter(glimpses), {}
    for e in (e for e, glimpse in enumerate(glimpses) if often[glimpse] > 1):
        first, last = store.episode_starts[e : e + 2]
        numbers = store.state[first:last].tobytes() + store.action[first:last].tobytes()
        found.setdefault(hashlib.sha256(numbers).digest(), []).append(e)
    groups = [_named(store, group) for group in found.values() if len(group) > 1]
    more = f", and {len(groups) - FEW} more such groups" * (len(groups) > FEW)
    what = "are the same in every step: such copies weigh more, and can be held out and trained on at once"
    return [f"{'; '.join(groups[:FEW])}{more} {what}"] if groups else []


def cautions(store: EpisodeStore, action_offset: int = 0, relative: bool = False) -> list[str]:
    """Faults in the actions that make a policy trained on them useless, in lines for people."""
    lines = []
    if action_offset == 0 and np.array_equal(store.state, store.action):
        lines.append(
            "the action is the state of the same step: with --action-offset 1 it is that of the next"
        )
    if relative:
        found = jumps("state", store.state, store) + jumps("action", store.action, store)
        lines += [f"{line}: so do relative actions; angles must not wrap for them" for line in found]
    return lines


def differences_already(store: EpisodeStore, pairs: np.ndarray) -> list[int]:
    """Action dimensions that seem to be differences already: they follow the state's change, not the state.

    An absolute target is near the state, so it differs from the state by less than the state's spread; a
    difference is as far from the state as if the two were unrelated.

    Args:
        pairs: (A,), the state dimension that is the same quantity as each action dimension, or -1.
    """
    steps = np.flatnonzero(np.diff(episode_of_steps(store)) == 0)
    found = []
    for dim in np.flatnonzero(pairs >= 0):
        state, action = (x.astype(np.float64) for x in (store.state[:, pairs[dim]], store.action[:, dim]))
        change, action = state[steps + 1] - state[steps], action[steps]
        away, spread = (action - state[steps]).std(), state.std()
        if min(change.std(), action.std()) > 0 and away > 0.8 * spread:
            found += [int(dim)] if np.corrcoef(action, change)[0, 1] > 0.5 else []
    return found


def longest_constant(store: EpisodeStore) -> np.ndarray:
    """Longest run of steps with the same action in each episode, idle ends not counted: (E,) int64."""
    ends, longest = idle_ends(store), []
    for e in range(store.num_episodes):
        first, last = store.episode_starts[e] + ends.head[e], store.episode_starts[e + 1] - ends.tail[e]
        changes = np.flatnonzero((np.diff(store.action[first:last], axis=0) != 0).any(1)) + 1
        longest.append(np.diff([0, *changes, max(last - first, 0)]).max())
    return np.array(longest, np.int64)


def jumps(part: str, recorded: np.ndarray, store: EpisodeStore) -> list[str]:
    """Dimensions of a `part`, (S, D), that jump from one step to the next, in lines for people.

    A jump is more than half of the dimension's range, or more than 15 % of it and undone in the next step,
    and twenty times its usual change, so a binary gripper does not jump.
    """
    found: dict[tuple[int, ...], list[str]] = {}  # dimensions by the episodes in which they jump
    names = getattr(store, f"{part}_names")
    for name, values in zip(names, recorded.T, strict=True):
        delta = np.diff(values.astype(np.float64))
        delta[store.episode_starts[1:-1] - 1] = 0  # from one episode to the next
        size, extent = np.abs(delta), float(np.ptp(values))
        moving = size[size > 0]
        if extent == 0 or not len(moving):
            continue
        back = (np.sign(delta[:-1]) == -np.sign(delta[1:])) & (size[1:] > 0.5 * size[:-1])
        undone = np.append(back, False) | np.append(False, back)  # there and back
        far = (size > 0.5 * extent) | ((size > 0.15 * extent) & undone)
        rows = np.flatnonzero(far & (size > 20 * np.median(moving)))
        if len(rows):
            episodes = tuple(np.unique(store.episode_of(rows)).tolist())
            found.setdefault(episodes, []).append(f"{name} by {size[rows].max():.3g}")
    return [
        f"the {part} jumps between two steps in {_named(store, episodes)}: {_some(sizes)}"
        for episodes, sizes in found.items()
    ]


def _named(store: EpisodeStore, episodes: Sequence[int]) -> str:
    numbers = store.episode_indices[np.asarray(episodes)].tolist()
    return f"episode{'s' * (len(numbers) > 1)} {_some(numbers)}"


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - FEW} more" if len(items) > FEW else ""
    return ", ".join(map(str, items[:FEW])) + more
