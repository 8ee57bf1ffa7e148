"""The server's figures for Prometheus: counted as they happen, or read from their owners when they are asked for.

Labels are codes, reasons and paths of this server's own, so their number is bounded whatever peers do; there are no
addresses, no tokens or their names, and no session ids among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streaming.server.watch.health import Health

METRICS = "/metrics"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_FIRST_FRAME_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25, 0.3, 0.5, 0.75, 1, 2, 5, 10)

# Shown as 0 before the first event: a counter that appears with its first event has no rate then.
_REFUSED = (
    "full",
    "overloaded",
    "stopping",
    "engine_stopped",
    "too_many_sessions",
    "too_many_connections",
    "unauthorized",
    "forbidden_origin",
    "session_expired",
    "session_elsewhere",
)
_ERRORS = ("internal", "step_failed", "engine_stopped", "bad_message", "bad_state", "unauthorized")
_ENDED = ("client", "left", "idle", "stopping", "internal", "step_failed", "engine_stopped", "bad_message")
_TURNS = ("end", "max_seconds", "interrupted")


class Metrics:
    """All figures of one server, in a registry of their own. Used in the event loop alone."""

    def __init__(self, health: Health) -> None:
        self._registry = registry = CollectorRegistry()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # twice as many lines for nothing that Prometheus reads

        def counter(name: str, text: str, label: str = "", seen: tuple[str, ...] = ()) -> Counter:
            made = Counter(f"streaming_{name}", text, (label,) if label else (), registry=registry)
            for value in seen:
                made.labels(value)
            return made

        self.requests = Counter(
            "streaming_http_requests",
            "Answers to requests; 101 went on to the WebSocket handshake, other is any path not the server's own.",
            ("path", "status"),
            registry=registry,
        )
        self.refused = counter("refused", "Sessions and requests that were refused.", "code", _REFUSED)
        self.errors = counter("errors", "Errors told to clients, fatal or not.", "code", _ERRORS)
        self.opened = counter("sessions_opened", "Sessions that began.")
        self.ended = counter("sessions_ended", "Sessions that are over; left: without a word.", "reason", _ENDED)
        self.lost = counter("sessions_lost", "Connections lost by sessions that then waited for their client.")
        self.resumed = counter("sessions_resumed", "Clients that came back to their session.")
        self.turns = counter("turns", "Continuations that are over.", "reason", _TURNS)
        self.interruptions = counter("interruptions", "Continuations that were cut to what was heard of them.")
        self.input_dropped = counter("input_dropped_seconds", "Speech that came too fast to be heard, and was lost.")
        self.underruns = counter("underruns", "Gaps in the playback of continuations, as clients report them.")
        self.first_frame = Histogram(
            "streaming_first_frame_seconds",
            "From the end of a prompt to the first frame of its continuation.",
            buckets=_FIRST_FRAME_S,
            registry=registry,
        )
        registry.register(_Readings(health))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format, of type `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self._registry)


class _Readings(Collector):
    """Figures that others keep, read when somebody asks."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        engine, admission, health = self._health.engine, self._health.admission, self._health
        stats = engine.stats()
        for name, text, value in (
            ("slots", "Sessions that there is room for.", stats.slots),
            ("sessions_open", "Sessions that hold a slot.", stats.sessions),
            ("sessions_away", "Of these, how many wait for their client to come back.", health.away),
            ("queue_length", "Clients that wait in line for a slot.", admission.waiting),
            ("queue_limit", "How many may.", admission.queue),
            ("overloaded", "1 while steps take too long for one more session.", engine.overloaded),
            ("running", "1 until the server is told to stop, or its engine fails.", health.running),
        ):
            yield GaugeMetricFamily(f"streaming_{name}", text, float(value))
        for name, text, value in (
            ("frames_heard", "Frames of speech, of 80 ms, that were heard.", stats.frames_heard),
            ("frames_spoken", "Frames of continuations, of 80 ms, that were made.", stats.frames_spoken),
            ("steps_failed", "Steps that failed.", stats.steps_failed),
        ):
            yield CounterMetricFamily(f"streaming_{name}", text, value)
        steps = stats.step_seconds
        yield HistogramMetricFamily(
            "streaming_step_seconds",
            "How long a step took: one frame of every session that was ready.",
            buckets=list(zip([*map(str, steps.bounds), "+Inf"], accumulate(steps.counts), strict=True)),
            sum_value=steps.total,
        )
        build = {"version": health.version, "model": engine.model, "device": engine.device, "dtype": engine.dtype}
        yield InfoMetricFamily("streaming_build", "What is running.", build)
