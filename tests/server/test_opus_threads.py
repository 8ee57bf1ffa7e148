"""Work for the threads that encode Opus."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from streaming.server.opus_threads import OpusThreads, WorkThreads
from tests.server.live_server import run


def test_what_waits_is_done_in_order_by_a_thread_that_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread was woken for each spoken frame, and the loop for each that was finished."""

    async def scenario() -> None:
        threads, go, order = WorkThreads(1), threading.Event(), list[int]()

        def first() -> list[str | bytes]:
            go.wait(10)
            return ["first"]

        def then(number: int) -> list[str | bytes]:
            order.append(number)
            return [str(number)]

        woken: list[object] = []
        submit = threads._threads.submit
        monkeypatch.setattr(threads._threads, "submit", lambda *work: woken.append(work) or submit(*work))
        works = [threads.start(first), *(threads.start(lambda number=number: then(number)) for number in range(20))]
        go.set()
        for work in works:
            await work.finished.wait()
        assert [work.result() for work in works] == [["first"], *([str(number)] for number in range(20))]
        assert order == [*range(20)] and len(woken) == 1

    run(scenario())


def test_work_that_comes_when_a_thread_has_just_found_none_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that came between a thread's last look and its rest lay until other work came: a session fell silent."""

    async def scenario() -> None:
        threads, found_none, go = WorkThreads(1), asyncio.Event(), threading.Event()
        loop, put = asyncio.get_running_loop(), threads._calls.put

        def put_late(function: Callable[[None], None], value: None) -> None:
            if function == threads._rests:
                loop.call_soon_threadsafe(found_none.set)
                go.wait(10)
            put(function, value)

        monkeypatch.setattr(threads._calls, "put", put_late)
        async with asyncio.timeout(20):
            await threads.start(lambda: ["first"]).finished.wait()
            await found_none.wait()
            work = threads.start(lambda: ["second"])
            go.set()
            await work.finished.wait()
        assert work.result() == ["second"]

    run(scenario(), 30)


def test_what_fails_is_told_to_its_owner_alone() -> None:
    def fails() -> list[str | bytes]:
        raise ValueError("this one's fault")

    async def scenario() -> None:
        threads = WorkThreads(2)
        works = [threads.start(lambda: ["good"]), threads.start(fails), threads.start(lambda: ["good"])]
        for work in works:
            await work.finished.wait()
        assert works[0].result() == works[2].result() == ["good"]
        with pytest.raises(ValueError, match="this one's fault"):
            works[1].result()

    run(scenario())


def test_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    async def scenario() -> None:
        threads, go = OpusThreads().encoders, threading.Event()
        at_once: list[int] = []

        def blocks() -> list[str | bytes]:
            at_once.append(threading.get_ident())
            go.wait(10)
            return []

        works = [threads.start(blocks) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert len(at_once) == 2
        go.set()
        for work in works:
            await work.finished.wait()
        assert len(at_once) == 6 and len(set(at_once)) <= 2

    run(scenario())
