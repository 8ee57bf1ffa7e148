"""The jitter buffer, mostly as properties over random arrivals and device blocks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.terminal.jitter_buffer import CAPACITY_MS, GROWTH_MS, START_MS, JitterBuffer

steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3 * FRAME)),
        st.tuples(st.just("pull"), st.integers(0, 3 * FRAME)),
    ),
    max_size=40,
)


def numbered(begin: int, n: int) -> NDArray[np.int16]:
    """Samples that tell their position and are never silence."""
    return ((begin + np.arange(n)) % 32_000 + 1).astype(np.int16)


@given(steps, st.integers(0, 2_000))
def test_every_sample_is_played_once_and_in_order(plan: list[tuple[str, int]], latency: int) -> None:
    buffer = JitterBuffer(latency_samples=latency)
    pushed = 0
    device: list[NDArray[np.int16]] = []
    for what, n in plan:
        if what == "push":
            buffer.push(numbered(pushed, n))
            pushed += n
        else:
            device.append(buffer.pull(n))
            assert len(device[-1]) == n
        assert buffer.pulled_samples + buffer.buffered_samples == pushed
    buffer.complete()
    device.append(buffer.pull(buffer.buffered_samples))
    assert buffer.buffered_samples == 0
    device.append(buffer.pull(latency))
    assert buffer.drained
    assert buffer.played_samples == pushed
    everything = np.concatenate(device)
    np.testing.assert_array_equal(everything[everything > 0], numbered(0, pushed))
    assert buffer.dropped_samples == 0


@given(steps, st.integers(0, 2_000))
def test_played_never_tells_more_than_left_the_loudspeaker(plan: list[tuple[str, int]], latency: int) -> None:
    """What is reported as heard is kept in the model's memory; too much of it is a word that nobody said."""
    buffer = JitterBuffer(latency_samples=latency)
    device = np.zeros(0, np.int16)
    before = 0
    for what, n in plan:
        if what == "push":
            buffer.push(np.ones(n, np.int16))
        else:
            device = np.concatenate([device, buffer.pull(n)])
        left = np.count_nonzero(device[: max(0, len(device) - latency)])
        assert before <= buffer.played_samples <= left
        before = buffer.played_samples


@given(steps)
def test_flush_leaves_a_buffer_that_is_as_new(plan: list[tuple[str, int]]) -> None:
    buffer = JitterBuffer(latency_samples=100)
    for what, n in plan:
        if what == "push":
            buffer.push(np.ones(n, np.int16))
        else:
            buffer.pull(n)
    played = buffer.played_samples
    assert buffer.flush() == played
    assert not buffer.pull(2 * FRAME).any()
    assert (buffer.played_samples, buffer.buffered_samples, buffer.drained) == (0, 0, False)


def test_a_turn_that_was_cut_short_while_it_ran_dry_leaves_nothing_to_the_next() -> None:
    """The next turn began with an underrun that nobody heard and waited 20 ms longer; or it began to play before there
    was enough to go on with.
    """
    buffer = JitterBuffer()
    for dry in (True, False):
        buffer.push(np.ones(2 * FRAME, np.int16))
        buffer.pull(3 * FRAME if dry else FRAME)
        buffer.flush()
        buffer.push(np.ones(START_MS * SAMPLE_RATE // 1000 - 1, np.int16))
        assert (buffer.underruns, buffer.target_ms, buffer.ready) == (0, START_MS, False)
        buffer.flush()


def test_playback_begins_with_the_first_frame() -> None:
    """With Opus, the last 6.5 ms of the first frame come with the second: to wait for these costs a whole step."""
    buffer = JitterBuffer()
    buffer.push(np.ones(START_MS * SAMPLE_RATE // 1000 - 1, np.int16))
    assert not buffer.ready
    assert not buffer.pull(10).any()
    buffer.push(np.ones(1, np.int16))
    assert buffer.ready
    assert START_MS * SAMPLE_RATE // 1000 <= FRAME - 156
    assert buffer.pull(10).all()


def test_an_underrun_makes_it_wait_for_more() -> None:
    buffer = JitterBuffer()
    buffer.push(np.ones(FRAME, np.int16))
    assert np.count_nonzero(buffer.pull(2 * FRAME)) == FRAME
    buffer.push(np.ones(FRAME, np.int16))
    assert buffer.underruns == 1
    assert buffer.target_ms == START_MS + GROWTH_MS
    assert not buffer.pull(100).any()
    buffer.push(np.ones(FRAME, np.int16))
    assert buffer.pull(100).all()


def test_growth_ends_below_the_servers_lead() -> None:
    """A target above the lead waits for audio that the server holds back until this is played: for ever."""
    buffer = JitterBuffer(max_ms=120)
    for _ in range(10):
        buffer.push(np.ones(2 * FRAME, np.int16))
        buffer.pull(3 * FRAME)
    assert buffer.target_ms == 120


def test_running_dry_at_the_end_is_no_underrun() -> None:
    """The last frame is often played before `turn.done` arrives; no listener hears that as a gap."""
    buffer = JitterBuffer()
    buffer.push(np.ones(FRAME, np.int16))
    buffer.pull(2 * FRAME)
    buffer.complete()
    assert buffer.underruns == 0
    assert buffer.drained


def test_a_short_turn_is_played_too() -> None:
    """A continuation shorter than the target never began to play."""
    buffer = JitterBuffer()
    buffer.push(np.ones(100, np.int16))
    buffer.complete()
    assert np.count_nonzero(buffer.pull(200)) == 100


def test_an_empty_turn_is_drained() -> None:
    buffer = JitterBuffer()
    buffer.complete()
    assert buffer.drained


def test_what_is_too_much_is_dropped_from_the_old_end() -> None:
    buffer = JitterBuffer()
    capacity = CAPACITY_MS * SAMPLE_RATE // 1000
    buffer.push(np.ones(capacity, np.int16))
    buffer.push(np.full(500, 2, np.int16))
    assert buffer.dropped_samples == 500
    assert buffer.buffered_samples == capacity
    assert buffer.pulled_samples == 500
