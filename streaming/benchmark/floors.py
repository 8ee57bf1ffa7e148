"""The least time that a machine could take for a piece of work: from its rates, as measured and as seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streaming.benchmark.work import Work

Works = tuple[tuple[torch.dtype, Work], ...]
"""Pieces of work, done one after another, each with the kind of numbers that it multiplies."""


@dataclass(frozen=True)
class Rates:
    """A machine's limits. read: bytes a second; multiply: operations a second, by the kind of numbers."""

    read: float
    multiply: dict[torch.dtype, float]

    def floor_ms(self, works: Works) -> float:
        """Return the least time for a machine with these rates: it reads or it multiplies, at best both at once."""
        return 1e3 * sum(
            max(work.read_bytes / self.read, work.operations / self.multiply[kind]) for kind, work in works
        )

    def raised(self, seen: Sequence[tuple[Works, float]]) -> Rates:
        """Return rates that are at least those the machine was seen to reach, so that nothing was faster than its
        floor: a library's product may be slow where ours is not, and what fits a cache is read faster than memory.

        seen: works, and the milliseconds that they took.
        """
        read, multiply = self.read, dict(self.multiply)
        for works, ms in seen:
            if len(works) == 1:
                kind, work = works[0]
                read = max(read, 1e3 * work.read_bytes / ms)
                multiply[kind] = max(multiply[kind], 1e3 * work.operations / ms)
        rates = Rates(read, multiply)
        most = max((rates.floor_ms(works) / ms for works, ms in seen), default=1.0)
        if most > 1:  # what was done in a row was faster than one by one, for the machine is not always the same
            rates = Rates(read * most, {kind: rate * most for kind, rate in multiply.items()})
        return rates
