"""Decide who may come in: what a request has to show before a session begins.

Pure but for the token file's own looks: headers, addresses and times come in, a `Visitor` or a `Refusal` goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from websockets.datastructures import Headers

from streaming.addresses import is_loopback
from streaming.server.door.bind import Bind
from streaming.server.door.credentials import names_a_token, offered_subprotocols, presented_token
from streaming.server.door.limits import Limits, Usage, address_key
from streaming.server.door.origins import Host, Origin
from streaming.server.door.proxies import Network, client_address
from streaming.server.door.refusals import (
    FORBIDDEN_HOST,
    FORBIDDEN_ORIGIN,
    TOKEN_IN_URL,
    TOO_MANY_SESSIONS,
    UNAUTHORIZED,
    Refusal,
    bad_request,
    too_many_connections,
)
from streaming.server.door.tokens import Holder, Tokens

METRICS_READER = "metrics"
"""The name of the token that reads the server's figures, and opens nothing else."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who may come in. holder: of which token, None where no tokens are asked for."""

    holder: Holder | None
    address: str | None = field(repr=False)  # personal data: not for logs

    @property
    def name(self) -> str | None:
        """The token's name, for metrics and logs."""
        return self.holder.name if self.holder is not None else None

    @property
    def digest(self) -> bytes | None:
        """What stands for the token where a session is kept; None where no tokens are asked for."""
        return self.holder.digest if self.holder is not None else None


class Gatekeeper:
    """The one judge of a server's requests, used from one thread.

    tokens: None where none are asked for. proxies: whose word on their clients' addresses is believed. `now` is in
    seconds, of one monotonic clock.
    """

    def __init__(
        self,
        bind: Bind,
        tokens: Tokens | None = None,
        origins: frozenset[Origin] = frozenset(),
        limits: Limits | None = None,
        proxies: tuple[Network, ...] = (),
    ) -> None:
        self.bind, self._tokens, self._origins, self._proxies = bind, tokens, origins, proxies
        self.limits = limits or Limits()
        self._usage = Usage(self.limits)
        host = Host.parse(bind.host)
        # An operator who names origins may have a proxy in front that passes its own host on.
        self._hosts = {"localhost", *(origin.host for origin in origins), *([host.name] if host is not None else [])}

    def look(self, headers: Headers, path: str, peer: str | None, now: float) -> Refusal | None:
        """Return why a request that needs no token is refused: too many, another host's name, a token in the URL.

        path: as requested, with its query; peer: the address without the port, None or "" for a Unix socket.
        """
        wait_s = self._usage.connect(self._address_key(headers, peer), now)
        if wait_s:
            return too_many_connections(wait_s)
        host = _host(headers)
        if host is None:
            return bad_request("Host")
        if self.bind.loopback and host.name not in self._hosts and not is_loopback(host.name):
            return FORBIDDEN_HOST
        return TOKEN_IN_URL if names_a_token(path) else None

    def admit(self, headers: Headers, path: str, peer: str | None, now: float) -> Visitor | Refusal:
        """Return who asks for what needs a token, or why not. Only the connection is counted."""
        visitor = self._identify(headers, path, peer, now)
        if isinstance(visitor, Visitor) and visitor.name == METRICS_READER:
            return UNAUTHORIZED
        return visitor

    def admit_reader(self, headers: Headers, path: str, peer: str | None, now: float) -> Refusal | None:
        """Return why the server's figures are refused: where there are tokens, only that named `metrics` reads them."""
        visitor = self._identify(headers, path, peer, now)
        if isinstance(visitor, Refusal):
            return visitor
        return None if visitor.holder is None or visitor.name == METRICS_READER else UNAUTHORIZED

    def _identify(self, headers: Headers, path: str, peer: str | None, now: float) -> Visitor | Refusal:
        refusal = self.look(headers, path, peer, now) or self._check_origin(headers)
        if refusal is not None:
            return refusal
        offered = offered_subprotocols(headers)
        if offered is None:
            return bad_request("Sec-WebSocket-Protocol")
        holder = None
        if self._tokens is not None:
            presented = presented_token(headers, offered)
            if isinstance(presented, Refusal):
                return presented
            holder = self._tokens.check(presented, now)
            if holder is None:
                return UNAUTHORIZED
        return Visitor(holder, self._address_key(headers, peer))

    def _address_key(self, headers: Headers, peer: str | None) -> str | None:
        return address_key(client_address(headers, peer, self._proxies))

    def crowded(self, visitor: Visitor) -> Refusal | None:
        """Return why this visitor may not have one more session just now. Coming back to one needs no room."""
        return None if self._usage.has_room(visitor.address, visitor.name) else TOO_MANY_SESSIONS

    @contextmanager
    def session(self, visitor: Visitor) -> Iterator[Refusal | None]:
        """Count a session while the block lasts, unless the block is given a refusal."""
        refusal = self.crowded(visitor)
        if refusal is not None:
            yield refusal
            return
        with self._usage.session(visitor.address, visitor.name):
            yield None

    def still_welcome(self, visitor: Visitor, now: float) -> bool:
        """Return False once the visitor's token was revoked: its sessions are to end."""
        return self._tokens is None or (visitor.holder is not None and self._tokens.still_valid(visitor.holder, now))

    def _check_origin(self, headers: Headers) -> Refusal | None:
        """Return why a page may not ask. A browser says which page asks, and no page can forge that."""
        values, host = headers.get_all("Origin"), _host(headers)
        if not values:
            return None
        if len(values) > 1 or host is None:
            return bad_request("Origin")
        origin = Origin.parse(values[0])
        if origin is None:
            return FORBIDDEN_ORIGIN
        if origin in self._origins:
            return None
        own = origin.is_of(host) and (origin.scheme == "https" or not self.bind.tls)
        return None if own else FORBIDDEN_ORIGIN


def _host(headers: Headers) -> Host | None:
    values = headers.get_all("Host")
    return Host.parse(values[0]) if len(values) == 1 else None
