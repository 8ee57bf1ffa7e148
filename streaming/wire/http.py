"""What the port answers to plain HTTP: `GET /health`, and a pointer to the protocol for everything else."""

from __future__ import annotations

import json
from dataclasses import asdict
from http import HTTPStatus

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from streaming.engine.engine import Engine
from streaming.wire.messages import PATH


class HttpEndpoints:
    """Answers requests that are not WebSocket handshakes on `PATH`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

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
        """200 with the engine's figures, 503 once it has failed."""
        failed = self._engine.failure is not None
        body = {"status": "failed" if failed else "ready", "model": self._engine.model, **asdict(self._engine.stats())}
        status = HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK
        response = connection.respond(status, json.dumps(body) + "\n")
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        response.headers["Cache-Control"] = "no-store"
        return response
