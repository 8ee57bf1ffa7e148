"""Opus packets on the native protocol: the same samples at the same positions, in a twelfth of the bits.

`docs/protocol.md`, "Opus", specifies what is sent. A sender makes `OpusMessage`s of pieces of PCM, a receiver makes PCM
of them again, and neither changes how many samples there are or where they are: what the encoder looks ahead is skipped
where a stream begins, and flushed out of it where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16, to_int16
from streaming.errors import ProtocolError
from streaming.protocol.libopus import Decoder, Encoder, LibopusError, library_path
from streaming.protocol.messages import MAX_OPUS_SAMPLES, AudioMessage, OpusMessage
from streaming.protocol.opus_calls import Block, Packet, decode_one

PACKET_SAMPLES = 960
"""40 ms, so that two of them are a frame. Where as much waits, one packet holds both: it is one call of libopus."""
LOOKAHEAD_SAMPLES = 156
"""The delay of what libopus decodes behind what was encoded: 6.5 ms."""
WHOLE_FRAMES = PACKET_SAMPLES - LOOKAHEAD_SAMPLES
"""Silence before a stream so that its packets end where frames of 80 ms do, and a frame is there 6.5 ms after it was
said instead of 40."""

_FRAME_SAMPLES = tuple(
    SAMPLE_RATE * tenths // 10_000 for tenths in (*(100, 200, 400, 600) * 3, *(100, 200) * 2, *(25, 50, 100, 200) * 4)
)
"""The length of a packet's frames, by its configuration: RFC 6716, section 3.1, table 2."""


def opus_available() -> bool:
    """Return whether this side can speak Opus."""
    return library_path() is not None


def packet_samples(packet: bytes) -> int:
    """Return how many samples at 24 kHz a packet decodes to, told without decoding it (RFC 6716, section 3.1).

    Raises `ProtocolError` where that is nothing, or more than the 120 ms that a packet may hold.
    """
    if not packet:
        raise ProtocolError("an Opus packet of no bytes")
    kind = packet[0] & 3
    if kind == 3 and len(packet) < 2:
        raise ProtocolError("an Opus packet that does not say how many frames it has")
    frames = (1, 2, 2, packet[1] & 0x3F if kind == 3 else 0)[kind]
    samples = frames * _FRAME_SAMPLES[packet[0] >> 3]
    if not 0 < samples <= MAX_OPUS_SAMPLES:
        raise ProtocolError(f"an Opus packet of {samples} samples, not of 1 to {MAX_OPUS_SAMPLES}")
    return samples


class OpusSender:
    """One direction's encoder: pieces of PCM in, messages out.

    A stream begins with the first piece, and with the first one after a `flush`. lead_in_samples: of silence before
    each stream, which its receiver skips. Raises `OpusMissingError`.

    Who has libopus called elsewhere gets what it is to encode by `cut` or `cut_rest`, and then gives the packets to
    `sent`, before anything else.
    """

    def __init__(self, lead_in_samples: int = 0) -> None:
        self._lead_in = lead_in_samples
        self._next: Encoder | None = Encoder()  # made here, so that one that is missing is told at once
        self._encoder: Encoder | None = None
        self._rest = np.zeros(0, np.int16)  # less than a packet
        self._blocks: list[Block] = []  # cut, and not sent
        self._packets: list[bytes] = []  # packets of nothing but samples that will be skipped
        self._waiting = 0  # samples, which these packets decode to
        self._skip = 0  # decoded samples to come that are none of the stream's
        self._sent = 0  # the position behind the last sample that was sent
        self._given = 0  # and behind the last that was pushed
        self._turn = 0
        self._fresh = True

    def push(self, audio: AudioMessage) -> list[OpusMessage]:
        """Return what can be sent by now, perhaps nothing. Positions go on without gaps within a stream."""
        return self.sent([encoder.encode(pcm) for encoder, pcm in self.cut(audio)])

    def flush(self) -> list[OpusMessage]:
        """Return what is left of the stream, to its last sample, and end the stream."""
        return self.sent([encoder.encode(pcm) for encoder, pcm in self.cut_rest()])

    def cut(self, audio: AudioMessage) -> list[Block]:
        """Return what is to be encoded of `push`."""
        if self._encoder is None:
            self._encoder, self._next = self._next or Encoder(), None
            self._rest, self._skip = np.zeros(self._lead_in, np.int16), self._lead_in + LOOKAHEAD_SAMPLES
            self._sent = self._given = audio.position_samples
            self._fresh = True
        assert audio.position_samples == self._given
        self._given += len(audio.pcm)
        self._turn = audio.turn
        return self._cut(self._encoder, to_int16(audio.pcm))

    def cut_rest(self) -> list[Block]:
        """Return what is to be encoded of `flush`."""
        encoder, self._encoder = self._encoder, None
        if encoder is None:
            return []
        silence = LOOKAHEAD_SAMPLES + -(len(self._rest) + LOOKAHEAD_SAMPLES) % PACKET_SAMPLES
        return self._cut(encoder, np.zeros(silence, np.int16))

    def _cut(self, encoder: Encoder, pcm: Pcm16) -> list[Block]:
        assert not self._blocks, "what was cut before is still being encoded, and an encoder does one thing at a time"
        if len(self._rest):
            pcm = np.concatenate([self._rest, pcm])
        end = len(pcm) - len(pcm) % PACKET_SAMPLES
        self._rest = pcm[end:]
        most = 2 * PACKET_SAMPLES
        self._blocks = [Block(encoder, pcm[at : min(at + most, end)]) for at in range(0, end, most)]
        return self._blocks

    def sent(self, packets: Sequence[bytes | LibopusError]) -> list[OpusMessage]:
        """Return the messages of the packets that were made of what was cut, in order. Raises `LibopusError`."""
        messages: list[OpusMessage] = []
        for (_, pcm), packet in zip(self._blocks, packets, strict=True):
            if isinstance(packet, LibopusError):
                raise packet
            if self._waiting + len(pcm) > MAX_OPUS_SAMPLES:
                messages += self._message()
            self._packets.append(packet)
            self._waiting += len(pcm)
        self._blocks = []
        messages += self._message()
        assert self._encoder is not None or self._sent == self._given
        return messages

    def _message(self) -> list[OpusMessage]:
        """Return a message of the packets that there are, unless none of their samples are the stream's."""
        samples = min(self._waiting - self._skip, self._given - self._sent)
        if samples <= 0:
            return []
        message = OpusMessage(
            self._turn, self._sent, fresh=self._fresh, skip=self._skip, samples=samples, packets=tuple(self._packets)
        )
        self._sent += samples
        self._packets, self._waiting, self._skip, self._fresh = [], 0, 0, False
        return [message]


class OpusReceiver:
    """One direction's decoder: messages in, the PCM that they stand for out. Raises `OpusMissingError`.

    Who has libopus called elsewhere gets what it is to decode by `packets_of`, message by message, and makes audio of
    that by `heard`.
    """

    def __init__(self, before: Sequence[bytes] = ()) -> None:
        """before: `latest` of the decoder that had the stream so far; without it 20 ms sound different."""
        self.latest: tuple[bytes, ...] = ()
        """The packets of the last message."""
        self._next: Decoder | None = Decoder()  # as in `OpusSender`
        self._decoder: Decoder | None = None
        if before:
            self._decoder, self._next, self.latest = self._next, None, tuple(before)
            with suppress(ProtocolError, LibopusError):  # they are only for the sound of what comes
                for packet in before:
                    self._decoder.decode(packet, packet_samples(packet))

    def push(self, message: OpusMessage) -> AudioMessage:
        """Return exactly `message.samples` samples. Raises `ProtocolError`, before anything large is decoded."""
        return heard(message, [decode_one(packet) for packet in self.packets_of(message)])

    def packets_of(self, message: OpusMessage) -> list[Packet]:
        """Return what is to be decoded of a message, at least one packet. Raises `ProtocolError`."""
        lengths = [packet_samples(packet) for packet in message.packets]
        if sum(lengths) > MAX_OPUS_SAMPLES:
            raise ProtocolError(f"{sum(lengths)} samples of Opus in one message, at most {MAX_OPUS_SAMPLES}")
        if message.skip + message.samples > sum(lengths):
            raise ProtocolError(
                f"an Opus message says {message.skip} + {message.samples} samples and holds {sum(lengths)}"
            )
        if message.fresh:
            self._decoder, self._next = self._next or Decoder(), None
        elif self._decoder is None:
            raise ProtocolError("the first Opus message must begin a stream")
        assert self._decoder is not None
        self.latest = message.packets
        return [Packet(self._decoder, data, samples) for data, samples in zip(message.packets, lengths, strict=True)]


def heard(message: OpusMessage, decoded: Sequence[Pcm16 | LibopusError]) -> AudioMessage:
    """Return what a message stands for, by what its packets were decoded to. Raises `ProtocolError`."""
    parts: list[Pcm16] = []
    for part in decoded:
        if isinstance(part, LibopusError):
            raise ProtocolError(f"an Opus packet that cannot be decoded: {part}")
        parts.append(part)
    pcm = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return AudioMessage(message.turn, message.position_samples, pcm[message.skip :][: message.samples])
