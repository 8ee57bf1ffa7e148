"""What a listener has heard: by its word, or by the clock."""

from __future__ import annotations

import pytest

from streaming.audio import FRAME
from streaming.conversation.playback import Playback

FRAME_S = 0.08


def playback(*sent_at: float) -> Playback:
    made = Playback(turn=1)
    for now in sent_at:
        made.sent(now)
    return made


def test_frames_are_played_one_after_another_from_when_the_first_came() -> None:
    heard = playback(10.0, 10.0, 10.0)
    assert [heard.played_samples(10.0 + n * FRAME_S) for n in range(5)] == [0, FRAME, 2 * FRAME, 3 * FRAME, 3 * FRAME]


def test_a_frame_that_comes_late_is_played_from_then_on() -> None:
    """The gap counted as heard: an interruption kept more than the listener had had."""
    heard = playback(10.0)
    heard.sent(11.0)
    assert heard.played_samples(11.0) == FRAME
    assert heard.played_samples(11.04) == FRAME + FRAME // 2


def test_what_was_stopped_is_played_no_further_by_the_clock() -> None:
    heard = playback(10.0, 10.0)
    heard.stop(10.0 + FRAME_S)
    heard.stop(10.0 + 2 * FRAME_S)  # a second word to stop changes nothing
    assert heard.played_samples(20.0) == FRAME


def test_the_clients_word_counts_and_never_goes_back() -> None:
    heard = playback(10.0, 10.0)
    heard.report(FRAME + 5)
    heard.report(3)
    assert heard.played_samples(20.0) == FRAME + 5


def test_a_client_has_not_heard_what_it_was_not_sent() -> None:
    """A client that lied about its playback was led by as much as it liked."""
    heard = playback(10.0)
    heard.report(10**9)
    assert heard.played_samples(10.0) == FRAME


@pytest.mark.parametrize(
    ("now", "wanted"), [(10.0, 10.08), (10.05, 10.08), (10.08, 10.16), (10.1, 10.16), (10.16, None)]
)
def test_the_next_frame_is_over_at_its_end(now: float, wanted: float | None) -> None:
    """A timer that was due at once was set again and again."""
    assert playback(10.0, 10.0).next_frame_at(now) == (None if wanted is None else pytest.approx(wanted))


def test_a_client_that_reports_needs_no_clock() -> None:
    heard = playback(10.0)
    heard.report(0)
    assert heard.next_frame_at(10.0) is None
