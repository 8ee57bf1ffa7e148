"""Servers that are somewhere else: with TLS and tokens, behind a proxy, or several behind one address."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from streaming.benchmark.__main__ import main, parse
from streaming.benchmark.figures import cpu_seconds
from streaming.benchmark.target import Look, Target, steps_between
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.tls import load_tls
from streaming.server.door.tokens import Tokens
from tests.benchmark.balancer import balancing
from tests.benchmark.test_target import METRICS, answering
from tests.engine.stub_step import StubStep, running
from tests.server.certificate import self_signed
from tests.server.live_server import serving

ANN, READER = "ann-0123456789abcdef", "reader-0123456789abcdef"
BRIEF = (
    *("--prompt-seconds", "0.2", "0.4", "--max-seconds", "0.4", "--pause-seconds", "1", "1.2", "--seconds", "0.5"),
    *("--late-ms", "10000", "--jitter-ms", "1000", "--lead-ms", "2000"),
)


def report_of(command: str, tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    assert main([command, "--json", str(path), *BRIEF, *flags]) == 0
    return dict(json.loads(path.read_text()))


def test_the_capacity_of_two_servers_is_that_of_both(tmp_path: Path) -> None:
    """The capacity was held to the slots of the server that answered, and steps were the difference of one server's
    counts and another's.
    """
    with (
        running(StubStep(1)) as one,
        running(StubStep(1)) as two,
        serving(one) as first,
        serving(two) as second,
        balancing(first.url, second.url) as url,
    ):
        report = report_of("capacity", tmp_path, "--url", url, "--tries", "1", "--max-sessions", "2")
    assert report["facts"]["capacity"] == report["facts"]["servers_seen"] == 2
    assert [(row["sessions"], row["refused"]) for row in report["rows"]] == [(1, 0), (2, 0)]
    for row in report["rows"]:
        assert row["step_ms_p99"] is None and row["server_cores"] is None, "whose would they be?"
        assert row["turn_step_ms_p50"] is not None, "each turn's own server said so"
    assert any("several servers" in note for note in report["notes"])


def test_tls_a_token_another_for_the_figures_and_what_one_token_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/metrics` takes the token named metrics alone, which opens no session: with one token for both there were no
    step times.
    """
    certificate, key = self_signed(tmp_path)
    tokens = Tokens.from_text(f"ann:{ANN},metrics:{READER}")
    bind = check_bind("127.0.0.1", tokens, tls=True, insecure_plaintext=False)
    keeper = Gatekeeper(bind, tokens, limits=Limits(sessions_per_token=1))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("STREAMING_TOKEN", ANN)
    monkeypatch.setenv("STREAMING_METRICS_TOKEN", READER)
    tls = load_tls(str(certificate), str(key))
    with running(StubStep(4)) as engine, serving(engine, keeper, tls=tls) as server:
        assert server.url.startswith("wss://")
        report = report_of("capacity", tmp_path, "--url", server.url, "--tries", "1", "--max-sessions", "2")
        one, two = report["rows"]
        assert (one["refused"], one["failed"]) == (0, 0) and one["turns"] >= 1 and one["step_ms_p99"] is not None
        assert two["refused"] == 1 and report["facts"]["capacity"] == 1
        assert "no limit of the server's" in report["title"], "one token may have one session; there are four slots"
        monkeypatch.delenv("STREAMING_METRICS_TOKEN")
        assert not asyncio.run(Target(server.url).look()).buckets


def test_a_server_under_a_name_of_its_own_tells_its_figures_there() -> None:
    """A proxy that serves a server at /speech passes /speech/health on, and knows no /health."""
    with answering({"/speech/health": '{"slots": 7}', "/speech/metrics": METRICS}) as url:
        seen = asyncio.run(Target(url.replace("/v1/", "/speech/v1/")).look())
    assert seen.slots == 7 and seen.buckets


def test_counts_that_shrink_are_of_another_process() -> None:
    """A server was restarted, or a second one does not say which it is: the steps between two looks were fewer than
    none.
    """
    many, few = {0.08: 90.0, float("inf"): 100.0}, {0.08: 120.0, float("inf"): 80.0}
    assert steps_between(Look(0.0, {}, many), Look(0.0, {}, few)).source == "none"
    old, new = Look(0.0, {}, many, cpu_seconds=50.0, process=1.0), Look(0.0, {}, many, cpu_seconds=60.0, process=2.0)
    assert cpu_seconds(old, new) is None and steps_between(old, new).source == "none"
    one = Look(0.0, {"instance": "a", "step_ms_p50": 1.0, "step_ms_p99": 2.0})
    other = Look(0.0, {"instance": "b", "step_ms_p50": 1.0, "step_ms_p99": 2.0})
    assert (steps_between(one, one).source, steps_between(one, other).source) == ("health", "none")


def test_another_protocol_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["capacity", "--url", "wss://talk.example/v1/realtime"])
    assert "/v1/continue" in capsys.readouterr().err
