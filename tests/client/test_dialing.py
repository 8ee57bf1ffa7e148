"""Where a client finds its server, what it shows there, and why there may be no session."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError, leads_to_this_machine
from streaming.errors import ContinuationError
from streaming.protocol.messages import (
    Error,
    SessionRefused,
)
from tests.client.fake_server import STARTED, fake_server, never, one_turn, run
from tests.server.certificate import self_signed


class TestOpening:
    def test_refusal_tells_when_to_come_back(self) -> None:
        refused = SessionRefused(code="full", message="4 of 4 sessions are taken", retry_after_ms=1_500)

        async def test() -> None:
            async with fake_server(opening=refused) as server:
                with pytest.raises(RefusedError, match=r"4 of 4 sessions are taken; try again in 1\.5 s") as info:
                    async with ContinuationClient.connect(server.url):
                        pass
                assert (info.value.refusal, info.value.retry_after_ms) == ("full", 1_500)

        run(test())

    def test_another_sample_rate_is_not_guessed_at(self) -> None:
        async def test() -> None:
            async with fake_server(opening=msgspec.structs.replace(STARTED, sample_rate=16_000)) as server:
                with pytest.raises(ContinuationError, match="16000 Hz"):
                    async with ContinuationClient.connect(server.url):
                        pass

        run(test())

    def test_an_error_instead_of_a_session(self) -> None:
        async def test() -> None:
            async with fake_server(opening=Error(code="bad_message", message="no", fatal=True)) as server:
                with pytest.raises(ContinuationError, match="bad_message"):
                    async with ContinuationClient.connect(server.url):
                        pass

        run(test())

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("ws://127.0.0.1:9", r"nothing answers at ws://127\.0\.0\.1:9/v1/continue \(Connection refused\); is"),
            ("ws://localhost:9", r"nothing answers at ws://localhost:9/v1/continue \(Connection refused\); is"),
            ("ftp://127.0.0.1:9", "not a server's address; it looks like"),
            ("127.0.0.1:many", "not a server's address"),
            ("ws://127.0.0.1:99999", "not a server's address"),
            ("ws://[", "not a server's address"),
            ("http://", "not a server's address"),
        ],
    )
    def test_a_server_that_is_not_there_is_told_with_the_reason(self, url: str, reason: str) -> None:
        async def test() -> None:
            with pytest.raises(ContinuationError, match=reason):
                async with ContinuationClient.connect(url):
                    pass

        run(test())

    def test_a_server_that_never_answers(self) -> None:
        async def test() -> None:
            gone = asyncio.Event()

            async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await gone.wait()
                writer.close()

            server = await asyncio.start_server(silent, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ContinuationError, match=r"did not answer in 0\.1 s"):
                async with ContinuationClient.connect(f"ws://127.0.0.1:{port}", open_timeout_s=0.1):
                    pass
            gone.set()
            server.close()
            await server.wait_closed()

        run(test())

    def test_a_server_that_speaks_something_else(self) -> None:
        async def test() -> None:
            async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                writer.close()

            server = await asyncio.start_server(http, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ContinuationError, match="HTTP 404"):
                async with ContinuationClient.connect(f"ws://127.0.0.1:{port}/elsewhere"):
                    pass
            server.close()
            await server.wait_closed()

        run(test())


class TestAccess:
    """What a client with a token does, and what it makes of an HTTP answer instead of a session."""

    def test_the_token_is_shown_as_a_header(self) -> None:
        shown: list[list[str]] = []

        def gate(_: ServerConnection, request: Request) -> None:
            shown.append(request.headers.get_all("Authorization"))

        async def test() -> None:
            async with fake_server(never, gate=gate) as server:
                async with ContinuationClient.connect(server.url, token="a-0123456789abcdef"):  # noqa: S106
                    pass
                async with ContinuationClient.connect(server.url):
                    pass

        run(test())
        assert shown == [["Bearer a-0123456789abcdef"], []]

    @pytest.mark.parametrize("token", ["", "a b", "a\r\nX-Other: b", "ä", "a\n"])
    def test_what_is_no_token_is_not_sent_and_not_repeated(self, token: str) -> None:
        """A line end in a token wrote a header of its own."""

        async def test() -> None:
            with pytest.raises(ContinuationError, match="the token holds a character that no token may have"):
                async with ContinuationClient.connect("ws://127.0.0.1:9", token=token):
                    pass

        run(test())

    @pytest.mark.parametrize(
        ("status", "body", "token", "code", "says"),
        [
            (
                401,
                "unauthorized: send it so and so\n",
                None,
                "unauthorized",
                "asks for a token; put yours into the environment variable STREAMING_TOKEN",
            ),
            (401, "unauthorized: no\n", "a-token", "unauthorized", "the token is not valid there, or no longer"),
            (403, "forbidden_origin: not this page\n", None, "forbidden_origin", "not this page"),
            (429, "too_many_sessions: end one first\n", "a-token", "too_many_sessions", "end one.*again in 7.0 s"),
            (403, "<html>some proxy</html>", None, "http", "answered HTTP 403"),
            (403, "forbidden_origin: \x1b]0;title\x07", None, "http", "answered HTTP 403"),
            (429, "a: b\nc: d\n", None, "http", "answered HTTP 429"),
            (403, "forbidden_origin: " + 2_000 * "x", None, "http", "answered HTTP 403"),
        ],
    )
    def test_a_refusal_is_one_clear_line(self, status: int, body: str, token: str | None, code: str, says: str) -> None:
        """Every HTTP answer was "is it a continuation server?"; and a server's text moved the terminal's cursor."""

        def gate(connection: ServerConnection, _: Request) -> Response:
            response = connection.respond(status, body)
            if status == 429:
                response.headers["Retry-After"] = "7"
            return response

        async def test() -> None:
            async with fake_server(gate=gate) as server:
                with pytest.raises(RefusedError, match=says) as info:
                    async with ContinuationClient.connect(server.url, token=token):
                        pass
                assert (info.value.refusal, info.value.retry_after_ms) == (code, 7_000 if status == 429 else 0)
                assert str(info.value).isprintable()
                assert "a-token" not in str(info.value)

        run(test())

    def test_a_redirect_is_not_followed(self) -> None:
        """The token went to wherever an answer pointed."""

        async def test() -> None:
            async with fake_server() as other:

                def gate(connection: ServerConnection, _: Request) -> Response:
                    response = connection.respond(302, "")
                    response.headers["Location"] = other.url
                    return response

                async with fake_server(gate=gate) as server:
                    with pytest.raises(ContinuationError, match="answered HTTP 302"):
                        async with ContinuationClient.connect(server.url, token="a-token"):  # noqa: S106
                            pass
                assert not other.peers

        run(test())

    def test_wss_and_a_certificate_that_is_not_trusted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A certificate's error is an OSError and a ValueError, and was called a wrong address."""
        certificate, key = self_signed(tmp_path)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)

        async def test() -> None:
            async with fake_server(tls=tls) as server:
                assert server.url.startswith("wss://")
                with pytest.raises(ContinuationError, match=r"no trusted TLS connection to wss://.*self.signed"):
                    async with ContinuationClient.connect(server.url):
                        pass
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
                async with ContinuationClient.connect(server.url, token="a-token") as client:  # noqa: S106
                    await client.speak()
                    _, done = await one_turn(client)
                    assert done.turn == 1
            async with fake_server() as plain:
                with pytest.raises(ContinuationError, match="and with TLS"):
                    async with ContinuationClient.connect(plain.url.replace("ws://", "wss://")):
                        pass

        run(test())


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("ws://localhost:8765", True),
        ("ws://127.0.0.2:8765/v1/continue", True),
        ("wss://[::1]:8765", True),
        ("ws://192.0.2.1:8765", False),
        ("wss://talk.example", False),
    ],
)
def test_all_of_the_loopback_network_is_this_machine(url: str, here: bool) -> None:
    """A server at 127.0.0.2 was another machine to its clients: they asked the system's proxy for it."""
    assert leads_to_this_machine(url) == here
