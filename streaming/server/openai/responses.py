"""The responses of a Realtime session: asked for, accepted, being spoken, over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from streaming.audio import FRAME, to_int16
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage
from streaming.server.openai import realtime_events as events
from streaming.server.openai.formats import FormatEncoder
from streaming.server.openai.items import Items
from streaming.server.openai.realtime_events import EventError, Limit, ServerEvent
from streaming.server.openai.realtime_options import Model, Options
from streaming.server.openai.realtime_response import Response, Status, new_id

NO_TEXT = events.Failure(
    type="invalid_request_error", code="unsupported_modality", message='this model has no words; ask for ["audio"]'
)
ONE_CONVERSATION = events.Failure(
    type="invalid_request_error",
    code="unsupported_conversation",
    message="a response goes on from what was said in this session, and from nothing else",
)


@dataclass(frozen=True)
class Asked:
    """A `response.create` that the conversation has accepted or will."""

    event_id: str | None
    metadata: dict[str, str] | None
    limit: Limit


class Responses:
    """Hold one session's responses, each of which is a turn of the conversation.

    open: the one whose course is being told; last: that one, or the one before. Options are the session's as they are
    when a response begins.
    """

    def __init__(self, model: Model, items: Items) -> None:
        self._model, self._items, self._conversation_id = model, items, new_id("conv")
        self.open: Response | None = None
        self.last: Response | None = None
        self._asked = 0  # how many `response.create` the conversation has not accepted yet
        self._refusal: messages.Error | None = None  # of the last `response.create`
        self._accepted: deque[Asked] = deque()
        self._turns = 0  # responses so far, which is also the number of the last one's turn
        self._stream_frames = 0  # what the model has heard and said before this turn
        self._prompt_frames = 0  # how many of these are this turn's prompt
        self._spoken = (0, 0)  # the last turn, and how many frames of it the context keeps

    @property
    def awaited(self) -> bool:
        """Return whether a response that was asked for has not begun."""
        return bool(self._asked or self._accepted)

    @property
    def busy(self) -> bool:
        """Return whether a response is being spoken, or will be."""
        return self.awaited or (self.open is not None and self.open.speaking)

    def speaking(self, response_id: str | None) -> Response | None:
        """Return the response that is being spoken, if it has this id; None stands for any."""
        response = self.open
        if response is not None and response.speaking and response_id in (None, response.id):
            return response
        return None

    # Asked for

    def ask(self) -> None:
        """Note that a `speak` goes to the conversation. Call `answered` when it was handled."""
        self._asked += 1

    def refused(self, error: messages.Error) -> None:
        """Note that the conversation cannot speak."""
        self._refusal = error

    def answered(self, asked: Asked, options: Options) -> list[ServerEvent]:
        """Return what is told once the conversation has handled a `speak`."""
        self._asked -= 1
        refusal, self._refusal = self._refusal, None
        if refusal is None:
            if self.open is None:
                return self._begin(asked, options)
            self._accepted.append(asked)
            return []
        if refusal.code in ("empty_prompt", "take_gone"):
            failure = events.Failure(type="invalid_request_error", code=refusal.code, message=refusal.message)
            return self.fail(asked.metadata, failure, options)
        error = EventError("conversation_already_has_active_response", refusal.message)
        return [events.rejection(error, asked.event_id)]

    def fail(self, metadata: dict[str, str] | None, failure: events.Failure, options: Options) -> list[ServerEvent]:
        """Return a response that fails at once: some clients would end at an `error`."""
        return self._new(0, metadata, options.limit, options).failed(failure)

    def _begin(self, asked: Asked, options: Options) -> list[ServerEvent]:
        self._turns += 1
        response = self._new(self._turns, asked.metadata, asked.limit, options)
        self.open = self.last = response
        return response.begun(self._items.add(response.item("in_progress")))

    def _new(self, turn: int, metadata: dict[str, str] | None, limit: Limit, options: Options) -> Response:
        encoder = FormatEncoder(options.output)
        return Response(turn, self._model, self._conversation_id, metadata, limit, encoder, options.voice)

    # Being spoken

    def turn_speaking(self, speaking: messages.TurnSpeaking, options: Options) -> list[ServerEvent]:
        """Return what is told when the conversation speaks: asked to, or at the end of speech."""
        said = []
        if self._turns < speaking.turn:
            said = self._begin(Asked(None, None, options.limit), options)
        prompt = speaking.prompt_samples // FRAME
        if self.open is not None and self.open.turn == speaking.turn:
            self.open.prompt_frames, self.open.cached_frames = prompt, self._stream_frames
        self._stream_frames += prompt
        self._prompt_frames = prompt
        return said

    def take_started(self) -> None:
        """Note that the conversation goes on anew from the last prompt, of which nothing that followed was kept."""
        self._stream_frames -= self._prompt_frames

    def audio(self, audio: AudioMessage) -> list[ServerEvent]:
        """Return how audio is told; of a response that was cancelled it is not."""
        response = self.open
        if response is None or response.turn != audio.turn or not response.speaking:
            return []
        response.sent += len(audio.pcm)
        return response.delta(response.encoder.push(to_int16(audio.pcm)))

    def turn_done(self, done: messages.TurnDone, options: Options) -> list[ServerEvent]:
        """Return what is told when a turn is over."""
        self._spoken = (done.turn, done.samples // FRAME)
        self._stream_frames += done.samples // FRAME
        response = self.open
        if response is None or response.turn != done.turn:
            return []  # a voice has closed it already
        self.open = None
        said: list[ServerEvent] = []
        if done.reason == "interrupted":
            said = self._close(response, "cancelled", "client_cancelled")
        else:
            said = response.delta(response.encoder.flush())
            ended = done.reason == "end" or response.limit == "inf"  # the client did not limit it
            said += self._close(response, *(("completed", None) if ended else ("incomplete", "max_output_tokens")))
        if self._accepted:
            said += self._begin(self._accepted.popleft(), options)
        return said

    def voice_interrupts(self, turn: int) -> list[ServerEvent]:
        """Return what is told when somebody speaks over a turn."""
        response = self.speaking(None)
        if response is None or response.turn != turn:
            return []
        self.open = None
        return self._close(response, "cancelled", "turn_detected")

    def kept(self, turn: int, frames: int) -> None:
        """Note that the context was cut, and keeps so much of the turn."""
        last, before = self._spoken
        if turn == last:
            self._stream_frames -= max(0, before - frames)
            self._spoken = (last, min(before, frames))

    def session_ended(self, code: str) -> list[ServerEvent]:
        """Return the end of a response that is being spoken when the session ends."""
        response, self.open = self.open, None
        if response is None:
            return []
        failure = events.Failure(type="server_error", code=code, message="the session ended")
        return self._close(response, "failed", None, failure)

    def _close(
        self, response: Response, status: Status, reason: str | None, failure: events.Failure | None = None
    ) -> list[ServerEvent]:
        response.speaking = False
        previous = self._items.replace(response.item(status))
        return response.ended(events.StatusDetails(type=status, reason=reason, error=failure), previous)
