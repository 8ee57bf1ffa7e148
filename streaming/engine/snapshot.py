"""A session taken out of its engine: the slot's copy, and the session's own books beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from streaming.config import Sampling

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Books(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A session's own knowledge of its stream. Nothing waits: all that it was told has happened.

    turn: from 1. prompt_frames: heard in this turn. spoken: frames kept of the continuation in this turn or, while
    listening, in the last; spoken_before: of the one before. released: how many of them the listener has had.
    max_frames, lead_frames: of the continuation. first_frame_ms, step_seconds, steps: the continuation's figures so
    far.
    """

    slides: bool
    sampling: Sampling
    speaking: bool
    turn: Positive
    prompt_frames: Count
    spoken: Count
    spoken_before: Count
    released: Count
    max_frames: Count
    lead_frames: Count
    first_frame_ms: Milliseconds | None
    step_seconds: Milliseconds
    steps: Count

    def fits(self, frames: int) -> bool:
        """Return whether these books can be those of a stream of so many frames."""
        told = self.prompt_frames + (self.spoken if self.speaking else 0)
        speaks = self.max_frames >= 1 and self.lead_frames >= 1 and frames >= 1 and self.spoken < self.max_frames
        return told <= frames and (speaks or not self.speaking)


@dataclass(frozen=True)
class SessionSnapshot:
    """A session that any engine with the same models and sizes can go on with. copy: the step's own."""

    books: Books
    copy: Any
