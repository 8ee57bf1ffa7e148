"""The listening sockets, and how many of their connections may be without a request: handshakes that are pending.

Between accepting a connection and the end of its handshake asyncio has nothing but a time-out, and under TLS the
connection is nobody's until then: whoever opens enough of them takes all file descriptors. But asyncio calls `accept`
of the very socket that it is given, so that one counts. (Not on Windows, where it accepts by other means.)
"""

from __future__ import annotations

import errno
import socket
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from streaming.server.door.limits import Limits, address_key

_AT_ONCE = 16
"""Connections accepted in one turn of the event loop: 5 ms of it. asyncio would take as many as the backlog holds."""
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class PendingHandshakes:
    """Connections that were accepted and have not sent a request yet.

    When there are too many, of one address or in all, the one that has waited for longest is hung up on, and not the
    newcomer refused: a client whose handshake goes on gets in, however many others only wait.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._most = limits, min(limits.handshakes, _descriptors() // 2)
        self._waiting: OrderedDict[int, tuple[socket.socket, str | None]] = OrderedDict()  # by file descriptor
        self._addresses: Counter[str | None] = Counter()

    def __len__(self) -> int:
        """Return how many there are, with those that have hung up by themselves and were not missed yet."""
        return len(self._waiting)

    def enter(self, connection: socket.socket, peer: str | None) -> None:
        """Note that a connection was accepted. peer: its address."""
        self.leave(connection.fileno())  # a connection that was closed: its file descriptor is used again
        address = address_key(peer)
        if address is not None and self._addresses[address] >= self._limits.handshakes_per_address:
            self._turn_away(next(number for number, (_, other) in self._waiting.items() if other == address))
        while len(self._waiting) >= self._most:
            self._turn_away(next(iter(self._waiting)))
        self._waiting[connection.fileno()] = connection, address
        self._addresses[address] += 1

    def leave(self, number: int) -> None:
        """Note that the connection with this file descriptor has sent its request."""
        found = self._waiting.pop(number, None)
        if found is not None:
            address = found[1]
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def _turn_away(self, number: int) -> None:
        connection = self._waiting[number][0]
        self.leave(number)
        with suppress(OSError):  # the connection may be closed already, or its peer gone
            connection.shutdown(socket.SHUT_RDWR)  # asyncio, whose it is, reads the end and closes it


class ListeningSocket(socket.socket):
    """Bound; what it accepts enters `pending`. Raises `OSError` where the address cannot be had."""

    def __init__(self, address: str, port: int, pending: PendingHandshakes) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        bound = socket.create_server((address, port), family=family)
        # asyncio goes by the protocol's number: without it Nagle's algorithm (RFC 896) stays on, and a small message
        # that follows another waits for the peer's delayed acknowledgement: 40 ms.
        super().__init__(bound.family, bound.type, socket.IPPROTO_TCP, fileno=bound.detach())
        self._pending, self._in_a_row = pending, 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self._in_a_row >= _AT_ONCE:
            self._in_a_row = 0
            raise BlockingIOError  # the rest are accepted in the next turn of the loop
        try:
            connection, peer = super().accept()
        except OSError as error:
            # Out of descriptors, asyncio pauses for a second; but until 3.13 it first asks again as often as the
            # backlog is long, and logs a traceback each time.
            self._in_a_row = _AT_ONCE if error.errno in _EXHAUSTED else 0
            raise
        self._in_a_row += 1
        self._pending.enter(connection, peer[0])
        return connection, peer


def listen(addresses: Sequence[str], port: int, pending: PendingHandshakes) -> list[ListeningSocket]:
    """Return a socket for each address, all on one port; for port 0 the first picks it. Raises `OSError`."""
    sockets: list[ListeningSocket] = []
    try:
        for address in addresses:
            sockets.append(ListeningSocket(address, port, pending))
            port = sockets[0].getsockname()[1]
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def _descriptors() -> int:
    """Return how many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 16
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if most != resource.RLIM_INFINITY else 1 << 20
