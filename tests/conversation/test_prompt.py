"""One turn's input: whole frames, the beginning of the next, and what is kept of it."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.conversation.prompt import Prompt


def prompt(samples: int) -> Prompt:
    made = Prompt()
    made.frames += len(made.push(np.arange(samples, dtype=np.int16)))
    return made


@pytest.mark.parametrize(
    ("said", "keep", "cleared", "left"),
    [
        (2 * FRAME, 0, 2, 0),
        (2 * FRAME, FRAME, 1, FRAME),
        (2 * FRAME, FRAME + 1, 0, 2 * FRAME),
        (2 * FRAME + 9, 2 * FRAME + 4, 0, 2 * FRAME + 4),
        (2 * FRAME + 9, 10 * FRAME, 0, 2 * FRAME + 9),
    ],
)
def test_a_frame_of_which_something_is_kept_stays_whole(said: int, keep: int, cleared: int, left: int) -> None:
    """Half a frame cannot be taken back from the engine: it would have kept what the client wanted gone."""
    made = prompt(said)
    assert made.keep(keep) == cleared
    assert made.samples == left


def test_the_rest_is_given_once() -> None:
    """It would have been the beginning of the next turn, too."""
    made = prompt(FRAME + 7)
    assert len(made.rest()) == 7
    assert len(made.rest()) == 0


def test_a_new_turn_has_no_frames() -> None:
    made = prompt(3 * FRAME)
    made.speech_from = 2
    made.begin()
    assert (made.frames, made.speech_from) == (0, 0)
