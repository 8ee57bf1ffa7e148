"""A server that is watched, and a healthy session beside whatever is done to it.

The promise that every test here checks is the same: the healthy session says what it says when it is alone, bit for
bit and in time; afterwards all slots are free and no task, thread or file descriptor is left.

Time that the machine gave to others does not count, neither here nor there: the kernel knows for how long each thread
was ready to run and had no processor, and that is taken off. So a verdict is the same on a busy machine.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from streaming.audio import FRAME, FRAME_RATE
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionStart
from streaming.server import server
from tests.engine.stub_step import StubStep
from tests.server.live_server import Client, client, run, serving

SPEECH = (np.arange(3 * FRAME) % 251).astype(np.int16)
FRAMES_A_TURN = 8
SAMPLING = SamplingOptions(seed=7)
LIVE = SessionStart(max_seconds=FRAMES_A_TURN / FRAME_RATE, lead_ms=320, sampling=SAMPLING)
FAST = SessionStart(max_seconds=FRAMES_A_TURN / FRAME_RATE, pace="fast", sampling=SAMPLING)
ENDLESS = SessionStart(max_seconds=3600, pace="fast")
STEP_S = 0.002
HELD_S = 0.1
"""Nobody may take more of the server's event loop at once, in processor time of its own thread."""
LATE_S = 1.0
"""A healthy session plays from its first frame on, without a buffer. More lateness than this fails a test: somebody
waited. Work that delays a frame is seen by `HELD_S` long before, and does not depend on the clock; less lateness than
this comes about by itself where client, attacker and server share one interpreter on a machine that does other things.
"""
SLOT_BACK_S = 2.0
"""A slot is free this soon after its client is known to be gone."""
PATIENCE_S = 10.0


@dataclass
class Watched:
    """A live server over the stub step, and what it was like before anybody came.

    loop: the server's; trust: for clients of a server with TLS; tasks, descriptors, threads: how many there were.
    held_s: the most of the loop's time that was ever taken at once, give or take 10 ms.
    """

    engine: Engine
    step: StubStep
    url: str
    http: str
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]
    join: Callable[[], None]
    trust: ssl.SSLContext | None = None
    tasks: int = 0
    descriptors: int = 0
    threads: frozenset[threading.Thread] = frozenset()
    held_s: float = 0.0
    _used_s: float = 0.0

    def watch_the_loop(self) -> None:
        """Called by the loop, again and again."""
        used_s = time.thread_time()
        if self._used_s:
            self.held_s = max(self.held_s, used_s - self._used_s)
        self._used_s = used_s
        self.loop.call_later(0.01, self.watch_the_loop)

    @property
    def port(self) -> int:
        return int(self.http.rsplit(":", 1)[1])

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.http}/health", timeout=PATIENCE_S, context=self.trust) as response:  # noqa: S310
            return dict(json.loads(response.read()))

    def sessions(self) -> int:
        return int(self.health()["sessions"])

    def count_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE_S)

    def assert_clean(self) -> None:
        """Nothing is left of anybody, and the server is ready for the next."""
        wait_for("free slots", lambda: self.sessions() == 0)
        wait_for("tasks to end", lambda: self.count_tasks() <= self.tasks)
        wait_for(
            "file descriptors to be closed",
            lambda: count_descriptors() <= self.descriptors or collected_descriptors() <= self.descriptors,
        )
        assert set(threading.enumerate()) <= self.threads, "a thread is left"
        assert self.engine.failure is None
        assert self.health()["status"] == "ready"
        assert run(_turns(self.url, 1, self.trust), PATIENCE_S) == alone(1)


class _Starved:
    """For how long this process has been kept from running so far.

    The sum over its threads of the time that each was ready to run and had no processor (Linux,
    Documentation/scheduler/sched-stats.rst), and the time that the machine itself had none (`steal` in proc(5)).
    0 where the kernel does not tell.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}  # nanoseconds, by thread: what a thread has waited stays when it ends
        self._sum = self._stolen = 0

    def __call__(self) -> float:
        """Return the time in seconds, which never falls. While this process has no file descriptor left nothing new is
        learned.
        """
        with self._lock, suppress(OSError):
            for thread in os.listdir("/proc/self/task"):
                with suppress(OSError, IndexError):  # the thread has ended, or the kernel keeps no such figures
                    waited = int(Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii").split()[1])
                    last = self._last.get(thread, 0)
                    self._sum += waited - last if waited >= last else waited  # less: the number is another thread's
                    self._last[thread] = waited
            self._stolen = int(Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[8])
        return 1e-9 * self._sum + self._stolen / os.sysconf("SC_CLK_TCK")


_starved_s = _Starved()


@dataclass(frozen=True)
class Since:
    """A point in time. `seconds` since then, of those in which this process could run."""

    at_s: float
    starved_s: float

    @staticmethod
    def now() -> Since:
        return Since(time.monotonic(), _starved_s())

    @property
    def seconds(self) -> float:
        return self.until(Since.now())

    def until(self, later: Since) -> float:
        return max(0.0, later.at_s - self.at_s - (later.starved_s - self.starved_s))


def wait_for(what: str, happened: Callable[[], bool], seconds: float = PATIENCE_S) -> float:
    """Polls. Returns after how many seconds it was so; fails if it never was."""
    begun = Since.now()
    while not happened():
        assert begun.seconds < seconds, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)
    return begun.seconds


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def collected_descriptors() -> int:
    gc.collect()
    return count_descriptors()


def resident_mib() -> float:
    """Return how much memory this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def watched(
    slots: int = 4,
    step_s: float = STEP_S,
    *,
    step: StubStep | None = None,
    trust: ssl.SSLContext | None = None,
    **options: Any,
) -> Iterator[Watched]:
    """A server on a free port, with `ServerOptions`. step: instead of a plain one. trust: with `tls`, what clients
    trust.
    """
    step = step or StubStep(slots, delay_s=lambda: step_s)
    loops: list[asyncio.AbstractEventLoop] = []
    real_run = server.run_server

    async def noting_the_loop(*args: Any, **kwargs: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await real_run(*args, **kwargs)

    noted = mock.patch("tests.server.live_server.run_server", noting_the_loop)
    gc.collect()
    gc.freeze()  # as server.py does
    with Engine(step, "stub") as engine, noted, serving(engine, **options) as live:
        it = Watched(engine, step, live.url, live.http, loops[0], live.stop, live.join, trust)
        run(_turns(it.url, 1, trust))
        wait_for("the first session to end", lambda: it.sessions() == 0)
        it.tasks, it.descriptors = it.count_tasks(), count_descriptors()
        it.threads = frozenset(threading.enumerate())
        it.loop.call_soon_threadsafe(it.watch_the_loop)
        try:
            yield it
        finally:
            gc.unfreeze()


@functools.cache
def _long_alone() -> list[bytes]:
    with Engine(StubStep(1), "stub") as engine, serving(engine) as live:
        return run(_turns(live.url, 80))


def alone(turns: int) -> list[bytes]:
    """What a session says in its first turns when nobody else is there: one run, at fast pace, on a server of its
    own.
    """
    said = _long_alone()
    assert turns <= len(said), "the test took too long: the reference is shorter"
    return said[:turns]


async def _turns(url: str, count: int, trust: ssl.SSLContext | None = None) -> list[bytes]:
    async with client(url, FAST, ssl=trust) as session:
        return [(await _turn(session, turn))[0] for turn in range(1, count + 1)]


async def _turn(session: Client, turn: int) -> tuple[bytes, float, float]:
    """The audio, seconds to the first frame, and by how much the latest frame missed its time."""
    await session.hear(SPEECH, turn=turn)
    asked = Since.now()
    await session.send(messages.Speak(turn=turn))
    arrivals: list[Since] = []
    while True:
        data = await session.socket.recv()
        if isinstance(data, bytes):
            arrivals.append(Since.now())
            session.take(messages.decode_audio(data))
            continue
        message = messages.decode_server(data)
        if isinstance(message, messages.TurnDone):
            break
        assert isinstance(message, messages.TurnSpeaking), message
    late = max(arrivals[0].until(at) - index / FRAME_RATE for index, at in enumerate(arrivals))
    return session.spoken(turn).tobytes(), asked.until(arrivals[0]), late


@dataclass
class Healthy:
    """A session that talks, turn after turn, while others misbehave.

    first_frame_s: the longest wait for a first frame; late_s: the most by which a frame missed its time.
    """

    turns: list[bytes] = field(default_factory=list)
    first_frame_s: float = 0.0
    late_s: float = 0.0
    failure: BaseException | None = None

    def talk(self, server: Watched, enough: threading.Event) -> None:
        try:
            run(self._talk(server, enough))
        except BaseException as error:  # handed to the test's thread
            self.failure = error

    async def _talk(self, server: Watched, enough: threading.Event) -> None:
        async with client(server.url, LIVE, ssl=server.trust) as session:
            while not enough.is_set():
                said, first_s, late_s = await _turn(session, len(self.turns) + 1)
                self.turns.append(said)
                self.first_frame_s, self.late_s = max(self.first_frame_s, first_s), max(self.late_s, late_s)

    def waits_for_turns(self, more: int) -> None:
        """Return when so many more turns are over."""
        target = len(self.turns) + more
        wait_for("a healthy turn", lambda: self.failure is not None or len(self.turns) >= target)


@contextmanager
def beside_a_healthy_session(
    server: Watched, slot_back_s: float = SLOT_BACK_S, held_s: float | None = HELD_S
) -> Iterator[Healthy]:
    """Run a healthy session around the block, and check that it says what it should in time.

    When the block ends, its clients are gone, or the server has to notice by itself: their slots must be free within
    `slot_back_s`. held_s: the most of the event loop's time that may be taken at once; None: thousands of connections
    in this process keep the interpreter itself busy, and the test judges by counting what is done at once.
    """
    healthy, enough = Healthy(), threading.Event()
    thread = threading.Thread(target=healthy.talk, args=(server, enough), name="healthy")
    thread.start()
    try:
        healthy.waits_for_turns(1)
        server.held_s = 0.0
        yield healthy
        back_s = wait_for("the slots", lambda: healthy.failure is not None or server.sessions() == 1, slot_back_s)
        healthy.waits_for_turns(2)  # one may have begun before
    finally:
        enough.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the healthy session hangs"
    if healthy.failure is not None:
        raise healthy.failure
    assert healthy.turns == alone(len(healthy.turns)), "the healthy session said something else"
    print(
        f"healthy: {len(healthy.turns)} turns, first frame {1e3 * healthy.first_frame_s:.0f} ms at most, "
        f"late {1e3 * healthy.late_s:.0f} ms at most; loop held {1e3 * server.held_s:.0f} ms at most; "
        f"slots back after {back_s:.2f} s"
    )
    if held_s is None:
        return
    assert server.held_s < held_s, f"the event loop was held for {server.held_s:.2f} s"
    assert healthy.first_frame_s < LATE_S, f"a first frame took {healthy.first_frame_s:.2f} s"
    assert healthy.late_s < LATE_S, f"a frame came {healthy.late_s:.2f} s late"
