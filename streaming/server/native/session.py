"""A session of the native protocol, which outlives its sockets: its client comes back, here or at another server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from streaming.conversation.ends import MOVED
from streaming.conversation.outbox import Reply
from streaming.errors import StreamingError
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Codec, Message, SessionResume, SessionResumed
from streaming.protocol.replay import ReplayBook
from streaming.server.connection import Connection
from streaming.server.door.gatekeeper import Visitor
from streaming.server.driver import Driver
from streaming.server.handover import Handover, Takeover
from streaming.server.native.dialect import NativeDialect
from streaming.server.opus_threads import OpusThreads
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_socket import MESSAGES_PER_S, SessionSocket, known
from streaming.server.session_store import SessionLostError
from streaming.server.sessions import ServerSession
from streaming.server.turn_backup import TurnBackup
from streaming.server.watch.observer import SessionObserver

_LOG = logging.getLogger(__name__)
_PUT_DOWN_S = 10.0
"""How long it may take to put a session into the store. If it takes longer, the session goes on here."""
_LAST_REPLY_S = 1.0
_OPUS_MESSAGES_PER_S = 400
"""Opus messages a second that are read of one client. Each may cost the thread that decodes 0.3 ms: this is 48 times
what a client needs, and an eighth of the thread's time."""


@dataclass(frozen=True, slots=True)
class _Return:
    """A client that has come back. done: set once its socket is no longer the session's."""

    socket: ServerConnection
    done: asyncio.Event


class NativeSession(ServerSession):
    """A session and the sockets that it has, one at a time.

    resume: None for one that ends with its socket. token: what its client comes back with. handover: how it gets to
    another server when its client or this server leaves, None for not at all. takeover: how it came from another one.
    backup: of its finished turns.
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
        handover: Handover | None = None,
        takeover: Takeover | None = None,
        backup: TurnBackup | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._observer = observer
        self._resume_s = None if resume is None else resume.seconds
        self._book = None if resume is None else ReplayBook() if takeover is None else takeover.book
        heard = () if takeover is None else takeover.heard
        self._native = NativeDialect(
            driver.answer, self._book, codec, saved, heard=heard, backup=backup, threads=threads
        )
        super().__init__(driver, self._native, visitor, socket)
        self._codec, self._token, self._handover, self._takeover = codec, token, handover, takeover
        self._backup = backup
        self._leaving = False  # the server stops, and the session is to be put into the store
        self._deaf: asyncio.TimerHandle | None = None
        self._messages_per_s = _OPUS_MESSAGES_PER_S if codec == "opus" else MESSAGES_PER_S
        self._returned: asyncio.Queue[_Return] = asyncio.Queue()

    async def _serve(self, driving: asyncio.Task[None]) -> None:
        first: list[str | bytes] = []
        done: asyncio.Event | None = None
        gone = False
        if self._takeover is not None:
            first = await self._come_back(self._takeover)
        try:
            while not await self._session_socket().run(first):
                if self._deaf is not None:
                    self._deaf.cancel()
                if self._handover is not None and self._may_be_put_down:
                    gone, first = await self._put_down(self._handover)
                    if gone:
                        break
                    if self._leaving:
                        self._leaving, self._handover = False, None
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
            if self._backup is not None:
                await self._backup.leave(forget=not gone)

    # The store

    def drain(self) -> None:
        """Put the session into the store, where there is one: the server will stop. Otherwise end it with its turn."""
        if self._handover is None or self._book is None or self.away:
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

    async def _come_back(self, takeover: Takeover) -> list[str | bytes]:
        """Return what the client of a session from another server is told first, once there is a slot."""
        if not await self._driver.begins():
            return []  # the client is told why
        if takeover.turn is None:
            self._driver.expect_replay(takeover.position)
        elif self._backup is not None:
            self._backup.said(takeover.turn - 1, takeover.book.state())
            self._backup.copied(takeover.state)
        self._observer.resumed()
        resumed = SessionResumed(received=takeover.book.received, turn=takeover.turn)
        return [messages.encode(resumed), *takeover.book.unanswered()]

    async def _put_down(self, handover: Handover) -> tuple[bool, list[str | bytes]]:
        """Put the session into the store, and let the connection go. Return whether that is done and, if not, what was
        said meanwhile.
        """
        assert self._book is not None
        self._driver.mute()
        said: list[str | bytes] = []
        name, stored = handover.name_of(self._token), False
        try:
            async with asyncio.timeout(_PUT_DOWN_S):
                state = await self._driver.put_down()
                said += await self._encoded(self._driver.unsent())
                said += await self._native.end_stream()
                if self._backup is not None:
                    await self._backup.quiet()
                if state is not None:
                    holder, heard = self.visitor.digest, self._native.heard
                    await handover.put(name, state, self._book.state(), self._codec, holder, heard)
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
            handover.moved(self._token)
            self._driver.leave(MOVED)
            self._socket.transport.abort()
            return True, []
        if stored:  # and the client is here already
            with suppress(StreamingError):
                await handover.delete(name)
        said += await self._encoded(self._driver.unsent())
        self._driver.go_on()
        return False, said

    async def _encoded(self, replies: Sequence[Reply]) -> list[str | bytes]:
        said: list[str | bytes] = []
        for reply in replies:
            if isinstance(reply, Message | AudioMessage):
                said += await known(self._native.encode(reply))
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
