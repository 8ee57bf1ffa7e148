"""Echo cancellation: take out of the microphone what the loudspeaker said, so that headphones are not needed.

It is WebRTC's, from `livekit`'s AudioProcessingModule, which needs no server. Nothing else of that module is on: no
noise suppression, no gain control. Even so it moves phases, cuts below 100 Hz and above 10 kHz, and takes some of a
voice that speaks over the echo; and the voice is what the machine goes on in. So what it makes is used only while there
can be an echo, and at all other times the microphone is passed on sample for sample, 10 ms later.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16, Resampler, to_float, to_int16
from streaming.errors import DeviceError

BLOCK = SAMPLE_RATE // 100
"""Samples that the module takes at a time: 10 ms."""
MAX_PLAYED_BLOCKS = 200
"""Blocks of the loudspeaker that wait for the microphone, 2 s; past it the oldest are of no use."""
ECHO_TAIL_S = 0.4
"""A room answers for so long after the loudspeaker has fallen silent."""
_MAX_DELAY_MS = 500
"""The longest delay that the module takes for possible."""
_AUDIBLE = 16
"""Samples below this, -66 dBFS, make no echo."""
_FADE_IN = np.arange(1, BLOCK + 1) / BLOCK


class EchoCanceller:
    """Takes the echo of one loudspeaker out of one microphone. Raises `DeviceError` without `livekit`.

    `played` is for the loudspeaker's thread, `clean` for the event loop's.
    """

    def __init__(self) -> None:
        try:
            from livekit.rtc import AudioFrame, AudioProcessingModule
        except ImportError:
            raise DeviceError("echo cancellation needs the Python package: `pip install livekit`") from None
        self._frame: Any = AudioFrame
        self._module: Any = AudioProcessingModule(echo_cancellation=True)
        self._played: deque[tuple[Pcm16, int, float]] = deque(maxlen=MAX_PLAYED_BLOCKS)
        self._resampler: Resampler | None = None
        self._far, self._near = np.zeros(0, np.int16), np.zeros(0, np.int16)
        self._ahead_s = 0.0  # how long before they are heard the loudspeaker's samples come here
        self._echo_until_s = float("-inf")
        self._mixed = 0.0  # how much of the latest sample was the module's
        self._before = np.zeros(BLOCK, np.int16)  # held back, since the module is a block late, too

    def played(self, pcm: Pcm16, rate: int, audible_s: float) -> None:
        """Note that the loudspeaker was given these samples, int16 [n] at its rate; the first is heard at
        `time.monotonic`.
        """
        self._played.append((pcm, rate, audible_s))

    def clean(self, pcm: Pcm16, captured_s: float) -> Pcm16:
        """Return the microphone's samples, int16 [n] at 24 kHz, the first one captured at `time.monotonic`, less the
        echo.

        int16 [m], in blocks of 10 ms: less than one is held back for the next call.
        """
        now = time.monotonic()
        self._hear_the_loudspeaker(now)
        captured_s -= len(self._near) / SAMPLE_RATE
        self._near = np.concatenate([self._near, pcm])
        cleaned = [np.zeros(0, np.int16)]
        for block in self._blocks("_near"):
            delay_ms = 1000 * (self._ahead_s + now - captured_s)
            self._module.set_stream_delay_ms(round(min(max(0.0, delay_ms), _MAX_DELAY_MS)))
            frame = self._frame(block.tobytes(), SAMPLE_RATE, 1, BLOCK)
            self._module.process_stream(frame)
            cleaned.append(self._mix(np.frombuffer(frame.data, np.int16), captured_s < self._echo_until_s))
            self._before = block
            captured_s += BLOCK / SAMPLE_RATE
        return np.concatenate(cleaned)

    def _mix(self, processed: Pcm16, echo: bool) -> Pcm16:
        """Return the module's samples where there can be an echo, else the microphone's own, faded within a block."""
        was, self._mixed = self._mixed, float(echo)
        if was == self._mixed:
            return processed if echo else self._before
        share = _FADE_IN if echo else 1 - _FADE_IN
        return np.rint(share * processed + (1 - share) * self._before).astype(np.int16)

    def _hear_the_loudspeaker(self, now: float) -> None:
        while self._played:
            pcm, rate, audible_s = self._played.popleft()
            if self._resampler is None:
                self._resampler = Resampler(rate, quality="LQ")
            self._far = np.concatenate([self._far, to_int16(self._resampler.push(to_float(pcm)))])
            self._ahead_s = audible_s - now
            if np.abs(pcm.astype(np.int32)).max(initial=0) >= _AUDIBLE:
                self._echo_until_s = audible_s + len(pcm) / rate + ECHO_TAIL_S
            for block in self._blocks("_far"):
                self._module.process_reverse_stream(self._frame(block.tobytes(), SAMPLE_RATE, 1, BLOCK))

    def _blocks(self, name: str) -> list[Pcm16]:
        waiting: Pcm16 = getattr(self, name)
        whole = len(waiting) // BLOCK * BLOCK
        setattr(self, name, waiting[whole:])
        return list(waiting[:whole].reshape(-1, BLOCK))
