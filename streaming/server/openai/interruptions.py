"""Cut a Realtime response: at the client's word or, if a cancelled one is never truncated, by the clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from streaming.audio import FRAME
from streaming.conversation.conversation import HEARD_TIMEOUT_S, HeardByClock, HeardNothing
from streaming.protocol import messages
from streaming.server.openai.realtime_events import ServerEvent
from streaming.server.openai.realtime_response import Response

ALL_SENT = 2**63 - 1
"""A number of heard samples that stands for all that was sent."""


class Interruptions:
    """Hold one session's interruptions that wait for a word or an answer. clock: in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._answers: deque[list[ServerEvent]] = deque()  # what to say when an `interrupt` was answered
        self._turn: int | None = None  # of a cancelled response, until it is said what was heard of it
        self._until = 0.0  # until when the client may say that

    @property
    def unsaid(self) -> bool:
        """Return whether a response was cancelled, and what was heard of it may still be said."""
        return self._turn is not None

    @property
    def overdue(self) -> bool:
        """Return whether the client's time to say so is over."""
        return self.unsaid and self._clock() >= self._until

    def cancel(self, response: Response) -> messages.Interrupt:
        """Tell nothing more of a response. What was sent of it and not heard is cut when the client says so."""
        response.speaking = False
        self._turn, self._until = response.turn, self._clock() + HEARD_TIMEOUT_S
        return self._interrupt(response, ALL_SENT)

    def cut(self, response: Response, heard_samples: int, then: ServerEvent) -> messages.Interrupt | HeardNothing:
        """Cut a response to what was heard. then: what is said once that is done."""
        response.speaking = False
        self._turn = None
        if heard_samples < FRAME:
            self._answers.append([then])
            return HeardNothing(response.turn)
        return self._interrupt(response, heard_samples, then)

    def cut_by_clock(self) -> list[HeardByClock]:
        """Cut to what could have been played when the client cancelled: it has not said what was."""
        if self._turn is None:
            return []
        turn, self._turn = self._turn, None
        self._answers.append([])
        return [HeardByClock(turn)]

    def answered(self) -> list[ServerEvent]:
        """Return what to say when an interruption was answered. A voice's is answered, too, and nothing is said."""
        return self._answers.popleft() if self._answers else []

    def _interrupt(self, response: Response, heard_samples: int, *then: ServerEvent) -> messages.Interrupt:
        self._answers.append([*then])
        return messages.Interrupt(turn=response.turn, heard_samples=heard_samples)
