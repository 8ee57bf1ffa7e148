"""One session of the native protocol (`docs/protocol.md`): messages from the socket, events from the engine.

Everything that happens to a session arrives in one inbox and is handled in order by one task, so nothing here needs a
lock. A second task reads the socket into the inbox, a third writes the outbox to the socket.

Bounds: at most `_UNHANDLED` messages wait in the inbox; after that the socket is not read, and TCP holds the client
back. Audio in the outbox is bounded by the session's lead, since a frame is released only once it is sent; messages are
not handled while `_UNSENT` of whatever kind wait to be sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from streaming.audio import FRAME, FRAME_RATE, SAMPLE_RATE, Framer, to_float, to_int16
from streaming.config import Sampling
from streaming.engine import events, turn_taking
from streaming.engine.engine import Engine
from streaming.engine.session import QUEUED_FRAMES, LiveSession
from streaming.errors import EngineFullError, PromptTooLongError, ProtocolError, SessionError, StreamingError
from streaming.wire import messages
from streaming.wire.access import Refusal
from streaming.wire.admission import Admission, StoppingError
from streaming.wire.messages import AudioMessage, Message, SamplingOptions, SessionStart, UnknownTypeError
from streaming.wire.playback import Playback

_LOG = logging.getLogger(__name__)

_UNHANDLED = 16
_UNSENT = 64
_START_TIMEOUT_S = 10.0
_HEARD_TIMEOUT_S = 0.5
"""How long a client may take to say what was heard when a voice interrupts it."""
_RETRY_AFTER_MS = 1000
_MESSAGES_PER_S = 2000
"""A client that sends faster is read more slowly: handling messages takes the event loop's time from the others."""
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


@dataclass(frozen=True, slots=True)
class _End:
    """The session is over: its last message, if the socket may still take one, and how the socket closes."""

    message: Message | None
    code: int
    reason: str


_Happening = events.Event | _Sending | _Tick | _HeardTimeout | _Drain | _IdleCheck
_Item = str | bytes | _Happening | _End
_Reply = Message | AudioMessage | _End


def _frames(seconds: float) -> int:
    return max(1, math.ceil(seconds * FRAME_RATE - 1e-9))


def _sampling(options: SamplingOptions) -> Sampling:
    assert options.seed is not None
    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


class NativeSession:
    """Serves one socket. `run` returns when the session is over and its slot is free."""

    def __init__(self, socket: ServerConnection, engine: Engine, admission: Admission, idle_s: float) -> None:
        self._socket, self._engine, self._admission, self._idle_s = socket, engine, admission, idle_s
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[_Item] = asyncio.Queue()
        self._outbox: asyncio.Queue[_Reply] = asyncio.Queue()
        self._handled = asyncio.Semaphore(_UNHANDLED)
        self._written = asyncio.Event()
        self._gone = False
        self._heard = asyncio.Event()
        self._framer = Framer(np.float32)
        self._position = 0  # samples of input so far
        self._turn = 1  # the one that input belongs to
        self._playing: _Playing | None = None
        self._awaiting_heard = False
        self._draining = False
        self._active_at = self._loop.time()
        self._lagging_told_at = -math.inf

    async def run(self) -> None:
        """The whole life of the session."""
        writer = asyncio.create_task(self._write())
        try:
            try:
                start = await self._expect_start()
                end = await self._converse(start, await self._wait_for_slot(start))
            except ConnectionClosed:
                return
            except StreamingError as error:
                end = _refusal(error)
            except Exception:  # the boundary of a session: a fault of ours is told, and is not the other sessions'
                _LOG.exception("a session failed")
                end = _End(_INTERNAL, CloseCode.INTERNAL_ERROR, _INTERNAL.message)
            self._outbox.put_nowait(end)
            await writer
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _converse(self, start: SessionStart, live: LiveSession) -> _End:
        tasks: list[asyncio.Task[None]] = []
        try:
            self._begin(start, live)
            tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._socket.wait_closed())]
            tasks[1].add_done_callback(self._client_left)
            return await self._serve()
        finally:
            live.close()
            self._admission.released()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
        self._inbox.put_nowait(_End(error, CloseCode.POLICY_VIOLATION, message))

    async def refuse(self, refusal: Refusal) -> None:
        """Instead of `run`: says why there is no session."""
        retry_ms = round(1e3 * (refusal.retry_after_s or 0))
        refused = messages.SessionRefused(code=refusal.code, message=refusal.message, retry_after_ms=retry_ms)
        with suppress(ConnectionClosed):
            await self._socket.send(messages.encode(refused))
            await self._socket.close(CloseCode.TRY_AGAIN_LATER, refusal.code)

    def abort(self) -> None:
        """Closes the socket under a client that does not let itself be told."""
        self._socket.transport.abort()

    # Opening

    async def _expect_start(self) -> SessionStart:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                first = await self._socket.recv()
        except TimeoutError:
            raise ProtocolError("no session.start within 10 s") from None
        kind = messages.type_of(first) if isinstance(first, str) else None
        if kind != "session.start":
            raise ProtocolError("the first message must be session.start")
        version = messages.protocol_of(first)
        if version != messages.PROTOCOL_VERSION:
            raise _UnsupportedProtocolError(f"this server speaks protocol {messages.PROTOCOL_VERSION} only")
        message = messages.decode_client(first)
        assert isinstance(message, SessionStart)
        if message.turn_taking == "vad":
            await asyncio.to_thread(turn_taking.load_vad_model)
        return message

    async def _wait_for_slot(self, start: SessionStart) -> LiveSession:
        """A slot, perhaps after some time in line; nobody stands in line for a client that has left."""
        seed = secrets.randbits(63) if start.sampling.seed is None else start.sampling.seed
        self._options = msgspec.structs.replace(start.sampling, seed=seed)

        def waiting(place: int) -> None:
            self._send(messages.SessionQueued(place=place))

        slides = start.overflow == "slide"
        slot = asyncio.create_task(self._admission.attach(self._on_event, _sampling(self._options), slides, waiting))
        left = asyncio.create_task(self._socket.wait_closed())
        try:
            await asyncio.wait((slot, left), return_when=asyncio.FIRST_COMPLETED)
            if not slot.done():
                raise StoppingError("the client left the line")
            return slot.result()
        finally:
            slot.cancel()
            left.cancel()

    def _begin(self, start: SessionStart, live: LiveSession) -> None:
        self._start, self._live, self._applied = start, live, self._options
        self._max_seconds = start.max_seconds
        self._drops = start.lag == "drop" and start.pace == "realtime"
        self._taker: turn_taking.TurnTaker | None = None
        if start.turn_taking == "vad":
            probability = turn_taking.SpeechProbability(turn_taking.load_vad_model())
            self._taker = turn_taking.TurnTaker(probability, start.vad)
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
            )
        )

    # The two tasks at the socket, and the engine's thread

    async def _read(self) -> None:
        started, count = self._loop.time(), 0
        with suppress(ConnectionClosed):
            async for message in self._socket:
                await self._handled.acquire()
                self._inbox.put_nowait(message)
                count += 1
                early = started + count / _MESSAGES_PER_S - self._loop.time()
                if early > 0.1:
                    await asyncio.sleep(early)
                elif early < -1:  # what was not used is not saved up for more than a second
                    started, count = self._loop.time(), 0
        self._client_left()

    async def _write(self) -> None:
        try:
            while True:
                reply = await self._outbox.get()
                if isinstance(reply, _End):
                    if reply.message is not None:
                        await self._socket.send(messages.encode(reply.message))
                    await self._socket.close(reply.code, reply.reason)
                    return
                if isinstance(reply, AudioMessage):
                    self._inbox.put_nowait(_Sending(reply.turn))
                    await self._socket.send(messages.encode_audio(reply))
                else:
                    await self._socket.send(messages.encode(reply))
                self._written.set()
        except ConnectionClosed:
            self._client_left()  # the reader notices too, and ends the session

    def _client_left(self, _: object = None) -> None:
        """Nothing that it said matters any more: whoever waits on its behalf need not."""
        self._gone = True
        self._written.set()
        self._heard.set()
        self._inbox.put_nowait(_GONE)

    def _on_event(self, event: events.Event) -> None:
        """Called by the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the process is going down, nobody listens
            self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: events.Event) -> None:
        if isinstance(event, events.Heard | events.Failed):
            self._heard.set()  # not through the inbox: its reader may be waiting for just this
        if not isinstance(event, events.Heard):
            self._inbox.put_nowait(event)

    def _send(self, reply: Message | AudioMessage) -> None:
        self._outbox.put_nowait(reply)

    # Handling, in order

    async def _serve(self) -> _End:
        self._look_whether_idle()
        while True:
            item = await self._inbox.get()
            if self._gone:
                return _GONE
            try:
                match item:
                    case str() | bytes():
                        self._handled.release()
                        self._active_at = self._loop.time()
                        await self._unclog()
                        end = None if self._gone else await self._handle_message(item)
                    case _End():
                        return item
                    case _:
                        end = await self._handle_event(item)
            except ProtocolError as error:
                return _End(_error(error, fatal=True), CloseCode.INVALID_DATA, _short(error))
            except PromptTooLongError as error:
                return _End(_error(error, fatal=True), CloseCode.POLICY_VIOLATION, _short(error))
            except SessionError as error:
                self._send(_error(error, in_reply_to=messages.type_of(item) if isinstance(item, str) else None))
            except StreamingError as error:
                return _End(_error(error, fatal=True), CloseCode.INTERNAL_ERROR, _short(error))
            else:
                if end is not None:
                    return end

    async def _unclog(self) -> None:
        """A client that asks and never reads the answers is not listened to."""
        while self._outbox.qsize() >= _UNSENT and not self._gone:
            self._written.clear()
            await self._written.wait()

    async def _handle_message(self, data: str | bytes) -> _End | None:
        if isinstance(data, bytes):
            await self._hear(messages.decode_audio(data))
            return None
        try:
            message = messages.decode_client(data)
        except UnknownTypeError as error:
            self._send(_error(error, in_reply_to=messages.type_of(data)))
            return None
        match message:
            case messages.Speak(turn=turn):
                if self._taker is not None:
                    raise SessionError("with turn_taking vad the server hears when the prompt is over")
                if turn != self._turn:
                    raise SessionError(f"speak for turn {turn}, but this is turn {self._turn}")
                await self._speak()
            case messages.Played(turn=turn, samples=samples):
                if self._playing is not None and turn == self._playing.turn:
                    self._playing.playback.report(samples)
                    self._look_at_playback()
            case messages.Interrupt(turn=turn, heard_samples=heard):
                self._interrupt(turn, heard)
            case messages.Ping(id=number, client_time_ms=sent):
                now = 1e3 * time.monotonic()
                self._send(messages.Pong(id=number, client_time_ms=sent, server_time_ms=now))
            case messages.SessionUpdate():
                self._update(message)
            case messages.SessionClose():
                return _End(messages.SessionClosed(reason="client"), CloseCode.NORMAL_CLOSURE, "")
            case SessionStart():
                raise SessionError("the session has started already")
        return None

    async def _handle_event(self, item: _Happening) -> _End | None:
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
        elif audio.turn == self._turn and not self._speaking:
            await self._listen(self._framer.push(audio.pcm))

    async def _listen(self, frames: NDArray[np.float32]) -> None:
        """frames: [n, 1920]. When the engine's queue is full, waits or drops, as the client chose."""
        dropped = 0
        for frame in frames:
            while not self._gone:
                self._heard.clear()  # before the attempt: what is heard right after it is not missed
                if self._live.listen(frame):
                    break
                if self._drops:
                    dropped += FRAME
                    break
                await self._heard.wait()
        if dropped:
            self._send(messages.InputDropped(turn=self._turn, samples=dropped))
        behind, now = self._live.queued_frames, self._loop.time()
        if self._drops and behind >= _LAGGING_FRAMES and now >= self._lagging_told_at + _LAGGING_INTERVAL_S:
            self._lagging_told_at = now
            self._send(messages.InputLagging(turn=self._turn, behind_ms=1e3 * behind / FRAME_RATE))

    async def _act(self, actions: list[turn_taking.Action]) -> None:
        """What the turn taker decided, in order."""
        for action in actions:
            match action:
                case turn_taking.Listen(pcm):
                    await self._listen(self._framer.push(pcm))
                case turn_taking.SpeechStarted(at):
                    self._send(messages.SpeechStarted(turn=self._turn, at_samples=at))
                case turn_taking.SpeechStopped(at):
                    self._send(messages.SpeechStopped(turn=self._turn, at_samples=at))
                case turn_taking.Speak():
                    await self._speak()
                case turn_taking.BargeIn(at):
                    assert self._playing is not None
                    turn = self._playing.turn
                    self._send(messages.SpeechStarted(turn=turn, at_samples=at))
                    self._awaiting_heard = True
                    self._loop.call_later(_HEARD_TIMEOUT_S, self._inbox.put_nowait, _HeardTimeout(turn))

    # Speaking

    async def _speak(self) -> None:
        if self._speaking:
            raise SessionError("the session is already speaking")
        await self._listen(self._framer.flush())
        if self._options != self._applied:
            self._live.configure(_sampling(self._options))
            self._applied = self._options
        turn = self._live.speak(_frames(self._max_seconds), self._lead_frames)
        assert turn == self._turn, (turn, self._turn)
        self._playing = _Playing(turn)

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

    def _look_whether_idle(self) -> _End | None:
        """Ends a session whose client has done nothing for too long; speaking to it counts as doing something."""
        now = self._loop.time()
        if self._live.speaking:
            self._active_at = now
        idle_until = self._active_at + self._idle_s
        if now >= idle_until:
            reason = f"nothing was said for {self._idle_s:g} s"
            return _End(messages.SessionClosed(reason="idle"), CloseCode.NORMAL_CLOSURE, reason)
        self._loop.call_at(idle_until, self._inbox.put_nowait, _IdleCheck())
        return None

    def _update(self, update: messages.SessionUpdate) -> None:
        if update.max_seconds is not None:
            self._max_seconds = update.max_seconds
        if update.sampling is not None:
            seed = self._options.seed if update.sampling.seed is None else update.sampling.seed
            self._options = msgspec.structs.replace(update.sampling, seed=seed)  # from the next turn on
        self._send(messages.SessionUpdated(max_seconds=self._max_seconds, sampling=self._options))


class _UnsupportedProtocolError(ProtocolError):
    code = "unsupported_protocol"


_GONE = _End(None, CloseCode.NORMAL_CLOSURE, "")
_INTERNAL = messages.Error(code="internal", message="the server failed; this is its fault, try again", fatal=True)


def _stopped() -> _End:
    return _End(messages.SessionClosed(reason="stopping"), CloseCode.GOING_AWAY, "the server stops")


def _refusal(error: StreamingError) -> _End:
    if isinstance(error, ProtocolError) and not isinstance(error, _UnsupportedProtocolError):
        return _End(_error(error, fatal=True), CloseCode.POLICY_VIOLATION, _short(error))
    passing = isinstance(error, EngineFullError | StoppingError)
    if not passing and not isinstance(error, ProtocolError):
        _LOG.warning("a session was refused: %s", error)
    retry = _RETRY_AFTER_MS if passing else 0
    refused = messages.SessionRefused(code=error.code, message=str(error), retry_after_ms=retry)
    return _End(refused, CloseCode.TRY_AGAIN_LATER, _short(error))


def _error(error: StreamingError, *, fatal: bool = False, in_reply_to: str | None = None) -> messages.Error:
    kind = None if in_reply_to is None else in_reply_to[:64]
    return messages.Error(code=error.code, message=str(error), fatal=fatal, in_reply_to=kind)


def _short(error: StreamingError) -> str:
    """A close reason: at most 123 bytes of UTF-8 (RFC 6455, section 5.5)."""
    return str(error).encode()[:123].decode(errors="ignore")
