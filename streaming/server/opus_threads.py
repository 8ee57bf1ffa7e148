"""Threads that encode and decode Opus for all sessions of an event loop: libopus needs no interpreter's lock, and what
it leaves in a processor's caches slows down whatever the same thread does next.

A thread does nothing else: what is to be encoded is cut in the loop, and what was encoded is made messages of there.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from streaming.audio import Pcm16
from streaming.protocol import opus_calls
from streaming.protocol.libopus import LibopusError
from streaming.protocol.opus_calls import Block, Packet
from streaming.server.loop_calls import LoopCalls

_MOST_THREADS = 8
"""They do nothing but encode, so more than there are processors would only take them from each other."""
_ENCODED_TOGETHER = 8
"""Most frames that a thread encodes in one call. It takes 10 ms, and the first of them waits for the last."""
_DECODED_TOGETHER = 16
"""Most messages that are decoded in one call, in 3 ms."""

Part = TypeVar("Part")
Done = TypeVar("Done")
Result = TypeVar("Result")


class Work(Generic[Result]):
    """A message's parts, which a thread codes. make: makes the result of what became of them; it is called in the loop,
    before anybody else knows of it.

    then: called in the loop right after. It can be awaited, too.
    """

    __slots__ = ("_error", "_event", "_make", "_result", "finished", "parts", "then")

    def __init__(self, parts: Sequence[Any], make: Callable[[Sequence[Any]], Result]) -> None:
        self.parts, self._make = parts, make
        self.finished = False
        self.then: Callable[[], None] | None = None
        self._result: Result | None = None
        self._error: Exception | None = None
        self._event: asyncio.Event | None = None  # for who waits

    def finish(self, done: Sequence[Any] | Exception) -> None:
        """Take in the loop what became of the parts, or why nothing did."""
        try:
            if isinstance(done, Exception):
                raise done
            self._result = self._make(done)
        except Exception as error:  # it is raised where the result is asked for
            self._error = error
        self.finished = True
        if self._event is not None:
            self._event.set()
        if self.then is not None:
            self.then()

    async def wait(self) -> None:
        """Wait until it is finished."""
        if not self.finished:
            self._event = self._event or asyncio.Event()
            await self._event.wait()

    def __await__(self) -> Generator[Any, None, Result]:
        yield from self.wait().__await__()
        return self.result()

    def result(self) -> Result:
        """Return what `make` returned, or raise what went wrong."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None is a result, too


class WorkThreads(Generic[Part, Done]):
    """Code the parts of many works in one call, in the order in which they come. What waits is bounded by its owners:
    each has a few at a time.

    Threads are woken once for all that comes in one turn of the loop. A thread that is done looks for more by itself,
    and the loop is woken once for all that is finished by then: with a wake-up of a thread and of the loop for each of
    them, the wake-ups cost as much as all else of a frame.
    """

    def __init__(self, code: Callable[[Sequence[Part]], Sequence[Done]], most: int, together: int) -> None:
        """code: called in a thread. most: threads; with one, works are also finished in order. together: works whose
        parts are coded in one call, at most.
        """
        self._calls = LoopCalls()
        self._loop = asyncio.get_running_loop()
        self._code, self._most, self._together = code, most, together
        self._threads = ThreadPoolExecutor(most, "opus")
        self._waiting: deque[Work[Any]] = deque()
        self._busy = 0  # threads at work, as far as the loop knows
        self._waking = False

    def start(self, parts: Sequence[Part], make: Callable[[Sequence[Done]], Result]) -> Work[Result]:
        """Have a thread code these, from the next turn of the loop on. From the loop. make: see `Work`."""
        work = Work(parts, make)
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
        while works := self._share():
            for work, done in zip(works, self._coded(works), strict=True):
                self._calls.put(work.finish, done)
        self._calls.put(self._rests, None)

    def _share(self) -> list[Work[Any]]:
        """Return this thread's share of what waits."""
        works: list[Work[Any]] = []
        try:
            while len(works) < min(self._together, -(-(len(works) + len(self._waiting)) // self._most)):
                works.append(self._waiting.popleft())
        except IndexError:  # another thread has taken them
            pass
        return works

    def _coded(self, works: Sequence[Work[Any]]) -> list[Sequence[Done] | Exception]:
        try:
            done = self._code([part for work in works for part in work.parts])
        except Exception as error:  # it is raised where the result is asked for
            return [error] * len(works)
        found: list[Sequence[Done] | Exception] = []
        at = 0
        for work in works:
            found.append(done[at : at + len(work.parts)])
            at += len(work.parts)
        return found

    def _rests(self, _: None) -> None:
        """Note that a thread has found nothing more to do, and start it again if there is something by now."""
        self._busy -= 1
        self._wake()


class OpusThreads:
    """The threads of all sessions. One decodes: a session's messages are decoded in the order in which they came."""

    def __init__(self) -> None:
        most = min(_MOST_THREADS, os.cpu_count() or 1)
        self.encoders: WorkThreads[Block, bytes | LibopusError] = WorkThreads(
            opus_calls.encode, most, _ENCODED_TOGETHER
        )
        self.decoder: WorkThreads[Packet, Pcm16 | LibopusError] = WorkThreads(opus_calls.decode, 1, _DECODED_TOGETHER)
