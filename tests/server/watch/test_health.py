"""What the server says of its state to whoever starts, stops and routes to it."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.errors import EngineStoppedError
from streaming.protocol.messages import SessionStart
from streaming.server.admission import Admission
from streaming.server.watch.health import HEALTH, LIVE, READY, Health
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, client, run, serving

TALK = SessionStart(max_seconds=2)


def ask(server: LiveServer, path: str = "/health") -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(server.http + path, timeout=10) as response:  # noqa: S310  (loopback)
            return response.status, json.loads(response.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def statuses(server: LiveServer) -> tuple[int, int, int]:
    """Of `/health`, `/health/live`, `/health/ready`."""
    first, second, third = (ask(server, path)[0] for path in ("/health", "/health/live", "/health/ready"))
    return first, second, third


def test_a_full_server_is_well_and_lives_and_is_not_ready() -> None:
    """Balancers sent clients to a server that could only refuse them; or a full server was restarted, and all its talk
    cut.
    """

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, TALK):
            assert await asyncio.to_thread(statuses, server) == (200, 200, 503)
            status, figures = await asyncio.to_thread(ask, server)
            assert (status, figures["slots"], figures["sessions"], figures["free"]) == (200, 1, 1, 0)
            assert (figures["status"], figures["live"], figures["ready"]) == ("ready", True, False)

    with Engine(StubStep(1), "stub") as engine, serving(engine) as server:
        assert statuses(server) == (200, 200, 200)
        run(scenario(server))


def test_a_place_in_line_counts_as_room() -> None:
    async def scenario(server: LiveServer) -> None:
        async with client(server.url, TALK):
            status, figures = await asyncio.to_thread(ask, server, "/health/ready")
            assert (status, figures["free"], figures["waiting"], figures["queue"]) == (200, 0, 0, 1)

    with Engine(StubStep(1), "stub") as engine, serving(engine, queue=1) as server:
        run(scenario(server))


def test_a_server_that_stops_lives_and_one_that_failed_does_not() -> None:
    """A supervisor killed a server in the middle of its last turn; or it kept one that would never work again."""
    with Engine(StubStep(1), "stub") as engine:
        admission = Admission(engine)
        health = Health(engine, admission, (), "1")
        assert [health.fine(path) for path in (HEALTH, LIVE, READY)] == [True, True, True]
        admission.stop()
        assert [health.fine(path) for path in (HEALTH, LIVE, READY)] == [False, True, False]
        assert health.report()["status"] == "stopping"
    step = StubStep(1)
    step.failure, step.fatal = RuntimeError("lost"), True
    with Engine(step, "stub") as engine, suppress(EngineStoppedError), engine.open(seed=1) as session:
        session.listen(np.zeros(FRAME, np.float32))
        list(session.speak(max_frames=1))
    health = Health(engine, Admission(engine), (), "1")
    assert [health.fine(path) for path in (HEALTH, LIVE, READY)] == [False, False, False]
    assert health.report()["status"] == "failed"


def test_a_server_whose_step_hangs_does_not_live() -> None:
    """A supervisor has to start such a server again. Its health says which operations ran, too."""
    step = StubStep(1, gated=True)
    with Engine(step, "stub", operations="Triton", hung_s=0.2) as engine, suppress(EngineStoppedError):
        health = Health(engine, Admission(engine), (), "1")
        assert (health.live, health.report()["operations"]) == (True, "Triton")
        with engine.open(seed=1) as session:
            session.listen(np.zeros(FRAME, np.float32))
            list(session.speak(max_frames=1))
    assert [health.fine(path) for path in (HEALTH, LIVE, READY)] == [False, False, False]
    assert health.report()["status"] == "failed"
    step.allow_all()


def test_a_machine_that_is_too_slow_is_not_ready() -> None:
    """Such a server has a free slot, and cannot serve another session in time."""
    with Engine(StubStep(2, delay_s=lambda: 0.1), "stub") as engine, engine.open(seed=1) as session:
        health = Health(engine, Admission(engine), (), "1")
        for _ in range(3):
            session.listen(np.zeros(FRAME, np.float32))
        assert len(list(session.speak(max_frames=3))) == 3
        assert (health.live, health.running, health.ready) == (True, True, False)
        assert health.report()["overloaded"]


def test_a_process_is_told_from_another() -> None:
    """Figures of two servers behind one address were taken for one's, and their difference for what it had done."""
    with Engine(StubStep(1), "stub") as engine, serving(engine) as first, serving(engine) as second:
        told = [ask(server)[1]["instance"] for server in (first, second, first)]
    assert told[0] == told[2] != told[1]


def test_nothing_of_a_client_is_told() -> None:
    with Engine(StubStep(1), "stub") as engine, serving(engine) as server:
        assert set(ask(server)[1]) == {
            "status",
            "live",
            "ready",
            "model",
            "notice",
            "suggestions",
            "device",
            "operations",
            "version",
            "instance",
            "overloaded",
            "slots",
            "sessions",
            "free",
            "away",
            "waiting",
            "queue",
            "steps",
            "step_ms_p50",
            "step_ms_p99",
        }


@pytest.mark.parametrize(("waiting", "queue", "ready"), [(0, 0, True), (1, 2, True), (2, 2, False)])
def test_a_free_slot_is_for_those_in_line(waiting: int, queue: int, ready: bool) -> None:
    """Between the end of a session and the start of the next in line, newcomers were sent to a server with no room."""
    stats = SimpleNamespace(sessions=1, slots=2)
    engine = SimpleNamespace(failure=None, overloaded=False, stats=lambda: stats)
    admission = SimpleNamespace(stopping=False, waiting=waiting, queue=queue)
    health = Health(engine, admission, (), "1.0")  # type: ignore[arg-type]
    assert health.ready == ready
