"""OpenAI's Realtime protocol (GA) as a dialect: its events in, native messages to the conversation, and the way back.

What the protocol needs and the conversation does not know is kept in parts: `Items`, the `InputBuffer`, `Responses` and
`Interruptions`. No socket, no engine, no tensors.

Replies that the conversation has no part in must not overtake its own: each goes in as an `Echo`, and comes out among
the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.conversation.conversation import Received
from streaming.conversation.outbox import Echo, Saved
from streaming.errors import ProtocolError
from streaming.protocol import messages
from streaming.protocol.messages import OPEN_TURN, AudioMessage, Message, SamplingOptions
from streaming.server.openai import realtime_client_events as asked
from streaming.server.openai import realtime_events as events
from streaming.server.openai.in_order import in_order, rejected
from streaming.server.openai.input_buffer import InputBuffer
from streaming.server.openai.interruptions import Interruptions
from streaming.server.openai.items import Items, item_of
from streaming.server.openai.realtime_events import EventError, ServerEvent, server_error
from streaming.server.openai.realtime_options import Model, Options
from streaming.server.openai.realtime_response import new_id
from streaming.server.openai.responses import NO_TEXT, ONE_CONVERSATION, Asked, Responses

_MAX_WORDS_BYTES = 2**20
_SAMPLES_PER_MS = SAMPLE_RATE // 1000


class RealtimeDialect:
    """The dialect of one session. give: hands a message to the conversation; clock: in seconds, monotonic."""

    ready = True

    def __init__(self, model: Model, give: Callable[[Received], None], clock: Callable[[], float]) -> None:
        self._model, self._give = model, give
        self._session_id, self._event_prefix, self._events = new_id("sess"), new_id("event"), 0
        self._options = Options()
        self._updates: deque[Options] = deque()  # those that the conversation has not taken over yet
        self._input = InputBuffer(self._options.input)
        self._speech_item: str | None = None  # the item that the client is speaking
        self._items = Items()
        self._responses = Responses(model, self._items)
        self._interruptions = Interruptions(clock)

    # Client to server

    def decode(self, data: str | bytes) -> Sequence[Received]:
        try:
            if isinstance(data, bytes):
                raise EventError("invalid_json", "events are text messages, audio goes base64-encoded inside them")
            if len(data) > _MAX_WORDS_BYTES and messages.type_of(data) != "input_audio_buffer.append":
                raise EventError("string_above_max_length", f"at most {_MAX_WORDS_BYTES} bytes but for audio")
            return self._take(asked.decode(data))
        except ProtocolError as error:
            return [rejected(error, asked.event_id_of(data))]

    def _take(self, event: asked.AnyClientEvent) -> Sequence[Received]:
        match event:
            case asked.Append(audio=audio):
                return self._append(audio)
            case asked.SessionUpdate(session=session):
                return self._update(session)
            case asked.Commit():
                return self._commit(event.event_id)
            case asked.Clear():
                return self._clear()
            case asked.ResponseCreate():
                return self._create(event.event_id, event.response or asked.ResponseOption())
            case asked.ResponseCancel():
                return self._cancel(event)
            case asked.ItemTruncate():
                return self._truncate(event)
            case asked.ItemDelete(item_id=item_id):
                return self._delete(item_id)
            case asked.ItemCreate(item=given, previous_item_id=previous):
                item = item_of(given)
                return [in_order(lambda: self._items.create(item, previous), event.event_id)]
            case asked.ItemRetrieve(item_id=item_id):
                return [in_order(lambda: [self._items.retrieve(item_id)], event.event_id)]
            case asked.OutputClear():
                return []

    def _update(self, update: asked.SessionOption) -> list[Received]:
        before, options = self._options, self._options.updated(update)
        given: list[Received] = []
        if options.input != before.input:
            self._input.change_format(options.input)
            given += self._flow()
        if options.detection is not None and before.detection is None:
            given += [*self._interruptions.cut_by_clock(), *self._input.release()]
        if options.detection is None and before.detection is not None:
            self._input.restart()
        self._options = options
        self._updates.append(options)
        native = messages.SessionUpdate(
            max_seconds=self._model.seconds(options.limit),
            sampling=SamplingOptions(temperature=options.temperature),
            turn_taking="manual" if options.detection is None else "vad",
            vad=options.vad(),
        )
        return [*given, native]

    # Input

    def _append(self, audio: bytes) -> list[Received]:
        if len(audio) > asked.MAX_AUDIO_BYTES:
            raise EventError("string_above_max_length", "at most 15 MiB of audio at a time", "audio")
        self._input.append(audio)
        given = self._interruptions.cut_by_clock() if self._interruptions.overdue else []
        return [*given, *self._flow()]

    def _flow(self) -> list[AudioMessage]:
        """Give the conversation what was added to the input, unless it has to wait for a response."""
        if self._interruptions.unsaid or (self._options.detection is None and self._responses.busy):
            self._input.hold()
            return []
        return self._input.release()

    def _end_of_input(self) -> list[Received]:
        """Note that what was appended is complete."""
        given = self._interruptions.cut_by_clock()
        self._input.complete()
        return [*given, *self._flow()]

    def _commit(self, event_id: str | None) -> list[Received]:
        given = self._end_of_input()
        if self._options.detection is not None:
            return [*given, in_order(self._commit_speech, event_id)]
        if not self._input.uncommitted:
            error = EventError("input_audio_buffer_commit_empty", "there is no audio in the input buffer")
            return [*given, rejected(error, event_id)]
        return [*given, self._commit_manually()]

    def _commit_speech(self) -> list[ServerEvent]:
        item_id, self._speech_item = self._speech_item, None
        if item_id is None:
            raise EventError("input_audio_buffer_commit_empty", "no speech is in the input buffer")
        return self._items.add_speech(item_id)

    def _commit_manually(self) -> Echo:
        self._input.commit()
        return in_order(lambda: self._items.add_speech(new_id("item")))

    def _clear(self) -> list[Received]:
        given = self._interruptions.cut_by_clock()
        self._input.clear_held()
        if self._responses.busy and self._options.detection is None:  # there was nothing but what was held
            return [*given, in_order(lambda: [events.Cleared()])]
        return [*given, messages.InputClear(keep_samples=self._input.clear_given())]

    # Responses

    def _create(self, event_id: str | None, wanted: asked.ResponseOption) -> list[Received]:
        options = self._options.for_response(wanted)
        given = self._end_of_input()
        if self._responses.busy:
            busy = "a response is being spoken: cancel it first"
            return [*given, rejected(EventError("conversation_already_has_active_response", busy), event_id)]
        if self._options.detection is None and self._input.uncommitted:
            given.append(self._commit_manually())
        if "audio" not in options.modalities:
            return [*given, self._failed(wanted.metadata, NO_TEXT)]
        if wanted.conversation == "none" or wanted.input is not None:
            return [*given, self._failed(wanted.metadata, ONE_CONVERSATION)]
        self._responses.ask()
        self._input.begin_turn()
        response = Asked(event_id, wanted.metadata, options.limit)
        sampling = self._options.sampling(wanted.temperature, wanted.metadata)
        speak = messages.Speak(turn=OPEN_TURN, max_seconds=self._model.seconds(options.limit), sampling=sampling)
        return [*given, speak, in_order(lambda: self._responses.answered(response, self._options))]

    def _failed(self, metadata: dict[str, str] | None, failure: events.Failure) -> Echo:
        return in_order(lambda: self._responses.fail(metadata, failure, self._options))

    def _cancel(self, cancel: asked.ResponseCancel) -> list[Received]:
        response = self._responses.speaking(cancel.response_id)
        if response is not None:
            return [self._interruptions.cancel(response)]
        if not self._responses.awaited:
            raise _not_active()
        return [in_order(lambda: self._cancel_later(cancel.response_id), cancel.event_id)]

    def _cancel_later(self, response_id: str | None) -> list[ServerEvent]:
        response = self._responses.speaking(response_id)
        if response is None:
            raise _not_active()
        self._give(self._interruptions.cancel(response))
        return []

    def _truncate(self, truncate: asked.ItemTruncate) -> list[Received]:
        truncated = self._items.truncate(truncate)
        return self._cut(truncate.item_id, truncated.audio_end_ms, truncated)

    def _delete(self, item_id: str) -> list[Received]:
        if item_id not in self._items:
            raise EventError("item_delete_invalid_item_id", "there is no such item", "item_id")
        cut = self._cut(item_id, 0, events.ItemDeleted(item_id=item_id))
        self._items.remove(item_id)
        return cut

    def _cut(self, item_id: str, heard_ms: int, then: ServerEvent) -> list[Received]:
        """Cut the last response to what was heard. Of any other response, only say so."""
        response = self._responses.last
        if response is None or response.item_id != item_id:
            return [in_order(lambda: [then])]
        cut = self._interruptions.cut(response, heard_ms * _SAMPLES_PER_MS, then)
        return [cut, *([] if self._responses.busy else self._input.release())]

    # Server to client

    def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Sequence[str | bytes]:
        said = []
        for event in self._say(reply):
            self._events += 1
            event.event_id = f"{self._event_prefix}_{self._events}"
            said.append(events.encode(event))
        return said

    def _say(self, reply: Message | AudioMessage | Echo | Saved) -> list[ServerEvent]:
        match reply:
            case AudioMessage():
                return self._responses.audio(reply)
            case Echo(answer):
                said: list[ServerEvent] = answer()
                return said
            case messages.SessionStarted():
                return [events.SessionCreated(session=self._options.session(self._session_id, self._model))]
            case messages.SessionUpdated():
                return [events.SessionUpdated(session=self._updates.popleft().session(self._session_id, self._model))]
            case messages.SessionQueued(place=place):
                return [events.SessionQueued(place=place)]
            case messages.SpeechStarted():
                return self._speech_started(reply)
            case messages.SpeechStopped(at_samples=at):
                return self._speech_stopped(at)
            case messages.InputCleared(kept_samples=kept):
                return self._cleared(kept)
            case messages.TakeStarted():
                self._responses.take_started()
            case messages.TurnSpeaking():
                return self._responses.turn_speaking(reply, self._options)
            case messages.TurnDone():
                return self._responses.turn_done(reply, self._options)
            case messages.Interrupted(turn=turn, kept_samples=kept):
                self._responses.kept(turn, kept // FRAME)
                return self._interruptions.answered()
            case messages.Error():
                return self._native_error(reply)
            case messages.SessionRefused():
                return [server_error(reply.code, reply.message, reply.retry_after_ms)]
            case messages.SessionClosed(reason=reason):
                code = "session_expired" if reason == "idle" else f"session_{reason}"
                return [*self._responses.session_ended(reason), server_error(code, f"the session is over: {reason}")]
        return []

    def _speech_started(self, started: messages.SpeechStarted) -> list[ServerEvent]:
        self._speech_item = new_id("item")
        start_ms = max(0, started.at_samples // _SAMPLES_PER_MS - self._options.vad().prefix_ms)
        said = events.SpeechStarted(audio_start_ms=start_ms, item_id=self._speech_item)
        return [said, *self._responses.voice_interrupts(started.turn)]

    def _speech_stopped(self, at_samples: int) -> list[ServerEvent]:
        item_id, self._speech_item = self._speech_item or new_id("item"), None
        end_ms = at_samples // _SAMPLES_PER_MS + self._options.vad().silence_ms
        self._input.heard()
        said = [events.SpeechStopped(audio_end_ms=end_ms, item_id=item_id), *self._items.add_speech(item_id)]
        if self._options.responds and "audio" not in self._options.modalities:
            said += self._responses.fail(None, NO_TEXT, self._options)
        return said

    def _cleared(self, kept_samples: int) -> list[ServerEvent]:
        self._input.cleared(kept_samples)
        item_id, self._speech_item = self._speech_item, None
        if item_id is None:
            return [events.Cleared()]
        end_ms = self._input.position // _SAMPLES_PER_MS
        return [events.SpeechStopped(audio_end_ms=end_ms, item_id=item_id), events.Cleared()]

    def _native_error(self, error: messages.Error) -> list[ServerEvent]:
        if error.fatal:
            return [*self._responses.session_ended(error.code), server_error(error.code, error.message)]
        match error.in_reply_to:
            case "speak":
                self._responses.refused(error)
            case "input.clear":  # the machine has just begun to speak: there is no input any more
                return self._cleared(0)
            case "interrupt":  # it is too late: nothing can be cut any more
                return self._interruptions.answered()
            case _:
                return [server_error(error.code, error.message)]
        return []


def _not_active() -> EventError:
    return EventError("response_cancel_not_active", "Cancellation failed: no active response found")
