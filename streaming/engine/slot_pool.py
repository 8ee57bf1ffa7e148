"""The owners of the slots. Any free slot is as good as any other."""

from __future__ import annotations

from streaming.errors import EngineFullError


class SlotPool:
    """`size` slots, numbered from 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size))[::-1]

    def acquire(self) -> int:
        """Return a free slot: the one that was freed last, whose memory the system has given out already. Raises
        `EngineFullError` if there is none.
        """
        if not self._free:
            raise EngineFullError(f"all {self.size} slots are taken")
        return self._free.pop()

    def release(self, slot: int) -> None:
        assert 0 <= slot < self.size and slot not in self._free, slot
        self._free.append(slot)
