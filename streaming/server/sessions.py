"""All sessions of a server, whatever their dialect: who may have one more, and how the server ends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from websockets.asyncio.server import ServerConnection

from streaming.conversation.ends import refused
from streaming.conversation.outbox import End
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.refusals import Refusal
from streaming.server.driver import Driver
from streaming.server.session_socket import Dialect, Say, SessionSocket, dismiss
from streaming.server.watch.observer import Observer


class ServerSession:
    """A session and the socket that it has."""

    def __init__(self, driver: Driver, dialect: Dialect, visitor: Visitor, socket: ServerConnection) -> None:
        self.visitor = visitor
        self.away = False
        """Whether it is waiting for its client to come back."""
        self._driver, self._dialect, self._socket = driver, dialect, socket

    async def run(self) -> None:
        """Serve the session from its beginning to its end."""
        driving = asyncio.create_task(self._driver.run())
        try:
            await self._serve(driving)
        finally:
            self._driver.leave()
            await driving

    async def _serve(self, driving: asyncio.Task[None]) -> None:
        """Move messages until the socket is gone. driving: what ends with the session."""
        await SessionSocket(self._socket, self._driver, self._dialect).run()

    def drain(self) -> None:
        """End the session when its turn is over, now if it is listening: the server will stop."""
        self._driver.drain()

    def stop(self) -> None:
        """End the session at once: the server stops."""
        self._driver.stop()

    def revoke(self) -> None:
        """End the session because its token is no longer valid."""
        self._driver.revoke()

    def abort(self) -> None:
        """Close the socket without a goodbye."""
        self._socket.transport.abort()


class Sessions:
    """The sessions that run, kept in `running`, and the sockets that have no session yet."""

    def __init__(self, keeper: Gatekeeper, observer: Observer, running: set[ServerSession]) -> None:
        self.keeper, self.observer = keeper, observer
        self._sessions = running
        self._opening: set[ServerConnection] = set()

    async def dismiss(self, socket: ServerConnection, end: End, say: Say) -> None:
        """Say why there is no session, and close the socket."""
        self.observer.dismissed(end)
        await dismiss(socket, end, say)

    async def turn_away(self, socket: ServerConnection, why: Refusal, say: Say) -> None:
        """Say that there is no room for one more of this visitor's sessions, and close the socket."""
        await self.dismiss(socket, refused(why.code, why.message, why.retry_after_s or 0), say)

    @contextmanager
    def opening(self, socket: ServerConnection) -> Iterator[None]:
        """Count the socket as without a session while the block lasts."""
        self._opening.add(socket)
        try:
            yield
        finally:
            self._opening.remove(socket)

    async def run(self, session: ServerSession) -> None:
        """Run a session from its beginning to its end."""
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.remove(session)

    def revoke_unwelcome(self) -> None:
        """End the sessions whose token is no longer valid."""
        for session in self._sessions:
            if not self.keeper.still_welcome(session.visitor, time.monotonic()):
                session.revoke()

    def drain(self) -> None:
        for session in self._sessions:
            session.drain()

    def stop(self) -> None:
        for session in self._sessions:
            session.stop()

    def abort(self) -> None:
        """Close every socket that is still open, without a goodbye."""
        for session in self._sessions:
            session.abort()
        for socket in self._opening:
            socket.transport.abort()

    async def gone(self) -> None:
        """Wait until no session is left."""
        while self._sessions:
            await asyncio.sleep(0.02)
