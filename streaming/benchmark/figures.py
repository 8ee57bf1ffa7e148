"""Sum up a run's records: one row of figures, and the verdict on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from streaming.audio import FRAME_MS
from streaming.benchmark.clients import Outcome
from streaming.benchmark.load import TurnRecord
from streaming.benchmark.report import Value
from streaming.benchmark.target import Look, StepTimes, same_process, steps_between


@dataclass(frozen=True)
class Level:
    """One run under one load. label: what sets it apart, as the row's first columns. late_ms: how late the clients may
    be by themselves (99th percentile) before they have measured themselves instead of the server.
    """

    label: dict[str, Value]
    outcome: Outcome
    before: Look
    after: Look
    late_ms: float

    @property
    def steps(self) -> StepTimes:
        return steps_between(self.before, self.after)

    @property
    def audible_ms(self) -> list[float]:
        """Return the times from the end of speech to the first audible sample, of every turn that had one, in order."""
        return [turn.first_audible_ms for turn in self.outcome.turns if turn.first_audible_ms is not None]

    @property
    def client_late_ms(self) -> float | None:
        return percentile((late for turn in self.outcome.turns for late in turn.sends_late_ms), 99)

    @property
    def valid(self) -> bool:
        """Return whether the clients kept their own times, so that the figures are the server's."""
        return self.client_late_ms is None or self.client_late_ms <= self.late_ms

    @property
    def shortcomings(self) -> list[str]:
        """Return why this is more than the server can carry; nothing if it is not. The gate of `capacity`."""
        turns, ended = self.outcome.turns, Counter(session.ended for session in self.outcome.sessions)
        underruns, overruns = sum(turn.underruns for turn in turns), _count(turns, "overrun")
        dropped = sum(turn.dropped_ms for turn in turns)
        # Percentiles of other runs' steps may be among those of `/health`; those of the turns are this run's own.
        gate_ms = self.steps.p99_ms if self.steps.source == "metrics" else percentile(_step_means(self.outcome), 99)
        found = [f"{ended[kind]} sessions {kind}" for kind in ("refused", "failed") if ended[kind]]
        found += [f"{underruns} underruns"] if underruns else []
        found += [f"{dropped:.0f} ms of speech dropped"] if dropped else []
        found += [f"{overruns} turns not over in time"] if overruns else []
        found += [f"step p99 {gate_ms:.0f} ms"] if gate_ms is not None and gate_ms >= FRAME_MS else []
        found += [] if turns else ["no turn was spoken"]
        return found

    @property
    def verdict(self) -> Literal["ok", "failed", "invalid"]:
        return "invalid" if not self.valid else "failed" if self.shortcomings else "ok"

    @property
    def told(self) -> str:
        """Return the verdict in words."""
        name = ", ".join(f"{key} {value}" for key, value in self.label.items())
        late = [] if self.valid else [f"invalid, the clients were {self.client_late_ms:.0f} ms late by themselves"]
        return f"{name}: {'; '.join(late + self.shortcomings) or 'ok'}"

    def row(self) -> dict[str, Value]:
        """Return the figures, rounded to what they mean. docs/performance.md says what each is."""
        turns, steps = self.outcome.turns, self.steps
        ended = Counter(session.ended for session in self.outcome.sessions)
        underruns, minutes = sum(turn.underruns for turn in turns), sum(turn.heard_seconds for turn in turns) / 60
        cpu = cpu_seconds(self.before, self.after)
        return self.label | {
            "turns": len(turns),
            **{f"audible_ms_p{p}": rounded(percentile(self.audible_ms, p)) for p in (50, 95, 99)},
            "frame_late_ms_p99": rounded(percentile((late for turn in turns for late in turn.frames_late_ms), 99)),
            "underruns": underruns,
            "underruns_per_min": rounded(underruns / minutes if minutes else None, 2),
            "dropped_ms": round(sum(turn.dropped_ms for turn in turns)),
            "overruns": _count(turns, "overrun"),
            "refused": ended["refused"],
            "failed": ended["failed"],
            "step_ms_p50": rounded(steps.p50_ms),
            "step_ms_p99": rounded(steps.p99_ms),
            "turn_step_ms_p50": rounded(percentile(_step_means(self.outcome), 50)),
            "server_cores": rounded(cpu / self.outcome.seconds if cpu is not None else None, 2),
            "cpu_ms_per_frame": rounded(cpu_ms_per_frame(cpu, turns)),
            "client_late_ms_p99": rounded(self.client_late_ms),
            "verdict": self.verdict,
        }


def cpu_seconds(before: Look, after: Look) -> float | None:
    """Return what the server used between two looks, on all its cores. Other programs hardly change it."""
    if before.cpu_seconds is None or after.cpu_seconds is None or not same_process(before, after):
        return None
    return after.cpu_seconds - before.cpu_seconds


def cpu_ms_per_frame(cpu: float | None, turns: list[TurnRecord]) -> float | None:
    """Return the processor time for 80 ms of one session, of speech or of a continuation that was heard."""
    frames = sum(turn.prompt_seconds + turn.heard_seconds for turn in turns) * 1000 / FRAME_MS
    return 1e3 * cpu / frames if cpu is not None and frames else None


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return a percentile; None of nothing."""
    all_of_them = list(values)
    return float(np.percentile(all_of_them, share)) if all_of_them else None


def rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)


def most_at_once(outcome: Outcome) -> int:
    """Return the most sessions that were open at the same time."""
    changes = [(s.opened_s, 1) for s in outcome.sessions if s.opened_s is not None]
    changes += [(s.closed_s, -1) for s in outcome.sessions if s.opened_s is not None]
    return int(np.cumsum([0, *(change for _, change in sorted(changes))]).max())


def _step_means(outcome: Outcome) -> list[float]:
    return [turn.mean_step_ms for turn in outcome.turns if turn.mean_step_ms is not None]


def _count(turns: list[TurnRecord], outcome: str) -> int:
    return sum(turn.outcome == outcome for turn in turns)
