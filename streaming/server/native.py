"""The native protocol (`docs/protocol.md`) at its sockets: sessions that start, and sessions that come back after their
connection was lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from msgspec import structs
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from streaming.conversation.conversation import Received
from streaming.conversation.ends import MOVED, refusal
from streaming.conversation.outbox import Echo, Reply, Saved
from streaming.conversation.takes import Takes, TakesMemory
from streaming.engine.engine import Engine
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import ProtocolError, StreamingError
from streaming.protocol import messages
from streaming.protocol.messages import (
    Ack,
    AudioMessage,
    Codec,
    Message,
    SessionResume,
    SessionResumed,
    SessionStart,
    SessionStarted,
    TurnDone,
)
from streaming.protocol.opus import OpusReceiver, OpusSender, opus_available
from streaming.protocol.replay import WINDOW, ReplayBook
from streaming.server.admission import Admission, StoppingError
from streaming.server.connection import Connection
from streaming.server.door.gatekeeper import Visitor
from streaming.server.driver import Driver
from streaming.server.opus_threads import OpusThreads
from streaming.server.resumption import ResumableSessions, SessionElsewhereError, SessionExpiredError
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_socket import MESSAGES_PER_S, SessionSocket
from streaming.server.session_store import SessionLostError, SessionStore
from streaming.server.sessions import ServerSession, Sessions
from streaming.server.stored_sessions import FoundSession, Moved, StoredSessions
from streaming.server.turn_keeper import TurnKeeper
from streaming.server.watch.observer import SessionObserver

_LOG = logging.getLogger(__name__)
_START_TIMEOUT_S = 10.0
_PUT_DOWN_S = 10.0
"""How long it may take to put a session into the store; it goes on here otherwise."""
_LAST_REPLY_S = 1.0
_OPUS_MESSAGES_PER_S = 400
"""Opus messages a second that are read of one client. Each may cost 0.3 ms of the event loop: this is 48 times what a
client needs, and an eighth of the loop's time."""
_OPUS_LEAD_MS = 160
"""The least lead with Opus: a frame's end comes with the next one, so one frame alone is never played to its end."""


class UnsupportedProtocolError(StreamingError):
    """A version of the protocol that this server does not speak."""

    code = "unsupported_protocol"


class NativeDialect:
    """The conversation's own words.

    book: of a session that can be resumed, None for others. saved: who makes a file of a session. heard: the
    latest packets of Opus of a client that another server had. keeper: who is told of the end of turns. answer: sends a
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
        *,
        heard: Sequence[bytes] = (),
        keeper: TurnKeeper | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._answer, self._book, self._codec, self._saved, self._keeper = answer, book, codec, saved, keeper
        self._opus = (OpusSender(), OpusReceiver(heard)) if codec == "opus" else None
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

    @property
    def heard(self) -> tuple[bytes, ...]:
        """The latest packets of Opus that came, without which another decoder does not go on as this one does."""
        return () if self._opus is None else self._opus[1].latest

    async def end_stream(self) -> Sequence[str | bytes]:
        """Return what is left of the stream of Opus that is being sent, which is over: another encoder goes on."""
        if self._opus is None:
            return []
        said: list[str | bytes] = [
            messages.encode_audio(message) for message in await asyncio.to_thread(self._opus[0].flush)
        ]
        if self._book is not None:
            for data in said:
                self._book.send(data)
        return said

    def _kept(self, reply: Message | AudioMessage, said: list[str | bytes]) -> list[str | bytes]:
        """Return what is said, after it was kept for a client that comes back."""
        if self._book is not None and reply.counted:
            for data in said:
                self._book.send(data)
            if self._keeper is not None and isinstance(reply, TurnDone):
                self._keeper.said(reply.turn, self._book.state())
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
    """A session and the sockets that it has, one at a time.

    resume: None for one that ends with its socket. token: what its client comes back with. store: where it is put when
    its client or this server leaves, None for nowhere. moved: how it came from there. keeper: of its finished turns.
    """

    def __init__(
        self,
        driver: Driver,
        visitor: Visitor,
        socket: ServerConnection,
        resume: messages.Resumption | None,
        codec: Codec,
        observer: SessionObserver,
        saved: SavedSessions | None = None,
        token: str = "",
        store: StoredSessions | None = None,
        moved: Moved | None = None,
        keeper: TurnKeeper | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._observer = observer
        self._resume_s = None if resume is None else resume.seconds
        self._book = None if resume is None else ReplayBook() if moved is None else moved.book
        heard = () if moved is None else moved.heard
        self._native = NativeDialect(
            driver.answer, self._book, codec, saved, heard=heard, keeper=keeper, threads=threads
        )
        super().__init__(driver, self._native, visitor, socket)
        self._codec, self._token, self._store, self._moved = codec, token, store, moved
        self._keeper = keeper
        self._leaving = False  # the server stops, and the session is to be put into the store
        self._deaf: asyncio.TimerHandle | None = None
        self._messages_per_s = _OPUS_MESSAGES_PER_S if codec == "opus" else MESSAGES_PER_S
        self._returned: asyncio.Queue[_Return] = asyncio.Queue()

    async def _serve(self, driving: asyncio.Task[None]) -> None:
        first: list[str | bytes] = []
        done: asyncio.Event | None = None
        gone = False
        if self._moved is not None:
            first = await self._come_back(self._moved)
        try:
            while not await self._session_socket().run(first):
                if self._deaf is not None:
                    self._deaf.cancel()
                if self._store is not None and self._may_be_put_down:
                    gone, first = await self._put_down(self._store)
                    if gone:
                        break
                    if self._leaving:
                        self._leaving, self._store = False, None
                        self._driver.drain()
                    if self._socket.state is State.OPEN:
                        continue
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
            if self._keeper is not None:
                await self._keeper.leave(forget=not gone)

    # The store

    def drain(self) -> None:
        """Put the session into the store, where there is one: the server will stop. Otherwise end it with its turn."""
        if self._store is None or self._book is None or self.away:
            super().drain()
            return
        self._leaving = True
        self._driver.mute()
        # A client that does not even take the reply that is being sent is cut; it comes back for it.
        self._deaf = asyncio.get_running_loop().call_later(_LAST_REPLY_S, self.abort)

    def lose(self) -> None:
        """End the session without a word: another server has gone on with it."""
        self._driver.leave(MOVED)
        self.abort()

    @property
    def _may_be_put_down(self) -> bool:
        """Whether the client will come back for it: the connection was not closed in form, or is there."""
        closed = self._socket.protocol.close_rcvd or self._socket.protocol.close_sent
        return self._book is not None and not closed and (self._leaving or self._book.received > 0)

    async def _come_back(self, moved: Moved) -> list[str | bytes]:
        """Return what the client that the session has come here with is told first, once there is a slot."""
        if not await self._driver.begins():
            return []  # it is told why
        if moved.turn is None:
            self._driver.expect_replay(moved.position)
        elif self._keeper is not None:
            self._keeper.said(moved.turn - 1, moved.book.state())
            self._keeper.copied(moved.down)
        self._observer.resumed()
        resumed = SessionResumed(received=moved.book.received, turn=moved.turn)
        return [messages.encode(resumed), *moved.book.unanswered()]

    async def _put_down(self, store: StoredSessions) -> tuple[bool, list[str | bytes]]:
        """Put the session into the store, and let the connection go. Return whether that is done and, if not, what was
        said meanwhile.
        """
        assert self._book is not None
        self._driver.mute()
        said: list[str | bytes] = []
        name, stored = store.name_of(self._token), False
        try:
            async with asyncio.timeout(_PUT_DOWN_S):
                down = await self._driver.put_down()
                said += await self._encoded(self._driver.unsent())
                said += await self._native.end_stream()
                if self._keeper is not None:
                    await self._keeper.quiet()
                if down is not None:
                    holder, heard = _digest_of(self.visitor), self._native.heard
                    await store.put(name, down, self._book.state(), self._codec, holder, heard)
                    stored = True
        except SessionLostError:
            self.lose()
            return True, []
        except TimeoutError:
            _LOG.warning("a session could not be put into the session store: it took too long")
        except StreamingError as error:
            _LOG.warning("a session could not be put into the session store: %s", error)
        if stored and self._returned.empty():
            self._leaving = False
            store.moved(self._token)
            self._driver.leave(MOVED)
            self._socket.transport.abort()
            return True, []
        if stored:  # and its client is here already
            with suppress(StreamingError):
                await store.delete(name)
        said += await self._encoded(self._driver.unsent())
        self._driver.go_on()
        return False, said

    async def _encoded(self, replies: Sequence[Reply]) -> list[str | bytes]:
        said: list[str | bytes] = []
        for reply in replies:
            if isinstance(reply, Message | AudioMessage):
                said += await self._native.encode(reply)
        return said

    def _session_socket(self) -> SessionSocket:
        if self._book is not None:
            assert isinstance(self._socket, Connection)
            self._socket.returns()
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
        """Go on at this socket, whatever socket the session has had so far. Return when the socket is done."""
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
        store: SessionStore | None,
    ) -> None:
        self._engine, self._admission, self._sessions = engine, admission, sessions
        self._idle_s, self._resume_s, self._takes, self._saved = idle_s, resume_s, takes, saved
        self._resumable: ResumableSessions[NativeSession] = ResumableSessions(
            secrets.token_hex(4) if store is None else store.mark
        )
        self._store = (
            None if store is None else StoredSessions(store, engine, self._resumable.remove, self._resumable.is_own)
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

    async def _find(self, token: str, visitor: Visitor) -> NativeSession | FoundSession:
        """Return the session to come back to, which runs here or comes from the store. Raises `SessionExpiredError`,
        and `SessionElsewhereError` where there is no store; `StoreError`, `SessionMovingError`, `SnapshotError`,
        `StoppingError`.
        """
        try:
            return self._resumable.find(token, visitor)
        except (SessionElsewhereError, SessionExpiredError):
            if self._store is None:
                raise
        if self._admission.stopping:
            raise StoppingError("the server is about to stop; another one has this session, or will")
        return await self._store.find(token, _digest_of(visitor))

    def _keeper(self, token: str, codec: Codec, visitor: Visitor) -> TurnKeeper | None:
        """Return who keeps the finished turns of a session that can be resumed with this token."""
        store = self._store
        if store is None:
            return None

        def lost() -> None:
            session = self._resumable.holding(token)
            if session is not None:
                session.lose()

        return TurnKeeper(store, store.name_of(token), codec, _digest_of(visitor), lost)

    async def _give_back(self, name: str) -> None:
        assert self._store is not None
        with suppress(StreamingError):
            await self._store.give_back(name)

    async def _go_on(
        self, socket: ServerConnection, visitor: Visitor, asked: SessionResume, found: FoundSession
    ) -> None:
        """Serve a session that was in the store."""
        assert self._store is not None
        talk, observer = found.talk, self._sessions.observer.session(visitor.name)
        try:
            moved = Moved.of(found, asked)
        except ProtocolError as error:
            await self._give_back(found.name)
            await self._sessions.dismiss(socket, refusal(error), _say)
            return
        driver, session = self._session(
            socket,
            visitor,
            talk.books.start,
            asked.token,
            talk.codec,
            observer,
            resumable=True,
            moved=moved,
            found=found,
        )
        self._resumable.add(asked.token, session)
        settling = asyncio.create_task(self._settle(driver, found))
        try:
            await self._sessions.run(session)
        finally:
            self._resumable.remove(asked.token)
            await settling

    async def _settle(self, driver: Driver, found: FoundSession) -> None:
        """Delete what was in the store once the session runs here, or give it back."""
        assert self._store is not None
        if not await driver.begins():
            await self._give_back(found.name)
            return
        with suppress(StreamingError):  # then the claim stays, nobody else takes it, and it expires
            await self._store.delete(found.name, went_back=found.went_back)

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
        moved: Moved | None = None,
        found: FoundSession | None = None,
    ) -> tuple[Driver, NativeSession]:
        """Return a session and what drives it. saved: what a client has brought; moved, found: what the store had."""
        resume = messages.Resumption(token=token, seconds=self._resume_s, window=WINDOW) if resumable else None
        keeper = self._keeper(token, codec, visitor) if resumable else None
        driver = Driver(
            self._engine,
            self._admission,
            self._sessions.voices,
            start,
            self._idle_s,
            resume,
            observer=observer,
            takes=Takes(self._takes) if start.takes and self._takes.turns else None,
            saved=saved,
            saves=self._saved.allowed,
            down=None if found is None else found.down,
            turn_ended=None if keeper is None else keeper.copied,
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
            self._store,
            moved,
            keeper,
            self._threads,
        )


def _digest_of(visitor: Visitor) -> bytes | None:
    """Return what stands for the access token of who asks."""
    return None if visitor.holder is None else visitor.holder.digest


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
