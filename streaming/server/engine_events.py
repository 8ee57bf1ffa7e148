"""Events on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from streaming.engine.events import Event
from streaming.engine.session import OnEvent


class EngineEvents:
    """Hands events over to the loop in which it is made, and wakes it once for many.

    A step has an event for every session in it, and each wake-up of its own is a system call here, another one there,
    and a fight for the interpreter in between.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[OnEvent, Event]] = deque()
        self._woken = False

    def put(self, on_event: OnEvent, event: Event) -> None:
        """Have the loop call `on_event`, in the order of these calls. From any thread."""
        self._posted.append((on_event, event))
        if not self._woken:  # else the loop has yet to look, and finds this too
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: the process is going down, nobody listens
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._posted:
            on_event, event = self._posted.popleft()
            try:
                on_event(event)
            except Exception as error:  # each on its own: none can fail another
                context = {"message": "a session's `on_event` failed", "exception": error}
                self._loop.call_exception_handler(context)
