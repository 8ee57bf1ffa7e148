"""Floors: a machine is at least as fast as it was seen to be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streaming.benchmark.floors import Rates, Works
from streaming.benchmark.work import Work

FLOAT, HALF = torch.float32, torch.bfloat16
RATES = Rates(1e9, {FLOAT: 1e12, HALF: 4e12})


def works(*parts: tuple[torch.dtype, int, int]) -> Works:
    return tuple((kind, Work(read_bytes, operations)) for kind, read_bytes, operations in parts)


def test_a_floor_is_what_takes_longer_of_reading_and_multiplying_part_by_part() -> None:
    assert RATES.floor_ms(works((FLOAT, 2_000_000, 10**6))) == pytest.approx(2.0)
    assert RATES.floor_ms(works((FLOAT, 2_000_000, 6 * 10**9))) == pytest.approx(6.0)
    assert RATES.floor_ms(works((HALF, 2_000_000, 6 * 10**9))) == pytest.approx(2.0)
    assert RATES.floor_ms(works((FLOAT, 2_000_000, 10**6), (FLOAT, 0, 6 * 10**9))) == pytest.approx(8.0)


def test_what_was_seen_to_be_faster_counts() -> None:
    """Pins a floor by a library's bfloat16 product, 0.9 GFLOP/s without instructions for it: shares of 1.5 to 10."""
    slow = Rates(1e9, {FLOAT: 1e12, HALF: 9e8})
    seen = works((HALF, 2_000_000, 10**10))
    assert slow.floor_ms(seen) > 10_000
    raised = slow.raised([(seen, 10.0)])
    assert raised.multiply == {FLOAT: 1e12, HALF: 1e12} and raised.read == 1e9
    assert raised.floor_ms(seen) == pytest.approx(10.0)
    assert RATES.raised([(seen, 10.0)]) == RATES and RATES.raised([]) == RATES


@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.sampled_from([FLOAT, HALF]), st.integers(0, 10**10), st.integers(0, 10**13)),
                min_size=1,
                max_size=3,
            ),
            st.floats(1e-3, 1e4),
        ),
        max_size=5,
    )
)
def test_nothing_was_faster_than_its_floor(seen: list[tuple[list[tuple[torch.dtype, int, int]], float]]) -> None:
    """A whole step was not, either, though it may take less than its stages one by one."""
    times = [(works(*parts), ms) for parts, ms in seen]
    raised = RATES.raised(times)
    assert raised.read >= RATES.read and all(raised.multiply[kind] >= rate for kind, rate in RATES.multiply.items())
    for parts, ms in times:
        assert raised.floor_ms(parts) <= ms * (1 + 1e-9)
