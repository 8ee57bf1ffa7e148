"""`deploy/ray/relay.py` under uvicorn, as Ray Serve runs it: a whole `server.py` behind it must not be told apart.

That server has no weights, since nothing here is about what a model says.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import RefusedError
from streaming.client.resumable_connection import ConnectionRestored
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionStart
from tests.deploy.stub_server import STUBBED
from tests.server.cut_proxy import cut_proxy
from tests.server.live_server import PATIENCE_S, client, run

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn comes with the extra [ray]")
relays = pytest.importorskip("deploy.ray.relay", reason="starlette comes with the extra [ray]")

TOKEN, READER = "alices-own-token-1234", "prometheus-token-1234"
BEARER = {"additional_headers": {"Authorization": f"Bearer {TOKEN}"}}
SEEDED = SessionStart(pace="fast", max_seconds=0.8, sampling=SamplingOptions(seed=5))
SPEECH = (3000 * np.sin(np.arange(10 * FRAME) / 20)).astype(np.int16)


class Served:
    """relay: under uvicorn, in a thread."""

    def __init__(self, relay: Any, port: int) -> None:
        self.relay, self.port = relay, port
        self.url = f"ws://127.0.0.1:{port}{messages.PATH}"
        self.direct = f"ws://127.0.0.1:{relay._port}{messages.PATH}"

    def request(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    async def health(self, **wanted: int) -> None:
        """Wait until `/health` says so."""
        while True:
            report = json.loads((await asyncio.to_thread(self.request, "GET", "/health"))[2])
            if all(report[key] == value for key, value in wanted.items()):
                return
            await asyncio.sleep(0.05)


@contextmanager
def served() -> Iterator[Served]:
    options = {"model": "demo", "max-sessions": 2, "threads": 1, "drain-seconds": 20, "log-level": "error"}
    environment = {**os.environ, **STUBBED, "STREAMING_TOKENS": f"alice:{TOKEN},metrics:{READER}"}
    relay = relays.Relay(options, environment)
    server = uvicorn.Server(uvicorn.Config(relay, host="127.0.0.1", port=0, lifespan="on", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the relay did not start"
            thread.join(0.05)
        yield Served(relay, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Served]:
    with served() as one:
        yield one


async def _spoken(url: str) -> bytes:
    async with client(url, SEEDED, **BEARER) as session:
        await session.hear(SPEECH)
        await session.speak()
        return session.spoken().tobytes()


def test_a_turn_is_sample_for_sample_the_servers_own(live: Served) -> None:
    async def both() -> list[bytes]:
        spoken = []
        for url in (live.url, live.direct):
            await live.health(sessions=0)  # the same slot
            spoken.append(await _spoken(url))
        return spoken

    relayed, direct = run(both())
    assert relayed == direct and len(direct) == 10 * 2 * FRAME


def test_plain_requests_are_answered_by_the_server(live: Served) -> None:
    """Its page with the policy that it runs under, its figures for the token of their reader alone."""
    status, headers, page = live.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<!doctype html>" in page and "trusted-types" in headers["content-security-policy"]
    assert live.request("GET", "/", If_None_Match=headers["etag"])[0] == 304
    status, headers, body = live.request("HEAD", "/app.js")
    assert status == 200 and int(headers["content-length"]) > 1000 and body == b""
    assert live.request("GET", "/nothing")[0] == 404
    assert live.request("POST", "/", **{"Content-Length": "0"})[0] == 405
    assert live.request("GET", "/health/ready")[0] == 200
    assert live.request("GET", "/metrics")[0] == 401
    assert live.request("GET", "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 401
    status, _, text = live.request("GET", "/metrics", Authorization=f"Bearer {READER}")
    assert status == 200 and b"streaming_slots 2.0" in text
    assert live.request("GET", "/", Host="rebound.example")[0] == 403


def test_a_handshake_is_refused_with_the_servers_own_words(live: Served) -> None:
    """A bare 403, which is what ASGI servers make of a refusal, would tell nobody that a token is missing."""

    async def scenario() -> None:
        with pytest.raises(RefusedError) as refused:
            async with ContinuationClient.connect(live.url, SEEDED):
                pass
        assert refused.value.refusal == "unauthorized"
        for origin in ("https://evil.example", f"http://127.0.0.1:{live.port + 1}"):
            with pytest.raises(InvalidStatus) as answered:
                await connect(live.url, origin=origin, compression=None, **BEARER)  # type: ignore[arg-type]
            assert answered.value.response.status_code == 403
            assert (answered.value.response.body or b"").startswith(b"forbidden_origin: ")
        page = f"http://127.0.0.1:{live.port}"
        async with connect(live.url, origin=page, subprotocols=["continue.v1", f"bearer.{TOKEN}"]) as socket:  # type: ignore[arg-type, list-item]
            assert socket.subprotocol == "continue.v1"

    run(scenario())


def test_ends_are_told_with_their_codes(live: Served) -> None:
    async def said(*these: str | bytes) -> tuple[int, str]:
        async with connect(live.url, compression=None, **BEARER) as socket:
            for data in these:
                await socket.send(data)
            with suppress(ConnectionClosed):
                async for _ in socket:
                    pass
            assert socket.protocol.close_rcvd is not None
            return socket.protocol.close_rcvd.code, socket.protocol.close_rcvd.reason

    async def scenario() -> None:
        assert (await said(b"audio before a start"))[0] == 1008
        assert (await said(messages.encode(SEEDED), "rubbish"))[0] == 1007
        assert (await said(b"\0" * 100_000))[0] == 1009
        async with client(live.url, SEEDED, **BEARER), client(live.url, SEEDED, **BEARER) as session:
            code, reason = await said(messages.encode(SEEDED))
            assert code == 1013 and "slots are taken" in reason
            await session.send(messages.SessionClose())
            assert (await session.expect(messages.SessionClosed)).reason == "client"
        await live.health(sessions=0)
        async with connect(live.url.replace("/v1/continue", "/v1/realtime?model=m"), **BEARER) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
        await live.health(sessions=0)

    run(scenario())


def test_a_session_outlives_a_connection_that_breaks_and_ends_with_one_that_is_closed(live: Served) -> None:
    """Behind ASGI both are a `websocket.disconnect`, and uvicorn gives both the code 1005: taken for closed, nobody
    could come back; taken for broken, every goodbye would hold a slot for half a minute.
    """
    start = SessionStart(max_seconds=2, resume=True, sampling=SamplingOptions(seed=5))

    async def scenario() -> tuple[bytes, int]:
        heard, restored = [], 0
        async with (
            cut_proxy(live.url, lambda: None) as proxy,
            ContinuationClient.connect(proxy.url, start, token=TOKEN) as session,
        ):
            await session.send(SPEECH)
            await session.speak()
            async for event in session.events():
                if isinstance(event, Audio):
                    heard.append(event.pcm)
                    if len(heard) == 5:
                        proxy.cut()
                restored += isinstance(event, ConnectionRestored)
                if isinstance(event, messages.TurnDone):
                    break
        async with client(live.url, start, **BEARER) as session:
            await session.hear(SPEECH)
            await live.health(sessions=1)
        await live.health(sessions=0, away=0)
        return np.concatenate(heard).tobytes(), restored

    async def unbroken() -> bytes:
        async with client(live.direct, start, **BEARER) as session:
            await session.hear(SPEECH)
            await session.speak()
            return session.spoken().tobytes()

    pcm, restored = run(scenario())
    assert restored == 1
    assert pcm == run(unbroken())


def test_a_server_that_is_to_stop_finishes_its_turn_and_takes_nobody() -> None:
    start = SessionStart(max_seconds=1.6)

    async def scenario(one: Served) -> None:
        async with client(one.url, start, **BEARER) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 3)
            one.relay.drain()
            assert (await session.expect(messages.TurnDone)).reason == "max_seconds"
            assert len(session.spoken()) == 20 * FRAME
            assert (await session.expect(messages.SessionClosed)).reason == "stopping"
            with pytest.raises(ConnectionClosed) as closed:
                await session.expect(messages.TurnDone)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert await one.relay.wait() == 0
        assert (await asyncio.to_thread(one.request, "GET", "/health"))[0] == 503
        with pytest.raises(InvalidStatus) as answered:
            await connect(one.url, compression=None, **BEARER)
        assert answered.value.response.status_code == 503
        assert (answered.value.response.body or b"").startswith(b"stopping: ")

    with served() as one:
        run(scenario(one))


def test_a_server_that_dies_breaks_its_sockets() -> None:
    """With a close frame clients would take the session for ended in form, and not look for it."""

    async def scenario(one: Served) -> None:
        async with client(one.url, SEEDED, **BEARER) as session:
            one.relay._child.kill()
            with pytest.raises(ConnectionClosed) as closed:
                await session.expect(messages.SessionClosed)
            assert closed.value.rcvd is None
        assert await one.relay.wait() < 0

    with served() as one:
        run(scenario(one))


def test_a_server_that_cannot_start_is_no_replica() -> None:
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match=r"status 2"):
            await relays.Relay({"max-sesions": 2, "config": "/no/such/file"}).start()

    run(scenario())
