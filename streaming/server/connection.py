"""The WebSocket connection, with what `websockets` lacks against peers that flood, stall or vanish.

Its gaps, from 15 to 17: everything waits for ever for a peer that does not read, the keepalive's ping and the closing
handshake too; answers to pings are written however many wait already; a peer is taken for dead although it sends, if
its answer to a ping is behind what it sent before; one read of 256 KiB may hold 43,000 frames, two seconds of the
event loop that all sessions share; and each of the 43,000 answers is written by itself, and logged by itself as a
warning of asyncio's if the peer has hung up.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame, Opcode
from websockets.protocol import SEND_EOF, State

from streaming.server.frame_splitter import BINARY, READ_BYTES, TEXT, FrameSplitter

try:
    from websockets.speedups import apply_mask
except ImportError:  # as the library does where it was installed without its extension in C
    from websockets.utils import apply_mask

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
        self._frames = FrameSplitter()
        self._take: Callable[[str | bytes], bool] | None = None
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

    def give_messages_to(self, take: Callable[[str | bytes], bool] | None) -> None:
        """Call this with each message as it comes. Where it returns False, or none is given, the message is for `recv`,
        and so are those that come before `recv` has returned it.
        """
        self._take = take

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()  # under TLS it is filled in slices, which must not be copies

    def buffer_updated(self, nbytes: int) -> None:
        self._sent_at = self.loop.time()
        frames = self._frames
        for start, payload, end in frames.split(nbytes):
            if payload and self.state is State.OPEN:
                self._message_came(frames.buffer, start, payload, end)
            else:
                self.data_received(bytes(frames.buffer[start:end]))
        if self.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self.transport.abort()
        elif self._tls and nbytes == READ_BYTES and not self.transport.is_closing() and self.transport.is_reading():
            # There may be more, and under TLS asyncio calls again for it as often as the socket was read: several times
            # in one turn of the loop. The library pauses by itself only on data, so it cannot have paused meanwhile.
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _message_came(self, buffer: memoryview, start: int, payload: int, end: int) -> None:
        head, data = buffer[start], apply_mask(buffer[payload:end], bytes(buffer[payload - 4 : payload]))
        if self._take is not None and not len(self.recv_messages.frames):
            message: str | bytes | None = data
            if head == TEXT:
                try:
                    message = data.decode()
                except UnicodeDecodeError:
                    message = None  # the library complains
            if message is not None and self._take(message):
                return
        self.process_event(Frame(Opcode.TEXT if head == TEXT else Opcode.BINARY, data))

    def eof_received(self) -> None:
        rest = self._frames.rest()
        if rest:
            self.data_received(rest)
        super().eof_received()

    async def send(self, message: Any, text: bool | None = None) -> None:
        """Send as the library does. A message to a peer that reads is written at once: the library's way, through a
        context that may wait and an object for the frame, costs several times as much.
        """
        if self.takes and text is None and isinstance(message, str | bytes):
            self.send_now(message)
        else:
            await super().send(message, text=text)

    @property
    def takes(self) -> bool:
        """Return whether a message can be written at once: the peer reads, and nobody has said goodbye."""
        return self._unread_since is None and self.state is State.OPEN

    def send_now(self, message: str | bytes) -> None:
        """Write a message, in one frame (RFC 6455, section 5.2), however much waits for the peer already. After a
        goodbye nothing is written.
        """
        head, data = (TEXT, message.encode()) if isinstance(message, str) else (BINARY, message)
        if self.state is State.OPEN and not self.transport.is_closing():
            self.transport.write(_header(head, len(data)) + data)

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


def _header(head: int, length: int) -> bytes:
    if length < 126:
        return bytes((head, length))
    return struct.pack(">BBH", head, 126, length) if length < 2**16 else struct.pack(">BBQ", head, 127, length)


def connection(silence: float) -> type[ServerConnection]:
    """Return a class for `serve(create_connection=...)`, whose peers may be silent for `silence` seconds."""

    class Impatient(Connection):
        silence_s = silence

    return Impatient
