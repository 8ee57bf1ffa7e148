"""The listening socket: handshakes to sessions, plain requests to HTTP answers, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from websockets.asyncio.server import ServerConnection, serve

from streaming.engine.engine import Engine
from streaming.wire.http import HttpEndpoints
from streaming.wire.messages import MAX_MESSAGE_BYTES, PATH
from streaming.wire.native import NativeSession

_LOG = logging.getLogger(__name__)
_FAILURE_POLL_S = 0.5


async def run_server(
    engine: Engine, host: str, port: int, stop: asyncio.Event, listening: Callable[[str], None]
) -> None:
    """Serves until `stop` is set or the engine fails, then tells every session and closes.

    listening: called once with the URL when connections are accepted; port 0 takes any free one.
    Raises `OSError` if the address cannot be had.
    """
    sessions: set[NativeSession] = set()

    async def handle(socket: ServerConnection) -> None:
        session = NativeSession(socket, engine)
        sessions.add(session)
        try:
            await session.run()
        finally:
            sessions.discard(session)

    async with serve(
        handle,
        host,
        port,
        process_request=HttpEndpoints(engine),
        compression=None,
        max_size=MAX_MESSAGE_BYTES,
        close_timeout=2,
        server_header="streaming-continuation",
    ) as server:
        address, real_port = server.sockets[0].getsockname()[:2]
        listening(f"ws://{f'[{address}]' if ':' in address else address}:{real_port}{PATH}")
        while not stop.is_set() and engine.failure is None:
            try:
                async with asyncio.timeout(_FAILURE_POLL_S):
                    await stop.wait()
            except TimeoutError:
                pass
        for session in sessions:
            session.stop()
        for _ in range(20):  # two seconds for goodbyes; then the sockets are closed under them
            if not sessions:
                break
            await asyncio.sleep(0.1)
