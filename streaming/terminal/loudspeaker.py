"""The loudspeaker that a continuation is played on, and the simulated one that file mode listens with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16
from streaming.terminal.jitter_buffer import JitterBuffer

MAX_HEARD_BLOCKS = 1_024
"""Blocks kept for `take_heard`; the oldest go when nobody takes them."""


@dataclass(frozen=True, slots=True)
class LoudspeakerState:
    """The progress of playback in the current turn.

    played_samples: at 24 kHz, what has left the loudspeaker. buffered_ms: what waits. underruns: in this turn.
    audible_s: when the turn's first sample left, by `time.monotonic`; None before. drained: all of the turn has left.
    """

    played_samples: int
    buffered_ms: float
    underruns: int
    audible_s: float | None
    drained: bool


class Loudspeaker(Protocol):
    """Plays one turn after another. All methods are for the event loop's thread."""

    def play(self, pcm: Pcm16) -> None:
        """Add more of the turn's continuation, int16 [n] at 24 kHz."""

    def complete(self) -> None:
        """The turn has no more audio: play to its end."""

    def playback(self) -> LoudspeakerState:
        """Return where playback is now."""

    def stop(self) -> int:
        """Silence now; ready for the next turn. Returns the samples of this turn that were heard, at 24 kHz."""

    def take_heard(self) -> Pcm16:
        """Return what left since the last call, silence included, int16 [n] at 24 kHz: one continuous track."""


class SimulatedLoudspeaker:
    """A jitter buffer that plays against a clock, into nothing: a listener's latencies without a sound card.

    Its device has no latency and no block: a sample is heard the moment its time has come.
    """

    def __init__(self, buffer: JitterBuffer, now_s: Callable[[], float] = time.monotonic) -> None:
        assert buffer.sample_rate == SAMPLE_RATE
        self._buffer = buffer
        self._now_s = now_s
        self._start_s = now_s()
        self._pulled = 0
        self._heard: deque[Pcm16] = deque(maxlen=MAX_HEARD_BLOCKS)
        self._audible_s: float | None = None
        self._underruns_before = 0

    def play(self, pcm: Pcm16) -> None:
        self._catch_up()
        self._buffer.push(pcm)
        self._note_audible()

    def complete(self) -> None:
        self._catch_up()
        self._buffer.complete()
        self._note_audible()

    def playback(self) -> LoudspeakerState:
        self._catch_up()
        buffer = self._buffer
        return LoudspeakerState(
            buffer.played_samples,
            1000 * buffer.buffered_samples / SAMPLE_RATE,
            buffer.underruns - self._underruns_before,
            self._audible_s,
            buffer.drained,
        )

    def stop(self) -> int:
        self._catch_up()
        self._audible_s = None
        self._underruns_before = self._buffer.underruns
        return self._buffer.flush()

    def take_heard(self) -> Pcm16:
        self._catch_up()
        heard = np.concatenate([np.zeros(0, np.int16), *self._heard])
        self._heard.clear()
        return heard

    def _note_audible(self) -> None:
        # Playback that can begin begins now, not at the next look at the clock.
        if self._audible_s is None and self._buffer.ready:
            self._audible_s = self._now_s()

    def _catch_up(self) -> None:
        due = int((self._now_s() - self._start_s) * SAMPLE_RATE)
        if due > self._pulled:
            self._heard.append(self._buffer.pull(due - self._pulled))
            self._pulled = due
