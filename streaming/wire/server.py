"""The listening socket: handshakes to sessions, plain requests to HTTP answers, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection, serve

from streaming.engine.engine import Engine
from streaming.errors import StreamingError
from streaming.wire.admission import Admission
from streaming.wire.http import HttpEndpoints
from streaming.wire.messages import MAX_MESSAGE_BYTES, PATH
from streaming.wire.native import NativeSession

_LOG = logging.getLogger(__name__)
_FAILURE_POLL_S = 0.5
_GOODBYE_S = 2.0


@dataclass(frozen=True)
class ServerOptions:
    """host, port: where to listen; port 0 takes any free one.

    queue: clients that may wait in line for a slot. idle_s: a session whose client does nothing for so long is ended.
    drain_s: how long running turns may take once the server is to stop. keepalive_s: a ping is sent as often, and a
    client that does not answer one for as long again is gone; so its slot is free after twice this time.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    queue: int = 0
    idle_s: float = 300.0
    drain_s: float = 30.0
    keepalive_s: float = 10.0


class AddressError(StreamingError):
    """The address to listen on is taken, or not this machine's."""

    code = "bad_address"


def check_address(host: str, port: int) -> None:
    """Raises `AddressError` if the address cannot be had now: better before a model is loaded than after."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
            probe.bind(address)
    except OSError as error:
        raise AddressError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


class Shutdown:
    """How the server is told to stop: `request` lets running turns finish, a second `request` does not."""

    def __init__(self) -> None:
        self.requested, self.at_once = asyncio.Event(), asyncio.Event()

    def request(self) -> None:
        (self.at_once if self.requested.is_set() else self.requested).set()

    def request_at_once(self) -> None:
        self.requested.set()
        self.at_once.set()


async def run_server(
    engine: Engine, options: ServerOptions, shutdown: Shutdown, listening: Callable[[str], None]
) -> None:
    """Serves until told to stop, or until the engine fails; then tells every session and closes.

    listening: called once with the URL when connections are accepted. Raises `AddressError` if the address cannot be
    had.
    """
    admission = Admission(engine, options.queue)
    sessions: set[NativeSession] = set()

    async def handle(connection: ServerConnection) -> None:
        session = NativeSession(connection, engine, admission, options.idle_s)
        sessions.add(session)
        try:
            await session.run()
        finally:
            sessions.discard(session)

    async def gone() -> None:
        while sessions:
            await asyncio.sleep(0.02)

    listener = serve(
        handle,
        options.host,
        options.port,
        process_request=HttpEndpoints(engine, admission),
        compression=None,
        max_size=MAX_MESSAGE_BYTES,
        ping_interval=options.keepalive_s,
        ping_timeout=options.keepalive_s,
        close_timeout=_GOODBYE_S,
        server_header="streaming-continuation",
    )
    try:
        server = await listener
    except OSError as error:
        raise AddressError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}") from error
    async with server:
        address, port = server.sockets[0].getsockname()[:2]
        listening(f"ws://{f'[{address}]' if ':' in address else address}:{port}{PATH}")
        while not shutdown.requested.is_set() and engine.failure is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FAILURE_POLL_S):
                    await shutdown.requested.wait()
        admission.stop()
        server.close(close_connections=False)
        for session in sessions:
            session.drain()
        drained = asyncio.create_task(gone())
        hurry = asyncio.create_task(shutdown.at_once.wait())
        await asyncio.wait((drained, hurry), timeout=options.drain_s, return_when=asyncio.FIRST_COMPLETED)
        for session in sessions:
            session.stop()
        await asyncio.wait((drained,), timeout=_GOODBYE_S)  # for goodbyes
        for session in sessions:
            session.abort()
        drained.cancel()
        hurry.cancel()
