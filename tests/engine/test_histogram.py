"""What the engine keeps of every step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.engine.histogram import Histogram
from tests.engine.stub_step import StubStep, running

BOUNDS = (0.001, 0.08, 1.0)


@given(st.lists(st.floats(0, 2) | st.sampled_from(BOUNDS), max_size=50))
def test_every_value_falls_to_the_lowest_bound_that_holds_it(values: list[float]) -> None:
    """A value on a bound counted above it: Prometheus' `le` is inclusive."""
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    counts = histogram.read()
    assert [sum(counts.counts[: n + 1]) for n in range(3)] == [sum(v <= bound for v in values) for bound in BOUNDS]
    assert sum(counts.counts) == len(values)
    assert np.isclose(counts.total, sum(values))


def test_what_was_read_does_not_change() -> None:
    histogram = Histogram(BOUNDS)
    before = histogram.read()
    histogram.observe(0.5)
    assert before.counts == (0, 0, 0, 0)
    assert histogram.read().counts == (0, 0, 1, 0)


def test_the_engine_counts_each_step_and_each_frame_once() -> None:
    """A step that speaks for two sessions makes two frames and is one step."""
    with running(StubStep(2)) as engine, engine.open(seed=1) as one, engine.open(seed=2) as two:
        for session in (one, two):
            session.listen(np.zeros(1920, np.float32))
            session.listen(np.zeros(1920, np.float32))
        for session in (one, two):
            assert len(list(session.speak(max_frames=3))) == 3
        stats = engine.stats()
    assert (stats.frames_heard, stats.frames_spoken, stats.steps_failed) == (4, 6, 0)
    assert sum(stats.step_seconds.counts) == stats.steps
    assert 5 <= stats.steps <= 10
    assert stats.step_seconds.total > 0
