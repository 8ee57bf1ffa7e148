"""Find the most sessions that a server carries at once: no underrun, no lost speech, steps (p99) under 80 ms.

One session more, and somebody would hear a gap. What answers at the address may be one server or many.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable

from streaming.benchmark import runs
from streaming.benchmark.figures import Level
from streaming.benchmark.latency import report
from streaming.benchmark.report import Report, Value
from streaming.benchmark.schedule import held

_MOST = 4096
"""The most sessions that are tried where nobody says how many there is room for."""
_OURS = ("too_many_sessions", "too_many_connections")
"""Refusals that concern the client and not the server's room."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=runs.positive,
        default=60.0,
        metavar="S",
        help="How long each level is measured (default: 60).",
    )
    parser.add_argument(
        "--tries",
        type=runs.count,
        default=2,
        metavar="N",
        help="How often a level must fail to count as failed (default: 2), since other programs may spoil a run.",
    )
    runs.add_arguments(parser, max_sessions=64)


def measure(options: argparse.Namespace) -> Report:
    """`capacity`: see the module. Raises as starting a server and its clients does."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Report:
    manner, levels = runs.manner(options), list[Level]()
    async with runs.target(options) as server:
        # Nobody tells the sum of several servers, and the number of one says nothing.
        slots = None if server.several else (await server.look()).slots
        most = min(options.max_sessions or _MOST, slots or _MOST)

        async def passes(sessions: int) -> bool:
            for attempt in range(options.tries):
                plans = held(sessions, options.seconds, manner, options.seed + attempt)
                level = await runs.level(options, server, {"sessions": sessions, "try": attempt + 1}, plans)
                levels.append(level)
                if level.verdict == "ok":
                    return True
            return False

        best = await search(passes, most)
    facts: dict[str, Value] = {"capacity": best, "all_slots": best == most}
    more = f": all that there is room for (of {most} tried)" if best == most else ""
    above = [level for level in levels if level.label["sessions"] == best + 1]
    if above and not any(level.valid for level in above):
        more = ": there the clients were the limit, not the server"
    elif any(session.reason in _OURS for level in above for session in level.outcome.sessions):
        more = ": there it was this machine's token or address that may have no more, which is no limit of the server's"
    if server.several:
        facts |= {"servers_seen": len(server.instances)}
    return report(f"capacity: {best} sessions at once{more}", options, levels, facts, several=server.several)


async def search(passes: Callable[[int], Awaitable[bool]], most: int) -> int:
    """Return the largest number up to `most` that passes, if all smaller ones do; 0 if none does."""
    good, bad = 0, most + 1
    while bad - good > 1:
        number = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        if await passes(number):
            good = number
        else:
            bad = number
    return good
