"""The server that is measured, seen from outside: what it tells of itself at `/metrics` and `/health`, and, if it is
our own, what the system knows of its process.

`/metrics` has a histogram of all steps, so that two looks tell the times of the steps between them. `/health` has
percentiles over the last thousand, whoever's they were. Behind one address there may be several servers, and each look
is answered by any of them: then there are no figures of "the" server, and none are made up.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from streaming.client.dialing import leads_to_this_machine
from streaming.protocol.messages import PATH

_TIMEOUT_S = 5.0
_CENSUS = 8
"""How many times the address is asked who answers: of two servers that answer at random, one stays unseen in 1 of 128
tries.
"""
_MAX_BYTES = 2**20
_SAMPLE = re.compile(r"^([a-z_:]+)(?:\{(?:le=\"([^\"]+)\")?\})? (\S+)$", re.MULTILINE)
_BUCKET = "streaming_step_seconds_bucket"


@dataclass(frozen=True)
class Look:
    """An observation. at_s: `time.monotonic`. What could not be seen is None or empty.

    buckets: steps so far that took at most so many seconds, by that bound. memory_bytes: resident. cpu_seconds: used.
    process: when the process that told of these began, by its own clock.
    """

    at_s: float
    health: Mapping[str, Any] = field(default_factory=dict)
    buckets: Mapping[float, float] = field(default_factory=dict)
    memory_bytes: float | None = None
    cpu_seconds: float | None = None
    process: float | None = None

    @property
    def instance(self) -> str | None:
        """Return which process told its health."""
        instance = self.health.get("instance")
        return instance if isinstance(instance, str) else None

    @property
    def slots(self) -> int | None:
        slots = self.health.get("slots")
        return slots if isinstance(slots, int) else None


@dataclass(frozen=True)
class StepTimes:
    """Times of steps. source: `metrics`: exactly those between two looks, true to a bucket's width; `health`: the
    last thousand; `none`.
    """

    p50_ms: float | None
    p99_ms: float | None
    source: str


class Target:
    """url: of its WebSocket. pid: of its process, if it is our own. instances: which servers have answered so far."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url, self.pid = url, pid
        self.instances: set[str] = set()

    @property
    def several(self) -> bool:
        """Return whether more than one server is known to answer at this address."""
        return len(self.instances) > 1

    async def look(self) -> Look:
        """Return a look, and never fail: a server that tells nothing can be measured too, from its clients' side.

        Of several servers only what is the same for all of them is told: the model.
        """
        look = await asyncio.to_thread(self._look)
        if look.instance is not None:
            self.instances.add(look.instance)
        return replace(look, health=_common(look.health), **_NOTHING) if self.several else look

    async def census(self) -> None:
        """Ask some times who answers, each time over a connection of its own, so that a balancer has a choice."""
        for _ in range(_CENSUS):
            health = _parsed(await asyncio.to_thread(self._get, "/health"))
            if isinstance(instance := health.get("instance"), str):
                self.instances.add(instance)
            else:
                break

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
            plain.get("process_start_time_seconds"),
        )

    def _get(self, path: str) -> str:
        """Return the answer to a plain request, empty if there is none."""
        parts = urlsplit(self.url)
        folder = parts.path.removesuffix("/").removesuffix(PATH)  # a proxy may serve it under a name of its own
        address = urlunsplit((parts.scheme.replace("ws", "http"), parts.netloc, folder + path, "", ""))
        token = os.environ.get("STREAMING_TOKEN")
        if path == "/metrics":
            token = os.environ.get("STREAMING_METRICS_TOKEN") or token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(address, headers=headers)  # noqa: S310  (the scheme is http or https)
        try:
            with _opener(self.url).open(request, timeout=_TIMEOUT_S) as response:
                return bytes(response.read(_MAX_BYTES)).decode(errors="replace")
        except (OSError, HTTPException, ValueError):  # OSError: an HTTP error status, too
            return ""


_NOTHING: Mapping[str, Any] = {"buckets": {}, "memory_bytes": None, "cpu_seconds": None, "process": None}


def _common(health: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: health[key] for key in ("model", "version") if key in health}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the server that it was given for."""

    def redirect_request(self, *_: object) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Open a URL as the clients do: through the system's proxy, but not to this machine itself."""
    return urllib.request.build_opener(
        _NoRedirect, *([urllib.request.ProxyHandler({})] if leads_to_this_machine(url) else [])
    )


def same_process(before: Look, after: Look) -> bool:
    """Return whether what two looks tell can be of one process: its counts only grow."""
    grown = all(after.buckets.get(bound, 0.0) >= count for bound, count in before.buckets.items())
    return (before.process, before.instance) == (after.process, after.instance) and grown


def steps_between(before: Look, after: Look) -> StepTimes:
    """Return the steps of a run, from a look before and one after it. None if they are not of one process."""
    if not same_process(before, after):
        return StepTimes(None, None, "none")
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
    """Return a quantile in ms, on a straight line through its bucket; beyond the last bound, that bound."""
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
    """Return resident bytes and CPU seconds, from Linux' /proc (proc(5)); None where there is no such thing."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        # The fields behind the name, which is in brackets and may hold anything. The first of them is field 3.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None, None
    ticks = int(fields[11]) + int(fields[12])
    return float(resident * os.sysconf("SC_PAGE_SIZE")), ticks / os.sysconf("SC_CLK_TCK")
