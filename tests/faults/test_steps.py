"""A step that raises, over sockets: the sessions that it concerns end with a reason, the others go on."""

from __future__ import annotations

import json
import threading
import urllib.error
from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.protocol import messages
from tests.engine.stub_step import StubResult, StubStep
from tests.faults.harness import STEP_S, Watched, beside_a_healthy_session, watched
from tests.faults.raw_client import RawClient, audio, text
from tests.server.live_server import get

MARK = np.full(3 * 1920, 12_345, np.int16)
"""Speech that the step cannot bear."""


class _Step(StubStep):
    """Fail when it hears `MARK`: with `error` if that slot is alone in the step, by numbers that break otherwise."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(4, delay_s=lambda: STEP_S)
        self.error = error

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: NDArray[np.float32],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64],
    ) -> StubResult:
        marked = listening & (pcm[:, 0] > 0.37) & (pcm[:, 0] < 0.38)
        if marked.any() and self.error is not None and (listening | speaking).sum() == 1:
            raise self.error
        result = super().__call__(slots, pcm, listening, speaking, lengths)
        result.broken[:] |= marked
        return result


@pytest.mark.parametrize(
    "error",
    [None, RuntimeError("CUDA out of memory"), MemoryError(), ZeroDivisionError("a fault of the step's own")],
    ids=repr,
)
def test_a_step_that_fails_ends_the_sessions_that_it_concerns(error: Exception | None) -> None:
    """Out of memory in one step, or numbers that broke in one slot, ended the engine for everybody."""
    with watched(step=_Step(error)) as server:
        with beside_a_healthy_session(server):
            for _ in range(2):
                with RawClient(server.port) as peer:
                    peer.start(messages.SessionStart(max_seconds=1))
                    peer.send(audio(MARK) + text(messages.Speak(turn=1)))
                    said = json.loads(peer.expect(b'"error"'))
                    assert (said["code"], said["fatal"]) == ("step_failed", True)
                    assert peer.expect_close() == 1011
        server.assert_clean()


def test_a_lost_device_is_told_in_health_and_to_every_session() -> None:
    """With a code that means: elsewhere. That the process then ends with status 1 is
    `test_a_server_whose_engine_has_failed_ends_with_status_1`.
    """
    step = StubStep(4)
    seen: list[dict[str, object]] = []

    def look(server: Watched) -> None:
        """Look until nobody answers any more."""
        with suppress(OSError):
            while True:
                try:
                    get(f"{server.http}/health")
                except urllib.error.HTTPError as answer:
                    with answer:
                        seen.append(json.loads(answer.read()) | {"http": answer.code})

    with watched(step=step) as server, RawClient(server.port) as first, RawClient(server.port) as second:
        for peer in (first, second):
            peer.start(messages.SessionStart())
        looking = threading.Thread(target=look, args=(server,))
        looking.start()
        step.fatal, step.failure = True, RuntimeError("the device fell off the bus")
        first.send(audio(MARK))
        for peer in (first, second):
            said = json.loads(peer.expect(b'"error"'))
            assert (said["code"], said["fatal"]) == ("engine_stopped", True)
            assert peer.expect_close() == 1011
        server.join()
        looking.join()
    assert {(answer["status"], answer["http"]) for answer in seen} == {("failed", 503)}
