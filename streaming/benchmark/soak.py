"""Hours of talk in the same sessions: memory, latency and step time at the end against the start.

At pace "fast" the hours are simulated: speech is sent and spoken as fast as the server works, so that hours of audio
take minutes. Latencies then hold the time to hear what is waiting, and compare with each other only.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

from streaming.benchmark import runs
from streaming.benchmark.clients import Outcome, run_clients
from streaming.benchmark.figures import cpu_ms_per_frame, cpu_seconds, percentile, rounded
from streaming.benchmark.load import TurnRecord
from streaming.benchmark.report import Report, Value
from streaming.benchmark.schedule import held
from streaming.benchmark.target import Look, Target, steps_between
from streaming.errors import StreamingError

_WINDOWS = 10
_LOOK_EVERY_S = 1.0
_MOST_LOOKS = 2_000
_MIB = 2**20


class NothingMeasuredError(StreamingError):
    """The measurement ended before anything was spoken."""

    code = "nothing_measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", type=runs.count, default=2, metavar="N", help="How many sessions talk at once (default: 2)."
    )
    parser.add_argument(
        "--hours", type=runs.positive, default=1.0, metavar="H", help="How many hours they talk (default: 1)."
    )
    parser.add_argument(
        "--pace",
        choices=("realtime", "fast"),
        default="realtime",
        help="Whether people talk in real time, or fast: hours of talk as fast as it goes.",
    )
    runs.add_arguments(parser, max_sessions=1)


def measure(options: argparse.Namespace) -> Report:
    """`soak`: see the module. Ctrl-C ends it with what it has. Raises as starting a server and its clients does."""
    return asyncio.run(_measure(options))


async def _measure(options: argparse.Namespace) -> Report:
    manner = runs.manner(options)
    if options.pace == "fast":
        manner = replace(manner, pause_s=(0.0, 0.0), interrupts=0.0)
    plans = held(options.sessions, 3600 * options.hours, manner, options.seed)
    stop = _stopped_by_ctrl_c()
    looks: list[Look] = []
    async with runs.target(options, options.sessions) as server:
        looks.append(await server.look())
        watching = asyncio.create_task(_watch(server, looks))
        try:
            job = runs.job(options, server.url, plans, options.pace, patient=True)
            outcome = await run_clients(job, processes=options.processes, stop=stop)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if not stop.is_set():
            looks.append(await server.look())
    if not outcome.turns:
        raise NothingMeasuredError("nothing was spoken before the end; run it for longer")
    return _report(options, outcome, looks)


def _stopped_by_ctrl_c() -> asyncio.Event:
    """Set by the first Ctrl-C; the second one ends everything at once."""
    stop, loop, task = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_interrupt() -> None:
        if stop.is_set():
            task.cancel()
        print("ending; what was measured so far follows", file=sys.stderr)
        stop.set()

    with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
    return stop


async def _watch(server: Target, looks: list[Look]) -> None:
    """Look at the server again and again, less often the longer it takes."""
    every_s = _LOOK_EVERY_S
    while True:
        await asyncio.sleep(every_s)
        looks.append(await server.look())
        if len(looks) > _MOST_LOOKS:
            del looks[1::2]
            every_s *= 2


@dataclass(frozen=True)
class _Window:
    """A tenth of the run. before, after: looks at the server as its first and last moments."""

    turns: list[TurnRecord]
    before: Look
    after: Look
    realtime: bool

    @property
    def latency_ms(self) -> list[float]:
        waits = [turn.first_audible_ms if self.realtime else turn.first_audio_ms for turn in self.turns]
        return [wait for wait in waits if wait is not None]

    @property
    def step_ms(self) -> float | None:
        return percentile((turn.mean_step_ms for turn in self.turns if turn.mean_step_ms is not None), 50)

    @property
    def cpu_ms_per_frame(self) -> float | None:
        return cpu_ms_per_frame(cpu_seconds(self.before, self.after), self.turns)

    @property
    def memory_mib(self) -> float | None:
        return None if self.after.memory_bytes is None else self.after.memory_bytes / _MIB


def _report(options: argparse.Namespace, outcome: Outcome, looks: list[Look]) -> Report:
    realtime = options.pace == "realtime"
    ends = [outcome.begun_s + outcome.seconds * (i + 1) / _WINDOWS for i in range(_WINDOWS)]
    windows, before, begin = list[_Window](), looks[0], float("-inf")
    for end in ends:
        after = [look for look in looks if look.at_s <= end][-1:] or [before]
        last = end if end is not ends[-1] else float("inf")
        turns = [turn for turn in outcome.turns if begin < outcome.begun_s + turn.over_s <= last]
        windows.append(_Window(turns, before, after[0] if end is not ends[-1] else looks[-1], realtime))
        before, begin = windows[-1].after, end
    start = next(window for window in windows if window.turns)
    rows, spoken = list[dict[str, Value]](), 0.0
    talked = len({turn.session for turn in outcome.turns})
    for number, window in enumerate(windows, 1):
        spoken += sum(turn.prompt_seconds + turn.heard_seconds for turn in window.turns) / talked
        hours = outcome.seconds * number / _WINDOWS / 3600 if realtime else spoken / 3600
        steps = steps_between(window.before, window.after)
        rows.append(
            {
                "window": number,
                "hours": rounded(hours, 3),
                "turns": len(window.turns),
                "latency_ms_p50": rounded(percentile(window.latency_ms, 50)),
                "latency_ms_p95": rounded(percentile(window.latency_ms, 95)),
                "underruns": sum(turn.underruns for turn in window.turns),
                "dropped_ms": round(sum(turn.dropped_ms for turn in window.turns)),
                "turn_step_ms_p50": rounded(window.step_ms, 2),
                "step_ms_p99": rounded(steps.p99_ms),
                "cpu_ms_per_frame": rounded(window.cpu_ms_per_frame),
                "memory_mib": rounded(window.memory_mib),
                **_ratios(window, start),
            }
        )
    against = _ratios(next(window for window in reversed(windows) if window.turns), start)
    told = ", ".join(f"{name.removesuffix('_ratio')} x{value}" for name, value in against.items() if value is not None)
    facts: dict[str, Value] = {
        "sessions": talked,
        "pace": options.pace,
        "hours": rows[-1]["hours"],
        "minutes_taken": rounded(outcome.seconds / 60),
        **runs.facts(options, looks[0]),
    }
    broken = sorted({session.reason for session in outcome.sessions if session.reason})
    late_ms = percentile((late for turn in outcome.turns for late in turn.sends_late_ms), 99)
    notes = [f"a session ended: {reason}" for reason in broken]
    notes += [] if talked == options.sessions else [f"{talked} of {options.sessions} sessions found room"]
    if late_ms is not None and late_ms > options.late_ms:
        notes.append(
            f"the clients were {late_ms:.0f} ms late by themselves (p99): their share of latencies is not small"
        )
    series = {"latency_ms": [ms for window in windows for ms in window.latency_ms]}
    title = f"soak: the last tenth against the first: {told}"
    return Report(title, facts, rows, notes, series, "windows")


def _ratios(window: _Window, start: _Window) -> dict[str, Value]:
    pairs = {
        "latency": (percentile(window.latency_ms, 50), percentile(start.latency_ms, 50)),
        "step": (window.step_ms, start.step_ms),
        "cpu": (window.cpu_ms_per_frame, start.cpu_ms_per_frame),
        "memory": (window.memory_mib, start.memory_mib),
    }
    return {f"{name}_ratio": rounded(a / b, 3) if a is not None and b else None for name, (a, b) in pairs.items()}
