"""One socket's share of a session: what comes in is decoded and given to the driver, what it says encoded and sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.conversation.conversation import Received
from streaming.conversation.outbox import Echo, End, Saved
from streaming.protocol.messages import AudioMessage, Message
from streaming.server.connection import Connection
from streaming.server.driver import Driver
from streaming.server.opus_threads import Work

MESSAGES_PER_S = 2000
"""Messages a second that are read of one client: handling them takes the event loop's time from the others."""
_EARLY_S = 0.1
"""How far a client may be ahead of that."""
_READY_TIMEOUT_S = 20.0
"""A client that reads and does not acknowledge is cut off; if it comes back it says what it has."""


class Dialect(Protocol):
    """A protocol's words for what the native messages mean."""

    @property
    def ready(self) -> bool:
        """Return whether one more reply may be encoded. If not, it will be once the client has said something."""

    def decode(self, data: str | bytes) -> Sequence[Received | Work[Received]]:
        """Return what a client said, or the work that finds it out. What is wrong with it is a `ProtocolError` in its
        place, not raised.
        """

    async def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Sequence[str | bytes]:
        """Return how a reply is said. One call at a time, in order; nothing is lost when it is cancelled."""


class SessionSocket:
    """Moves messages until the session's end is told, or the socket is gone.

    messages_per_s: at most, from the client.
    """

    def __init__(
        self, socket: ServerConnection, driver: Driver, dialect: Dialect, messages_per_s: float = MESSAGES_PER_S
    ) -> None:
        self._socket, self._driver, self._dialect = socket, driver, dialect
        self._messages_per_s = messages_per_s
        self._read_one = asyncio.Event()
        self._reading = False  # `recv` is waited for
        self._loop = asyncio.get_running_loop()
        self._since, self._count = self._loop.time(), 0

    async def run(self, first: Sequence[str | bytes] = ()) -> bool:
        """Move messages, `first` before all others. Return whether the session has come to its end; if not, the socket
        is lost, or the session is to be put down.
        """
        assert isinstance(self._socket, Connection)
        self._socket.give_messages_to(self._take)
        writing = asyncio.create_task(self._write(first))
        tasks = (writing, asyncio.create_task(self._read()), asyncio.create_task(self._socket.wait_closed()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what went wrong
            return writing.done() and writing.result()
        finally:
            self._socket.give_messages_to(None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                await self._driver.room()
                self._reading = True
                data = await self._socket.recv()
                self._reading = False
                self._handle(data)
                early = self._early()
                if early > _EARLY_S:
                    await asyncio.sleep(early)

    def _take(self, data: str | bytes) -> bool:
        """Handle a message as it comes, or leave it to `_read`, which waits for what has to be waited for."""
        if not self._reading or not self._driver.has_room or self._early() > _EARLY_S:
            return False
        self._handle(data)
        return True

    def _handle(self, data: str | bytes) -> None:
        for received in self._dialect.decode(data):  # from here on nothing of it is lost
            self._driver.give(received)
        self._read_one.set()
        self._count += 1

    def _early(self) -> float:
        """Return for how many seconds no more should be read."""
        now = self._loop.time()
        early = self._since + self._count / self._messages_per_s - now
        if early < -1:  # what was not used is not saved up for more than a second
            self._since, self._count = now, 0
        return early

    async def _write(self, first: Sequence[str | bytes]) -> bool:
        with suppress(ConnectionClosed):
            for data in first:
                await self._socket.send(data)
            while True:
                if not self._dialect.ready and not await self._until_ready():
                    self._socket.transport.abort()
                    return False
                reply = await self._driver.next_reply()
                if reply is None:
                    return False
                if isinstance(reply, End):
                    for data in () if reply.message is None else await self._dialect.encode(reply.message):
                        await self._socket.send(data)
                    await self._socket.close(reply.code, reply.reason)
                    return True
                for data in await self._dialect.encode(reply):
                    await self._socket.send(data)
        return False

    async def _until_ready(self) -> bool:
        """Wait until the client has acknowledged enough. Return whether it has."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while not self._dialect.ready:
                    self._read_one.clear()
                    await self._read_one.wait()
        return self._dialect.ready


async def dismiss(
    socket: ServerConnection, end: End, say: Callable[[Message], Awaitable[Sequence[str | bytes]]]
) -> None:
    """Say why there is no session, and close the socket."""
    with suppress(ConnectionClosed):
        for data in () if end.message is None else await say(end.message):
            await socket.send(data)
        await socket.close(end.code, end.reason)
