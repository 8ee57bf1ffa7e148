"""Who may come in: where the server may listen, and what a request has to show before a session begins.

Pure but for the token file's own looks: headers, addresses and times come in, a `Visitor` or a `Refusal` goes out.
Nothing that a peer sent is repeated in a refusal, so nothing of it can reach a page, a terminal or a log through here.
"""

from __future__ import annotations

import ipaddress
import math
import re
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self
from urllib.parse import unquote_plus

from websockets.datastructures import Headers
from websockets.typing import Subprotocol

from streaming.errors import StreamingError
from streaming.server.door.tokens import ENVIRONMENT, Holder, Tokens

SUBPROTOCOLS = ("continue.v1", "realtime")
"""What the server may answer. A browser fails a connection whose offer is met with silence."""
_TOKEN_PREFIXES = ("bearer.", "openai-insecure-api-key.")
"""How a browser, which cannot set headers, offers a token as a subprotocol: ours, and that of OpenAI's pages."""
_TOKEN_PARAMETERS = frozenset(
    ("token", "access_token", "auth_token", "bearer", "auth", "authorization", "key", "api_key", "apikey", "api-key")
)
METRICS_READER = "metrics"
"""The name of the token that reads the server's figures, and opens nothing else."""
_SESSION_RETRY_S = 2.0
_SUBPROTOCOL = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # token, RFC 9110, section 5.6.2
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31})://(.{1,300})", re.ASCII)
_PORTS = {"http": 80, "https": 443}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class BindError(StreamingError):
    """The server will not listen there as things are. The message says what to add."""

    code = "bad_bind"


class ProxyError(StreamingError):
    """A network of proxies that is none."""

    code = "bad_proxy"


class OriginError(StreamingError):
    """An allowed origin that no browser would send."""

    code = "bad_origin"


# Where the server may listen


@dataclass(frozen=True, slots=True)
class Bind:
    """Where to listen: these addresses and not the name, which might mean others by then.

    loopback: nobody outside this machine can connect; tls: the server itself speaks TLS.
    """

    host: str
    addresses: tuple[str, ...]
    loopback: bool
    tls: bool


def addresses_of(host: str) -> tuple[str, ...]:
    """All addresses of a name, or the address itself. Raises `OSError` where there are none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def check_bind(
    host: str,
    tokens: Tokens | None,
    *,
    tls: bool,
    insecure_plaintext: bool,
    resolve: Callable[[str], Sequence[str]] = addresses_of,
) -> Bind:
    """Loopback is fine as it is; elsewhere tokens are needed, and TLS unless the operator waives it.

    A name counts as loopback only if all its addresses do. Raises `BindError`.
    """
    if not host:
        raise BindError("--host is empty; name an address, 0.0.0.0 or :: for all of them")
    try:
        addresses = tuple(resolve(host))
    except (OSError, UnicodeError) as error:
        raise BindError(f"--host {host} has no address ({error}); name one of this machine's") from None
    if not addresses:
        raise BindError(f"--host {host} has no address; name one of this machine's")
    loopback = all(map(is_loopback, addresses))
    if not loopback and tokens is None:
        raise BindError(
            f"--host {host} can be reached from other machines, and anyone there could open a session; put name:token "
            f"into the environment variable {ENVIRONMENT}, or into a file named by --tokens, or leave out --host"
        )
    if not loopback and not tls and not insecure_plaintext:
        raise BindError(
            f"--host {host} can be reached from other machines, and speech and tokens would cross the network in the "
            "clear; add --tls-cert FILE --tls-key FILE, or --insecure-plaintext if something else encrypts them"
        )
    return Bind(host, addresses, loopback, tls)


def is_loopback(address: str) -> bool:
    """Whether this is an address of 127.0.0.0/8, ::1, or one of the former written as IPv6. Names are not."""
    parsed = _address(address)
    return parsed is not None and parsed.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


# Hosts and origins


@dataclass(frozen=True, slots=True)
class Host:
    """The value of a Host header. name: lower case, an address in its shortest form, without brackets."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is no host and port."""
        match = _AUTHORITY.fullmatch(text)
        if match is None:
            return None
        name, port = match[1].lower().removesuffix("."), int(match[2]) if match[2] else None
        if port is not None and not 0 < port <= 65535:
            return None
        if name.startswith("["):
            name = name[1:-1]
            if ":" not in name or _address(name) is None:
                return None
        address = _address(name)
        return cls(str(address) if address is not None else name, port) if name else None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a page comes from (RFC 6454). The port is that of the scheme where none was given."""

    scheme: str
    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is no origin; that includes `null`, which any page can send from a sandboxed frame."""
        match = _ORIGIN.fullmatch(text)
        host = Host.parse(match[2]) if match is not None else None
        if match is None or host is None:
            return None
        scheme = match[1].lower()
        return cls(scheme, host.name, _PORTS.get(scheme) if host.port is None else host.port)

    def is_of(self, host: Host) -> bool:
        """Whether a page of this origin was served by `host`."""
        port = _PORTS.get(self.scheme) if host.port is None else host.port
        return self.scheme in _PORTS and (self.host, self.port) == (host.name, port)


def parse_origins(texts: Iterable[str]) -> frozenset[Origin]:
    """The values of `--allow-origin`. Raises `OriginError`."""
    return frozenset(map(_allowed, texts))


def parse_proxies(texts: Iterable[str]) -> tuple[Network, ...]:
    """The values of `--trusted-proxy`: addresses or networks (10.0.0.0/8). Raises `ProxyError`."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ProxyError(f"--trusted-proxy {text} is no network: {error}; it looks like 10.0.0.0/8") from None
    return tuple(found)


def _allowed(text: str) -> Origin:
    if text in ("*", "null"):
        raise OriginError(f"--allow-origin {text} would let every page in; name each, as https://talk.example")
    origin = Origin.parse(text.removesuffix("/"))
    if origin is None or origin.scheme in ("ws", "wss"):
        raise OriginError(f"--allow-origin {text} is no origin; it looks like https://talk.example:8443")
    return origin


# Limits


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one peer may have. An address is an IPv4 address, or the /64 that an IPv6 host has to itself.

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
    """What a peer is counted under, or None if it is on this machine and not counted.

    Loopback is exempt: behind a proxy on this machine everyone has its address, so that a limit on it would be a limit
    on all; benchmarks open hundreds of sessions; and who runs programs here needs no sessions to be a nuisance.
    """
    if not peer:
        return None  # a Unix socket
    address = _address(peer)
    if address is None:
        return "unknown"
    if address.is_loopback:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


def client_address(headers: Headers, peer: str | None, proxies: Sequence[Network]) -> str | None:
    """Whose request it is: the peer's, or, if that is one of our proxies, whoever it says that it came from.

    Any client can send X-Forwarded-For, so it is read from its end, where the proxies wrote: the last address that is
    none of theirs. Where there is no such thing the proxy itself is counted.
    """
    if not _among(peer, proxies):
        return peer
    told = [part.strip() for value in headers.get_all("X-Forwarded-For") for part in value.split(",")]
    client = next((address for address in reversed(told) if not _among(address, proxies)), None)
    return client if client is not None and _address(client) is not None else peer


def _among(text: str | None, networks: Sequence[Network]) -> bool:
    address = _address(text) if text and networks else None
    return address is not None and any(address in network for network in networks)


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Gate:
    """Counts connections and sessions. Bounded: buckets by `Limits.addresses`, sessions by those that are open."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._sessions: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._buckets)

    def connect(self, address: str | None, now: float) -> float:
        """One attempt. Returns 0 if it may go on, otherwise in how many seconds to try again."""
        if address is None:
            return 0.0
        limits, bucket = self._limits, self._buckets.get(address)
        if bucket is None:
            while len(self._buckets) >= limits.addresses:
                self._buckets.popitem(last=False)
            bucket = self._buckets[address] = _Bucket(limits.connection_burst, now)
        self._buckets.move_to_end(address)
        refilled = bucket.level + max(0.0, now - bucket.at) * limits.connections_per_s
        bucket.level, bucket.at = min(float(limits.connection_burst), refilled), now
        if bucket.level < 1:
            return (1 - bucket.level) / limits.connections_per_s
        bucket.level -= 1
        return 0.0

    def has_room(self, address: str | None, name: str | None) -> bool:
        """Whether one more session of this address and this token's name is within the limits."""
        if name is not None and self._sessions["token", name] >= self._limits.sessions_per_token:
            return False
        return address is None or self._sessions["address", address] < self._limits.sessions_per_address

    @contextmanager
    def session(self, address: str | None, name: str | None) -> Iterator[None]:
        """Counts one session while the block lasts."""
        counted = [(kind, key) for kind, key in (("token", name), ("address", address)) if key is not None]
        self._sessions.update(counted)
        try:
            yield
        finally:
            self._sessions.subtract(counted)
            for key in counted:
                if not self._sessions[key]:
                    del self._sessions[key]


# Requests


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody may not come in, as an HTTP answer or a `session.refused`.

    code: `unauthorized`, `forbidden_origin`, `too_many_sessions`, `too_many_connections` or `bad_request`.
    """

    status: HTTPStatus
    code: str
    message: str
    retry_after_s: float | None = None

    @property
    def body(self) -> str:
        """One line of text: the code, a colon, the message."""
        return f"{self.code}: {self.message}\n"

    @property
    def headers(self) -> dict[str, str]:
        """To be set on the answer."""
        headers = {"Cache-Control": "no-store"}
        if self.status is HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = 'Bearer realm="streaming"'  # RFC 6750, section 3
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))  # RFC 9110, section 10.2.3
        return headers


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who may come in. holder: of which token, None where no tokens are asked for."""

    holder: Holder | None
    address: str | None = field(repr=False)  # personal data: not for logs

    @property
    def name(self) -> str | None:
        """The token's name, for metrics and logs."""
        return self.holder.name if self.holder is not None else None


_UNAUTHORIZED = Refusal(
    HTTPStatus.UNAUTHORIZED,
    "unauthorized",
    "a valid token is needed: send Authorization: Bearer TOKEN, or in a browser offer the subprotocols continue.v1 and "
    "bearer.TOKEN",
)
_TOKEN_IN_URL = Refusal(
    HTTPStatus.UNAUTHORIZED,
    "unauthorized",
    "a token in the URL is not accepted: logs and histories keep URLs; take it for leaked, make another, and send "
    "Authorization: Bearer TOKEN",
)
_FORBIDDEN_ORIGIN = Refusal(
    HTTPStatus.FORBIDDEN,
    "forbidden_origin",
    "pages of this origin may not connect; the server's operator can allow it with --allow-origin",
)
_FORBIDDEN_HOST = Refusal(
    HTTPStatus.FORBIDDEN,
    "forbidden_origin",
    "this server is for its own machine and goes by localhost, 127.0.0.1 or [::1]; the Host header names another",
)
_TOO_MANY_SESSIONS = Refusal(
    HTTPStatus.TOO_MANY_REQUESTS,
    "too_many_sessions",
    "this token or address has as many sessions as it may; end one first",
    _SESSION_RETRY_S,
)


def _bad_request(header: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_request", f"the {header} header is missing, doubled or malformed")


class Gatekeeper:
    """Decides on requests. One for each server; used from one thread.

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
        self._gate = Gate(self.limits)
        host = Host.parse(bind.host)
        # Who names an origin stands behind a proxy that may pass its host on.
        self._hosts = {"localhost", *(origin.host for origin in origins), *([host.name] if host is not None else [])}

    def look(self, headers: Headers, path: str, peer: str | None, now: float) -> Refusal | None:
        """For what needs no token (the page, health): too many connections, another host's name, a token in the URL.

        path: as requested, with its query; peer: the address without the port, None or "" for a Unix socket.
        """
        wait = self._gate.connect(self._address_key(headers, peer), now)
        if wait:
            message = "too many connections from this address"
            return Refusal(HTTPStatus.TOO_MANY_REQUESTS, "too_many_connections", message, wait)
        host = _host(headers)
        if host is None:
            return _bad_request("Host")
        if self.bind.loopback and host.name not in self._hosts and not is_loopback(host.name):
            return _FORBIDDEN_HOST
        return _TOKEN_IN_URL if _names_a_token(path) else None

    def admit(self, headers: Headers, path: str, peer: str | None, now: float) -> Visitor | Refusal:
        """For what opens a session, or needs a token for another reason. Nothing is counted but the connection."""
        visitor = self._identify(headers, path, peer, now)
        if isinstance(visitor, Visitor) and visitor.name == METRICS_READER:
            return _UNAUTHORIZED
        return visitor

    def admit_reader(self, headers: Headers, path: str, peer: str | None, now: float) -> Refusal | None:
        """For the server's figures: where tokens are asked for, only the one named `metrics` is good for them."""
        visitor = self._identify(headers, path, peer, now)
        if isinstance(visitor, Refusal):
            return visitor
        return None if visitor.holder is None or visitor.name == METRICS_READER else _UNAUTHORIZED

    def _identify(self, headers: Headers, path: str, peer: str | None, now: float) -> Visitor | Refusal:
        refusal = self.look(headers, path, peer, now) or self._check_origin(headers)
        if refusal is not None:
            return refusal
        offered = _subprotocols(headers)
        if offered is None:
            return _bad_request("Sec-WebSocket-Protocol")
        holder = None
        if self._tokens is not None:
            presented = _presented(headers, offered)
            if isinstance(presented, Refusal):
                return presented
            holder = self._tokens.check(presented, now)
            if holder is None:
                return _UNAUTHORIZED
        return Visitor(holder, self._address_key(headers, peer))

    def _address_key(self, headers: Headers, peer: str | None) -> str | None:
        return address_key(client_address(headers, peer, self._proxies))

    def crowded(self, visitor: Visitor) -> Refusal | None:
        """Why this visitor may not have one more session just now. Coming back to one needs no room."""
        return None if self._gate.has_room(visitor.address, visitor.name) else _TOO_MANY_SESSIONS

    @contextmanager
    def session(self, visitor: Visitor) -> Iterator[Refusal | None]:
        """Counts a session while the block lasts, unless it gives a refusal."""
        refusal = self.crowded(visitor)
        if refusal is not None:
            yield refusal
            return
        with self._gate.session(visitor.address, visitor.name):
            yield None

    def still_welcome(self, visitor: Visitor, now: float) -> bool:
        """False once the visitor's token was revoked: its sessions are to end."""
        return self._tokens is None or (visitor.holder is not None and self._tokens.still_valid(visitor.holder, now))

    def _check_origin(self, headers: Headers) -> Refusal | None:
        """A browser always says which page asks, and a page cannot forge it. Who says nothing is no browser."""
        values, host = headers.get_all("Origin"), _host(headers)
        if not values:
            return None
        if len(values) > 1 or host is None:
            return _bad_request("Origin")
        origin = Origin.parse(values[0])
        if origin is None:
            return _FORBIDDEN_ORIGIN
        if origin in self._origins:
            return None
        own = origin.is_of(host) and (origin.scheme == "https" or not self.bind.tls)
        return None if own else _FORBIDDEN_ORIGIN


def select_subprotocol(_: object, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """What `websockets` answers to an offer: one of ours, never a token, and nothing where neither was offered."""
    return next((Subprotocol(name) for name in SUBPROTOCOLS if name in offered), None)


def _host(headers: Headers) -> Host | None:
    values = headers.get_all("Host")
    return Host.parse(values[0]) if len(values) == 1 else None


def _names_a_token(path: str) -> bool:
    names = (part.partition("=")[0] for part in path.partition("?")[2].replace(";", "&").split("&"))
    return any(unquote_plus(name).lower() in _TOKEN_PARAMETERS for name in names)


def _subprotocols(headers: Headers) -> list[str] | None:
    """What is offered, or None where it is malformed: it goes no further, lest an error that quotes it be logged."""
    parts = [part.strip(" \t") for value in headers.get_all("Sec-WebSocket-Protocol") for part in value.split(",")]
    offered = [part for part in parts if part]
    return offered if all(map(_SUBPROTOCOL.fullmatch, offered)) else None


def _presented(headers: Headers, offered: list[str]) -> str | Refusal:
    """The one token that a request shows. Another scheme's Authorization may be a proxy's, and is not looked at."""
    values = headers.get_all("Authorization")
    if len(values) > 1:
        return _bad_request("Authorization")
    scheme, _, credentials = values[0].strip().partition(" ") if values else ("", "", "")
    if scheme.lower() == "bearer":
        return credentials.strip()
    tokens = [name[len(prefix) :] for name in offered for prefix in _TOKEN_PREFIXES if name.startswith(prefix)]
    if len(tokens) > 1:
        return _bad_request("Sec-WebSocket-Protocol")
    return tokens[0] if tokens else _UNAUTHORIZED
