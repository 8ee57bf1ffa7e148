"""Sessions that come, speak, are interrupted and die at random: nothing may pile up, nobody may be harmed.

CHURN_SECONDS makes it longer than CI can wait; CHURN_SEED replays a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionStart
from tests.engine.stub_step import StubStep
from tests.server.live_server import Client, client, get, run, serving

SECONDS = float(os.environ.get("CHURN_SECONDS", "6"))
SEED = int(os.environ.get("CHURN_SEED", "20261122"))
CLIENTS = 12
SPEECH = (np.arange(25 * FRAME) % 251).astype(np.int16)


async def _live(session: Client, chance: random.Random, until: float) -> None:
    """Some turns, each ended in one of the ways in which turns end; none begins later than that."""
    for turn in range(1, chance.randint(1, 4) + 1):
        if time.monotonic() > until:
            return
        await session.hear(SPEECH[: chance.randint(1, len(SPEECH))], turn=turn, piece=chance.choice((240, 960, FRAME)))
        await session.send(messages.Speak(turn=turn))
        await session.expect(messages.TurnSpeaking)
        if chance.random() < 0.5:
            await session.send(messages.Interrupt(turn=turn, heard_samples=chance.randint(0, 9 * FRAME)))
            await session.expect(messages.Interrupted)
        else:
            await session.expect(messages.TurnDone)


async def _come_and_go(url: str, chance: random.Random, until: float, counts: dict[str, int]) -> None:
    while time.monotonic() < until:
        start = SessionStart(
            pace=chance.choice(("fast", "realtime")),
            lag="wait",
            max_seconds=chance.choice((0.08, 0.4, 2.0)),
            sampling=SamplingOptions(seed=chance.randint(0, 9)),
        )
        end = chance.choice(("close", "leave", "reset", "rubbish"))
        with contextlib.suppress(ConnectionClosed):
            try:
                async with client(url, start) as session:
                    dying = chance.random() < 0.4
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(chance.uniform(0, 0.2) if dying else None):
                            await _live(session, chance, until)
                    counts[end] += 1
                    if end == "close":
                        await session.send(messages.SessionClose())
                    elif end == "reset":
                        session.socket.transport.abort()
                    elif end == "rubbish":
                        await session.socket.send(chance.randbytes(chance.randint(0, 99)))
            except ConnectionClosed:
                counts["refused"] += 1
                await asyncio.sleep(chance.uniform(0, 0.05))


class _Figures(NamedTuple):
    """What must stay flat. step_ms: median of the last thousand steps."""

    kib: int
    files: int
    threads: int
    step_ms: float


def _figures(engine: Engine) -> _Figures:
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    resident = int(status.partition("VmRSS:")[2].split()[0])
    step_ms = engine.stats().step_ms_p50
    assert step_ms is not None
    return _Figures(resident, len(os.listdir("/proc/self/fd")), threading.active_count(), round(step_ms, 4))


def test_sessions_that_come_and_go_leave_nothing_behind() -> None:
    """More clients than slots, and one steady session beside them whose audio must be what it is alone."""
    print(f"CHURN_SEED={SEED}")
    steady = SessionStart(pace="fast", max_seconds=4.0, lag="wait", sampling=SamplingOptions(seed=1))
    counts = dict.fromkeys(("close", "leave", "reset", "rubbish", "refused"), 0)
    found: list[_Figures] = []

    async def turn(url: str) -> bytes:
        async with client(url, steady) as session:
            await session.hear(SPEECH)
            await session.speak()
            return session.spoken().tobytes()

    async def watch(url: str, until: float, wanted: bytes) -> int:
        turns = 0
        while time.monotonic() < until:
            try:
                assert await turn(url) == wanted
            except ConnectionClosed:
                await asyncio.sleep(0.01)  # full just now
                continue
            turns += 1
        return turns

    async def churn(url: str, seconds: float, wanted: bytes, seed: int) -> int:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(_come_and_go(url, random.Random(seed + number), until, counts))
            watched = tasks.create_task(watch(url, until, wanted))
        return watched.result()

    async def empty(health: str) -> dict[str, object]:
        while (figures := json.loads(await asyncio.to_thread(get, health)))["sessions"]:
            await asyncio.sleep(0.02)
        return dict(figures)

    with Engine(StubStep(8)) as engine, serving(engine) as server:
        health = f"{server.http}/health"
        wanted = run(turn(server.url))
        turns = 0
        for phase in range(4):  # the first fills what is filled once
            turns += run(churn(server.url, SECONDS / 4, wanted, SEED + phase * CLIENTS), seconds=SECONDS + 120)
            assert run(empty(health))["status"] == "ready"
            found.append(_figures(engine))
            print(f"after {phase + 1} quarters: {counts}, steady turns: {turns}, {found[-1]}", flush=True)
        assert run(turn(server.url)) == wanted
    assert turns > 0
    assert min(counts[end] for end in ("close", "leave", "reset", "rubbish")) > 0
    early, late = found[0], found[-1]
    assert late.kib < early.kib + 20_000
    assert late.files <= early.files
    assert late.threads <= early.threads
    assert late.step_ms < 5 * early.step_ms, "steps that do the same took longer and longer"
