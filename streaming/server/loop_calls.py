"""Calls from other threads to the event loop, which wake it once for many."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

Value = TypeVar("Value")


class LoopCalls:
    """Has the loop in which it is made call functions, and wakes it once for many.

    A step has an event for every session in it, and each wake-up of its own is a system call here, another one there,
    and a fight for the interpreter in between.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._woken = False

    def put(self, function: Callable[[Value], None], value: Value) -> None:
        """Have the loop call this function with this value, in the order of these calls. From any thread."""
        self._posted.append((function, value))
        if not self._woken:  # else the loop has yet to look, and finds this too
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: the process is going down, nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._posted:
            function, value = self._posted.popleft()
            try:
                function(value)
            except Exception as error:  # each by itself: no call can fail another
                context = {"message": "a session failed over what another thread had for it", "exception": error}
                self._loop.call_exception_handler(context)
