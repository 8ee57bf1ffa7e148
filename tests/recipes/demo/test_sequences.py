"""How sequences go on: the rules that the model is taught and judged by."""

from __future__ import annotations

import pytest

from recipes.demo import sequences
from recipes.demo.sequences import Item, follow, number


def _texts(items: list[Item]) -> list[str]:
    return [item.text for item in items]


@pytest.mark.parametrize(
    ("said", "first", "last"),
    [
        ([1], 2, 100),
        ([3, 4], 5, 100),
        ([19], 20, 100),
        ([3, 2], 1, 0),
        ([2, 4], 6, 100),
        ([1, 3], 5, 99),
        ([5, 10], 15, 100),
        ([10, 9], 8, 0),
        ([10], 11, 100),
        ([30, 20], 10, 0),
        ([7, 3], 4, 100),  # no step of ours: on from the last one
    ],
)
def test_numbers_go_on_by_the_step_of_the_last_two_to_the_end(said: list[int], first: int, last: int) -> None:
    found = follow([number(value) for value in said])
    assert (found[0], found[-1]) == (number(first), number(last))


def test_days_and_months_end_and_go_round_after_their_last() -> None:
    """Pins silence, or another sequence, for one who says "December"."""
    days, months = sequences.sequence("day"), sequences.sequence("month")
    assert _texts(follow(days[4:5])) == ["Saturday", "Sunday"]
    assert follow(days[-1:]) == days
    assert _texts(follow(months[:2]))[:2] == ["March", "April"]
    assert follow(months[-2:])[0].text == "January"


def test_a_rhyme_goes_on_from_any_line_and_whatever_is_over_or_unknown_meets_the_first_rhyme() -> None:
    rhyme = sequences.sequence("rhyme", 2)
    assert follow(rhyme[1:2]) == rhyme[2:]
    friendly = sequences.sequence("rhyme", 0)
    for said in ([], rhyme[-1:], [number(100)], [number(1), number(0)], sequences.sequence("letter")[-1:]):
        assert follow(said) == friendly


def test_every_item_is_said_by_blocks_and_every_block_is_of_an_item() -> None:
    assert len(set(sequences.BLOCKS)) == len(sequences.BLOCKS)
    used = {block for item in sequences.ITEMS for block in sequences.blocks_of([item])}
    assert used == set(range(len(sequences.BLOCKS)))
    assert [sequences.BLOCKS[block] for block in sequences.blocks_of([number(21)])] == ["twenty-", "one"]
    assert len({(item.kind, item.group, item.place) for item in sequences.ITEMS}) == len(sequences.ITEMS)


def test_words_are_written_as_the_recogniser_writes_them() -> None:
    """Pins a judge that waits for "king's," with its comma, or for a letter spelled as it sounds."""
    line = sequences.sequence("rhyme", 2)[2]
    assert sequences.words_of([number(42), line])[:7] == ["forty", "two", "all", "the", "king's", "horses", "and"]
    assert sequences.words_of(sequences.sequence("letter")[22:23]) == ["w"]
    assert sequences.words_of([number(100)]) == ["one", "hundred"]
