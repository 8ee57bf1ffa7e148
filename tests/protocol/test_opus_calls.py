"""Opus of many streams in one call: what it makes is what a call for each makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from streaming import compiler
from streaming.audio import Pcm16
from streaming.protocol import opus_calls
from streaming.protocol.libopus import Decoder, Encoder, LibopusError
from streaming.protocol.opus import opus_available
from streaming.protocol.opus_calls import Block, Packet

pytestmark = pytest.mark.skipif(not opus_available(), reason="no libopus")

STREAMS = 5


@pytest.fixture(params=["one call", "a call for each"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With what is compiled, and without."""
    if request.param == "a call for each":
        monkeypatch.setenv(compiler.SWITCH, "0")
    opus_calls._calls.cache_clear()
    if request.param == "one call" and opus_calls._calls() is None:
        pytest.skip("nothing can be compiled here")
    yield
    opus_calls._calls.cache_clear()


def voice(stream: int, samples: int) -> Pcm16:
    return (6_000 * np.sin(np.arange(samples) / (5 + stream))).astype(np.int16)


def test_streams_are_coded_as_by_themselves(calls: None) -> None:
    """Frames of several lengths, some of them of the same stream."""
    encoders, alone = [Encoder() for _ in range(STREAMS)], [Encoder() for _ in range(STREAMS)]
    decoders, listeners = [Decoder() for _ in range(STREAMS)], [Decoder() for _ in range(STREAMS)]
    order = [0, 1, 2, 3, 4, 1, 1, 3]
    for _ in range(3):
        pieces = [voice(stream, 960 * (1 + number % 2)) for number, stream in enumerate(order)]
        packets = opus_calls.encode([Block(encoders[s], pcm) for s, pcm in zip(order, pieces, strict=True)])
        assert packets == [alone[s].encode(pcm) for s, pcm in zip(order, pieces, strict=True)]
        heard = opus_calls.decode(
            [Packet(decoders[s], bytes(p), len(pcm)) for s, p, pcm in zip(order, packets, pieces, strict=True)]
        )
        for stream, packet, pcm, found in zip(order, packets, pieces, heard, strict=True):
            np.testing.assert_array_equal(found, listeners[stream].decode(bytes(packet), len(pcm)))


def test_one_stream_s_error_is_not_another_s(calls: None) -> None:
    """One client's packet that cannot be decoded, or a length that libopus does not know, was everybody's exception."""
    good, bad = voice(0, 960), voice(1, 961)
    first, wrong, last = opus_calls.encode([Block(Encoder(), good), Block(Encoder(), bad), Block(Encoder(), good)])
    assert isinstance(first, bytes) and first == last
    assert isinstance(wrong, LibopusError) and str(wrong) == "invalid argument"
    torn = b"\xff" * 9
    decoded = opus_calls.decode(
        [
            Packet(Decoder(), first, 960),
            Packet(Decoder(), torn, 960),
            Packet(Decoder(), first, 1920),
            Packet(Decoder(), first, 960),
        ]
    )
    assert [isinstance(found, LibopusError) for found in decoded] == [False, True, True, False]
    assert str(decoded[2]) == "it holds 960 samples, not 1920"
    np.testing.assert_array_equal(decoded[0], decoded[3])


def test_a_packet_does_not_write_beyond_its_place(calls: None) -> None:
    """A packet that says 20 ms and holds 120 would have overwritten the next client's audio."""
    long, short = Encoder().encode(voice(0, 2_880)), Encoder().encode(voice(1, 480))
    expected = Decoder().decode(short, 480)
    wrong, found = opus_calls.decode([Packet(Decoder(), long, 480), Packet(Decoder(), short, 480)])
    assert isinstance(wrong, LibopusError) and str(wrong) == "buffer too small"
    np.testing.assert_array_equal(found, expected)


def test_without_a_compiler_it_is_told_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(compiler.SWITCH, raising=False)
    opus_calls._calls.cache_clear()
    try:
        with caplog.at_level("INFO"):
            opus_calls.prepare()
            (packet,) = opus_calls.encode([Block(Encoder(), voice(0, 960))])
    finally:
        opus_calls._calls.cache_clear()
    assert packet == Encoder().encode(voice(0, 960))
    (record,) = caplog.records
    assert record.message.startswith("libopus is called for each session by itself, slower: there is no C compiler")
