"""Whose request it is that comes through a proxy."""

from __future__ import annotations

import pytest
from websockets.datastructures import Headers

from streaming.server.door.proxies import ProxyError, client_address, parse_proxies

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
def test_only_what_our_proxies_wrote_is_believed(peer: str | None, told: list[str], client: str) -> None:
    headers = Headers([("X-Forwarded-For", value) for value in told])
    assert client_address(headers, peer, OURS) == client
    assert client_address(headers, peer, ()) == peer


@pytest.mark.parametrize("text", ["", "ingress", "10.0.0.1/8", "*"])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ProxyError, match="--trusted-proxy"):
        parse_proxies([text])
