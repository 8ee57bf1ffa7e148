"""Threads that encode and decode Opus for all sessions of an event loop: libopus needs no interpreter's lock, and what
it leaves in a processor's caches slows down whatever the same thread does next.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from streaming.server.loop_calls import LoopCalls

_MOST_THREADS = 8
"""They do nothing but encode, so more than there are processors would only take them from each other."""

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A function that a thread calls. Its result is given to `kept`, in the loop, before anybody else knows of it.

    finished: set in the loop, after that. then: called in the loop right after. It can be awaited, too.
    """

    def __init__(self, function: Callable[[], Result], kept: Callable[[Result], None] | None = None) -> None:
        self._function, self._kept = function, kept
        self._result: Result | None = None
        self._error: Exception | None = None
        self.finished = asyncio.Event()
        self.then: Callable[[], None] | None = None

    def do(self) -> None:
        """Call it, in a thread."""
        try:
            self._result = self._function()
        except Exception as error:  # it is raised where the result is asked for
            self._error = error

    def finish(self, _: None) -> None:
        """Say in the loop that it was called."""
        if self._kept is not None and self._error is None:
            self._kept(self.result())
        self.finished.set()
        if self.then is not None:
            self.then()

    def __await__(self) -> Generator[Any, None, Result]:
        yield from self.finished.wait().__await__()
        return self.result()

    def result(self) -> Result:
        """Return what the function returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None is a result, too


class WorkThreads:
    """Call functions in the order in which they come. What waits is bounded by its owners: each has a few at a time.

    Threads are woken once for all that comes in one turn of the loop. A thread that has called one function looks for
    the next by itself, and the loop is woken once for all that are finished by then: with a wake-up of a thread and of
    the loop for each of them, the wake-ups cost as much as all else of a frame.
    """

    def __init__(self, most: int) -> None:
        """most: threads. With one, functions are also finished in that order."""
        self._calls = LoopCalls()
        self._loop = asyncio.get_running_loop()
        self._most = most
        self._threads = ThreadPoolExecutor(most, "opus")
        self._waiting: deque[Work[Any]] = deque()
        self._busy = 0  # threads at work, as far as the loop knows
        self._waking = False

    def start(self, function: Callable[[], Result], kept: Callable[[Result], None] | None = None) -> Work[Result]:
        """Have a thread call this, from the next turn of the loop on. From the loop. kept: see `Work`."""
        work = Work(function, kept)
        self._waiting.append(work)
        if not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake)
        return work

    def _wake(self) -> None:
        self._waking = False
        for _ in range(min(len(self._waiting), self._most - self._busy)):
            self._busy += 1
            self._threads.submit(self._do_all)

    def _do_all(self) -> None:
        while True:
            try:
                work = self._waiting.popleft()
            except IndexError:
                break
            work.do()
            self._calls.put(work.finish, None)
        self._calls.put(self._rests, None)

    def _rests(self, _: None) -> None:
        """Note that a thread has found nothing more to do, and start it again if there is something by now."""
        self._busy -= 1
        self._wake()


class OpusThreads:
    """The threads of all sessions. One decodes: a session's messages are decoded in the order in which they came."""

    def __init__(self) -> None:
        self.encoders = WorkThreads(min(_MOST_THREADS, os.cpu_count() or 1))
        self.decoder = WorkThreads(1)
