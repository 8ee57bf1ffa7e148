"""A stereo WAV of a talk on one time line: left what was sent, right the continuation as it was heard."""

from __future__ import annotations

import os
from typing import Self

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16, WavWriter

MAX_SKEW_SAMPLES = 5 * SAMPLE_RATE
"""One side may run so far ahead of the other. Past it the other gets silence, so that neither side piles up."""


class Recording:
    """Two continuous tracks in, one stereo file out, under its name only when it is whole (see `WavWriter`).

    Both sides say everything, silence too, from the same moment on.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._wav = WavWriter(path, channels=2)
        self._sent = np.zeros(0, np.int16)
        self._heard = np.zeros(0, np.int16)

    def sent(self, pcm: Pcm16) -> None:
        """Add more of the left side, int16 [n]."""
        self._sent = np.concatenate([self._sent, pcm])
        self._drain(self._common())

    def heard(self, pcm: Pcm16) -> None:
        """Add more of the right side, int16 [n]."""
        self._heard = np.concatenate([self._heard, pcm])
        self._drain(self._common())

    def close(self) -> None:
        """Fill the shorter side with silence and complete the file. A second call does nothing."""
        self._drain(max(len(self._sent), len(self._heard)))
        self._wav.close()

    def _common(self) -> int:
        lengths = sorted((len(self._sent), len(self._heard)))
        return max(lengths[0], lengths[1] - MAX_SKEW_SAMPLES)

    def _drain(self, samples: int) -> None:
        """Write this many samples of each side, silence where a side has none."""
        if samples == 0:
            return
        block = np.zeros((samples, 2), np.int16)
        for side, pcm in enumerate((self._sent, self._heard)):
            block[: len(pcm), side] = pcm[:samples]
        self._sent, self._heard = self._sent[samples:], self._heard[samples:]
        self._wav.write(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._wav.discard()
