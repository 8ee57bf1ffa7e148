"""Where the window starts, before it is full and long after."""

from __future__ import annotations

import pytest
import torch

from streaming.models.context_window import frame_positions, window_start


@pytest.mark.parametrize(("frames", "start"), [(0, 2), (19, 2), (20, 6), (21, 10), (20_000_000, 2 + 4 * 19_999_981)])
def test_the_window_slides_by_a_frame_once_it_is_full(frames: int, start: int) -> None:
    """Of 20 frames the next one is the last, so that after 19 nothing has to go, and after 20 the oldest has."""
    assert window_start(torch.tensor([[frames]]), 20, 4, 2).tolist() == [[start]]


def test_a_frames_tokens_are_predicted_from_the_ones_before_them() -> None:
    """The first frame's first token comes from the last one of the prefix, at position 1 of 2."""
    assert frame_positions(torch.tensor([[0], [3]]), 4, 2).tolist() == [[1, 2, 3, 4], [13, 14, 15, 16]]
