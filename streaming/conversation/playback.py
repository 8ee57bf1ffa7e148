"""How much of a continuation its listener has heard: by the client's word or, for a client that never says, by the
clock.

Pure: the time is passed in, in seconds of any monotonic clock.
"""

from __future__ import annotations

from streaming.audio import FRAME, FRAME_RATE


class Playback:
    """One turn's playback at a listener that plays in real time."""

    def __init__(self) -> None:
        self.sent_frames = 0
        self._ends_at = 0.0  # when what was sent is over, if it is played as it comes
        self._reported: int | None = None
        self._stopped: int | None = None

    def sent(self, now: float) -> float:
        """A frame went out. Returns when, by the clock, it will have been played."""
        self.sent_frames += 1
        self._ends_at = max(now, self._ends_at) + 1 / FRAME_RATE
        return self._ends_at

    def stop(self, now: float) -> None:
        """The client was told to play no more: the clock counts no further."""
        self._stopped = self._by_clock(now)

    def report(self, samples: int) -> None:
        """The client says that it has played so much. Never less than it said before, nor more than it was sent."""
        self._reported = max(self._reported or 0, min(samples, self.sent_frames * FRAME))

    @property
    def reports(self) -> bool:
        """Whether the client tells."""
        return self._reported is not None

    def played_samples(self, now: float) -> int:
        """What was heard, at most what was sent."""
        if self._reported is not None:
            return self._reported
        return self._by_clock(now) if self._stopped is None else self._stopped

    def _by_clock(self, now: float) -> int:
        remaining = max(0.0, self._ends_at - now) * FRAME_RATE
        return max(0, round((self.sent_frames - remaining) * FRAME))
