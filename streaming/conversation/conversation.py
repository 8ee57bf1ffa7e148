"""The course of one session: the client's messages, the engine's events and the time go in; replies and commands for
the engine come out.

There is no event loop, socket or thread here, and nothing waits. Whoever drives a conversation

- gives it a message by `receive`, one after another, and only while it is `ready`;
- tells it every event of its engine's session by `happened`, when it happens;
- calls `tick` at its `deadline`;
- takes its replies from the outbox, and says `sent` of each frame of audio when it goes to the socket.

`streaming.server.driver` does so in an event loop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from streaming.audio import FRAME, FRAME_RATE, to_float
from streaming.config import ModelVoices, Sampling
from streaming.conversation import turn_taking
from streaming.conversation.books import ConversationBooks
from streaming.conversation.ends import CLIENT_LEFT, error_message, fatal, idle, stopped
from streaming.conversation.engine_commands import EngineCommands, SessionCommands
from streaming.conversation.outbox import Echo, End, Outbox, Saved
from streaming.conversation.pacing import frames_in, lead_frames
from streaming.conversation.playback import Playback
from streaming.conversation.prompt import Prompt
from streaming.conversation.settings import Settings, sampling_of
from streaming.conversation.takes import Takes
from streaming.engine import events
from streaming.errors import (
    EmptyPromptError,
    PromptTooLongError,
    ProtocolError,
    SavingUnavailableError,
    SessionError,
    StreamingError,
    TakeGoneError,
)
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, ClientMessage, Message, SamplingOptions, UnknownTypeError

MAX_UNSENT = 64
"""Replies that may wait. While more do, no message of the client is handled."""
HEARD_TIMEOUT_S = 0.5
"""A client has this long to say what was heard, when a voice interrupts or an OpenAI response is cancelled."""
_LAGGING_FRAMES = events.QUEUED_FRAMES // 2
_LAGGING_INTERVAL_S = 1.0


class Observer(Protocol):
    """An observer that counts what happens in a session."""

    def said(self, reply: Message | AudioMessage) -> None: ...
    def heard(self) -> None: ...
    def played(self, turn: int, underruns: int, sent_frames: int) -> None: ...


@dataclass(frozen=True, slots=True)
class HeardByClock:
    """A stand-in for a client that has not said what it heard of an interrupted turn: the clock says it."""

    type: ClassVar[str] = str(messages.Interrupt.__struct_config__.tag)
    """The message that it stands for."""

    turn: int


@dataclass(frozen=True, slots=True)
class HeardNothing:
    """A client's word that it heard nothing of this turn, or wants it unsaid. All of it is taken back, and a `speak`
    without new input is another take of the same prompt.
    """

    type: ClassVar[str] = HeardByClock.type

    turn: int


Received = ClientMessage | AudioMessage | ProtocolError | Echo | HeardByClock | HeardNothing
"""A client's message as a dialect has decoded it, or the `ProtocolError` that stands in its place."""


class Conversation:
    """One session that has a slot.

    start: what the client asked for, its sampling filled. usual: how it is filled in later messages, with the session's
    seed. rewind_frames: how far an interruption can reach back. idle_s: a client that does nothing for so long is told
    goodbye. sent_is_heard: a client that plays whatever it is sent, and never says what it heard. takes: of which turns
    another take can be had, if this client may. books: of the conversation that this one goes on with, whose client is
    told nothing of that; its takes are gone. saves: whether this client may have the session. voices: those in which
    the model goes on, where it has names for them. turn_ended: is given the session as it is at the end of each turn,
    with books to go on with it from there. `end` is set once the session is over; it is the last reply, too.
    """

    def __init__(
        self,
        engine: SessionCommands,
        outbox: Outbox,
        start: messages.SessionStart,
        usual: Sampling,
        *,
        rewind_frames: int,
        idle_s: float,
        observer: Observer,
        now: float,
        sent_is_heard: bool = False,
        takes: Takes | None = None,
        books: ConversationBooks | None = None,
        saves: bool = False,
        voices: ModelVoices | None = None,
        turn_ended: Callable[[Any, ConversationBooks], None] | None = None,
    ) -> None:
        self._engine, self._outbox, self._observer, self._idle_s = EngineCommands(engine), outbox, observer, idle_s
        self._fast, self._drops = start.pace == "fast", start.lag == "drop" and start.pace == "realtime"
        self._sent_is_heard = sent_is_heard
        self._lead_frames = lead_frames(start, rewind_frames)
        self.end: End | None = None
        self._start = start
        self._settings, self._applied = Settings(books or start, usual), start.sampling
        # Input
        self._prompt = Prompt()
        self._position = 0  # samples of input so far
        self._anew = False  # whether the next input may begin at any position
        self._turn = 1  # the turn that input belongs to
        self._patient_until = 0  # the position up to which no input is dropped
        self._lagging_told_at = -math.inf
        self._taker = turn_taking.TurnTaker(start.vad) if start.turn_taking == "vad" else None
        self._takes = takes
        self._tip = 0  # the turn at whose end the stream is, or was before this prompt
        # Output
        self._playback: Playback | None = None  # of the turn that is spoken, or was spoken last
        self._cut: dict[int, int] = {}  # samples that were sent of turns that were interrupted and are not done yet
        self._heard_due: float | None = None  # until when the client may say what it heard of an interrupted turn
        self._taking_back: int | None = None  # a turn of which nothing is to be kept; the engine has not answered yet
        self._unsaid: tuple[int, int] | None = None  # such a turn, and how many frames of it could not be taken back
        self._keeps: deque[Callable[[Any], None]] = deque()  # who waits for a snapshot, in order
        self._saves, self._voices, self._turn_ended = saves, voices, turn_ended
        self._draining = False
        self._active_at = now
        if books is not None:
            self._go_on_with(books, now)

    # Books

    @property
    def calm(self) -> bool:
        """Return whether the engine has all it was told: nothing waits for room, and no answer makes more commands."""
        interrupting = self._taker is not None and self._taker.state is turn_taking.TurnState.INTERRUPTING
        answered = self._taking_back is None and not (interrupting and self._heard_due is None)
        return answered and not self._engine.waiting

    def books(self, now: float) -> ConversationBooks:
        """Return all that another conversation needs to go on with this one, its engine's session and replies apart.

        They fit a snapshot of that session where this was `calm` when the snapshot was asked for, nothing was received
        since, and the books are written when the engine has told all that was before the snapshot.
        """
        settings = self._settings
        return ConversationBooks(
            start=self._start,
            sampling=settings.sampling,
            max_seconds=settings.max_seconds,
            vad=settings.vad,
            applied=self._applied,
            anew=self._anew,
            prompt=self._prompt.books(),
            taker=None if self._taker is None else self._taker.books(),
            playback=None if self._playback is None else self._playback.books(now),
            position=self._position,
            patient_until=self._patient_until,
            turn=self._turn,
            tip=self._tip,
            cut=dict(self._cut),
            heard_due_s=None if self._heard_due is None else max(0.0, self._heard_due - now),
            unsaid=self._unsaid,
        )

    def _go_on_with(self, books: ConversationBooks, now: float) -> None:
        self._applied, self._prompt, self._anew = books.applied, Prompt(books.prompt), books.anew
        self._position, self._patient_until = books.position, books.patient_until
        self._turn, self._tip, self._cut = books.turn, books.tip, dict(books.cut)
        self._unsaid = books.unsaid
        self._taker = None if books.taker is None else turn_taking.TurnTaker.of(books.taker, books.vad)
        self._playback = None if books.playback is None else Playback.of(books.playback, now)
        self._heard_due = None if books.heard_due_s is None else now + books.heard_due_s

    @property
    def ready(self) -> bool:
        """Return whether the next message may be given."""
        return not self._engine.waiting and self._taking_back is None and len(self._outbox) < MAX_UNSENT

    @property
    def hears_voice(self) -> bool:
        """Return whether audio has to come with probabilities of speech."""
        return self._taker is not None

    def deadline(self, now: float) -> float:
        """Return when to call `tick`, if nothing happens before."""
        deadline = self._active_at + self._idle_s
        if self._heard_due is not None:
            deadline = min(deadline, self._heard_due)
        if self._playback is not None and not self._playback.over and not self._fast:
            next_frame = self._playback.next_frame_at(now)
            deadline = deadline if next_frame is None else min(deadline, next_frame)
        return deadline

    def keep(self, kept: Callable[[Any], None]) -> None:
        """Have the engine's session copied out as it is once all that it was told before has happened. kept: is given
        the snapshot.
        """
        self._keeps.append(kept)
        self._engine.keep()

    # What comes in

    def receive(self, received: Received, now: float, probabilities: Sequence[float] = ()) -> None:
        """Handle what the client said. probabilities: of speech, for each window that audio completes."""
        if self.end is not None:
            return
        self._active_at = now
        try:
            self._handle(received, now, probabilities)
        except UnknownTypeError as error:
            self._say(error_message(error, in_reply_to=error.kind))
        except (ProtocolError, PromptTooLongError) as error:
            self.finish(fatal(error))
        except SessionError as error:
            kind = received.type if isinstance(received, Message | HeardByClock | HeardNothing) else None
            self._say(error_message(error, in_reply_to=kind))
        except StreamingError as error:
            self.finish(fatal(error))

    def happened(self, event: events.Event, now: float) -> None:
        """Take note of what the engine's session tells."""
        if self.end is None:
            try:
                self._note(event, now)
            except StreamingError as error:
                self.finish(fatal(error))

    def sent(self, turn: int, now: float) -> None:
        """Note that a frame of this turn goes to the socket, as all before it did."""
        playback = self._playback
        if playback is None or playback.turn != turn:
            return
        playback.sent(now)
        if self._fast:
            playback.report(playback.sent_samples)  # whatever is sent counts as played
            self._look_at_playback(now)

    def tick(self, now: float) -> None:
        """Do what is due at this time."""
        if self.end is not None:
            return
        try:
            self._look_at_clock(now)
        except StreamingError as error:
            self.finish(fatal(error))

    def expect_replay(self, position_samples: int) -> None:
        """Drop no input up to this position: it was said without a connection, and comes faster than it was said."""
        self._patient_until = position_samples

    def drain(self) -> None:
        """End when this turn is over, now if the session is listening: the server will stop."""
        self._draining = True
        if not self._speaking:
            self.finish(stopped())

    def finish(self, end: End) -> None:
        """End at once, unless the session is over."""
        if self.end is None:
            self.end = end
            self._engine.clear()
            if self._takes is not None:
                self._takes.clear()
            self._outbox.put(end)

    # Events and time

    def _note(self, event: events.Event, now: float) -> None:
        match event:
            case events.FrameSpoken(turn, index):
                if self._playback is not None and turn == self._playback.turn and not self._playback.over:
                    if index == 0 and self._voices is not None and (voice := self._voices.of(event.codes)):
                        self._say(messages.TurnVoice(turn=turn, voice=voice))
                    self._say(AudioMessage(turn, index * FRAME, event.pcm16))
            case events.FrameHeard():
                self._observer.heard()
                self._engine.heard()
            case events.TurnSpeaking(turn, prompt, dropped):
                self._say(
                    messages.TurnSpeaking(turn=turn, prompt_samples=prompt * FRAME, dropped_samples=dropped * FRAME)
                )
            case events.TurnDone():
                self._turn_done(event, now)
            case events.Interrupted(turn, kept):
                if turn == self._taking_back:
                    kept = self._took_back(turn, kept)
                self._say(messages.Interrupted(turn=turn, kept_samples=kept * FRAME))
                if self._taker is not None and self._playback is not None and turn == self._playback.turn:
                    self._heard_due = None
                    self._act(self._taker.interrupted(), now)
            case events.InputCleared(turn, kept_frames=kept):
                self._prompt.cleared(kept)
                self._say(messages.InputCleared(turn=turn, kept_samples=kept * FRAME))
            case events.Marked(held_bytes):
                if self._takes is not None:
                    self._give_up(self._takes.hold(held_bytes))
            case events.Kept(snapshot):
                self._keeps.popleft()(snapshot)
            case events.Failed(error):
                self.finish(fatal(error))

    def _look_at_clock(self, now: float) -> None:
        if self._heard_due is not None and now >= self._heard_due and self._playback is not None:
            self._interrupt(self._playback, self._playback.played_samples(now), now)
        self._look_at_playback(now)
        if self._speaking:
            self._active_at = now  # being spoken to counts as doing something
        if now >= self._active_at + self._idle_s:
            self.finish(idle(self._idle_s))

    # Messages

    def _handle(self, received: Received, now: float, probabilities: Sequence[float]) -> None:
        match received:
            case AudioMessage():
                self._hear(received, now, probabilities)
            case ProtocolError():
                raise received
            case messages.Played(turn=turn, samples=samples, underruns=underruns):
                if self._playback is not None and turn == self._playback.turn:
                    self._playback.report(samples)
                    self._observer.played(turn, underruns, self._playback.sent_frames)
                    self._look_at_playback(now)
            case messages.Speak(turn=turn):
                if turn not in (messages.OPEN_TURN, self._turn):
                    raise SessionError(f"speak for turn {turn}, but this is turn {self._turn}")
                self._speak(received.max_seconds, received.sampling, now)
            case messages.Take(turn=turn):
                self._take(turn, received.max_seconds, received.sampling, now)
            case messages.TakeKeep(turn=turn):
                self._keep_take(turn, now)
            case messages.InputClear(keep_samples=keep):
                self._clear(keep)
            case messages.Interrupt(turn=turn, heard_samples=heard):
                self._interrupt(self._playback_of(turn), heard, now)
            case HeardByClock(turn):
                playback = self._playback_of(turn)
                played = playback.played_samples(now)
                if played < FRAME:
                    self._take_back(playback, now)
                else:
                    self._interrupt(playback, played, now)
            case HeardNothing(turn):
                self._take_back(self._playback_of(turn), now)
            case messages.Ping(id=number, client_time_ms=sent):
                self._say(messages.Pong(id=number, client_time_ms=sent, server_time_ms=1e3 * now))
            case messages.SessionUpdate():
                self._update(received, now)
            case messages.SessionSave():
                self._save()
            case messages.SessionClose():
                self.finish(CLIENT_LEFT)
            case Echo():
                self._outbox.put(received)
            case _:
                raise SessionError("the session has started already")

    def _say(self, reply: Message | AudioMessage) -> None:
        self._observer.said(reply)
        self._outbox.put(reply)

    @property
    def _speaking(self) -> bool:
        """Whether, as far as the client has been told, this turn is being spoken."""
        return self._playback is not None and self._playback.turn == self._turn

    def _playback_of(self, turn: int) -> Playback:
        if self._playback is None or turn != self._playback.turn:
            raise SessionError(f"turn {turn} is not being spoken, nor was it last")
        return self._playback

    # Listening

    def _hear(self, audio: AudioMessage, now: float, probabilities: Sequence[float]) -> None:
        if self._anew and audio.position_samples >= self._position:
            self._begin_anew(audio.position_samples)
        if audio.position_samples != self._position:
            raise ProtocolError(f"audio at sample {audio.position_samples}, but {self._position} were sent before it")
        self._position += len(audio.pcm)
        if self._taker is not None:
            self._act(self._taker.push(to_float(audio.pcm), probabilities), now)
        elif audio.turn > self._turn:
            raise ProtocolError(f"audio of turn {audio.turn}, but this is turn {self._turn}")
        elif audio.turn in (messages.OPEN_TURN, self._turn) and not self._speaking:
            self._listen(self._prompt.push(audio.pcm), now)

    def _begin_anew(self, position: int) -> None:
        """Go on at this position of the input: what came before it is lost."""
        self._anew, self._position = False, position
        if self._taker is not None:
            self._taker = turn_taking.TurnTaker(self._settings.vad, position)

    def _listen(self, frames: Iterable[NDArray[np.float32]], now: float) -> None:
        """Have the engine hear these frames. When it has no room they wait or are dropped, as the client chose.

        frames: float32 [1920] each, or fewer samples where what is said ends.
        """
        dropped, drops = 0, self._drops and self._position > self._patient_until
        for frame in frames:
            if not self._prompt.frames:
                self._mark_end()
            if self._engine.listen(frame, patient=not drops):
                self._prompt.frames += 1
            else:
                dropped += len(frame)
        if dropped:
            self._say(messages.InputDropped(turn=self._turn, samples=dropped))
        behind = self._engine.behind_frames
        if drops and behind >= _LAGGING_FRAMES and now >= self._lagging_told_at + _LAGGING_INTERVAL_S:
            self._lagging_told_at = now
            self._say(messages.InputLagging(turn=self._turn, behind_ms=1e3 * behind / FRAME_RATE))

    def _act(self, actions: list[turn_taking.Action], now: float) -> None:
        """Do what the turn taker decided, in order."""
        for action in actions:
            match action:
                case turn_taking.Listen(pcm):
                    self._listen(self._prompt.push(pcm), now)
                case turn_taking.SpeechStarted(at):
                    self._prompt.speech_from = self._prompt.frames
                    self._say(messages.SpeechStarted(turn=self._turn, at_samples=at))
                case turn_taking.SpeechStopped(at):
                    self._say(messages.SpeechStopped(turn=self._turn, at_samples=at))
                case turn_taking.Speak():
                    self._go_on(now)
                case turn_taking.BargeIn(at):
                    self._barge_in(at, now)

    def _go_on(self, now: float) -> None:
        """Speak, because the person's speech has ended."""
        assert self._taker is not None
        try:
            self._continue(self._settings.max_seconds, self._settings.sampling, now)
        except EmptyPromptError as error:  # the engine had no room for any of it
            self._say(error_message(error))
            self._taker.speaking_ended()

    def _barge_in(self, at_samples: int, now: float) -> None:
        """Tell the client that a voice interrupts. The client answers what it heard."""
        assert self._taker is not None
        playback = self._playback
        if playback is None:  # there is nothing to interrupt, see `_go_on`
            self._prompt.speech_from = self._prompt.frames
            self._say(messages.SpeechStarted(turn=self._turn, at_samples=at_samples))
            self._act(self._taker.interrupted(), now)
            return
        playback.stop(now)
        self._prompt.speech_from = 0
        self._say(messages.SpeechStarted(turn=playback.turn, at_samples=at_samples))
        if self._sent_is_heard:
            self._interrupt(playback, playback.sent_samples, now)
        else:
            self._heard_due = now + HEARD_TIMEOUT_S

    def _clear(self, keep_samples: int) -> None:
        """Take back the prompt but for its beginning or, in vad mode, but for what was said before this speech."""
        if self._speaking:
            raise SessionError("the session is speaking: there is no prompt to be cleared")
        keep = min(keep_samples, self._prompt.samples)
        if self._taker is not None:
            hearing = self._taker.state is turn_taking.TurnState.HEARING
            keep = FRAME * (self._prompt.speech_from if hearing else self._prompt.frames)
            self._taker.clear()
        self._engine.clear_input(self._prompt.keep(keep))

    # Speaking

    def _speak(self, max_seconds: float | None, sampling: SamplingOptions | None, now: float) -> None:
        """Speak, because the client asked for it."""
        if self._speaking:
            raise SessionError("the session is already speaking")
        self._stop_playing()
        settings = self._settings
        options = settings.sampling if sampling is None else settings.filled(sampling)
        if self._unsaid is not None and not self._prompt.samples:
            turn, left = self._unsaid
            if self._takes is not None and turn in self._takes:
                self._take(turn, max_seconds, sampling, now)
                return
            if left:
                raise TakeGoneError(
                    f"{left} frames of what was said could not be taken back, and the end of the prompt is not kept: "
                    "say something first"
                )
            options = self._another_sampling(sampling)
        self._continue(settings.max_seconds if max_seconds is None else max_seconds, options, now)
        if self._taker is not None:
            self._act(self._taker.speak(), now)

    def _continue(self, max_seconds: float, options: SamplingOptions, now: float) -> None:
        rest = self._prompt.rest()
        if len(rest):
            self._listen([rest], now)
        if self._turn == 1 and not self._prompt.frames:
            raise EmptyPromptError("nothing was heard yet: send at least one sample of speech first")
        if self._takes is not None:
            self._mark_end()
            self._engine.mark(f"prompt {self._turn}")
            self._give_up(self._takes.keep_prompt(self._turn, f"prompt {self._turn}"))
        self._go(max_seconds, options)

    def _go(self, max_seconds: float, options: SamplingOptions) -> None:
        """Have the engine speak this turn."""
        if options != self._applied:
            self._applied = options
            self._engine.configure(sampling_of(options))
        self._engine.speak(self._turn, frames_in(max_seconds), self._lead_frames)
        self._playback = Playback(self._turn)
        self._prompt.begin()
        self._tip = self._turn
        self._unsaid = None

    def _stop_playing(self) -> None:
        """Take what is still being played for heard. Raises `SessionError` while a voice interrupts."""
        if self._taker is not None:
            if self._taker.state is turn_taking.TurnState.INTERRUPTING or self._heard_due is not None:
                raise SessionError("the session is being interrupted: say what was heard first")
            if self._taker.state is turn_taking.TurnState.SPEAKING:
                self._taker.speaking_ended()

    # Takes

    def _take(self, turn: int, max_seconds: float | None, sampling: SamplingOptions | None, now: float) -> None:
        """Speak anew from the end of a turn's prompt, as another turn."""
        takes, settings = self._may_go_back(), self._settings
        mark = takes.prompt(turn)
        self._drop_prompt()
        own = self._another_sampling(sampling)
        self._engine.go_back(mark)
        self._say(messages.TakeStarted(turn=self._turn, of=turn, sampling=own))
        self._give_up(takes.keep_prompt(self._turn, mark))
        self._go(settings.max_seconds if max_seconds is None else max_seconds, own)
        if self._taker is not None:
            self._act(self._taker.speak(), now)

    def _another_sampling(self, sampling: SamplingOptions | None) -> SamplingOptions:
        """Return how a take is drawn: with a seed of its own unless it was given one. With the same seed it would say
        the same.
        """
        settings = self._settings
        own = settings.sampling if sampling is None else settings.filled(sampling)
        if sampling is None or sampling.seed is None:
            assert own.seed is not None
            own = structs.replace(own, seed=(own.seed + self._turn) % 2**63)
        return own

    def _keep_take(self, turn: int, now: float) -> None:
        """Go on from the end of a turn, whatever was said after it."""
        takes = self._may_go_back()
        if turn != self._tip or self._prompt.frames:
            mark = takes.end(turn)
            self._drop_prompt()
            self._engine.go_back(mark)
            self._tip = turn
            self._playback = None  # nothing of it can be cut any more
            self._keep_end(now)
        self._say(messages.TakeKept(turn=self._turn, of=turn))

    def _may_go_back(self) -> Takes:
        """Return what there is to go back to. Raises `SessionError` where this cannot be now."""
        if self._takes is None:
            raise SessionError("takes are not kept: session.start asks for them, and session.started says how many")
        if self._speaking:
            raise SessionError("the session is speaking: interrupt it first")
        self._stop_playing()
        return self._takes

    def _drop_prompt(self) -> None:
        """Keep the end of the last turn, and forget what was said since."""
        if not self._prompt.frames:
            self._mark_end()
        self._prompt.rest()
        self._prompt.begin()
        if self._taker is not None:
            self._taker.clear()

    def _mark_end(self) -> None:
        """Keep the end of the turn that the stream has reached, unless it is kept already."""
        if self._takes is not None and self._takes.wants_end(self._tip):
            self._engine.mark(f"end {self._tip}")
            self._takes.keep_end(self._tip, f"end {self._tip}")

    def _give_up(self, marks: Iterable[str]) -> None:
        for mark in marks:
            self._engine.unmark(mark)

    def _interrupt(self, playback: Playback, heard_samples: int, now: float) -> None:
        """Stop speaking this turn, of which so much was heard: never more than was sent."""
        turn, heard = playback.turn, min(heard_samples, playback.sent_samples)
        self._heard_due = None
        playback.stop(now)
        playback.over = True
        self._outbox.cut(turn, playback.sent_samples)
        if turn == self._turn:
            self._cut[turn] = playback.sent_samples
        self._engine.interrupt(turn, heard)
        self._turn_is_over(turn)
        self._keep_end(now)

    def _take_back(self, playback: Playback, now: float) -> None:
        """Speak no more of this turn, and keep nothing of it: no message is handled until it is known what is left."""
        self._taking_back = playback.turn
        self._interrupt(playback, 0, now)

    def _took_back(self, turn: int, kept: int) -> int:
        """Go back to the end of the turn's prompt if that many frames were left. Return how many are left then."""
        self._taking_back = None
        if self._prompt.frames:  # too late: what the person said next follows these frames
            return kept
        if kept and self._takes is not None and turn in self._takes:
            self._engine.go_back(self._takes.prompt(turn))
            kept = 0
        self._unsaid = turn, kept
        return kept

    def _turn_done(self, done: events.TurnDone, now: float) -> None:
        self._say(
            messages.TurnDone(
                turn=done.turn,
                reason="max_seconds" if done.reason == "max_frames" else done.reason,
                samples=self._cut.pop(done.turn, done.frames * FRAME),
                first_frame_ms=done.first_frame_ms,
                mean_step_ms=done.mean_step_ms,
            )
        )
        self._turn_is_over(done.turn)
        if done.reason != "interrupted":  # an interrupted turn was kept when it was interrupted
            self._keep_end(now)
        self._active_at = now  # the client may have listened all the while
        if self._playback is not None and self._playback.turn == done.turn:
            self._playback.frames = done.frames
            self._look_at_playback(now)
        if self._draining and not self._speaking:
            self.finish(stopped())

    def _turn_is_over(self, turn: int) -> None:
        """Count input to the turn after this one from here on."""
        self._turn = max(self._turn, turn + 1)

    def _keep_end(self, now: float) -> None:
        """Tell what the session is now that a turn is over, and nothing is said in the next."""
        if self._turn_ended is not None and not self._prompt.frames:
            ended, books = self._turn_ended, self.books(now).at_rest(self._turn)
            self.keep(lambda snapshot: ended(snapshot, books))

    def _look_at_playback(self, now: float) -> None:
        """Let the engine run on as far as the client has played, and note when it has played everything."""
        playback = self._playback
        if playback is None or playback.over:
            return
        played = playback.played_samples(now)
        self._engine.release(playback.turn, played // FRAME)
        if playback.frames is not None and played >= playback.frames * FRAME:
            playback.over = True
            if self._taker is not None:
                self._taker.speaking_ended()

    # Saved sessions

    def _save(self) -> None:
        """Give the client its session."""
        if not self._saves:
            raise SavingUnavailableError(
                "this server does not give sessions away; it would have to run with --allow-save"
            )
        if self._speaking:
            raise SessionError("the session is speaking: let it end, or interrupt it first")
        turn = self._turn
        self.keep(lambda snapshot: self._outbox.put(Saved(turn, snapshot)))

    # Settings

    def _update(self, update: messages.SessionUpdate, now: float) -> None:
        settings = self._settings
        settings.update(update)
        if update.vad is not None and self._taker is not None:
            self._taker.configure(update.vad)
        if update.turn_taking == "vad" and self._taker is None:
            self._taker = turn_taking.TurnTaker(settings.vad, self._position)
            if self._playback is not None and not self._playback.over:
                self._taker.speak()
        elif update.turn_taking == "manual" and self._taker is not None:
            self._take_no_turns(self._taker, now)
        self._say(
            messages.SessionUpdated(
                max_seconds=settings.max_seconds,
                sampling=settings.sampling,
                turn_taking="manual" if self._taker is None else "vad",
                vad=settings.vad,
            )
        )

    def _take_no_turns(self, taker: turn_taking.TurnTaker, now: float) -> None:
        """Change from vad to manual turns. What is being said is the beginning of a prompt."""
        self._taker = None
        if self._heard_due is not None and self._playback is not None:
            self._interrupt(self._playback, self._playback.played_samples(now), now)
        actions = taker.interrupted() if taker.state is turn_taking.TurnState.INTERRUPTING else []
        if taker.state is turn_taking.TurnState.HEARING:
            actions += taker.speak()  # tells the end of the speech
        self._act([action for action in actions if not isinstance(action, turn_taking.Speak)], now)
