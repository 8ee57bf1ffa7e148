"""A step on kernels beside the same step on the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streaming.config import Sampling
from streaming.frame_step import FrameStep
from tests.reference import speech


def assert_same_steps(one: FrameStep, other: FrameStep, plan: Sequence[str]) -> None:
    """Two new slots of each, one greedy, one that draws. plan: what both do in each step, "l", "s" or "-"."""
    for step in (one, other):
        step.open(0, Sampling(temperature=0.0))
        step.open(1, Sampling(seed=2**62 + 5))
    for number, doing in enumerate(plan):
        pcm = speech(2, seed=number).reshape(2, -1)
        listening, speaking = (np.array([what == kind for what in doing]) for kind in "ls")
        ours, wanted = (step(pcm, listening, speaking) for step in (one, other))
        part = listening | speaking
        assert np.array_equal(ours.ended[part], wanted.ended[part])
        assert not ours.broken.any()
        alive = part & ~wanted.ended
        assert np.array_equal(ours.codes[alive], wanted.codes[alive])
        np.testing.assert_allclose(ours.pcm[alive], wanted.pcm[alive], atol=1e-4)
