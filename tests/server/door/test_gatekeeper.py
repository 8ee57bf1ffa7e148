"""Who may come in: whole requests, and all of it once over a real handshake."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Request, Response
from websockets.typing import Origin as OriginHeader
from websockets.typing import Subprotocol

from streaming.server.door.bind import Bind
from streaming.server.door.credentials import select_subprotocol
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.limits import Limits
from streaming.server.door.origins import parse_origins
from streaming.server.door.proxies import parse_proxies
from streaming.server.door.refusals import Refusal
from streaming.server.door.tokens import Tokens
from tests.server.door.requests import ANN, BOB, LOOPBACK, PATH, PEER, PUBLIC, TOKENS, ask, code

VALUES = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
"""What `websockets` lets through in a header's value, as ISO 8859-1."""


def crowded(keeper: Gatekeeper, *headers: tuple[str, str]) -> Refusal | None:
    """Whether somebody with these headers, from any address, may have one more session."""
    visitor = ask(keeper, *headers)
    assert isinstance(visitor, Visitor)
    return keeper.crowded(visitor)


class TestOrigin:
    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            ("localhost:8765", "http://localhost:8765"),
            ("127.0.0.1:8765", "http://127.0.0.1:8765"),
            ("[::1]:8765", "http://[::1]:8765"),
            ("localhost", "http://localhost"),
            ("localhost", "http://localhost:80"),
            ("localhost", "https://localhost"),  # a proxy's TLS
        ],
    )
    def test_a_page_of_this_server_may_connect(self, host: str, origin: str) -> None:
        assert isinstance(ask(Gatekeeper(LOOPBACK), ("Host", host), ("Origin", origin)), Visitor)

    @pytest.mark.parametrize(
        "origin",
        [
            "http://evil.example",
            "http://localhost:3000",  # another program's page on the same machine
            "http://127.0.0.1:8765",  # another name is another origin, for browsers too
            "http://localhost",
            "null",
            "",
            "file://",
            "app://localhost:8765",
            "http://localhost:8765.evil.example",
            "http://localhost:8765@evil.example",
            "http://localhost:8765 http://evil.example",
        ],
    )
    def test_a_page_of_another_site_may_not(self, origin: str) -> None:
        """Any page that the user opened could talk to the server on their machine, and hear what it says."""
        answer = ask(Gatekeeper(LOOPBACK), ("Origin", origin))
        assert isinstance(answer, Refusal)
        assert (answer.status, answer.code) == (403, "forbidden_origin")

    def test_two_origins_are_none(self) -> None:
        """The first was looked at, and the second was the page's."""
        both = ("Origin", "http://localhost:8765"), ("Origin", "http://evil.example")
        assert code(ask(Gatekeeper(LOOPBACK), *both)) == "bad_request"

    def test_an_allowed_origin_may_connect_and_its_host_be_named(self) -> None:
        keeper = Gatekeeper(LOOPBACK, origins=parse_origins(["https://talk.example"]))
        for host in ("127.0.0.1:8765", "talk.example"):
            assert isinstance(ask(keeper, ("Host", host), ("Origin", "https://talk.example")), Visitor)
        assert code(ask(keeper, ("Origin", "http://talk.example"))) == "forbidden_origin"

    @pytest.mark.parametrize(
        "host", ["evil.example:8765", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0:8765"]
    )
    def test_a_name_that_was_rebound_to_loopback_is_refused(self, host: str) -> None:
        """DNS rebinding: evil.example now means 127.0.0.1, so its page's origin equals the Host header's."""
        keeper = Gatekeeper(LOOPBACK)
        assert code(ask(keeper, ("Host", host), ("Origin", f"http://{host}"))) == "forbidden_origin"
        assert code(keeper.look(Headers([("Host", host)]), "/", "127.0.0.1", 0)) == "forbidden_origin"

    @pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1", "127.1.2.3:1", "[::1]:8765", "here:8765"])
    def test_names_of_this_machine_are_not(self, host: str) -> None:
        keeper = Gatekeeper(Bind("here", ("127.0.1.1",), loopback=True, tls=False))
        assert isinstance(ask(keeper, ("Host", host)), Visitor)

    @pytest.mark.parametrize("hosts", [[], ["a b"], ["localhost", "localhost"]])
    def test_a_request_needs_one_host(self, hosts: list[str]) -> None:
        headers = Headers([("Host", host) for host in hosts])
        assert code(Gatekeeper(LOOPBACK).admit(headers, PATH, PEER, 0)) == "bad_request"

    def test_a_page_that_came_in_the_clear_does_not_reach_a_server_with_tls(self) -> None:
        """Whoever can alter a page on its way could have it open a session."""
        headers = ("Host", "talk.example"), ("Authorization", f"Bearer {ANN}")
        keeper = Gatekeeper(PUBLIC, TOKENS)
        assert isinstance(ask(keeper, *headers, ("Origin", "https://talk.example")), Visitor)
        assert code(ask(keeper, *headers, ("Origin", "http://talk.example"))) == "forbidden_origin"


class TestToken:
    def test_where_no_token_is_asked_for_none_is_looked_at(self) -> None:
        visitor = ask(Gatekeeper(LOOPBACK), ("Authorization", "Bearer whatever"))
        assert isinstance(visitor, Visitor)
        assert visitor.name is None
        assert Gatekeeper(LOOPBACK).still_welcome(visitor, 1e9)

    def test_a_revoked_token_ends_its_sessions_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "tokens"
        file.write_text(f"ann:{ANN}\nbob:{BOB}\n")
        keeper = Gatekeeper(PUBLIC, Tokens.from_file(file, 0))
        ann, bob = (ask(keeper, ("Authorization", f"Bearer {token}")) for token in (ANN, BOB))
        assert isinstance(ann, Visitor)
        assert isinstance(bob, Visitor)
        file.write_text(f"bob:{BOB}\n")
        assert code(ask(keeper, ("Authorization", f"Bearer {ANN}"), now=1)) == "unauthorized"
        assert [(keeper.still_welcome(ann, now), keeper.still_welcome(bob, now)) for now in (1, 2)] == [
            (True, True),
            (False, True),
        ]


class TestRefusals:
    @settings(max_examples=200)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["Host", "Origin", "Authorization", "Sec-WebSocket-Protocol", "X-Forwarded-For"]),
                st.sampled_from(["localhost", "http://localhost", "null", f"Bearer {ANN}", f"bearer.{ANN}"])
                | st.text(VALUES, max_size=40),
            ),
            max_size=6,
        ),
        st.text(st.characters(max_codepoint=127), max_size=40),
    )
    def test_any_request_gets_an_answer_that_repeats_nothing(self, headers: list[tuple[str, str]], path: str) -> None:
        """A header that came back in an error page, and one that raised in process_request: a 500 and a traceback."""
        answer = Gatekeeper(LOOPBACK, TOKENS).admit(Headers(headers), path, PEER, 0.0)
        if isinstance(answer, Refusal):
            assert answer.status in (400, 401, 403)
            assert answer.body.removesuffix("\n").isprintable()
            assert len(answer.body) < 250
            assert ANN not in answer.body + str(answer.headers)
        else:
            assert answer.name == "ann"

    def test_the_texts_are_the_same_whatever_was_sent(self) -> None:
        answers = {ask(Gatekeeper(PUBLIC, TOKENS), ("Authorization", f"Bearer {n}{ANN}")) for n in range(5)}
        assert len(answers) == 1


class TestLimits:
    def test_a_refused_connection_is_told_when(self) -> None:
        keeper = Gatekeeper(PUBLIC, limits=Limits(connection_burst=2, connections_per_s=0.25))
        assert [code(ask(keeper)) for _ in range(3)] == [None, None, "too_many_connections"]
        answer = ask(keeper, now=1.0)
        assert isinstance(answer, Refusal)
        assert (answer.status, answer.retry_after_s, answer.headers["Retry-After"]) == (429, 3.0, "3")
        answer = ask(keeper, now=1.5)
        assert isinstance(answer, Refusal)
        assert (answer.retry_after_s, answer.headers["Retry-After"]) == (2.5, "3"), "not before there is room"
        assert isinstance(ask(keeper, now=4.0), Visitor)
        assert isinstance(ask(keeper, peer="203.0.113.8"), Visitor)

    def test_a_flood_of_bad_tokens_is_a_flood_of_connections(self) -> None:
        keeper = Gatekeeper(PUBLIC, TOKENS, limits=Limits(connection_burst=5))
        guesses = [code(ask(keeper, ("Authorization", f"Bearer guess-{n:016}"))) for n in range(9)]
        assert guesses == ["unauthorized"] * 5 + ["too_many_connections"] * 4

    def test_loopback_is_not_counted_by_address(self) -> None:
        """A benchmark, or everyone behind a proxy on the same machine, was one address."""
        keeper = Gatekeeper(LOOPBACK, limits=Limits(connection_burst=1, sessions_per_address=1))
        with contextlib.ExitStack() as sessions:
            for _ in range(50):
                visitor = ask(keeper, peer="127.0.0.1")
                assert isinstance(visitor, Visitor)
                assert sessions.enter_context(keeper.session(visitor)) is None

    def test_sessions_of_an_address_are_limited(self) -> None:
        keeper = Gatekeeper(PUBLIC, limits=Limits(sessions_per_address=2))
        first, second = ask(keeper, peer="2001:db8::1"), ask(keeper, peer="2001:db8::2")
        assert isinstance(first, Visitor)
        assert isinstance(second, Visitor)
        with keeper.session(first):
            with keeper.session(second) as refusal:
                assert refusal is None
                third, elsewhere = ask(keeper, peer="2001:db8::3"), ask(keeper, peer="2001:db8:0:1::1")
                assert isinstance(third, Visitor), "it may be coming back to its session"
                assert isinstance(elsewhere, Visitor)
                answer = keeper.crowded(third)
                assert answer is not None
                assert (answer.status, answer.code, answer.headers["Retry-After"]) == (429, "too_many_sessions", "2")
                assert keeper.crowded(elsewhere) is None
            assert keeper.crowded(third) is None

    def test_sessions_of_a_token_are_counted_over_all_addresses_loopback_too(self) -> None:
        keeper = Gatekeeper(PUBLIC, TOKENS, limits=Limits(sessions_per_token=2))
        ann = ("Authorization", f"Bearer {ANN}")
        with contextlib.ExitStack() as sessions:
            for peer in (PEER, "127.0.0.1"):
                visitor = ask(keeper, ann, peer=peer)
                assert isinstance(visitor, Visitor)
                sessions.enter_context(keeper.session(visitor))
            assert code(crowded(keeper, ann)) == "too_many_sessions"
            assert crowded(keeper, ("Authorization", f"Bearer {BOB}")) is None
        assert crowded(keeper, ann) is None

    def test_those_who_ask_at_once_do_not_all_come_in(self) -> None:
        keeper = Gatekeeper(PUBLIC, limits=Limits(sessions_per_address=3))
        visitors = [ask(keeper) for _ in range(10)]
        with contextlib.ExitStack() as sessions:
            entered = [sessions.enter_context(keeper.session(v)) for v in visitors if isinstance(v, Visitor)]
            assert [code(refusal) for refusal in entered] == [None] * 3 + ["too_many_sessions"] * 7
        assert isinstance(ask(keeper), Visitor)

    def test_clients_of_a_proxy_are_counted_one_by_one(self) -> None:
        """Behind an ingress all had one address: its eight sessions, and its sixty page loads, were everybody's."""
        limits = Limits(sessions_per_address=1, connection_burst=2, connections_per_s=0.001)
        keeper = Gatekeeper(PUBLIC, None, frozenset(), limits, parse_proxies(["10.0.0.0/8", "fd00::/8"]))
        ann = ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3")
        bob = ask(keeper, ("X-Forwarded-For", "203.0.113.2"), peer="10.1.2.3")
        assert isinstance(ann, Visitor) and isinstance(bob, Visitor)
        with keeper.session(ann) as refusal:
            assert refusal is None and code(keeper.crowded(ann)) == "too_many_sessions"
            assert keeper.crowded(bob) is None
        assert isinstance(ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3"), Visitor)
        assert code(ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3")) == "too_many_connections"
        assert isinstance(ask(keeper, ("X-Forwarded-For", "203.0.113.2"), peer="10.1.2.3"), Visitor)


@contextlib.asynccontextmanager
async def guarded(keeper: Gatekeeper) -> AsyncIterator[tuple[str, list[str | None]]]:
    """A server with this gatekeeper; its URL, and the names of those who came in."""
    names: list[str | None] = []
    loop = asyncio.get_running_loop()

    def process_request(connection: ServerConnection, request: Request) -> Response | None:
        answer = keeper.admit(request.headers, request.path, connection.remote_address[0], loop.time())
        if isinstance(answer, Visitor):
            names.append(answer.name)
            return None
        response = connection.respond(answer.status, answer.body)
        response.headers.update(answer.headers)
        return response

    async def handle(socket: ServerConnection) -> None:
        await socket.wait_closed()

    async with serve(
        handle, "127.0.0.1", 0, process_request=process_request, select_subprotocol=select_subprotocol, compression=None
    ) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}{PATH}", names


def test_over_a_real_handshake(caplog: pytest.LogCaptureFixture) -> None:
    """What a browser and a program would send, and that no token of theirs gets into the log or an answer."""
    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with asyncio.timeout(20), guarded(Gatekeeper(LOOPBACK, TOKENS)) as (url, names):
            own = OriginHeader(url.replace("ws://", "http://").removesuffix(PATH))
            offer = [Subprotocol("continue.v1"), Subprotocol(f"bearer.{ANN}")]
            async with connect(url, subprotocols=offer, origin=own, proxy=None) as socket:
                assert socket.subprotocol == "continue.v1"
            async with connect(url, additional_headers={"Authorization": f"Bearer {BOB}"}, proxy=None) as socket:
                assert socket.subprotocol is None
            assert names == ["ann", "bob"]

            async def refused(status: int, address: str = url, **headers: str) -> str:
                with pytest.raises(InvalidStatus) as info:
                    async with connect(address, additional_headers=headers, proxy=None):
                        pass
                response = info.value.response
                assert response.status_code == status
                return (response.body or b"").decode()

            assert (await refused(401)).startswith("unauthorized: ")
            assert "leaked" in await refused(401, f"{url}?token={ANN}")
            foreign = await refused(403, Origin="http://evil.example", Authorization=f"Bearer {ANN}")
            assert foreign.startswith("forbidden_origin: ")
            assert (await refused(400, **{"Sec-WebSocket-Protocol": f"bearer.{ANN} ("})).startswith("bad_request: ")
            assert names == ["ann", "bob"]

    asyncio.run(test())
    assert ANN not in caplog.text
    assert BOB not in caplog.text
