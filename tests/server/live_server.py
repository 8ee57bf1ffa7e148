"""A real server on a free port in a thread of its own, and a plain client that says what it is told to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message, SessionStart
from streaming.server import event_loop
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.server import ServerOptions, Shutdown, run_server

PATIENCE_S = 60.0
"""A wait as long as this is in vain, and the test fails."""

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def run(coroutine: Awaitable[T], seconds: float = PATIENCE_S) -> T:
    """Run one client's side, bounded in time."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(bounded())


def run_server_py(*flags: str) -> subprocess.CompletedProcess[str]:
    """`server.py` with flags that should end it by itself."""
    return subprocess.run(
        [sys.executable, "server.py", *flags],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def get(url: str) -> bytes:
    """Return the answer to a plain GET."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  (loopback)
        return bytes(response.read())


@dataclass
class LiveServer:
    """url: of the protocol's WebSocket. `stop` ends it; `join` waits until it has ended."""

    url: str
    stop: Callable[[], None]
    join: Callable[[], None]

    @property
    def http(self) -> str:
        return self.url.replace("ws", "http", 1).removesuffix(messages.PATH)


@contextmanager
def serving(engine: Engine, keeper: Gatekeeper | None = None, **options: Any) -> Iterator[LiveServer]:
    """`run_server` with this engine and `ServerOptions`, open to all on loopback. The engine stays the caller's."""
    keeper = keeper or Gatekeeper(check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False))
    ready = threading.Event()
    found: list[tuple[str, asyncio.AbstractEventLoop, Shutdown]] = []

    async def main() -> None:
        shutdown, loop = Shutdown(), asyncio.get_running_loop()

        def listening(url: str) -> None:
            found.append((url, loop, shutdown))
            ready.set()

        await run_server(engine, keeper, ServerOptions(port=0, **options), shutdown, listening)

    thread = threading.Thread(target=lambda: event_loop.run(main()), name="server")
    thread.start()
    assert ready.wait(PATIENCE_S)
    url, loop, shutdown = found[0]

    def end() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(shutdown.request)

    def join() -> None:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server did not end"

    try:
        yield LiveServer(url, end, join)
    finally:
        end()
        end()  # a second time: at once
        join()


@dataclass
class Client:
    """One session's socket, driven by hand. heard: int16 pcm by turn, as it came."""

    socket: ClientConnection
    position: int = 0
    audio: dict[int, list[NDArray[np.int16]]] = field(default_factory=dict)
    said: list[Message] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        await self.socket.send(messages.encode(message))

    async def hear(self, pcm: NDArray[np.int16], turn: int = 1, piece: int = FRAME) -> None:
        """Send audio in pieces of this many samples."""
        for at in range(0, len(pcm), piece):
            part = pcm[at : at + piece]
            await self.socket.send(messages.encode_audio(AudioMessage(turn, self.position, part)))
            self.position += len(part)

    async def expect(self, kind: type[M]) -> M:
        """The next message of this kind; what comes before it is kept in `said` and `audio`."""
        while True:
            data = await self.socket.recv()
            if isinstance(data, bytes):
                self.take(messages.decode_audio(data))
                continue
            message = messages.decode_server(data)
            self.said.append(message)
            if isinstance(message, kind):
                return message

    def take(self, audio: AudioMessage) -> None:
        parts = self.audio.setdefault(audio.turn, [])
        assert audio.position_samples == sum(map(len, parts)), "a gap in the continuation"
        parts.append(audio.pcm)

    async def expect_audio(self, turn: int, frames: int) -> None:
        """Wait until this many frames of a turn have come."""
        while len(self.audio.get(turn, [])) < frames:
            data = await self.socket.recv()
            assert isinstance(data, bytes), data
            self.take(messages.decode_audio(data))

    async def speak(self, turn: int = 1) -> messages.TurnDone:
        """Ask for the continuation and take all of it."""
        await self.send(messages.Speak(turn=turn))
        return await self.expect(messages.TurnDone)

    def spoken(self, turn: int = 1) -> NDArray[np.int16]:
        """Return all audio of a turn."""
        return np.concatenate(self.audio.get(turn, [np.zeros(0, np.int16)]))


@asynccontextmanager
async def client(url: str, start: SessionStart, **connecting: Any) -> AsyncIterator[Client]:
    """A session that has started. connecting: for `websockets`' connect."""
    async with connect(url, compression=None, **connecting) as socket:
        session = Client(socket)
        await session.send(start)
        await session.expect(messages.SessionStarted)
        yield session
