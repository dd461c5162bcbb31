"""Statistical tests of whether policies that acted in the same episodes differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Success of one policy compared with another's, in the same episodes."""

    episodes: int
    only_first: int
    """Episodes in which only the first policy succeeds."""
    only_second: int
    p: float
    """P-value of the exact paired test, corrected for the number of comparisons."""

    @property
    def points(self) -> float:
        """Success of the first minus that of the second, in percentage points."""
        return 100 * (self.only_first - self.only_second) / self.episodes

    @property
    def verdict(self) -> str:
        return "distinguishable" if self.p < 0.05 else "not distinguishable"


def compare(pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Compare policies in pairs by their outcomes in the same episodes, 1 or 0 for each."""
    corrected = holm([paired_test(first, second) for first, second in pairs])
    return [
        Difference(len(first), *only_one(first, second), p)
        for (first, second), p in zip(pairs, corrected, strict=True)
    ]


def only_one(first: str, second: str) -> tuple[int, int]:
    """Number of episodes in which only the first succeeds, and only the second."""
    pairs = list(zip(first, second, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def paired_test(first: str, second: str) -> float:
    """Exact McNemar test: p-value under the hypothesis that the policies are equally good."""
    from scipy.stats import binomtest

    wins, losses = only_one(first, second)
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for all comparisons together (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = max(largest, min((len(p_values) - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected
