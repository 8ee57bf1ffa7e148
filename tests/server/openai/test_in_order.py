"""Answers of a dialect's own."""

from __future__ import annotations

from streaming.errors import ProtocolError
from streaming.server.openai.in_order import in_order, rejected
from streaming.server.openai.realtime_events import Cleared, Error, EventError, ServerEvent


def test_an_answer_is_made_when_it_is_its_turn() -> None:
    """An event was answered by what was true when it came, and not by what the events before it had made true."""
    known: list[ServerEvent] = []
    answer = in_order(lambda: list(known))
    known.append(Cleared())
    assert answer.token() == [Cleared()]


def test_what_goes_wrong_then_is_the_answer() -> None:
    def fail() -> list[ServerEvent]:
        raise EventError("invalid_value", "not so", "item")

    (error,) = in_order(fail, "mine").token()
    assert isinstance(error, Error)
    details = error.error
    assert (details.code, details.message, details.param, details.event_id) == (
        "invalid_value",
        "not so",
        "item",
        "mine",
    )


def test_a_rejection_is_bounded() -> None:
    (error,) = rejected(ProtocolError("x" * 5000), None).token()
    assert isinstance(error, Error)
    assert (error.error.code, len(error.error.message)) == ("invalid_value", 1000)
