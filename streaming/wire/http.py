"""What the port answers to plain HTTP: who may not come in, `GET /health`, and a pointer to the protocol for the
rest.
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
from streaming.wire.openai import OPENAI_PATHS


class HttpEndpoints:
    """Looks at every request first. visitors: who is behind the connections whose handshake may go on."""

    def __init__(self, engine: Engine, admission: Admission, keeper: Gatekeeper) -> None:
        self._engine, self._admission, self._keeper = engine, admission, keeper
        self.visitors: WeakKeyDictionary[ServerConnection, Visitor] = WeakKeyDictionary()

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets the handshake go on."""
        if request.method != "GET":
            response = connection.respond(
                HTTPStatus.METHOD_NOT_ALLOWED, "" if request.method == "HEAD" else "only GET\n"
            )
            response.headers["Allow"] = "GET"
            return response
        path = request.path.partition("?")[0]
        peer = connection.remote_address
        address = peer[0] if isinstance(peer, tuple) else None
        ask = self._keeper.admit if path in (PATH, *OPENAI_PATHS) else self._keeper.look
        answer = ask(request.headers, request.path, address, time.monotonic())
        if isinstance(answer, Visitor) and path in OPENAI_PATHS:  # nobody comes back to a session there
            answer = self._keeper.crowded(answer) or answer
        if isinstance(answer, Refusal):
            response = connection.respond(answer.status, answer.body)
            response.headers.update(answer.headers)
            return response
        if isinstance(answer, Visitor):
            self.visitors[connection] = answer
            return None
        if path == "/health":
            return self._health(connection)
        return connection.respond(HTTPStatus.NOT_FOUND, f"not found; the WebSocket is at {PATH}, health at /health\n")

    def _health(self, connection: ServerConnection) -> Response:
        """200 with the engine's figures; 503 once it has failed, or the server is about to stop."""
        state = "failed" if self._engine.failure else "stopping" if self._admission.stopping else "ready"
        figures = asdict(self._engine.stats()) | {"waiting": self._admission.waiting}
        body = {"status": state, "model": self._engine.model, "overloaded": self._engine.overloaded, **figures}
        status = HTTPStatus.OK if state == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        response = connection.respond(status, json.dumps(body) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        response.headers["Cache-Control"] = "no-store"
        return response
