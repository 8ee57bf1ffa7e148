"""The most sessions that a server carries: the search, and what counts as carried."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streaming.benchmark import runs
from streaming.benchmark.__main__ import main
from streaming.benchmark.capacity import search
from streaming.benchmark.clients import Outcome
from streaming.benchmark.figures import Level
from streaming.benchmark.load import SessionRecord, TurnRecord
from streaming.benchmark.schedule import SessionPlan
from streaming.benchmark.target import Look

DONE = SessionRecord(0, "done", "", 0.0, 10.0, 0, 0)
WHOLE = TurnRecord(0, 1, 1.0, 5.0, "whole", 50.0, 55.0, 2.0, 4.0, 0, 0.0, 20.0, 40.0, [1.0], [0.5])
LATE = TurnRecord(0, 1, 1.0, 5.0, "whole", 50.0, 55.0, 2.0, 4.0, 0, 0.0, 20.0, 40.0, [1.0], [500.0])
CUT = TurnRecord(0, 1, 1.0, 5.0, "overrun", 50.0, 55.0, 2.0, 1.0, 3, 0.0, 20.0, 40.0, [1.0], [0.5])
REFUSED = SessionRecord(0, "refused", "too_many_sessions", None, 0.1, 0, 0)
Run = tuple[list[TurnRecord], list[SessionRecord]]
"""What the clients of a level lived."""


class _Server:
    """With room for eight."""

    url, several, instances = "ws://nowhere", False, frozenset[str]()

    async def look(self) -> Look:
        return Look(0.0, {"slots": 8})


@pytest.fixture
def capacity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], list[list[SessionPlan]]]]:
    """Measure with clients whose lives are given, by the number of sessions and the try. Returns the report and what
    was planned for each level.
    """

    def measured(lives: Callable[[int, int], Run], *flags: str) -> tuple[dict[str, Any], list[list[SessionPlan]]]:
        planned: list[list[SessionPlan]] = []

        @asynccontextmanager
        async def target(options: argparse.Namespace) -> AsyncIterator[_Server]:
            yield _Server()

        async def level(options: argparse.Namespace, server: _Server, label: Any, plans: list[SessionPlan]) -> Level:
            planned.append(plans)
            turns, sessions = lives(label["sessions"], label["try"])
            return Level(label, Outcome(0.0, 10.0, turns, sessions), Look(0.0), Look(0.0), options.late_ms)

        monkeypatch.setattr(runs, "target", target)
        monkeypatch.setattr(runs, "level", level)
        path = tmp_path / "capacity.json"
        assert main(["capacity", "--json", str(path), *flags]) == 0
        return json.loads(path.read_text()), planned

    return measured


def test_a_level_whose_clients_were_late_themselves_does_not_count(capacity: Any) -> None:
    """A load generator out of breath sends too little, too late: whatever the server did under that, its capacity was
    published as if it had carried the whole load.
    """
    report, _ = capacity(lambda sessions, attempt: ([WHOLE if sessions <= 3 else LATE], [DONE]))
    assert report["facts"]["capacity"] == 3 and not report["facts"]["all_slots"]
    assert report["title"] == "capacity: 3 sessions at once: there the clients were the limit, not the server"


def test_a_level_is_tried_again_with_other_speech_before_it_has_failed(capacity: Any) -> None:
    """The second try repeated the first to the sample, so that one unlucky turn failed a level twice."""
    report, planned = capacity(lambda sessions, attempt: ([WHOLE if sessions <= 2 + attempt else CUT], [DONE]))
    assert report["facts"]["capacity"] == 4
    tries = [(row["sessions"], row["try"], row["verdict"]) for row in report["rows"]]
    assert tries[2:4] == [(4, 1, "failed"), (4, 2, "ok")] and tries[-2:] == [(5, 1, "failed"), (5, 2, "failed")]
    assert planned[2] != planned[3] and len(planned[2]) == len(planned[3]) == 4


def test_no_more_sessions_are_tried_than_were_allowed(capacity: Any) -> None:
    """A server that others use, too, was filled to its last slot by who had asked for three sessions at most."""
    report, planned = capacity(lambda sessions, attempt: ([WHOLE], [DONE]), "--max-sessions", "3", "--url", "ws://x")
    assert report["facts"]["capacity"] == 3 == max(map(len, planned))
    assert report["title"].endswith("all that there is room for (of 3 tried)")


def test_a_limit_of_who_asks_is_not_told_as_the_server_s(capacity: Any) -> None:
    """One token may hold 32 sessions: that figure was taken for what the machine carries."""
    report, _ = capacity(lambda sessions, attempt: ([WHOLE], [DONE if sessions <= 2 else REFUSED]))
    assert report["facts"]["capacity"] == 2
    assert "no limit of the server's" in report["title"]


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_the_search_finds_every_limit_and_tries_no_level_twice(most: int) -> None:
    for limit in range(most + 2):
        tried: list[int] = []

        async def passes(sessions: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(sessions)
            return sessions <= limit

        assert asyncio.run(search(passes, most)) == min(limit, most)
        assert len(set(tried)) == len(tried) and all(1 <= n <= most for n in tried)
        assert len(tried) <= 2 * most.bit_length() + 1
