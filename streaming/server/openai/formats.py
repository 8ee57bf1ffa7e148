"""The audio formats of OpenAI's protocols: bytes of any of them to int16 at 24 kHz, and back.

G.711 is coded by table. Streams of other rates than 24 kHz are resampled, which holds back 15 ms until `flush`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.audio import SAMPLE_RATE, Resampler, to_float, to_int16
from streaming.errors import ProtocolError

Pcm16 = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Format:
    """type: "audio/pcm" (16-bit little-endian), "audio/pcmu" or "audio/pcma"."""

    type: str = "audio/pcm"
    rate: int = SAMPLE_RATE


PCM = Format()
G711_RATE = 8_000


def _mu_law_table() -> Pcm16:
    """Return what each of the 256 codes means (ITU-T G.711, table 2a)."""
    code = ~np.arange(256, dtype=np.uint8)
    magnitude = (((code & 15).astype(np.int32) << 3) + 132 << (code >> 4 & 7)) - 132
    return np.where(code & 128, -magnitude, magnitude).astype(np.int16)


def _a_law_table() -> Pcm16:
    """Return what each of the 256 codes means (ITU-T G.711, table 1a)."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    segment, step = (code >> 4 & 7).astype(np.int32), (code & 15).astype(np.int32) << 4
    magnitude = np.where(segment == 0, step + 8, step + 264 << np.maximum(segment - 1, 0))
    return np.where(code & 128, magnitude, -magnitude).astype(np.int16)


def _nearest(table: Pcm16) -> NDArray[np.uint8]:
    """Return the code whose value is nearest to each sample, from -32768 on: [65536]."""
    order = np.argsort(table, kind="stable")
    values = table[order].astype(np.int32)
    samples = np.arange(-32768, 32768)
    above = np.clip(np.searchsorted(values, samples), 1, 255)
    below = above - 1
    nearest = np.where(samples - values[below] < values[above] - samples, below, above)
    codes: NDArray[np.uint8] = order[nearest].astype(np.uint8)
    return codes


_TABLES = {"audio/pcmu": _mu_law_table(), "audio/pcma": _a_law_table()}
_CODES = {name: _nearest(table) for name, table in _TABLES.items()}


class FormatDecoder:
    """A client's stream of bytes."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self._resampler = Resampler(format.rate, quality="MQ")

    def push(self, data: bytes) -> Pcm16:
        """Return any number of whole samples as int16 [n] at 24 kHz. Raises `ProtocolError` for half a sample."""
        table = _TABLES.get(self.format.type)
        if table is not None:
            pcm: Pcm16 = table[np.frombuffer(data, np.uint8)]
        elif len(data) % 2:
            raise ProtocolError(f"16-bit samples need an even number of bytes, got {len(data)}")
        else:
            pcm = np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        return self._resampled(pcm)

    def flush(self) -> Pcm16:
        """Return what the resampler still holds back."""
        return to_int16(self._resampler.flush())

    def _resampled(self, pcm: Pcm16) -> Pcm16:
        return pcm if self.format.rate == SAMPLE_RATE else to_int16(self._resampler.push(to_float(pcm)))


class FormatEncoder:
    """The inverse of `FormatDecoder`, for what a client is sent."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self._resampler = Resampler(SAMPLE_RATE, format.rate, quality="MQ")

    def push(self, pcm: Pcm16) -> bytes:
        """Return audio in the client's format. pcm: int16 [n] at 24 kHz."""
        if self.format.rate != SAMPLE_RATE:
            pcm = to_int16(self._resampler.push(to_float(pcm)))
        return self._coded(pcm)

    def flush(self) -> bytes:
        """Return what the resampler still holds back."""
        return self._coded(to_int16(self._resampler.flush()))

    def _coded(self, pcm: Pcm16) -> bytes:
        codes = _CODES.get(self.format.type)
        coded = pcm.astype("<i2", copy=False) if codes is None else codes[pcm.astype(np.int32) + 32768]
        return coded.tobytes()
