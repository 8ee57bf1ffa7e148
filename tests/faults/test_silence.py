"""What the server says to others than its client: no token, no audio, nobody's address, and nothing that was smuggled
in.
"""

from __future__ import annotations

import ast
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import streaming
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from tests.engine.stub_step import StubStep
from tests.faults.harness import FAST, SPEECH, beside_a_healthy_session, watched
from tests.faults.raw_client import BINARY, TEXT, RawClient, audio, frame, handshake, text
from tests.server.live_server import client, run, serving

TOKEN = "a-token-of-24-characters"  # noqa: S105
MARKED = np.frombuffer(b"SPOKENWORD" * 384, "<i2")
SMUGGLED = "\x1b]0;owned\x07 ERROR root: forged"
SEED = 20261122
PACKAGE = Path(streaming.__file__).parent


@contextmanager
def _everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """At DEBUG, whoever logs, `websockets` too."""
    names = ("", "websockets", "websockets.server", "websockets.client", "asyncio", "streaming")
    with caplog.at_level(logging.DEBUG):
        loggers = [logging.getLogger(name) for name in names]
        before = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _logged(caplog: pytest.LogCaptureFixture) -> str:
    """All that was logged, tracebacks too, but for what this test's own clients say of themselves."""
    formatter = logging.Formatter("%(name)s %(message)s")
    return "\n".join(
        formatter.format(record) for record in caplog.records if not record.name.startswith("websockets.client")
    )


def test_no_token_no_audio_and_no_address_is_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG the library logged headers, `Authorization` among them, and the first bytes of each message."""
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    bearer = {"Authorization": f"Bearer {TOKEN}"}

    async def scenario(url: str) -> None:
        async with client(url, FAST, additional_headers=bearer) as session:
            await session.hear(MARKED)
            await session.speak()
        async with client(url, FAST, subprotocols=["continue.v1", f"bearer.{TOKEN}"]) as session:
            await session.hear(MARKED)
            await session.socket.send(b"SPOKENWORD")  # malformed

    with _everything_logged(caplog), Engine(StubStep(4), "stub") as engine, serving(engine, keeper) as server:
        run(scenario(server.url))
        port = int(server.http.rsplit(":", 1)[1])
        for request in (
            f"GET /v1/continue?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n",
            f"GET /v1/continue HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}x\r\n\r\n",
            f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization : Bearer {TOKEN}\r\n\r\n",
        ):
            with RawClient(port) as peer:
                peer.send(request.encode())
                peer.hung_up()
    logged = _logged(caplog)
    for secret in (TOKEN, "SPOKEN", "53 50 4f 4b", "127.0.0.1", "Authorization", "bearer"):
        assert secret.lower() not in logged.lower(), logged


def test_nothing_that_a_stranger_sends_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Escapes that retitle a terminal, and line ends that forge an entry."""
    forged = SMUGGLED.encode()
    requests = [
        b"GET /" + forged + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%1b%5d0;owned HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: " + forged + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: " + forged + b"\r\n\r\n",
        b"GET /v1/continue HTTP/1.1\r\nHost: localhost\r\nUser-Agent: " + forged + b"\r\n\r\n",
        forged + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        handshake().replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Protocol: " + forged + b"\r\n\r\n"),
        handshake().replace(b"Key: ", b"Key: " + forged),
    ]
    with _everything_logged(caplog), watched() as server:
        for request in requests:
            with RawClient(server.port) as peer, suppress(OSError):
                peer.send(request)
                peer.hung_up()
        for message in ('{"type":"owned\\u001b[2J\\r\\nERROR"}', '{"type":"speak","turn":"owned\\r\\n"}', SMUGGLED):
            with RawClient(server.port) as peer:
                peer.start(FAST).send(frame(TEXT, message.encode()))
                with suppress(ConnectionError):
                    peer.send(frame(BINARY, b"owned"))
                assert peer.expect_close() == 1007
        server.assert_clean()
    assert "owned" not in _logged(caplog), _logged(caplog)


def test_compression_is_not_agreed_on_and_what_claims_to_be_compressed_ends_the_connection() -> None:
    """A few KB that become gigabytes. RFC 7692, section 6: RSV1 marks a compressed message."""
    offer = b"\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, permessage-deflate\r\n\r\n"
    with watched() as server, beside_a_healthy_session(server), RawClient(server.port) as peer:
        peer.send(handshake().replace(b"\r\n\r\n", offer))
        head = b""
        while b"\r\n\r\n" not in head:
            head += peer.socket.recv(1000)
        assert b" 101 " in head and b"extensions" not in head.lower()
        peer.send(text(FAST))
        peer.expect(b'"session.started"')
        bomb = frame(BINARY, b"\xaa\xaa\xaa\xaa" * 1000)
        peer.send(bytes([bomb[0] | 0x40]) + bomb[1:])
        assert peer.expect_close() == 1002


def test_jumps_of_the_wall_clock_change_nothing() -> None:
    """A clock that is set while somebody speaks ended sessions as idle, or never."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)

    def jumping() -> float:
        return rng.choice((0.0, 4e9, -1e9, rng.uniform(0, 2e9)))

    fake = mock.patch.multiple("time", time=jumping, time_ns=lambda: int(1e9 * jumping()))
    with watched(keepalive_s=0.5, idle_s=30.0) as server, fake, beside_a_healthy_session(server) as healthy:
        with RawClient(server.port) as peer:
            peer.start(FAST).send(audio(SPEECH) + text(messages.Speak(turn=1)))
            peer.expect(b'"turn.done"')
        healthy.waits_for_turns(3)


_WALL_CLOCK = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def test_no_module_reads_the_wall_clock() -> None:
    """Durations are of the monotonic clock. A date is needed twice: OpenAI's protocol asks for it, and a file of
    results says when they were taken.
    """
    modules = [*PACKAGE.rglob("*.py"), PACKAGE.parent / "server.py", PACKAGE.parent / "client.py"]
    assert len(modules) > 40
    found = []
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                names = {(node.module, name.name) for name in node.names}
                found += [(path.name, *name) for name in names & _WALL_CLOCK]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if (owner, node.attr) in _WALL_CLOCK:
                    found.append((path.name, owner, node.attr))
    assert sorted(found) == [("live.py", "time", "time"), ("processes.py", "datetime", "now")]
