"""The WebSocket connection, with what `websockets` lacks against peers that flood, stall or vanish.

Its gaps, from 15 to 17: everything waits for ever for a peer that does not read, the keepalive's ping and the closing
handshake too; answers to pings are written however many wait already; a peer is taken for dead although it sends, if
its answer to a ping is behind what it sent before; one read of 256 KiB may hold 43,000 frames, two seconds of the
event loop that all sessions share; and each of the 43,000 answers is written by itself, and logged by itself as a
warning of asyncio's if the peer has hung up.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, ClassVar

from websockets.asyncio.connection import broadcast
from websockets.asyncio.server import ServerConnection
from websockets.protocol import SEND_EOF, State

_READ_BYTES = 4096
"""Most bytes handled at once: a frame of audio (3,864 bytes), or 680 empty pings (30 ms)."""
_RETURNS_AFTER_S = 6.0
"""Twice what a phone or a server stands still for now and then."""
_MAX_UNREAD_BYTES = 2**18
"""The most that may wait for a peer that asks and does not read."""


class Connection(ServerConnection, asyncio.BufferedProtocol):
    """Cut without ceremony once its peer has neither sent nor, if something waits for it, read a byte for `silence_s`.

    The library's own `ping_timeout` is to be off; its pings make a living peer send. `returns` makes it less patient.
    """

    silence_s: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent_at = self.loop.time()  # when the peer last sent something
        self._unread_since: float | None = None  # while more waits for the peer than may
        self._watch: asyncio.TimerHandle | None = None
        self._buffer = memoryview(bytearray(_READ_BYTES))  # under TLS it is filled in slices, which must not be copies
        self._tls = False
        self._returns = False
        self._pinged_at = 0.0

    def returns(self) -> None:
        """Note that the peer can come back: one that has sent nothing for 6 s is cut, since to whichever server it
        comes back it finds its session only then. Both sides are pinged awake every 2 s.
        """
        self._returns = True
        if self._watch is not None:
            self._watch.cancel()
            self._look()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._tls = transport.get_extra_info("sslcontext") is not None
        self._look()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._sent_at = self.loop.time()
        self.data_received(bytes(self._buffer[:nbytes]))
        if self.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self.transport.abort()
        elif self._tls and nbytes == _READ_BYTES and not self.transport.is_closing() and self.transport.is_reading():
            # There may be more, and under TLS asyncio calls again for it as often as the socket was read: several times
            # in one turn of the loop. The library pauses by itself only on data, so it cannot have paused meanwhile.
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    async def send(self, message: Any, text: bool | None = None) -> None:
        """Send as the library does. A message to a peer that reads is written at once, by the library's own way for
        that: its other way, through a context that may wait, costs several times as much.
        """
        whole = text is None and isinstance(message, str | bytes)
        if whole and self._unread_since is None and self.state is State.OPEN:
            broadcast((self,), message)
        else:
            await super().send(message, text=text)

    def send_data(self) -> None:
        writes = self.protocol.data_to_send()
        if not writes or self.transport.is_closing():
            return
        data = b"".join(writes)
        if data:
            self.transport.write(data)
        if writes[-1] == SEND_EOF:
            if self.transport.can_write_eof():
                with suppress(OSError):
                    self.transport.write_eof()
            else:
                self.transport.close()

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
        if not self.transport.is_reading():  # this side does not read
            self._sent_at = now
        unread_since = now if self._unread_since is None else self._unread_since
        silence_s = min(self.silence_s, _RETURNS_AFTER_S) if self._returns else self.silence_s
        if now - self._sent_at >= silence_s or now - unread_since >= self.silence_s:
            self.transport.abort()
            return
        if self._returns and now - self._pinged_at >= silence_s / 3 and self.state is State.OPEN:
            self._pinged_at = now
            if self._unread_since is None:
                self.protocol.send_ping(b"")
                self.send_data()
        self._watch = self.loop.call_later(silence_s / 8, self._look)


def connection(silence: float) -> type[ServerConnection]:
    """Return a class for `serve(create_connection=...)`, whose peers may be silent for `silence` seconds."""

    class Impatient(Connection):
        silence_s = silence

    return Impatient
