"""Slots: the lowest first, none twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.engine.slot_pool import SlotPool
from streaming.errors import EngineFullError


def test_the_lowest_free_slot_is_given_out() -> None:
    """High slots make a step wider than it has to be."""
    pool = SlotPool(4)
    assert [pool.acquire() for _ in range(3)] == [0, 1, 2]
    pool.release(1)
    pool.release(0)
    assert [pool.acquire() for _ in range(3)] == [0, 1, 3]


def test_a_full_pool_says_so_and_goes_on() -> None:
    pool = SlotPool(1)
    pool.acquire()
    with pytest.raises(EngineFullError, match="all 1 slots are taken"):
        pool.acquire()
    pool.release(0)
    assert pool.acquire() == 0


@pytest.mark.parametrize("slot", [-1, 1, 2])
def test_only_a_slot_that_is_taken_can_be_released(slot: int) -> None:
    """A slot released twice would be given to two sessions."""
    pool = SlotPool(2)
    pool.acquire()
    with pytest.raises(AssertionError):
        pool.release(slot)


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=40))
def test_it_is_a_set_of_which_the_least_is_taken(steps: list[int | None]) -> None:
    """None takes a slot, a number gives the so-manieth of the taken ones back."""
    pool, taken = SlotPool(6), set[int]()
    for step in steps:
        if step is not None and taken:
            slot = sorted(taken)[step % len(taken)]
            taken.remove(slot)
            pool.release(slot)
        elif step is None and len(taken) < 6:
            slot = pool.acquire()
            assert slot == min(set(range(6)) - taken)
            taken.add(slot)
    left = sorted(set(range(6)) - taken)
    assert [pool.acquire() for _ in left] == left
    with pytest.raises(EngineFullError):
        pool.acquire()
