"""The native protocol from the listener's side, a small Python API over asyncio. `docs/protocol.md` specifies it.

    async with ContinuationClient.connect("ws://127.0.0.1:8765", SessionStart(max_seconds=5)) as client:
        await client.send(speech)  # int16 or float32 [n], 24 kHz mono; again and again
        await client.speak()
        async for event in client.events():
            match event:
                case Audio(pcm=pcm):
                    ...
                case TurnDone():
                    break

The client keeps the epochs (audio of an interrupted turn never reaches you), checks that the server's positions leave
no gap, and measures latencies and the server's clock. It plays nothing and owns no device.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NoReturn, Self

import numpy as np
from msgspec import structs
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME, SAMPLE_RATE, Pcm, Pcm16, to_float, to_int16
from streaming.client.dialing import closed_error
from streaming.client.resumable_connection import ConnectionLost, ConnectionRestored, ResumableConnection
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import (
    MAX_AUDIO_SAMPLES,
    MAX_FLOAT_SAMPLES,
    Ack,
    AudioMessage,
    Error,
    InputCleared,
    InputDropped,
    InputLagging,
    Interrupt,
    Interrupted,
    Message,
    Ping,
    Played,
    Pong,
    SamplingOptions,
    SavedPiece,
    ServerMessage,
    SessionClose,
    SessionClosed,
    SessionQueued,
    SessionRefused,
    SessionResumed,
    SessionSave,
    SessionSaved,
    SessionStart,
    SessionStarted,
    SessionUpdate,
    SessionUpdated,
    Speak,
    SpeechStarted,
    SpeechStopped,
    Take,
    TakeKeep,
    TakeKept,
    TakeStarted,
    TurnDone,
    TurnSpeaking,
    TurnVoice,
)

MAX_EVENTS = 256
"""Events that wait for the application, 20 s of audio. When they are full the client stops reading, and TCP holds the
server back: nothing is dropped."""
PING_INTERVAL_S = 1.0
_REMEMBERED_TURNS = 4


@dataclass(frozen=True, slots=True)
class Audio:
    """A piece of a turn's continuation, in order and without gaps.

    pcm: int16 [n], 24 kHz mono; position_samples: samples of this turn before it; arrived_s: `time.monotonic` then.
    """

    turn: int
    position_samples: int
    pcm: Pcm16
    arrived_s: float


Event = (
    Audio
    | TurnSpeaking
    | TurnVoice
    | TurnDone
    | SpeechStarted
    | SpeechStopped
    | Interrupted
    | InputLagging
    | InputDropped
    | InputCleared
    | SessionUpdated
    | TakeStarted
    | TakeKept
    | Error
    | ConnectionLost
    | ConnectionRestored
)
"""The items that `events` yields: audio, and the server's messages as `messages.py` has them."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The clocks and delays that pings tell. All times in ms; None before the first answer.

    rtt_ms: the latest round trip; best_rtt_ms: the shortest; offset_ms: the server's clock minus this one's
    (`time.monotonic`), from the shortest round trip, true to half of it.
    """

    rtt_ms: float | None = None
    best_rtt_ms: float | None = None
    offset_ms: float | None = None

    def after(self, pong: Pong, now_ms: float) -> Clock:
        """Return this estimate with one more answer, which arrived at `now_ms`."""
        rtt = now_ms - pong.client_time_ms
        if self.best_rtt_ms is not None and rtt > self.best_rtt_ms:
            return Clock(rtt, self.best_rtt_ms, self.offset_ms)
        return Clock(rtt, rtt, pong.server_time_ms - (pong.client_time_ms + rtt / 2))


@dataclass(frozen=True, slots=True)
class TurnLatency:
    """One turn's continuation, timed where it arrived.

    speech_ended_s: when the prompt's last sample was handed to the socket, by `time.monotonic`.
    first_audio_ms: from then to the first audio message. interval_p95_ms: between audio messages. seconds: how long the
    continuation is. realtime_factor: seconds of it for each second from the first message to the last; near 1 in
    realtime pace, where the server waits for the listener. None where there was not enough audio to time.
    """

    speech_ended_s: float | None
    first_audio_ms: float | None
    interval_p95_ms: float | None
    seconds: float
    realtime_factor: float | None


@dataclass(slots=True)
class _TurnMeter:
    """Times of one turn: when the speech ended and when each audio message came. Bounded by the turn's max_seconds."""

    speech_ended_s: float | None = None
    arrivals_s: list[float] = field(default_factory=list)
    samples: int = 0

    def latency(self) -> TurnLatency:
        first = rate = interval = None
        seconds = self.samples / SAMPLE_RATE
        if self.arrivals_s and self.speech_ended_s is not None:
            first = 1000 * (self.arrivals_s[0] - self.speech_ended_s)
        if len(self.arrivals_s) > 1:
            elapsed = self.arrivals_s[-1] - self.arrivals_s[0]
            rate = (seconds - FRAME / SAMPLE_RATE) / elapsed if elapsed > 0 else None
            interval = 1000 * float(np.percentile(np.diff(self.arrivals_s), 95))
        return TurnLatency(self.speech_ended_s, first, interval, seconds, rate)


class _Saving:
    """A session that is being saved. whole: its bytes, once they are all there."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._data, self._size = bytearray(), 0

    def begin(self, saved: SessionSaved) -> None:
        self._size = saved.bytes

    def add(self, piece: SavedPiece) -> None:
        if piece.offset != len(self._data) or len(self._data) + len(piece.data) > self._size:
            raise ProtocolError(f"a piece of a saved session at byte {piece.offset}, after {len(self._data)}")
        self._data += piece.data
        if len(self._data) == self._size and not self.whole.done():
            self.whole.set_result(bytes(self._data))

    def fail(self, why: str) -> None:
        if not self.whole.done():
            self.whole.set_exception(ContinuationError(why))


class ContinuationClient:
    """One session. Made by `connect`; one task sends audio, one iterates `events`.

    Every method that talks to the server raises `ContinuationError` when the session has come to its end: the server
    failed, stopped, or went away; and `ProtocolError` when it broke the protocol.
    """

    def __init__(self, connection: ResumableConnection, start: SessionStart) -> None:
        self.started = connection.started
        """The server's answer, which tells of itself and the session."""
        self.clock = Clock()
        """Round trip and clock offset, measured every second."""
        self.stale_samples = 0
        """Samples that came for a turn that had been interrupted, and were dropped."""
        self._connection = connection
        self._vad = start.turn_taking == "vad"
        self._turn = connection.started.turn
        self._reported = (0, 0, 0)  # turn, frames and underruns of the last report
        self._dropped_turn = 0
        self._meters: dict[int, _TurnMeter] = {}
        self._sent_samples = 0
        self._spoken_at_samples = 0
        self._sent_marks: deque[tuple[int, float]] = deque(maxlen=4_096)
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(MAX_EVENTS)
        self._failure: ContinuationError | ProtocolError | None = None
        self._saving: _Saving | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        url: str,
        start: SessionStart | None = None,
        *,
        token: str | None = None,
        open_timeout_s: float = 30.0,
        saved: bytes = b"",
    ) -> AsyncIterator[Self]:
        """Open a session at `url`, and close it when the block is left. A URL without a path gets the protocol's own.

        With `start.resume` a session outlives its connection, where the server allows that: the client comes back by
        itself, and says so by `ConnectionLost` and `ConnectionRestored`.

        saved: what `save` returned, of this server or of another with the same key and model: the session goes on with
        that. How tokens are drawn is as it was then, where `start.sampling` leaves it open.

        token: shown to the server, in the clear where the URL does not begin with `wss://`. Certificates are checked
        against the system's, or those in the file that the environment variable SSL_CERT_FILE names.

        Raises `RefusedError` when the server takes no more or does not let you in, `ContinuationError` when there is no
        such server or it does not answer in `open_timeout_s`.
        """
        start = structs.replace(start or SessionStart(), saved_bytes=len(saved))
        client = cls(await ResumableConnection.open(url, start, token, open_timeout_s, saved), start)
        reading, pinging = asyncio.create_task(client._read()), asyncio.create_task(client._ping())
        try:
            yield client
        finally:
            pinging.cancel()
            reading.cancel()
            await asyncio.gather(pinging, reading, return_exceptions=True)
            await client._connection.close(SessionClose() if client._failure is None else None)

    @property
    def turn(self) -> int:
        """The turn that audio sent now belongs to, or that is being spoken."""
        return self._turn

    @property
    def sent_samples(self) -> int:
        """Samples sent in this session so far."""
        return self._sent_samples

    @property
    def sent_bytes(self) -> int:
        """Bytes of all messages sent so far, without what sockets add."""
        return self._connection.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes of all messages received so far, without what sockets add."""
        return self._connection.received_bytes

    def latency(self, turn: int) -> TurnLatency:
        """Return the times of one of the latest turns, whole after its `TurnDone`. Those of older turns are empty."""
        return self._meters.get(turn, _TurnMeter()).latency()

    def sent_at_s(self, position_samples: int) -> float | None:
        """Return when the sample at this input position was given to the socket (`time.monotonic`), or None."""
        found = None
        for end, at_s in reversed(self._sent_marks):
            if end < position_samples:
                break
            found = at_s
        return found

    async def send(self, pcm: Pcm) -> None:
        """Send speech, int16 or float32 [n], n of any size, and return when the socket has taken it. float32 that is
        more than 16 bits hold arrives whole where the session's codec is `float32`.
        """
        floats = self.started.codec == "float32"
        samples, most = (to_float(pcm), MAX_FLOAT_SAMPLES) if floats else (to_int16(pcm), MAX_AUDIO_SAMPLES)
        for begin in range(0, len(samples), most):
            piece = samples[begin : begin + most]
            message = AudioMessage(self._turn, self._sent_samples, piece)
            self._sent_samples += len(piece)
            await self._send(message)
            self._sent_marks.append((self._sent_samples, time.monotonic()))

    async def speak(self) -> int:
        """Say that the prompt is over, in manual turn taking, and return the turn that will be spoken."""
        turn = self._turn
        said_something = self._sent_samples > self._spoken_at_samples
        self._meter_of(turn).speech_ended_s = self._sent_marks[-1][1] if said_something else time.monotonic()
        self._spoken_at_samples = self._sent_samples
        await self._send(Speak(turn=turn))
        return turn

    async def take(
        self, turn: int, *, max_seconds: float | None = None, sampling: SamplingOptions | None = None
    ) -> int:
        """Have the prompt of a turn continued anew, and return the turn that will be spoken. What was said since is
        dropped; the earlier continuation is kept, see `keep`. Interrupt a turn that is being spoken first.

        `started.takes` says how many of the latest turns can be taken again, where `SessionStart.takes` asked for it;
        of one that cannot, the server answers `Error`. Without a seed the take has another than the turn.
        """
        taken = self._turn
        self._meter_of(taken).speech_ended_s = time.monotonic()
        self._spoken_at_samples = self._sent_samples
        await self._send(Take(turn=turn, max_seconds=max_seconds, sampling=sampling))
        return taken

    async def keep(self, turn: int) -> None:
        """Go on from the end of this turn, as if none after it had been; the server answers `TakeKept`."""
        await self._send(TakeKeep(turn=turn))

    async def played(self, turn: int, samples: int, underruns: int = 0) -> None:
        """Report how much of the turn's continuation has left the loudspeaker. At least every 80 ms in realtime pace;
        more often does no harm: it is said once a frame, which is all that the server looks at.

        underruns: how often in this turn so far there was nothing to play when there should have been.
        """
        report = turn, samples // FRAME, underruns
        if report != self._reported:
            self._reported = report
            await self._send(Played(turn=turn, samples=samples, underruns=underruns))

    async def interrupt(self, turn: int, heard_samples: int) -> None:
        """Stop the turn, of which only this much was heard. No more of its audio is yielded, from this call on.

        Speech may be sent again at once: it belongs to the next turn.
        """
        self._dropped_turn = max(self._dropped_turn, turn)
        self._turn = max(self._turn, turn + 1)
        await self._send(Interrupt(turn=turn, heard_samples=heard_samples))

    async def update(self, *, sampling: SamplingOptions | None = None, max_seconds: float | None = None) -> None:
        """Ask for other settings from the next turn on; the server answers with `SessionUpdated`."""
        await self._send(SessionUpdate(sampling=sampling, max_seconds=max_seconds))

    async def save(self) -> bytes:
        """Return the session as it is now, signed by the server, for `connect` on another day. Whoever has it has the
        voice that was heard. What was sent of a frame that is not whole is not in it.

        Raises `ContinuationError` where the server does not do that, or not now: the session goes on.
        """
        assert self._saving is None, "one at a time"
        saving = self._saving = _Saving()
        try:
            await self._send(SessionSave())
            return await saving.whole
        finally:
            self._saving = None

    async def events(self) -> AsyncIterator[Event]:
        """Yield what the server says, in order. The session ends by an error, since only the client ends it in peace.

        An `Error` that is not fatal is an event like others. Raises `ContinuationError` and `ProtocolError`.
        """
        while True:
            event = await self._events.get()
            if event is None:
                self._events.put_nowait(None)  # every later call ends the same way
                self._fail()
            if isinstance(event, Audio | TurnSpeaking | TurnVoice) and event.turn <= self._dropped_turn:
                self.stale_samples += len(event.pcm) if isinstance(event, Audio) else 0
                continue
            yield event

    async def _send(self, message: Message | AudioMessage) -> None:
        if self._failure is not None:
            self._fail()
        try:
            await self._connection.send(message)
        except ConnectionClosed as closed:
            # The reader may hold the reason, in a message that came before the end; give it a moment.
            for _ in range(100):
                if self._failure is not None:
                    self._fail()
                await asyncio.sleep(0.01)
            raise closed_error(closed) from None
        if self._failure is not None:  # the reason came while this waited
            self._fail()

    def _fail(self) -> NoReturn:
        assert self._failure is not None
        # A new object each time: one exception raised by two tasks would collect both of their tracebacks.
        raise type(self._failure)(*self._failure.args) from None

    async def _read(self) -> None:
        try:
            while True:
                event = self._on_message(await self._connection.receive())
                if event is not None:
                    await self._events.put(event)
        except ContinuationError as error:
            self._failure = error
        except ProtocolError as error:
            self._failure = ProtocolError(f"the server broke the protocol: {error}")
        self._connection.give_up()
        if self._saving is not None:
            self._saving.fail(str(self._failure))
        await self._events.put(None)

    def _on_message(
        self, message: ServerMessage | AudioMessage | SavedPiece | ConnectionLost | ConnectionRestored
    ) -> Event | None:
        match message:
            case AudioMessage():
                return self._on_audio(message)
            case SavedPiece():
                if self._saving is None:
                    raise ProtocolError("a piece of a saved session that was not asked for")
                self._saving.add(message)
                return None
            case ConnectionLost() | ConnectionRestored():
                if self._saving is not None:
                    self._saving.fail("the connection broke while the session was being saved")
                if isinstance(message, ConnectionRestored) and message.turn is not None:
                    self._go_back(message.turn)
                return message
        return self._on_control(message)

    def _go_back(self, turn: int) -> None:
        """Forget what the server has lost: this turn is open, and nothing has been said in it."""
        self._turn, self._dropped_turn = min(self._turn, turn), min(self._dropped_turn, turn - 1)
        self._reported, self._spoken_at_samples = (0, 0, 0), self._sent_samples
        for later in [each for each in self._meters if each >= turn]:
            del self._meters[later]

    def _on_audio(self, message: AudioMessage) -> Audio | None:
        now = time.monotonic()
        if message.turn <= self._dropped_turn:
            self.stale_samples += len(message.pcm)
            return None
        self._check_turn(message.turn)
        meter = self._meter_of(message.turn)
        if message.position_samples != meter.samples:
            raise ProtocolError(
                f"audio of turn {message.turn} goes on at sample {message.position_samples} instead of {meter.samples}"
            )
        meter.samples += len(message.pcm)
        meter.arrivals_s.append(now)
        return Audio(message.turn, message.position_samples, to_int16(message.pcm), now)

    def _on_control(self, message: ServerMessage) -> Event | None:
        match message:
            case Pong():
                self.clock = self.clock.after(message, 1000 * time.monotonic())
                return None
            case Error(fatal=True):
                raise ContinuationError(f"the server ended the session ({message.code}): {message.message}")
            case SessionSaved():
                if self._saving is None:
                    raise ProtocolError("a saved session that was not asked for")
                self._saving.begin(message)
                return None
            case Error(in_reply_to="session.save"):
                if self._saving is not None:
                    self._saving.fail(f"the session was not saved ({message.code}): {message.message}")
                return None
            case SessionClosed():
                raise ContinuationError(f"the server ended the session ({message.reason})")
            case SessionStarted() | SessionResumed() | SessionQueued() | SessionRefused() | Ack():
                raise ProtocolError("a session is opened once")
            case TurnSpeaking() | TurnVoice():
                self._check_turn(message.turn)
            case SpeechStopped():
                self._check_turn(message.turn)
                self._meter_of(message.turn).speech_ended_s = self.sent_at_s(message.at_samples)
            case TurnDone():
                self._on_turn_done(message)
        return message

    def _on_turn_done(self, done: TurnDone) -> None:
        self._check_turn(done.turn)
        received = self._meter_of(done.turn).samples
        self._turn = max(self._turn, done.turn + 1)
        if done.turn > self._dropped_turn and done.samples != received:
            raise ContinuationError(
                f"turn {done.turn} is not whole: {done.samples} samples were sent and {received} came"
            )

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn and turn > self._dropped_turn:
            raise ProtocolError(f"a message of turn {turn} in turn {self._turn}")

    def _meter_of(self, turn: int) -> _TurnMeter:
        if turn not in self._meters:
            self._meters[turn] = _TurnMeter()
            while len(self._meters) > _REMEMBERED_TURNS:
                del self._meters[next(iter(self._meters))]
        return self._meters[turn]

    async def _ping(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            for number in itertools.count():
                await self._connection.send(Ping(id=number, client_time_ms=1000 * time.monotonic()))
                await asyncio.sleep(PING_INTERVAL_S)
