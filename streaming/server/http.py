"""Answer plain HTTP at the port: who may not come in, the page, health, metrics, and a pointer to the protocol
for the rest.
"""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from weakref import WeakKeyDictionary

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.protocol.messages import PATH
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.refusals import Refusal
from streaming.server.openai import OPENAI_PATHS
from streaming.server.pages import web_pages
from streaming.server.watch.health import HEALTH, LIVE, READY, Health
from streaming.server.watch.metrics import CONTENT_TYPE, METRICS
from streaming.server.watch.observer import Observer


class HttpEndpoints:
    """Looks at every request first. visitors: who is behind the connections whose handshake may go on."""

    def __init__(self, keeper: Gatekeeper, health: Health, observer: Observer) -> None:
        self._keeper, self._health, self._observer = keeper, health, observer
        self._pages = web_pages()
        self.visitors: WeakKeyDictionary[ServerConnection, Visitor] = WeakKeyDictionary()

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return the answer to a request, or None to let its handshake go on."""
        response = self._answer(connection, request)
        if response is not None:
            if "X-Content-Type-Options" not in response.headers:
                response.headers["X-Content-Type-Options"] = "nosniff"
            if request.method == "HEAD":
                response.body = b""  # the headers are those of a GET, its length included (RFC 9110, section 9.3.2)
        status = HTTPStatus.SWITCHING_PROTOCOLS if response is None else response.status_code
        self._observer.answered(request.path, status)
        return response

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        allowed = ("GET",) if path == PATH else ("GET", "HEAD")
        if request.method not in allowed:
            response = connection.respond(HTTPStatus.METHOD_NOT_ALLOWED, f"only {' and '.join(allowed)}\n")
            response.headers["Allow"] = ", ".join(allowed)
            return response
        peer = connection.remote_address
        address = peer[0] if isinstance(peer, tuple) else None
        admit = dict.fromkeys((PATH, *OPENAI_PATHS), self._keeper.admit) | {METRICS: self._keeper.admit_reader}
        ask = admit.get(path, self._keeper.look)
        answer = ask(request.headers, request.path, address, time.monotonic())
        if isinstance(answer, Visitor) and path in OPENAI_PATHS:  # OpenAI's sessions cannot be resumed
            answer = self._keeper.crowded(answer) or answer
        if isinstance(answer, Refusal):
            self._observer.refused(answer.code)
            response = connection.respond(answer.status, answer.body)
            response.headers.update(answer.headers)
            return response
        if isinstance(answer, Visitor):
            self.visitors[connection] = answer
            return None
        if path in (HEALTH, LIVE, READY):
            status = HTTPStatus.OK if self._health.fine(path) else HTTPStatus.SERVICE_UNAVAILABLE
            return _figures(connection, status, json.dumps(self._health.report()) + "\n", "application/json")
        if path == METRICS:
            return _figures(connection, HTTPStatus.OK, self._observer.metrics.exposition().decode(), CONTENT_TYPE)
        page = self._pages.answer(path, request.headers)
        if page is not None:
            return page
        found = f"the page is at /, the WebSocket at {PATH}, health at {HEALTH}, metrics at {METRICS}"
        return connection.respond(HTTPStatus.NOT_FOUND, f"not found; {found}\n")


def _figures(connection: ServerConnection, status: HTTPStatus, text: str, content_type: str) -> Response:
    response = connection.respond(status, text)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = content_type
    response.headers["Cache-Control"] = "no-store"
    return response
