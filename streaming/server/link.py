"""One socket's share of a session: what comes in is decoded and given to the conversation, what it says is encoded and
sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.protocol.messages import AudioMessage, Message
from streaming.server.conversation import Conversation, Received
from streaming.server.outbox import End

MESSAGES_PER_S = 2000
"""A client that sends faster is read more slowly: handling messages takes the event loop's time from the others."""

_READY_TIMEOUT_S = 20.0
"""A client that reads and does not acknowledge is cut off; if it comes back it says what it has."""


class Dialect(Protocol):
    """A protocol's words for what the native messages mean."""

    def decode(self, data: str | bytes) -> Sequence[Received]:
        """What a client said. What is wrong with it is a `ProtocolError` in its place, not raised."""

    def encode(self, reply: Message | AudioMessage) -> Sequence[str | bytes]:
        """How a reply is said."""

    async def ready(self) -> None:
        """Waits until one more reply may be encoded."""


class Link:
    """Moves messages until the conversation's end is told, or the socket is gone. messages_per_s: at most, from the
    client.
    """

    def __init__(
        self,
        socket: ServerConnection,
        conversation: Conversation,
        dialect: Dialect,
        messages_per_s: float = MESSAGES_PER_S,
    ) -> None:
        self._socket, self._conversation, self._dialect = socket, conversation, dialect
        self._messages_per_s = messages_per_s

    async def run(self, first: Sequence[str | bytes] = ()) -> bool:
        """Sends `first` first. Returns whether the conversation has come to its end."""
        writing = asyncio.create_task(self._write(first))
        tasks = (writing, asyncio.create_task(self._read()), asyncio.create_task(self._socket.wait_closed()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what went wrong
            return writing.done() and writing.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        started, count = loop.time(), 0
        with suppress(ConnectionClosed):
            while True:
                await self._conversation.room()
                data = await self._socket.recv()
                for received in self._dialect.decode(data):  # from here on nothing of it is lost
                    self._conversation.give(received)
                count += 1
                early = started + count / self._messages_per_s - loop.time()
                if early > 0.1:
                    await asyncio.sleep(early)
                elif early < -1:  # what was not used is not saved up for more than a second
                    started, count = loop.time(), 0

    async def _write(self, first: Sequence[str | bytes]) -> bool:
        with suppress(ConnectionClosed):
            for data in first:
                await self._socket.send(data)
            while True:
                try:
                    async with asyncio.timeout(_READY_TIMEOUT_S):
                        await self._dialect.ready()
                except TimeoutError:
                    self._socket.transport.abort()
                    return False
                reply = await self._conversation.outbox.get()
                if isinstance(reply, End):
                    for data in () if reply.message is None else self._dialect.encode(reply.message):
                        await self._socket.send(data)
                    await self._socket.close(reply.code, reply.reason)
                    return True
                if isinstance(reply, AudioMessage):
                    self._conversation.sending(reply)
                for data in self._dialect.encode(reply):
                    await self._socket.send(data)
        return False


async def dismiss(socket: ServerConnection, end: End, say: Callable[[Message], Sequence[str | bytes]]) -> None:
    """Says why there is no session, and closes the socket."""
    with suppress(ConnectionClosed):
        for data in () if end.message is None else say(end.message):
            await socket.send(data)
        await socket.close(end.code, end.reason)
