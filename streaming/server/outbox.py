"""What a session has to say and its socket has not taken yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from streaming.protocol.messages import AudioMessage, Message


@dataclass(frozen=True, slots=True)
class End:
    """The session is over: its last message, if the socket may still take one, and how the socket closes."""

    message: Message | None
    code: int
    reason: str


Reply = Message | AudioMessage | End


class Outbox:
    """A queue that its writer can be made to wait for. Bounded by the writer's patience: see `Conversation`."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Reply] = asyncio.Queue()
        self._fewer = asyncio.Event()

    def __len__(self) -> int:
        return self._waiting.qsize()

    def put(self, reply: Reply) -> None:
        self._waiting.put_nowait(reply)

    async def get(self) -> Reply:
        """The next one. Nothing is lost when this is cancelled."""
        reply = await self._waiting.get()
        self._fewer.set()
        return reply

    def clear(self) -> None:
        """Nobody will take what waits."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._fewer.set()

    async def fewer_than(self, count: int) -> None:
        """Waits until fewer than this many wait."""
        while len(self) >= count:
            self._fewer.clear()
            await self._fewer.wait()
