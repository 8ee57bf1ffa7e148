"""Sessions that come and go."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from streaming.benchmark.__main__ import main
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
