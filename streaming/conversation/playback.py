"""Follow how much of a continuation its listener has heard: by the client's word or, if it never says, by the clock.
This is the only clock of what was played.

The time is passed in, in seconds of any monotonic clock.
"""

from __future__ import annotations

import math
from typing import Self

from streaming.audio import FRAME, FRAME_RATE
from streaming.conversation.books import PlaybackBooks


class Playback:
    """One turn's continuation at a listener that plays in real time.

    frames: its length, once it is complete. over: nobody plays it any more: it was played to its end, or interrupted.
    """

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.frames: int | None = None
        self.over = False
        self.sent_frames = 0
        self._ends_at = 0.0  # when what was sent is over, if it is played as it comes
        self._reported: int | None = None
        self._stopped: int | None = None

    @classmethod
    def of(cls, books: PlaybackBooks, now: float) -> Self:
        """Return the playback that these books describe."""
        playback = cls(books.turn)
        playback.frames, playback.over, playback.sent_frames = books.frames, books.over, books.sent_frames
        playback._ends_at = now + books.ends_in_s
        playback._reported, playback._stopped = books.reported, books.stopped
        return playback

    def books(self, now: float) -> PlaybackBooks:
        """Return what another playback needs to go on with this one."""
        return PlaybackBooks(
            turn=self.turn,
            frames=self.frames,
            over=self.over,
            sent_frames=self.sent_frames,
            ends_in_s=max(0.0, self._ends_at - now),
            reported=self._reported,
            stopped=self._stopped,
        )

    @property
    def sent_samples(self) -> int:
        """Return how much was sent."""
        return self.sent_frames * FRAME

    def sent(self, now: float) -> None:
        """Note that a frame goes out."""
        self.sent_frames += 1
        self._ends_at = max(now, self._ends_at) + 1 / FRAME_RATE

    def stop(self, now: float) -> None:
        """Stop the clock: the client was told to play no more."""
        if self._stopped is None:
            self._stopped = self._by_clock(now)

    def report(self, samples: int) -> None:
        """Note how much the client says it has played: never less than before, nor more than it was sent."""
        self._reported = max(self._reported or 0, min(samples, self.sent_samples))

    def played_samples(self, now: float) -> int:
        """Return what was heard, at most what was sent."""
        if self._reported is not None:
            return self._reported
        return self._by_clock(now) if self._stopped is None else self._stopped

    def next_frame_at(self, now: float) -> float | None:
        """Return when, by the clock, the next of the sent frames will have been played.

        None if all have been, or if the client tells by itself.
        """
        remaining = (self._ends_at - now) * FRAME_RATE
        if self._reported is not None or self._stopped is not None or remaining <= 0:
            return None
        return self._ends_at - (math.ceil(remaining - 1e-9) - 1) / FRAME_RATE

    def _by_clock(self, now: float) -> int:
        remaining = max(0.0, self._ends_at - now) * FRAME_RATE
        return max(0, round((self.sent_frames - remaining) * FRAME))
