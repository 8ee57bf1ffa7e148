"""What other threads have for the loop, by the example of the engine's events."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from streaming.engine.events import Event, FrameHeard
from streaming.server import loop_calls
from streaming.server.loop_calls import LoopCalls


def event(number: int) -> Event:
    return FrameHeard(np.array([number]))


def numbers(events: list[Event]) -> list[int]:
    return [int(said.codes[0]) for said in events if isinstance(said, FrameHeard)]


def put_all(events: LoopCalls, count: int, *takers: Callable[[Event], None]) -> None:
    for number in range(count):
        events.put(takers[number % len(takers)], event(number))


def test_a_steps_events_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session's event woke the loop: a system call on either side and a fight for the interpreter, 256 times a
    step.
    """

    async def main() -> None:
        loop, events = asyncio.get_running_loop(), LoopCalls()
        wakes, wake = [], loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            wakes.append(1)
            return wake(*arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        one, other = list[Event](), list[Event]()
        for step in range(3):
            thread = threading.Thread(target=put_all, args=(events, 64, one.append, other.append))
            thread.start()
            thread.join()  # the loop is held meanwhile: this is its thread
            assert len(wakes) == step + 1
            await asyncio.sleep(0.01)
            assert numbers(one) == [*range(0, 64, 2)] * (step + 1), "in the order in which they were put"
            assert numbers(other) == [*range(1, 64, 2)] * (step + 1)

    asyncio.run(main())


def test_nothing_is_left_behind_by_a_loop_that_looks_meanwhile() -> None:
    """An event that is put while the loop empties the box is found by that look or by another wake-up."""

    async def main() -> None:
        events, found, done = LoopCalls(), list[Event](), asyncio.Event()

        def take(said: Event) -> None:
            found.append(said)
            if len(found) == 5_000:
                done.set()

        thread = threading.Thread(target=put_all, args=(events, 5_000, take))
        thread.start()
        async with asyncio.timeout(30):
            await done.wait()
        thread.join()
        assert numbers(found) == [*range(5_000)]

    asyncio.run(main())


def test_whenever_an_event_is_put_the_loop_finds_it() -> None:
    """An event that was put after the loop had looked for the last time, and before it said so, lay until the next one
    came: now and then a session hung. Here one is put at each line of a delivery in turn.
    """
    moments = itertools.count()

    async def put_at(line: int) -> bool:
        """Whether there is such a line."""
        events, found, left = LoopCalls(), list[Event](), [line]

        def at_each_line(frame: FrameType, what: str, _: object) -> Callable[..., Any] | None:
            if frame.f_code.co_filename != loop_calls.__file__ or frame.f_code is LoopCalls.put.__code__:
                return None
            if what in ("line", "return"):
                left[0] -= 1
                if left[0] == -1:
                    thread = threading.Thread(target=events.put, args=(found.append, event(2)))
                    thread.start()
                    thread.join()
            return at_each_line

        events.put(found.append, event(1))
        before = sys.gettrace()
        sys.settrace(at_each_line)
        try:
            await asyncio.sleep(0)  # it is delivered
        finally:
            sys.settrace(before)
        await asyncio.sleep(0.01)
        assert numbers(found) == ([1, 2] if left[0] < 0 else [1]), f"put at line {line}"
        return left[0] < 0

    while asyncio.run(put_at(next(moments))):
        pass
    assert next(moments) > 4


def test_an_owner_that_fails_takes_nobody_elses_events() -> None:
    async def main() -> None:
        events, found, failures = LoopCalls(), list[Event](), list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))

        def fails(_: Event) -> None:
            raise ValueError("this one's fault")

        for on_event in (found.append, fails, found.append):
            events.put(on_event, event(len(found)))
        await asyncio.sleep(0.01)
        assert len(found) == 2
        assert [str(failure) for failure in failures] == ["this one's fault"]

    asyncio.run(main())


def test_after_the_loop_nobody_listens() -> None:
    """An engine that outlives the server's loop for a moment fails no session over it."""

    async def main() -> LoopCalls:
        return LoopCalls()

    events = asyncio.run(main())
    events.put(lambda _: None, event(1))
