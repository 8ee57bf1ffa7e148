"""Sessions that outlive their connection, over real sockets that break: `docs/protocol.md`, "Coming back"."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient, Event
from streaming.client.resumable_connection import ConnectionLost, ConnectionRestored
from streaming.engine.engine import Engine
from streaming.errors import ContinuationError
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionResume, SessionStart
from streaming.protocol.opus import opus_available
from streaming.protocol.replay import WINDOW
from streaming.server import session_socket
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from tests.engine.stub_step import StubStep
from tests.faults.harness import Watched, watched
from tests.server.cut_proxy import cut_proxy
from tests.server.live_server import Client, LiveServer, client, get, run, serving

SEED = int(os.environ.get("FAULT_SEED", random.randrange(10**6)))
FAST = SessionStart(pace="fast", max_seconds=4, resume=True, sampling=SamplingOptions(seed=5))
SPEECH = (np.arange(20 * FRAME) % 251).astype(np.int16)
RESUME_S = 0.5


@pytest.fixture
def step() -> StubStep:
    return StubStep(2)


@pytest.fixture
def server(step: StubStep) -> Iterator[LiveServer]:
    with Engine(step, "stub") as engine, serving(engine, resume_s=20.0) as live:
        yield live


@pytest.fixture
def hasty(step: StubStep) -> Iterator[LiveServer]:
    """Keep sessions for half a second."""
    with Engine(step, "stub") as engine, serving(engine, resume_s=RESUME_S) as live:
        yield live


def _sessions(server: LiveServer) -> int:
    return int(json.loads(get(server.http + "/health"))["sessions"])


async def _until_sessions(server: LiveServer, count: int) -> None:
    while await asyncio.to_thread(_sessions, server) != count:
        await asyncio.sleep(0.02)


async def _until_away(server: LiveServer) -> None:
    while not json.loads(await asyncio.to_thread(get, server.http + "/health"))["away"]:
        await asyncio.sleep(0.02)


async def _until_stopping(server: LiveServer) -> None:
    while "streaming_running 1.0" in (await asyncio.to_thread(get, server.http + "/metrics")).decode():
        await asyncio.sleep(0.02)


async def _turn(session: ContinuationClient) -> tuple[NDArray[np.int16], list[Event]]:
    """Speak a prompt in small pieces and take its whole continuation."""
    for at in range(0, len(SPEECH), 700):
        await session.send(SPEECH[at : at + 700])
    await session.speak()
    audio: list[NDArray[np.int16]] = []
    others: list[Event] = []
    async for event in session.events():
        if isinstance(event, Audio):
            audio.append(event.pcm)
            continue
        others.append(event)
        if isinstance(event, messages.TurnDone):
            break
    return np.concatenate(audio), others


async def _turns(url: str, start: SessionStart, count: int) -> tuple[list[bytes], int]:
    """The continuations of so many turns, and how often the connection was lost and restored."""
    losses = 0
    continuations = []
    async with ContinuationClient.connect(url, start) as session:
        for _ in range(count):
            pcm, others = await _turn(session)
            continuations.append(pcm.tobytes())
            losses += sum(isinstance(event, ConnectionRestored) for event in others)
    return continuations, losses


async def _resume(url: str, token: str, received: int = 0, position: int = 0) -> tuple[Client, messages.Message]:
    """A socket that has asked for a session, and the answer."""
    session = Client(await connect(url, compression=None))
    await session.send(SessionResume(token=token, received=received, position=position))
    return session, await session.expect(messages.Message)


def _token(session: Client) -> str:
    started = session.said[0]
    assert isinstance(started, messages.SessionStarted)
    assert started.resume is not None
    return started.resume.token


@pytest.mark.parametrize(
    ("pace", "codec"),
    [
        ("fast", "pcm16"),
        ("realtime", "pcm16"),
        pytest.param("fast", "opus", marks=pytest.mark.skipif(not opus_available(), reason="no libopus")),
    ],
)
def test_a_session_survives_a_connection_that_breaks_again_and_again(
    server: LiveServer, step: StubStep, pace: str, codec: str
) -> None:
    """Not one sample of a turn may be lost or doubled, in either direction, wherever the connection breaks. With Opus:
    no packet either, for each is decoded with the memory of all before it.
    """
    print(f"FAULT_SEED={SEED}")
    rng = random.Random(SEED)
    start = FAST if pace == "fast" else structs.replace(FAST, pace="realtime", max_seconds=0.6, lag="wait")
    start = structs.replace(start, codecs=(codec,))
    turns = 4 if pace == "fast" else 2

    # The first lets it begin.
    budgets = itertools.chain([6_000], iter(lambda: rng.randrange(300, 40_000 if codec == "pcm16" else 6_000), None))

    async def scenario() -> tuple[list[bytes], int]:
        async with cut_proxy(server.url, lambda: next(budgets)) as proxy:
            return await _turns(proxy.url, start, turns)

    whole, _ = run(_turns(server.url, start, turns))
    entries = list(step.streams[0].entries)
    broken, losses = run(scenario())
    assert losses >= 3
    assert broken == whole
    assert step.streams[0].entries == entries


def test_what_was_said_without_a_connection_is_heard(step: StubStep) -> None:
    """The microphone does not stop when the network does, and the burst afterwards was dropped as lag."""

    async def scenario(server: LiveServer) -> None:
        start = SessionStart(resume=True, max_seconds=0.4)  # lag: drop
        async with cut_proxy(server.url) as proxy, ContinuationClient.connect(proxy.url, start) as session:
            await _turn(session)
            proxy.open = False
            proxy.cut()
            events = session.events()
            while not isinstance(await anext(events), ConnectionLost):
                pass
            for _ in range(5):  # eight seconds of speech: four times what ever waits for a step
                await session.send(SPEECH)
            await session.speak()
            proxy.open = True
            seen: list[Event] = []
            async for event in events:
                seen.append(event)
                if isinstance(event, messages.TurnDone):
                    break
            assert any(isinstance(event, ConnectionRestored) for event in seen)
            assert not any(isinstance(event, messages.InputDropped) for event in seen)
            speaking = next(event for event in seen if isinstance(event, messages.TurnSpeaking))
            assert speaking.prompt_samples == 5 * len(SPEECH)

    slow = StubStep(2, delay_s=lambda: 0.02)
    with Engine(slow, "stub") as engine, serving(engine, resume_s=20.0) as server:
        run(scenario(server))


def test_a_session_that_nobody_comes_back_to_ends_and_its_token_with_it(hasty: LiveServer) -> None:
    async def scenario() -> None:
        async with client(hasty.url, FAST) as session:
            token = _token(session)
            await session.hear(SPEECH)
            await session.speak()
            left = time.monotonic()
            session.socket.transport.abort()
        await _until_sessions(hasty, 0)
        assert time.monotonic() - left >= RESUME_S
        late, answer = await _resume(hasty.url, token)
        assert isinstance(answer, messages.SessionRefused)
        assert (answer.code, answer.retry_after_ms) == ("session_expired", 0)
        await late.socket.wait_closed()
        assert late.socket.close_code == 1013

    run(scenario())


@pytest.mark.parametrize("how", ["not asked for", "closed in form", "said goodbye", "said nothing", "malformed"])
def test_a_session_ends_at_once_where_nobody_will_come_back(server: LiveServer, how: str) -> None:
    """A slot was held for a client that had said goodbye, or that had not asked for a resume token."""

    async def scenario() -> None:
        start = SessionStart(pace="fast", max_seconds=4, resume=how != "not asked for")
        async with client(server.url, start) as session:
            if how != "said nothing":
                await session.hear(SPEECH)
                await session.speak()
            match how:
                case "closed in form":
                    await session.socket.close(1001)
                case "said goodbye":
                    await session.send(messages.SessionClose())
                    await session.expect(messages.SessionClosed)
                case "malformed":
                    await session.socket.send(b"x")
                    await session.expect(messages.Error)
                case _:
                    session.socket.transport.abort()
        async with asyncio.timeout(5):
            await _until_sessions(server, 0)

    run(scenario())


def test_a_token_of_another_server_is_told_from_one_that_is_over(server: LiveServer) -> None:
    """Behind a balancer a client must know whether to knock next door, or to start anew."""

    async def scenario() -> None:
        for token in ("", "0123abcd.0123456789", "\u2028" * 100, "a" * 50_000):
            stranger, answer = await _resume(server.url, token)
            assert isinstance(answer, messages.SessionRefused)
            assert answer.code == "session_elsewhere"
            await stranger.socket.wait_closed()

    run(scenario())


def test_only_one_socket_holds_a_session(server: LiveServer) -> None:
    """A client that has changed networks comes back before the server notices that its old connection is dead."""

    async def scenario() -> None:
        async with client(server.url, FAST) as first:
            token = _token(first)
            await first.hear(SPEECH)
            done = await first.speak()
            received = len(first.audio[1]) + 2  # and turn.speaking, turn.done
            second, answer = await _resume(server.url, token, received, len(SPEECH))
            assert answer == messages.SessionResumed(received=len(SPEECH) // FRAME + 1)
            with pytest.raises(ConnectionClosed):
                await first.socket.recv()
            second.position = len(SPEECH)
            await second.hear(SPEECH, turn=2)
            assert (await second.speak(2)).samples == done.samples
            third, answer = await _resume(server.url, token, received - 1, 2 * len(SPEECH))
            assert isinstance(answer, messages.Error), "what was sent before is gone: a count cannot go back"
            assert (await second.speak(3)).samples == done.samples, "whoever asks for nonsense takes nothing away"
            await third.socket.close()
            await second.socket.close()

    run(scenario())


def test_a_session_belongs_to_the_token_that_opened_it() -> None:
    """Another of the server's users who learnt the resume token could have taken the conversation over."""
    tokens = Tokens.from_text("ann:" + "a" * 24 + "\nbob:" + "b" * 24)
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    ann, bob = ({"Authorization": f"Bearer {letter * 24}"} for letter in "ab")

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST, additional_headers=ann) as session:
            await session.hear(SPEECH[:FRAME])
            token = _token(session)
            for headers, wanted in ((bob, messages.SessionRefused), (ann, messages.SessionResumed)):
                async with connect(server.url, compression=None, additional_headers=headers) as socket:
                    other = Client(socket)
                    await other.send(SessionResume(token=token, received=0, position=FRAME))
                    await other.expect(wanted)

    with Engine(StubStep(2), "stub") as engine, serving(engine, keeper) as server:
        run(scenario(server))


def test_a_server_that_stops_does_not_wait_for_who_is_away_and_in_no_turn(step: StubStep) -> None:
    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            session.socket.transport.abort()
        await _until_away(server)
        server.stop()
        async with asyncio.timeout(5):
            await asyncio.to_thread(server.join)

    with Engine(step, "stub") as engine, serving(engine, resume_s=600.0, drain_s=600.0) as server:
        run(scenario(server))


@pytest.mark.parametrize("lost_first", [True, False])
def test_who_lost_the_connection_comes_back_to_a_server_that_stops(step: StubStep, lost_first: bool) -> None:
    """The port was closed: a turn that the drain was there for was lost with its connection."""

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, SessionStart(resume=True, max_seconds=4)) as session:
            token = _token(session)
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 1)
            if not lost_first:
                server.stop()
                await _until_stopping(server)
            session.socket.transport.abort()
        if lost_first:
            await _until_away(server)
            server.stop()
            await _until_stopping(server)
        received = len(session.audio[1]) + sum(message.counted for message in session.said[1:])
        again, answer = await _resume(server.url, token, received, len(SPEECH))
        assert isinstance(answer, messages.SessionResumed)
        again.audio = session.audio
        done = await again.expect(messages.TurnDone)
        assert (done.reason, len(again.spoken())) == ("max_seconds", 50 * FRAME)
        assert (await again.expect(messages.SessionClosed)).reason == "stopping"
        await again.socket.close()
        await asyncio.to_thread(server.join)

    with Engine(step, "stub") as engine, serving(engine, resume_s=600.0, drain_s=600.0) as server:
        run(scenario(server))


def test_a_server_that_stops_keeps_who_is_away_no_longer_than_ever(step: StubStep) -> None:
    """A client that is away is waited for as long as sessions are kept, and not for all of the drain."""

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, SessionStart(resume=True, max_seconds=3600)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            session.socket.transport.abort()
        server.stop()
        await asyncio.to_thread(server.join)

    with Engine(step, "stub") as engine, serving(engine, resume_s=RESUME_S, drain_s=600.0) as server:
        run(scenario(server))


def test_a_client_that_never_acknowledges_is_cut_off_and_can_come_back(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server keeps for such a client grew without bound."""
    monkeypatch.setattr(session_socket, "_READY_TIMEOUT_S", 0.3)
    start = SessionStart(pace="fast", max_seconds=60, resume=True)

    async def scenario() -> None:
        async with client(server.url, start) as session:
            token = _token(session)
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            with pytest.raises(ConnectionClosed):
                await session.expect(messages.TurnDone)
            assert len(session.audio[1]) == WINDOW - 1, "and turn.speaking"
        again, answer = await _resume(server.url, token, WINDOW, len(SPEECH))
        assert isinstance(answer, messages.SessionResumed)
        again.audio = session.audio
        await again.expect_audio(1, 2 * WINDOW - 1)
        await again.socket.close()

    run(scenario())


def test_a_client_gives_up_when_the_server_has(hasty: LiveServer) -> None:
    """The client tried for ever, or told nobody why it stopped."""

    async def scenario() -> None:
        async with cut_proxy(hasty.url) as proxy, ContinuationClient.connect(proxy.url, FAST) as session:
            await session.send(SPEECH)
            await asyncio.sleep(0.1)
            proxy.open = False
            proxy.cut()
            with pytest.raises(ContinuationError, match=r"broke, and could not be restored within 0\.5 s"):
                async for _ in session.events():
                    pass
            with pytest.raises(ContinuationError, match="could not be restored"):
                await session.send(SPEECH)

    run(scenario())


def test_a_client_is_told_when_its_session_is_gone(step: StubStep) -> None:
    async def scenario() -> None:
        with Engine(step, "stub") as engine, serving(engine) as first, serving(engine) as second:
            async with cut_proxy(first.url) as proxy, ContinuationClient.connect(proxy.url, FAST) as session:
                await session.send(SPEECH)
                await asyncio.sleep(0.1)
                proxy._port = int(second.url.split(":")[2].split("/")[0])  # as if restarted
                proxy.cut()
                with pytest.raises(ContinuationError, match="session_elsewhere"):
                    async for _ in session.events():
                        pass

    run(scenario())


def test_who_waits_to_send_is_told_that_the_session_is_over(hasty: LiveServer) -> None:
    """A microphone that had filled the window while the connection was away hung, and the program with it."""

    async def scenario() -> None:
        async with cut_proxy(hasty.url) as proxy, ContinuationClient.connect(proxy.url, FAST) as session:
            await session.send(SPEECH)
            proxy.open = False
            proxy.cut()

            async def talk() -> None:
                while True:
                    await session.send(SPEECH[:10])

            talking = asyncio.create_task(talk())
            with pytest.raises(ContinuationError, match="could not be restored"):
                async for _ in session.events():
                    pass
            assert session.sent_samples >= len(SPEECH) + 10 * (WINDOW - 1), "the window is full"
            with pytest.raises(ContinuationError, match="could not be restored"):
                await talking

    run(scenario(), 20)


def test_what_was_played_without_a_connection_is_said_when_there_is_one_again(step: StubStep) -> None:
    """Reports are not counted, so they are not kept. Without the latest a server that waits for it before it says more
    waits for ever, and so does its listener.
    """

    async def scenario(server: LiveServer) -> None:
        start = SessionStart(resume=True, max_seconds=0.8, lead_ms=160)
        async with cut_proxy(server.url) as proxy, ContinuationClient.connect(proxy.url, start) as session:
            await session.send(SPEECH)
            await session.speak()
            await session.played(1, 0)  # from here on the client tells
            events, frames = session.events(), 0
            while frames < 2:
                frames += isinstance(await anext(events), Audio)
            proxy.cut()
            while not isinstance(await anext(events), ConnectionLost):
                pass
            await session.played(1, 2 * FRAME)
            while frames < 4:
                frames += isinstance(await anext(events), Audio)

    with Engine(step, "stub") as engine, serving(engine, resume_s=20.0) as server:
        run(scenario(server), 20)


def test_a_return_that_another_overtakes_is_let_go() -> None:
    """A client that comes back twice at once, as phones between two networks do, got one session; the socket of its
    first attempt, and the task that served it, were never told, and stayed.
    """

    async def scenario(server: Watched) -> None:
        start = SessionStart(pace="fast", max_seconds=0.8, resume=True)
        one_more = partial(connect, server.url, compression=None)
        async with client(server.url, start) as session, one_more() as one, one_more() as two:
            await session.hear(SPEECH)
            await session.send(messages.Ping(id=1, client_time_ms=0.0))
            await session.expect(messages.Pong)  # all of it is handled
            again = SessionResume(token=_token(session), received=0, position=len(SPEECH))
            held, goes_on = threading.Event(), threading.Event()
            server.loop.call_soon_threadsafe(lambda: (held.set(), goes_on.wait(10)))
            await asyncio.to_thread(held.wait, 10)
            await Client(one).send(again)
            await Client(two).send(again)
            await asyncio.sleep(0.1)
            goes_on.set()  # and finds both at once
            async with asyncio.timeout(10):
                answers = await asyncio.gather(
                    *(Client(socket).expect(messages.SessionResumed) for socket in (one, two)), return_exceptions=True
                )
            assert sum(isinstance(answer, ConnectionClosed) for answer in answers) == 1, answers
            kept = Client(one if isinstance(answers[0], messages.SessionResumed) else two)
            assert (await kept.speak()).samples == 10 * FRAME

    with watched(slots=2) as server:
        run(scenario(server), 30)
        server.assert_clean()
