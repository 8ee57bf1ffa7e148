"""Find whose request it is: the peer's, or that of a client behind a proxy that the operator trusts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from websockets.datastructures import Headers

from streaming.addresses import parse_address
from streaming.errors import StreamingError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ProxyError(StreamingError):
    """What the operator calls a network of proxies is none."""

    code = "bad_proxy"


def parse_proxies(texts: Iterable[str]) -> tuple[Network, ...]:
    """Return the values of `--trusted-proxy`: addresses or networks (10.0.0.0/8). Raises `ProxyError`."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ProxyError(f"--trusted-proxy {text} is no network: {error}; it looks like 10.0.0.0/8") from None
    return tuple(found)


def client_address(headers: Headers, peer: str | None, proxies: Sequence[Network]) -> str | None:
    """Return whose request it is: the peer's, or, if that is one of our proxies, whoever the proxy says it is.

    Any client can send X-Forwarded-For, so it is read from its end, where the proxies wrote: the last address that is
    none of theirs. Where there is no such thing the proxy itself is counted.
    """
    if not _among(peer, proxies):
        return peer
    told = [part.strip() for value in headers.get_all("X-Forwarded-For") for part in value.split(",")]
    client = next((address for address in reversed(told) if not _among(address, proxies)), None)
    return client if client is not None and parse_address(client) is not None else peer


def _among(text: str | None, networks: Sequence[Network]) -> bool:
    address = parse_address(text) if text and networks else None
    return address is not None and any(address in network for network in networks)
