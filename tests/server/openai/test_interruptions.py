"""What is cut of a Realtime response, and when it is answered."""

from __future__ import annotations

import pytest

from streaming.audio import FRAME
from streaming.conversation.conversation import HEARD_TIMEOUT_S, HeardByClock, HeardNothing
from streaming.protocol.messages import Interrupt
from streaming.server.openai.formats import PCM, FormatEncoder
from streaming.server.openai.interruptions import ALL_SENT, Interruptions
from streaming.server.openai.realtime_events import ItemTruncated
from streaming.server.openai.realtime_options import Model
from streaming.server.openai.realtime_response import Response

TRUNCATED = ItemTruncated(item_id="item", content_index=0, audio_end_ms=1)


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def response(turn: int) -> Response:
    return Response(turn, Model("model", 4, 64), "conv", None, "inf", FormatEncoder(PCM), "voice")


def test_a_cancelled_response_is_cut_when_the_client_says_what_it_heard() -> None:
    interruptions, cancelled = Interruptions(Clock()), response(3)
    assert interruptions.cancel(cancelled) == Interrupt(turn=3, heard_samples=ALL_SENT)
    assert not cancelled.speaking
    assert interruptions.unsaid
    assert interruptions.cut(cancelled, 2_400, TRUNCATED) == Interrupt(turn=3, heard_samples=2_400)
    assert not interruptions.unsaid
    assert [interruptions.answered(), interruptions.answered()] == [[], [TRUNCATED]]


def test_a_client_that_says_nothing_is_asked_no_longer_than_half_a_second() -> None:
    clock = Clock()
    interruptions = Interruptions(clock)
    assert interruptions.cut_by_clock() == []
    assert not interruptions.overdue
    interruptions.cancel(response(3))
    clock.now += 0.9 * HEARD_TIMEOUT_S
    assert not interruptions.overdue
    clock.now += 0.1 * HEARD_TIMEOUT_S
    assert interruptions.overdue
    assert interruptions.cut_by_clock() == [HeardByClock(3)]
    assert not interruptions.overdue
    assert interruptions.cut_by_clock() == []
    assert [interruptions.answered(), interruptions.answered()] == [[], []]


def test_an_answer_that_nobody_waits_for_says_nothing() -> None:
    """A voice's interruption is answered, too, and took the next client's answer."""
    interruptions = Interruptions(Clock())
    assert interruptions.answered() == []
    interruptions.cut(response(1), 2_400, TRUNCATED)
    assert interruptions.answered() == [TRUNCATED]


@pytest.mark.parametrize("heard_samples", [0, FRAME - 1])
def test_a_response_of_which_no_frame_was_heard_is_taken_back(heard_samples: int) -> None:
    """The response was cut like any other: its beginning stayed where it was longer than what can be rewound."""
    interruptions = Interruptions(Clock())
    assert interruptions.cut(response(2), heard_samples, TRUNCATED) == HeardNothing(2)
    assert interruptions.answered() == [TRUNCATED]
