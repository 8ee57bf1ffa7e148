"""What the stub engine says in the page's tests: sound to be seen in a spectrogram and told apart by its samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE, to_int16
from streaming.config import Sampling
from tests.engine.stub_step import Pcm, StubResult, StubStep


def sound_of(digest: int) -> Pcm:
    """A frame of two tones below 4 kHz and a little noise, made from the digest that the stub step gives."""
    rng = np.random.default_rng(digest)
    time = np.arange(FRAME) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * rng.uniform(150, 4000) * time) for _ in range(2))
    return (0.1 * tones * np.hanning(FRAME) + 0.01 * rng.uniform(-1, 1, FRAME)).astype(np.float32)


class VoiceStep(StubStep):
    """A stub step that can be heard. heard, said: the frames of each slot since it was first used."""

    def __init__(self, num_slots: int, *, delay_s: Callable[[], float] | None = None) -> None:
        super().__init__(num_slots, context_frames=250, rewind_frames=16, delay_s=delay_s)
        self.heard: dict[int, list[Pcm]] = defaultdict(list)
        self.said: dict[int, list[Pcm]] = defaultdict(list)

    @property
    def samplings(self) -> list[Sampling]:
        """With what each slot was set up last."""
        return list(self._sampling.values())

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: Pcm,
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64] | None = None,
    ) -> StubResult:
        result = super().__call__(slots, pcm, listening, speaking, lengths)
        for row, slot in enumerate(slots.tolist()):
            if listening[row]:
                self.heard[slot].append(pcm[row].copy())
            if not result.ended[row]:
                result.pcm[row] = sound_of(int((result.pcm[row, 0] + 1) * 2**15))
            if speaking[row] and not result.ended[row]:
                self.said[slot].append(result.pcm[row].copy())
        return result

    def sent(self, slot: int, frames: int | None = None) -> NDArray[np.int16]:
        """What was said, or its first frames, as it goes over the wire."""
        return to_int16(np.concatenate(self.said[slot][:frames]))
