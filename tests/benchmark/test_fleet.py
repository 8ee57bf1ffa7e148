"""Simulated fleets against what queueing theory says of them, and against what must be so whatever happens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streaming.benchmark.__main__ import main
from streaming.benchmark.fleet import first_frame_ms, late_share
from streaming.benchmark.simulation import Length, Policy, Scenario, simulate
from streaming.benchmark.steps import StepCurve, erlang_b

ONE = Scenario(1, 20, 0.8, "random", seconds=300_000, probe_s=1000, look_s=1000)
"""One server that is asked by everybody, for long enough to tell."""
MANY = Scenario(50, 20, 0.9, "two-choices", seconds=600)
STEADY = StepCurve("constant", (1, 20), (np.array([30.0]), np.array([30.0])))


def line_of(erlangs: float, slots: int, places: int) -> tuple[float, float]:
    """M/M/c/K: the share of arrivals that are refused, and for how many mean lengths the others wait on average."""
    weights = [1.0]
    for number in range(1, slots + places + 1):
        weights.append(weights[-1] * erlangs / min(number, slots))
    shares = np.array(weights) / sum(weights)
    waiting = shares @ np.maximum(0, np.arange(len(shares)) - slots)
    return float(shares[-1]), float(waiting / (erlangs * (1 - shares[-1])))  # Little's law


def test_erlang_b_is_the_textbooks_and_holds_for_large_pools() -> None:
    assert erlang_b(2.0, 1) == pytest.approx(2 / 3) and erlang_b(0.5, 2) == pytest.approx(1 / 13)
    assert erlang_b(100_000 * 0.9, 100_000) < 1e-9, "a large pool refuses nobody"


@pytest.mark.parametrize("length", ["exponential", "lognormal", "fixed"])
def test_one_server_refuses_what_erlang_says_whatever_the_lengths_are(length: Length) -> None:
    """M/G/n/n: the formula asks for the mean alone."""
    result = simulate(replace(ONE, length=length))
    refused = sum(result.turned_away) / sum(result.arrived)
    assert sum(result.arrived) > 20_000
    assert refused == pytest.approx(erlang_b(16, 20), rel=0.1)
    assert np.average(np.arange(21), weights=result.dwell_s) == pytest.approx(16 * (1 - refused), rel=0.03)


def test_a_line_refuses_and_delays_as_birth_and_death_say() -> None:
    result = simulate(replace(ONE, length="exponential", queue=5, load=0.9))
    refused, wait = line_of(18, 20, 5)
    assert sum(result.turned_away) / sum(result.arrived) == pytest.approx(refused, rel=0.15)
    assert np.mean(result.waits_s) == pytest.approx(wait * ONE.session_s, rel=0.15)


def test_policies_lie_between_nobody_who_chooses_and_one_pool() -> None:
    """Where nobody looks each server is alone with its share; whoever sees everything has nearly one pool of slots."""
    refused: dict[Policy, float] = {}
    for policy in ("random", "two-choices", "least-request"):
        refused[policy] = simulate(replace(MANY, policy=policy, seconds=2000, proxies=1)).share_turned_away(0)
    assert refused["random"] == pytest.approx(erlang_b(18, 20), rel=0.15)
    assert refused["random"] > 5 * refused["two-choices"]
    assert refused["two-choices"] >= refused["least-request"]
    assert refused["least-request"] == pytest.approx(erlang_b(900, 1000), abs=0.002)


def test_who_is_cut_by_a_failure_comes_back_or_is_told_missing() -> None:
    before = simulate(MANY)
    result = simulate(replace(MANY, event="kill", share=0.1))
    assert before.cut == 0 and before.arrived[0] == result.arrived[0], "until then nothing was different"
    assert result.turned_away[0] == before.turned_away[0]
    assert 5 * 20 * 0.5 < result.cut <= 5 * 20
    assert result.cut == len(result.recovery_s) + result.lost and result.lost < 0.1 * result.cut
    assert min(result.recovery_s) >= 0.5
    at = len(result.open) * (MANY.session_s + MANY.seconds / 2) / (MANY.session_s + MANY.seconds)
    assert min(result.open[int(at) : int(at) + 3]) < np.mean(result.open[: int(at)]) - 0.5 * result.cut
    assert sum(result.refused_at) == pytest.approx(sum(result.refusals.values()), abs=MANY.replicas * 20)


def test_a_dead_server_looks_idle_to_who_counts_connections() -> None:
    """All newcomers went to the servers that had just died, and were refused until a probe found them dead."""
    result = simulate(replace(MANY, policy="least-request", event="kill", share=0.04, load=0.7))
    assert "gone" not in result.refusals, "two are dead, and the third try meets one that lives"


def test_a_redeploy_replaces_all_and_keeps_the_rest_at_work() -> None:
    quiet = replace(MANY, load=0.5, seconds=2400, event="redeploy", share=0.2, restart_s=30)
    result = simulate(quiet)
    assert result.cut > 0.6 * 50 * 10, "everybody's server went, but for those who had left by themselves"
    assert result.lost == 0 and result.share_turned_away(1) == 0 and max(result.recovery_s) < 5
    assert min(result.open[5:]) > 0.8 * np.mean(result.open), "a fifth of the servers at a time, their people elsewhere"


def test_a_burst_is_only_that() -> None:
    result = simulate(replace(MANY, load=0.5, event="burst", share=3.0))
    assert result.share_turned_away(0) == 0 < result.share_turned_away(1)
    rate = MANY.rate / 0.9 * 0.5
    assert result.arrived[1] == pytest.approx(rate * (300 + 3 * 60), rel=0.1)


def test_frames_are_late_where_steps_are_and_as_often() -> None:
    slow = StepCurve("half of ten are late", (1, 10), (np.array([10.0]), np.array([60.0, 70.0, 90.0, 100.0])))
    assert late_share(STEADY, [1.0] * 11) == 0
    assert late_share(slow, [0.0] * 10 + [7.0]) == pytest.approx(0.5, abs=0.01)
    assert late_share(slow, [9.0, 90.0] + [0.0] * 8 + [9.0]) == pytest.approx(0.25, abs=0.01), "of frames, not of steps"


def test_the_first_frame_takes_two_steps_and_what_is_left_of_one() -> None:
    first = first_frame_ms(STEADY, [0.0, 1.0, 2.0], 0)
    assert first.min() == 60 and 85 < first.max() <= 90
    assert (first > 60).mean() == pytest.approx(30 / 80, abs=0.02)


def test_the_command_line_writes_a_report_and_a_picture_of_every_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    written, picture = tmp_path / "fleet.json", tmp_path / "fleet.png"
    flags = ("--replicas", "2", "5", "--load", "0.8", "0.9", "--minutes", "2", "--slots", "10", "--queue", "2")
    assert main(["fleet", *flags, "--json", str(written), "--plot", str(picture)]) == 0
    report = json.loads(written.read_text())
    assert report["kind"] == "fleet" and report["facts"]["steps"].startswith("computed: 1.3b-h100")
    assert [(row["replicas"], row["load"]) for row in report["rows"]] == [
        (replicas, load) for replicas in (2, 5) for load in (0.8, 0.9) for _ in range(5)
    ]
    assert all(row["wait_s_p99"] is not None and row["late_pct"] == 0 for row in report["rows"])
    assert len(report["series"]["random, load 0.9"]) == 120 // 5
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert "fleet: 16 to 45 sessions over up to 5 servers, simulated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", "nothing.json"), "neither a file"),
        (("--slots", "5000"), "1024 sessions at most"),
        (("--steps", "8b-h100", "--share-of-floor", "0.15"), "not even one session"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(
    flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fleet", *flags]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
