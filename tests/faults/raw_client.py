"""A WebSocket client on a bare socket, which can do what a well-behaved one cannot."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import struct
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message, SessionStart

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
CONTINUATION = 0x0


def frame(opcode: int, data: bytes = b"", fin: bool = True) -> bytes:
    """One masked frame (RFC 6455, section 5.2). The mask is zero, which is a mask like any other."""
    if len(data) < 126:
        length = bytes([0x80 | len(data)])
    elif len(data) < 2**16:
        length = struct.pack("!BH", 0x80 | 126, len(data))
    else:
        length = struct.pack("!BQ", 0x80 | 127, len(data))
    return bytes([(0x80 if fin else 0) | opcode]) + length + bytes(4) + data


def text(message: Message) -> bytes:
    """A control message in a frame."""
    return frame(TEXT, messages.encode(message).encode())


def audio(pcm: NDArray[np.int16], position: int = 0, turn: int = 1) -> bytes:
    """An audio message in a frame."""
    return frame(BINARY, messages.encode_audio(AudioMessage(turn, position, pcm)))


def handshake() -> bytes:
    """The request that opens a WebSocket."""
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {messages.PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


class RawClient:
    """A connection to `port`. receive_buffer: of the kernel, in bytes; small ones make the server feel it soon.

    trust: for TLS. Never answers pings by itself. Every wait is bounded by `patience_s`.
    """

    def __init__(
        self,
        port: int,
        receive_buffer: int | None = None,
        patience_s: float = 10.0,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(patience_s)
        self.socket.connect(("127.0.0.1", port))
        if trust is not None:
            self.socket = trust.wrap_socket(self.socket, server_hostname="localhost")
        self._received = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def open(self) -> RawClient:
        """The opening handshake."""
        self.socket.sendall(handshake())
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return self

    def start(self, start: SessionStart) -> RawClient:
        """Open the WebSocket and the session."""
        self.open().send(text(start))
        self.expect(b'"session.started"')
        return self

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def flood(self, data: bytes, most_bytes: int, stalled_s: float = 0.5) -> int:
        """Send `data` again and again, until so much is sent, the server does not take it, or it hangs up.

        Returns the number of bytes.
        """
        self.socket.settimeout(stalled_s)
        sent, view = 0, memoryview(data)
        try:
            while sent < most_bytes:
                sent += self.socket.send(view[sent % len(data) :])
        except OSError:  # TimeoutError is one
            pass
        return sent

    def receive_frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. Raises `ConnectionError` when the server has hung up."""
        while True:
            found = self._parse()
            if found is not None:
                return found
            self._receive()

    def expect(self, part: bytes) -> bytes:
        """The next text message that contains this; whatever comes before it is dropped."""
        while True:
            opcode, data = self.receive_frame()
            if opcode == TEXT and part in data:
                return data
            assert opcode != CLOSE, data

    def expect_close(self) -> int:
        """The server's close code; whatever comes before it is dropped."""
        while True:
            opcode, data = self.receive_frame()
            if opcode == CLOSE:
                return int(struct.unpack("!H", data[:2])[0])

    def hung_up(self) -> bool:
        """Wait until the server has closed or reset the connection. False if it does not in `patience_s`."""
        try:
            while self.socket.recv(2**16):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _receive(self) -> None:
        data = self.socket.recv(2**16)
        if not data:
            raise ConnectionError("the server hung up")
        self._received += data

    def _parse(self) -> tuple[int, bytes] | None:
        """A server's frame: never masked, never fragmented."""
        data = self._received
        if len(data) < 2:
            return None
        at, length = 2, data[1]
        if length >= 126:
            at = 4 if length == 126 else 10
            if len(data) < at:
                return None
            length = int.from_bytes(data[2:at], "big")
        if len(data) < at + length:
            return None
        self._received = data[at + length :]
        return data[0] & 0xF, data[at : at + length]
