"""Measure how long listeners wait, and what they miss, at given loads: over real WebSockets, where they listen.

The load is open: who speaks when is fixed in advance, and a slow server delays nobody but itself.
"""

from __future__ import annotations

import argparse
import asyncio

from streaming.benchmark import runs
from streaming.benchmark.figures import Level, most_at_once
from streaming.benchmark.report import Report, Value
from streaming.benchmark.schedule import arriving, held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--sessions", type=runs.count, nargs="+", default=[1, 2, 4], metavar="N", help="How many sessions talk at once."
    )
    load.add_argument(
        "--rate",
        type=runs.positive,
        nargs="+",
        metavar="R",
        help="How many sessions begin each second, at random (Poisson), instead of --sessions.",
    )
    parser.add_argument(
        "--seconds", type=runs.positive, default=30.0, metavar="S", help="How long each load lasts (default: 30)."
    )
    parser.add_argument(
        "--turns", type=runs.count, default=3, metavar="N", help="How many turns a session has, with --rate."
    )
    runs.add_arguments(parser, max_sessions=16)


def measure(options: argparse.Namespace) -> Report:
    """`latency`: see the module. Raises as starting a server and its clients does."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Report:
    manner, levels = runs.manner(options), list[Level]()
    async with runs.target(options, max(options.sessions)) as server:
        if options.rate is None:
            for sessions in options.sessions:
                plans = held(sessions, options.seconds, manner, options.seed)
                levels.append(await runs.level(options, server, {"sessions": sessions}, plans))
        else:
            for rate in options.rate:
                plans = arriving(rate, options.seconds, options.turns, manner, options.seed)
                levels.append(await runs.level(options, server, {"rate": rate}, plans))
    title = "latency: end of speech to first audible sample, and what went wrong"
    return report(title, options, levels, several=server.several)


def report(
    title: str,
    options: argparse.Namespace,
    levels: list[Level],
    facts: dict[str, Value] | None = None,
    *,
    several: bool = False,
) -> Report:
    """Return the levels of load as a report. several: whether more than one server answered."""
    rows = []
    for level in levels:
        at_once: dict[str, Value] = {} if "sessions" in level.label else {"sessions": most_at_once(level.outcome)}
        rows.append(level.label | at_once | {k: v for k, v in level.row().items() if k not in level.label})
    sources = sorted({level.steps.source for level in levels})
    notes = [] if sources == ["metrics"] else [f"step_ms is from: {', '.join(sources)}; see docs/performance.md"]
    if several:
        notes = ["several servers answer there: figures of one of them (step_ms, server_cores) are left out"]
    notes += [level.told for level in levels if level.verdict != "ok"]
    if not all(level.valid for level in levels):
        notes.append("where the clients were late, the figures are theirs: give them cores of their own")
    reasons = {f"{s.ended}: {s.reason}" for level in levels for s in level.outcome.sessions if s.reason}
    notes += [f"a session was {reason}" if reason.startswith("refused") else reason for reason in sorted(reasons)[:5]]
    series = {" ".join(f"{k} {v}" for k, v in level.label.items()): level.audible_ms for level in levels}
    described = (facts or {}) | runs.facts(options, levels[0].before) | {"seconds": options.seconds}
    return Report(title, described, rows, notes, series, "levels")
