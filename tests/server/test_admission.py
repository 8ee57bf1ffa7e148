"""Waiting in line, being too slow, stopping: what happens around sessions rather than in them."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.engine.session import EngineSession
from streaming.errors import EngineFullError
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.admission import Admission
from tests.engine.stub_step import Recorder, StubStep, running
from tests.server.live_server import Client, LiveServer, client, get, run, serving

FAST = SessionStart(pace="fast", max_seconds=0.8)
SPEECH = np.zeros(3 * FRAME, np.int16)


@pytest.fixture
def step() -> Iterator[StubStep]:
    stub = StubStep(1)
    yield stub
    stub.allow_all()


async def _closed(session: Client) -> int | None:
    with suppress(ConnectionClosed):
        while True:
            await session.expect(messages.Pong)
    return session.socket.close_code


def test_those_in_line_are_told_their_place_and_served_in_order(step: StubStep) -> None:
    """Waiting in silence is what users of a peer's server complain of."""

    async def scenario(url: str) -> None:
        async with client(url, FAST) as first, connect(url) as a, connect(url) as b, connect(url) as c:
            second, third, fourth = Client(a), Client(b), Client(c)
            await second.send(FAST)
            assert (await second.expect(messages.SessionQueued)).place == 1
            await third.send(FAST)
            assert (await third.expect(messages.SessionQueued)).place == 2
            await fourth.send(FAST)
            assert (await fourth.expect(messages.SessionRefused)).code == "full"
            await first.send(messages.SessionClose())
            await second.expect(messages.SessionStarted)
            assert (await third.expect(messages.SessionQueued)).place == 1
            await second.hear(SPEECH)
            assert (await second.speak()).samples == 10 * FRAME
            await second.send(messages.SessionClose())
            await third.expect(messages.SessionStarted)

    with Engine(step) as engine, serving(engine, queue=2) as server:
        run(scenario(server.url))


def test_a_place_in_line_is_told_when_it_changes_and_only_then(step: StubStep) -> None:
    """Whoever stood before the one who left was told the place that they had already: each client was sent a message
    for every other one that gave up behind it.
    """

    async def scenario(engine: Engine) -> None:
        admission = Admission(engine, queue=3)
        told: list[list[int]] = [[], [], []]
        holder = await admission.attach(Recorder(), Sampling(), True, told[0].append)
        waiting = []
        for places in told:
            waiting.append(asyncio.create_task(admission.attach(Recorder(), Sampling(), True, places.append)))
            await asyncio.sleep(0)
        assert told == [[1], [2], [3]] and admission.waiting == 3
        waiting[1].cancel()
        with suppress(asyncio.CancelledError):
            await waiting[1]
        assert told == [[1], [2], [3, 2]]
        for place, task in enumerate((waiting[0], waiting[2])):
            holder.close()
            admission.released()
            holder = await task
            assert told == [[1], [2], [3, 2, 1]] and admission.waiting == 1 - place
        holder.close()

    with running(step) as engine:
        run(scenario(engine))


def test_a_slot_that_becomes_free_wakes_the_next_in_line(step: StubStep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in line look by themselves now and then: until then, a slot that nobody told them of stood empty."""
    monkeypatch.setattr("streaming.server.admission._LOOK_AGAIN_S", 3600.0)

    async def scenario(url: str) -> None:
        async with client(url, FAST) as first, connect(url) as socket:
            second = Client(socket)
            await second.send(FAST)
            await second.expect(messages.SessionQueued)
            await first.send(messages.SessionClose())
            await second.expect(messages.SessionStarted)

    with Engine(step) as engine, serving(engine, queue=1) as server:
        run(scenario(server.url), 20)


def test_who_leaves_the_line_holds_nobody_up(step: StubStep) -> None:
    """A slot was kept for a client that had gone."""

    async def scenario(url: str, health: str) -> None:
        async with client(url, FAST) as first, connect(url) as socket:
            await Client(socket).send(FAST)
            await Client(socket).expect(messages.SessionQueued)
            async with connect(url) as behind:
                third = Client(behind)
                await third.send(FAST)
                assert (await third.expect(messages.SessionQueued)).place == 2
                socket.transport.abort()
                assert (await third.expect(messages.SessionQueued)).place == 1
                await first.send(messages.SessionClose())
                await third.expect(messages.SessionStarted)
        while (figures := json.loads(await asyncio.to_thread(get, health)))["sessions"]:
            await asyncio.sleep(0.01)
        assert figures["waiting"] == 0
        metrics = (await asyncio.to_thread(get, health.replace("health", "metrics"))).decode()
        assert 'streaming_refused_total{code="stopping"} 0.0' in metrics, "who leaves by itself is not refused"

    with Engine(step) as engine, serving(engine, queue=2) as server:
        run(scenario(server.url, f"{server.http}/health"))


def test_a_machine_that_is_too_slow_takes_no_more_sessions_and_tells_those_it_has() -> None:
    """Lag grew without bound. Now clients are told, what cannot be heard in time is dropped, and nobody is let in."""
    step = StubStep(2, delay_s=lambda: 0.09)

    async def scenario(url: str, health: str) -> None:
        async with client(url, SessionStart()) as session:
            await session.hear(np.zeros(40 * FRAME, np.int16))
            lagging = await session.expect(messages.InputLagging)
            assert lagging.behind_ms >= 900
            dropped = await session.expect(messages.InputDropped)
            assert dropped.samples > 0
            begun = time.monotonic()
            await session.hear(np.zeros(40 * FRAME, np.int16))
            await session.send(messages.Ping(id=1, client_time_ms=0.0))
            await session.expect(messages.Pong)
            told = sum(isinstance(said, messages.InputLagging) for said in session.said)
            assert told <= 2 + (time.monotonic() - begun), "once a second, not with every message"
            while not json.loads(await asyncio.to_thread(get, health))["overloaded"]:
                await asyncio.sleep(0.01)  # until a step was measured
            async with connect(url) as socket:
                refused = Client(socket)
                await refused.send(FAST)
                assert (await refused.expect(messages.SessionRefused)).code == "overloaded"
                assert await _closed(refused) == 1013
            await session.send(messages.SessionClose())
            await session.expect(messages.SessionClosed)
            lost = sum(said.samples for said in session.said if isinstance(said, messages.InputDropped))
            metrics = (await asyncio.to_thread(get, health.replace("health", "metrics"))).decode()
            (told,) = re.findall(r"^streaming_input_dropped_seconds_total (.*)", metrics, re.MULTILINE)
            assert float(told) == pytest.approx(lost / SAMPLE_RATE), "and the operator can see it"
        async with client(url, FAST):
            pass  # with nobody left, what was measured no longer counts

    with Engine(step) as engine, serving(engine) as server:
        run(scenario(server.url, f"{server.http}/health"))


def test_a_client_may_choose_to_wait_rather_than_lose_speech(step: StubStep) -> None:

    async def scenario(url: str) -> None:
        async with client(url, SessionStart(lag="wait", max_seconds=0.08)) as session:
            await session.hear(np.zeros(200 * FRAME, np.int16))
            await session.speak()
            assert not [said for said in session.said if isinstance(said, messages.InputDropped)]

    with Engine(step) as engine, serving(engine) as server:
        run(scenario(server.url))
    assert [kind for kind, _ in step.streams[0].entries] == ["heard"] * 200 + ["spoken"]


def test_a_session_that_does_nothing_is_ended(step: StubStep) -> None:
    """A session that came and said nothing held its slot for hours."""

    async def scenario(url: str) -> None:
        async with client(url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            assert (await session.expect(messages.SessionClosed)).reason == "idle"
            assert await _closed(session) == 1000
        async with client(url, FAST):
            pass  # its slot is free

    with Engine(step) as engine, serving(engine, idle_s=1.5) as server:
        run(scenario(server.url))


def test_listening_to_a_long_turn_is_not_doing_nothing(step: StubStep) -> None:
    """A client that only listens was cut off in the middle of a continuation longer than the idle time."""

    async def scenario(url: str) -> None:
        async with client(url, SessionStart(max_seconds=1.2, lead_ms=160)) as session:
            await session.hear(SPEECH)
            assert (await session.speak()).reason == "max_seconds"

    with Engine(step) as engine, serving(engine, idle_s=0.4) as server:
        run(scenario(server.url))


def test_who_goes_on_talking_is_not_idle(step: StubStep) -> None:
    """A long prompt was cut off in its middle."""

    async def scenario(url: str) -> None:
        async with client(url, FAST) as session:
            for _ in range(24):
                await session.hear(SPEECH[:FRAME])
                await asyncio.sleep(0.1)
            assert (await session.speak()).reason == "max_seconds"

    with Engine(step) as engine, serving(engine, idle_s=2.0) as server:
        run(scenario(server.url))


def test_those_in_line_are_told_at_once_that_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients in line stood there until they looked by themselves, or until the last turn was over."""
    monkeypatch.setattr("streaming.server.admission._LOOK_AGAIN_S", 3600.0)
    step = StubStep(1, gated=True)

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST) as speaking, connect(server.url) as socket:
            await speaking.hear(SPEECH)
            await speaking.send(messages.Speak(turn=1))
            step.allow(4)
            await speaking.expect(messages.TurnSpeaking)
            waiting = Client(socket)
            await waiting.send(FAST)
            await waiting.expect(messages.SessionQueued)
            server.stop()
            assert (await waiting.expect(messages.SessionRefused)).code == "stopping"
            step.allow_all()
            await speaking.expect(messages.TurnDone)

    with Engine(step) as engine, serving(engine, queue=1) as server:
        try:
            run(scenario(server), 20)
        finally:
            step.allow_all()


def test_a_newcomer_does_not_pass_the_line() -> None:
    """A slot that had just become free went to whoever came in that moment, past those who had waited for it."""

    class OneSlot:
        free, overloaded = False, False

        def attach(self, *_: object) -> object:
            if not self.free:
                raise EngineFullError("full")
            self.free = False
            return self

    async def scenario() -> None:
        engine = OneSlot()
        admission = Admission(engine, queue=2)  # type: ignore[arg-type]
        places: list[tuple[str, int]] = []

        def enter(name: str) -> asyncio.Task[EngineSession]:
            waiting = admission.attach(lambda _: None, Sampling(), True, lambda place: places.append((name, place)))
            return asyncio.create_task(waiting)

        first = enter("first")
        await asyncio.sleep(0)
        engine.free = True  # and nobody has told the line yet
        second = enter("second")
        await asyncio.sleep(0)
        assert places == [("first", 1), ("second", 2)]
        admission.released()
        async with asyncio.timeout(5):
            assert await first is engine
        assert places[-1] == ("second", 1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)

    asyncio.run(scenario())


def test_a_stopping_server_lets_turns_finish_and_nobody_in(step: StubStep) -> None:
    """A redeployment cut speakers off in mid-word."""
    step = StubStep(3, gated=True)

    async def scenario(url: str, health: str, stop: object) -> None:
        async with client(url, FAST) as speaking, client(url, FAST) as listening, connect(url) as late:
            await speaking.hear(SPEECH)
            await speaking.send(messages.Speak(turn=1))
            step.allow(5)
            await speaking.expect(messages.TurnSpeaking)
            assert callable(stop)
            stop()
            assert (await listening.expect(messages.SessionClosed)).reason == "stopping"
            assert await _closed(listening) == 1001
            newcomer = Client(late)
            await newcomer.send(FAST)
            assert (await newcomer.expect(messages.SessionRefused)).code == "stopping"
            step.allow_all()
            assert (await speaking.expect(messages.TurnDone)).reason == "max_seconds"
            assert len(speaking.spoken()) == 10 * FRAME
            assert (await speaking.expect(messages.SessionClosed)).reason == "stopping"
            assert await _closed(speaking) == 1001

    with Engine(step) as engine, serving(engine) as server:
        run(scenario(server.url, server.http, server.stop))
        server.join()
        with pytest.raises(urllib.error.URLError):
            get(f"{server.http}/health")


def test_a_stopping_server_goes_on_telling_that_it_stops_until_its_last_turn_is_over() -> None:
    """The server closed its port first: on every drain over a minute, balancers and Prometheus saw a server that was
    down, and newcomers behind one address were not told to try another.
    """
    step = StubStep(1, gated=True)

    def answers(http: str) -> tuple[list[int], str]:
        statuses = []
        for path in ("/health/live", "/health/ready", "/health"):
            try:
                get(http + path)
            except urllib.error.HTTPError as error:
                statuses.append(error.code if json.loads(error.read())["status"] == "stopping" else 0)
            else:
                statuses.append(200)
        return statuses, get(f"{http}/metrics").decode()

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST) as speaking:
            await speaking.hear(SPEECH)
            await speaking.send(messages.Speak(turn=1))
            step.allow(5)
            await speaking.expect(messages.TurnSpeaking)
            server.stop()
            while (await asyncio.to_thread(answers, server.http))[0] != [200, 503, 503]:
                await asyncio.sleep(0.02)
            assert "\nstreaming_running 0.0\n" in (await asyncio.to_thread(answers, server.http))[1]
            async with connect(server.url) as late:
                newcomer = Client(late)
                await newcomer.send(FAST)
                refused = await newcomer.expect(messages.SessionRefused)
                assert (refused.code, refused.retry_after_ms) == ("stopping", 1000)
                assert await _closed(newcomer) == 1013
            step.allow_all()
            await speaking.expect(messages.SessionClosed)

    with Engine(step) as engine, serving(engine) as server:
        run(scenario(server))
        server.join()


@pytest.mark.parametrize("twice", [False, True])
def test_a_turn_that_takes_too_long_is_cut_at_the_end(twice: bool) -> None:
    """The turn is cut when the time for draining is over, or by a second request."""
    step = StubStep(1, gated=True)

    async def scenario(url: str, stop: object) -> None:
        async with client(url, FAST) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            step.allow(4)
            await session.expect(messages.TurnSpeaking)
            assert callable(stop)
            stop()
            if twice:
                stop()
            assert (await session.expect(messages.SessionClosed)).reason == "stopping"
            assert await _closed(session) == 1001

    with Engine(step) as engine, serving(engine, drain_s=30 if twice else 0.2) as server:
        run(scenario(server.url, server.stop))
        server.join()
        step.allow_all()
