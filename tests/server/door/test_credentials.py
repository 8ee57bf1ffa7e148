"""How a request shows its token."""

from __future__ import annotations

import pytest
from websockets.datastructures import Headers
from websockets.typing import Subprotocol

from streaming.server.door.credentials import select_subprotocol
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.refusals import Refusal
from tests.server.door.requests import ANN, BOB, LOOPBACK, PATH, PEER, PUBLIC, TOKENS, ask, code


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
def test_a_token_may_be_shown_in_each_of_these_ways(header: tuple[str, str], name: str) -> None:
    visitor = ask(Gatekeeper(PUBLIC, TOKENS), header)
    assert isinstance(visitor, Visitor)
    assert visitor.name == name
    assert repr(visitor) == f"Visitor(holder=Holder(name='{name}'))"  # no token, no address


def test_a_proxys_password_does_not_hide_a_browsers_token() -> None:
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
def test_who_shows_no_valid_token_is_unauthorized(headers: list[tuple[str, str]]) -> None:
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
def test_what_can_be_read_in_two_ways_is_not_read(headers: list[tuple[str, str]]) -> None:
    assert code(ask(Gatekeeper(PUBLIC, TOKENS), *headers)) == "bad_request"


@pytest.mark.parametrize(
    "query",
    ["token=", "a=b&access_token={}", "API_KEY={}", "%74oken={}", "a;token={}", "token", "x=1&Authorization={}"],
)
def test_a_token_in_the_url_is_refused_even_with_a_good_one_beside_it(query: str) -> None:
    """moshi-server takes tokens in query strings, and logs them."""
    answer = ask(Gatekeeper(PUBLIC, TOKENS), ("Authorization", f"Bearer {ANN}"), path=f"{PATH}?{query.format(ANN)}")
    assert isinstance(answer, Refusal)
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert "leaked" in answer.message
    assert ANN not in answer.body
    assert code(Gatekeeper(LOOPBACK).look(Headers([("Host", "localhost")]), "/?token=x", PEER, 0)) == "unauthorized"


def test_other_parameters_are_none_of_its_business() -> None:
    answer = ask(Gatekeeper(PUBLIC, TOKENS), ("Authorization", f"Bearer {ANN}"), path="/v1/realtime?model=demo")
    assert isinstance(answer, Visitor)


def test_subprotocols_never_answer_with_a_token() -> None:
    def answered(*offered: str) -> str | None:
        return select_subprotocol(None, [Subprotocol(name) for name in offered])

    assert answered(f"bearer.{ANN}", "continue.v1") == "continue.v1"
    assert answered("realtime", f"openai-insecure-api-key.{ANN}") == "realtime"
    assert answered(f"bearer.{ANN}") is None
    assert answered("continue.v2") is None
    assert answered() is None
