"""The sockets of the native protocol: sessions that start here, that come back here, or that come from the store."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress

from msgspec import structs
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.conversation.ends import refusal
from streaming.conversation.takes import Takes, TakesMemory
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import ProtocolError, StreamingError
from streaming.protocol import messages
from streaming.protocol.messages import Codec, Message, SessionResume, SessionStart
from streaming.protocol.opus import opus_available
from streaming.protocol.replay import WINDOW
from streaming.server.admission import StoppingError
from streaming.server.door.gatekeeper import Visitor
from streaming.server.driver import Driver, Shared
from streaming.server.handover import ClaimedSession, Handover, Takeover
from streaming.server.native.session import NativeSession
from streaming.server.opus_threads import OpusThreads
from streaming.server.resumption import ResumableSessions, SessionElsewhereError, SessionExpiredError
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_store import SessionStore
from streaming.server.sessions import Sessions
from streaming.server.turn_backup import TurnBackup
from streaming.server.watch.observer import SessionObserver

_START_TIMEOUT_S = 10.0
_OPUS_LEAD_MS = 160
"""The least lead with Opus: a frame's end comes with the next one, so one frame alone is never played to its end."""


class UnsupportedProtocolError(StreamingError):
    """A version of the protocol that this server does not speak."""

    code = "unsupported_protocol"


class NativeService:
    """The sockets of this protocol. resume_s: for how long a session outlives its connection; 0: none does."""

    def __init__(
        self,
        shared: Shared,
        sessions: Sessions,
        resume_s: float,
        takes: TakesMemory,
        saved: SavedSessions,
        store: SessionStore | None,
    ) -> None:
        self._shared, self._sessions = shared, sessions
        self._resume_s, self._takes, self._saved = resume_s, takes, saved
        self._resumable: ResumableSessions[NativeSession] = ResumableSessions(
            secrets.token_hex(4) if store is None else store.mark
        )
        self._handover = (
            None if store is None else Handover(store, shared.engine, self._resumable.remove, self._resumable.is_own)
        )
        self._threads = OpusThreads()

    async def __call__(self, socket: ServerConnection, visitor: Visitor) -> None:
        """Serve one socket."""
        with self._sessions.opening(socket):
            try:
                first = await _first_message(socket)
                if isinstance(first, SessionResume):
                    session = await self._find(first.token, visitor)
                    if isinstance(session, NativeSession):
                        await session.resume(socket, first)
                        return
            except ConnectionClosed:
                return
            except StreamingError as error:
                await self._sessions.dismiss(socket, refusal(error), _say)
                return
        with self._sessions.keeper.session(visitor) as too_many:
            if too_many is None and isinstance(first, SessionStart):
                await self._start(socket, visitor, first)
                return
            if isinstance(first, SessionResume):
                assert not isinstance(session, NativeSession)
                if too_many is None:
                    await self._go_on(socket, visitor, first, session)
                    return
                await self._give_back(session.name)
        assert too_many is not None
        await self._sessions.turn_away(socket, too_many, _say)

    async def _find(self, token: str, visitor: Visitor) -> NativeSession | ClaimedSession:
        """Return the session to come back to, which runs here or comes from the store. Raises `SessionExpiredError`,
        and `SessionElsewhereError` where there is no store; `StoreError`, `SessionMovingError`, `SnapshotError`,
        `StoppingError`.
        """
        try:
            return self._resumable.find(token, visitor)
        except (SessionElsewhereError, SessionExpiredError):
            if self._handover is None:
                raise
        if self._shared.admission.stopping:
            raise StoppingError("the server is about to stop; another one has this session, or will")
        return await self._handover.find(token, visitor.digest)

    def _backup(self, token: str, codec: Codec, visitor: Visitor) -> TurnBackup | None:
        """Return the backup of the session that can be resumed with this token; None where there is no store."""
        handover = self._handover
        if handover is None:
            return None

        def lost() -> None:
            session = self._resumable.holding(token)
            if session is not None:
                session.lose()

        return TurnBackup(handover, handover.name_of(token), codec, visitor.digest, lost)

    async def _give_back(self, name: str) -> None:
        assert self._handover is not None
        with suppress(StreamingError):
            await self._handover.give_back(name)

    async def _go_on(
        self, socket: ServerConnection, visitor: Visitor, asked: SessionResume, found: ClaimedSession
    ) -> None:
        """Serve a session that was in the store."""
        assert self._handover is not None
        header, observer = found.header, self._sessions.observer.session(visitor.name)
        try:
            takeover = Takeover.of(found, asked)
        except ProtocolError as error:
            await self._give_back(found.name)
            await self._sessions.dismiss(socket, refusal(error), _say)
            return
        driver, session = self._session(
            socket,
            visitor,
            header.books.start,
            asked.token,
            header.codec,
            observer,
            resumable=True,
            takeover=takeover,
            found=found,
        )
        self._resumable.add(asked.token, session)
        settling = asyncio.create_task(self._settle(driver, found))
        try:
            await self._sessions.run(session)
        finally:
            self._resumable.remove(asked.token)
            await settling

    async def _settle(self, driver: Driver, found: ClaimedSession) -> None:
        """Delete what was in the store once the session runs here, or give it back."""
        assert self._handover is not None
        if not await driver.begins():
            await self._give_back(found.name)
            return
        with suppress(StreamingError):  # then the claim stays, nobody else takes it, and it expires
            await self._handover.delete(found.name, went_back=found.went_back)

    async def _start(self, socket: ServerConnection, visitor: Visitor, start: SessionStart) -> None:
        saved = None
        if start.saved_bytes:
            with self._sessions.opening(socket):
                try:
                    saved = await self._saved.receive(socket, start.saved_bytes)
                except ConnectionClosed:
                    return
                except StreamingError as error:
                    await self._sessions.dismiss(socket, refusal(error), _say)
                    return
        token = self._resumable.new_token()
        resumable = start.resume and self._resume_s > 0
        codec = _codec(start)
        if codec == "opus":
            start = structs.replace(start, lead_ms=max(start.lead_ms, _OPUS_LEAD_MS))
        observer = self._sessions.observer.session(visitor.name)
        _, session = self._session(socket, visitor, start, token, codec, observer, resumable=resumable, saved=saved)
        if resumable:
            self._resumable.add(token, session)
        try:
            await self._sessions.run(session)
        finally:
            self._resumable.remove(token)

    def _session(
        self,
        socket: ServerConnection,
        visitor: Visitor,
        start: SessionStart,
        token: str,
        codec: Codec,
        observer: SessionObserver,
        *,
        resumable: bool,
        saved: SessionSnapshot | None = None,
        takeover: Takeover | None = None,
        found: ClaimedSession | None = None,
    ) -> tuple[Driver, NativeSession]:
        """Return a session and what drives it. saved: what a client has brought; takeover, found: what the
        store had.
        """
        resume = messages.Resumption(token=token, seconds=self._resume_s, window=WINDOW) if resumable else None
        backup = self._backup(token, codec, visitor) if resumable else None
        driver = Driver(
            self._shared,
            start,
            resume,
            observer=observer,
            takes=Takes(self._takes) if start.takes and self._takes.turns else None,
            saved=saved,
            saves=self._saved.allowed,
            state=None if found is None else found.state,
            turn_ended=None if backup is None else backup.copied,
        )
        return driver, NativeSession(
            driver,
            visitor,
            socket,
            resume,
            codec,
            observer,
            self._saved,
            token,
            self._handover,
            takeover,
            backup,
            self._threads,
        )


def _say(message: Message) -> Sequence[str]:
    return [messages.encode(message)]


def _codec(start: SessionStart) -> Codec:
    """Return the first of the client's codecs that this server has."""
    known: dict[str, Codec] = {"pcm16": "pcm16", "float32": "float32"}
    if "opus" in start.codecs and opus_available():
        known["opus"] = "opus"
    return next((known[name] for name in start.codecs if name in known), "pcm16")


async def _first_message(socket: ServerConnection) -> SessionStart | SessionResume:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            first = await socket.recv()
    except TimeoutError:
        raise ProtocolError("no session.start within 10 s") from None
    kind = messages.type_of(first) if isinstance(first, str) else None
    if kind not in ("session.start", "session.resume"):
        raise ProtocolError("the first message must be session.start or session.resume")
    version = messages.protocol_of(first)
    if version != messages.PROTOCOL_VERSION:
        raise UnsupportedProtocolError(f"this server speaks protocol {messages.PROTOCOL_VERSION} only")
    message = messages.decode_client(first)
    assert isinstance(message, SessionStart | SessionResume)
    return message
