"""The two servers that `wire` compares, each a process of its own: this project's with a step that takes nothing, and a
bare `websockets` server that moves messages of the same sizes.

`python -m streaming.benchmark.wire_servers real|bare`: prints its port, then, for every line that it reads, its
processor time so far, how much of that was spent in libopus and in the model of voice activity, which need no
interpreter's lock, and how much in the system, in seconds; ends with its input.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, serve

from streaming.audio import FRAME, FRAME_RATE
from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.files import AnyBytes
from streaming.models import voice_activity
from streaming.protocol import libopus, opus_calls
from streaming.server import event_loop
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.server import ServerOptions, Shutdown, run_server

MAX_SESSIONS = 512
MAX_BYTES = 2**20
_SPEAK = "speak "


def speak_message(frames: int) -> str:
    """Return what asks the bare server for a turn of so many frames."""
    return f"{_SPEAK}{frames}"


@dataclass(frozen=True)
class _Result:
    pcm: NDArray[np.float32]
    codes: NDArray[np.int64]
    ended: NDArray[np.bool_]
    broken: NDArray[np.bool_]


@dataclass(frozen=True)
class _IdleCopy:
    """A slot of `IdleStep`: the length of its stream is all that there is of it."""

    identity: str
    frames: int
    reach: int
    said: dict[str, str]

    def pieces(self) -> dict[int, int]:
        return {}


class IdleStep:
    """A step that takes nothing: every spoken frame is the same tone."""

    num_slots, num_codebooks, context_frames, rewind_frames = MAX_SESSIONS, 4, 256, 64
    identity = "idle"

    def __init__(self) -> None:
        self._frames = np.zeros(self.num_slots, np.int64)
        tone = 0.3 * np.sin(2 * np.pi * 220 / 24_000 * np.arange(FRAME))
        self._pcm = np.tile(tone.astype(np.float32), (self.num_slots, 1))
        self._codes = np.zeros((self.num_slots, self.num_codebooks), np.int64)
        self._no = np.zeros(self.num_slots, np.bool_)

    def open(self, slot: int, sampling: Sampling) -> None:
        self._frames[slot] = 0

    def configure(self, slot: int, sampling: Sampling) -> None:
        """Do nothing: no token is drawn."""

    def rewind(self, slot: int, frames: int) -> None:
        self._frames[slot] -= frames

    def reach(self, slot: int) -> int:
        return min(self.frames(slot), self.rewind_frames)

    def frames(self, slot: int) -> int:
        return int(self._frames[slot])

    def copy(
        self, slot: int, reach: int, base: _IdleCopy | None = None, common: int = 0
    ) -> Generator[None, None, _IdleCopy]:
        yield from ()
        return _IdleCopy(self.identity, self.frames(slot), reach, {})

    def put(
        self, slot: int, copy: _IdleCopy, sampling: Sampling, common: int = 0, longest: int | None = None
    ) -> Generator[None]:
        yield from ()
        self._frames[slot] = copy.frames

    def pack(self, copy: _IdleCopy, said: dict[str, str]) -> memoryview:
        return memoryview(bytearray(msgspec.json.encode(replace(copy, said=said))))

    @property
    def most_packed_bytes(self) -> int:
        return 0

    def unpack(self, data: AnyBytes) -> tuple[_IdleCopy, dict[str, str]]:
        copy = msgspec.json.decode(bytes(data), type=_IdleCopy)
        return copy, copy.said

    def is_fatal(self, error: Exception) -> bool:
        return False

    def follow(self) -> None:
        """Do nothing: there is no encoder."""

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: NDArray[np.float32],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64],
    ) -> _Result:
        rows = len(slots)
        self._frames[slots] += 1
        return _Result(self._pcm[:rows], self._codes[:rows], self._no[:rows], self._no[:rows])


async def serve_real() -> None:
    """Serve this project's protocols until the input ends."""
    keeper = Gatekeeper(
        check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False),
        limits=Limits(sessions_per_address=MAX_SESSIONS, connections_per_s=1e3, connection_burst=10 * MAX_SESSIONS),
    )
    shutdown = Shutdown()

    def listening(url: str) -> None:
        print(url.rpartition(":")[2].partition("/")[0], flush=True)
        _answer_times(shutdown.request_at_once)

    _time_what_needs_no_lock()
    with Engine(IdleStep(), "idle") as engine:
        await run_server(engine, keeper, ServerOptions(port=0), shutdown, listening)


async def serve_bare() -> None:
    """Serve messages of the same sizes until the input ends: what a client sends first is what comes as a frame."""

    async def speak(socket: ServerConnection, frame: str | bytes, frames: int) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for number in range(frames):
            await socket.send(frame)
            await asyncio.sleep(started + (number + 1) / FRAME_RATE - loop.time())

    async def handle(socket: ServerConnection) -> None:
        frame = await socket.recv()
        async with asyncio.TaskGroup() as turns:
            async for message in socket:
                if isinstance(message, str) and message.startswith(_SPEAK):
                    turns.create_task(speak(socket, frame, int(message.removeprefix(_SPEAK))))

    ended = asyncio.Event()
    async with serve(handle, "127.0.0.1", 0, compression=None, max_size=MAX_BYTES) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        _answer_times(ended.set)
        await ended.wait()


_without_lock: deque[float] = deque()
"""Times of the calls that need no interpreter's lock. Any thread may add to them."""


def _timed(function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        began = time.thread_time()
        result = function(*arguments)
        _without_lock.append(time.thread_time() - began)
        return result

    return call


def _time_what_needs_no_lock() -> None:
    """Have each call of libopus and of the model of voice activity timed, where these are installed."""
    if libopus.library_path() is not None:
        library: Any = libopus.library()
        calls: Any = opus_calls._calls()  # which has the addresses of libopus' own functions
        library.opus_encode, library.opus_decode = _timed(library.opus_encode), _timed(library.opus_decode)
        if calls is not None:
            calls.encode, calls.decode = _timed(calls.encode), _timed(calls.decode)
    with suppress(voice_activity.VoiceActivityUnavailableError):
        session = voice_activity.load_vad_model()._session
        session.run = _timed(session.run)


def _answer_times(ended: Callable[[], None]) -> None:
    """Tell the processor's time for every line of the input; have the loop call `ended` at its end."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        while sys.stdin.buffer.readline():
            print(time.process_time(), sum(_without_lock), os.times().system, flush=True)
        loop.call_soon_threadsafe(ended)

    threading.Thread(target=read, daemon=True).start()  # on Windows a loop cannot wait for a pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=("real", "bare"))
    name = parser.parse_args().server
    logging.disable(logging.CRITICAL)
    if name == "real":
        event_loop.run(serve_real())
    else:
        asyncio.run(serve_bare())


if __name__ == "__main__":
    main()
