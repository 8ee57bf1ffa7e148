"""Who may come in: binds, origins, limits, whole requests, and all of it once over a real handshake."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
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

from streaming.server.door.access import (
    Bind,
    BindError,
    Gate,
    Gatekeeper,
    Host,
    Limits,
    Origin,
    OriginError,
    ProxyError,
    Refusal,
    Visitor,
    address_key,
    addresses_of,
    check_bind,
    client_address,
    is_loopback,
    parse_origins,
    parse_proxies,
    select_subprotocol,
)
from streaming.server.door.tokens import Tokens

ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
TOKENS = Tokens.from_text(f"ann:{ANN},bob:{BOB}")
LOOPBACK = Bind("127.0.0.1", ("127.0.0.1",), loopback=True, tls=False)
PUBLIC = Bind("0.0.0.0", ("0.0.0.0",), loopback=False, tls=True)  # noqa: S104
PATH = "/v1/continue"
PEER = "203.0.113.7"
VALUES = st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f")
"""What `websockets` lets through in a header's value, as ISO 8859-1."""


def ask(
    keeper: Gatekeeper, *headers: tuple[str, str], path: str = PATH, peer: str = PEER, now: float = 0.0
) -> Visitor | Refusal:
    """A request with these headers, and a Host if they have none."""
    given = Headers(headers)
    if "Host" not in given:
        given["Host"] = "localhost:8765"
    return keeper.admit(given, path, peer, now)


def code(answer: Visitor | Refusal | None) -> str | None:
    return answer.code if isinstance(answer, Refusal) else None


def crowded(keeper: Gatekeeper, *headers: tuple[str, str]) -> Refusal | None:
    """Whether somebody with these headers, from any address, may have one more session."""
    visitor = ask(keeper, *headers)
    assert isinstance(visitor, Visitor)
    return keeper.crowded(visitor)


class TestBind:
    @pytest.mark.parametrize(
        ("addresses", "loopback"),
        [
            (["127.0.0.1"], True),
            (["127.8.9.1", "::1"], True),
            (["::ffff:127.0.0.1"], True),
            (["127.0.0.1", "192.0.2.1"], False),
            (["192.0.2.1"], False),
            (["0.0.0.0"], False),  # noqa: S104
            (["::"], False),
            (["fe80::1%eth0"], False),
            (["localhost"], False),
        ],
    )
    def test_a_name_is_loopback_only_if_all_its_addresses_are(self, addresses: list[str], loopback: bool) -> None:
        """A name with one address of each kind listened to the network without a token."""
        if loopback:
            bind = check_bind("here", None, tls=False, insecure_plaintext=False, resolve=lambda _: addresses)
            assert bind == Bind("here", tuple(addresses), loopback=True, tls=False)
            return
        with pytest.raises(BindError, match=r"STREAMING_TOKENS.*--tokens"):
            check_bind("here", None, tls=True, insecure_plaintext=True, resolve=lambda _: addresses)
        with pytest.raises(BindError, match=r"--tls-cert FILE --tls-key FILE, or --insecure-plaintext"):
            check_bind("here", TOKENS, tls=False, insecure_plaintext=False, resolve=lambda _: addresses)
        for tls, insecure in ((True, False), (False, True), (True, True)):
            bind = check_bind("here", TOKENS, tls=tls, insecure_plaintext=insecure, resolve=lambda _: addresses)
            assert (bind.loopback, bind.tls) == (False, tls)

    def test_a_host_without_an_address_is_refused(self) -> None:
        """`all` of no addresses is true."""

        def unknown(_: str) -> list[str]:
            raise socket.gaierror(-2, "Name or service not known")

        def none(_: str) -> list[str]:
            return []

        for resolve in (unknown, none):
            with pytest.raises(BindError, match="--host nowhere has no address"):
                check_bind("nowhere", TOKENS, tls=True, insecure_plaintext=False, resolve=resolve)
        with pytest.raises(BindError, match="--host is empty"):
            check_bind("", TOKENS, tls=True, insecure_plaintext=False)

    def test_the_systems_own_resolver(self) -> None:
        assert addresses_of("127.0.0.1") == ("127.0.0.1",)
        assert check_bind("localhost", None, tls=False, insecure_plaintext=False).loopback
        with pytest.raises(BindError):
            check_bind("0.0.0.0", None, tls=False, insecure_plaintext=False)  # noqa: S104
        with pytest.raises(BindError, match="has no address"):
            check_bind("a..b", None, tls=False, insecure_plaintext=False)


class TestProxies:
    OURS = parse_proxies(["10.0.0.0/8", "fd00::/8"])

    @pytest.mark.parametrize(
        ("peer", "told", "client"),
        [
            ("10.1.2.3", ["203.0.113.7"], "203.0.113.7"),
            ("10.1.2.3", ["127.0.0.1, 198.51.100.1, 203.0.113.7"], "203.0.113.7"),  # the client made two of them up
            ("10.1.2.3", ["127.0.0.1", "203.0.113.7"], "203.0.113.7"),
            ("10.1.2.3", ["203.0.113.7, 10.9.9.9"], "203.0.113.7"),  # two proxies in a row
            ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
            ("::ffff:10.1.2.3", ["203.0.113.7"], "203.0.113.7"),
            ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # a stranger says who it is
            ("10.1.2.3", [], "10.1.2.3"),
            ("10.1.2.3", ["203.0.113.7, nonsense"], "10.1.2.3"),
            ("10.1.2.3", ["203.0.113.7,"], "10.1.2.3"),
            ("10.1.2.3", ["10.4.4.4"], "10.1.2.3"),
            (None, ["203.0.113.7"], None),
        ],
    )
    def test_only_what_our_proxies_wrote_is_believed(self, peer: str | None, told: list[str], client: str) -> None:
        headers = Headers([("X-Forwarded-For", value) for value in told])
        assert client_address(headers, peer, self.OURS) == client
        assert client_address(headers, peer, ()) == peer

    def test_clients_of_a_proxy_are_counted_one_by_one(self) -> None:
        """Behind an ingress all had one address: its eight sessions, and its sixty page loads, were everybody's."""
        limits = Limits(sessions_per_address=1, connection_burst=2, connections_per_s=0.001)
        keeper = Gatekeeper(PUBLIC, None, frozenset(), limits, self.OURS)
        ann = ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3")
        bob = ask(keeper, ("X-Forwarded-For", "203.0.113.2"), peer="10.1.2.3")
        assert isinstance(ann, Visitor) and isinstance(bob, Visitor)
        with keeper.session(ann) as refusal:
            assert refusal is None and code(keeper.crowded(ann)) == "too_many_sessions"
            assert keeper.crowded(bob) is None
        assert isinstance(ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3"), Visitor)
        assert code(ask(keeper, ("X-Forwarded-For", "203.0.113.1"), peer="10.1.2.3")) == "too_many_connections"
        assert isinstance(ask(keeper, ("X-Forwarded-For", "203.0.113.2"), peer="10.1.2.3"), Visitor)

    @pytest.mark.parametrize("text", ["", "ingress", "10.0.0.1/8", "*"])
    def test_what_is_no_network_is_refused(self, text: str) -> None:
        with pytest.raises(ProxyError, match="--trusted-proxy"):
            parse_proxies([text])


class TestNames:
    @pytest.mark.parametrize(
        ("text", "host"),
        [
            ("localhost:8765", Host("localhost", 8765)),
            ("LocalHost.", Host("localhost", None)),
            ("127.0.0.1", Host("127.0.0.1", None)),
            ("[0:0::1]:80", Host("::1", 80)),
            ("[::ffff:127.0.0.1]", Host("127.0.0.1", None)),
            ("a.example:65535", Host("a.example", 65535)),
            *((text, None) for text in ("", ":80", "a:", "a:0", "a:65536", "a b", "a,b", "a/b", "::1", "[127.0.0.1]")),
            *((text, None) for text in ("[]", "[::g]", "u@a", "a:80:80", "\u212aelvin", "a\n", ".")),
        ],
    )
    def test_hosts(self, text: str, host: Host | None) -> None:
        assert Host.parse(text) == host

    @pytest.mark.parametrize(
        ("text", "origin"),
        [
            ("http://localhost", Origin("http", "localhost", 80)),
            ("HTTPS://A.Example", Origin("https", "a.example", 443)),
            ("https://[::1]:8443", Origin("https", "::1", 8443)),
            ("app://page", Origin("app", "page", None)),
            *((text, None) for text in ("null", "", "*", "http://", "//a", "http://a/b", "http://a b", "http://a\n")),
        ],
    )
    def test_origins(self, text: str, origin: Origin | None) -> None:
        assert Origin.parse(text) == origin

    def test_allowed_origins_are_checked_at_the_start(self) -> None:
        """A slash too many meant that a page was never let in, and nobody was told why."""
        assert parse_origins(["https://a.example/", "http://b:81"]) == {
            Origin("https", "a.example", 443),
            Origin("http", "b", 81),
        }
        for text in ("*", "null", "a.example", "https://a.example/page", "wss://a.example", ""):
            with pytest.raises(OriginError, match="--allow-origin"):
                parse_origins([text])

    @given(st.text(max_size=50))
    def test_no_text_breaks_a_parser(self, text: str) -> None:
        Host.parse(text)
        Origin.parse(text)
        address_key(text)
        assert not is_loopback("x" + text)


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
    @pytest.mark.parametrize(
        ("header", "name"),
        [
            (("Authorization", f"Bearer {ANN}"), "ann"),
            (("authorization", f"bearer  {BOB}"), "bob"),
            (("Sec-WebSocket-Protocol", f"continue.v1, bearer.{ANN}"), "ann"),
            (("Sec-WebSocket-Protocol", f"bearer.{BOB}"), "bob"),
            (("Sec-WebSocket-Protocol", f"realtime,openai-insecure-api-key.{ANN}"), "ann"),
        ],
    )
    def test_ways_to_show_one(self, header: tuple[str, str], name: str) -> None:
        visitor = ask(Gatekeeper(PUBLIC, TOKENS), header)
        assert isinstance(visitor, Visitor)
        assert visitor.name == name
        assert repr(visitor) == f"Visitor(holder=Holder(name='{name}'))"  # no token, no address

    def test_a_proxys_password_does_not_hide_a_browsers_token(self) -> None:
        headers = ("Authorization", "Basic dXNlcjpwYXNz"), ("Sec-WebSocket-Protocol", f"bearer.{ANN}")
        assert isinstance(ask(Gatekeeper(PUBLIC, TOKENS), *headers), Visitor)

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [("Authorization", "")],
            [("Authorization", "Bearer")],
            [("Authorization", f"Bearer {ANN[:-1]}")],
            [("Authorization", f"Bearer {ANN} {BOB}")],
            [("Authorization", f"Basic {ANN}")],
            [("Authorization", "Bearer \xff\xfe")],
            [("Authorization", f"Bearer {'x' * 8000}")],
            [("Authorization", "Bearer no"), ("Sec-WebSocket-Protocol", f"bearer.{ANN}")],
            [("Sec-WebSocket-Protocol", "continue.v1, bearer.")],
            [("Cookie", f"token={ANN}")],
        ],
    )
    def test_no_valid_token(self, headers: list[tuple[str, str]]) -> None:
        answer = ask(Gatekeeper(PUBLIC, TOKENS), *headers)
        assert isinstance(answer, Refusal)
        assert (answer.status, answer.code) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="streaming"'

    @pytest.mark.parametrize(
        "headers",
        [
            [("Authorization", f"Bearer {ANN}"), ("Authorization", f"Bearer {BOB}")],
            [("Sec-WebSocket-Protocol", f"bearer.{ANN}, bearer.{BOB}")],
            [("Sec-WebSocket-Protocol", f"bearer.{ANN}"), ("Sec-WebSocket-Protocol", f"bearer.{BOB}")],
            [("Sec-WebSocket-Protocol", f'continue.v1 bearer.{ANN}, "')],
        ],
    )
    def test_what_can_be_read_in_two_ways_is_not_read(self, headers: list[tuple[str, str]]) -> None:
        assert code(ask(Gatekeeper(PUBLIC, TOKENS), *headers)) == "bad_request"

    @pytest.mark.parametrize(
        "query",
        ["token=", "a=b&access_token={}", "API_KEY={}", "%74oken={}", "a;token={}", "token", "x=1&Authorization={}"],
    )
    def test_a_token_in_the_url_is_refused_even_with_a_good_one_beside_it(self, query: str) -> None:
        """moshi-server takes tokens in query strings, and logs them."""
        answer = ask(Gatekeeper(PUBLIC, TOKENS), ("Authorization", f"Bearer {ANN}"), path=f"{PATH}?{query.format(ANN)}")
        assert isinstance(answer, Refusal)
        assert (answer.status, answer.code) == (401, "unauthorized")
        assert "leaked" in answer.message
        assert ANN not in answer.body
        assert code(Gatekeeper(LOOPBACK).look(Headers([("Host", "localhost")]), "/?token=x", PEER, 0)) == "unauthorized"

    def test_other_parameters_are_none_of_its_business(self) -> None:
        answer = ask(Gatekeeper(PUBLIC, TOKENS), ("Authorization", f"Bearer {ANN}"), path="/v1/realtime?model=demo")
        assert isinstance(answer, Visitor)

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

    def test_subprotocols_never_answer_with_a_token(self) -> None:
        def answered(*offered: str) -> str | None:
            return select_subprotocol(None, [Subprotocol(name) for name in offered])

        assert answered(f"bearer.{ANN}", "continue.v1") == "continue.v1"
        assert answered("realtime", f"openai-insecure-api-key.{ANN}") == "realtime"
        assert answered(f"bearer.{ANN}") is None
        assert answered("continue.v2") is None
        assert answered() is None


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
    def test_addresses_are_counted_as_one_host_has_them(self) -> None:
        """One IPv6 host has 2^64 addresses of its own, and a limit for each of them is none."""
        assert address_key("192.0.2.1") == address_key("::ffff:192.0.2.1") == "192.0.2.1"
        assert address_key("2001:db8::1") == address_key("2001:db8::ffff:2%eth0") == "2001:db8::/64"
        assert address_key("2001:db8:0:1::1") != address_key("2001:db8::1")
        for local in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "", None):
            assert address_key(local) is None
        assert address_key("what?") == "unknown"

    def test_connections_drain_a_bucket_that_fills_again(self) -> None:
        gate = Gate(Limits(connections_per_s=2.0, connection_burst=3))
        assert [gate.connect("a", 10.0) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
        assert gate.connect("b", 10.0) == 0
        assert gate.connect("a", 10.25) == pytest.approx(0.25)
        assert gate.connect("a", 10.5) == 0
        assert gate.connect("a", 10.5) == pytest.approx(0.5)
        assert gate.connect("a", 9.0) == pytest.approx(0.5)  # a clock that went back gives nothing
        assert [gate.connect("a", 1e6) for _ in range(4)] == [0, 0, 0, 0.5]

    def test_the_table_is_bounded_and_the_longest_unseen_goes_first(self) -> None:
        """A table of everyone who ever connected is memory that strangers fill."""
        gate = Gate(Limits(connections_per_s=1.0, connection_burst=1, addresses=3))
        for address in "abcadaeafa":
            assert (gate.connect(address, 0.0) == 0) == (address != "a" or len(gate) == 1)  # a is seen all along
            assert len(gate) <= 3
        assert gate.connect("b", 0.0) == 0  # forgotten
        large = Gate(Limits())
        for number in range(10_100):
            large.connect(str(number), number)
        assert len(large) == 10_000

    def test_a_refused_connection_is_told_when(self) -> None:
        keeper = Gatekeeper(PUBLIC, limits=Limits(connection_burst=2, connections_per_s=0.25))
        assert [code(ask(keeper)) for _ in range(3)] == [None, None, "too_many_connections"]
        answer = ask(keeper, now=1.0)
        assert isinstance(answer, Refusal)
        assert (answer.status, answer.retry_after_s, answer.headers["Retry-After"]) == (429, 3.0, "3")
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

    def test_sessions_of_an_address(self) -> None:
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

    @given(st.lists(st.integers(0, 9), max_size=60))
    def test_counts_return_to_nothing_in_whatever_order_sessions_end(self, order: list[int]) -> None:
        """A count that leaks by one an error locks an address out for good."""
        limits = Limits(sessions_per_token=4, sessions_per_address=4)
        gate, open_sessions = Gate(limits), dict[int, contextlib.ExitStack]()
        for number in order:
            if number in open_sessions:
                open_sessions.pop(number).close()
            elif gate.has_room("a", "ann"):
                open_sessions[number] = contextlib.ExitStack()
                open_sessions[number].enter_context(gate.session("a", "ann"))
            assert len(open_sessions) <= 4
        for stack in open_sessions.values():
            with contextlib.suppress(ZeroDivisionError), stack:
                raise ZeroDivisionError
        assert not gate._sessions


# The wiring that the server has, over real sockets


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
