"""Who gets a slot: first come, first served, in a line of bounded length, and nobody while the machine is too slow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.engine.session import EngineSession, OnEvent
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import EngineFullError, StreamingError
from streaming.server.loop_calls import LoopCalls

_LOOK_AGAIN_S = 0.5
"""How often those in line look whether the machine has caught up. A slot that becomes free wakes them at once."""


class OverloadedError(EngineFullError):
    """There may be a free slot, but steps take too long already."""

    code = "overloaded"


class StoppingError(StreamingError):
    """The server takes no new sessions: it is about to stop."""

    code = "stopping"
    passes = True


class Admission:
    """Gives out the engine's slots. queue: how many may wait in line when there is none."""

    def __init__(self, engine: Engine, queue: int = 0) -> None:
        self._engine, self.queue = engine, queue
        self._line: deque[Callable[[int], None]] = deque()
        self._changed = asyncio.Event()
        self._events: LoopCalls | None = None
        self.stopping = False

    @property
    def waiting(self) -> int:
        """Return how many stand in line."""
        return len(self._line)

    def stop(self) -> None:
        """Let nobody in from here on, and send away those in line."""
        self.stopping = True
        self._changed.set()

    def released(self) -> None:
        """Note that a session has ended, so that the next in line may try."""
        self._changed.set()

    async def attach(
        self,
        on_event: OnEvent,
        sampling: Sampling,
        slides: bool,
        waiting: Callable[[int], None],
        snapshot: SessionSnapshot | None = None,
    ) -> EngineSession:
        """Return a slot, now or after a wait. `waiting` is told the place in line, 1 for the next, when it changes.

        `on_event` is called by the loop, which is the same for all sessions. snapshot: see `Engine.attach`.
        Raises `EngineFullError`, `OverloadedError`, `StoppingError`, `EngineStoppedError`. Cancel it to leave the line.
        """
        if not self._line:
            try:
                return self._try(on_event, sampling, slides, snapshot)
            except EngineFullError:
                if not self.queue:
                    raise
        if len(self._line) >= self.queue:
            raise EngineFullError(f"all slots are taken and {len(self._line)} are waiting; try again later")
        self._line.append(waiting)
        waiting(len(self._line))
        try:
            while True:
                self._changed.clear()
                if self._line[0] is waiting or self.stopping:
                    try:
                        return self._try(on_event, sampling, slides, snapshot)
                    except EngineFullError:
                        pass
                try:
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            place = self._line.index(waiting)
            del self._line[place]
            for number, other in enumerate(self._line, 1):
                if number > place:
                    other(number)
            self._changed.set()

    def _try(
        self, on_event: OnEvent, sampling: Sampling, slides: bool, snapshot: SessionSnapshot | None
    ) -> EngineSession:
        if self.stopping:
            raise StoppingError("the server is about to stop; try another one, or again in a while")
        if self._engine.overloaded:
            raise OverloadedError("the machine cannot keep up with the sessions that it has; try again later")
        if self._events is None:
            self._events = LoopCalls()
        return self._engine.attach(partial(self._events.put, on_event), sampling, slides, snapshot)
