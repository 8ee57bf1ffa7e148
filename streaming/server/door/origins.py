"""Hosts and origins: what a request calls this server, and which page it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from streaming.addresses import parse_address
from streaming.errors import StreamingError

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31})://(.{1,300})", re.ASCII)
_PORTS = {"http": 80, "https": 443}


class OriginError(StreamingError):
    """An allowed origin that no browser would send."""

    code = "bad_origin"


@dataclass(frozen=True, slots=True)
class Host:
    """The value of a Host header. name: lower case, an address in its shortest form, without brackets."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return None for what is no host and port."""
        match = _AUTHORITY.fullmatch(text)
        if match is None:
            return None
        name, port = match[1].lower().removesuffix("."), int(match[2]) if match[2] else None
        if port is not None and not 0 < port <= 65535:
            return None
        if name.startswith("["):
            name = name[1:-1]
            if ":" not in name or parse_address(name) is None:
                return None
        address = parse_address(name)
        return cls(str(address) if address is not None else name, port) if name else None


@dataclass(frozen=True, slots=True)
class Origin:
    """An origin: where a page comes from (RFC 6454). The port is that of the scheme where none was given."""

    scheme: str
    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return None for what is no origin; that includes `null`, which any page can send from a sandboxed frame."""
        match = _ORIGIN.fullmatch(text)
        host = Host.parse(match[2]) if match is not None else None
        if match is None or host is None:
            return None
        scheme = match[1].lower()
        return cls(scheme, host.name, _PORTS.get(scheme) if host.port is None else host.port)

    def is_of(self, host: Host) -> bool:
        """Return whether a page of this origin was served by `host`."""
        port = _PORTS.get(self.scheme) if host.port is None else host.port
        return self.scheme in _PORTS and (self.host, self.port) == (host.name, port)


def parse_origins(texts: Iterable[str]) -> frozenset[Origin]:
    """Return the values of `--allow-origin`. Raises `OriginError`."""
    return frozenset(map(_allowed, texts))


def _allowed(text: str) -> Origin:
    if text in ("*", "null"):
        raise OriginError(f"--allow-origin {text} would let every page in; name each, as https://talk.example")
    origin = Origin.parse(text.removesuffix("/"))
    if origin is None or origin.scheme in ("ws", "wss"):
        raise OriginError(f"--allow-origin {text} is no origin; it looks like https://talk.example:8443")
    return origin
