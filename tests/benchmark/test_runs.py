"""Sessions over real WebSockets against steps that take a known time: what is reported must be so by construction."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.benchmark import plot, runs
from streaming.benchmark.__main__ import main
from streaming.benchmark.clients import Outcome
from streaming.benchmark.figures import Level, most_at_once
from streaming.benchmark.load import Job, Record, SessionRecord, TurnRecord, run_sessions
from streaming.benchmark.schedule import SessionPlan, Turn
from streaming.benchmark.target import Look
from tests.engine.stub_step import StubStep, running
from tests.server.live_server import run, serving

ROOT = Path(__file__).parents[2]
SPEECH = (8_000 * np.sin(np.arange(48_000))).astype(np.int16)
FRAME_S = FRAME / SAMPLE_RATE


def turn(speaks_s: float, over_s: float, prompt_frames: int = 5, *, interrupts: bool = False) -> Turn:
    return Turn(speaks_s, prompt_frames * FRAME, 0.9, over_s, interrupts)


def live_sessions(
    step: StubStep,
    *sessions: list[Turn],
    meanwhile: Callable[[], Any] | None = None,
    max_frames: int = 10,
    lead_ms: int = 1_000,
    patient: bool = False,
) -> Level:
    """Run sessions of these turns in this process. meanwhile: a coroutine beside them.

    The lead is long, so that only what a test arranges takes long enough to be heard.
    """
    records: list[Record] = []

    async def scenario(url: str) -> Outcome:
        plans = tuple(SessionPlan(i, 0.0, i, tuple(turns)) for i, turns in enumerate(sessions))
        job = Job(url, (), plans, FRAME, 80, lead_ms, max_frames * FRAME_S, "realtime", patient)
        begins_s = time.monotonic() + 0.1
        beside = asyncio.create_task(meanwhile()) if meanwhile is not None else None
        await run_sessions(job, SPEECH, begins_s, asyncio.Event(), records.append)
        if beside is not None:
            beside.cancel()
        turns = [record for record in records if isinstance(record, TurnRecord)]
        ended = [record for record in records if isinstance(record, SessionRecord)]
        return Outcome(begins_s, time.monotonic() - begins_s, turns, ended)

    with running(step) as engine, serving(engine) as server:
        outcome = run(scenario(server.url))
    return Level({"sessions": len(sessions)}, outcome, Look(0.0), Look(0.0), late_ms=20.0)


def test_a_step_of_thirty_ms_is_a_latency_of_two_of_them() -> None:
    """The prompt's last frame has to be heard, then the first one spoken."""
    level = live_sessions(StubStep(1, delay_s=lambda: 0.03), [turn(0.1, 2.3)])
    (lived,) = level.outcome.turns
    assert lived.outcome == "whole" and lived.underruns == 0 and lived.heard_seconds == pytest.approx(0.8)
    assert lived.first_audio_ms is not None and lived.first_audible_ms is not None
    assert 60 <= lived.first_audio_ms <= lived.first_audible_ms < 1_000
    assert lived.mean_step_ms is not None and lived.mean_step_ms >= 30
    assert len(lived.sends_late_ms) == 5 and len(lived.frames_late_ms) == 9
    assert level.row()["audible_ms_p50"] == pytest.approx(lived.first_audible_ms, abs=0.1)
    assert [session.ended for session in level.outcome.sessions] == ["done"]


def test_a_stall_beyond_the_lead_is_one_underrun_and_one_within_it_is_none() -> None:
    """The stalls last 1.2 s, in the first of two turns of 5 + 12 frames, and 0.15 s, in the second, when 0.5 s may be
    ahead.
    """
    calls = 0

    def delay_s() -> float:
        nonlocal calls
        calls += 1
        return {5 + 9: 1.2, 17 + 5 + 11: 0.15}.get(calls, 0.0)

    level = live_sessions(StubStep(1, delay_s=delay_s), [turn(0.1, 2.8), turn(2.8, 4.8)], max_frames=12, lead_ms=500)
    first, second = level.outcome.turns
    assert (first.outcome, first.underruns) == ("whole", 1) and max(first.frames_late_ms) > 1_200 - 500 - 160
    assert (second.outcome, second.underruns) == ("whole", 0)
    row = level.row()
    assert row["underruns"] == 1 and row["underruns_per_min"] == pytest.approx(60 / (2 * 12 * FRAME_S), rel=0.01)
    assert level.verdict != "ok" and "1 underruns" in level.told


def test_a_stalled_server_delays_nobodys_speech_and_silence_at_the_end_is_an_underrun() -> None:
    """Pins a closed loop: a client that waits for the answer before it goes on flatters a server that hangs."""
    step = StubStep(1, gated=True)
    step.allow(5 + 3)  # of the first turn: its prompt and three frames
    level = live_sessions(step, [turn(0.1, 1.5), turn(1.5, 2.5)], meanwhile=None)
    first, second = level.outcome.turns
    assert first.outcome == "overrun" and first.heard_seconds == pytest.approx(3 * FRAME_S)
    assert first.underruns == 1, "it ran dry before the turn was done, and nothing came any more"
    assert second.outcome == "overrun" and second.first_audible_ms is None and second.heard_seconds == 0
    assert second.ended_s == pytest.approx(1.5 + 5 * FRAME_S, abs=0.5)
    assert level.row()["overruns"] == 2 and "2 turns not over in time" in level.told


def test_speech_that_a_server_cannot_hear_in_time_is_counted_as_lost() -> None:
    step = StubStep(1, gated=True)
    level = live_sessions(step, [turn(0.1, 3.0, prompt_frames=34)])
    (lived,) = level.outcome.turns
    assert lived.dropped_ms > 0 and level.row()["dropped_ms"] == round(lived.dropped_ms)
    assert "of speech dropped" in level.told
    assert level.outcome.sessions[0].lagging >= 1


def test_a_planned_interruption_is_no_failure_and_who_is_refused_is_counted() -> None:
    turns = [turn(0.1, 0.9, interrupts=True), turn(0.9, 2.4)]
    level = live_sessions(StubStep(1), turns, turns, max_frames=8)
    assert [lived.outcome for lived in level.outcome.turns] == ["interrupted", "whole"]
    assert 0 < level.outcome.turns[0].heard_seconds < 8 * FRAME_S
    assert sorted(session.ended for session in level.outcome.sessions) == ["done", "refused"]
    refused = next(session for session in level.outcome.sessions if session.ended == "refused")
    assert refused.reason == "full" and refused.opened_s is None
    assert level.row()["refused"] == 1 and level.shortcomings == ["1 sessions refused"]
    assert most_at_once(level.outcome) == 1


def test_a_patient_session_comes_again_until_there_is_room() -> None:
    """A soak of two went on with one: the other came in the moment in which the server was busy starting."""
    turns = [turn(0.0, 0.2, prompt_frames=1)]
    level = live_sessions(StubStep(1), turns, turns, max_frames=1, patient=True)
    assert [session.ended for session in level.outcome.sessions] == ["done", "done"]
    assert level.row()["refused"] == 0 and most_at_once(level.outcome) == 1


def test_clients_that_are_late_themselves_spoil_the_run_and_say_so() -> None:
    """Pins a load generator that is the bottleneck, and calls it the server's latency."""

    async def busy() -> None:
        await asyncio.sleep(0.6)  # the session has begun
        for _ in range(4):
            time.sleep(0.16)  # two messages come due in it, the first before its middle
            await asyncio.sleep(0)

    level = live_sessions(StubStep(1), [turn(0.6, 2.0)], meanwhile=busy)
    assert level.client_late_ms is not None and level.client_late_ms > 40
    assert level.verdict == "invalid" and "late by themselves" in level.told


def record(**changes: Any) -> TurnRecord:
    whole = TurnRecord(0, 1, 1.0, 5.0, "whole", 50.0, 55.0, 2.0, 4.0, 0, 0.0, 20.0, 40.0, [1.0], [0.5])
    return msgspec.structs.replace(whole, **changes)


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({}, "ok"),
        ({"underruns": 1}, "failed"),
        ({"dropped_ms": 80.0}, "failed"),
        ({"outcome": "overrun"}, "failed"),
        ({"outcome": "interrupted"}, "ok"),
        ({"mean_step_ms": 81.0}, "failed"),
        ({"sends_late_ms": [0.0] * 9 + [500.0]}, "invalid"),
    ],
)
def test_the_gate_lets_nothing_through_that_is_heard(change: dict[str, Any], gate: str) -> None:
    outcome = Outcome(0.0, 10.0, [record(), record(**change)], [SessionRecord(0, "done", "", 0.0, 10.0, 0, 0)])
    assert Level({"sessions": 1}, outcome, Look(0.0), Look(0.0), 20.0).verdict == gate


def test_what_the_server_used_is_told_by_the_second_and_by_the_frame() -> None:
    """Processor time was divided by the wrong number: a server that takes 13 ms for each 80 ms of speech looked twice
    as fast, and its share of a core depended on how long it was looked at.
    """
    turns = [record(), record(prompt_seconds=1.0, heard_seconds=5.0)]  # 12 s in all: 150 frames
    outcome = Outcome(0.0, 10.0, turns, [SessionRecord(0, "done", "", 0.0, 10.0, 0, 0)])
    before, after = Look(0.0, cpu_seconds=10.0, process=1.0), Look(10.0, cpu_seconds=12.0, process=1.0)
    row = Level({}, outcome, before, after, 20.0).row()
    assert (row["server_cores"], row["cpu_ms_per_frame"]) == (0.2, 13.3)
    assert row["underruns_per_min"] == 0 and row["turns"] == 2
    again = Look(10.0, cpu_seconds=12.0, process=2.0)
    row = Level({}, outcome, before, again, 20.0).row()
    assert (row["server_cores"], row["cpu_ms_per_frame"]) == (None, None), "it was started anew in between"
    nothing = Outcome(0.0, 10.0, [], outcome.sessions)
    assert Level({}, nothing, before, after, 20.0).row()["cpu_ms_per_frame"] is None


def test_the_gate_goes_by_the_steps_of_its_own_run() -> None:
    """`/health` has the last thousand steps, among them those of a heavier level before."""
    outcome = Outcome(0.0, 10.0, [record()], [SessionRecord(0, "done", "", 0.0, 10.0, 0, 0)])
    slow_before = Look(0.0, {"step_ms_p50": 20.0, "step_ms_p99": 300.0})
    assert Level({}, outcome, Look(0.0), slow_before, 20.0).verdict == "ok"
    slow_now = Look(0.0, {}, {0.08: 90.0, 0.16: 100.0, float("inf"): 100.0})
    assert Level({}, outcome, Look(0.0), slow_now, 20.0).verdict == "failed"


# As a person runs them: clients in processes of their own

BRIEF = (
    *("--prompt-seconds", "0.2", "0.4", "--max-seconds", "0.4", "--pause-seconds", "1", "1.2"),
    *("--late-ms", "10000", "--jitter-ms", "1000", "--lead-ms", "2000"),
)


def report_of(command: str, tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    assert main([command, "--json", str(path), *BRIEF, *flags]) == 0
    return dict(json.loads(path.read_text()))


def test_latency_and_capacity_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has two sessions in two processes, the second as many as there is room for."""
    with running(StubStep(2)) as engine, serving(engine) as server:
        flags = ("--url", server.url, "--seconds", "0.5")
        report = report_of("latency", tmp_path, *flags, "--sessions", "2", "--processes", "2")
        (row,) = report["rows"]
        assert row["sessions"] == 2 and row["turns"] >= 2 and row["refused"] == row["failed"] == 0
        assert len(report["series"]["sessions 2"]) == row["turns"] and report["kind"] == "levels"
        assert "audible_ms_p99" in capsys.readouterr().out
    with running(StubStep(1)) as engine, serving(engine) as server:
        report = report_of("capacity", tmp_path, "--url", server.url, "--seconds", "0.5")
        assert report["facts"]["capacity"] == 1 and report["facts"]["all_slots"]
        assert [(row["sessions"], row["verdict"]) for row in report["rows"]][-1] == (1, "ok")
        assert "capacity: 1 sessions at once: all that there is room for" in capsys.readouterr().out


def test_a_soak_of_a_server_of_its_own_in_simulated_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.benchmark.stub_server"]
    monkeypatch.setattr(runs, "server_command", lambda *_: list(command))
    report = report_of("soak", tmp_path, "--sessions", "2", "--hours", "0.01", "--pace", "fast")
    rows = report["rows"]
    assert len(rows) == 10 and sum(row["turns"] for row in rows) == len(report["series"]["latency_ms"]) > 50
    assert rows[-1]["hours"] >= 0.01 and rows[0]["latency_ratio"] in (1.0, None)
    if sys.platform == "linux":
        assert rows[-1]["memory_mib"] > 10 and rows[-1]["memory_ratio"] < 2
    assert report["title"].startswith("soak: the last tenth against the first: latency x")


def test_ctrl_c_ends_a_soak_with_what_it_has(tmp_path: Path) -> None:
    with running(StubStep(1)) as engine, serving(engine) as server:
        command = [sys.executable, "-m", "streaming.benchmark", "soak", "--url", server.url, "--sessions", "1", *BRIEF]
        soak = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while engine.stats().steps < 60 and time.monotonic() < deadline:  # 38 of the first session, ten a turn
            time.sleep(0.05)
        soak.send_signal(signal.SIGINT)
        said, _ = soak.communicate(timeout=60)
        assert soak.returncode == 0 and "latency_ms_p50" in said and "hours 0" in said
        deadline = time.monotonic() + 30
        while engine.stats().sessions and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.stats().sessions == 0, "a client was left behind"


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of measurement ended in an ImportError."""
    nowhere = ("latency", "--url", "ws://127.0.0.1:9", "--plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*nowhere, str(tmp_path / "x.png")]) == 1
    assert 'pip install -e ".[benchmark]"' in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert main([*nowhere, str(tmp_path / "missing" / "x.png")]) == 1
    assert main([*nowhere, str(tmp_path / "x.jpg")]) == 1


@pytest.mark.parametrize("kind", ["levels", "windows"])
def test_reports_become_pictures(kind: str, tmp_path: Path) -> None:
    """A report may have rows without a figure, too."""
    pytest.importorskip("matplotlib")
    from streaming.benchmark.report import Report

    if kind == "levels":
        outcome = Outcome(0.0, 10.0, [record(), record(first_audible_ms=None)], [])
        rows = [Level({"sessions": n}, outcome, Look(0.0), Look(0.0), 20.0).row() for n in (1, 2)]
    else:
        rows = [{"hours": 0.1 * i, "latency_ms_p50": None, "latency_ms_p95": 3.0, "step_ms_p99": 4.0} for i in range(3)]
        for row in rows:
            row |= {"memory_ratio": None, "latency_ratio": 1.1, "step_ratio": 1.0, "cpu_ratio": 1.0}
    path = tmp_path / "x.png"
    plot.draw(Report("t", {}, rows, series={"sessions 1": [55.0], "sessions 2": []}, kind=kind), path)  # type: ignore[arg-type]
    assert path.read_bytes().startswith(b"\x89PNG") and os.path.getsize(path) > 10_000


def test_measuring_from_afar_loads_no_torch() -> None:
    """Client processes must stay light, and so must a laptop that measures another machine."""
    names = "streaming.benchmark.__main__, streaming.benchmark.capacity, streaming.benchmark.soak"
    program = f"import sys, {names}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_a_server_that_is_not_there_is_an_error_and_not_a_row_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--url", "ws://127.0.0.1:9", "--seconds", "1"]) == 1
    assert "nothing answers" in capsys.readouterr().err
