"""OpenAI's Realtime protocol (GA) as a dialect: its events in, native messages to the conversation, and the way back.

What the protocol needs and the conversation does not know is kept here: the ids of responses and items, the formats,
what was committed, and what is held back until a cancelled response is truncated. No socket, no engine, no tensors.

Replies that the conversation has no part in must not overtake its own: each goes in as an `Echo`, and comes out among
the others.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from streaming.audio import FRAME, SAMPLE_RATE, to_int16
from streaming.conversation.conversation import HeardByClock, Received
from streaming.conversation.outbox import Echo
from streaming.errors import ProtocolError
from streaming.protocol import messages
from streaming.protocol.messages import OPEN_TURN, AudioMessage, Message, SamplingOptions
from streaming.server.openai import realtime_events as events
from streaming.server.openai.formats import Decoder, Encoder, Pcm16
from streaming.server.openai.realtime_events import EventError, Item, Limit, ServerEvent
from streaming.server.openai.realtime_options import Model, Options, limit_of, modalities_of, temperature_of
from streaming.server.openai.realtime_response import Response, Status, new_id

TRUNCATE_TIMEOUT_S = 0.5
"""How long a client may take to say what was heard of a response that it cancelled; the native protocol's limit, too.
"""
MAX_HELD_SAMPLES = 30 * SAMPLE_RATE
"""Input that is kept while it cannot be heard, because a response is being spoken. Past this the oldest is dropped."""
_MAX_ITEMS = 256
_MAX_ITEM_BYTES = 2**14
"""Of these items and bytes of their content `conversation.item.retrieve` knows."""
_MAX_WORDS_BYTES = 2**20
_SAMPLES_PER_MS = SAMPLE_RATE // 1000


@dataclass(frozen=True)
class _Asked:
    """A `response.create` that the conversation has accepted or will."""

    event_id: str | None
    metadata: dict[str, str] | None
    limit: Limit


def session_start(model: Model, lead_ms: int) -> messages.SessionStart:
    """The session that a client finds before it has asked for anything."""
    vad = Options().vad()
    return messages.SessionStart(
        turn_taking="vad", vad=vad, lag="wait", max_seconds=model.seconds("inf"), lead_ms=lead_ms
    )


class RealtimeDialect:
    """For one session. give: hands a message to the conversation; clock: in seconds, monotonic."""

    ready = True

    def __init__(self, model: Model, give: Callable[[Received], None], clock: Callable[[], float]) -> None:
        self._model, self._give, self._clock = model, give, clock
        self._session_id, self._conversation_id = new_id("sess"), new_id("conv")
        self._event_prefix, self._events = new_id("event"), 0
        self._options = Options()
        self._updates: deque[Options] = deque()
        self._items: OrderedDict[str, Item] = OrderedDict()
        # Input
        self._decoder = Decoder(self._options.input)
        self._held: deque[Pcm16] = deque()
        self._held_samples = 0
        self._position = 0  # samples given to the conversation
        self._given = 0  # of these, in this turn
        self._committed = 0  # of these, what was committed
        self._uncommitted = 0  # what was not, held or given
        self._cuts: deque[list[ServerEvent]] = deque()  # what to say when an `interrupt` was answered
        self._truncatable_until: float | None = None  # a response was cancelled, and what was heard of it is unsaid
        self._speech_item: str | None = None  # being spoken
        # Output
        self._asked = 0  # `response.create` that the conversation has not accepted yet
        self._refusal: messages.Error | None = None  # of the last one
        self._accepted: deque[_Asked] = deque()
        self._turns = 0  # responses so far, which is also the number of the last one's turn
        self._open: Response | None = None
        self._last: Response | None = None
        self._stream_frames = 0  # what the model has heard and said before this turn
        self._spoken = (0, 0)  # the last turn, and how many frames of it the context keeps

    # Client to server

    def decode(self, data: str | bytes) -> Sequence[Received]:
        try:
            if isinstance(data, bytes):
                raise EventError("invalid_json", "events are text messages, audio goes base64-encoded inside them")
            if len(data) > _MAX_WORDS_BYTES and messages.type_of(data) != "input_audio_buffer.append":
                raise EventError("string_above_max_length", f"at most {_MAX_WORDS_BYTES} bytes but for audio")
            return self._take(events.decode(data))
        except ProtocolError as error:
            rejection = _rejection(error, events.event_id_of(data))
            return [self._in_order(lambda: [rejection])]

    def _take(self, event: events.AnyClientEvent) -> Sequence[Received]:
        match event:
            case events.Append(audio=audio):
                return self._append(audio)
            case events.SessionUpdate(session=session):
                return self._update(session)
            case events.Commit():
                return self._commit(event.event_id)
            case events.Clear():
                return self._clear()
            case events.ResponseCreate():
                return self._create(event.event_id, event.response or events.ResponseOption())
            case events.ResponseCancel():
                return self._cancel(event)
            case events.ItemTruncate():
                return self._truncate(event)
            case events.ItemDelete(item_id=item_id):
                return self._delete(item_id)
            case events.ItemCreate():
                return self._create_item(event)
            case events.ItemRetrieve(item_id=item_id):
                return [self._in_order(lambda: [self._retrieved(item_id, event.event_id)])]
            case events.OutputClear():
                return []

    def _in_order(self, reply: Callable[[], list[ServerEvent]]) -> Echo:
        """Say this once all that was given to the conversation before is handled."""
        return Echo(reply)

    def _update(self, update: events.SessionOption) -> list[Received]:
        before, options = self._options, self._options.updated(update)
        given: list[Received] = []
        if options.input != before.input:
            given += self._input(self._decoder.flush())
            self._decoder = Decoder(options.input)
        if options.detection is not None and before.detection is None:
            given += [*self._cut_by_clock(), *self._release()]
        if options.detection is None and before.detection is not None:
            self._given = self._committed = self._uncommitted = 0
        self._options = options
        self._updates.append(options)
        update_ = messages.SessionUpdate(
            max_seconds=self._model.seconds(options.limit),
            sampling=SamplingOptions(temperature=options.temperature),
            turn_taking="manual" if options.detection is None else "vad",
            vad=options.vad(),
        )
        return [*given, update_]

    def _append(self, audio: bytes) -> list[Received]:
        if len(audio) > events.MAX_AUDIO_BYTES:
            raise EventError("string_above_max_length", "at most 15 MiB of audio at a time", "audio")
        pcm = self._decoder.push(audio)
        given: list[Received] = []
        if self._truncatable_until is not None and self._clock() >= self._truncatable_until:
            given += self._cut_by_clock()
        return [*given, *self._input(pcm)]

    def _input(self, pcm: Pcm16) -> list[Received]:
        """Gives it to the conversation, with all that is held, or holds it, too."""
        self._held.append(pcm)
        self._held_samples += len(pcm)
        self._uncommitted += len(pcm)
        if self._truncatable_until is None and not (self._options.detection is None and self._busy):
            return list(self._release())
        while self._held and self._held_samples - len(self._held[0]) >= MAX_HELD_SAMPLES:
            self._held_samples -= len(self._held.popleft())
        return []

    def _release(self) -> list[AudioMessage]:
        held = np.concatenate([*self._held, np.zeros(0, np.int16)])
        self._held.clear()
        self._held_samples = 0
        size = messages.MAX_AUDIO_SAMPLES
        pieces = [held[at : at + size] for at in range(0, len(held), size)]
        given = []
        for piece in pieces:
            given.append(AudioMessage(OPEN_TURN, self._position, piece))
            self._position += len(piece)
            self._given += len(piece)
        return given

    @property
    def _busy(self) -> bool:
        """Whether a response is being spoken, or will be."""
        return bool(self._asked or self._accepted) or (self._open is not None and self._open.speaking)

    def _end_of_input(self) -> list[Received]:
        """What was appended is complete."""
        return [*self._cut_by_clock(), *self._input(self._decoder.flush())]

    def _commit(self, event_id: str | None) -> list[Received]:
        given = self._end_of_input()
        if self._options.detection is None:
            if not self._uncommitted:
                raise EventError("input_audio_buffer_commit_empty", "there is no audio in the input buffer")
            return [*given, self._commit_manually()]

        def commit() -> list[ServerEvent]:
            item_id, self._speech_item = self._speech_item, None
            if item_id is not None:
                return self._user_item(item_id)
            error = EventError("input_audio_buffer_commit_empty", "no speech is in the input buffer")
            return [_rejection(error, event_id)]

        return [*given, self._in_order(commit)]

    def _commit_manually(self) -> Echo:
        self._committed, self._uncommitted = self._given + self._held_samples, 0
        return self._in_order(lambda: self._user_item(new_id("item")))

    def _clear(self) -> list[Received]:
        given = self._cut_by_clock()
        self._decoder.flush()
        committed = np.concatenate([*self._held, np.zeros(0, np.int16)])[: max(0, self._committed - self._given)]
        self._held.clear()
        self._held.append(committed)
        self._held_samples, self._uncommitted = len(committed), 0
        if self._busy and self._options.detection is None:  # nothing but what was held
            return [*given, self._in_order(lambda: [events.Cleared()])]
        self._given = min(self._given, self._committed)
        return [*given, messages.InputClear(keep_samples=self._committed)]

    def _create(self, event_id: str | None, wanted: events.ResponseOption) -> list[Received]:
        modalities = self._options.modalities
        if wanted.output_modalities is not None:
            modalities = modalities_of(wanted.output_modalities, "response.output_modalities")
        limit = self._options.limit
        if wanted.max_output_tokens is not None:
            limit = limit_of(wanted.max_output_tokens, "response.max_output_tokens")
        given = self._end_of_input()
        if self._busy:
            raise EventError("conversation_already_has_active_response", "a response is being spoken: cancel it first")
        if self._options.detection is None and self._uncommitted:
            given.append(self._commit_manually())
        if "audio" not in modalities:
            return [*given, self._in_order(lambda: self._fail(wanted.metadata, _NO_TEXT))]
        if wanted.conversation == "none" or wanted.input is not None:
            return [*given, self._in_order(lambda: self._fail(wanted.metadata, _ONE_CONVERSATION))]
        self._asked += 1
        self._given = self._committed = 0
        asked = _Asked(event_id, wanted.metadata, limit)
        sampling = self._sampling(wanted.temperature, wanted.metadata)
        speak = messages.Speak(turn=OPEN_TURN, max_seconds=self._model.seconds(limit), sampling=sampling)
        return [*given, speak, self._in_order(lambda: self._answered(asked))]

    def _sampling(self, temperature: float | None, metadata: dict[str, str] | None) -> SamplingOptions | None:
        seed = (metadata or {}).get("seed", "")
        seeded = seed.isascii() and seed.isdigit() and int(seed[:20]) < 2**63
        if temperature is None and not seeded:
            return None
        drawn = self._options.temperature if temperature is None else temperature_of(temperature)
        return SamplingOptions(temperature=drawn, seed=int(seed[:20]) if seeded else None)

    def _cancel(self, cancel: events.ResponseCancel) -> list[Received]:
        response = self._open
        if response is not None and response.speaking and cancel.response_id in (None, response.id):
            return [self._stop(response)]
        if not (self._asked or self._accepted):
            raise _not_active()

        def later() -> list[ServerEvent]:
            if self._open is None or not self._open.speaking or cancel.response_id not in (None, self._open.id):
                return [_rejection(_not_active(), cancel.event_id)]
            self._give(self._stop(self._open))
            return []

        return [self._in_order(later)]

    def _stop(self, response: Response) -> messages.Interrupt:
        """Nothing more of it is sent; what was not heard of what was sent is cut when the client says so."""
        response.speaking = False
        self._truncatable_until = self._clock() + TRUNCATE_TIMEOUT_S
        return self._interrupt(response, response.sent)

    def _cut_by_clock(self) -> list[Received]:
        """The client said nothing of what it heard: what could have been played by the time that it cancelled."""
        if self._truncatable_until is None:
            return []
        self._truncatable_until = None
        assert self._last is not None
        self._cuts.append([])
        return [HeardByClock(self._last.turn)]

    def _interrupt(self, response: Response, heard_samples: int, *then: ServerEvent) -> messages.Interrupt:
        """then: what is said once it is answered."""
        self._cuts.append([*then])
        return messages.Interrupt(turn=response.turn, heard_samples=heard_samples)

    def _truncate(self, truncate: events.ItemTruncate) -> list[Received]:
        item = self._items.get(truncate.item_id)
        if item is None:
            raise EventError("item_truncate_invalid_item_id", "there is no such item", "item_id")
        if item.role != "assistant" or truncate.content_index:
            raise EventError("invalid_value", "only the audio of a response can be truncated", "item_id")
        if not truncate.audio_end_ms >= 0:
            raise EventError("invalid_value", "audio_end_ms must be 0 or more", "audio_end_ms")
        end_ms = int(min(truncate.audio_end_ms, 2**31))
        truncated = events.ItemTruncated(item_id=truncate.item_id, content_index=0, audio_end_ms=end_ms)
        return self._cut(truncate.item_id, end_ms, truncated)

    def _cut(self, item_id: str, heard_ms: int, then: ServerEvent) -> list[Received]:
        """Only the last response can be cut; of all others it is only said."""
        response = self._last
        if response is None or response.item_id != item_id:
            return [self._in_order(lambda: [then])]
        response.speaking = False
        self._truncatable_until = None
        heard = min(heard_ms * _SAMPLES_PER_MS, response.sent)
        return [self._interrupt(response, heard, then), *([] if self._busy else self._release())]

    def _delete(self, item_id: str) -> list[Received]:
        if item_id not in self._items:
            raise EventError("item_delete_invalid_item_id", "there is no such item", "item_id")
        cut = self._cut(item_id, 0, events.ItemDeleted(item_id=item_id))
        del self._items[item_id]
        return cut

    def _create_item(self, create: events.ItemCreate) -> list[Received]:
        given = create.item
        if any(part.get("type") == "input_audio" for part in given.content or ()):
            raise EventError("invalid_value", "audio goes through input_audio_buffer.append", "item.content")
        if given.type == "message" and given.role is None:
            raise EventError("missing_required_parameter", "a message has a role", "item.role")
        item_id = (given.id or new_id("item"))[:128]
        words = msgspec.structs.asdict(given) | {"id": item_id}
        item = Item(**words, object="realtime.item", status="completed")

        def created() -> list[ServerEvent]:
            if item_id in self._items:
                return [_rejection(EventError("item_create_duplicate_item_id", "this id is taken"), create.event_id)]
            last = self._add(item)
            if len(msgspec.json.encode(item)) > _MAX_ITEM_BYTES:
                self._items[item_id] = msgspec.structs.replace(item, content=[], arguments="", output="")
            previous = last if create.previous_item_id not in self._items else create.previous_item_id
            if create.previous_item_id == "root":
                previous = None
            return [
                events.ItemAdded(item=item, previous_item_id=previous),
                events.ItemDone(item=item, previous_item_id=previous),
            ]

        return [self._in_order(created)]

    def _retrieved(self, item_id: str, event_id: str | None) -> ServerEvent:
        item = self._items.get(item_id)
        if item is None:
            return _rejection(EventError("item_retrieve_invalid_item_id", "there is no such item"), event_id)
        return events.ItemRetrieved(item=item)

    # Server to client

    def encode(self, reply: Message | AudioMessage | Echo) -> Sequence[str | bytes]:
        said = []
        for event in self._say(reply):
            self._events += 1
            event.event_id = f"{self._event_prefix}_{self._events}"
            said.append(events.encode(event))
        return said

    def _say(self, reply: Message | AudioMessage | Echo) -> list[ServerEvent]:
        match reply:
            case AudioMessage():
                return self._audio(reply)
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
            case messages.InputCleared():
                return self._cleared()
            case messages.TurnSpeaking():
                return self._turn_speaking(reply)
            case messages.TurnDone():
                return self._turn_done(reply)
            case messages.Interrupted(turn=turn, kept_samples=kept):
                self._keep(turn, kept // FRAME)
                return self._cuts.popleft() if self._cuts else []  # a voice's is answered, too
            case messages.Error():
                return self._native_error(reply)
            case messages.SessionRefused():
                return [_server_error(reply.code, reply.message, reply.retry_after_ms)]
            case messages.SessionClosed(reason=reason):
                code = "session_expired" if reason == "idle" else f"session_{reason}"
                return [*self._failed(reason), _server_error(code, f"the session is over: {reason}")]
        return []

    def _speech_started(self, started: messages.SpeechStarted) -> list[ServerEvent]:
        self._speech_item = new_id("item")
        start_ms = max(0, started.at_samples // _SAMPLES_PER_MS - self._options.vad().prefix_ms)
        said: list[ServerEvent] = [events.SpeechStarted(audio_start_ms=start_ms, item_id=self._speech_item)]
        response = self._open
        if response is not None and response.turn == started.turn and response.speaking:
            self._open = None
            said += self._close(response, "cancelled", "turn_detected")
        return said

    def _speech_stopped(self, at_samples: int) -> list[ServerEvent]:
        item_id, self._speech_item = self._speech_item or new_id("item"), None
        end_ms = at_samples // _SAMPLES_PER_MS + self._options.vad().silence_ms
        self._uncommitted, self._committed = 0, 0
        said = [events.SpeechStopped(audio_end_ms=end_ms, item_id=item_id), *self._user_item(item_id)]
        if self._options.responds and "audio" not in self._options.modalities:
            said += self._fail(None, _NO_TEXT)
        return said

    def _cleared(self) -> list[ServerEvent]:
        item_id, self._speech_item = self._speech_item, None
        if item_id is None:
            return [events.Cleared()]
        end_ms = self._position // _SAMPLES_PER_MS
        return [events.SpeechStopped(audio_end_ms=end_ms, item_id=item_id), events.Cleared()]

    def _user_item(self, item_id: str) -> list[ServerEvent]:
        content = [events.Part(type="input_audio")]
        item = Item(
            id=item_id, type="message", object="realtime.item", status="completed", role="user", content=content
        )
        previous = self._add(item)
        return [
            events.Committed(item_id=item_id, previous_item_id=previous),
            events.ItemAdded(item=item, previous_item_id=previous),
            events.ItemDone(item=item, previous_item_id=previous),
        ]

    def _add(self, item: Item) -> str | None:
        """Returns the item before it."""
        previous = next(reversed(self._items), None)
        self._items[item.id] = item
        while len(self._items) > _MAX_ITEMS:
            self._items.popitem(last=False)
        return previous

    # Responses

    def _answered(self, asked: _Asked) -> list[ServerEvent]:
        """The conversation has handled a `speak`."""
        self._asked -= 1
        refusal, self._refusal = self._refusal, None
        if refusal is None:
            if self._open is None:
                return self._begin(asked)
            self._accepted.append(asked)
            return []
        if refusal.code == "empty_prompt":
            failure = events.Failure(type="invalid_request_error", code=refusal.code, message=refusal.message)
            return self._fail(asked.metadata, failure)
        error = EventError("conversation_already_has_active_response", refusal.message)
        return [_rejection(error, asked.event_id)]

    def _begin(self, asked: _Asked) -> list[ServerEvent]:
        self._turns += 1
        response = self._new_response(self._turns, asked.metadata, asked.limit)
        self._open = self._last = response
        previous = self._add(response.item("in_progress"))
        return response.begun(previous)

    def _new_response(self, turn: int, metadata: dict[str, str] | None, limit: Limit) -> Response:
        options = self._options
        return Response(
            turn, self._model, self._conversation_id, metadata, limit, Encoder(options.output), options.voice
        )

    def _turn_speaking(self, speaking: messages.TurnSpeaking) -> list[ServerEvent]:
        said = []
        if self._turns < speaking.turn:  # the end of speech was the word
            said = self._begin(_Asked(None, None, self._options.limit))
        prompt = speaking.prompt_samples // FRAME
        if self._open is not None and self._open.turn == speaking.turn:
            self._open.prompt_frames, self._open.cached_frames = prompt, self._stream_frames
        self._stream_frames += prompt
        return said

    def _audio(self, audio: AudioMessage) -> list[ServerEvent]:
        response = self._open
        if response is None or response.turn != audio.turn or not response.speaking:
            return []
        response.sent += len(audio.pcm)
        return response.delta(response.encoder.push(to_int16(audio.pcm)))

    def _turn_done(self, done: messages.TurnDone) -> list[ServerEvent]:
        self._spoken = (done.turn, done.samples // FRAME)
        self._stream_frames += done.samples // FRAME
        response = self._open
        if response is None or response.turn != done.turn:
            return []  # closed already, by somebody's voice
        self._open = None
        said: list[ServerEvent] = []
        if done.reason == "interrupted":
            said = self._close(response, "cancelled", "client_cancelled")
        else:
            said = response.delta(response.encoder.flush())
            ended = done.reason == "end" or response.limit == "inf"  # nobody limited it
            said += self._close(response, *(("completed", None) if ended else ("incomplete", "max_output_tokens")))
        if self._accepted:
            said += self._begin(self._accepted.popleft())
        return said

    def _keep(self, turn: int, frames: int) -> None:
        last, kept = self._spoken
        if turn == last:
            self._stream_frames -= max(0, kept - frames)
            self._spoken = (last, min(kept, frames))

    def _close(
        self, response: Response, status: Status, reason: str | None, failure: events.Failure | None = None
    ) -> list[ServerEvent]:
        response.speaking = False
        if response.item_id in self._items:
            self._items[response.item_id] = response.item(status)
        before = list(itertools.takewhile(lambda item_id: item_id != response.item_id, self._items))
        details = events.StatusDetails(type=status, reason=reason, error=failure)
        return response.ended(details, before[-1] if before else None)

    def _fail(self, metadata: dict[str, str] | None, failure: events.Failure) -> list[ServerEvent]:
        """A response that cannot be is still one, and fails: an `error` would end some clients."""
        return self._new_response(0, metadata, self._options.limit).failed(failure)

    def _failed(self, code: str) -> list[ServerEvent]:
        """The end of a response that is being spoken when the session ends."""
        response, self._open = self._open, None
        if response is None:
            return []
        failure = events.Failure(type="server_error", code=code, message="the session ended")
        return self._close(response, "failed", None, failure)

    def _native_error(self, error: messages.Error) -> list[ServerEvent]:
        if error.fatal:
            return [*self._failed(error.code), _server_error(error.code, error.message)]
        match error.in_reply_to:
            case "speak":
                self._refusal = error
            case "input.clear":  # the machine has just begun to speak: there is no input any more
                return self._cleared()
            case "interrupt":  # it is too late: nothing can be cut any more
                return self._cuts.popleft() if self._cuts else []
            case _:
                return [_server_error(error.code, error.message)]
        return []


_NO_TEXT = events.Failure(
    type="invalid_request_error", code="unsupported_modality", message='this model has no words; ask for ["audio"]'
)
_ONE_CONVERSATION = events.Failure(
    type="invalid_request_error",
    code="unsupported_conversation",
    message="a response goes on from what was said in this session, and from nothing else",
)


_NO_TRANSCRIPT = events.Part(type="audio", transcript="")


def _not_active() -> EventError:
    return EventError("response_cancel_not_active", "Cancellation failed: no active response found")


def _rejection(error: ProtocolError, event_id: str | None) -> events.Error:
    code, param = (error.event_code, error.param) if isinstance(error, EventError) else ("invalid_value", None)
    return events.Error(
        error=events.ErrorDetails(
            type="invalid_request_error", code=code, message=str(error)[:1000], param=param, event_id=event_id
        )
    )


def _server_error(code: str, message: str, retry_after_ms: int = 0) -> events.Error:
    details = events.ErrorDetails(type="server_error", code=code, message=message)
    if retry_after_ms:
        details.retry_after_ms = retry_after_ms
    return events.Error(error=details)
