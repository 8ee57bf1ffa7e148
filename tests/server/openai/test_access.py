"""Who may come in by OpenAI's paths: the same gatekeeper, with one answer more where a token has all its sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from streaming.engine.engine import Engine
from streaming.protocol.messages import PATH
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.tokens import Tokens
from streaming.server.openai import LIVE_PATH, REALTIME_PATH
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, run, serving

TOKEN = "a-token-of-24-characters"  # noqa: S105
PATHS = pytest.mark.parametrize("path", [REALTIME_PATH, LIVE_PATH])


@pytest.fixture
def server() -> Iterator[LiveServer]:
    held = Tokens.from_text(f"someone:{TOKEN}")
    bind = check_bind("127.0.0.1", held, tls=False, insecure_plaintext=False)
    keeper = Gatekeeper(bind, held, limits=Limits(sessions_per_token=2))
    with Engine(StubStep(4), "stub") as engine, serving(engine, keeper) as live:
        yield live


def status_of(url: str, **connecting: object) -> int:
    async def scenario() -> int:
        with pytest.raises(InvalidStatus) as refused:
            await connect(url, **connecting)  # type: ignore[arg-type]
        return int(refused.value.response.status_code)

    return run(scenario())


@PATHS
def test_a_token_is_needed_and_other_pages_are_kept_out(server: LiveServer, path: str) -> None:
    url = server.url.replace(PATH, path)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert status_of(url) == 401
    assert status_of(f"{url}?model=x&api_key={TOKEN}") == 401
    assert status_of(url, additional_headers=bearer, origin="https://evil.example") == 403


def test_a_browsers_key_is_the_token_and_realtime_is_answered_where_it_is_offered(server: LiveServer) -> None:
    """Answering `realtime` to who did not offer it breaks the SDK, and silence breaks a browser."""

    async def scenario(**connecting: object) -> str | None:
        async with connect(server.url.replace(PATH, REALTIME_PATH), **connecting) as socket:  # type: ignore[arg-type]
            assert json.loads(await socket.recv())["type"] == "session.created"
            return socket.subprotocol

    offered = [Subprotocol("realtime"), Subprotocol(f"openai-insecure-api-key.{TOKEN}")]
    assert run(scenario(subprotocols=offered)) == "realtime"
    assert run(scenario(additional_headers={"Authorization": f"Bearer {TOKEN}"})) is None


@PATHS
def test_one_session_too_many_is_refused_before_the_handshake(server: LiveServer, path: str) -> None:
    """The refusal has HTTP's own code and says when to retry, which every client library understands."""
    bearer = {"Authorization": f"Bearer {TOKEN}"}

    async def scenario() -> None:
        url = server.url.replace(PATH, REALTIME_PATH)
        async with connect(url, additional_headers=bearer) as one, connect(url, additional_headers=bearer) as two:
            await one.recv()
            await two.recv()
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url.replace(PATH, path), additional_headers=bearer)
            assert refused.value.response.status_code == 429
            assert int(refused.value.response.headers["Retry-After"]) > 0

    run(scenario())
