"""What the port answers to plain HTTP: `GET /health`, and a pointer to the protocol for everything else."""

from __future__ import annotations

import json
from dataclasses import asdict
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.engine.engine import Engine
from streaming.wire.admission import Admission
from streaming.wire.messages import PATH


class HttpEndpoints:
    """Answers requests that are not WebSocket handshakes on `PATH`."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine, self._admission = engine, admission

    def __call__(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets the handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/health":
            return self._health(connection)
        if path != PATH:
            return connection.respond(
                HTTPStatus.NOT_FOUND, f"not found; the WebSocket is at {PATH}, health at /health\n"
            )
        return None

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
