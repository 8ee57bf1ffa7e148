"""Parts that the measurements of a server under load share: their flags, the server, one run under one load."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from streaming.audio import SAMPLE_RATE
from streaming.benchmark.clients import run_clients
from streaming.benchmark.figures import Level
from streaming.benchmark.load import Job, Record, SessionRecord, load_speech, run_sessions
from streaming.benchmark.report import Value
from streaming.benchmark.schedule import Manner, SessionPlan, held
from streaming.benchmark.target import Look, Target
from streaming.errors import ContinuationError
from streaming.options import count as count  # for the commands that add these flags
from streaming.options import positive as positive
from streaming.protocol.messages import PATH
from streaming.terminal.own_server import own_server, server_command

ROOT = Path(__file__).resolve().parents[2]
PROMPT = ROOT / "examples" / "prompt.wav"
_SPARE_MS = 80
_OPENAI = ("/v1/realtime", "/v1/live")
_PASSED_ON = ("--device", "--dtype", "--quantize", "--codec-dtype", "--context-tokens")
"""Flags that are passed on to a server of our own."""


def add_arguments(parser: argparse.ArgumentParser, *, max_sessions: int) -> None:
    """Add the flags that these measurements share. max_sessions: of a server of our own, unless told otherwise."""
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--url",
        help="Measure this server, or several behind one address (default: one of its own); STREAMING_TOKEN has the "
        "token, and STREAMING_METRICS_TOKEN that for /metrics.",
    )
    server.add_argument("--model", metavar="demo|HUB_ID|DIR", help="The model of a server of its own (default: demo).")
    for flag in ("--codec", *_PASSED_ON):
        server.add_argument(flag, metavar="X", help="As in server.py, for a server of its own.")
    server.add_argument(
        "--max-sessions",
        type=count,
        metavar="N",
        help=f"How many sessions a server of its own takes (default: {max_sessions}); with --url, how many are tried.",
    )
    talk = parser.add_argument_group("how people talk")
    talk.add_argument(
        "--input", type=Path, nargs="+", default=[PROMPT], metavar="WAV", help="The speech that prompts are cut from."
    )
    talk.add_argument(
        "--prompt-seconds",
        type=positive,
        nargs=2,
        default=[1.0, 4.0],
        metavar=("A", "B"),
        help="From how long to how long a prompt is.",
    )
    talk.add_argument(
        "--max-seconds", type=positive, default=4.0, metavar="S", help="How long a continuation is at most."
    )
    talk.add_argument(
        "--pause-seconds",
        type=positive,
        nargs=2,
        default=[0.5, 1.5],
        metavar=("A", "B"),
        help="From how long to how long people pause.",
    )
    talk.add_argument(
        "--interrupt", type=_share, default=0.0, metavar="P", help="The share of turns that are interrupted."
    )
    talk.add_argument(
        "--message-ms", type=int, choices=(20, 40, 80), default=80, help="How much speech is in one message."
    )
    talk.add_argument(
        "--jitter-ms",
        type=int,
        default=80,
        metavar="MS",
        help="How much must have come before it is played (80 is a frame).",
    )
    talk.add_argument(
        "--lead-ms", type=int, default=400, metavar="MS", help="How far the server may run ahead of playback."
    )
    talk.add_argument(
        "--seed", type=int, default=0, metavar="N", help="The seed of who speaks when, and of the continuations."
    )
    clients = parser.add_argument_group("the clients")
    clients.add_argument(
        "--processes",
        type=count,
        metavar="N",
        help="How many processes the clients share (default: one for 16 sessions).",
    )
    clients.add_argument(
        "--late-ms",
        type=positive,
        default=20.0,
        metavar="MS",
        help="By how much the clients themselves may be late (p99) for a run to be valid.",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="Draw the result; this needs matplotlib, the extra `benchmark`."
    )
    parser.set_defaults(check=_check, own_sessions=max_sessions)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error if flags do not fit each other."""
    if options.url is not None and options.model is not None:
        parser.error("--model is for a server of its own; the one at --url has its model already")
    if options.url is not None and urlsplit(options.url).path.startswith(_OPENAI):
        parser.error(f"--url {options.url}: what is measured is the engine, and over the native protocol: {PATH}")
    for flag in ("prompt_seconds", "pause_seconds"):
        low, high = getattr(options, flag)
        if low > high:
            parser.error(f"--{flag.replace('_', '-')} {low:g} {high:g}: the shorter one comes first")
    if not 80 <= options.jitter_ms <= options.lead_ms - _SPARE_MS or options.lead_ms > 10_000:
        parser.error("--jitter-ms is at least 80, and --lead-ms at least 80 more, but at most 10000")


def manner(options: argparse.Namespace) -> Manner:
    prompt, pause = options.prompt_seconds, options.pause_seconds
    return Manner((prompt[0], prompt[1]), (pause[0], pause[1]), options.max_seconds, options.interrupt)


def job(
    options: argparse.Namespace,
    url: str,
    plans: list[SessionPlan],
    pace: Literal["realtime", "fast"] = "realtime",
    *,
    patient: bool = False,
) -> Job:
    return Job(
        url=url,
        speech=tuple(str(path.resolve()) for path in options.input),
        sessions=tuple(plans),
        message_samples=options.message_ms * SAMPLE_RATE // 1000,
        jitter_ms=options.jitter_ms,
        lead_ms=options.lead_ms,
        max_seconds=options.max_seconds,
        pace=pace,
        patient=patient,
    )


@contextlib.asynccontextmanager
async def target(options: argparse.Namespace, sessions: int = 1) -> AsyncIterator[Target]:
    """Yield the server at --url, or one of our own with at least so many slots, after a first session.

    Raises `ContinuationError` if it takes none.
    """
    if options.url is not None:
        await _first_session(options, options.url)
        server = Target(options.url)
        await server.census()
        if server.several:
            print(f"{len(server.instances)} servers or more answer at {options.url}", file=sys.stderr)
        yield server
        return
    command = server_command(options.model or "demo", options.codec)
    for flag in _PASSED_ON:
        value = getattr(options, flag.removeprefix("--").replace("-", "_"))
        command += [] if value is None else [flag, value]
    command += ["--max-sessions", str(max(sessions, options.max_sessions or options.own_sessions))]
    pids: list[int] = []
    async with own_server(command, started=pids.append, said=lambda line: print(line, file=sys.stderr)) as url:
        await _first_session(options, url)
        yield Target(url, pids[0])


async def _first_session(options: argparse.Namespace, url: str) -> None:
    ended = await _settle(options, url)
    if ended.ended != "done":
        raise ContinuationError(f"{url} took no session: {ended.reason}")


async def _settle(options: argparse.Namespace, url: str) -> SessionRecord:
    """Run one session of three seconds, so that every measurement begins with the same past.

    A process does some things only once; and a server that judges by its latest steps whether it can take one more
    session would go by those of the load before.
    """
    past = Manner((1.0, 1.0), (0.0, 0.0), 2.0, 0.0)
    first = job(options, url, held(1, 0.001, past, seed=0), "fast")
    first = msgspec.structs.replace(first, max_seconds=past.max_seconds)
    records: list[Record] = []
    # It runs in this process, since nobody times it.
    await run_sessions(first, load_speech(first.speech), time.monotonic(), asyncio.Event(), records.append)
    return next(record for record in records if isinstance(record, SessionRecord))


async def level(
    options: argparse.Namespace, server: Target, label: dict[str, Value], plans: list[SessionPlan]
) -> Level:
    """Run one load, and print a line about it. The server is left as it was found."""
    before = await server.look()
    outcome = await run_clients(job(options, server.url, plans), processes=options.processes)
    after = await server.look()
    if server.several:  # it may be known since the first look, or only now
        before = after
    result = Level(label, outcome, before, after, options.late_ms)
    print(result.told, file=sys.stderr)
    await _settle(options, server.url)
    return result


def facts(options: argparse.Namespace, seen: Look) -> dict[str, Value]:
    """Return what was measured, how, on what."""
    return {
        "model": str(seen.health.get("model", "unknown")),
        "device": str(seen.health.get("device", "unknown")),
        "operations": str(seen.health.get("operations", "unknown")),
        "server": "its own" if options.url is None else urlsplit(options.url).netloc,
        "clients": f"{platform.machine()}, {os.cpu_count()} cores",
        "prompt_seconds": "{:g} to {:g}".format(*options.prompt_seconds),
        "max_seconds": options.max_seconds,
        "pause_seconds": "{:g} to {:g}".format(*options.pause_seconds),
        "interrupted": options.interrupt,
        "message_ms": options.message_ms,
        "jitter_ms": options.jitter_ms,
        "lead_ms": options.lead_ms,
        "seed": options.seed,
    }
