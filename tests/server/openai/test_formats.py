"""G.711 against the standard library's, and streams in pieces of any size."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from streaming.errors import ProtocolError
from streaming.server.openai.formats import PCM, Format, FormatDecoder, FormatEncoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    audioop = pytest.importorskip("audioop", reason="Python 3.13 has no audioop to compare with")

EVERY_CODE = bytes(range(256))
EVERY_SAMPLE = np.arange(-32768, 32768).astype(np.int16)
G711 = [("audio/pcmu", audioop.ulaw2lin, audioop.lin2ulaw), ("audio/pcma", audioop.alaw2lin, audioop.lin2alaw)]


@pytest.mark.parametrize(("name", "expand", "_"), G711)
def test_every_g711_code_means_what_it_means_elsewhere(name: str, expand: object, _: object) -> None:
    """A wrong segment or sign is a crackle that no round trip within this project would show."""
    decoder = FormatDecoder(Format(name, 24_000))  # no resampling
    assert decoder.push(EVERY_CODE).tobytes() == expand(EVERY_CODE, 2)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "expand", "compress"), G711)
def test_every_sample_is_coded_at_least_as_well_as_elsewhere(name: str, expand: object, compress: object) -> None:
    def error(coded: bytes) -> np.ndarray:
        decoded = np.frombuffer(expand(coded, 2), np.int16)  # type: ignore[operator]
        return np.abs(decoded.astype(np.int32) - EVERY_SAMPLE)

    ours = FormatEncoder(Format(name, 24_000)).push(EVERY_SAMPLE)
    assert (error(ours) <= error(compress(EVERY_SAMPLE.tobytes(), 2))).all()  # type: ignore[operator]


@pytest.mark.parametrize("format", [PCM, Format("audio/pcm", 16_000), Format("audio/pcmu", 8_000)])
def test_a_tone_survives_the_way_out_and_back_in_pieces(format: Format) -> None:
    """Resampled piece by piece, a stream without memory clicks at every seam."""
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)).astype(np.int16)
    encoder, decoder = FormatEncoder(format), FormatDecoder(format)
    coded = b"".join([*(encoder.push(tone[at : at + 1920]) for at in range(0, len(tone), 1920)), encoder.flush()])
    assert len(coded) == format.rate * (2 if format.type == "audio/pcm" else 1)
    back = np.concatenate([*(decoder.push(coded[at : at + 320]) for at in range(0, len(coded), 320)), decoder.flush()])
    assert len(back) == len(tone)
    inner = slice(2400, -2400)
    error = (back[inner].astype(np.float64) - tone[inner]).std() / tone[inner].std()
    assert error < (0.03 if format.type == "audio/pcmu" else 0.001)


def test_half_a_sample_is_told() -> None:
    with pytest.raises(ProtocolError, match="even number of bytes, got 3"):
        FormatDecoder(PCM).push(b"abc")
