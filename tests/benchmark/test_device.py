"""The one command for a GPU that is lent for minutes: nothing in it may be found wrong there for the first time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from streaming.benchmark import device
from streaming.benchmark.__main__ import parse
from streaming.benchmark.device import SIZES, Item, measure, plan
from streaming.benchmark.processes import GPU_TESTS
from streaming.command import OutputError
from streaming.errors import StreamingError

ROOT = Path(__file__).parents[2]
STUB = "tests.benchmark.stub_run"


def _options(out: Path, *flags: str) -> argparse.Namespace:
    return parse(["device", "--out", str(out), "--size", "tiny", *flags])


def _item(name: str, deed: str, limit_s: float = 60.0, *, decides: bool = False) -> Item:
    return Item(name, lambda _: (STUB, deed), limit_s, decides=decides)


def _runs(out: Path) -> dict[str, Any]:
    runs = json.loads((out / "device-tiny.json").read_text(encoding="utf-8"))["runs"]
    assert isinstance(runs, dict)
    return runs


@pytest.mark.parametrize("size", SIZES)
def test_every_command_is_one_that_there_is(size: str) -> None:
    """A flag that was renamed would be noticed on a machine that is lent for minutes."""
    names = [item.name for item in plan(size)]
    assert len(set(names)) == len(names)
    for item in plan(size):
        for left_s in (5.0, 1000.0):
            module, *arguments = item.arguments(left_s)
            if module == "streaming.benchmark":
                assert parse(arguments).command == arguments[0]
            else:
                assert module == "pytest"


@pytest.mark.parametrize(("size", "minutes"), [("1.3b", 9.75), ("8b", 5.0)])
def test_the_limits_fit_the_time(size: str, minutes: float) -> None:
    """What comes last would otherwise never be run. Few items take all of their time."""
    assert sum(item.limit_s for item in plan(size)) <= 60 * minutes
    assert [item.name for item in plan(size) if item.decides] == ["smoke"]
    assert [item.name for item in plan(size)][:2] == ["versions", "smoke"]


def test_results_are_kept_as_they_come_whatever_becomes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    items = (_item("good", "good"), _item("fails", "fails"), _item("hangs", "hangs", 3.0), _item("better", "better"))
    monkeypatch.setattr(device, "plan", lambda size: items)
    report = measure(_options(tmp_path / "made"))
    assert [row["outcome"] for row in report.rows] == ["ok", "failed with status 1", "stopped after 3 s", "ok"]
    runs = _runs(tmp_path / "made")
    assert runs["better"]["report"]["facts"] == {"deed": "better"}
    assert "there is no such device" in (tmp_path / "made" / "device-tiny.log").read_text()
    assert "hangs: stopped after 3 s" in capfd.readouterr().err
    assert len(list((tmp_path / "made").iterdir())) == 2


def test_nothing_is_measured_after_a_smoke_test_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain operations were measured for the kernels, for minutes that do not come back."""
    items = (_item("smoke", "fails", decides=True), _item("good", "good"))
    monkeypatch.setattr(device, "plan", lambda size: items)
    report = measure(_options(tmp_path))
    assert [row["outcome"] for row in report.rows] == ["failed with status 1", "skipped: smoke failed with status 1"]
    assert "no such device" in _runs(tmp_path)["smoke"]["said"]


def test_everything_is_measured_without_the_kernel_that_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel that said something wrong ended all of a lent quarter of an hour."""
    items = (_item("smoke", "blames", decides=True), _item("after", "good"))
    monkeypatch.setattr(device, "plan", lambda size: items)
    report = measure(_options(tmp_path))
    assert {row["item"]: row["outcome"] for row in report.rows} == {
        "smoke": "failed with status 1",
        "smoke without draw": "failed with status 1",
        "smoke without draw,gate": "ok",
        "after": "ok",
    }
    assert _runs(tmp_path)["after"]["report"]["facts"] == {"deed": "good", "without": "draw,gate"}


def test_a_smoke_test_that_blames_the_same_kernel_again_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a command that runs the same item until its time is over."""
    items = (_item("smoke", "blames always", decides=True), _item("after", "good"))
    monkeypatch.setattr(device, "plan", lambda size: items)
    outcomes = [row["outcome"] for row in measure(_options(tmp_path)).rows]
    assert outcomes[:2] == ["failed with status 1"] * 2
    assert str(outcomes[2]).startswith("skipped: smoke without draw failed")
    assert len(outcomes) == 3


def test_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item gets what is left, and is not begun for less than a few seconds."""
    items = (_item("hangs", "hangs", 600.0), _item("good", "good"))
    monkeypatch.setattr(device, "plan", lambda size: items)
    monkeypatch.setattr(device, "_LEAST_S", 1.0)
    started = time.monotonic()
    report = measure(_options(tmp_path, "--minutes", "0.1"))
    assert time.monotonic() - started < 60
    first, second = (str(row["outcome"]) for row in report.rows)
    assert first.startswith("stopped after ")
    assert second == "skipped: no time was left"


def test_latency_s_loads_share_the_time_that_is_left() -> None:
    """A latency run that is killed in its last load leaves no report at all."""
    latency = next(item for item in plan("1.3b") if item.name == "latency")
    told = [float(parse(list(latency.arguments(left)[1:])).seconds) for left in (60.0, 120.0, 1000.0)]
    assert told == sorted(told)
    assert told[0] == 6.0
    assert 4 * (told[-1] + 8.0) + 50.0 <= latency.limit_s + 1.0


@pytest.mark.parametrize("size", ["1.3b", "tiny"])
def test_sweep_s_trials_leave_time_for_their_report(size: str) -> None:
    """Trials were begun for 40 s of 45, counted from when the weights were there: the run was killed and left no
    report.
    """
    sweep = next(item for item in plan(size) if item.name == "sweep")
    for left_s in (20.0, 1000.0):
        told = float(parse(list(sweep.arguments(left_s)[1:])).seconds)
        assert 5.0 <= told <= min(left_s, sweep.limit_s) / 2


def test_wrong_names_and_places_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(StreamingError, match="there are versions, smoke"):
        measure(_options(tmp_path, "--only", "no such item"))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--out"):
        measure(_options(tmp_path / "file"))
    with pytest.raises(OutputError, match="there are no wheels in it"):
        measure(_options(tmp_path, "--wheels", str(tmp_path)))


def test_the_items_are_listed_without_a_gpu(tmp_path: Path) -> None:
    report = measure(parse(["device", "--out", str(tmp_path), "--size", "1.3b", "--list"]))
    assert [row["item"] for row in report.rows][:3] == ["versions", "smoke", "tests"]
    assert not list(tmp_path.iterdir())


def test_the_tests_of_a_gpu_are_found_where_the_wire_s_packages_are_not() -> None:
    """On a machine with a GPU, torch and little else, 39 files could not be collected."""
    command = ("pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", *GPU_TESTS)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.bare", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "tests/test_gpu.py::" in ran.stdout
    assert "error" not in ran.stdout.lower().splitlines()[-1]


def test_every_measurement_runs_where_the_wire_s_packages_are_not() -> None:
    """All measurements failed at their imports for want of msgspec, which engines need and models do not: nothing would
    have been measured in a lent quarter of an hour.
    """
    command, environment = [sys.executable, "-m", "tests.bare", "tests.benchmark.dry_run"], {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = [line.split(": ")[:2] for line in ran.stdout.splitlines()]
    assert [name for name, _ in told] == [item.name for item in plan("tiny") if not item.needs]
    assert all(int(rows) > 0 for _, rows in told)


def test_no_test_of_a_gpu_is_anywhere_else() -> None:
    """A test elsewhere would never run: the command names these places."""
    marks = ("pytest.mark.gpu", "import DEVICES", "gpu: ")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__) and any(mark in path.read_text(encoding="utf-8") for mark in marks)
    ]
    assert found
    assert [path for path in found if not path.startswith(GPU_TESTS)] == []
