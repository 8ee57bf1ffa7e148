"""The stereo recording."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from streaming.terminal.recording import MAX_SKEW_SAMPLES, Recording


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 500)), max_size=20))
def test_both_sides_are_whole_and_on_one_time_line(plan: list[tuple[bool, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.wav"
        left = right = 0
        with Recording(path) as recording:
            for is_left, n in plan:
                if is_left:
                    recording.sent(np.arange(left + 1, left + n + 1).astype(np.int16))
                    left += n
                else:
                    recording.heard(-np.arange(right + 1, right + n + 1).astype(np.int16))
                    right += n
        samples, _ = soundfile.read(path, dtype="int16", always_2d=True)
    length = max(left, right)
    assert samples.shape == (length, 2)
    time = np.arange(1, length + 1)
    np.testing.assert_array_equal(samples[:, 0], np.where(time <= left, time, 0))
    np.testing.assert_array_equal(samples[:, 1], np.where(time <= right, -time, 0))


def test_a_side_that_says_nothing_becomes_silence(tmp_path: Path) -> None:
    """One side piled up in memory while the other device was gone."""
    with Recording(tmp_path / "a.wav") as recording:
        recording.sent(np.ones(MAX_SKEW_SAMPLES + 100, np.int16))
        recording.heard(np.full(10, 2, np.int16))
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert samples[100].tolist() == [1, 2]
    assert samples[99].tolist() == [1, 0]


def test_it_can_be_closed_early(tmp_path: Path) -> None:
    with Recording(tmp_path / "a.wav") as recording:
        recording.sent(np.ones(10, np.int16))
        recording.close()
        recording.close()
    assert soundfile.info(tmp_path / "a.wav").frames == 10


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), Recording(tmp_path / "a.wav"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
