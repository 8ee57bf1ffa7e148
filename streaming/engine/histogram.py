"""A histogram of fixed bounds: what an engine's thread can afford to keep of every step."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """bounds: upper, inclusive, ascending. counts: how many values fell to each bound and no lower one, and at last how
    many were above all of them. total: the sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values since it was made. Not locked: whoever shares it between threads holds a lock."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        assert list(bounds) == sorted(set(bounds)), bounds
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> Counts:
        """Return the counts as they are now, which no longer change."""
        return Counts(self._bounds, tuple(self._counts), self._total)
