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


Said = Sequence[str | bytes]
"""Messages for the socket."""
Say = Callable[[Message], Said | Awaitable[Said]]
"""A dialect's way to say a message."""


class Dialect(Protocol):
    """A protocol's words for what the native messages mean."""

    @property
    def ready(self) -> bool:
        """Return whether one more reply may be encoded. If not, it will be once the client has said something."""

    def decode(self, data: str | bytes) -> Sequence[Received | Work[Received]]:
        """Return what a client said, or the work that finds it out. What is wrong with it is a `ProtocolError` in its
        place, not raised.
        """

    def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Said | Awaitable[Said]:
        """Return how a reply is said, or what finds it out: nothing else is encoded before that is known. Nothing is
        lost when nobody waits for it.
        """


class SessionSocket:
    """Moves messages until the session's end is told, or the socket is gone.

    Most are handled in the call that brings them: by the connection, the driver, or a thread that has encoded. What has
    to be waited for is the business of two tasks, `_read` and `_write`. messages_per_s: at most, from the client.
    """

    def __init__(
        self, socket: ServerConnection, driver: Driver, dialect: Dialect, messages_per_s: float = MESSAGES_PER_S
    ) -> None:
        assert isinstance(socket, Connection)
        self._socket, self._driver, self._dialect = socket, driver, dialect
        self._messages_per_s = messages_per_s
        self._loop = asyncio.get_running_loop()
        # Reading
        self._since, self._count = self._loop.time(), 0  # messages since then
        self._reading = False  # `_read` waits for a message
        self._read_one = asyncio.Event()
        # Writing
        self._idle = False  # `_write` has nothing to do
        self._needed = asyncio.Event()  # it has
        self._pouring = False
        self._encoding: Work[Said] | None = None  # in a thread
        self._encoded: Work[Said] | None = None  # to be written next
        self._error: Exception | None = None  # of ours, which `_write` raises

    async def run(self, first: Said = ()) -> bool:
        """Move messages, `first` before all others. Return whether the session has come to its end; if not, the socket
        is lost, or the session is to be put down.
        """
        writing = asyncio.create_task(self._write(first))
        tasks = (writing, asyncio.create_task(self._read()), asyncio.create_task(self._socket.wait_closed()))
        self._socket.give_messages_to(self._take)
        self._driver.tell_of_replies(self._reply_waits)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what went wrong
            return writing.done() and writing.result()
        finally:
            self._socket.give_messages_to(None)
            self._driver.tell_of_replies(None)
            encoding = self._encoding
            if encoding is not None:
                encoding.then = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if encoding is not None:  # and is kept for a client that comes back
                await encoding.wait()

    # In

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
        """Handle a message as it comes, or leave it to `_read`."""
        if not self._reading or not self._driver.has_room or self._early() > _EARLY_S:
            return False
        self._handle(data)
        return True

    def _handle(self, data: str | bytes) -> None:
        idle, self._idle = self._idle, False  # no reply is encoded before all of the message is handled
        for received in self._dialect.decode(data):  # from here on nothing of it is lost
            self._driver.give(received)
        self._idle = idle
        self._read_one.set()
        self._count += 1
        self._reply_waits()

    def _early(self) -> float:
        """Return for how many seconds no more should be read."""
        now = self._loop.time()
        early = self._since + self._count / self._messages_per_s - now
        if early < -1:  # what was not used is not saved up for more than a second
            self._since, self._count = now, 0
        return early

    # Out

    async def _write(self, first: Said) -> bool:
        with suppress(ConnectionClosed):
            for data in first:
                await self._socket.send(data)
            while True:
                self._needed.clear()
                if self._pour():
                    self._idle = True
                    await self._needed.wait()
                    self._idle = False
                elif self._error is not None:
                    raise self._error
                elif self._driver.muted:
                    return False
                elif not self._dialect.ready:
                    if not await self._until_ready():
                        self._socket.transport.abort()
                        return False
                elif (reply := self._driver.take_reply()) is not None:
                    if isinstance(reply, End):
                        for data in () if reply.message is None else await self._say(reply.message):
                            await self._socket.send(data)
                        await self._socket.close(reply.code, reply.reason)
                        return True
                    for data in await self._say(reply):
                        await self._socket.send(data)
        return False

    async def _say(self, reply: Message | AudioMessage | Echo | Saved) -> Said:
        said = self._dialect.encode(reply)
        if isinstance(said, Work):
            self._encoding = said
            await said.wait()
            self._encoding = None
        return await known(said)

    def _reply_waits(self) -> None:
        if self._idle and not self._pouring and not self._pour():
            self._needed.set()

    def _pour(self) -> bool:
        """Write the replies that wait, or leave the rest to `_write`. Return whether there is nothing to do for it."""
        if self._encoding is not None:
            return True  # `_go_on` will be called
        if self._error is not None:
            return False
        self._pouring = True
        try:
            return self._write_all()
        except Exception as error:  # it is the session's, and not of whoever has called
            self._error = error
            return False
        finally:
            self._pouring = False

    def _write_all(self) -> bool:
        if self._encoded is not None:
            work, self._encoded = self._encoded, None
            for data in work.result():
                self._socket.send_now(data)
        while not self._driver.muted and self._dialect.ready:
            reply = self._driver.waiting_reply
            if reply is None:
                return True
            if isinstance(reply, End | Saved) or not self._socket.takes:
                return False
            self._driver.take_reply()
            said = self._dialect.encode(reply)
            if isinstance(said, Work):
                self._encoding, said.then = said, self._go_on
                return True
            assert not isinstance(said, Awaitable), "only a saved session takes time without a thread for Opus"
            for data in said:
                self._socket.send_now(data)
        return False

    def _go_on(self) -> None:
        """Write what a thread has encoded, and what waits behind it."""
        self._encoded, self._encoding = self._encoding, None
        if not self._pour():
            self._needed.set()

    async def _until_ready(self) -> bool:
        """Wait until the client has acknowledged enough. Return whether it has."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while not self._dialect.ready:
                    self._read_one.clear()
                    await self._read_one.wait()
        return self._dialect.ready


async def known(said: Said | Awaitable[Said]) -> Said:
    """Return how a reply is said, once that is known."""
    return await said if isinstance(said, Awaitable) else said


async def dismiss(socket: ServerConnection, end: End, say: Say) -> None:
    """Say why there is no session, and close the socket."""
    with suppress(ConnectionClosed):
        for data in () if end.message is None else await known(say(end.message)):
            await socket.send(data)
        await socket.close(end.code, end.reason)
