"""The token that a request shows: in its Authorization header, or in the subprotocols that a browser offers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote_plus

from websockets.datastructures import Headers
from websockets.typing import Subprotocol

from streaming.server.door.refusals import UNAUTHORIZED, Refusal, bad_request

SUBPROTOCOLS = ("continue.v1", "realtime")
"""The subprotocols that the server may answer with. A browser fails a connection whose offer gets no answer."""
_TOKEN_PREFIXES = ("bearer.", "openai-insecure-api-key.")
"""Prefixes of subprotocols in which a browser, which cannot set headers, offers a token: ours, and OpenAI's."""
_TOKEN_PARAMETERS = frozenset(
    ("token", "access_token", "auth_token", "bearer", "auth", "authorization", "key", "api_key", "apikey", "api-key")
)
_SUBPROTOCOL = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # token, RFC 9110, section 5.6.2


def select_subprotocol(_: object, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Return what `websockets` answers to an offer: one of ours, never a token, nothing where neither was offered."""
    return next((Subprotocol(name) for name in SUBPROTOCOLS if name in offered), None)


def names_a_token(path: str) -> bool:
    """Return whether the query of a requested path has a parameter that is called as tokens are."""
    names = (part.partition("=")[0] for part in path.partition("?")[2].replace(";", "&").split("&"))
    return any(unquote_plus(name).lower() in _TOKEN_PARAMETERS for name in names)


def offered_subprotocols(headers: Headers) -> list[str] | None:
    """Return what is offered, or None where it is malformed: it goes no further, lest an error that quotes it be
    logged.
    """
    parts = [part.strip(" \t") for value in headers.get_all("Sec-WebSocket-Protocol") for part in value.split(",")]
    offered = [part for part in parts if part]
    return offered if all(map(_SUBPROTOCOL.fullmatch, offered)) else None


def presented_token(headers: Headers, offered: list[str]) -> str | Refusal:
    """Return the one token that a request shows, or why there is none. offered: its subprotocols.

    Another scheme's Authorization may be a proxy's, and is not looked at.
    """
    values = headers.get_all("Authorization")
    if len(values) > 1:
        return bad_request("Authorization")
    scheme, _, credentials = values[0].strip().partition(" ") if values else ("", "", "")
    if scheme.lower() == "bearer":
        return credentials.strip()
    tokens = [name[len(prefix) :] for name in offered for prefix in _TOKEN_PREFIXES if name.startswith(prefix)]
    if len(tokens) > 1:
        return bad_request("Sec-WebSocket-Protocol")
    return tokens[0] if tokens else UNAUTHORIZED
