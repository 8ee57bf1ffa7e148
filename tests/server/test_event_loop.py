"""The server's event loop: who waits for whom, by a clock that the test moves."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Iterator

import pytest

from streaming.server import event_loop
from streaming.server.event_loop import GatheringSelector

_TOGETHER_S = event_loop._TOGETHER_S


class Clock:
    """A clock that stands but for its sleeps, which it notes."""

    def __init__(self) -> None:
        self.now = 5.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def selector(clock: Clock) -> Iterator[GatheringSelector]:
    """Has a socket that may be written to, so that no wait lasts."""
    with GatheringSelector(lambda: clock.now, clock.sleep) as selector:
        mine, other = socket.socketpair()
        with mine, other:
            selector.register(mine, selectors.EVENT_WRITE)
            yield selector


def test_who_comes_alone_does_not_wait(selector: GatheringSelector, clock: Clock) -> None:
    assert selector.select(None)
    clock.now += _TOGETHER_S
    assert selector.select(None)
    assert clock.slept == []


def test_what_comes_soon_after_waits_for_what_comes_with_it(selector: GatheringSelector, clock: Clock) -> None:
    """Every message of hundreds of sessions woke the loop by itself, which cost more than the message."""
    selector.select(None)
    clock.now += _TOGETHER_S / 4
    assert selector.select(None)
    assert clock.slept == [pytest.approx(0.75 * _TOGETHER_S)]


def test_nothing_that_is_due_waits(selector: GatheringSelector, clock: Clock) -> None:
    selector.select(None)
    assert selector.select(0)
    selector.select(_TOGETHER_S / 8)
    assert clock.slept == [pytest.approx(_TOGETHER_S / 8)]


def test_a_burst_that_is_handled_at_once_does_not_begin_the_wait_anew(
    selector: GatheringSelector, clock: Clock
) -> None:
    """A loop that always has work would never be late enough to be let through."""
    selector.select(None)
    clock.now += _TOGETHER_S / 2
    selector.select(0)
    selector.select(None)
    assert clock.slept == [pytest.approx(_TOGETHER_S / 2)]


def test_it_runs_what_asyncio_runs() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        await asyncio.to_thread(loop.call_soon_threadsafe, woken.set)
        await woken.wait()
        return "done"

    assert event_loop.run(main()) == "done"
