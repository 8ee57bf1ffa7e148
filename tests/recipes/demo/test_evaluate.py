"""The evaluation's own figures, where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.demo import evaluate, sequences
from recipes.demo.sequences import follow, number


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("five six seven", 3),
        ("five six", 2),
        ("five seven six", 1),
        ("six seven eight", 0),
        ("", 0),
        ("five six seven eight nine", 5),
    ],
)
def test_items_count_from_the_first_to_the_first_wrong_one(words: str, right: int) -> None:
    """Pins a right word after a wrong one that counts, and speech that was cut off after five items as wrong."""
    assert evaluate.right_items(words.split(), follow([number(3), number(4)])) == right


def test_a_number_of_two_words_is_one_item() -> None:
    assert evaluate.right_items(["twenty", "one", "twenty"], follow([number(20)])) == 1
    assert evaluate.right_items(["twenty"], follow([number(20)])) == 0


@pytest.mark.parametrize(("words", "rate"), [("five six", 0), ("five sex seven", 1 / 3), ("", 1), ("nine nine", 1)])
def test_word_errors_are_against_as_much_as_was_said(words: str, rate: float) -> None:
    """Pins a continuation that is counted wrong for the words that six seconds had no room for."""
    assert evaluate.word_error_rate(words.split(), follow([number(4)])) == pytest.approx(rate)


def test_silence_is_until_something_is_heard() -> None:
    pcm = np.zeros(24_000, np.float32)
    assert evaluate.silence_seconds(pcm) == 1.0
    pcm[12_000:] = 0.1
    assert evaluate.silence_seconds(pcm) == 0.5


def test_the_control_is_another_prompt_of_the_same_kind_that_goes_on_otherwise() -> None:
    """Pins a control that is the case itself, or that is right by chance of having the same answer."""
    pcm = np.zeros(0, np.float32)
    day = sequences.sequence("day")[:1]
    said = [[number(1)], [number(1)], day, [number(7)]]
    material = [evaluate.Case("", pcm, items, 200.0) for items in said]
    assert [evaluate._another(material, place) for place in range(4)] == [3, 3, 3, 0]
