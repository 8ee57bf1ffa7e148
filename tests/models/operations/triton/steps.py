"""A step on kernels beside the same step on the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streaming.config import Sampling
from streaming.frame_step import FrameStep
from tests.reference import speech


def assert_same_steps(one: FrameStep, other: FrameStep, plan: Sequence[str]) -> None:
    """Two new slots of each, one greedy, one that draws. plan: what both do in each step, "l", "s" or "-"; the second
    one's row comes first.
    """
    for step in (one, other):
        step.open(0, Sampling(temperature=0.0))
        step.open(1, Sampling(seed=2**62 + 5))
    for number, doing in enumerate(plan):
        slots = np.array([slot for slot in (1, 0) if doing[slot] != "-"])
        pcm = speech(2, seed=number).reshape(2, -1)[slots]
        listening = np.array([doing[slot] == "l" for slot in slots])
        ours, wanted = (step(slots, pcm, listening, ~listening) for step in (one, other))
        assert np.array_equal(ours.ended, wanted.ended)
        assert not ours.broken.any()
        alive = ~wanted.ended
        assert np.array_equal(ours.codes[alive], wanted.codes[alive])
        np.testing.assert_allclose(ours.pcm[alive], wanted.pcm[alive], atol=1e-4)
