"""The file that one run on a lent machine has to fill: nothing that goes wrong in one measurement costs another."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest

from streaming.benchmark import results
from streaming.benchmark.__main__ import parse
from streaming.benchmark.results import Run
from streaming.errors import StreamingError

STUB = "tests.benchmark.stub_run"


def _run(name: str, deed: str, *needs: str) -> Run:
    return Run(name, (STUB, deed), needs)


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (
        _run("fails", "fails"),
        _run("good", "good"),
        _run("better", "better"),
        _run("skipped", "good", "no_such_module"),
    )
    monkeypatch.setattr(results, "CPU_RUNS", known)


def _options(folder: Path, *only: str, timeout: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", only=list(only), list=False, folder=folder, timeout=timeout)


def _written(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_all_are_taken_and_told_whatever_becomes_of_one(tmp_path: Path) -> None:
    report = results.measure(_options(tmp_path))
    assert [row["outcome"] for row in report.rows] == [
        "failed with status 1",
        "ok",
        "ok",
        "skipped: no_such_module not installed",
    ]
    written = _written(tmp_path)
    assert written["machine"]["packages"]["torch"]
    assert written["runs"]["better"]["report"]["facts"] == {"deed": "better"}
    assert "no such device" in written["runs"]["fails"]["said"]
    assert written["runs"]["good"]["command"] == ["python", "-m", STUB, "good"]


def test_some_are_taken_anew_and_the_others_stay(tmp_path: Path) -> None:
    results.measure(_options(tmp_path, "good"))
    results.measure(_options(tmp_path, "bet"))
    assert sorted(_written(tmp_path)["runs"]) == ["better", "good"]
    with pytest.raises(StreamingError, match="there are fails, good, better, skipped"):
        results.measure(_options(tmp_path, "worse"))


def test_one_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    """A server of its own would stay behind and spoil every measurement after it."""
    record = results.take(_run("hangs", "hangs"), limit_s=3.0)
    assert record["outcome"] == "stopped after 3 s"
    child = int(record["said"])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline, "its child still runs"
        time.sleep(0.02)


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def test_an_installed_package_writes_no_results_among_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package wrote its results to site-packages/docs/results, where nobody looks for them."""
    assert parse(["results"]).folder == Path(__file__).parents[2] / "docs" / "results"
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert parse(["results"]).folder == Path("results")


@pytest.mark.parametrize("known", ["CPU_RUNS", "CUDA_RUNS"])
def test_every_command_is_one_that_there_is(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that was renamed would be noticed on a machine that is lent for minutes."""
    monkeypatch.undo()
    names = [run.name for run in getattr(results, known)]
    assert len(set(names)) == len(names)
    for run in getattr(results, known):
        if not run.is_test:
            assert run.arguments[0] == "streaming.benchmark"
            assert parse(list(run.arguments[1:])).command == run.arguments[1]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [("pass", "ok"), ("pytest.skip('no GPU')", "skipped: no test ran"), ("assert 0", "failed with")],
)
def test_tests_that_all_skipped_themselves_are_no_success(tmp_path: Path, body: str, outcome: str) -> None:
    """A machine whose GPU the tests did not see said that all was well."""
    (tmp_path / "test_one.py").write_text(f"import pytest\ndef test_one():\n    {body}\n", encoding="utf-8")
    record = results.take(Run("tests", ("pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))), limit_s=60.0)
    assert record["outcome"].startswith(outcome)
