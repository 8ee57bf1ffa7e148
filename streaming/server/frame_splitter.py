"""Find the messages of a WebSocket that came in one frame, so that the library's parser need not read them.

The parser of `websockets` is a chain of generators, which takes most of the time of a message. Nearly all messages are
one frame of text or bytes with nothing special about it (RFC 6455, section 5.2). Everything else, and whatever breaks
the rules, is left to the library, byte for byte: the handshake, pings and goodbyes, fragments and large messages.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

READ_BYTES = 4096
"""Most bytes read at once: a frame of audio (3,864 bytes), or 680 empty pings (30 ms)."""
WHOLE_BYTES = 8192
"""The longest frame that is found. It is more than a frame of audio in float32 or in OpenAI's base64."""

TEXT, BINARY = 0x81, 0x82
"""A frame's first byte: the last one of its message, no reserved bits, and the opcode."""
_LAST, _OPCODE = 0x80, 0x0F
_CONTINUED, _CLOSE = 0, 8
_KNOWN = frozenset((0, 1, 2, 9, 10))
"""Opcodes after which the peer may say more."""
_MASKED = 0x80
_MASK_BYTES = 4
_LENGTHS = {126: struct.Struct(">H"), 127: struct.Struct(">Q")}
_REQUEST_ENDS = b"\r\n\r\n"


class FrameSplitter:
    """Holds what a client sends from `room` until `split` has said whose it is. It begins with the HTTP request."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(WHOLE_BYTES + READ_BYTES))
        self._end = 0  # of what is in it
        self._passing = sys.maxsize  # bytes that are the library's, whatever they are
        self._request = b""  # its last bytes, until it has ended
        self._in_request = True
        self._fragmented = False

    def room(self) -> memoryview:
        """Return where the next bytes are to be written."""
        return self.buffer[self._end : self._end + READ_BYTES]

    def split(self, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield where in the buffer each message lies, and what is the library's between them; `nbytes` have come.

        (start, payload, end): a frame of text or bytes, whole, with its mask before the payload; the first byte says
        which. (start, 0, end): the library's. What is not whole yet stays. The buffer is to be left alone meanwhile.
        """
        buffer, begin = self.buffer, self._end
        at, end = 0, begin + nbytes
        if self._in_request:
            self._look_for_frames(bytes(buffer[:end]))
        library_from = 0
        while at < end:
            if self._passing:
                passed = min(self._passing, end - at)
                at += passed
                self._passing -= passed if self._passing != sys.maxsize else 0
                continue
            if end - at < 2:
                break
            head, length = buffer[at], buffer[at + 1] & ~_MASKED
            payload = at + 2 + _MASK_BYTES
            if length in _LENGTHS:
                form = _LENGTHS[length]
                if end - at < 2 + form.size:
                    break
                (length,) = form.unpack_from(buffer, at + 2)
                payload += form.size
            size = payload + length - at
            if self._library_reads(head, buffer[at + 1], size):
                continue
            if end - at < size:
                break
            if library_from < at:
                yield library_from, 0, at
            yield at, payload, at + size
            at = library_from = at + size
        if library_from < at:
            yield library_from, 0, at
        if at and at < end:
            buffer[: end - at] = bytes(buffer[at:end])
        self._end = end - at

    def rest(self) -> bytes:
        """Return what is not whole, and never will be: the client has sent its last byte."""
        rest = bytes(self.buffer[: self._end])
        self._end, self._passing = 0, sys.maxsize
        return rest

    def _library_reads(self, head: int, second: int, size: int) -> bool:
        """Note how far a frame is the library's. Return whether it is."""
        opcode = head & _OPCODE
        if opcode not in _KNOWN or head & ~(_LAST | _OPCODE) or not second & _MASKED:
            self._passing = sys.maxsize  # the last frame, or none at all
            return True
        if head in (TEXT, BINARY) and not self._fragmented and size <= WHOLE_BYTES:
            return False
        if opcode <= 2:
            self._fragmented = not head & _LAST
        self._passing = size
        return True

    def _look_for_frames(self, data: bytes) -> None:
        """Look for the end of the request, behind which frames begin."""
        known = len(self._request)
        found = (self._request + data).find(_REQUEST_ENDS)
        if found >= 0:
            self._in_request, self._passing = False, found + len(_REQUEST_ENDS) - known
        self._request = (self._request + data)[1 - len(_REQUEST_ENDS) :]
