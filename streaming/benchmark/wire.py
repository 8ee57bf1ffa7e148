"""What a session's frame costs the server beside the step: processor time with a step that takes nothing, against a
bare `websockets` server that moves messages of the same sizes, both in turn in one run.

Sessions hear for two seconds and speak for two, in real time, as people do; a frame is one of either. Hands-free ones
hear sound that is no speech, all the time. The clients are of this process, whose time does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME, FRAME_RATE, Pcm16
from streaming.benchmark import runs
from streaming.benchmark.report import Report, Value
from streaming.benchmark.wire_servers import MAX_BYTES, speak_message
from streaming.errors import ContinuationError, ProtocolError, StreamingError
from streaming.protocol.messages import (
    PATH,
    AudioMessage,
    OpusMessage,
    Played,
    SessionStart,
    Speak,
    encode,
    encode_audio,
)
from streaming.protocol.opus import OpusSender, opus_available

TURN_FRAMES = 25
"""A turn is heard for two seconds and spoken for two, unless less is asked for."""
_TONE = np.rint(8_000 * np.sin(2 * np.pi * 220 / 24_000 * np.arange(FRAME))).astype(np.int16)
_HISS = np.random.default_rng(0).integers(-300, 300, FRAME).astype(np.int16)
_HEAD = 100
"""Characters of a message in which its type stands."""
_PATIENCE, _PATIENCE_S = 5.0, 30.0
"""A measurement that takes so many times as long as it should, and so many seconds more, will not end by itself."""

Wire = str | bytes


@dataclass(frozen=True)
class _Traffic:
    """The messages of one session's client, made beforehand as far as possible, so that the clients keep up.

    path, opening: of the real server. opened: what stands in the message that says that the session has begun.
    heard(turn, position): a frame of speech. turn_ends(turn): the word to go on. played(turn, frames): the report of
    what was played. spoken: a frame as the server sends it; is_spoken tells one. done: what stands in the message that
    ends a turn. speaks: whether there are turns at all.
    """

    name: str
    path: str
    opening: Wire
    opened: str
    heard: Callable[[int, int], Sequence[Wire]]
    turn_ends: Callable[[int], Sequence[Wire]]
    played: Callable[[int, int], Sequence[Wire]]
    spoken: Wire
    is_spoken: Callable[[Wire], bool]
    done: str
    speaks: bool = True


def _native(name: str, start: SessionStart, pcm: Pcm16, *, speaks: bool = True) -> _Traffic:
    return _Traffic(
        name,
        PATH,
        encode(start),
        '"session.started"',
        lambda turn, position: [encode_audio(AudioMessage(turn, position, pcm))],
        lambda turn: [encode(Speak(turn=turn))],
        lambda turn, frames: [encode(Played(turn=turn, samples=FRAME * frames))],
        encode_audio(AudioMessage(1, 0, _TONE)),
        lambda data: isinstance(data, bytes),
        '"turn.done"',
        speaks,
    )


def _opus(turn_frames: int) -> _Traffic:
    """Return Opus, of which one stream serves all sessions: only its messages' turns and positions differ."""
    sender = OpusSender()
    pieces = [sender.push(AudioMessage(1, number * FRAME, _TONE)) for number in range(turn_frames)]
    rest = sender.flush()

    def placed(pieces: Sequence[OpusMessage], turn: int, base: int) -> list[Wire]:
        return [
            encode_audio(OpusMessage(turn, base + p.position_samples, p.fresh, p.skip, p.samples, p.packets))
            for p in pieces
        ]

    def heard(turn: int, position: int) -> list[Wire]:
        number = position // FRAME % turn_frames
        return placed(pieces[number], turn, position - number * FRAME)

    def turn_ends(turn: int) -> list[Wire]:
        return [*placed(rest, turn, (turn - 1) * turn_frames * FRAME), encode(Speak(turn=turn))]

    def played(turn: int, frames: int) -> list[Wire]:
        return [encode(Played(turn=turn, samples=FRAME * frames))]

    start = SessionStart(codecs=("opus",), max_seconds=turn_frames / FRAME_RATE)
    return _Traffic(
        "native, Opus",
        PATH,
        encode(start),
        '"session.started"',
        heard,
        turn_ends,
        played,
        encode_audio(pieces[-1][-1]),
        lambda data: isinstance(data, bytes),
        '"turn.done"',
    )


def _openai(turn_frames: int) -> _Traffic:
    audio = base64.b64encode(_TONE.tobytes()).decode()
    append = json.dumps({"type": "input_audio_buffer.append", "audio": audio})
    session = {
        "type": "realtime",
        "audio": {"input": {"turn_detection": None}},
        "max_output_tokens": 4 * turn_frames,
    }
    delta = {
        "type": "response.output_audio.delta",
        "event_id": "event_0123456789abcdef_12",
        "response_id": "resp_0123456789abcdef",
        "item_id": "item_0123456789abcdef",
        "output_index": 0,
        "content_index": 0,
        "delta": audio,
    }
    return _Traffic(
        "OpenAI",
        "/v1/realtime?model=idle",
        json.dumps({"type": "session.update", "session": session}),
        '"session.updated"',
        lambda turn, position: [append],
        lambda turn: [json.dumps({"type": "response.create"})],
        lambda turn, frames: [],
        json.dumps(delta),
        lambda data: "output_audio.delta" in str(data[:_HEAD]),
        '"response.done"',
    )


def _traffics(turn_frames: int) -> list[_Traffic]:
    found = [_native("native, PCM", SessionStart(max_seconds=turn_frames / FRAME_RATE), _TONE)]
    if opus_available():
        found.append(_opus(turn_frames))
    found.append(_openai(turn_frames))
    found.append(_native("hands-free", SessionStart(turn_taking="vad"), _HISS, speaks=False))
    return found


@dataclass
class _Count:
    """Frames that have gone to the server, and come from it."""

    heard: int = 0
    spoken: int = 0


@dataclass(frozen=True)
class _Spent:
    """Processor time: all of it, what of it needed no interpreter's lock, and what of it the system took."""

    all: float
    free: float
    system: float


@dataclass(frozen=True)
class _Server:
    """A server's process. url: without a path."""

    process: asyncio.subprocess.Process
    url: str
    bare: bool

    async def spent(self) -> _Spent:
        """Return the processor time that it has taken so far."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"\n")
        return _Spent(*map(float, (await self.process.stdout.readline()).split()))


@asynccontextmanager
async def _server(name: str) -> AsyncIterator[_Server]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "streaming.benchmark.wire_servers", name, stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        yield _Server(process, f"ws://127.0.0.1:{port}", name == "bare")
    finally:
        process.stdin.close()
        await process.wait()


@dataclass(frozen=True)
class _Talk:
    """The turns of all sessions of a measurement: how many, and of how many frames each way."""

    traffic: _Traffic
    turns: int
    turn_frames: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", type=runs.count, nargs="+", default=[32, 128], metavar="N", help="How many sessions talk at once."
    )
    parser.add_argument("--seconds", type=runs.positive, default=8.0, metavar="S", help="How long each session talks.")
    parser.add_argument(
        "--rounds", type=runs.count, default=3, metavar="N", help="How often both servers are measured, in turn."
    )
    parser.add_argument("--only", default="", metavar="NAME", help="Measure only what has this in its name.")


def measure(options: argparse.Namespace) -> Report:
    """`wire`: see the module."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Report:
    rows: list[dict[str, Value]] = []
    frames = max(2, round(options.seconds * FRAME_RATE))
    turn_frames = min(TURN_FRAMES, frames // 2)
    async with _server("real") as real, _server("bare") as bare:
        for traffic in _traffics(turn_frames):
            if options.only.lower() in traffic.name.lower():
                talk = _Talk(traffic, max(1, round(frames / (2 * turn_frames))), turn_frames)
                rows += [await _row(real, bare, talk, sessions, options.rounds) for sessions in options.sessions]
    facts = {"seconds": options.seconds, "rounds": options.rounds}
    notes = [
        "server_ms, bare_ms: processor time of the server's process for one frame of one session, the median of the "
        "rounds; lock_ms: without what needs no interpreter's lock, which is libopus and the model of voice activity; "
        "system_ms: what of it the system took, mostly for sockets, for which Python lets go of the lock; "
        "of_a_lock: lock_ms of all sessions; frames: moved by each server in a round."
    ]
    return Report("wire: what a frame costs the server beside the step", facts, rows, notes)


async def _row(real: _Server, bare: _Server, talk: _Talk, sessions: int, rounds: int) -> dict[str, Value]:
    ours: list[_Spent] = []
    theirs: list[_Spent] = []
    counts: list[_Count] = []
    for _ in range(rounds):
        for server, costs in ((real, ours), (bare, theirs)):
            count = _Count()
            costs.append(await _frame_ms(server, talk, sessions, count))
            counts.append(count)
    server_ms, bare_ms = (statistics.median(cost.all for cost in costs) for costs in (ours, theirs))
    lock_ms = statistics.median(cost.all - cost.free for cost in ours)
    return {
        "traffic": talk.traffic.name,
        "sessions": sessions,
        "frames": counts[0].heard + counts[0].spoken,
        "bare_frames": counts[1].heard + counts[1].spoken,
        "server_ms": round(server_ms, 4),
        "bare_ms": round(bare_ms, 4),
        "ratio": round(server_ms / bare_ms, 2),
        "lock_ms": round(lock_ms, 4),
        "system_ms": round(statistics.median(cost.system for cost in ours), 4),
        "of_a_lock": round(lock_ms * FRAME_RATE * sessions / 1e3, 3),
    }


async def _frame_ms(server: _Server, talk: _Talk, sessions: int, count: _Count) -> _Spent:
    """Return the processor time of a frame, in ms. Raises `StreamingError` where a session ends early, or none ends."""
    limit_s = _PATIENCE_S + _PATIENCE * 2 * talk.turn_frames * (talk.turns + 1) / FRAME_RATE
    ready, go = asyncio.Semaphore(0), asyncio.Event()
    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as clients:
            for number in range(sessions):
                clients.create_task(_client(server, talk, number / sessions, ready, go, count))
            for _ in range(sessions):
                await ready.acquire()
            before = await server.spent()
            go.set()
            for _ in range(sessions):
                await ready.acquire()
            after, frames = await server.spent(), count.heard + count.spoken
            return _Spent(
                1e3 * (after.all - before.all) / frames,
                1e3 * (after.free - before.free) / frames,
                1e3 * (after.system - before.system) / frames,
            )
    except TimeoutError:
        moved = f"{count.heard} frames were heard and {count.spoken} spoken"
        raise ContinuationError(f"{sessions} sessions of {talk.traffic.name} are stuck: {moved}") from None
    except ExceptionGroup as group:
        found = group.subgroup(StreamingError)
        if found is None:
            raise
        raise _first(found) from None


def _first(group: ExceptionGroup[StreamingError]) -> StreamingError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


async def _client(
    server: _Server, talk: _Talk, phase: float, ready: asyncio.Semaphore, go: asyncio.Event, count: _Count
) -> None:
    """Be one session. phase: of a turn, so that sessions neither hear nor speak all at once. ready: released when it
    has begun, and when it has said and heard everything.
    """
    traffic = talk.traffic
    url = server.url + ("/" if server.bare else traffic.path)
    # Without pings of the client's own: a server that is late is measured, and not taken for a dead one.
    async with connect(url, compression=None, max_size=MAX_BYTES, ping_interval=None) as to:
        await to.send(traffic.spoken if server.bare else traffic.opening)
        while not server.bare and traffic.opened not in str((await to.recv())[:_HEAD]):
            pass
        ready.release()
        await go.wait()
        come = _Come()
        async with asyncio.TaskGroup() as both:  # a reader that fails ends the session's turns, too
            reading = both.create_task(_read(to, server.bare, talk, come, count))
            await _talk(to, server.bare, talk, phase, come, count)
            reading.cancel()
        ready.release()


class _Come:
    """The server's messages so far. frames: released with each frame of a turn; turns: at the end of each turn."""

    def __init__(self) -> None:
        self.frames, self.turns = asyncio.Semaphore(0), asyncio.Semaphore(0)


async def _read(socket: ClientConnection, bare: bool, talk: _Talk, come: _Come, count: _Count) -> None:
    """Note and count what comes. Raises `ProtocolError` where the session ends."""
    spoken = 0
    with suppress(ConnectionClosed):
        async for data in socket:
            if talk.traffic.is_spoken(data):
                spoken += 1
                if spoken <= talk.turn_frames:  # the rest of an Opus stream is another message, and not counted
                    count.spoken += 1
                    come.frames.release()
            if spoken == talk.turn_frames if bare else talk.traffic.done in str(data[:_HEAD]):
                spoken = 0
                come.turns.release()
    raise ProtocolError(f"the server ended a session of {talk.traffic.name}: {socket.close_code} {socket.close_reason}")


async def _talk(socket: ClientConnection, bare: bool, talk: _Talk, phase: float, come: _Come, count: _Count) -> None:
    """Speak, and play what comes, in real time. A frame is played only once it has come."""
    traffic, position = talk.traffic, 0
    clock = time.monotonic() + 2 * talk.turn_frames * phase / FRAME_RATE
    for turn in range(1, talk.turns + 1):
        for _ in range(talk.turn_frames * (1 if traffic.speaks else 2)):
            await asyncio.sleep(clock - time.monotonic())
            clock += 1 / FRAME_RATE
            for message in traffic.heard(turn, position):
                await socket.send(message)
            position += FRAME
            count.heard += 1
        if not traffic.speaks:
            continue
        for message in [speak_message(talk.turn_frames)] if bare else traffic.turn_ends(turn):
            await socket.send(message)
        for frames in range(1, talk.turn_frames + 1):
            await come.frames.acquire()
            clock = max(clock, time.monotonic()) + 1 / FRAME_RATE
            await asyncio.sleep(clock - time.monotonic())
            for message in traffic.played(turn, frames):
                await socket.send(message)
        await come.turns.acquire()
        clock = max(clock, time.monotonic())
