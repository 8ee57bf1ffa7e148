"""The WebSocket connection, with what `websockets` lacks against peers that flood, stall or vanish.

Its gaps, from 15 to 17: everything waits for ever for a peer that does not read, the keepalive's ping and the closing
handshake too; answers to pings are written however many wait already; a peer is taken for dead although it sends, if
its answer to a ping is behind what it sent before; and one read of 256 KiB may hold 43,000 frames, two seconds of the
event loop that all sessions share.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from websockets.asyncio.server import ServerConnection

_READ_BYTES = 4096
"""Most bytes handled at once: a frame of audio (3,864 bytes), or 680 empty pings (30 ms)."""
_MAX_UNREAD_BYTES = 2**18
"""What may wait for a peer that asks and does not read."""


class Connection(ServerConnection):
    """Cut without ceremony once its peer has neither sent nor, if something waits for it, read a byte for `silence_s`.

    The library's own `ping_timeout` is to be off; its pings make a living peer send.
    """

    silence_s: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent_at = self.loop.time()  # by the peer
        self._unread_since: float | None = None  # while more waits for the peer than may
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # of one read, in asyncio's socket transport
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._sent_at = self.loop.time()
        super().data_received(data)
        if self.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        now = self.loop.time()
        if not self.transport.is_reading():  # it is this side that does not listen
            self._sent_at = now
        dead_since = min(self._sent_at, now if self._unread_since is None else self._unread_since)
        if now - dead_since >= self.silence_s:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(self.silence_s / 8, self._look)


def connection(silence: float) -> type[ServerConnection]:
    """For `serve(create_connection=...)`. silence: in seconds."""

    class Impatient(Connection):
        silence_s = silence

    return Impatient
