"""The course of one session, whatever its dialect and whichever socket it has just now: client messages in, server
messages out, and between them the engine's events.

Everything that happens to a session arrives in one inbox and is handled in order by one task, so nothing here needs a
lock. `streaming.server.native` moves messages between a socket, the inbox and the outbox.

Bounds: at most `_UNHANDLED` messages wait in the inbox; after that `receive` waits, the socket is not read, and TCP
holds the client back. Audio in the outbox is bounded by the session's lead, since a frame is released only once it is
sent; messages are not handled while `_UNSENT` of whatever kind wait to be sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray
from websockets.frames import CloseCode

from streaming.audio import FRAME, FRAME_RATE, SAMPLE_RATE, Framer, to_float, to_int16
from streaming.config import Sampling
from streaming.conversation import turn_taking
from streaming.conversation.playback import Playback
from streaming.engine import events
from streaming.engine.engine import Engine
from streaming.engine.session import QUEUED_FRAMES, LiveSession
from streaming.errors import EngineFullError, PromptTooLongError, ProtocolError, SessionError, StreamingError
from streaming.models import voice_activity
from streaming.protocol import messages
from streaming.protocol.messages import (
    AudioMessage,
    ClientMessage,
    Message,
    SamplingOptions,
    SessionStart,
    UnknownTypeError,
)
from streaming.server.admission import Admission, StoppingError
from streaming.server.outbox import End, Outbox
from streaming.server.watch.observer import SessionObserver

_LOG = logging.getLogger(__name__)

_UNHANDLED = 16
_UNSENT = 64
_HEARD_TIMEOUT_S = 0.5
"""How long a client may take to say what was heard when a voice interrupts it."""
_RETRY_AFTER_S = 1.0
_LAGGING_FRAMES = QUEUED_FRAMES // 2
_LAGGING_INTERVAL_S = 1.0
_FAST_LEAD_FRAMES = 16
"""How many frames may wait for the socket at fast pace."""


@dataclass(slots=True)
class _Playing:
    """The continuation that is being spoken and played, or was last. frames: its length, once it is complete."""

    turn: int
    playback: Playback = field(default_factory=Playback)
    frames: int | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class _Sending:
    """A frame of this turn is being written to the socket, and all before it are."""

    turn: int


@dataclass(frozen=True, slots=True)
class _Tick:
    """It is time to look at the playback of this turn."""

    turn: int


@dataclass(frozen=True, slots=True)
class _HeardTimeout:
    """The client should have said by now what it heard of this turn."""

    turn: int


@dataclass(frozen=True, slots=True)
class _Drain:
    """The server will stop: end when this turn is over."""


@dataclass(frozen=True, slots=True)
class _IdleCheck:
    """It is time to look whether the client still does anything."""


_Happening = events.Event | _Sending | _Tick | _HeardTimeout | _Drain | _IdleCheck
Received = ClientMessage | AudioMessage | ProtocolError
_Item = Received | _Happening | End


def _frames(seconds: float) -> int:
    return max(1, math.ceil(seconds * FRAME_RATE - 1e-9))


def _sampling(options: SamplingOptions) -> Sampling:
    assert options.seed is not None
    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


class Conversation:
    """One session. `run` returns when it is over and its slot is free; its last reply is an `End`.

    resume: where the client may come back after its connection was lost, as it is told.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        start: SessionStart,
        idle_s: float,
        resume: messages.Resumption | None = None,
        *,
        observer: SessionObserver,
    ) -> None:
        self._engine, self._admission, self._start, self._idle_s = engine, admission, start, idle_s
        self._resume, self._observer = resume, observer
        self._loop = asyncio.get_running_loop()
        self.outbox = Outbox()
        self._inbox: asyncio.Queue[_Item] = asyncio.Queue()
        self._unhandled = 0
        self._handled = asyncio.Event()
        self._left = asyncio.Event()
        self._heard = asyncio.Event()
        self._framer = Framer(np.float32)
        self._position = 0  # samples of input so far
        self._prompt_frames = 0  # given to the engine in this turn
        self._speech_from = 0  # of these, what was said before the speech that is being heard (vad)
        self._patient_until = 0  # the position up to which no input is dropped
        self._turn = 1  # the one that input belongs to
        self._playing: _Playing | None = None
        self._awaiting_heard = False
        self._draining = False
        self._active_at = self._loop.time()
        self._lagging_told_at = -math.inf
        seed = secrets.randbits(63) if start.sampling.seed is None else start.sampling.seed
        self._options = msgspec.structs.replace(start.sampling, seed=seed)
        self._max_seconds = start.max_seconds
        self._vad = start.vad
        self._drops = start.lag == "drop" and start.pace == "realtime"

    async def run(self) -> None:
        """The whole life of the session."""
        try:
            if self._start.turn_taking == "vad":
                await asyncio.to_thread(voice_activity.load_vad_model)
            end = await self._converse(await self._wait_for_slot())
        except StreamingError as error:
            end = _GONE if self._left.is_set() else refusal(error)
        except Exception:  # the boundary of a session: a fault of ours is told, and is not the other sessions'
            _LOG.exception("a session failed")
            end = End(_INTERNAL, CloseCode.INTERNAL_ERROR, _INTERNAL.message)
        self._observer.ended(end)
        self.outbox.put(end)

    # From whoever has the socket

    async def room(self) -> None:
        """Waits until the client may say more."""
        while self._unhandled >= _UNHANDLED:
            self._handled.clear()
            await self._handled.wait()

    def give(self, received: Received) -> None:
        """What the client said, or why it could not be understood."""
        self._unhandled += 1
        self._inbox.put_nowait(received)

    def sending(self, reply: AudioMessage) -> None:
        """This is being written to the socket, and all before it is."""
        self._inbox.put_nowait(_Sending(reply.turn))

    def expect_replay(self, position_samples: int) -> None:
        """What the client said while it had no connection comes faster than it was said: none of it is dropped."""
        self._patient_until = position_samples

    # From the server

    def leave(self) -> None:
        """Ends the session because its client is gone for good: nothing that it said matters any more."""
        self._left.set()
        self.outbox.clear()  # whoever waits on the client's behalf need not
        self._heard.set()
        self._inbox.put_nowait(_GONE)

    def drain(self) -> None:
        """Ends the session when its turn is over, now if it is listening: the server will stop."""
        self._inbox.put_nowait(_Drain())

    def stop(self) -> None:
        """Ends the session at once: the server stops."""
        self._inbox.put_nowait(_stopped())

    def revoke(self) -> None:
        """Ends the session because its token is no longer valid."""
        message = "the token was revoked"
        error = messages.Error(code="unauthorized", message=message, fatal=True)
        self._inbox.put_nowait(End(error, CloseCode.POLICY_VIOLATION, message))

    # Opening

    async def _wait_for_slot(self) -> LiveSession:
        """A slot, perhaps after some time in line; nobody stands in line for a client that has left."""

        def waiting(place: int) -> None:
            self._send(messages.SessionQueued(place=place))

        slides = self._start.overflow == "slide"
        slot = asyncio.create_task(self._admission.attach(self._take, _sampling(self._options), slides, waiting))
        left = asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait((slot, left), return_when=asyncio.FIRST_COMPLETED)
            if not slot.done():
                raise StoppingError("the client left the line")
            return slot.result()
        finally:
            slot.cancel()
            left.cancel()

    async def _converse(self, live: LiveSession) -> End:
        try:
            self._begin(live)
            return await self._serve()
        finally:
            live.close()
            self._admission.released()

    def _begin(self, live: LiveSession) -> None:
        start = self._start
        self._live, self._applied = live, self._options
        self._taker: turn_taking.TurnTaker | None = None
        if start.turn_taking == "vad":
            self._taker = self._turn_taker()
        if start.pace == "fast":
            self._lead_frames = _FAST_LEAD_FRAMES
        else:
            self._lead_frames = max(1, min(_frames(start.lead_ms / 1e3), self._engine.rewind_frames))
        self._send(
            messages.SessionStarted(
                session=secrets.token_hex(8),
                protocol=messages.PROTOCOL_VERSION,
                model=self._engine.model,
                num_codebooks=self._engine.num_codebooks,
                sample_rate=SAMPLE_RATE,
                frame_samples=FRAME,
                context_samples=self._engine.context_frames * FRAME,
                rewind_samples=self._engine.rewind_frames * FRAME,
                seed=live.seed,
                turn=self._turn,
                notice=self._engine.notice,
                resume=self._resume,
            )
        )

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.Heard | events.Failed):
            self._heard.set()  # not through the inbox: its reader may be waiting for just this
        if isinstance(event, events.Heard):
            self._observer.heard()
        else:
            self._inbox.put_nowait(event)

    def _send(self, reply: Message | AudioMessage) -> None:
        self._observer.said(reply)
        self.outbox.put(reply)

    # Handling, in order

    async def _serve(self) -> End:
        self._look_whether_idle()
        while True:
            item = await self._inbox.get()
            if self._left.is_set():
                return _GONE
            try:
                match item:
                    case Message() | AudioMessage() | ProtocolError():
                        self._unhandled -= 1
                        self._handled.set()
                        self._active_at = self._loop.time()
                        await self.outbox.fewer_than(_UNSENT)  # who asks and never reads is not listened to
                        end = None if self._left.is_set() else await self._handle_message(item)
                    case End():
                        return item
                    case _:
                        end = await self._handle_event(item)
            except UnknownTypeError as error:
                self._send(_error(error, in_reply_to=error.kind))
            except ProtocolError as error:
                return End(_error(error, fatal=True), CloseCode.INVALID_DATA, _short(error))
            except PromptTooLongError as error:
                return End(_error(error, fatal=True), CloseCode.POLICY_VIOLATION, _short(error))
            except SessionError as error:
                self._send(_error(error, in_reply_to=item.type if isinstance(item, Message) else None))
            except StreamingError as error:
                return End(_error(error, fatal=True), CloseCode.INTERNAL_ERROR, _short(error))
            else:
                if end is not None:
                    return end

    async def _handle_message(self, received: Received) -> End | None:
        match received:
            case AudioMessage():
                await self._hear(received)
            case ProtocolError():
                raise received
            case messages.Speak(turn=turn):
                if turn not in (messages.OPEN_TURN, self._turn):
                    raise SessionError(f"speak for turn {turn}, but this is turn {self._turn}")
                await self._speak(received.max_seconds, received.sampling)
            case messages.InputClear(keep_samples=keep):
                self._clear(keep)
            case messages.Played(turn=turn, samples=samples, underruns=underruns):
                if self._playing is not None and turn == self._playing.turn:
                    self._playing.playback.report(samples)
                    self._observer.played(turn, underruns, self._playing.playback.sent_frames)
                    self._look_at_playback()
            case messages.Interrupt(turn=turn, heard_samples=heard):
                self._interrupt(turn, heard)
            case messages.Ping(id=number, client_time_ms=sent):
                now = 1e3 * time.monotonic()
                self._send(messages.Pong(id=number, client_time_ms=sent, server_time_ms=now))
            case messages.SessionUpdate():
                await self._update(received)
            case messages.SessionClose():
                return End(messages.SessionClosed(reason="client"), CloseCode.NORMAL_CLOSURE, "")
            case _:
                raise SessionError("the session has started already")
        return None

    async def _handle_event(self, item: _Happening) -> End | None:
        match item:
            case events.FrameSpoken(turn, index, pcm):
                self._send(AudioMessage(turn, index * FRAME, to_int16(pcm)))
            case events.TurnStarted(turn, prompt, forgotten):
                self._send(
                    messages.TurnSpeaking(turn=turn, prompt_samples=prompt * FRAME, dropped_samples=forgotten * FRAME)
                )
            case events.TurnDone():
                self._done(item)
                if self._draining:
                    return _stopped()
            case events.Interrupted(turn, kept):
                self._send(messages.Interrupted(turn=turn, kept_samples=kept * FRAME))
                if self._taker is not None and self._playing is not None and turn == self._playing.turn:
                    self._awaiting_heard = False
                    await self._act(self._taker.interrupted())
            case events.Forgotten(turn, prompt_frames=kept):
                self._send(messages.InputCleared(turn=turn, kept_samples=kept * FRAME))
            case _Sending(turn):
                self._frame_sent(turn)
            case _Tick(turn):
                if self._playing is not None and turn == self._playing.turn:
                    self._look_at_playback()
            case _HeardTimeout(turn):
                playing = self._playing
                if self._awaiting_heard and playing is not None and playing.turn == turn:
                    self._interrupt(turn, playing.playback.played_samples(self._loop.time()))
            case _Drain():
                self._draining = True
                if not self._live.speaking:
                    return _stopped()
            case _IdleCheck():
                return self._look_whether_idle()
            case events.Failed(error):
                raise error
        return None

    @property
    def _speaking(self) -> bool:
        """Whether, as far as the client has been told, this turn is being spoken."""
        return self._playing is not None and self._playing.turn == self._turn

    # Listening

    async def _hear(self, audio: AudioMessage) -> None:
        if audio.position_samples != self._position:
            raise ProtocolError(f"audio at sample {audio.position_samples}, but {self._position} were sent before it")
        self._position += len(audio.pcm)
        if self._taker is not None:
            # 0.4 ms of inference a frame: not in the event loop. Only this task calls the taker, so calls never
            # overlap.
            await self._act(await asyncio.to_thread(self._taker.push, to_float(audio.pcm)))
        elif audio.turn > self._turn:
            raise ProtocolError(f"audio of turn {audio.turn}, but this is turn {self._turn}")
        elif audio.turn in (messages.OPEN_TURN, self._turn) and not self._speaking:
            await self._listen(self._framer.push(audio.pcm))

    async def _listen(self, frames: NDArray[np.float32]) -> None:
        """frames: [n, 1920]. When the engine's queue is full, waits or drops, as the client chose."""
        dropped, drops = 0, self._drops and self._position > self._patient_until
        for frame in frames:
            while not self._left.is_set():
                self._heard.clear()  # before the attempt: what is heard right after it is not missed
                if self._live.listen(frame):
                    self._prompt_frames += 1
                    break
                if drops:
                    dropped += FRAME
                    break
                await self._heard.wait()
        if dropped:
            self._send(messages.InputDropped(turn=self._turn, samples=dropped))
        behind, now = self._live.queued_frames, self._loop.time()
        if drops and behind >= _LAGGING_FRAMES and now >= self._lagging_told_at + _LAGGING_INTERVAL_S:
            self._lagging_told_at = now
            self._send(messages.InputLagging(turn=self._turn, behind_ms=1e3 * behind / FRAME_RATE))

    async def _act(self, actions: list[turn_taking.Action]) -> None:
        """What the turn taker decided, in order."""
        for action in actions:
            match action:
                case turn_taking.Listen(pcm):
                    await self._listen(self._framer.push(pcm))
                case turn_taking.SpeechStarted(at):
                    self._speech_from = self._prompt_frames
                    self._send(messages.SpeechStarted(turn=self._turn, at_samples=at))
                case turn_taking.SpeechStopped(at):
                    self._send(messages.SpeechStopped(turn=self._turn, at_samples=at))
                case turn_taking.Speak() if not self._vad.respond:
                    assert self._taker is not None
                    self._taker.speaking_ended()
                case turn_taking.Speak():
                    await self._continue(self._max_seconds, self._options)
                case turn_taking.BargeIn(at):
                    assert self._playing is not None
                    turn = self._playing.turn
                    self._playing.playback.stop(self._loop.time())
                    self._speech_from = 0
                    self._send(messages.SpeechStarted(turn=turn, at_samples=at))
                    self._awaiting_heard = True
                    self._loop.call_later(_HEARD_TIMEOUT_S, self._inbox.put_nowait, _HeardTimeout(turn))

    def _clear(self, keep_samples: int) -> None:
        """Takes back the prompt but for its beginning or, in vad mode, but for what was said before this speech."""
        if self._speaking:
            raise SessionError("the session is speaking: there is no prompt to be cleared")
        keep = min(keep_samples, self._prompt_frames * FRAME + self._framer.pending_samples)
        if self._taker is not None:
            hearing = self._taker.state is turn_taking.TurnState.HEARING
            keep = FRAME * (self._speech_from if hearing else self._prompt_frames)
            self._taker.clear()
        kept_frames = min(-(-keep // FRAME), self._prompt_frames)  # a frame that holds both stays whole
        begun = self._framer.flush().reshape(-1)[: max(0, keep - self._prompt_frames * FRAME)]
        self._framer.push(begun)
        self._live.forget(self._prompt_frames - kept_frames)
        self._prompt_frames = kept_frames

    # Speaking

    async def _speak(self, max_seconds: float | None, sampling: SamplingOptions | None) -> None:
        """At the client's word."""
        if self._speaking:
            raise SessionError("the session is already speaking")
        if self._taker is not None:
            if self._taker.state is turn_taking.TurnState.SPEAKING:
                self._taker.speaking_ended()  # what is still being played counts as heard
            elif self._taker.state is turn_taking.TurnState.INTERRUPTING:
                raise SessionError("the session is being interrupted: say what was heard first")
        options = self._options if sampling is None else self._seeded(sampling)
        await self._continue(self._max_seconds if max_seconds is None else max_seconds, options)
        if self._taker is not None:
            await self._act(self._taker.speak())

    async def _continue(self, max_seconds: float, options: SamplingOptions) -> None:
        await self._listen(self._framer.flush())
        if options != self._applied:
            self._live.configure(_sampling(options))
            self._applied = options
        turn = self._live.speak(_frames(max_seconds), self._lead_frames)
        assert turn == self._turn, (turn, self._turn)
        self._playing = _Playing(turn)
        self._prompt_frames = self._speech_from = 0

    def _interrupt(self, turn: int, heard_samples: int) -> None:
        playing = self._playing
        if playing is None or turn != playing.turn:
            raise SessionError(f"turn {turn} is not being spoken, nor was it last")
        self._awaiting_heard = False
        self._live.interrupt(turn, heard_samples)
        playing.over = True
        self._next_turn(turn)

    def _done(self, done: events.TurnDone) -> None:
        self._send(
            messages.TurnDone(
                turn=done.turn,
                reason="max_seconds" if done.reason == "max_frames" else done.reason,
                samples=done.frames * FRAME,
                first_frame_ms=done.first_frame_ms,
                mean_step_ms=done.mean_step_ms,
            )
        )
        self._next_turn(done.turn)
        if self._playing is not None and self._playing.turn == done.turn:
            self._playing.frames = done.frames
            self._look_at_playback()

    def _next_turn(self, over: int) -> None:
        """Input belongs to the turn after `over` from here on."""
        self._turn = max(self._turn, over + 1)

    def _frame_sent(self, turn: int) -> None:
        playing = self._playing
        if playing is None or playing.turn != turn:
            return
        ends_at = playing.playback.sent(self._loop.time())
        if self._start.pace == "fast":
            playing.playback.report(playing.playback.sent_frames * FRAME)  # whatever is sent counts as played
            self._look_at_playback()
        elif not playing.playback.reports:
            self._loop.call_at(ends_at, self._inbox.put_nowait, _Tick(turn))

    def _look_at_playback(self) -> None:
        """Lets the engine run on as far as the client has played, and notes when it has played everything."""
        playing = self._playing
        if playing is None or playing.over:
            return
        played = playing.playback.played_samples(self._loop.time())
        self._live.release(playing.turn, played // FRAME)
        if playing.frames is not None and played >= playing.frames * FRAME:
            playing.over = True
            if self._taker is not None:
                self._taker.speaking_ended()

    def _look_whether_idle(self) -> End | None:
        """Ends a session whose client has done nothing for too long; speaking to it counts as doing something."""
        now = self._loop.time()
        if self._live.speaking:
            self._active_at = now
        idle_until = self._active_at + self._idle_s
        if now >= idle_until:
            reason = f"nothing was said for {self._idle_s:g} s"
            return End(messages.SessionClosed(reason="idle"), CloseCode.NORMAL_CLOSURE, reason)
        self._loop.call_at(idle_until, self._inbox.put_nowait, _IdleCheck())
        return None

    async def _update(self, update: messages.SessionUpdate) -> None:
        if update.turn_taking == "vad" and self._taker is None:
            await asyncio.to_thread(voice_activity.load_vad_model)
        if update.max_seconds is not None:
            self._max_seconds = update.max_seconds
        if update.sampling is not None:
            self._options = self._seeded(update.sampling)  # from the next turn on
        if update.vad is not None:
            self._vad = update.vad
            if self._taker is not None:
                self._taker.configure(update.vad)
        if update.turn_taking == "vad" and self._taker is None:
            self._taker = self._turn_taker()
            if self._playing is not None and not self._playing.over:
                self._taker.speak()
        elif update.turn_taking == "manual" and self._taker is not None:
            await self._take_no_turns(self._taker)
        self._send(
            messages.SessionUpdated(
                max_seconds=self._max_seconds,
                sampling=self._options,
                turn_taking="manual" if self._taker is None else "vad",
                vad=self._vad,
            )
        )

    def _turn_taker(self) -> turn_taking.TurnTaker:
        probability = voice_activity.SpeechProbability(voice_activity.load_vad_model())
        return turn_taking.TurnTaker(probability, self._vad, self._position)

    async def _take_no_turns(self, taker: turn_taking.TurnTaker) -> None:
        """From vad to manual. What is being said is the beginning of a prompt."""
        self._taker = None
        playing = self._playing
        if taker.state is turn_taking.TurnState.INTERRUPTING and playing is not None:
            self._interrupt(playing.turn, playing.playback.played_samples(self._loop.time()))
            for action in taker.interrupted():
                if isinstance(action, turn_taking.Listen):
                    await self._listen(self._framer.push(action.pcm))
        elif taker.state is turn_taking.TurnState.HEARING:
            await self._act(taker.speak())  # tells the end of the speech

    def _seeded(self, sampling: SamplingOptions) -> SamplingOptions:
        """With the session's seed where it has none of its own."""
        return msgspec.structs.replace(sampling, seed=self._options.seed) if sampling.seed is None else sampling


_GONE = End(None, CloseCode.NORMAL_CLOSURE, "")
_INTERNAL = messages.Error(code="internal", message="the server failed; this is its fault, try again", fatal=True)


def _stopped() -> End:
    return End(messages.SessionClosed(reason="stopping"), CloseCode.GOING_AWAY, "the server stops")


def refusal(error: StreamingError) -> End:
    """How a client learns that this keeps its session from beginning."""
    if isinstance(error, ProtocolError):
        return End(_error(error, fatal=True), CloseCode.POLICY_VIOLATION, _short(error))
    return refused(error.code, str(error), _RETRY_AFTER_S if isinstance(error, EngineFullError | StoppingError) else 0)


def refused(code: str, message: str, retry_after_s: float) -> End:
    """A `session.refused`. retry_after_s: 0 where there is no use in trying again."""
    refused = messages.SessionRefused(code=code, message=message, retry_after_ms=round(1e3 * retry_after_s))
    return End(refused, CloseCode.TRY_AGAIN_LATER, _cut(message))


def _error(error: StreamingError, *, fatal: bool = False, in_reply_to: str | None = None) -> messages.Error:
    kind = None if in_reply_to is None else in_reply_to[:64]
    return messages.Error(code=error.code, message=str(error), fatal=fatal, in_reply_to=kind)


def _short(error: StreamingError) -> str:
    return _cut(str(error))


def _cut(text: str) -> str:
    """A close reason: at most 123 bytes of UTF-8 (RFC 6455, section 5.5)."""
    return text.encode()[:123].decode(errors="ignore")
