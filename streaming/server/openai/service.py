"""The sockets of OpenAI's protocols: a conversation for each, in its dialect. None can be resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from streaming.audio import FRAME_RATE
from streaming.conversation.outbox import End
from streaming.conversation.takes import Takes, TakesMemory
from streaming.protocol import messages
from streaming.server.door.gatekeeper import Visitor
from streaming.server.driver import Driver, Shared
from streaming.server.openai import live, live_events, realtime
from streaming.server.openai.realtime_client_events import MAX_EVENT_BYTES
from streaming.server.openai.realtime_options import Model, session_start
from streaming.server.session_socket import Dialect
from streaming.server.sessions import ServerSession, Sessions

_START_TIMEOUT_S = 10.0


class OpenAIService:
    """The base of both protocols' services."""

    def __init__(self, shared: Shared, sessions: Sessions) -> None:
        self._shared, self._engine, self._sessions = shared, shared.engine, sessions

    @property
    def _lead_ms(self) -> int:
        """Return half of what can be rewound. The other half is for clients that play late, and report later still."""
        return min(max(round(1000 * (self._engine.rewind_frames // 2) / FRAME_RATE), 80), 10_000)

    def _model(self, name: str | None) -> Model:
        return Model((name or self._engine.model)[:256], self._engine.num_codebooks, self._engine.context_frames)

    async def _converse(
        self,
        socket: ServerConnection,
        visitor: Visitor,
        start: messages.SessionStart,
        speaking: Callable[[Driver], Dialect],
        *,
        sent_is_heard: bool = False,
        takes: Takes | None = None,
    ) -> None:
        """Serve a session. speaking: its dialect; sent_is_heard, takes: see `Conversation`."""
        driver = Driver(
            self._shared,
            start,
            observer=self._sessions.observer.session(visitor.name),
            sent_is_heard=sent_is_heard,
            takes=takes,
        )
        dialect = speaking(driver)
        with self._sessions.keeper.session(visitor) as too_many:
            if too_many is None:
                await self._sessions.run(ServerSession(driver, dialect, visitor, socket))
                return
        await self._sessions.turn_away(socket, too_many, dialect.encode)


class RealtimeService(OpenAIService):
    """`/v1/realtime`: the session begins with the connection. takes: what those of all sessions hold."""

    def __init__(self, shared: Shared, sessions: Sessions, takes: TakesMemory) -> None:
        super().__init__(shared, sessions)
        self._takes = takes

    async def __call__(self, socket: ServerConnection, visitor: Visitor) -> None:
        """Serve one socket."""
        assert socket.request is not None
        _let_events_be_large(socket)
        model = self._model(_asked_model(socket.request.path))
        clock = asyncio.get_running_loop().time
        await self._converse(
            socket,
            visitor,
            session_start(model, self._lead_ms),
            lambda driver: realtime.RealtimeDialect(model, driver.give, clock),
            takes=Takes(self._takes, 1, ends=False) if self._takes.turns else None,
        )


class LiveService(OpenAIService):
    """`/v1/live/sessions`: the session begins with `session.start`."""

    async def __call__(self, socket: ServerConnection, visitor: Visitor) -> None:
        """Serve one socket."""
        with self._sessions.opening(socket):
            try:
                start = await _first_event(socket)
            except ConnectionClosed:
                return
            except live_events.LiveError as error:
                event = live_events.say({"event_id": "event_0"} | live_events.rejection(error, ""))
                message = messages.Error(code=error.event_code, message=str(error), fatal=True)
                end = End(message, CloseCode.POLICY_VIOLATION, error.event_code)

                def say(_: messages.Message) -> Sequence[str]:
                    return [event]

                await self._sessions.dismiss(socket, end, say)
                return
        _let_events_be_large(socket)
        model = self._model(start.session.model)
        await self._converse(
            socket,
            visitor,
            live.native_start(model, self._lead_ms),
            lambda _: live.LiveDialect(model, start),
            sent_is_heard=True,
        )


def _let_events_be_large(socket: ServerConnection) -> None:
    """Allow 15 MiB of audio in one event; the native protocol, whose limit the server has, needs far less.

    And no more than two of them at a time: `websockets` would keep sixteen for a session that cannot take them yet.
    """
    socket.protocol.max_message_size = MAX_EVENT_BYTES
    socket.recv_messages.high, socket.recv_messages.low = 1, 0


def _asked_model(path: str) -> str:
    return parse_qs(path.partition("?")[2], max_num_fields=20).get("model", [""])[0]


async def _first_event(socket: ServerConnection) -> live_events.SessionStart:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            start = live_events.decode(await socket.recv())
    except TimeoutError:
        raise live_events.LiveError("session_not_started", "no session.start within 10 s") from None
    if not isinstance(start, live_events.SessionStart):
        raise live_events.LiveError("session_not_started", "the first event must be session.start", "type")
    live_events.session_format(start)
    return start
