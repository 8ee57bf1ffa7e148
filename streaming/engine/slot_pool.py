"""Who owns which slot. The lowest free one is given out, so that steps stay narrow."""

from __future__ import annotations

import heapq

from streaming.errors import EngineFullError


class SlotPool:
    """`size` slots, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size))

    def acquire(self) -> int:
        """Return the lowest free slot. Raises `EngineFullError` if there is none."""
        if not self._free:
            raise EngineFullError(f"all {self.size} slots are taken")
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        assert 0 <= slot < self.size and slot not in self._free, slot
        heapq.heappush(self._free, slot)
