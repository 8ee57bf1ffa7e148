"""Plans of who speaks when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from streaming.audio import SAMPLE_RATE
from streaming.benchmark.schedule import Manner, arriving, held

MANNER = Manner(prompt_s=(1.0, 4.0), pause_s=(0.5, 1.5), max_seconds=4.0, interrupts=0.0)


def test_a_session_does_the_same_however_many_others_there_are() -> None:
    """Pins levels of load that differ in more than their number, so that a curve has steps of the dice in it."""
    assert held(2, 60, MANNER, seed=3) == held(8, 60, MANNER, seed=3)[:2]
    assert held(2, 60, MANNER, seed=3) != held(2, 60, MANNER, seed=4)
    assert held(2, 60, MANNER, seed=3)[0].turns != held(2, 60, MANNER, seed=3)[1].turns


def test_turns_follow_each_other_with_room_for_the_continuation_and_fill_the_time() -> None:
    for plan in held(5, 60, MANNER, seed=0):
        assert 0 <= plan.turns[0].speaks_s < 2 and 60 > plan.turns[-1].speaks_s > 60 - 10
        for turn in plan.turns:
            prompt = turn.prompt_samples / SAMPLE_RATE
            assert 1 <= prompt <= 4 and 0 <= turn.prompt_at < 1 and not turn.interrupts
            assert 4.5 <= turn.over_s - turn.speaks_s - prompt <= 5.5
        assert all(before.over_s == after.speaks_s for before, after in pairwise(plan.turns))


def test_a_share_of_turns_is_cut_off_within_its_continuation() -> None:
    turns = [turn for plan in held(20, 120, replace(MANNER, interrupts=0.25), seed=0) for turn in plan.turns]
    cut = [turn for turn in turns if turn.interrupts]
    assert 0.15 < len(cut) / len(turns) < 0.35
    assert all(1 <= turn.over_s - turn.speaks_s - turn.prompt_samples / SAMPLE_RATE <= 3 for turn in cut)


def test_arrivals_are_a_poisson_process_of_the_rate_asked_for() -> None:
    """Pins arrivals at even intervals, which no queue ever suffers from."""
    plans = arriving(5.0, 400, 2, MANNER, seed=1)
    gaps = [b.arrives_s - a.arrives_s for a, b in pairwise(plans)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.1) and deviation == pytest.approx(mean, rel=0.1)
    assert all(len(plan.turns) == 2 for plan in plans)


def test_even_a_short_run_has_a_turn_in_every_session() -> None:
    assert [len(plan.turns) for plan in held(3, 0.001, MANNER, seed=0)] == [1, 1, 1]
    assert len(arriving(0.001, 0.001, 1, MANNER, seed=0)) == 1
