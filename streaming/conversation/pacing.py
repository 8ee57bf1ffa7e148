"""The server's lead: how many frames of a continuation may be ahead of what its listener has played."""

from __future__ import annotations

import math

from streaming.audio import FRAME_RATE
from streaming.protocol.messages import SessionStart

FAST_LEAD_FRAMES = 16
"""Most frames that may wait for the socket at fast pace."""


def frames_in(seconds: float) -> int:
    """Return how many frames hold so many seconds, at least 1."""
    return max(1, math.ceil(seconds * FRAME_RATE - 1e-9))


def lead_frames(start: SessionStart, rewind_frames: int) -> int:
    """Return the lead of a session: what it asked for, at most what an interruption can take back."""
    if start.pace == "fast":
        return FAST_LEAD_FRAMES
    return max(1, min(frames_in(start.lead_ms / 1e3), rewind_frames))
