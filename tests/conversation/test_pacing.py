"""How far the server may lead."""

from __future__ import annotations

import pytest

from streaming.conversation.pacing import FAST_LEAD_FRAMES, frames_in, lead_frames
from streaming.protocol.messages import SessionStart


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.001, 1), (0.08, 1), (0.081, 2), (0.24, 3), (2.4, 30), (3600, 45_000)]
)
def test_seconds_are_rounded_up_to_frames(seconds: float, frames: int) -> None:
    """0.24 s were 4 frames: 0.24 * 12.5 is a little more than 3."""
    assert frames_in(seconds) == frames


@pytest.mark.parametrize(("lead_ms", "rewind", "frames"), [(80, 16, 1), (400, 16, 5), (10_000, 16, 16), (400, 0, 1)])
def test_no_more_is_ahead_than_can_be_taken_back(lead_ms: int, rewind: int, frames: int) -> None:
    assert lead_frames(SessionStart(lead_ms=lead_ms), rewind) == frames


def test_at_fast_pace_the_lead_is_what_may_wait_for_the_socket() -> None:
    assert lead_frames(SessionStart(pace="fast", lead_ms=80), 4) == FAST_LEAD_FRAMES
