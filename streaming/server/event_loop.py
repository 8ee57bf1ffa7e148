"""The server's event loop, which handles together what comes within a moment."""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_TOGETHER_S = 0.002
"""The loop waits for something new no more often than this. Whoever comes alone does not wait; of hundreds of sessions,
several come within this time, and one wake-up serves them all. It is a fortieth of a frame.
"""
Result = TypeVar("Result")


class GatheringSelector(selectors.DefaultSelector):
    """Wait for sockets as the system's selector does, but let `_TOGETHER_S` pass from one wait's end to the next's.

    What is due at once, or before that time is over, is not kept waiting. now, sleep: in seconds, as in `time`.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__()
        self._now, self._sleep = now, sleep
        self._waited_until = -_TOGETHER_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, after `timeout` seconds at the latest; None: whenever something is."""
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        rest = self._waited_until + _TOGETHER_S - self._now()
        if rest > 0:
            early = rest if timeout is None else min(rest, timeout)
            self._sleep(early)
            timeout = None if timeout is None else timeout - early
        ready = super().select(timeout)
        self._waited_until = self._now()
        return ready


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run this in a loop of its own, as `asyncio.run` does."""
    with asyncio.Runner(loop_factory=None if sys.platform == "win32" else _gathering_loop) as runner:
        return runner.run(main)


def _gathering_loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(GatheringSelector())
