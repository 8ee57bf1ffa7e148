"""Sessions that come and go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from streaming.benchmark import churn, runs
from streaming.benchmark.__main__ import main
from streaming.benchmark.target import Look
from tests.engine.stub_step import StubStep, running
from tests.server.live_server import serving


def test_sessions_come_and_go_and_who_is_refused_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "churn.json"
    with running(StubStep(1)) as engine, serving(engine) as server:
        flags = ("--url", server.url, "--at-once", "1", "3", "--seconds", "0.5")
        assert main(["churn", "--json", str(path), *flags]) == 0
        assert engine.stats().sessions == 0
    report = json.loads(path.read_text())
    alone, crowded = report["rows"]
    assert alone["sessions"] >= 3 and alone["refused"] <= 1 and alone["open_ms_p50"] > 0
    assert crowded["refused"] > 0 and any("full" in note for note in report["notes"])
    if sys.platform == "linux":
        assert alone["server_cpu_ms"] > 0


def test_the_figures_are_those_of_a_session_and_of_the_time_that_went_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sessions a second by the time that was asked for, and not by that which it took, flatter a server whose last
    session hangs; and the second row counted the processor time of the first once more.
    """
    now_s = own_s = 100.0
    cpu_s = iter((10.0, 10.5, 12.0))

    class Server:
        url, several = "ws://nowhere", False

        async def look(self) -> Look:
            return Look(now_s, {"slots": 4}, cpu_seconds=next(cpu_s))

    @asynccontextmanager
    async def target(options: argparse.Namespace, sessions: int) -> AsyncIterator[Server]:
        assert sessions == 2
        yield Server()

    async def come_and_go(url: str, until_s: float, opened_ms: list[float], refused: list[str]) -> None:
        """Take two seconds of the clock, four times as long as it may."""
        nonlocal now_s, own_s
        assert until_s == pytest.approx(now_s + 0.5) or opened_ms
        opened_ms.extend([10.0, 20.0, 30.0, 40.0, 100.0])
        now_s += 2.0
        own_s += 0.1

    monkeypatch.setattr(runs, "target", target)
    monkeypatch.setattr(churn, "_come_and_go", come_and_go)
    monkeypatch.setattr(churn, "time", SimpleNamespace(monotonic=lambda: now_s, process_time=lambda: own_s))
    path = tmp_path / "churn.json"
    assert main(["churn", "--json", str(path), "--at-once", "1", "2", "--seconds", "0.5"]) == 0
    alone, crowded = json.loads(path.read_text())["rows"]
    assert (alone["at_once"], alone["sessions"], alone["refused"]) == (1, 5, 0)
    assert (crowded["at_once"], crowded["sessions"], crowded["refused"]) == (2, 10, 0)
    assert alone["sessions_per_s"] == crowded["sessions_per_s"] == 2.5
    assert (alone["open_ms_p50"], alone["open_ms_p99"]) == (30.0, 97.6)
    assert (alone["server_cpu_ms"], crowded["server_cpu_ms"]) == (100.0, 150.0)
    assert (alone["client_cpu_ms"], crowded["client_cpu_ms"]) == (20.0, 20.0)
