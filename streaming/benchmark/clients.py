"""Client processes, apart from the server: so many that sessions do not disturb each other's timing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from streaming.benchmark.load import Go, Job, Output, Ready, Record, SessionRecord, TurnRecord
from streaming.errors import StreamingError

SESSIONS_A_PROCESS = 16
"""Sessions in one client process. A session costs about a hundredth of a core."""
_ROOT = Path(__file__).resolve().parents[2]
_START_S = 0.3
_LOAD_TIMEOUT_S = 120.0
_GRACE_S = 10.0
_MAX_LINE_BYTES = 64 * 2**20

_output_decoder: msgspec.json.Decoder[Output] = msgspec.json.Decoder(Output)


class ClientsError(StreamingError):
    """A client process could not start, or broke: there is no measurement."""

    code = "no_clients"


@dataclass(frozen=True)
class Outcome:
    """The records of all sessions. begun_s: by `time.monotonic`; seconds: until the last session was over."""

    begun_s: float
    seconds: float
    turns: list[TurnRecord]
    sessions: list[SessionRecord]


async def run_clients(
    job: Job,
    *,
    processes: int | None = None,
    stop: asyncio.Event | None = None,
    heard: Callable[[Record], None] = lambda _: None,
) -> Outcome:
    """Run the job's sessions, dealt out to client processes, until all are over or `stop` is set.

    heard: told each record as it comes. Raises `ClientsError`.
    """
    count = processes or -(-len(job.sessions) // SESSIONS_A_PROCESS)
    shares = [msgspec.structs.replace(job, sessions=job.sessions[i::count]) for i in range(count)]
    turns: list[TurnRecord] = []
    sessions: list[SessionRecord] = []

    def take(record: Record) -> None:
        if isinstance(record, TurnRecord):
            turns.append(record)
        else:
            sessions.append(record)
        heard(record)

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_process()) for _ in shares]
        for client, share in zip(clients, shares, strict=True):
            await _say(client, share)
        try:
            async with asyncio.timeout(_LOAD_TIMEOUT_S):
                for client in clients:
                    if not isinstance(await _next(client), Ready):
                        raise ClientsError("a client process ended before it was ready; it says why above")
        except TimeoutError:
            raise ClientsError(f"the client processes were not ready in {_LOAD_TIMEOUT_S:g} s") from None
        begun_s = time.monotonic() + _START_S
        for client in clients:
            await _say(client, Go(at_s=begun_s))
        stopping = None if stop is None else asyncio.create_task(_close_when(stop, clients))
        try:
            await asyncio.gather(*(_gather(client, take) for client in clients))
        finally:
            if stopping is not None:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
        if any([await client.wait() for client in clients]):
            raise ClientsError("a client process failed; it says why above")
    return Outcome(begun_s, time.monotonic() - begun_s, turns, sessions)


async def _gather(client: asyncio.subprocess.Process, take: Callable[[Record], None]) -> None:
    while (output := await _next(client)) is not None:
        assert not isinstance(output, Ready)
        take(output)


async def _close_when(stop: asyncio.Event, clients: list[asyncio.subprocess.Process]) -> None:
    await stop.wait()
    for client in clients:
        assert client.stdin is not None
        client.stdin.close()


@contextlib.asynccontextmanager
async def _process() -> AsyncIterator[asyncio.subprocess.Process]:
    """A client process, ended with the block."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "streaming.benchmark.load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        limit=_MAX_LINE_BYTES,
        start_new_session=True,  # Ctrl-C reaches the benchmark alone, which ends its clients in order
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _say(client: asyncio.subprocess.Process, what: Job | Go) -> None:
    assert client.stdin is not None
    try:
        client.stdin.write(msgspec.json.encode(what) + b"\n")
        await client.stdin.drain()
    except ConnectionError:
        raise ClientsError("a client process ended before it was told what to do; it says why above") from None


async def _next(client: asyncio.subprocess.Process) -> Output | None:
    assert client.stdout is not None
    line = await client.stdout.readline()
    return _output_decoder.decode(line) if line else None
