"""A client process: sessions that speak and listen at the times that were planned for them, and records of them.

`python -m streaming.benchmark.load` takes a `Job` and then a `Go` as JSON lines on its standard input, gives `Ready`,
`TurnRecord`s and `SessionRecord`s on its standard output, and ends at once when its input does. It imports no torch.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec
import numpy as np

from streaming.audio import SAMPLE_RATE, Pcm16, read_audio, to_int16
from streaming.benchmark.schedule import SessionPlan, Turn
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import RefusedError
from streaming.client.tasks import run_until, sleep_until
from streaming.command import call_at_end_of_input
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import Error, InputDropped, InputLagging, SamplingOptions, SessionStart, TurnDone
from streaming.terminal.jitter_buffer import START_MS, JitterBuffer
from streaming.terminal.loudspeaker import SimulatedLoudspeaker

_TICK_S = 0.04
"""The interval in which playback is reported: half of the 80 ms that the protocol allows."""
_FAST_PIECE = SAMPLE_RATE // 2


class Job(msgspec.Struct, frozen=True):
    """The work of one process. speech: recordings that prompts are cut from. message_samples: of speech, in one
    message. The token for the server is in the environment variable STREAMING_TOKEN.

    pace "fast": everything as fast as the server takes it; nobody plays, so nothing runs dry or is interrupted.
    patient: who is refused and told when to try again does so; else it is a session less.
    """

    url: str
    speech: tuple[str, ...]
    sessions: tuple[SessionPlan, ...]
    message_samples: int
    jitter_ms: int
    lead_ms: int
    max_seconds: float
    pace: Literal["realtime", "fast"]
    patient: bool = False
    open_timeout_s: float = 30.0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process has loaded what it needs."""


class Go(msgspec.Struct, frozen=True):
    """When the run begins, by `time.monotonic`, which the processes of a machine share."""

    at_s: float


class TurnRecord(msgspec.Struct, frozen=True, tag="turn"):
    """The record of one turn. Times ending in _s are seconds from the start of the run.

    outcome: `whole`: heard to its end in time; `interrupted`: as planned; `overrun`: its time was over before it was
    heard, or before anything was.
    first_audible_ms: from the last sample of speech to the first that left the loudspeaker; first_audio_ms: to the
    first message. Speech ends when its last sample is handed to the socket, or would have been if the socket had taken
    what came before in time: a server that holds the socket back does not stop the clock.
    frames_late_ms: each frame's arrival against a listener who plays from the first frame on and never waits; below 0
    it was early. sends_late_ms: how much later than planned each message was sent for reasons of this process's own.
    """

    session: int
    turn: int
    ended_s: float
    over_s: float
    outcome: Literal["whole", "interrupted", "overrun"]
    first_audio_ms: float | None
    first_audible_ms: float | None
    prompt_seconds: float
    heard_seconds: float
    underruns: int
    dropped_ms: float
    mean_step_ms: float | None
    server_first_frame_ms: float | None
    frames_late_ms: list[float]
    sends_late_ms: list[float]


class SessionRecord(msgspec.Struct, frozen=True, tag="session"):
    """A session at its end. ended: `done`, `refused`, `failed`, or `stopped` with the run; reason: the refusal's code,
    or what failed. opened_s: None if it never began. lagging, errors: how often the server said so.
    """

    session: int
    ended: Literal["done", "refused", "failed", "stopped"]
    reason: str
    opened_s: float | None
    closed_s: float
    lagging: int
    errors: int


Record = TurnRecord | SessionRecord
Output = Ready | TurnRecord | SessionRecord


@dataclass(slots=True)
class _Hearing:
    """The turn that is being heard; bounded by max_seconds."""

    turn: int
    ended_s: float
    sends_late_ms: list[float]
    frames: list[tuple[float, int]] = field(default_factory=list)
    reported_samples: int = 0
    done: TurnDone | None = None


class _Session:
    """One planned session. begins_s: of the run, by `time.monotonic`."""

    def __init__(self, job: Job, plan: SessionPlan, speech: Pcm16, begins_s: float, emit: Callable[[Record], None]):
        self._job, self._plan, self._speech = job, plan, speech
        self._begins_s, self._emit = begins_s, emit
        # The target does not grow: the server is measured, and not the listener's buffer.
        buffer = JitterBuffer(max_ms=max(START_MS, job.jitter_ms))
        buffer.target_ms = job.jitter_ms
        self._loudspeaker = SimulatedLoudspeaker(buffer)
        self._hearing: _Hearing | None = None
        self._done = asyncio.Event()
        self._opened_s: float | None = None
        self._dropped_samples = self._lagging = self._errors = 0

    async def run(self) -> None:
        """Run the whole session. Its record is emitted whatever happens."""
        ended: Literal["done", "refused", "failed", "stopped"] = "stopped"
        reason = ""
        try:
            await sleep_until(self._begins_s + self._plan.arrives_s)
            while not await self._open():
                pass
            ended = "done"
        except RefusedError as error:
            ended, reason = "refused", error.refusal
        except (ContinuationError, ProtocolError) as error:
            ended, reason = "failed", str(error)
        finally:
            record = SessionRecord(
                self._plan.number, ended, reason, self._opened_s, self._now(), self._lagging, self._errors
            )
            self._emit(record)

    async def _open(self) -> bool:
        """Run the session from its opening to its end. Return whether it is over, and not to be tried again."""
        try:
            await self._live()
        except RefusedError as error:
            if not self._job.patient or not error.retry_after_ms:
                raise
            await asyncio.sleep(1e-3 * error.retry_after_ms)
            return False
        return True

    async def _live(self) -> None:
        job = self._job
        start = SessionStart(
            pace=job.pace,
            max_seconds=job.max_seconds,
            lead_ms=job.lead_ms,
            sampling=SamplingOptions(seed=self._plan.seed),
        )
        token = os.environ.get("STREAMING_TOKEN") or None
        async with ContinuationClient.connect(job.url, start, token=token, open_timeout_s=job.open_timeout_s) as client:
            self._opened_s = self._now()
            over = asyncio.Event()
            # The last two end only by failing.
            await run_until(over, self._talk(client, over), self._receive(client), self._report_playback(client))

    # Speech out

    async def _talk(self, client: ContinuationClient, over: asyncio.Event) -> None:
        """Take all turns, then set `over`."""
        await (self._talk_in_time(client) if self._job.pace == "realtime" else self._talk_fast(client))
        over.set()

    async def _talk_in_time(self, client: ContinuationClient) -> None:
        arrived_s = self._begins_s + self._plan.arrives_s
        for turn in self._plan.turns:
            await self._prompt(client, turn, arrived_s + turn.speaks_s)
            await sleep_until(arrived_s + turn.over_s)
            await self._end_turn(client, turn)

    async def _prompt(self, client: ContinuationClient, turn: Turn, begins_s: float) -> None:
        """Speech in real time: a message is due when its last sample has been spoken."""
        late_ms: list[float] = []
        due_s, free_s, sent = begins_s, begins_s, 0
        for piece in self._pieces(turn, self._job.message_samples):
            sent += len(piece)
            due_s = begins_s + sent / SAMPLE_RATE
            await sleep_until(due_s)
            own_delay_s = time.monotonic() - max(due_s, free_s)
            late_ms.append(round(1e3 * own_delay_s, 2))
            await client.send(piece)
            free_s = time.monotonic()
        # This is set before anything is awaited: audio may come at once.
        self._hearing = _Hearing(client.turn, due_s + 1e-3 * late_ms[-1], late_ms)
        await client.speak()

    async def _talk_fast(self, client: ContinuationClient) -> None:
        for turn in self._plan.turns:
            for piece in self._pieces(turn, _FAST_PIECE):
                await client.send(piece)
            self._done.clear()
            self._hearing = hearing = _Hearing(client.turn, time.monotonic(), [])
            await client.speak()
            await self._done.wait()
            self._record(hearing, turn, "whole", None, hearing.done.samples if hearing.done else 0, 0)

    def _pieces(self, turn: Turn, samples: int) -> list[Pcm16]:
        begin = int(turn.prompt_at * len(self._speech))
        prompt = self._speech.take(range(begin, begin + turn.prompt_samples), mode="wrap")
        return [prompt[at : at + samples] for at in range(0, len(prompt), samples)]

    async def _end_turn(self, client: ContinuationClient, turn: Turn) -> None:
        hearing, playback = self._hearing, self._loudspeaker.playback()
        assert hearing is not None
        self._hearing = None
        whole = hearing.done is not None and playback.drained
        # The turn is silent at this moment: an underrun that nothing has ended.
        dry = hearing.done is None and playback.audible_s is not None and playback.buffered_ms == 0
        heard = self._loudspeaker.stop()
        as_planned = turn.interrupts and playback.audible_s is not None
        outcome: Literal["whole", "interrupted", "overrun"] = (
            "whole" if whole else "interrupted" if as_planned else "overrun"
        )
        self._record(hearing, turn, outcome, playback.audible_s, heard, playback.underruns + dry)
        if not whole:
            await client.interrupt(hearing.turn, heard)

    def _record(
        self,
        hearing: _Hearing,
        turn: Turn,
        outcome: Literal["whole", "interrupted", "overrun"],
        audible_s: float | None,
        heard_samples: int,
        underruns: int,
    ) -> None:
        first_s = hearing.frames[0][0] if hearing.frames else None
        late_ms = [
            round(1e3 * (arrived_s - hearing.frames[0][0] - position / SAMPLE_RATE), 2)
            for arrived_s, position in hearing.frames[1:]
        ]
        dropped, self._dropped_samples = self._dropped_samples, 0
        self._emit(
            TurnRecord(
                session=self._plan.number,
                turn=hearing.turn,
                ended_s=hearing.ended_s - self._begins_s,
                over_s=self._now(),
                outcome=outcome,
                first_audio_ms=None if first_s is None else 1e3 * (first_s - hearing.ended_s),
                first_audible_ms=None if audible_s is None else 1e3 * (audible_s - hearing.ended_s),
                prompt_seconds=turn.prompt_samples / SAMPLE_RATE,
                heard_seconds=heard_samples / SAMPLE_RATE,
                underruns=underruns,
                dropped_ms=1e3 * dropped / SAMPLE_RATE,
                mean_step_ms=hearing.done.mean_step_ms if hearing.done else None,
                server_first_frame_ms=hearing.done.first_frame_ms if hearing.done else None,
                frames_late_ms=late_ms,
                sends_late_ms=hearing.sends_late_ms,
            )
        )

    # Events in

    async def _receive(self, client: ContinuationClient) -> None:
        async for event in client.events():
            hearing = self._hearing
            match event:
                case Audio() if hearing is not None and event.turn == hearing.turn:
                    hearing.frames.append((event.arrived_s, event.position_samples))
                    if self._job.pace == "realtime":
                        self._loudspeaker.play(event.pcm)
                case TurnDone() if hearing is not None and event.turn == hearing.turn:
                    hearing.done = event
                    self._loudspeaker.complete()
                    self._done.set()
                case InputDropped(samples=samples):
                    self._dropped_samples += samples
                case InputLagging():
                    self._lagging += 1
                case Error():
                    self._errors += 1
                case _:
                    pass

    async def _report_playback(self, client: ContinuationClient) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            hearing = self._hearing
            if hearing is not None and hearing.frames and self._job.pace == "realtime":
                played = self._loudspeaker.playback().played_samples
                if played > hearing.reported_samples:
                    hearing.reported_samples = played
                    await client.played(hearing.turn, played)

    def _now(self) -> float:
        return time.monotonic() - self._begins_s


async def run_sessions(
    job: Job, speech: Pcm16, begins_s: float, stop: asyncio.Event, emit: Callable[[Record], None]
) -> None:
    """Run all of the job's sessions, at their times, until they are done or `stop` is set."""
    sessions = [asyncio.create_task(_Session(job, plan, speech, begins_s, emit).run()) for plan in job.sessions]
    stopping = asyncio.create_task(stop.wait())
    everybody = asyncio.gather(*sessions)
    try:
        await asyncio.wait((everybody, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        everybody.cancel()
        with suppress(asyncio.CancelledError):
            await everybody


def load_speech(paths: tuple[str, ...]) -> Pcm16:
    """Return the recordings one after another, int16 [n]. Raises `AudioError`."""
    return np.concatenate([to_int16(read_audio(path)) for path in paths])


def main() -> int:
    first = sys.stdin.buffer.readline()
    if not first:
        return 1
    job = msgspec.json.decode(first, type=Job)
    speech = load_speech(job.speech)
    encoder = msgspec.json.Encoder()

    def say(output: Output) -> None:
        sys.stdout.buffer.write(encoder.encode(output) + b"\n")
        sys.stdout.buffer.flush()

    say(Ready())
    second = sys.stdin.buffer.readline()
    if not second:
        return 1
    go = msgspec.json.decode(second, type=Go)

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        call_at_end_of_input(partial(loop.call_soon_threadsafe, stop.set))
        await run_sessions(job, speech, go.at_s, stop, say)

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
