"""The simulated loudspeaker, on a clock that the test turns by hand."""

from __future__ import annotations

import numpy as np

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.terminal.jitter_buffer import JitterBuffer
from streaming.terminal.loudspeaker import SimulatedLoudspeaker


class HandClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ones(n: int) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    return np.ones(n, np.int16)


def test_the_first_sample_is_heard_when_it_arrives_and_the_rest_in_its_time() -> None:
    clock = HandClock()
    speaker = SimulatedLoudspeaker(JitterBuffer(), clock)
    clock.now_s += 1.0
    assert speaker.playback().audible_s is None
    speaker.play(ones(FRAME))
    assert speaker.playback().audible_s == clock.now_s
    clock.now_s += 0.04
    assert abs(speaker.playback().played_samples - FRAME // 2) <= 1
    speaker.complete()
    clock.now_s += 0.05
    playback = speaker.playback()
    assert (playback.played_samples, playback.drained, playback.underruns) == (FRAME, True, 0)
    heard = speaker.take_heard()
    assert len(heard) == int((clock.now_s - 100.0) * SAMPLE_RATE)
    assert np.count_nonzero(heard) == FRAME
    assert not heard[: SAMPLE_RATE - 1].any()
    assert len(speaker.take_heard()) == 0


def test_a_late_frame_is_an_underrun_and_moves_no_clock() -> None:
    clock = HandClock()
    speaker = SimulatedLoudspeaker(JitterBuffer(), clock)
    speaker.play(ones(FRAME))
    clock.now_s += 0.2
    speaker.play(ones(FRAME))
    assert speaker.playback().underruns == 1
    assert speaker.playback().audible_s == 100.0


def test_underruns_are_counted_by_turn() -> None:
    clock = HandClock()
    speaker = SimulatedLoudspeaker(JitterBuffer(), clock)
    speaker.play(ones(FRAME))
    clock.now_s += 0.2
    speaker.play(ones(FRAME))
    assert speaker.stop() == FRAME
    assert speaker.playback().underruns == 0
    assert speaker.playback().audible_s is None


def test_a_short_turn_is_audible_once_it_is_complete() -> None:
    clock = HandClock()
    speaker = SimulatedLoudspeaker(JitterBuffer(), clock)
    speaker.play(ones(10))
    assert speaker.playback().audible_s is None
    clock.now_s += 0.01
    speaker.complete()
    assert speaker.playback().audible_s == clock.now_s
