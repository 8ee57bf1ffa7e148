"""What the other tests here rely on: a server that keeps its session waiting is found out on a busy machine, too."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.harness import LATE_S, Healthy, Since, Watched, beside_a_healthy_session, watched


def _stands_still(server: Watched, healthy: Healthy) -> None:
    """Wait as for a stalled peer, in the middle of a turn of the loop."""
    for _ in range(3):
        server.loop.call_soon_threadsafe(time.sleep, 1.5 * LATE_S)
        healthy.waits_for_turns(1)


def _works(server: Watched, healthy: Healthy) -> None:
    """Use half a second of processor time, in one go."""

    def work() -> None:
        begun_s = time.thread_time()
        while time.thread_time() - begun_s < 0.5:
            pass

    server.loop.call_soon_threadsafe(work)
    healthy.waits_for_turns(1)


@pytest.mark.parametrize(("deed", "verdict"), [(_stands_still, r"late|first frame took"), (_works, "loop was held")])
def test_a_server_that_keeps_its_session_waiting_is_found_out(
    deed: Callable[[Watched, Healthy], None], verdict: str
) -> None:
    """On a busy machine no lateness was judged at all, so that a server that stood still for one peer passed wherever
    two other tests ran beside it.
    """

    def beside() -> None:
        with watched() as server, beside_a_healthy_session(server) as healthy:
            deed(server, healthy)

    with pytest.raises(AssertionError, match=verdict):
        beside()


def test_time_that_passes_idle_counts() -> None:
    """Only what a busy machine took is taken off: who waits for something was not kept waiting by the machine.

    A machine may be so busy for a while that hardly anything is left.
    """
    since, until = Since.now(), time.monotonic() + 30
    while since.seconds <= 0.1 and time.monotonic() < until:
        time.sleep(0.5)
    assert since.seconds > 0.1
