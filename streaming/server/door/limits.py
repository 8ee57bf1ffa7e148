"""Limits on one peer: how much it may have, what it is counted under, and the counts of what it has."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from streaming.addresses import parse_address
from streaming.server.token_buckets import TokenBuckets


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one peer may have. An address is an IPv4 address, or the /64 that an IPv6 host has to itself.

    connections_per_s, connection_burst: a token bucket per address, for every connection, page loads included.
    addresses: how many of them are remembered; the one not seen for longest goes first.
    handshakes, handshakes_per_address: connections that have not sent their request yet, TLS included; fewer where the
    process may not have twice as many files open.
    """

    sessions_per_token: int = 32
    sessions_per_address: int = 8
    connections_per_s: float = 5.0
    connection_burst: int = 200
    addresses: int = 10_000
    handshakes: int = 1_000
    handshakes_per_address: int = 64


def address_key(peer: str | None) -> str | None:
    """Return what a peer is counted under, or None if it is on this machine and not counted.

    Loopback is exempt: behind a proxy on this machine everyone has its address, so that a limit on it would be a limit
    on all; benchmarks open hundreds of sessions; and who runs programs here needs no sessions to be a nuisance.
    """
    if not peer:
        return None  # a Unix socket
    address = parse_address(peer)
    if address is None:
        return "unknown"
    if address.is_loopback:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


class Usage:
    """Counts connections and sessions against `limits`.

    Bounded: token buckets by `Limits.addresses`, sessions by those that are open.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buckets: TokenBuckets[str] = TokenBuckets(limits.addresses)
        self._sessions: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        """Return how many addresses are remembered."""
        return len(self._buckets)

    def connect(self, address: str | None, now: float) -> float:
        """Count one attempt. Return 0 if it may go on, otherwise in how many seconds to try again."""
        if address is None:
            return 0.0
        limits = self._limits
        return self._buckets.of(address, limits.connection_burst, limits.connections_per_s, now).take(now)

    def has_room(self, address: str | None, name: str | None) -> bool:
        """Return whether one more session of this address and this token's name is within the limits."""
        if name is not None and self._sessions["token", name] >= self._limits.sessions_per_token:
            return False
        return address is None or self._sessions["address", address] < self._limits.sessions_per_address

    @contextmanager
    def session(self, address: str | None, name: str | None) -> Iterator[None]:
        """Count one session while the block lasts."""
        counted = [(kind, key) for kind, key in (("token", name), ("address", address)) if key is not None]
        self._sessions.update(counted)
        try:
            yield
        finally:
            self._sessions.subtract(counted)
            for key in counted:
                if not self._sessions[key]:
                    del self._sessions[key]
