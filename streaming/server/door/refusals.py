"""Refusals: why a request gets no further. Nothing that a peer sent is repeated in one, so nothing of it can reach a
page, a terminal or a log that way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

_SESSION_RETRY_S = 2.0


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
        """Return one line of text: the code, a colon, the message."""
        return f"{self.code}: {self.message}\n"

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers to set on the answer."""
        headers = {"Cache-Control": "no-store"}
        if self.status is HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = 'Bearer realm="streaming"'  # RFC 6750, section 3
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))  # RFC 9110, section 10.2.3
        return headers


UNAUTHORIZED = Refusal(
    HTTPStatus.UNAUTHORIZED,
    "unauthorized",
    "a valid token is needed: send Authorization: Bearer TOKEN, or in a browser offer the subprotocols continue.v1 and "
    "bearer.TOKEN",
)
TOKEN_IN_URL = Refusal(
    HTTPStatus.UNAUTHORIZED,
    "unauthorized",
    "a token in the URL is not accepted: logs and histories keep URLs; take it for leaked, make another, and send "
    "Authorization: Bearer TOKEN",
)
FORBIDDEN_ORIGIN = Refusal(
    HTTPStatus.FORBIDDEN,
    "forbidden_origin",
    "pages of this origin may not connect; the server's operator can allow it with --allow-origin",
)
FORBIDDEN_HOST = Refusal(
    HTTPStatus.FORBIDDEN,
    "forbidden_origin",
    "this server is for its own machine and goes by localhost, 127.0.0.1 or [::1]; the Host header names another",
)
TOO_MANY_SESSIONS = Refusal(
    HTTPStatus.TOO_MANY_REQUESTS,
    "too_many_sessions",
    "this token or address has as many sessions as it may; end one first",
    _SESSION_RETRY_S,
)


def too_many_connections(wait_s: float) -> Refusal:
    """Return the refusal of an address that connects too often. wait_s: until it may connect again."""
    message = "too many connections from this address"
    return Refusal(HTTPStatus.TOO_MANY_REQUESTS, "too_many_connections", message, wait_s)


def bad_request(header: str) -> Refusal:
    """Return the refusal of a request whose `header` cannot be used."""
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_request", f"the {header} header is missing, doubled or malformed")
