"""Threads that encode Opus for all sessions of an event loop: libopus needs no interpreter's lock."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from streaming.server.loop_calls import LoopCalls

_MOST_THREADS = 8
"""They do nothing but encode, so more than there are processors would only take them from each other."""

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A function that a thread calls. finished: set in the loop, after that."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._result: Result | None = None
        self._error: Exception | None = None
        self.finished = asyncio.Event()

    def do(self) -> None:
        """Call it, in a thread."""
        try:
            self._result = self._function()
        except Exception as error:  # it is raised where the result is asked for
            self._error = error

    def finish(self, _: None) -> None:
        """Say in the loop that it was called."""
        self.finished.set()

    def result(self) -> Result:
        """Return what the function returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None is a result, too


class OpusThreads:
    """Call functions in the order in which they come. What waits is bounded by its owners: each has one at a time.

    A thread that has called one function looks for the next by itself, and the loop is woken once for all that are
    finished by then: with a wake-up of a thread and of the loop for each of them, the wake-ups cost as much as all
    else of a frame.
    """

    def __init__(self) -> None:
        self._calls = LoopCalls()
        self._most = min(_MOST_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._most, "opus")
        self._waiting: deque[Work[list[str | bytes]]] = deque()
        self._busy = 0  # threads at work, as far as the loop knows

    def start(self, function: Callable[[], list[str | bytes]]) -> Work[list[str | bytes]]:
        """Have a thread call this. From the loop."""
        work = Work(function)
        self._waiting.append(work)
        self._wake()
        return work

    def _wake(self) -> None:
        if self._waiting and self._busy < self._most:
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
