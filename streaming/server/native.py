"""The native protocol (`docs/protocol.md`) at its sockets: sessions that start, and sessions that come back after their
connection was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import structs
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.conversation.conversation import Received
from streaming.conversation.ends import refusal
from streaming.conversation.outbox import Echo, Saved
from streaming.conversation.takes import TakesMemory
from streaming.engine.engine import Engine
from streaming.errors import ProtocolError, StreamingError
from streaming.protocol import messages
from streaming.protocol.messages import (
    Ack,
    AudioMessage,
    Codec,
    Message,
    SessionResume,
    SessionStart,
    SessionStarted,
    TurnDone,
)
from streaming.protocol.opus import OpusReceiver, OpusSender, opus_available
from streaming.protocol.replay import WINDOW, ReplayBook
from streaming.server.admission import Admission
from streaming.server.door.gatekeeper import Visitor
from streaming.server.driver import Driver
from streaming.server.opus_threads import OpusThreads
from streaming.server.resumption import ResumableSessions
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_socket import MESSAGES_PER_S, SessionSocket
from streaming.server.sessions import ServerSession, Sessions
from streaming.server.watch.observer import SessionObserver

_START_TIMEOUT_S = 10.0
_OPUS_MESSAGES_PER_S = 400
"""Each may cost 0.3 ms of the event loop: 48 times what a client needs, and an eighth of what all have."""
_OPUS_LEAD_MS = 160
"""The least with Opus: the end of a frame comes with the next one, so that one alone is never played to its end."""


class UnsupportedProtocolError(StreamingError):
    """A version of the protocol that this server does not speak."""

    code = "unsupported_protocol"


class NativeDialect:
    """The conversation's own words.

    book: of a session that can be resumed, None for others. saved: who makes a file of a session. answer: sends a
    message of the connection's own. threads: for Opus.

    What Opus remembers of the stream outlives a socket, as the messages that are kept do: encoded once, sent again as
    they are.
    """

    def __init__(
        self,
        answer: Callable[[Message], None],
        book: ReplayBook | None,
        codec: Codec = "pcm16",
        saved: SavedSessions | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._answer, self._book, self._codec, self._saved = answer, book, codec, saved
        self._opus = (OpusSender(), OpusReceiver()) if codec == "opus" else None
        self._threads = threads

    def decode(self, data: str | bytes) -> Sequence[Received]:
        try:
            received = self._decode_audio(data) if isinstance(data, bytes) else messages.decode_client(data)
            if self._book is None:
                return [received]
            if isinstance(received, Ack):
                self._book.acknowledge(received.received)
                return []
        except ProtocolError as error:
            return [error.with_traceback(None)]  # which would keep the message alive
        if received.counted:
            answer = self._book.receive()
            if answer is not None:
                self._answer(answer)
        return [received]

    def _decode_audio(self, data: bytes) -> AudioMessage:
        if self._codec == "float32":
            return messages.decode_float(data)
        if self._opus is None:
            return messages.decode_audio(data)
        return self._opus[1].push(messages.decode_opus(data))

    async def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Sequence[str | bytes]:
        assert not isinstance(reply, Echo)
        if isinstance(reply, Saved):
            assert self._saved is not None
            return await self._saved.messages(reply.snapshot, reply.turn)
        if self._opus is not None and isinstance(reply, AudioMessage | TurnDone):
            return await self._encode_opus(self._opus[0], reply)
        if isinstance(reply, AudioMessage):
            return self._kept(reply, [messages.encode_audio(reply)])
        if isinstance(reply, SessionStarted):
            reply = structs.replace(reply, codec=self._codec)
        return self._kept(reply, [messages.encode(reply)])

    async def _encode_opus(self, sender: OpusSender, reply: AudioMessage | TurnDone) -> Sequence[str | bytes]:
        """Encode in a thread: it takes longer than all else that the loop does for a frame, and libopus needs no lock.

        A socket that is lost meanwhile does not lose what is being encoded: it is kept for the client's return.
        """

        def said() -> list[str | bytes]:
            found = sender.push(reply) if isinstance(reply, AudioMessage) else sender.flush()
            encoded: list[str | bytes] = [messages.encode_audio(message) for message in found]
            return encoded if isinstance(reply, AudioMessage) else [*encoded, messages.encode(reply)]

        assert self._threads is not None
        work = self._threads.start(said)
        try:
            await work.finished.wait()
        except asyncio.CancelledError:
            await work.finished.wait()
            self._kept(reply, work.result())
            raise
        return self._kept(reply, work.result())

    def _kept(self, reply: Message | AudioMessage, said: list[str | bytes]) -> list[str | bytes]:
        """Return what is said, after it was kept for a client that comes back."""
        if self._book is not None and reply.counted:
            for data in said:
                self._book.send(data)
        return said

    @property
    def ready(self) -> bool:
        most = 1 if self._opus is None else 2  # the rest of a stream, and what ends it
        return self._book is None or self._book.has_room(most)


@dataclass(frozen=True, slots=True)
class _Return:
    """A client that has come back. done: set once its socket is no longer the session's."""

    socket: ServerConnection
    done: asyncio.Event


class NativeSession(ServerSession):
    """A session and the sockets that it has, one at a time. resume: None for one that ends with its socket."""

    def __init__(
        self,
        driver: Driver,
        visitor: Visitor,
        socket: ServerConnection,
        resume: messages.Resumption | None,
        codec: Codec,
        observer: SessionObserver,
        saved: SavedSessions | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._observer = observer
        self._resume_s = None if resume is None else resume.seconds
        self._book = None if resume is None else ReplayBook()
        super().__init__(driver, NativeDialect(driver.answer, self._book, codec, saved, threads), visitor, socket)
        self._messages_per_s = _OPUS_MESSAGES_PER_S if codec == "opus" else MESSAGES_PER_S
        self._returned: asyncio.Queue[_Return] = asyncio.Queue()

    async def _serve(self, driving: asyncio.Task[None]) -> None:
        first: list[str | bytes] = []
        done: asyncio.Event | None = None
        try:
            while not await self._session_socket().run(first):
                if done is not None:
                    done.set()
                returned = await self._wait_for_client(driving)
                if returned is None:
                    break
                assert self._book is not None
                self._socket, done = returned.socket, returned.done
                self._observer.resumed()
                resumed = messages.SessionResumed(received=self._book.received)
                first = [messages.encode(resumed), *self._book.unanswered()]
        finally:
            if done is not None:
                done.set()

    def _session_socket(self) -> SessionSocket:
        return SessionSocket(self._socket, self._driver, self._dialect, self._messages_per_s)

    async def _wait_for_client(self, driving: asyncio.Task[None]) -> _Return | None:
        """Return the client that comes back in time, or None if none can: the session or its connection was ended."""
        closed = self._socket.protocol.close_rcvd or self._socket.protocol.close_sent
        if self._book is None or closed or not self._book.received:
            return None
        returned = asyncio.create_task(self._returned.get())
        self.away = True
        self._observer.lost()
        try:
            await asyncio.wait((returned, driving), timeout=self._resume_s, return_when=asyncio.FIRST_COMPLETED)
            return returned.result() if returned.done() else None
        finally:
            self.away = False
            returned.cancel()

    async def resume(self, socket: ServerConnection, asked: SessionResume) -> None:
        """Goes on at this socket, whatever socket it has had so far; returns when that is over."""
        assert self._book is not None
        self._book.acknowledge(asked.received)
        self._driver.expect_replay(asked.position)
        returned = _Return(socket, asyncio.Event())
        while not self._returned.empty():
            self._returned.get_nowait().done.set()  # came back, and then again
        self._returned.put_nowait(returned)
        self._socket.transport.abort()
        await returned.done.wait()


class NativeService:
    """The sockets of this protocol. resume_s: for how long a session outlives its connection; 0: none does."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        sessions: Sessions,
        idle_s: float,
        resume_s: float,
        takes: TakesMemory,
        saved: SavedSessions,
    ) -> None:
        self._engine, self._admission, self._sessions = engine, admission, sessions
        self._idle_s, self._resume_s, self._takes, self._saved = idle_s, resume_s, takes, saved
        self._resumable: ResumableSessions[NativeSession] = ResumableSessions()
        self._threads = OpusThreads()

    async def __call__(self, socket: ServerConnection, visitor: Visitor) -> None:
        """Serve one socket."""
        with self._sessions.opening(socket):
            try:
                first = await _first_message(socket)
                if isinstance(first, SessionResume):
                    await self._resumable.find(first.token, visitor).resume(socket, first)
                    return
            except ConnectionClosed:
                return
            except StreamingError as error:
                await self._sessions.dismiss(socket, refusal(error), _say)
                return
        with self._sessions.keeper.session(visitor) as too_many:
            if too_many is None:
                await self._start(socket, visitor, first)
                return
        await self._sessions.turn_away(socket, too_many, _say)

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
        resume = None
        if start.resume and self._resume_s:
            resume = messages.Resumption(token=token, seconds=self._resume_s, window=WINDOW)
        codec = _codec(start)
        if codec == "opus":
            start = structs.replace(start, lead_ms=max(start.lead_ms, _OPUS_LEAD_MS))
        observer = self._sessions.observer.session(visitor.name)
        driver = Driver(
            self._engine,
            self._admission,
            self._sessions.voices,
            start,
            self._idle_s,
            resume,
            observer=observer,
            takes=self._takes if start.takes else None,
            saved=saved,
            saves=self._saved.allowed,
        )
        session = NativeSession(driver, visitor, socket, resume, codec, observer, self._saved, self._threads)
        if resume is not None:
            self._resumable.add(token, session)
        try:
            await self._sessions.run(session)
        finally:
            self._resumable.remove(token)


async def _say(message: Message) -> Sequence[str]:
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
