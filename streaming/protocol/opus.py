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
    """

    def __init__(self, lead_in_samples: int = 0) -> None:
        self._lead_in = lead_in_samples
        self._next: Encoder | None = Encoder()  # made here, so that one that is missing is told at once
        self._encoder: Encoder | None = None
        self._rest = np.zeros(0, np.int16)  # less than a packet
        self._packets: list[bytes] = []  # packets of nothing but samples that will be skipped
        self._waiting = 0  # samples, which these packets decode to
        self._skip = 0  # decoded samples to come that are none of the stream's
        self._sent = 0  # the position behind the last sample that was sent
        self._given = 0  # and behind the last that was pushed
        self._turn = 0
        self._fresh = True

    def push(self, audio: AudioMessage) -> list[OpusMessage]:
        """Return what can be sent by now, perhaps nothing. Positions go on without gaps within a stream."""
        if self._encoder is None:
            self._encoder, self._next = self._next or Encoder(), None
            self._rest, self._skip = np.zeros(self._lead_in, np.int16), self._lead_in + LOOKAHEAD_SAMPLES
            self._sent = self._given = audio.position_samples
            self._fresh = True
        assert audio.position_samples == self._given
        self._given += len(audio.pcm)
        self._turn = audio.turn
        return self._encode(to_int16(audio.pcm))

    def flush(self) -> list[OpusMessage]:
        """Return what is left of the stream, to its last sample, and end the stream."""
        if self._encoder is None:
            return []
        silence = LOOKAHEAD_SAMPLES + -(len(self._rest) + LOOKAHEAD_SAMPLES) % PACKET_SAMPLES
        messages = self._encode(np.zeros(silence, np.int16))
        assert self._sent == self._given
        self._encoder = None
        return messages

    def _encode(self, pcm: Pcm16) -> list[OpusMessage]:
        assert self._encoder is not None
        if len(self._rest):
            pcm = np.concatenate([self._rest, pcm])
        messages: list[OpusMessage] = []
        at, end = 0, len(pcm) - len(pcm) % PACKET_SAMPLES
        while at < end:
            block = pcm[at : min(at + 2 * PACKET_SAMPLES, end)]
            if self._waiting + len(block) > MAX_OPUS_SAMPLES:
                messages += self._message()
            self._packets.append(self._encoder.encode(block))
            self._waiting += len(block)
            at += len(block)
        self._rest = pcm[end:]
        return messages + self._message()

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
    """One direction's decoder: messages in, the PCM that they stand for out. Raises `OpusMissingError`."""

    def __init__(self, before: Sequence[bytes] = ()) -> None:
        """before: `latest` of the decoder that had the stream so far; without it 20 ms sound different."""
        self.latest: tuple[bytes, ...] = ()
        """The packets of the last message."""
        self._next: Decoder | None = Decoder()  # as in `OpusSender`
        self._decoder: Decoder | None = None
        if before:
            self._decoder, self._next, self.latest = self._next, None, tuple(before)
            with suppress(ProtocolError):  # they are only for the sound of what comes
                for packet in before:
                    _decode(self._decoder, packet, np.empty(packet_samples(packet), np.int16))

    def push(self, message: OpusMessage) -> AudioMessage:
        """Return exactly `message.samples` samples. Raises `ProtocolError`, before anything large is decoded."""
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
        self.latest = message.packets
        pcm, at = np.empty(sum(lengths), np.int16), 0
        for packet, length in zip(message.packets, lengths, strict=True):
            _decode(self._decoder, packet, pcm[at : at + length])
            at += length
        return AudioMessage(message.turn, message.position_samples, pcm[message.skip :][: message.samples])


def _decode(decoder: Decoder, packet: bytes, pcm: Pcm16) -> None:
    try:
        found = decoder.decode(packet, pcm)
    except LibopusError as error:
        raise ProtocolError(f"an Opus packet that cannot be decoded: {error}") from None
    if found != len(pcm):
        raise ProtocolError(f"an Opus packet of {len(pcm)} samples decodes to {found}")
