"""Who may come in, shown over real sockets: the server wired to its gatekeeper."""

from __future__ import annotations

import asyncio
import http.client
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.audio import FRAME
from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError
from streaming.command import STARTING
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.origins import parse_origins
from streaming.server.door.tls import load_tls
from streaming.server.door.tokens import Tokens
from tests.deploy.stub_server import STUBBED
from tests.engine.stub_step import StubStep
from tests.server.certificate import self_signed
from tests.server.live_server import client, run, serving

ROOT = Path(__file__).parents[2]
FAST = SessionStart(pace="fast", max_seconds=0.8)
SPEECH = np.zeros(2 * FRAME, np.int16)
TOKEN, OTHER = "a-token-of-24-characters", "another-token-24-letters"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(StubStep(4)) as running:
        yield running


def _keeper(tokens: Tokens | None, **kwargs: object) -> Gatekeeper:
    bind = check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False)
    return Gatekeeper(bind, tokens, **kwargs)  # type: ignore[arg-type]


def _bearer(token: str) -> dict[str, dict[str, str]]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


async def _status(url: str, **connecting: object) -> int:
    """The HTTP status with which a handshake is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with client(url, FAST, **connecting):
            pass
    return int(caught.value.response.status_code)


def test_only_a_valid_token_opens_a_session(engine: Engine) -> None:
    async def scenario(url: str) -> None:
        assert await _status(url) == 401
        assert await _status(url, **_bearer("not-one-of-those-we-know")) == 401
        assert await _status(f"{url}?token={TOKEN}", **_bearer(TOKEN)) == 401, "a URL is no place for it"
        for ways in (_bearer(TOKEN), {"subprotocols": ["continue.v1", f"bearer.{TOKEN}"]}):
            async with client(url, FAST, **ways) as session:
                await session.hear(SPEECH)
                assert (await session.speak()).samples == 10 * FRAME
        async with ContinuationClient.connect(url, FAST, token=TOKEN) as ours:
            assert ours.started.turn == 1

    with serving(engine, _keeper(Tokens.from_text(f"ann:{TOKEN}"))) as server:
        run(scenario(server.url))


def test_revoking_a_token_ends_its_sessions_and_no_others(engine: Engine, tmp_path: Path) -> None:
    """A leaked token worked until the next restart."""
    path = tmp_path / "tokens"
    path.write_text(f"ann:{TOKEN}\nben:{OTHER}\n")
    path.chmod(0o600)

    async def scenario(url: str) -> None:
        async with client(url, FAST, **_bearer(TOKEN)) as ann, client(url, FAST, **_bearer(OTHER)) as ben:
            path.write_text(f"ben:{OTHER}\n")
            error = await ann.expect(messages.Error)
            assert (error.code, error.fatal) == ("unauthorized", True)
            with pytest.raises(ConnectionClosed):
                await ann.expect(messages.Pong)
            assert ann.socket.close_code == 1008
            assert await _status(url, **_bearer(TOKEN)) == 401
            await ben.hear(SPEECH)
            assert (await ben.speak()).samples == 10 * FRAME

    with serving(engine, _keeper(Tokens.from_file(path, time.monotonic()))) as server:
        run(scenario(server.url))


def test_a_page_of_another_site_cannot_reach_a_loopback_session(engine: Engine) -> None:
    """A page reaches it neither by its address nor by a name that was made to mean this machine (DNS rebinding)."""

    async def scenario(url: str) -> None:
        own = f"http://{urlsplit(url).netloc}"
        assert await _status(url, origin="https://evil.example") == 403
        assert await _status(url, origin="null") == 403
        for origin in (own, "https://allowed.example"):
            async with client(url, FAST, origin=origin):
                pass

    with serving(engine, _keeper(None, origins=parse_origins(["https://allowed.example"]))) as server:
        run(scenario(server.url))
        for host, status in (("evil.example", 403), ("localhost", 200)):
            connection = http.client.HTTPConnection(urlsplit(server.http).netloc, timeout=10)
            connection.request("GET", "/health", headers={"Host": host})
            assert connection.getresponse().status == status
            connection.close()


def test_a_token_has_so_many_sessions_and_no_more(engine: Engine) -> None:
    async def scenario(url: str) -> None:
        async with client(url, FAST, **_bearer(TOKEN)):
            with pytest.raises(RefusedError, match=r"too_many_sessions.*again in 2"):
                async with ContinuationClient.connect(url, FAST, token=TOKEN):
                    pass
        await asyncio.sleep(0.1)
        async with client(url, FAST, **_bearer(TOKEN)):
            pass

    with serving(engine, _keeper(Tokens.from_text(f"ann:{TOKEN}"), limits=Limits(sessions_per_token=1))) as server:
        run(scenario(server.url))


def test_tls_from_the_client_to_the_engine(engine: Engine, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    trust = ssl.create_default_context(cafile=str(certificate))

    async def scenario(url: str) -> None:
        assert url.startswith("wss://")
        async with client(url.replace("127.0.0.1", "localhost"), FAST, ssl=trust) as session:
            await session.hear(SPEECH)
            assert (await session.speak()).samples == 10 * FRAME

    with serving(engine, tls=load_tls(str(certificate), str(key))) as server:
        run(scenario(server.url))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "STREAMING_TOKENS"),  # noqa: S104  (refused)
        (["--host", "0.0.0.0", "--tokens", "TOKENS"], "--tls-cert"),  # noqa: S104
        (["--tls-cert", "x.pem"], "go together"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], "x.pem"),
        (["--tokens", "nowhere"], "nowhere"),
        (["--allow-origin", "evil"], "evil"),
    ],
)
def test_an_open_door_is_refused_at_the_start(
    flags: list[str], said: str, tmp_path: Path, server_says: Callable[..., tuple[int | str | None, str]]
) -> None:
    """The refusal comes before a model is loaded, in one line that says what to add."""
    path = tmp_path / "tokens"
    path.write_text(f"ann:{TOKEN}\n")
    path.chmod(0o600)
    status, told = server_says(*(str(path) if flag == "TOKENS" else flag for flag in flags))
    assert status == 1
    starting, line = told.splitlines()
    assert starting == STARTING and said in line
    assert TOKEN not in told


def test_a_server_of_ones_own_ends_with_whoever_started_it() -> None:
    """A client that was killed left a loaded model behind. `--until-eof`: the pipe closes when its process is gone."""
    process = subprocess.Popen(
        [sys.executable, "server.py", "--port", "0", "--until-eof"],
        cwd=ROOT,
        env=os.environ | STUBBED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        assert process.stdout.readline().startswith("listening on ws://127.0.0.1:")
        process.stdin.close()
        assert process.wait(60) == 0
