"""What a client sends is cut along its frames, whatever it is and however it is cut by the network."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, Protocol, State
from websockets.utils import apply_mask

from streaming.server.frame_splitter import READ_BYTES, WHOLE_BYTES, FrameSplitter

BINARY, CLOSE, CONT, PING, TEXT = Opcode.BINARY, Opcode.CLOSE, Opcode.CONT, Opcode.PING, Opcode.TEXT
REQUEST = b"GET /v1/continue HTTP/1.1\r\nHost: here\r\n\r\n"


def sent(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    """A frame as a client sends it."""
    return Frame(opcode, data, fin).serialize(mask=True)


@dataclass(frozen=True)
class Message:
    """A message that was found. raw: the frame as it came."""

    first_byte: int
    data: bytes
    raw: bytes = field(default=b"", compare=False)


def split(stream: bytes, reads: Iterator[int] | None = None) -> list[bytes | Message]:
    """Return what becomes of a stream behind a request: the messages, and the bytes that are the library's."""
    splitter, at = FrameSplitter(), 0
    found: list[bytes | Message] = []
    stream = REQUEST + stream

    def passed(data: bytes) -> None:
        last = found.pop() if found and isinstance(found[-1], bytes) else b""
        assert isinstance(last, bytes)
        if last + data:
            found.append(last + data)

    while at < len(stream):
        room = splitter.room()
        size = min(len(room), len(stream) - at, READ_BYTES if reads is None else next(reads, READ_BYTES))
        room[:size] = stream[at : at + size]
        at += size
        for start, payload, end in splitter.split(size):
            raw = bytes(splitter.buffer[start:end])
            if payload:
                mask, data = raw[payload - start - 4 : payload - start], raw[payload - start :]
                found.append(Message(raw[0], apply_mask(data, mask), raw))
            else:
                passed(raw)
    passed(splitter.rest())
    assert isinstance(found[0], bytes) and found[0].startswith(REQUEST)
    rest = found[0][len(REQUEST) :]
    return [*([rest] if rest else []), *found[1:]]


def library(stream: bytes) -> tuple[list[Frame], Protocol]:
    """What the library makes of the same stream, and the protocol after it."""
    protocol = Protocol(SERVER, state=State.OPEN)
    protocol.receive_data(stream)
    return [event for event in protocol.events_received() if isinstance(event, Frame)], protocol


def messages(frames: Sequence[Frame]) -> list[tuple[Opcode, bytes, bool]]:
    return [(frame.opcode, bytes(frame.data), frame.fin) for frame in frames]


FRAMES = st.one_of(
    st.builds(sent, st.sampled_from((TEXT, BINARY)), st.binary(max_size=200)),
    st.builds(lambda size, opcode: sent(opcode, bytes(size)), st.integers(120, 9000), st.sampled_from((TEXT, BINARY))),
    st.builds(sent, st.sampled_from((PING, CLOSE)), st.binary(max_size=125)),
    st.builds(sent, st.sampled_from((TEXT, BINARY, CONT)), st.binary(max_size=200), fin=st.booleans()),
    st.binary(max_size=20),
)
READS = st.lists(st.integers(1, READ_BYTES), max_size=60).map(iter)


def test_a_frame_of_audio_is_a_message() -> None:
    assert split(sent(BINARY, bytes(3856)) + sent(TEXT, b"{}")) == [Message(0x82, bytes(3856)), Message(0x81, b"{}")]


def test_what_is_not_one_whole_small_frame_is_the_librarys() -> None:
    """A message within a fragmented one breaks the rules: it must reach the library, which closes the connection."""
    large, ping = sent(BINARY, bytes(WHOLE_BYTES)), sent(PING, b"here")
    fragments = sent(TEXT, b"a", fin=False) + sent(TEXT, b"b") + sent(CONT, b"c")
    assert split(large + ping + fragments + sent(TEXT, b"d")) == [large + ping + fragments, Message(0x81, b"d")]


def test_nothing_is_a_message_after_a_goodbye_or_a_broken_frame() -> None:
    """The library discards what follows these."""
    message = sent(BINARY, b"late")
    for last in (sent(CLOSE, b""), b"\x82\x00", b"\xc2\x80abcd", b"\x83\x80abcd"):
        assert split(sent(BINARY, b"in time") + last + message) == [Message(0x82, b"in time"), last + message]


def test_what_looks_like_the_end_of_a_request_within_one_begins_no_frames() -> None:
    """Frames begin where the request ends and nowhere else, though its end comes in two reads."""
    message = sent(BINARY, b"first")
    for cut in range(1, len(REQUEST) + len(message)):
        assert split(message, iter((cut,))) == [Message(0x82, b"first")]


def test_a_length_that_could_be_shorter_is_read() -> None:
    """The library takes it, and a peer may say so (RFC 6455 forbids it, and nobody minds)."""
    data = struct.pack(">BBH4s", 0x82, 0x80 | 126, 3, bytes(4)) + b"abc"
    assert split(data) == [Message(0x82, b"abc")]


@settings(deadline=None)
@given(st.lists(FRAMES, max_size=8), READS)
def test_any_stream_comes_to_what_the_library_makes_of_it(frames: list[bytes], reads: Iterator[int]) -> None:
    """In order, and with the library's word on where the connection ends. The library is at the beginning of a frame
    wherever a message is found; once it says goodbye, it is given everything.
    """
    stream = b"".join(frames)
    expected, whole = library(stream)
    rest, protocol = [], Protocol(SERVER, state=State.OPEN)
    for piece in split(stream, reads):
        if isinstance(piece, Message) and protocol.state is State.OPEN:
            assert protocol.current_size is None and not protocol.reader.buffer
            rest.append(Frame(Opcode(piece.first_byte & 15), piece.data))
        else:
            protocol.receive_data(piece.raw if isinstance(piece, Message) else piece)
            rest += [event for event in protocol.events_received() if isinstance(event, Frame)]
    assert messages(rest) == messages(expected)
    ends = [(p.state, p.close_sent, p.close_rcvd, bytes(p.reader.buffer)) for p in (protocol, whole)]
    assert ends[0] == ends[1]
