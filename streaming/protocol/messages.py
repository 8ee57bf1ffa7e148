"""The native protocol's messages: pure values, bytes in and bytes out. `docs/protocol.md` is the specification.

Text messages are JSON objects told apart by `type`; binary messages are a 16-byte header and mono PCM, of 16 bits or
float32, or the same and Opus packets (`streaming.protocol.opus` has what is in them). Decoding raises `ProtocolError`
and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar, get_args

import msgspec
import numpy as np

from streaming.audio import Pcm
from streaming.errors import ProtocolError

PROTOCOL_VERSION = 1
PATH = "/v1/continue"
MAX_AUDIO_SAMPLES = 48_000
"""Most samples in one binary message: two seconds."""
MAX_MESSAGE_BYTES = 16 + 2 * MAX_AUDIO_SAMPLES
"""Largest message either side sends."""
MAX_FLOAT_SAMPLES = 24_000
"""The same where samples are float32: one second."""
LOUDEST = 1_000.0
"""Most that a float32 sample may be: 60 dB over full scale is no loud speech but samples in another unit."""
MAX_OPUS_SAMPLES = 2_880
"""Most samples that the packets of one Opus message decode to: 120 ms, as much as one packet may hold."""
MAX_OPUS_PACKET_BYTES = 4_000
MAX_PIECE_BYTES = 1 << 16
"""Most of a saved session in one binary message."""

OPEN_TURN = 0
"""Instead of a number: the turn that input belongs to just now."""

NonNegative = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Turn = Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Codec = Literal["pcm16", "opus", "float32"]
"""The codecs of audio, in both directions. Only a client sends `float32`; the server then answers in PCM16."""


class UnknownTypeError(ProtocolError):
    """A well-formed control message of a type that this version does not know. Answered, never fatal."""

    code = "unknown_type"

    def __init__(self, kind: str, known: frozenset[str]) -> None:
        super().__init__(f"unknown message type {kind[:64]!r}; known: {', '.join(sorted(known))}")
        self.kind = kind[:64]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False, tag_field="type"):
    """Base of all control messages.

    counted: whether it is the session's, and sent again where a lost connection took it; the others are the
    connection's, or made void by the next of their kind.
    """

    counted: ClassVar[bool] = True

    @property
    def type(self) -> str:
        """Return the type as it is on the wire."""
        return str(self.__struct_config__.tag)


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of drawing tokens. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    None from a client leaves a setting to the model; a server says all of them.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None


class VadOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Server-side voice activity detection. respond: whether the end of speech is the word to go on."""

    threshold: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    silence_ms: Annotated[int, msgspec.Meta(ge=80, le=10_000)] = 480
    prefix_ms: Annotated[int, msgspec.Meta(ge=0, le=2_000)] = 320
    barge_in: bool = True
    respond: bool = True


# Client to server


class SessionStart(Message, tag="session.start", frozen=True):
    protocol: int = PROTOCOL_VERSION
    turn_taking: Literal["manual", "vad"] = "manual"
    pace: Literal["realtime", "fast"] = "realtime"
    overflow: Literal["slide", "refuse"] = "slide"
    lag: Literal["drop", "wait"] = "drop"
    max_seconds: Seconds = 20.0
    lead_ms: Annotated[int, msgspec.Meta(ge=80, le=10_000)] = 400
    resume: bool = False
    takes: bool = False
    voices: bool = False
    saved_bytes: NonNegative = 0
    codecs: tuple[str, ...] = ("pcm16",)
    sampling: SamplingOptions = SamplingOptions()
    vad: VadOptions = VadOptions()

    counted = False


class SessionResume(Message, tag="session.resume", frozen=True):
    token: str
    received: NonNegative
    position: NonNegative
    protocol: int = PROTOCOL_VERSION

    counted = False


class SessionUpdate(Message, tag="session.update", frozen=True):
    max_seconds: Seconds | None = None
    sampling: SamplingOptions | None = None
    turn_taking: Literal["manual", "vad"] | None = None
    vad: VadOptions | None = None


class Speak(Message, tag="speak", frozen=True):
    """The prompt is over: speak. max_seconds, sampling: of this turn only."""

    turn: Annotated[int, msgspec.Meta(ge=OPEN_TURN, le=2**32 - 1)]
    max_seconds: Seconds | None = None
    sampling: SamplingOptions | None = None


class Take(Message, tag="take", frozen=True):
    """Speak anew from the end of a turn's prompt. max_seconds, sampling: of this turn only."""

    turn: Turn
    max_seconds: Seconds | None = None
    sampling: SamplingOptions | None = None


class TakeKeep(Message, tag="take.keep", frozen=True):
    """Go on from the end of this turn, as if none after it had been."""

    turn: Turn


class InputClear(Message, tag="input.clear", frozen=True):
    keep_samples: NonNegative = 0


class Interrupt(Message, tag="interrupt", frozen=True):
    turn: Turn
    heard_samples: NonNegative


class Played(Message, tag="played", frozen=True):
    turn: Turn
    samples: NonNegative
    underruns: NonNegative = 0

    counted = False


class Ping(Message, tag="ping", frozen=True):
    id: NonNegative
    client_time_ms: float

    counted = False


class Ack(Message, tag="ack", frozen=True):
    """An acknowledgement, by either side: so many counted messages have arrived."""

    received: NonNegative

    counted = False


class SessionSave(Message, tag="session.save", frozen=True):
    """A request for the session as a file, to go on with it another day."""

    counted = False


class SessionClose(Message, tag="session.close", frozen=True):
    pass


ClientMessage = (
    SessionStart
    | SessionResume
    | SessionUpdate
    | Speak
    | Take
    | TakeKeep
    | InputClear
    | Interrupt
    | Played
    | Ping
    | Ack
    | SessionSave
    | SessionClose
)


# Server to client


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """The means to come back after the connection was lost."""

    token: str
    seconds: float
    window: int


class SessionStarted(Message, tag="session.started", frozen=True):
    session: str
    protocol: int
    model: str
    num_codebooks: int
    sample_rate: int
    frame_samples: int
    context_samples: int
    rewind_samples: int
    seed: int
    turn: int
    notice: str | None = None
    suggestions: tuple[str, ...] = ()
    resume: Resumption | None = None
    codec: Codec = "pcm16"
    sampling: SamplingOptions = SamplingOptions()
    takes: int = 0
    saves: bool = False

    counted = False


class SessionResumed(Message, tag="session.resumed", frozen=True):
    """turn: the open one, where the session went back to the end of the turn before; None where nothing is lost."""

    received: int
    turn: int | None = None

    counted = False


class SessionQueued(Message, tag="session.queued", frozen=True):
    place: int

    counted = False


class SessionRefused(Message, tag="session.refused", frozen=True):
    code: str
    message: str
    retry_after_ms: int

    counted = False


class SessionUpdated(Message, tag="session.updated", frozen=True):
    max_seconds: float
    sampling: SamplingOptions
    turn_taking: Literal["manual", "vad"] = "manual"
    vad: VadOptions = VadOptions()


class SpeechStarted(Message, tag="speech.started", frozen=True):
    turn: int
    at_samples: int


class SpeechStopped(Message, tag="speech.stopped", frozen=True):
    turn: int
    at_samples: int


class InputLagging(Message, tag="input.lagging", frozen=True):
    turn: int
    behind_ms: float


class InputCleared(Message, tag="input.cleared", frozen=True):
    turn: int
    kept_samples: int


class InputDropped(Message, tag="input.dropped", frozen=True):
    turn: int
    samples: int


class TurnSpeaking(Message, tag="turn.speaking", frozen=True):
    turn: int
    prompt_samples: int
    dropped_samples: int


class TurnVoice(Message, tag="turn.voice", frozen=True):
    """The name of the voice in which the model goes on in this turn, before its first audio."""

    turn: int
    voice: str


class TurnDone(Message, tag="turn.done", frozen=True):
    turn: int
    reason: Literal["end", "max_seconds", "interrupted"]
    samples: int
    first_frame_ms: float | None
    mean_step_ms: float | None


class TakeStarted(Message, tag="take.started", frozen=True):
    """The next `turn.speaking`, of `turn`, is another continuation of the prompt of the turn `of`."""

    turn: int
    of: int
    sampling: SamplingOptions


class TakeKept(Message, tag="take.kept", frozen=True):
    """The conversation goes on from the end of the turn `of`; what is said next belongs to `turn`."""

    turn: int
    of: int


class Interrupted(Message, tag="interrupted", frozen=True):
    turn: int
    kept_samples: int


class Error(Message, tag="error", frozen=True):
    code: str
    message: str
    fatal: bool
    in_reply_to: str | None = None


class Pong(Message, tag="pong", frozen=True):
    id: int
    client_time_ms: float
    server_time_ms: float

    counted = False


class SessionSaved(Message, tag="session.saved", frozen=True):
    """The session as it was when `turn` was open: so many bytes, which follow in pieces."""

    turn: int
    bytes: int

    counted = False


class SessionClosed(Message, tag="session.closed", frozen=True):
    reason: str


ServerMessage = (
    SessionStarted
    | SessionResumed
    | SessionQueued
    | SessionRefused
    | InputLagging
    | InputDropped
    | InputCleared
    | SessionUpdated
    | SpeechStarted
    | SpeechStopped
    | TurnSpeaking
    | TurnVoice
    | TurnDone
    | TakeStarted
    | TakeKept
    | Interrupted
    | Error
    | Pong
    | Ack
    | SessionSaved
    | SessionClosed
)

_encoder = msgspec.json.Encoder()
_client_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_server_decoder: msgspec.json.Decoder[ServerMessage] = msgspec.json.Decoder(ServerMessage)
_CLIENT_TYPES = frozenset(str(t.__struct_config__.tag) for t in get_args(ClientMessage))
_SERVER_TYPES = frozenset(str(t.__struct_config__.tag) for t in get_args(ServerMessage))

T = TypeVar("T")


def encode(message: Message) -> str:
    """Return a control message as the text to send."""
    return _encoder.encode(message).decode()


def decode_client(text: str | bytes) -> ClientMessage:
    """Return what a client said. Raises `UnknownTypeError` for an unknown type, `ProtocolError` for all else amiss."""
    return _decode(text, _client_decoder, _CLIENT_TYPES)


def decode_server(text: str | bytes) -> ServerMessage:
    """Return what a server said. Raises as `decode_client` does."""
    return _decode(text, _server_decoder, _SERVER_TYPES)


def _decode(text: str | bytes, decoder: msgspec.json.Decoder[T], known: frozenset[str]) -> T:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        reason = str(error)
    kind = type_of(text)
    if kind is not None and kind not in known:
        raise UnknownTypeError(kind, known)
    raise ProtocolError(f"not a valid {kind or 'control'} message: {reason}")


def type_of(text: str | bytes) -> str | None:
    """Return the `type` of a control message, whatever else is wrong with it; None if it has none."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get("type")
        return None if raw is None else msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def protocol_of(text: str | bytes) -> int:
    """Return the `protocol` of a `session.start` of any version. Raises `ProtocolError` if it is not a number."""
    try:
        return msgspec.json.decode(text, type=_Versioned).protocol
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid session.start message: {error}") from None


class _Versioned(msgspec.Struct, frozen=True):
    protocol: int = PROTOCOL_VERSION


# Binary messages

_HEADER = struct.Struct("<BBHIQ")
_KIND_PCM16 = 1
_KIND_OPUS = 2
_KIND_FLOAT32 = 3
_KIND_SAVED = 4
_U16 = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class AudioMessage:
    """One binary message.

    turn: the turn that the audio belongs to.
    position_samples: samples sent before these, in the session (client to server) or in the turn (server to client).
    pcm: [n], 24 kHz mono; from a server int16, from a client int16 or float32.
    """

    counted: ClassVar[bool] = True

    turn: int
    position_samples: int
    pcm: Pcm


@dataclass(frozen=True, slots=True)
class OpusMessage:
    """One binary message of a session whose codec is Opus: it stands for an `AudioMessage` of `samples` samples.

    fresh: a stream begins, with a decoder as new. skip: how many decoded samples are dropped before those that count;
    what is left after them is dropped too.
    """

    turn: int
    position_samples: int
    fresh: bool
    skip: int
    samples: int
    packets: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SavedPiece:
    """One binary message: a piece of a saved session. offset: the bytes before it."""

    counted: ClassVar[bool] = False

    offset: int
    data: bytes


def pieces(data: bytes) -> Iterator[SavedPiece]:
    """Cut a saved session into pieces."""
    for offset in range(0, len(data), MAX_PIECE_BYTES):
        yield SavedPiece(offset, data[offset : offset + MAX_PIECE_BYTES])


def encode_piece(piece: SavedPiece) -> bytes:
    """Return the header, and the bytes after it."""
    return _HEADER.pack(_KIND_SAVED, 0, 0, 0, piece.offset) + piece.data


def is_piece(data: bytes) -> bool:
    """Return whether a binary message is a piece of a saved session."""
    return data[:1] == bytes((_KIND_SAVED,))


def decode_piece(data: bytes) -> SavedPiece:
    """Return what `encode_piece` was given. Raises `ProtocolError`."""
    kind, flags, reserved, turn, offset = _header(data)
    size = len(data) - _HEADER.size
    if kind != _KIND_SAVED or flags or reserved or turn or not 1 <= size <= MAX_PIECE_BYTES:
        raise ProtocolError(f"binary kind {kind} with {size} bytes: no piece of a saved session")
    return SavedPiece(offset, data[_HEADER.size :])


def encode_audio(message: AudioMessage | OpusMessage) -> bytes:
    """Return the header, and the samples or packets after it, little-endian."""
    turn, position = message.turn, message.position_samples
    if isinstance(message, OpusMessage):
        header = _HEADER.pack(_KIND_OPUS, message.fresh, message.skip, turn, position)
        sized = (_U16.pack(len(packet)) + packet for packet in message.packets)
        return b"".join((header, _U16.pack(message.samples), *sized))
    assert message.pcm.dtype in (np.int16, np.float32) and message.pcm.ndim == 1
    if message.pcm.dtype == np.float32:
        return _HEADER.pack(_KIND_FLOAT32, 0, 0, turn, position) + message.pcm.astype("<f4", copy=False).tobytes()
    return _HEADER.pack(_KIND_PCM16, 0, 0, turn, position) + message.pcm.astype("<i2", copy=False).tobytes()


def decode_audio(data: bytes) -> AudioMessage:
    """Return what `encode_audio` was given. Raises `ProtocolError` for a header, length or size that is not allowed."""
    kind, flags, reserved, turn, position = _header(data)
    if kind != _KIND_PCM16 or flags or reserved:
        raise ProtocolError(f"binary kind {kind}, flags {flags}, reserved {reserved}: only 1 (PCM16), 0, 0 is known")
    payload = len(data) - _HEADER.size
    if payload % 2:
        raise ProtocolError(f"16-bit samples need an even number of bytes, got {payload}")
    if payload > 2 * MAX_AUDIO_SAMPLES:
        raise ProtocolError(f"at most {MAX_AUDIO_SAMPLES} samples a message, got {payload // 2}")
    return AudioMessage(turn, position, np.frombuffer(data, "<i2", offset=_HEADER.size).astype(np.int16, copy=False))


def decode_float(data: bytes) -> AudioMessage:
    """Decode audio in a session whose codec is float32. Raises `ProtocolError`, for numbers that are no speech, too."""
    kind, flags, reserved, turn, position = _header(data)
    if kind != _KIND_FLOAT32 or flags or reserved:
        raise ProtocolError(f"binary kind {kind}, flags {flags}, reserved {reserved}: only 3 (float32), 0, 0 is known")
    payload = len(data) - _HEADER.size
    if payload % 4 or payload > 4 * MAX_FLOAT_SAMPLES:
        raise ProtocolError(f"at most {MAX_FLOAT_SAMPLES} samples of four bytes a message, got {payload} bytes")
    pcm = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32, copy=False)
    if not (abs(pcm) <= LOUDEST).all():  # neither is NaN
        raise ProtocolError("speech is float32 in [-1, 1]; this message holds NaN, infinity or numbers far beyond")
    return AudioMessage(turn, position, pcm)


def decode_opus(data: bytes) -> OpusMessage:
    """Decode the header of audio in a session whose codec is Opus; packets stay as they are. Raises `ProtocolError`."""
    kind, flags, skip, turn, position = _header(data)
    if kind != _KIND_OPUS or flags > 1:
        raise ProtocolError(f"binary kind {kind}, flags {flags}: only 2 (Opus), 0 or 1 is known in this session")
    samples = _u16(data, _HEADER.size)
    packets, at = [], _HEADER.size + _U16.size
    while at < len(data):
        length = _u16(data, at)
        packets.append(data[at + _U16.size : at + _U16.size + length])
        at += _U16.size + length
        if length > MAX_OPUS_PACKET_BYTES:
            raise ProtocolError(f"an Opus packet of {length} bytes, at most {MAX_OPUS_PACKET_BYTES}")
        if at > len(data):
            raise ProtocolError("a binary message that ends within a packet")
    if not packets:
        raise ProtocolError("an Opus message without packets")
    return OpusMessage(turn, position, bool(flags), skip, samples, tuple(packets))


def _header(data: bytes) -> tuple[int, int, int, int, int]:
    if len(data) < _HEADER.size:
        raise ProtocolError(f"a binary message has a {_HEADER.size}-byte header, this one is {len(data)} bytes long")
    kind, flags, reserved, turn, position = _HEADER.unpack_from(data)
    return kind, flags, reserved, turn, position


def _u16(data: bytes, at: int) -> int:
    if at + _U16.size > len(data):
        raise ProtocolError("a binary message that ends too early")
    return int.from_bytes(data[at : at + _U16.size], "little")
