"""What a server tells of itself."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from streaming.benchmark.target import Look, Target, steps_between

METRICS = """# HELP streaming_step_seconds How long a step took.
# TYPE streaming_step_seconds histogram
streaming_step_seconds_bucket{le="0.02"} 0.0
streaming_step_seconds_bucket{le="0.04"} 90.0
streaming_step_seconds_bucket{le="0.08"} 98.0
streaming_step_seconds_bucket{le="0.16"} 100.0
streaming_step_seconds_bucket{le="+Inf"} 100.0
streaming_http_requests_total{path="/health",status="200"} 3.0
process_resident_memory_bytes 1.5e+08
process_cpu_seconds_total 12.5
"""


def look(buckets: dict[float, float], **health: object) -> Look:
    return Look(0.0, health, buckets)


def test_two_looks_tell_the_steps_between_them_and_no_others() -> None:
    """Pins a level of load that is judged by the steps of the one before it."""
    before = look({0.04: 0.0, 0.08: 0.0, 0.16: 500.0, float("inf"): 500.0}, step_ms_p50=120.0, step_ms_p99=150.0)
    after = look({0.04: 990.0, 0.08: 1000.0, 0.16: 1500.0, float("inf"): 1500.0}, step_ms_p50=30.0, step_ms_p99=150.0)
    steps = steps_between(before, after)
    assert steps.source == "metrics"
    assert steps.p50_ms == pytest.approx(40 * 500 / 990) and steps.p99_ms == pytest.approx(40)


def test_the_80_ms_of_a_frame_are_a_bound_so_the_gate_is_exact() -> None:
    zero = look({})
    one_percent = {0.07: 0.0, 0.08: 99.0, 0.09: 100.0, float("inf"): 100.0}
    more = {0.07: 0.0, 0.08: 98.0, 0.09: 100.0, float("inf"): 100.0}
    assert steps_between(zero, look(one_percent)).p99_ms == pytest.approx(80)
    assert (steps_between(zero, look(more)).p99_ms or 0) > 80
    assert steps_between(zero, look({0.08: 0.0, float("inf"): 9.0})).p99_ms == 80  # beyond: at least the last bound


def test_without_a_histogram_health_is_believed_and_without_either_nothing() -> None:
    assert steps_between(look({}), look({}, step_ms_p50=3, step_ms_p99=7.5)).source == "health"
    assert steps_between(look({}), look({}, step_ms_p50=None, step_ms_p99=None)).source == "none"
    same = look({0.08: 5.0, float("inf"): 5.0})
    assert steps_between(same, same).source == "none", "no step was run in between"


@contextmanager
def answering(pages: dict[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.server_address[1]}/v1/continue"
        finally:
            server.shutdown()
            thread.join()


def test_figures_are_read_from_metrics_where_there_are_any() -> None:
    with answering({"/health": '{"slots": 7, "model": "m"}', "/metrics": METRICS}) as url:
        seen = asyncio.run(Target(url).look())
    assert seen.slots == 7 and seen.health["model"] == "m"
    assert seen.buckets == {0.02: 0, 0.04: 90, 0.08: 98, 0.16: 100, float("inf"): 100}
    assert seen.memory_bytes == 1.5e8 and seen.cpu_seconds == 12.5
    assert steps_between(look({}), seen).p99_ms == pytest.approx(120)


@pytest.mark.parametrize("health", ["no json", "[1]", "{}"])
def test_a_server_that_tells_nothing_is_no_error(health: str) -> None:
    """`capacity` works against any URL: what is behind it may be a proxy that knows one path."""
    with answering({"/health": health}) as url:
        seen = asyncio.run(Target(url).look())
    assert seen.slots is None and not seen.buckets and seen.memory_bytes is None
    assert asyncio.run(Target(url).look()).slots is None, "nobody is there any more"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells a process' memory in /proc")
def test_memory_and_time_of_an_own_server_come_from_the_system() -> None:
    block = bytearray(os.urandom(1)) * 40_000_000
    with answering({}) as url:
        seen = asyncio.run(Target(url, os.getpid()).look())
    assert seen.memory_bytes is not None and seen.memory_bytes > len(block)
    assert seen.cpu_seconds is not None and 0 < seen.cpu_seconds <= sum(os.times()[:4]) + 0.1
