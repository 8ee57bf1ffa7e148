"""Opus: exact in length and place, whatever it does to the sound; and hostile packets."""

from __future__ import annotations

import ctypes.util
import importlib.util
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.errors import ProtocolError
from streaming.protocol import libopus
from streaming.protocol.libopus import OpusMissingError
from streaming.protocol.messages import AudioMessage, OpusMessage, decode_opus, encode_audio
from streaming.protocol.opus import (
    LOOKAHEAD_SAMPLES,
    PACKET_SAMPLES,
    WHOLE_FRAMES,
    OpusReceiver,
    OpusSender,
    opus_available,
    packet_samples,
)

pytestmark = pytest.mark.skipif(not opus_available(), reason="no libopus")


def voice(samples: int) -> NDArray[np.int16]:
    """Something that Opus keeps the shape of: a gliding tone with overtones."""
    at = np.arange(samples) / 24_000
    phase = 2 * np.pi * (150 * at + 40 * at**2)
    return np.asarray(4_000 * (np.sin(phase) + 0.5 * np.sin(3 * phase + 1)), np.int16)


def carried(
    pcm: NDArray[np.int16], pieces: list[int], sender: OpusSender, receiver: OpusReceiver, *, position: int = 0
) -> NDArray[np.int16]:
    """A whole stream, by way of bytes."""
    messages, at = [], 0
    for piece in [*pieces, len(pcm)]:
        messages += sender.push(AudioMessage(3, position + at, pcm[at : at + piece]))
        at = min(len(pcm), at + piece)
    messages += sender.flush()
    heard = []
    for message in messages:
        audio = receiver.push(decode_opus(encode_audio(message)))
        assert (audio.turn, audio.position_samples) == (3, position + sum(map(len, heard)))
        heard.append(audio.pcm)
    return np.concatenate([np.zeros(0, np.int16), *heard])


@given(
    samples=st.integers(1, 12_000),
    pieces=st.lists(st.integers(0, 3_000), max_size=8),
    lead_in=st.sampled_from([0, WHOLE_FRAMES]),
)
def test_not_a_sample_more_or_less(samples: int, pieces: list[int], lead_in: int) -> None:
    """The engine's books are in samples: a prompt that lost its last 6.5 ms to the encoder lost the end of a word."""
    sender, receiver = OpusSender(lead_in), OpusReceiver()
    pcm = voice(samples)
    assert len(carried(pcm, pieces, sender, receiver)) == samples
    assert len(carried(pcm, pieces, sender, receiver, position=samples)) == samples, "a second stream"


@pytest.mark.parametrize("lead_in", [0, WHOLE_FRAMES])
@pytest.mark.parametrize("samples", [FRAME, 10 * FRAME - 7])
def test_it_is_where_it_was_to_its_last_sample(samples: int, lead_in: int) -> None:
    """Skipping too little shifts a voice against the record of it; flushing too little leaves silence at the end."""
    pcm = voice(samples)
    heard = carried(pcm, [480] * 50, OpusSender(lead_in), OpusReceiver()).astype(float)
    shifts = range(-60, 61)
    likeness = [float(np.dot(np.roll(heard, shift)[100:-100], pcm[100:-100].astype(float))) for shift in shifts]
    assert abs(shifts[int(np.argmax(likeness))]) <= 12, "half a millisecond, for phases do shift"
    end = slice(samples - 240, samples)
    assert np.linalg.norm(heard[end]) > 0.5 * np.linalg.norm(pcm[end].astype(float))


def test_a_frame_that_is_sent_is_heard_but_for_what_the_encoder_looks_ahead() -> None:
    sender = OpusSender()
    first, second = (sender.push(AudioMessage(1, at, voice(FRAME))) for at in (0, FRAME))
    assert [message.samples for message in first] == [FRAME - LOOKAHEAD_SAMPLES]
    assert [message.samples for message in second] == [FRAME]
    assert [message.samples for message in sender.flush()] == [LOOKAHEAD_SAMPLES]


def test_a_frame_that_is_said_is_there_6_5_ms_later() -> None:
    """With packets of 40 ms that do not end where frames do, a frame waited half a frame longer for its end."""
    sender, at, arrived = OpusSender(WHOLE_FRAMES), 0, 0
    while arrived < FRAME:
        arrived += sum(message.samples for message in sender.push(AudioMessage(1, at, voice(12))))
        at += 12
    assert at - FRAME == LOOKAHEAD_SAMPLES


def test_a_twelfth_of_the_bits() -> None:
    sender, pcm = OpusSender(), voice(100 * FRAME)
    data = b"".join(
        encode_audio(message)
        for at in range(0, len(pcm), FRAME)
        for message in sender.push(AudioMessage(1, at, pcm[at : at + FRAME]))
    )
    assert 8 * len(data) / 8.0 < 40_000


@pytest.mark.parametrize(
    ("first", "frames", "samples"),
    [
        (0, None, 240),
        (3, None, 1_440),
        (12, None, 240),
        (16, None, 60),
        (31, None, 480),
        (31, 6, 2_880),
        (16, 48, 2_880),
    ],
)
def test_the_length_of_a_packet_is_told_by_its_first_bytes(first: int, frames: int | None, samples: int) -> None:
    packet = bytes([first << 3]) if frames is None else bytes([first << 3 | 3, frames])
    assert packet_samples(packet) == samples


def test_two_frames_a_packet() -> None:
    assert packet_samples(bytes([31 << 3 | 1])) == packet_samples(bytes([31 << 3 | 2])) == 960


@pytest.mark.parametrize("packet", [b"", b"\x03", bytes([3, 0]), bytes([31 << 3 | 3, 7]), bytes([3 << 3 | 3, 63])])
def test_a_packet_of_impossible_length(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        packet_samples(packet)


def opening() -> OpusMessage:
    return OpusSender().push(AudioMessage(1, 0, voice(FRAME)))[0]


class TestHostile:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"fresh": False}, "must begin a stream"),
            ({"samples": FRAME + 1, "skip": 0}, "holds 1920"),
            ({"skip": FRAME}, "holds 1920"),
            ({"packets": (bytes([31 << 3 | 3, 6]),) * 2}, "5760 samples of Opus in one message"),
            ({"packets": (bytes([2 << 3 | 3, 3]) + b"\xff" * 40,)}, "cannot be decoded"),
            ({"packets": (b"OpusHead" + b"\0" * 30,)}, "Opus packet"),
            ({"packets": (b"",)}, "no bytes"),
        ],
    )
    def test_a_message_that_promises_too_much(self, change: dict[str, object], reason: str) -> None:
        whole = opening()
        fields = {name: getattr(whole, name) for name in OpusMessage.__slots__}
        with pytest.raises(ProtocolError, match=reason):
            OpusReceiver().push(OpusMessage(**{**fields, **change}))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x01" + bytes(15) + b"\0\0",  # PCM, in a session that speaks Opus
            b"\x02\x02" + bytes(16),
            b"\x02\x01" + bytes(14),
            b"\x02\x01" + bytes(15),
            b"\x02\x01" + bytes(16),  # no packets
            b"\x02\x01" + bytes(16) + b"\x05\0abcd",
            b"\x02\x01" + bytes(16) + b"\x05",
            b"\x02\x01" + bytes(16) + b"\xff\xff" + bytes(65_535),
        ],
    )
    def test_bytes_that_are_no_message(self, data: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode_opus(data)

    def test_garbage_is_refused_or_as_long_as_it_says(self) -> None:
        """An upload of 25 MB that decodes to 5.7 GB was somebody's bug; a panic of the library would be ours."""
        rng = random.Random(7)
        good = opening()
        receiver = OpusReceiver()
        receiver.push(good)
        refused = 0
        for _ in range(3_000):
            packet = bytearray(rng.choice((good.packets[-1], rng.randbytes(rng.choice((1, 2, 40, 1_300, 4_000))))))
            for _ in range(rng.randrange(6)):
                packet[rng.randrange(len(packet))] = rng.randrange(256)
            samples = rng.choice((0, 480, PACKET_SAMPLES))
            try:
                heard = receiver.push(OpusMessage(1, 0, rng.random() < 0.05, 0, samples, (bytes(packet),)))
                assert len(heard.pcm) == samples
            except ProtocolError:
                refused += 1
                receiver = OpusReceiver()
                receiver.push(good)
        assert 300 < refused < 2_700


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for Opus is told what to install, before the first frame and not in the middle of a turn."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    caches = (libopus.library_path, libopus.library)
    for cache in caches:
        cache.cache_clear()
    try:
        assert not opus_available()
        for kind in (OpusSender, OpusReceiver):
            with pytest.raises(OpusMissingError, match="pip install opuslib-next-bundled"):
                kind()
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_decoder_that_heard_the_last_message_goes_on_as_one_that_heard_all() -> None:
    """Pins 20 ms of another sound where a session has come to another server."""
    sender, undisturbed = OpusSender(WHOLE_FRAMES), OpusReceiver()
    at = np.arange(20 * FRAME)
    speech = (4_000 * np.sin(at / 20 + 9 * np.sin(at / 5_000)) + 2_000 * np.sin(at / 3)).astype(np.int16)
    messages = [
        message
        for place in range(0, len(speech), FRAME)
        for message in sender.push(AudioMessage(1, place, speech[place : place + FRAME]))
    ]
    for message in messages[:10]:
        undisturbed.push(message)
    moved = OpusReceiver(undisturbed.latest)
    assert moved.latest == undisturbed.latest
    for message in messages[10:]:
        expected = undisturbed.push(message).pcm.astype(float)
        difference = np.abs(moved.push(message).pcm - expected).max()
        assert difference < 0.02 * np.abs(expected).max()


def test_packets_that_cannot_be_decoded_are_no_reason_not_to_go_on() -> None:
    """Pins a session that is lost for a moment of its sound."""
    message = OpusSender().push(AudioMessage(1, 0, np.zeros(2 * FRAME, np.int16)))[0]
    assert len(OpusReceiver((b"\xff" * 3, b"")).push(message).pcm) == message.samples


def test_a_stream_is_not_cut_further_while_some_of_it_is_being_encoded() -> None:
    """Two threads with the same encoder at once: libopus aborted, and the server with it."""
    sender = OpusSender()
    blocks = sender.cut(AudioMessage(1, 0, voice(FRAME)))
    for cut in (lambda: sender.cut(AudioMessage(1, FRAME, voice(FRAME))), sender.cut_rest):
        with pytest.raises(AssertionError, match="one thing at a time"):
            cut()
    assert len(blocks) == 1
