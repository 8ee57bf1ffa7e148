"""Hosts and origins, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.server.door.origins import Host, Origin, OriginError, parse_origins


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
def test_a_host_is_read_or_is_none(text: str, host: Host | None) -> None:
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
def test_an_origin_is_read_or_is_none(text: str, origin: Origin | None) -> None:
    assert Origin.parse(text) == origin


def test_allowed_origins_are_checked_at_the_start() -> None:
    """A slash too many meant that a page was never let in, and nobody was told why."""
    assert parse_origins(["https://a.example/", "http://b:81"]) == {
        Origin("https", "a.example", 443),
        Origin("http", "b", 81),
    }
    for text in ("*", "null", "a.example", "https://a.example/page", "wss://a.example", ""):
        with pytest.raises(OriginError, match="--allow-origin"):
            parse_origins([text])


@given(st.text(max_size=50))
def test_no_text_breaks_a_parser(text: str) -> None:
    Host.parse(text)
    Origin.parse(text)
