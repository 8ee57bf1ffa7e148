"""Answers of a dialect's own, which must not overtake the conversation's: they go through it, and come out in order."""

from __future__ import annotations

from collections.abc import Callable

from streaming.conversation.outbox import Echo
from streaming.errors import ProtocolError
from streaming.server.openai.realtime_events import EventError, ServerEvent, rejection


def in_order(reply: Callable[[], list[ServerEvent]], event_id: str | None = None) -> Echo:
    """Return what says this once all that was given to the conversation before is handled.

    reply: what to say then; an `EventError` that it raises is said instead.
    event_id: of the client's event that it answers.
    """

    def said() -> list[ServerEvent]:
        try:
            return reply()
        except EventError as error:
            return [rejection(error, event_id)]

    return Echo(said)


def rejected(error: ProtocolError, event_id: str | None) -> Echo:
    """Return what says, in order, that an event of the client's cannot be taken."""
    said = rejection(error, event_id)  # not the error itself, which would keep the event in memory
    return in_order(lambda: [said])
