"""What the port answers to plain HTTP: who may not come in, the page, `GET /health`, and a pointer to the protocol for
the rest.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from http import HTTPStatus
from weakref import WeakKeyDictionary

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.engine.engine import Engine
from streaming.wire.access import Gatekeeper, Refusal, Visitor
from streaming.wire.admission import Admission
from streaming.wire.messages import PATH
from streaming.wire.pages import web_pages

HEALTH, LIVE = "/health", "/health/live"


class HttpEndpoints:
    """Looks at every request first. visitors: who is behind the connections whose handshake may go on."""

    def __init__(self, engine: Engine, admission: Admission, keeper: Gatekeeper) -> None:
        self._engine, self._admission, self._keeper = engine, admission, keeper
        self._pages = web_pages()
        self.visitors: WeakKeyDictionary[ServerConnection, Visitor] = WeakKeyDictionary()

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets the handshake go on."""
        response = self._answer(connection, request)
        if response is not None:
            if "X-Content-Type-Options" not in response.headers:
                response.headers["X-Content-Type-Options"] = "nosniff"
            if request.method == "HEAD":
                response.body = b""  # the headers are those of a GET, its length included (RFC 9110, section 9.3.2)
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
        ask = self._keeper.admit if path == PATH else self._keeper.look
        answer = ask(request.headers, request.path, address, time.monotonic())
        if isinstance(answer, Refusal):
            response = connection.respond(answer.status, answer.body)
            response.headers.update(answer.headers)
            return response
        if isinstance(answer, Visitor):
            self.visitors[connection] = answer
            return None
        if path in (HEALTH, LIVE):
            return self._health(connection, path)
        page = self._pages.answer(path, request.headers)
        if page is not None:
            return page
        found = f"the page is at /, the WebSocket at {PATH}, health at {HEALTH}"
        return connection.respond(HTTPStatus.NOT_FOUND, f"not found; {found}\n")

    def _health(self, connection: ServerConnection, path: str) -> Response:
        """The engine's figures. 503 where what was asked is not so: ready to take sessions, or merely not failed.

        A server that is full is ready, since it tells its clients so; one that is about to stop lives and is not.
        """
        live = self._engine.failure is None
        ready = live and not self._admission.stopping
        stats = self._engine.stats()
        body = {
            "status": "ready" if ready else "stopping" if live else "failed",
            "live": live,
            "ready": ready,
            "model": self._engine.model,
            "overloaded": self._engine.overloaded,
            **asdict(stats),
            "waiting": self._admission.waiting,
            "capacity": {"slots": stats.slots, "sessions": stats.sessions, "free": stats.slots - stats.sessions},
        }
        fine = live if path == LIVE else ready
        response = connection.respond(
            HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(body) + "\n"
        )
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        response.headers["Cache-Control"] = "no-store"
        return response
