"""What a run's records come to: figures and verdicts, from records that are written by hand."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import pytest
import torch

from streaming.benchmark import soak
from streaming.benchmark.clients import Outcome
from streaming.benchmark.figures import Level, most_at_once
from streaming.benchmark.likelihood import compare
from streaming.benchmark.load import SessionRecord, TurnRecord
from streaming.benchmark.target import Look
from streaming.benchmark.work import work_of
from streaming.compiler import SWITCH
from streaming.models.linear import linear
from streaming.models.operations.native.library import library

TURN = TurnRecord(0, 1, 1.0, 5.0, "whole", 50.0, 55.0, 2.0, 4.0, 0, 0.0, 20.0, 40.0, [1.0], [0.5])
DONE = SessionRecord(0, "done", "", 0.0, 10.0, 0, 0)


def turn(**changes: Any) -> TurnRecord:
    return msgspec.structs.replace(TURN, **changes)


def level(turns: list[TurnRecord], *sessions: SessionRecord) -> Level:
    return Level({}, Outcome(0.0, 10.0, turns, list(sessions or (DONE,))), Look(0.0), Look(0.0), late_ms=20.0)


def test_percentiles_are_those_that_they_are_called() -> None:
    """A table whose p99 shows the median tells of a server on which nobody ever waits."""
    row = level([turn(first_audible_ms=float(ms)) for ms in range(101)]).row()
    assert [row[f"audible_ms_p{p}"] for p in (50, 95, 99)] == [50, 95, 99]


@pytest.mark.parametrize(
    ("turns", "session", "shortcoming"),
    [
        ([turn(mean_step_ms=80.0)], DONE, "step p99 80 ms"),
        ([turn()] * 50 + [turn(mean_step_ms=90.0)] * 50, DONE, "step p99 90 ms"),
        ([turn()], SessionRecord(1, "failed", "1011", 0.0, 2.0, 0, 0), "1 sessions failed"),
        ([turn()], SessionRecord(1, "refused", "full", None, 2.0, 0, 0), "1 sessions refused"),
        ([], DONE, "no turn was spoken"),
    ],
)
def test_what_the_gate_of_capacity_stops(turns: list[TurnRecord], session: SessionRecord, shortcoming: str) -> None:
    """A frame lasts 80 ms: a step of 80 ms is late for the next one. Sessions that broke, and a level in which nobody
    spoke, were counted as carried.
    """
    found = level(turns, DONE, session)
    assert found.shortcomings == [shortcoming] and found.verdict == "failed"


def test_clients_may_be_late_by_so_much_and_no_more() -> None:
    assert level([turn(sends_late_ms=[20.0])]).valid and not level([turn(sends_late_ms=[20.5])]).valid


def test_sessions_at_once_are_those_that_were_open_together() -> None:
    """Sessions that came one after the other were told as all of them at once."""
    sessions = [SessionRecord(n, "done", "", float(n), n + 1.5, 0, 0) for n in range(6)]
    sessions.append(SessionRecord(6, "refused", "full", None, 3.0, 0, 0))
    assert most_at_once(Outcome(0.0, 10.0, [], sessions[::-1])) == 2


@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "packed"])
def test_a_product_counts_as_two_operations_for_each_weight_and_row(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that PyTorch's counter does not know were counted by half: the floor of a step that multiplies was half
    of what any machine takes.
    """
    monkeypatch.setenv(SWITCH, native)
    library.cache_clear()
    try:
        made = linear(torch.randn(48, 64), bias=torch.zeros(48))
        work = work_of(lambda: made(torch.randn(3, 64)), made)
    finally:
        library.cache_clear()
    assert work.operations == 2 * 3 * 48 * 64
    assert work.read_bytes >= 48 * 64 * 4


def test_a_difference_has_the_standard_error_of_its_mean() -> None:
    """Too small an error makes noise a finding: by sqrt(n), of 64 places an eighth is left."""
    reference = torch.zeros(16)
    losses = torch.tensor([0.0, 2.0]).repeat(8)
    mean, difference, error = compare(losses, reference)
    assert (mean, difference) == (1.0, 1.0)
    assert error == pytest.approx(float(losses.std()) / 4)
    assert compare(losses[:1], reference[:1])[2] == 0.0


def test_a_soak_s_windows_are_tenths_with_the_turns_and_the_time_that_fell_into_them() -> None:
    """Windows that ended a tenth too early, or were all measured from the start, showed a server that slows down, or
    grows, as one that does not.
    """
    turns = [turn(over_s=10.0 * n + 5.0, first_audible_ms=100.0 + n, mean_step_ms=10.0 + n) for n in range(10)]
    looks = [Look(1000.0 + 10.0 * n, {}, {}, 2**20 * (100.0 + n), 5.0 * n * (n + 1) / 2, 1.0) for n in range(11)]
    options = argparse.Namespace(
        pace="realtime", sessions=1, late_ms=20.0, url="ws://x", prompt_seconds=(1, 2), pause_seconds=(1, 2)
    )
    for name in ("max_seconds", "interrupt", "message_ms", "jitter_ms", "lead_ms", "seed"):
        setattr(options, name, 1)
    report = soak._report(options, Outcome(1000.0, 100.0, turns, [DONE]), looks)
    assert [row["turns"] for row in report.rows] == [1] * 10
    assert [row["latency_ms_p50"] for row in report.rows] == [100.0 + n for n in range(10)]
    assert [row["memory_mib"] for row in report.rows] == [101.0 + n for n in range(10)]
    frames = (2.0 + 4.0) / 0.08
    used = [pytest.approx(5e3 * (n + 1) / frames, abs=0.06) for n in range(10)]
    assert [row["cpu_ms_per_frame"] for row in report.rows] == used
    assert report.rows[-1]["cpu_ratio"] == pytest.approx(10.0) and report.rows[-1]["step_ratio"] == 1.9
    assert report.rows[-1]["hours"] == pytest.approx(100 / 3600, abs=1e-3)
