"""A jitter buffer: audio comes in bursts, leaves evenly, and every sample that left is accounted for.

Pure and without a clock; whoever owns the sound card calls `pull` from its rhythm. Not thread-safe.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16

START_MS = 70
"""Play as soon as the first frame is here, for that is the latency that a listener feels. A frame is 80 ms, but of the
first one as Opus the last 6.5 come with the second."""
GROWTH_MS = 20
CAPACITY_MS = 12_000


class JitterBuffer:
    """One continuation's way to the loudspeaker.

    Playback begins when `target_ms` is buffered, or when the continuation is complete. To run dry before more comes is
    an underrun: the target grows by 20 ms up to `max_ms`, and playback pauses until the target is reached again. The
    larger target is kept for later turns. `max_ms` must stay below the lead that the server allows itself, or playback
    would wait for audio that waits for playback.

    Bounded: past 12 s the oldest samples are dropped and counted in `dropped_samples`; positions skip over them.

    `latency_samples` is what the device holds between `pull` and the loudspeaker. All positions and counts are samples
    at `sample_rate`, from the turn's first one.
    """

    def __init__(self, *, sample_rate: int = SAMPLE_RATE, max_ms: int = 240, latency_samples: int = 0) -> None:
        assert max_ms >= START_MS
        assert latency_samples >= 0
        self.sample_rate = sample_rate
        self.target_ms = START_MS
        self.underruns = 0
        """Counted over all turns."""
        self.dropped_samples = 0
        """Counted over all turns."""
        self._max_ms = max_ms
        self._latency = latency_samples
        self._queue: deque[Pcm16] = deque()
        self._buffered = 0
        self._left = 0
        self._device_samples = 0
        # For each block that the device may still hold: its end, in samples ever pulled, and the turn's position there.
        self._in_device: deque[tuple[int, int]] = deque()
        self._played = 0
        self._playing = False
        # The buffer ran dry in a turn. It is an underrun only if more comes: the end may be told after the last sample.
        self._dry = False
        self._complete = False

    @property
    def buffered_samples(self) -> int:
        """Samples that wait here."""
        return self._buffered

    @property
    def played_samples(self) -> int:
        """Return how far into the turn the loudspeaker is: what was pulled, less what the device still holds."""
        return self._played

    @property
    def pulled_samples(self) -> int:
        """Return how far into the turn `pull` is."""
        return self._left

    @property
    def ready(self) -> bool:
        """True when the next `pull` plays."""
        if self._playing or self._complete:
            return self._buffered > 0
        return self._buffered >= self.target_ms * self.sample_rate // 1000

    @property
    def drained(self) -> bool:
        """True when the turn is complete and its last sample has left the loudspeaker."""
        return self._complete and self._buffered == 0 and self._played == self._left

    def push(self, pcm: Pcm16) -> None:
        """Add more of the continuation, int16 [n]."""
        assert pcm.dtype == np.int16
        assert not self._complete
        if len(pcm):
            self._queue.append(pcm)
            self._buffered += len(pcm)
            if self._dry:
                self._dry = False
                self.underruns += 1
                self.target_ms = min(self.target_ms + GROWTH_MS, self._max_ms)
        excess = self._buffered - CAPACITY_MS * self.sample_rate // 1000
        if excess > 0:
            self.dropped_samples += excess
            self._take(excess)

    def complete(self) -> None:
        """Note that no more of this turn will come: what is here is played to its end."""
        self._complete = True

    def pull(self, n: int) -> Pcm16:
        """Return the next n samples for the device, int16 [n], silence where there is nothing to play."""
        out = np.zeros(n, np.int16)
        if self._playing or self.ready:
            self._playing = True
            pcm = self._take(min(n, self._buffered))
            out[: len(pcm)] = pcm
            if len(pcm) < n:
                self._playing = False
                self._dry = not self._complete
        self._advance(n)
        return out

    def flush(self) -> int:
        """Throw away what has not left the loudspeaker, and start afresh for the next turn.

        Returns how many samples of the turn were heard. What the device itself still holds counts as not heard.
        """
        heard = self._played
        self._queue.clear()
        self._in_device.clear()
        self._buffered = self._left = self._played = 0
        self._playing = self._dry = self._complete = False
        return heard

    def _take(self, n: int) -> Pcm16:
        parts = []
        missing = n
        while missing:
            head = self._queue.popleft()
            if len(head) > missing:
                self._queue.appendleft(head[missing:])
                head = head[:missing]
            parts.append(head)
            missing -= len(head)
        self._buffered -= n
        self._left += n
        return np.concatenate(parts) if parts else np.zeros(0, np.int16)

    def _advance(self, n: int) -> None:
        """Note that the device took n more samples, so that older ones have left it. Exact to one block, never too
        much.
        """
        self._device_samples += n
        self._in_device.append((self._device_samples, self._left))
        while self._in_device and self._in_device[0][0] + self._latency <= self._device_samples:
            self._played = self._in_device.popleft()[1]
