"""Rubbish in every form: what comes back is a documented error or nothing, and the server is ready for the next."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streaming.errors import ProtocolError
from streaming.protocol import messages
from tests.faults.harness import FAST, Watched, watched
from tests.faults.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, RawClient, frame, text

ERRORS = {"bad_message", "unknown_type", "bad_state", "empty_prompt"}
CLOSES = {1000, 1007, 1008, 1009, 1013}
"""1011, which says that the server failed, is not among them, nor is a connection that just ends."""
FRAMING_CLOSES = set(range(1000, 5000)) - {1011}
"""Of clients that may say goodbye themselves, too: their own code comes back, 1005 for none (RFC 6455, section 7.1.5).
"""
TYPES = [
    "session.start",
    "session.update",
    "speak",
    "interrupt",
    "played",
    "ping",
    "session.close",
    "session.started",
    "hum",
    "",
]
FIELDS = [
    "type",
    "protocol",
    "turn_taking",
    "pace",
    "overflow",
    "max_seconds",
    "lead_ms",
    "sampling",
    "vad",
    "turn",
    "heard_samples",
    "samples",
    "id",
    "client_time_ms",
    "temperature",
    "top_k",
    "top_p",
    "seed",
]

number = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31 - 1, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 1e-320, 1e308]),
    st.floats(allow_nan=False, allow_infinity=False),
).map(repr)
odd_literal = st.sampled_from(
    [
        *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "01", "+1", "1.", ".5", "0x10", "-", "nul"),
        *('"\\ud800"', '"\\u0000"', '"\\x"', '"\x00"', "'1'", "\ufeff1"),
        *("1" * 400, "[" * 2000, '{"a":' * 500, "[" * 200 + "]" * 200),
    ]
)
literal = st.one_of(
    number, odd_literal, st.sampled_from(["null", "true", "{}", "[]"]), st.text(max_size=8).map(json.dumps)
)
"""The text of a JSON value, or of what is nearly one."""
nested = st.dictionaries(st.sampled_from(FIELDS), literal, max_size=4).map(
    lambda fields: "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"
)


def _object(kind: str, fields: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f'"{key}":{value}' for key, value in [("type", json.dumps(kind)), *fields]) + "}"


nearly_a_message = st.builds(
    _object,
    st.sampled_from(TYPES) | st.text(max_size=4),
    st.lists(st.tuples(st.sampled_from(FIELDS), literal | nested), max_size=6),  # keys may repeat
)
json_text = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
).map(json.dumps)
any_text = st.one_of(st.text(), json_text, literal, nearly_a_message)

turn = st.integers(1, 5)
samples = st.integers(0, 20_000)
valid = st.one_of(
    st.builds(messages.Speak, turn=turn),
    st.builds(messages.Interrupt, turn=turn, heard_samples=samples),
    st.builds(messages.Played, turn=turn, samples=samples),
    st.builds(messages.Ping, id=st.integers(0, 9), client_time_ms=st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(
        messages.SessionUpdate,
        max_seconds=st.none() | st.floats(0, 3600, exclude_min=True),
        sampling=st.none()
        | st.builds(messages.SamplingOptions, temperature=st.floats(0, 10), top_k=st.integers(0, 2**31 - 1)),
    ),
    st.just(FAST),
)
header = st.builds(
    struct.Struct("<BBHIQ").pack,
    st.sampled_from([1, 1, 1, 0, 2, 255]),
    st.sampled_from([0, 0, 0, 1, 255]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([1, 0, 2, 2**32 - 1]),
    st.sampled_from([0, 0, 1, 2**63, 2**64 - 1]),
)
any_binary = st.one_of(st.binary(max_size=64), st.builds(bytes.__add__, header, st.binary(max_size=4000)))

quick = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def shared() -> Iterator[Watched]:
    with watched(slots=64, step_s=0.0) as it:  # cases come faster than slots do after a broken frame
        yield it


@pytest.fixture
def server(shared: Watched) -> Iterator[Watched]:
    """One for all; after each test it must be as it was, and say in a turn what it says alone."""
    yield shared
    shared.assert_clean()


def _answers(peer: RawClient, closes: set[int]) -> int | None:
    """Read until the server has handled everything: up to its answer to a last ping, or its close, whose code this
    returns. Everything on the way must be documented.
    """
    last = 2**40
    with suppress(ConnectionError):
        peer.send(text(messages.Ping(id=last, client_time_ms=0.0)))
    fatal = False
    while True:
        opcode, data = peer.receive_frame()
        assert opcode in (TEXT, BINARY, CLOSE, PING, PONG)
        if opcode == CLOSE:
            code = int(struct.unpack("!H", data[:2])[0]) if data else 1005
            assert code in closes, data
            data[2:].decode()
            return code
        if opcode == BINARY:
            messages.decode_audio(data)
        if opcode != TEXT:
            continue
        said = messages.decode_server(data)
        assert not fatal, f"{said} after a fatal error"
        if isinstance(said, messages.Error):
            assert said.code in ERRORS, said
            fatal = said.fatal
        if isinstance(said, messages.Pong) and said.id == last:
            return None


def _decodes_or_refuses(decode: Callable[[bytes], object], data: bytes) -> None:
    with suppress(ProtocolError):
        decode(data)


@given(any_text.map(lambda value: value.encode(errors="surrogatepass")) | st.binary())
@example(b"[" * 90_000)
@example(b'{"type":' * 10_000)
@example(b'{"type":"speak","turn":' + b"9" * 90_000 + b"}")
@example(b'{"type":"\\ud800"}')
@example(b'{"type":"\xed\xa0\x80"}')
@settings(max_examples=1000)
def test_decoding_a_control_message_raises_protocol_errors_only(data: bytes) -> None:
    """One exception of another kind would end the session without a word."""
    for decode in (messages.decode_client, messages.decode_server, messages.type_of):
        _decodes_or_refuses(decode, data)
        with suppress(UnicodeDecodeError):
            _decodes_or_refuses(decode, data.decode())


@given(any_binary)
@settings(max_examples=1000)
def test_decoding_audio_raises_protocol_errors_only_and_is_the_inverse_of_encoding(data: bytes) -> None:
    for decode in (messages.decode_audio, messages.decode_float):
        with suppress(ProtocolError):
            assert messages.encode_audio(decode(data)) == data


@given(st.lists(any_text.map(lambda value: frame(TEXT, value.encode(errors="surrogatepass")[:90_000])), max_size=12))
@example([frame(TEXT, b"[" * 90_000)])
@example([frame(TEXT, b'{"type":"' + b"\\u0000" * 10_000 + b'"}')])
@example([frame(TEXT, b'{"type":"\\ud800"}')])
@example([frame(TEXT, b"\xff\xfe")])
@example([frame(TEXT, b'{"type":"ping","id":1,"client_time_ms":1e999}')])
@example([frame(TEXT, b'{"type":"ping","id":1,"client_time_ms":NaN}')])
@example([frame(TEXT, b'{"type":"speak","turn":1,"turn":2}')])
@quick
def test_any_text_gets_documented_answers(server: Watched, sent: list[bytes]) -> None:
    with RawClient(server.port) as peer:
        peer.start(FAST).send(b"".join(sent))
        _answers(peer, CLOSES)


@given(st.lists(any_binary.map(lambda data: frame(BINARY, data)), max_size=8))
@example([frame(BINARY, b"")])
@example([frame(BINARY, bytes(16))])
@quick
def test_any_bytes_get_documented_answers(server: Watched, sent: list[bytes]) -> None:
    with RawClient(server.port) as peer:
        peer.start(FAST).send(b"".join(sent))
        _answers(peer, CLOSES)


@given(
    st.binary(max_size=40) | any_text.map(lambda value: value.encode(errors="surrogatepass")[:90_000]), st.booleans()
)
@example(b'{"type":"session.start","max_seconds":1e-320}', False)
@example(b'{"type":"session.start","protocol":99999999999999999999999}', False)
@example(b'{"type":"session.start","sampling":{"seed":9223372036854775808}}', False)
@quick
def test_any_first_message_gets_a_documented_answer(server: Watched, first: bytes, binary: bool) -> None:
    with RawClient(server.port) as peer:
        peer.open().send(frame(BINARY if binary else TEXT, first))
        _answers(peer, CLOSES)


@given(st.lists(valid.map(text) | st.binary(min_size=2, max_size=4000), max_size=20))
@quick
def test_any_order_of_valid_messages_leaves_the_session_usable(server: Watched, script: list[bytes]) -> None:
    """Long binaries stand for speech: they get the header that continues what was sent before."""
    position = 0
    with RawClient(server.port) as peer:
        peer.start(FAST)
        for part in script:
            if part[:1] == b"\x81":
                peer.send(part)
                continue
            pcm = part[: len(part) // 2 * 2]
            peer.send(frame(BINARY, struct.pack("<BBHIQ", 1, 0, 0, 1, position) + pcm))
            position += len(pcm) // 2
        assert _answers(peer, CLOSES) is None, "the session ended"


@given(
    st.lists(
        st.builds(
            frame,
            st.sampled_from([TEXT, BINARY, CONTINUATION, CONTINUATION, CLOSE, PING, PONG, 0x3, 0xB]),
            st.binary(max_size=130),
            st.booleans(),
        )
        | st.binary(max_size=20),
        max_size=12,
    )
)
@example([frame(TEXT, b'{"type":', fin=False), frame(PING, b"x"), frame(CONTINUATION, b'"hum"}')])
@example([frame(TEXT, fin=False), *[frame(CONTINUATION, fin=False)] * 5000])
@example([bytes([0xC1, 0x80, 0, 0, 0, 0])])  # a compressed frame, though compression was not agreed on
@example([bytes([0x82, 0xFF]) + struct.pack("!Q", 2**62) + bytes(4)])
@example([frame(BINARY, bytes(96_017))])
@quick
def test_any_frames_get_documented_answers(server: Watched, sent: list[bytes]) -> None:
    """Below the messages: unfinished, unknown, unmasked and oversized frames, in any order."""
    with RawClient(server.port) as peer:
        peer.start(FAST)
        with suppress(ConnectionError):
            peer.send(b"".join(sent))
            # Ends whatever fragment is open, so that there is something to answer; then a frame that is no frame
            peer.send(frame(CONTINUATION) + bytes([0xF0, 0x80]) + bytes(4) + bytes(200_000))
        _answers(peer, FRAMING_CLOSES)
