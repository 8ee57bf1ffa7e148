"""Work for the threads that code Opus."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from streaming.server.opus_threads import OpusThreads, WorkThreads
from tests.server.live_server import run


class Coder:
    """Codes numbers, by making text of them, once it may go on. calls: what it was given at once, in order."""

    def __init__(self) -> None:
        self.go, self.calls, self.threads = threading.Event(), list[list[int]](), list[int]()

    def __call__(self, numbers: Sequence[int]) -> list[str]:
        self.threads.append(threading.get_ident())
        self.go.wait(10)
        self.calls.append(list(numbers))
        return [str(number) for number in numbers]


def test_what_waits_is_coded_together_and_in_order_by_a_thread_that_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread was woken for each spoken frame, and the loop for each that was finished; then libopus was called for
    each by itself.
    """

    async def scenario() -> None:
        coder = Coder()
        threads, woken, finished = WorkThreads(coder, 1, 8), list[object](), list[object]()
        submit = threads._threads.submit
        monkeypatch.setattr(threads._threads, "submit", lambda *work: woken.append(work) or submit(*work))
        first = threads.start([0], list)
        while not coder.threads:
            await asyncio.sleep(0.01)
        works = [first, *(threads.start([number, 100 + number], list) for number in range(1, 13))]
        for work in works:
            work.then = lambda work=work: finished.append(work)
        coder.go.set()
        assert [await work for work in works] == [["0"], *([str(n), str(100 + n)] for n in range(1, 13))]
        assert coder.calls[0] == [0] and [len(call) for call in coder.calls] == [1, 16, 8]
        assert coder.calls[1][:4] == [1, 101, 2, 102]
        assert finished == works and len(woken) == 1

    run(scenario())


def test_threads_share_what_waits() -> None:
    """One would take all that comes of a step, while the others of the machine's processors have nothing to do."""

    async def scenario() -> None:
        coder = Coder()
        threads = WorkThreads(coder, 2, 8)
        works = [threads.start([number], list) for number in range(6)]
        coder.go.set()
        for work in works:
            await work
        assert sorted(number for call in coder.calls for number in call) == [*range(6)]
        assert max(map(len, coder.calls)) <= 3

    run(scenario())


def test_work_that_comes_when_a_thread_has_just_found_none_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that came between a thread's last look and its rest lay until other work came: a session fell silent."""

    async def scenario() -> None:
        coder = Coder()
        coder.go.set()
        threads, found_none, go = WorkThreads(coder, 1, 8), asyncio.Event(), threading.Event()
        loop, put = asyncio.get_running_loop(), threads._calls.put

        def put_late(function: Callable[[None], None], value: None) -> None:
            if function == threads._rests:
                loop.call_soon_threadsafe(found_none.set)
                go.wait(10)
            put(function, value)

        monkeypatch.setattr(threads._calls, "put", put_late)
        async with asyncio.timeout(20):
            await threads.start([1], list)
            await found_none.wait()
            work = threads.start([2], list)
            go.set()
            assert await work == ["2"]

    run(scenario(), 30)


def test_what_fails_is_told_to_its_owner_alone() -> None:
    def fails(_: Sequence[str]) -> list[str]:
        raise ValueError("this one's fault")

    async def scenario() -> None:
        coder = Coder()
        threads = WorkThreads(coder, 1, 8)
        works = [threads.start([1], list), threads.start([2], fails), threads.start([3], list)]
        coder.go.set()
        for work in works:
            await work.wait()
        assert [works[0].result(), works[2].result()] == [["1"], ["3"]]
        with pytest.raises(ValueError, match="this one's fault"):
            works[1].result()

    run(scenario())


def test_a_fault_of_the_coder_is_told_to_all_that_it_coded_together() -> None:
    """They waited for ever, and the thread that ended was not there for others."""

    def breaks(numbers: Sequence[int]) -> list[str]:
        if 0 in numbers:
            raise ValueError("the coder's fault")
        return [str(number) for number in numbers]

    async def scenario() -> None:
        threads = WorkThreads(breaks, 1, 8)
        works = [threads.start([number], list) for number in (0, 1)]
        for work in works:
            with pytest.raises(ValueError, match="the coder's fault"):
                await work
        assert await threads.start([2], list) == ["2"]

    run(scenario())


def test_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    coder = Coder()
    monkeypatch.setattr("streaming.protocol.opus_calls.encode", coder)

    async def scenario() -> None:
        threads = OpusThreads().encoders
        works = [threads.start([number], list) for number in range(40)]  # type: ignore[list-item]
        await asyncio.sleep(0.1)
        assert len(coder.threads) == 2
        coder.go.set()
        for work in works:
            await work.wait()
        assert len(coder.threads) >= 5 and len(set(coder.threads)) <= 2

    run(scenario())
