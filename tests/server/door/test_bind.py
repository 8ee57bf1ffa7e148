"""Where the server may listen."""

from __future__ import annotations

import socket

import pytest

from streaming.server.door.bind import Bind, BindError, addresses_of, check_bind
from streaming.server.door.tokens import Tokens

TOKENS = Tokens.from_text("ann:ann-0123456789abcdef")


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
def test_a_name_is_loopback_only_if_all_its_addresses_are(addresses: list[str], loopback: bool) -> None:
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


def test_a_host_without_an_address_is_refused() -> None:
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


def test_the_systems_own_resolver_is_asked() -> None:
    assert addresses_of("127.0.0.1") == ("127.0.0.1",)
    assert check_bind("localhost", None, tls=False, insecure_plaintext=False).loopback
    with pytest.raises(BindError):
        check_bind("0.0.0.0", None, tls=False, insecure_plaintext=False)  # noqa: S104
    with pytest.raises(BindError, match="has no address"):
        check_bind("a..b", None, tls=False, insecure_plaintext=False)
