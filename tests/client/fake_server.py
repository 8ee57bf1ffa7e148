"""A small protocol server for the client's tests: it has no model, and does what a test's script says."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.client.client import Audio, ContinuationClient
from streaming.protocol.messages import (
    AudioMessage,
    ClientMessage,
    Interrupt,
    Interrupted,
    Message,
    Ping,
    Pong,
    SamplingOptions,
    SessionClose,
    SessionClosed,
    SessionResume,
    SessionStart,
    SessionStarted,
    Speak,
    TurnDone,
    TurnSpeaking,
    decode_audio,
    decode_client,
    encode,
    encode_audio,
)

STARTED = SessionStarted(
    session="fake",
    protocol=1,
    model="fake",
    num_codebooks=4,
    sample_rate=SAMPLE_RATE,
    frame_samples=FRAME,
    context_samples=20 * SAMPLE_RATE,
    rewind_samples=SAMPLE_RATE,
    seed=7,
    turn=1,
    sampling=SamplingOptions(temperature=0.8, top_k=30, top_p=1.0, seed=7),
)


Reason = Literal["end", "max_seconds", "interrupted"]


def frame_of(turn: int, number: int) -> NDArray[np.int16]:
    """The frame that the fake continues with, recognisable by its values."""
    return np.full(FRAME, 100 * turn + number + 1, np.int16)


@dataclass
class Peer:
    """The server's end of one connection, and what came over it."""

    socket: ServerConnection
    start: SessionStart
    frames: int = 5
    turn: int = 1
    heard: list[AudioMessage] = field(default_factory=list)
    said: list[ClientMessage] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        await self.socket.send(encode(message))

    async def send_frame(self, turn: int, number: int) -> None:
        await self.socket.send(encode_audio(AudioMessage(turn, number * FRAME, frame_of(turn, number))))

    async def begin(self) -> None:
        prompt = sum(len(message.pcm) for message in self.heard)
        await self.send(TurnSpeaking(turn=self.turn, prompt_samples=prompt, dropped_samples=0))

    async def done(self, samples: int, reason: Reason = "max_seconds") -> None:
        turn, self.turn = self.turn, self.turn + 1
        await self.send(TurnDone(turn=turn, reason=reason, samples=samples, first_frame_ms=1.5, mean_step_ms=2.5))


Script = Callable[[Peer, ClientMessage], Awaitable[None]]


async def whole_turn(peer: Peer, message: ClientMessage) -> None:
    """The well-behaved script: `speak` is answered with a whole continuation, `interrupt` as the protocol says."""
    if isinstance(message, Speak):
        await peer.begin()
        for number in range(peer.frames):
            await peer.send_frame(peer.turn, number)
        await peer.done(peer.frames * FRAME)
    elif isinstance(message, Interrupt):
        if message.turn == peer.turn:
            await peer.done(peer.frames * FRAME, "interrupted")
        await peer.send(Interrupted(turn=message.turn, kept_samples=message.heard_samples // FRAME * FRAME))


@dataclass
class FakeServer:
    url: str
    peers: list[Peer]


@contextlib.asynccontextmanager
async def fake_server(
    script: Script = whole_turn,
    *,
    frames: int = 5,
    opening: Message = STARTED,
    gate: Callable[[ServerConnection, Request], Response | None] | None = None,
    tls: ssl.SSLContext | None = None,
    comes_back: Callable[[Peer], Awaitable[None]] | None = None,
) -> AsyncIterator[FakeServer]:
    """Listen on a free port of the loopback while the block lasts; `script` gets every control message but pings.

    gate: answers handshakes with something else, or lets them go on. comes_back: answers `session.resume`.
    """
    peers: list[Peer] = []

    async def handle(socket: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            start = decode_client(await socket.recv())
            if isinstance(start, SessionResume):
                assert comes_back is not None
                peer = Peer(socket, peers[-1].start, frames)
                await comes_back(peer)
            else:
                assert isinstance(start, SessionStart)
                await socket.send(encode(opening))
                if not isinstance(opening, SessionStarted):
                    await socket.close(1013, "refused")
                    return
                peer = Peer(socket, start, frames)
            peers.append(peer)
            while True:
                data = await socket.recv()
                if isinstance(data, bytes):
                    peer.heard.append(decode_audio(data))
                    continue
                message = decode_client(data)
                peer.said.append(message)
                match message:
                    case Ping():
                        await peer.send(Pong(id=message.id, client_time_ms=message.client_time_ms, server_time_ms=0.0))
                    case SessionClose():
                        await peer.send(SessionClosed(reason="client"))
                        await socket.close(1000)
                        return
                    case _:
                        await script(peer, message)

    async with serve(handle, "127.0.0.1", 0, compression=None, process_request=gate, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        yield FakeServer(f"{'ws' if tls is None else 'wss'}://127.0.0.1:{port}", peers)


async def half_a_turn(peer: Peer, message: ClientMessage) -> None:
    """The script of a server that goes silent in the middle of its answer."""
    if isinstance(message, Speak):
        await peer.begin()
        for number in range(peer.frames):
            await peer.send_frame(peer.turn, number)


async def never(_: Peer, __: ClientMessage) -> None:
    """The script of a server that says nothing."""
    await asyncio.sleep(0)


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test that may take 20 s."""

    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


async def one_turn(client: ContinuationClient) -> tuple[list[Audio], TurnDone]:
    """Events up to the next `TurnDone`."""
    audio: list[Audio] = []
    async for event in client.events():
        if isinstance(event, Audio):
            audio.append(event)
        if isinstance(event, TurnDone):
            return audio, event
    raise AssertionError("events ended in peace")
