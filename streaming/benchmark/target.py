"""The server that is measured, seen from outside: what it tells of itself at `/metrics` and `/health`, and, if it is
our own, what the system knows of its process.

`/metrics` has a histogram of all steps, so that two looks tell the times of the steps between them. `/health` has
percentiles over the last thousand, whoever's they were.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

_TIMEOUT_S = 5.0
_MAX_BYTES = 2**20
_SAMPLE = re.compile(r"^([a-z_:]+)(?:\{(?:le=\"([^\"]+)\")?\})? (\S+)$", re.MULTILINE)
_BUCKET = "streaming_step_seconds_bucket"


@dataclass(frozen=True)
class Look:
    """What was seen at one time. at_s: `time.monotonic`. What could not be seen is None or empty.

    buckets: steps so far that took at most so many seconds, by that bound. memory_bytes: resident. cpu_seconds: used.
    """

    at_s: float
    health: Mapping[str, Any] = field(default_factory=dict)
    buckets: Mapping[float, float] = field(default_factory=dict)
    memory_bytes: float | None = None
    cpu_seconds: float | None = None

    @property
    def slots(self) -> int | None:
        slots = self.health.get("slots")
        return slots if isinstance(slots, int) else None


@dataclass(frozen=True)
class StepTimes:
    """How long steps took. source: `metrics`: exactly those between two looks, true to a bucket's width; `health`: the
    last thousand; `none`.
    """

    p50_ms: float | None
    p99_ms: float | None
    source: str


class Target:
    """url: of its WebSocket. pid: of its process, if it is our own."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url, self.pid = url, pid

    async def look(self) -> Look:
        """Never fails: a server that tells nothing can be measured too, from its clients' side."""
        return await asyncio.to_thread(self._look)

    def _look(self) -> Look:
        health = _parsed(self._get("/health"))
        samples = [(name, bound, float(value)) for name, bound, value in _SAMPLE.findall(self._get("/metrics"))]
        buckets = {float(bound): value for name, bound, value in samples if name == _BUCKET}
        plain = {name: value for name, bound, value in samples if not bound}
        memory, cpu = _of_process(self.pid) if self.pid is not None else (None, None)
        return Look(
            time.monotonic(),
            health,
            buckets,
            plain.get("process_resident_memory_bytes", memory),
            plain.get("process_cpu_seconds_total", cpu),
        )

    def _get(self, path: str) -> str:
        """The answer to a plain request, empty if there is none."""
        parts = urlsplit(self.url)
        address = urlunsplit((parts.scheme.replace("ws", "http"), parts.netloc, path, "", ""))
        token = os.environ.get("STREAMING_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(address, headers=headers)  # noqa: S310  (the scheme is http or https)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
                return bytes(response.read(_MAX_BYTES)).decode(errors="replace")
        except (OSError, HTTPException, ValueError):  # OSError: an HTTP error status, too
            return ""


def steps_between(before: Look, after: Look) -> StepTimes:
    """The steps of a run, from a look before and one after it."""
    bounds = sorted(after.buckets)
    if bounds and bounds[-1] == float("inf"):
        counts = np.diff([0.0, *(after.buckets[bound] - before.buckets.get(bound, 0.0) for bound in bounds)])
        if counts.sum() > 0:
            return StepTimes(_quantile(bounds, counts, 0.50), _quantile(bounds, counts, 0.99), "metrics")
    p50, p99 = after.health.get("step_ms_p50"), after.health.get("step_ms_p99")
    if isinstance(p50, int | float) and isinstance(p99, int | float):
        return StepTimes(float(p50), float(p99), "health")
    return StepTimes(None, None, "none")


def _quantile(bounds: list[float], counts: np.ndarray[Any, np.dtype[np.float64]], share: float) -> float:
    """In ms, on a straight line through the bucket; beyond the last bound, that bound."""
    wanted = share * counts.sum()
    reached = np.cumsum(counts)
    bucket = int(np.searchsorted(reached, wanted))
    below = bounds[bucket - 1] if bucket else 0.0
    if bounds[bucket] == float("inf"):
        return 1e3 * below
    inside = (wanted - (reached[bucket] - counts[bucket])) / counts[bucket]
    return 1e3 * float(below + inside * (bounds[bucket] - below))


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _of_process(pid: int) -> tuple[float | None, float | None]:
    """Resident bytes and CPU seconds, from Linux' /proc (proc(5)); None where there is no such thing."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        # After the name, which is in brackets and may hold anything: field 3 is the first.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None, None
    ticks = int(fields[11]) + int(fields[12])
    return float(resident * os.sysconf("SC_PAGE_SIZE")), ticks / os.sysconf("SC_CLK_TCK")
