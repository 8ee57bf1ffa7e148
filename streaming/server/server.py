"""The listening socket: handshakes to sessions, plain requests to HTTP answers, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from streaming.audio import FRAME_RATE
from streaming.command import VERSION
from streaming.conversation.takes import TakesMemory
from streaming.engine.engine import Engine
from streaming.protocol.messages import MAX_MESSAGE_BYTES, PATH
from streaming.server.admission import Admission
from streaming.server.connection import connection
from streaming.server.door.bind import address_taken
from streaming.server.door.credentials import select_subprotocol
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.handshakes import PendingHandshakes, listen
from streaming.server.door.session_key import SessionKey
from streaming.server.driver import Shared
from streaming.server.http import HttpEndpoints
from streaming.server.native.service import NativeService
from streaming.server.openai import LIVE_PATH, REALTIME_PATH
from streaming.server.openai.service import LiveService, RealtimeService
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_store import BEAT_S, SessionStore, StoreError
from streaming.server.sessions import ServerSession, Sessions
from streaming.server.voice_activity import VoiceActivity
from streaming.server.watch.health import Health
from streaming.server.watch.log import event
from streaming.server.watch.metrics import Metrics
from streaming.server.watch.observer import Observer

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5
"""The server checks this often whether the engine still runs and every token is still valid."""
_GOODBYE_S = 2.0
_BACKLOG = 1024
"""Connections that the kernel holds until they are accepted. A client that comes when it is full waits for a second."""
_UNLOGGED = logging.Logger("websockets", logging.CRITICAL)
"""For the library, in no hierarchy, so that no configuration opens it: at DEBUG it logs headers, tokens among them, and
the first bytes of audio; strangers' rubbish it logs as errors, with tracebacks.
"""


@dataclass(frozen=True)
class ServerOptions:
    """port: where to listen, 0 for any that is free. tls: a server's context, None for plain WebSockets.

    queue: clients that may wait in line for a slot. idle_s: a session whose client does nothing for so long is ended.
    resume_s: for how long a session may outlive its connection, 0 for not at all. drain_s: how long running turns may
    take once the server is to stop. keepalive_s: the seconds between pings; a client that sends nothing for twice as
    long, or reads nothing while something waits for it, is cut. handshake_s: how long a connection may take to become a
    WebSocket. takes: of how many of its latest turns a session keeps what another take of it needs, 0 for none.
    allow_save: whether clients may have their sessions, signed with session_key. store: where sessions go when this
    server stops or their client is away, None for nowhere.
    """

    port: int = 8765
    tls: ssl.SSLContext | None = None
    queue: int = 0
    idle_s: float = 300.0
    resume_s: float = 30.0
    drain_s: float = 30.0
    keepalive_s: float = 10.0
    handshake_s: float = 10.0
    takes: int = 4
    allow_save: bool = False
    session_key: SessionKey | None = None
    store: SessionStore | None = None


class Shutdown:
    """The order to stop: `request` lets running turns finish, a second `request` does not."""

    def __init__(self) -> None:
        self.requested, self.at_once = asyncio.Event(), asyncio.Event()

    def request(self) -> None:
        (self.at_once if self.requested.is_set() else self.requested).set()

    def request_at_once(self) -> None:
        self.requested.set()
        self.at_once.set()


async def run_server(
    engine: Engine,
    keeper: Gatekeeper,
    options: ServerOptions,
    shutdown: Shutdown,
    listening: Callable[[str], None],
) -> None:
    """Serve until told to stop, or until the engine fails; then tell every session, and close.

    While the last turns finish the port stays open: health and metrics are answered, clients that lost their connection
    come back, and new sessions are refused with `stopping`.

    listening: called once with the URL when connections are accepted. Raises `AddressError` if the address cannot be
    had.
    """
    admission = Admission(engine, options.queue)
    running: set[ServerSession] = set()
    health = Health(engine, admission, running, VERSION)
    observer = Observer(Metrics(health))
    sessions = Sessions(keeper, observer, running)
    shared = Shared(engine, admission, VoiceActivity(), options.idle_s)
    endpoints = HttpEndpoints(keeper, health, observer)
    takes = TakesMemory(options.takes)
    services: dict[str, Callable[[ServerConnection, Visitor], Awaitable[None]]] = {
        PATH: NativeService(
            shared,
            sessions,
            options.resume_s,
            takes,
            SavedSessions(engine, options.session_key if options.allow_save else None),
            options.store,
        ),
        REALTIME_PATH: RealtimeService(shared, sessions, takes),
        LIVE_PATH: LiveService(shared, sessions),
    }

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None
        service = services[connection.request.path.partition("?")[0]]
        try:
            await service(connection, endpoints.visitors[connection])
        except Exception:  # the library closes the connection, and logs nowhere
            _LOG.exception("a connection failed")
            raise

    pending = PendingHandshakes(keeper.limits)

    def look(connection: ServerConnection, request: Request) -> Response | None:
        sock = connection.transport.get_extra_info("socket")
        if sock is not None:  # under TLS it may be lost by now
            pending.leave(sock.fileno())
        return endpoints(connection, request)

    try:
        sockets = listen(keeper.bind.addresses, options.port, pending)
    except OSError as error:
        raise address_taken(keeper.bind, options.port, error) from error
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                serve(
                    handle,
                    sock=sock,
                    ssl=options.tls,
                    backlog=_BACKLOG,
                    process_request=look,
                    select_subprotocol=select_subprotocol,
                    compression=None,
                    max_size=MAX_MESSAGE_BYTES,
                    open_timeout=options.handshake_s,
                    ping_interval=options.keepalive_s,
                    ping_timeout=None,
                    create_connection=connection(2 * options.keepalive_s),
                    close_timeout=_GOODBYE_S,
                    server_header="streaming-continuation",
                    logger=_UNLOGGED,
                )
            )
            for sock in sockets
        ]
        address, port = sockets[0].getsockname()[:2]
        scheme = "ws" if options.tls is None else "wss"
        url = f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}{PATH}"
        listening(url)
        event(
            _LOG,
            logging.INFO,
            "server.started",
            url=url,
            version=health.version,
            model=engine.model,
            device=engine.device,
            dtype=engine.dtype,
            operations=engine.operations,
            slots=engine.stats().slots,
            context_s=round(engine.context_frames / FRAME_RATE, 2),
        )
        tending = None if options.store is None else asyncio.create_task(_tend(options.store, 2 * options.resume_s))
        while not shutdown.requested.is_set() and engine.failure is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await shutdown.requested.wait()
            sessions.revoke_unwelcome()
        admission.stop()
        reason = "told" if engine.failure is None else "engine_failed"
        event(_LOG, logging.INFO, "server.stopping", reason=reason, sessions=len(running))
        sessions.drain()
        drained = asyncio.create_task(sessions.gone())
        hurry = asyncio.create_task(shutdown.at_once.wait())
        await asyncio.wait((drained, hurry), timeout=options.drain_s, return_when=asyncio.FIRST_COMPLETED)
        for server in servers:
            server.close(close_connections=False)
        sessions.stop()
        await asyncio.wait((drained,), timeout=_GOODBYE_S)  # for goodbyes
        sessions.abort()
        drained.cancel()
        hurry.cancel()
        if tending is not None:
            tending.cancel()
    if options.store is not None:
        with suppress(StoreError):
            await options.store.leave()
    event(_LOG, logging.INFO, "server.stopped")


async def _tend(store: SessionStore, keep_s: float) -> None:
    """Tell the others that this server lives, and delete what nobody has come back to, for as long as it runs."""
    loop = asyncio.get_running_loop()
    sweep_at = 0.0
    while True:
        with suppress(StoreError):  # it is tried again in the next round
            await store.beat()
            if loop.time() >= sweep_at:
                sweep_at = loop.time() + max(_POLL_S, min(keep_s / 4, 60.0))
                await store.sweep(keep_s, loop.time())
        await asyncio.sleep(BEAT_S)
