"""Measure how many sessions a second a server opens and closes, and what one costs: handshake, TLS if any, slot and
goodbye. What comes back all at once after a failure comes through this.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

from streaming.benchmark import runs
from streaming.benchmark.figures import cpu_seconds, percentile, rounded
from streaming.benchmark.report import Report, Value
from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError
from streaming.errors import ContinuationError
from streaming.protocol.messages import SessionStart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at-once",
        type=runs.count,
        nargs="+",
        default=[1, 4],
        metavar="N",
        help="How many clients open sessions at once, one number after another.",
    )
    parser.add_argument(
        "--seconds", type=runs.positive, default=5.0, metavar="S", help="How long each number is measured (default: 5)."
    )
    runs.add_arguments(parser, max_sessions=64)


def measure(options: argparse.Namespace) -> Report:
    """`churn`: see the module. Raises as starting a server does."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Report:
    rows: list[dict[str, Value]] = []
    reasons: set[str] = set()
    async with runs.target(options, max(options.at_once)) as server:
        before = await server.look()
        seen = before
        for clients in options.at_once:
            opened_ms: list[float] = []
            refused: list[str] = []
            until_s = time.monotonic() + options.seconds
            own_s, began_s = time.process_time(), time.monotonic()
            await asyncio.gather(*(_come_and_go(server.url, until_s, opened_ms, refused) for _ in range(clients)))
            seconds, own = time.monotonic() - began_s, time.process_time() - own_s
            after = await server.look()
            cpu = None if server.several else cpu_seconds(before, after)
            before = after
            rows.append(
                {
                    "at_once": clients,
                    "sessions": len(opened_ms),
                    "refused": len(refused),
                    "sessions_per_s": rounded(len(opened_ms) / seconds),
                    "open_ms_p50": rounded(percentile(opened_ms, 50)),
                    "open_ms_p99": rounded(percentile(opened_ms, 99)),
                    "server_cpu_ms": rounded(1e3 * cpu / len(opened_ms), 2) if cpu is not None and opened_ms else None,
                    "client_cpu_ms": rounded(1e3 * own / max(1, len(opened_ms)), 2),
                }
            )
            reasons.update(refused)
    facts = runs.facts(options, seen) | {"seconds": options.seconds}
    notes = ["the processor times are of a session; where clients and server share cores, each delays the other"]
    notes += [f"a session was refused: {reason}" for reason in sorted(reasons)[:5]]
    return Report("churn: sessions that open and close, and do nothing else", facts, rows, notes)


async def _come_and_go(url: str, until_s: float, opened_ms: list[float], refused: list[str]) -> None:
    token = os.environ.get("STREAMING_TOKEN") or None
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        try:
            async with ContinuationClient.connect(url, SessionStart(), token=token):
                opened_ms.append(1e3 * (time.monotonic() - begun_s))
        except RefusedError as error:
            refused.append(error.refusal)
            await asyncio.sleep(0.01)
        except ContinuationError as error:
            refused.append(str(error))
            await asyncio.sleep(0.01)
