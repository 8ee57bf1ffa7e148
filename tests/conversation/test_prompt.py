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
    ("said", "keep", "kept", "left"),
    [
        (2 * FRAME, 0, 0, 0),
        (2 * FRAME, FRAME, 1, FRAME),
        (2 * FRAME, FRAME + 1, 2, 2 * FRAME),
        (2 * FRAME + 9, 2 * FRAME + 4, 2, 2 * FRAME + 4),
        (2 * FRAME + 9, 10 * FRAME, 2, 2 * FRAME + 9),
    ],
)
def test_a_frame_of_which_something_is_kept_stays_whole(said: int, keep: int, kept: int, left: int) -> None:
    """Half a frame cannot be taken back from the engine: it would have kept what the client wanted gone."""
    made = prompt(said)
    assert made.keep(keep) == kept
    assert made.samples == left


def test_the_rest_is_given_once() -> None:
    """Given twice, it would be the beginning of the next turn, too."""
    made = prompt(FRAME + 7)
    assert len(made.rest()) == 7
    assert len(made.rest()) == 0


def test_a_new_turn_has_no_frames() -> None:
    made = prompt(3 * FRAME)
    made.speech_from = 2
    made.begin()
    assert (made.frames, made.speech_from) == (0, 0)


def test_what_could_not_be_cleared_is_still_there() -> None:
    """The engine had kept more than it was to keep, and the prompt was taken for too short: the next clear took back
    too little, or nothing.
    """
    made = prompt(9 * FRAME)
    assert made.keep(0) == 0
    made.frames += 2
    made.speech_from = 1
    made.cleared(5)
    assert (made.frames, made.speech_from) == (7, 6)
    assert made.keep(6 * FRAME) == 6


def test_the_last_of_several_clears_says_what_is_kept() -> None:
    """What the first clear could not take back, the second may have taken: counted twice, it would be kept twice."""
    made = prompt(9 * FRAME)
    made.keep(4 * FRAME)
    made.keep(2 * FRAME)
    made.cleared(6)
    assert made.frames == 2
    made.cleared(3)
    assert made.frames == 3


def test_an_answer_that_comes_late_is_none_of_the_next_prompt() -> None:
    made = prompt(9 * FRAME)
    made.keep(0)
    made.begin()
    made.frames = 1
    made.keep(0)
    made.cleared(5)
    assert made.frames == 0
    made.cleared(1)
    assert made.frames == 1
