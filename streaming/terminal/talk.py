"""One session from a person's side: speech goes out, the continuation is played, measured, shown and kept.

File mode and microphone mode are this one talk with different sources of speech and loudspeakers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from streaming.audio import SAMPLE_RATE, SILENCE_DBFS, Pcm, Pcm16, WavWriter, level_dbfs, to_float, to_int16
from streaming.client.client import Audio, ContinuationClient, Event
from streaming.client.resumable_connection import ConnectionLost, ConnectionRestored
from streaming.client.tasks import run_until
from streaming.errors import ContinuationError
from streaming.protocol.messages import (
    Error,
    InputDropped,
    InputLagging,
    Interrupted,
    SessionUpdated,
    SpeechStarted,
    SpeechStopped,
    TakeStarted,
    TurnDone,
    TurnSpeaking,
    TurnVoice,
)
from streaming.terminal.keyboard import Key
from streaming.terminal.loudspeaker import Loudspeaker, LoudspeakerState
from streaming.terminal.recording import Recording
from streaming.terminal.sources import silence_pieces
from streaming.terminal.view import Meters, TurnReport, View

TICK_S = 0.04
"""The interval in which playback is looked at, reported and shown: half of the 80 ms that the protocol allows."""
STALL_S = 120.0
"""A continuation that was asked for and says nothing for this long is given up."""
AWAY_PIECE_SAMPLES = SAMPLE_RATE * 4 // 10
"""What is said while the connection is away waits in pieces of 0.4 s: 256 of them, all that a session keeps, are 100 s.
After that the microphone drops its oldest."""
BEHIND_S = 1.5
"""A server is taken to lag for so long after it said so, which it does once a second."""
RATE_INTERVAL_S = 1.0
VAD_PATIENCE_S = 10.0
"""The silence that follows a file's end, so that the server hears that speech has ended."""

DEAD_SAMPLES = 3 * SAMPLE_RATE // 2
"""A microphone that has given nothing for so long is told of, once: any real one has more noise than `DEAD_PEAK`."""
DEAD_PEAK = 3 / 32_768

_DEAD = "The microphone gives nothing. It may be muted, or the wrong one: --input-device chooses another."
_NO_TAKES = "This server makes no takes: it was started with --takes 0, or is older than they are."

_NOT_HEARD = LoudspeakerState(played_samples=0, buffered_ms=0.0, underruns=0, audible_s=None, drained=True)


@dataclass(slots=True)
class _Spoken:
    """A turn that was asked for or is being played; bounded by the turn's max_seconds. of: the turn that it is another
    take of. voice: the name of the one in which the model goes on, if it has one.
    """

    turn: int
    of: int | None = None
    voice: str | None = None
    pieces: list[Pcm16] = field(default_factory=list)
    reported_samples: int = 0
    done: TurnDone | None = None


class SpeechSource(Protocol):
    """A microphone, as far as a talk knows it."""

    @property
    def dropped_ms(self) -> float:
        """Return how much was lost before it could be sent."""

    def pieces(self) -> AsyncIterator[Pcm16]:
        """int16 [n] at 24 kHz, in real time."""


class Talk:
    """Moves one session between a source of speech and a loudspeaker.

    loudspeaker: None means that nobody listens (fast pace). push_to_talk: the microphone is heard only while a key says
    so, for manual turn taking. output: gets the continuations one after another, of an interrupted one what was heard,
    and of several takes the last, unless the person left in the middle of it. record: gets both sides.
    """

    def __init__(
        self,
        client: ContinuationClient,
        view: View,
        *,
        turn_taking: Literal["manual", "vad"],
        loudspeaker: Loudspeaker | None,
        output: WavWriter | None,
        record: Recording | None,
        push_to_talk: bool = False,
    ) -> None:
        self.whole_turns = 0
        """Turns that came whole so far."""
        self.last_report: TurnReport | None = None
        """The latest turn, whole or not."""
        self.meters = Meters(turn=client.turn)
        self._client = client
        self._view = view
        self._vad = turn_taking == "vad"
        self._push_to_talk, self._talking = push_to_talk, False
        self._unsaid: list[Pcm] = []
        self._away_until_s: float | None = None  # while the connection is lost
        self._lost_at_samples = 0
        self._behind_until_s = 0.0
        self._rate = (time.monotonic(), 0, 0)  # a time, and the bytes sent and received by then
        self._loudspeaker = loudspeaker
        self._output = output
        self._record = record
        self._spoken: _Spoken | None = None
        self._kept: tuple[int, Pcm16] | None = None  # a turn and its audio, which another take would replace
        self._file_mode = False
        self._microphone: SpeechSource | None = None
        self._nothing_samples = 0  # samples of a microphone that may be dead
        self._file_ended_s: float | None = None
        self._last_event_s = time.monotonic()
        self._over = asyncio.Event()

    async def run_file(self, pieces: AsyncIterator[Pcm]) -> TurnReport:
        """Send the pieces and gets their continuation.

        Returns its report. Raises `ContinuationError` unless it came whole.
        """
        self._file_mode = True
        self._announce()
        try:
            await run_until(self._over, self._receive(), self._tick(), self._send_file(pieces))
        except ContinuationError:
            spoken, loudspeaker = self._spoken, self._loudspeaker
            if spoken is None or spoken.done is None or loudspeaker is None:
                raise
            await self._play_out(spoken, loudspeaker)  # the session has ended, and all of the continuation is here
        self._write()
        assert self.last_report is not None
        return self.last_report

    async def run_microphone(self, microphone: SpeechSource, keys: AsyncIterator[Key]) -> None:
        """Converse until `keys` ends. A key ends the prompt, or interrupts the continuation; with push-to-talk it
        begins a prompt, interrupting the continuation, and ends it when it is released or pressed again. `Key.TAKE` has
        the latest prompt continued anew.

        However it ends, what was heard is kept; only another take that is left in its middle does not replace the one
        before. Raises `ContinuationError` when the session breaks.
        """
        self._microphone = microphone
        self._announce()
        try:
            await run_until(
                self._over, self._receive(), self._tick(), self._send(microphone.pieces()), self._obey(keys)
            )
        finally:
            if self._spoken is not None and self._loudspeaker is not None:
                heard = self._loudspeaker.stop()
                if self._kept is None or self._kept[0] != self._spoken.of:
                    self._keep(self._spoken, heard)
            self._write()

    async def hush(self) -> None:
        """Have the server know that no more is heard of what it speaks, after a talk that was left."""
        if self._spoken is not None:
            await self._client.interrupt(self._spoken.turn, self._spoken.reported_samples)

    def _announce(self) -> None:
        started = self._client.started
        self._view.event(
            "session",
            {
                "session": started.session,
                "model": started.model,
                "seed": started.seed,
                "num_codebooks": started.num_codebooks,
                "context_seconds": started.context_samples / SAMPLE_RATE,
                "codec": started.codec,
            },
        )
        if started.notice:
            self._view.event("notice", {"message": started.notice})
        if started.suggestions and not self._file_mode:
            self._view.event("notice", {"message": suggestion(started.suggestions)})
        self._listen()

    # Speech out

    async def _send_file(self, pieces: AsyncIterator[Pcm]) -> None:
        await self._send(pieces)
        self._file_ended_s = time.monotonic()
        if self._vad:
            await self._send(silence_pieces())
        else:
            await self._speak()

    async def _send(self, pieces: AsyncIterator[Pcm]) -> None:
        async for piece in pieces:
            self.meters.input_dbfs = level_dbfs(piece)
            self._look_at_microphone(piece)
            wanted = self._vad or (self._spoken is None and (self._talking or not self._push_to_talk))
            if wanted:
                self._unsaid.append(piece)
                if self._away_until_s is None or sum(map(len, self._unsaid)) >= AWAY_PIECE_SAMPLES:
                    await self._say()
            if self._record is not None:
                self._record.sent(to_int16(piece if wanted else np.zeros_like(piece)))
                if self._loudspeaker is None:
                    self._record.heard(np.zeros(len(piece), np.int16))
        self.meters.input_dbfs = SILENCE_DBFS

    def _look_at_microphone(self, piece: Pcm) -> None:
        """Tell the person, once, of a microphone that gives nothing."""
        if self._microphone is None or self._nothing_samples >= DEAD_SAMPLES:
            return
        silent = np.abs(to_float(piece)).max(initial=0.0) <= DEAD_PEAK
        self._nothing_samples = self._nothing_samples + len(piece) if silent else 0
        if self._nothing_samples >= DEAD_SAMPLES:
            self._view.event("notice", {"message": _DEAD})

    async def _say(self) -> None:
        """Send what was taken from the source."""
        if self._unsaid:
            pcm: Any = np.concatenate(self._unsaid)  # all of one type, or a file's float32 and zeros
            self._unsaid.clear()
            await self._client.send(pcm)

    async def _speak(self) -> None:
        # Before anything is awaited: from here on, speech belongs to no turn.
        self._spoken = _Spoken(self._client.turn)
        self._talking = False
        self.meters.state = "waiting"
        self._last_event_s = time.monotonic()
        await self._say()
        await self._client.speak()

    async def _take_again(self) -> None:
        """Have the latest prompt continued anew, with another seed."""
        if self._spoken is not None:
            await self._interrupt(self._spoken)
        if self.last_report is None or not self._client.started.takes:
            none = "There is nothing yet to make another take of." if self._client.started.takes else _NO_TAKES
            self._view.event("notice", {"message": none})
            return
        self._spoken = _Spoken(self._client.turn, self.last_report.turn)
        self._talking = False
        self.meters.state = "waiting"
        self._last_event_s = time.monotonic()
        self._unsaid.clear()  # what was said since is not answered
        await self._client.take(self.last_report.turn)

    async def _obey(self, keys: AsyncIterator[Key]) -> None:
        async for key in keys:
            if key is Key.TAKE:
                await self._take_again()
            elif self._push_to_talk:
                await self._push(key)
            elif key is Key.RELEASED:
                pass
            elif self._spoken is not None:
                await self._interrupt(self._spoken)
            elif not self._vad:
                await self._speak()
        self._over.set()

    async def _push(self, key: Key) -> None:
        if self._talking:
            await self._speak()  # the key was released or, where the terminal does not tell so, pressed again
        elif key is not Key.RELEASED:
            if self._spoken is not None:
                await self._interrupt(self._spoken)
            self._talking = True
            self.meters.state = "talking"

    # Events in

    async def _receive(self) -> None:
        async for event in self._client.events():
            self._last_event_s = time.monotonic()
            await self._on_event(event)

    async def _on_event(self, event: Event) -> None:
        spoken = self._spoken
        match event:
            case Audio() if spoken is not None and event.turn == spoken.turn:
                spoken.pieces.append(event.pcm)
                if self._loudspeaker is not None:
                    self._loudspeaker.play(event.pcm)
                elif self._record is not None:
                    self._record.heard(event.pcm)
                    self._record.sent(np.zeros_like(event.pcm))
            case TurnSpeaking():
                self._on_speaking(event)
            case TurnVoice(turn=turn, voice=voice):
                self._view.event("voice", {"turn": turn, "voice": voice})
                if spoken is not None and turn == spoken.turn:
                    spoken.voice = self.meters.voice = voice
            case TurnDone() if spoken is not None and event.turn == spoken.turn:
                spoken.done = event
                if self._loudspeaker is not None:
                    self._loudspeaker.complete()  # the next tick sees when all is played
                else:
                    self._finish(spoken, _NOT_HEARD)
            case TakeStarted():
                self._view.event("take", {"turn": event.turn, "of": event.of, "seed": event.sampling.seed})
            case SpeechStarted():
                self._view.event("speech_started", _at(event))
                if spoken is not None:
                    await self._interrupt(spoken)
            case SpeechStopped():
                self._view.event("speech_stopped", _at(event))
                self._spoken = _Spoken(event.turn)
                self.meters.state = "waiting"
            case Error():
                self._on_error(event)
            case InputLagging(behind_ms=behind):
                self.meters.behind_ms, self._behind_until_s = behind, time.monotonic() + BEHIND_S
                self._view.event("input_lagging", {"behind_ms": behind})
            case InputDropped(samples=samples):
                lost_ms = 1000 * samples / SAMPLE_RATE
                self.meters.unheard_ms += lost_ms
                self._view.event("input_dropped", {"ms": lost_ms})
            case ConnectionLost(seconds=seconds):
                self._away_until_s = time.monotonic() + seconds
                self._lost_at_samples = self._client.sent_samples
                self._view.event("connection_lost", {"kept_seconds": seconds})
            case ConnectionRestored(after_ms=after, turn=turn):
                self._away_until_s = None
                if turn is None:
                    self._view.event("connection_restored", {"after_ms": after})
                else:
                    self._go_back(turn, after)
            case Audio() | TurnDone() | Interrupted() | SessionUpdated():
                pass  # it is the rest of a turn that is over here

    def _go_back(self, turn: int, after_ms: float) -> None:
        """Say that what was said and heard in this turn is lost, and listen again unless the one before still plays or
        has a rest that comes.
        """
        spoken = self._spoken
        if self._file_mode and (self._file_ended_s is None or spoken is None or spoken.turn >= turn):
            raise ContinuationError("the server died, and what was said to it is lost: start again")
        self._view.event("went_back", {"turn": turn, "after_ms": after_ms})
        self._unsaid.clear()
        if spoken is not None and spoken.turn >= turn:
            if self._loudspeaker is not None:
                self._keep(spoken, self._loudspeaker.stop())
            self._listen()

    def _on_speaking(self, event: TurnSpeaking) -> None:
        if self._spoken is None or self._spoken.turn != event.turn:
            self._spoken = _Spoken(event.turn)
        self.meters.state, self.meters.voice = "speaking", self._spoken.voice
        self._view.event(
            "speaking",
            {
                "turn": event.turn,
                "prompt_seconds": event.prompt_samples / SAMPLE_RATE,
                "dropped_seconds": event.dropped_samples / SAMPLE_RATE,
            },
        )

    def _on_error(self, error: Error) -> None:
        message = f"{error.message} ({error.code})"
        waiting = self.meters.state == "waiting"
        if self._file_mode and (waiting or self._file_ended_s is None):
            raise ContinuationError(f"the server cannot continue this: {message}")
        if error.in_reply_to == "interrupt":
            return  # the server has used its own clock meanwhile
        self._view.event("notice", {"message": message})
        if waiting:
            self._listen()

    # Playback

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            spoken, loudspeaker, meters = self._spoken, self._loudspeaker, self.meters
            playback = _NOT_HEARD
            if loudspeaker is not None:
                playback, heard = self._take_heard(loudspeaker)
                meters.output_dbfs = level_dbfs(heard)
                meters.buffer_ms, meters.underruns = playback.buffered_ms, playback.underruns
                if spoken is not None and playback.played_samples > spoken.reported_samples:
                    spoken.reported_samples = playback.played_samples
                    with suppress(ContinuationError):  # who receives is told of it, behind all that came before
                        await self._client.played(spoken.turn, playback.played_samples, playback.underruns)
            if spoken is not None:
                if spoken.done is not None and playback.drained and spoken is self._spoken:
                    self._finish(spoken, playback)
                elif spoken.done is None and self._away_until_s is None and now - self._last_event_s > STALL_S:
                    raise ContinuationError(f"the server has said nothing for {STALL_S:g} s")
            elif self._file_ended_s is not None and now - max(self._file_ended_s, self._last_event_s) > VAD_PATIENCE_S:
                self._end_of_file()
            meters.sent_seconds = self._client.sent_samples / SAMPLE_RATE
            meters.rtt_ms = self._client.clock.rtt_ms
            if self._microphone is not None:
                meters.dropped_input_ms = self._microphone.dropped_ms
            self._measure_connection(now)
            self._view.show(meters)

    async def _play_out(self, spoken: _Spoken, loudspeaker: Loudspeaker) -> None:
        """Play what is left of a turn that is done, without a session."""
        while not (playback := self._take_heard(loudspeaker)[0]).drained:
            await asyncio.sleep(TICK_S)
        self._finish(spoken, playback)

    def _take_heard(self, loudspeaker: Loudspeaker) -> tuple[LoudspeakerState, Pcm16]:
        """Return how far playback is, and what was heard since the last call, which the recording gets, too."""
        playback = loudspeaker.playback()
        heard = loudspeaker.take_heard()
        if self._record is not None:
            self._record.heard(heard)
        return playback, heard

    def _measure_connection(self, now: float) -> None:
        client, meters = self._client, self.meters
        meters.away_seconds, meters.kept_input_ms = None, 0.0
        if now > self._behind_until_s:
            meters.behind_ms = 0.0
        if self._away_until_s is not None:
            meters.away_seconds = max(0.1, self._away_until_s - now)
            kept = client.sent_samples - self._lost_at_samples + sum(map(len, self._unsaid))
            meters.kept_input_ms = 1000 * kept / SAMPLE_RATE
        then, sent, received = self._rate
        if now - then >= RATE_INTERVAL_S:
            meters.sent_kbps = 8e-3 * (client.sent_bytes - sent) / (now - then)
            meters.received_kbps = 8e-3 * (client.received_bytes - received) / (now - then)
            self._rate = (now, client.sent_bytes, client.received_bytes)

    async def _interrupt(self, spoken: _Spoken) -> None:
        self._spoken = None  # before anything is awaited: a second interruption of this turn means nothing
        playback = self._loudspeaker.playback() if self._loudspeaker else _NOT_HEARD
        heard = self._loudspeaker.stop() if self._loudspeaker else 0
        self._view.event("interrupted", {"turn": spoken.turn, "heard_seconds": heard / SAMPLE_RATE})
        self._keep(spoken, heard)
        self._report(spoken, playback, "interrupted", whole=False)
        await self._client.interrupt(spoken.turn, heard)
        self._listen()

    def _finish(self, spoken: _Spoken, playback: LoudspeakerState) -> None:
        """Report a turn that is done and played to its end."""
        assert spoken.done is not None
        self._spoken = None
        if self._loudspeaker is not None:
            self._loudspeaker.stop()
        self._keep(spoken, spoken.done.samples)
        whole = spoken.done.reason != "interrupted"
        self._report(spoken, playback, spoken.done.reason, whole=whole)
        self.whole_turns += whole
        if self._file_ended_s is not None:
            self._end_of_file()
        self._listen()

    def _end_of_file(self) -> None:
        if not self.whole_turns:
            told = "heard no end of speech in the file" if self.last_report is None else "interrupted itself"
            raise ContinuationError(f"no continuation came whole: the server {told}")
        self._over.set()

    def _listen(self) -> None:
        self._spoken = None
        self.meters.state = "ready" if self._push_to_talk else "listening"
        self.meters.turn = self._client.turn
        if not self._over.is_set():
            self._view.event("listening", {"turn": self._client.turn})

    def _keep(self, spoken: _Spoken, samples: int) -> None:
        """Hold a turn's audio, in place of the turn of which it is another take. It is written when the next turn
        comes.
        """
        if self._kept is not None and self._kept[0] != spoken.of:
            self._write()
        if self._output is not None and spoken.pieces:
            self._kept = spoken.turn, np.concatenate(spoken.pieces)[:samples]

    def _write(self) -> None:
        if self._output is not None and self._kept is not None:
            self._output.write(self._kept[1])
        self._kept = None

    def _report(self, spoken: _Spoken, playback: LoudspeakerState, reason: str, *, whole: bool) -> None:
        latency = self._client.latency(spoken.turn)
        audible = None
        if playback.audible_s is not None and latency.speech_ended_s is not None:
            audible = 1000 * (playback.audible_s - latency.speech_ended_s)
        self.meters.first_audible_ms = audible
        self.last_report = TurnReport(
            turn=spoken.turn,
            reason=reason,
            whole=whole,
            seconds=latency.seconds,
            first_audio_ms=latency.first_audio_ms,
            first_audible_ms=audible,
            interval_p95_ms=latency.interval_p95_ms,
            underruns=playback.underruns,
            realtime_factor=latency.realtime_factor,
            rtt_ms=self._client.clock.best_rtt_ms,
            server_first_frame_ms=spoken.done.first_frame_ms if spoken.done else None,
            server_step_ms=spoken.done.mean_step_ms if spoken.done else None,
            voice=spoken.voice,
        )
        self._view.event("turn", asdict(self.last_report))


def _at(event: SpeechStarted | SpeechStopped) -> dict[str, object]:
    return {"turn": event.turn, "at_seconds": event.at_samples / SAMPLE_RATE}


def suggestion(suggestions: Sequence[str]) -> str:
    """Return what one might say, as a sentence."""
    *some, last = (f'"{one}"' for one in suggestions)
    return f"Try saying {', '.join(some)} or {last}." if some else f"Try saying {last}."
