"""The step as CUDA graphs against the same step run operation by operation. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streaming.config import Sampling
from streaming.frame_step import FrameStep, StepResult
from streaming.models.random_weights import LLAMA_MIMI_1_3B, random_codec, random_decoder
from tests.reference import load_codec, load_decoder, speech

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FRAME, WINDOW, REWIND = 1920, 12, 4
CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def pair(codec_dir: Path, decoder_dir: Path) -> tuple[FrameStep, FrameStep]:
    """The same tiny models twice over five slots: captured, and not."""
    codec, decoder = load_codec(codec_dir, device=CUDA), load_decoder(decoder_dir, device=CUDA)
    captured, plain = (FrameStep(codec, decoder, 5, WINDOW, REWIND, graphs=graphs) for graphs in (True, False))
    captured.warm_up()
    return captured, plain


def _step(step: FrameStep, doing: str, number: int) -> StepResult:
    """doing: "l", "s" or "-" for each slot. The last one's row comes first."""
    slots = np.array([slot for slot, what in enumerate(doing) if what != "-"])[::-1].copy()
    pcm = speech(len(slots), seed=number).reshape(len(slots), FRAME)
    ends = np.random.default_rng(number).choice([FRAME, FRAME, 1, 900, 1919], len(slots))
    listening = np.array([doing[slot] == "l" for slot in slots])
    return step(slots, pcm, listening, ~listening, ends)


def _plan(steps: int, seed: int) -> list[str]:
    """Random conversations; the batch changes its width, and all slots listen first."""
    random = np.random.default_rng(seed)
    plan = ["lllll"]
    while len(plan) < steps:
        doing = "".join(random.choice(list("lss-"), size=int(random.integers(1, 6))))
        if doing.strip("-"):
            plan.append(doing)
    return plan


def _assert_same(one: StepResult, other: StepResult, doing: str) -> None:
    takes_part = np.array([d != "-" for d in doing])
    np.testing.assert_array_equal(one.ended[takes_part], other.ended[takes_part])
    alive = takes_part & ~other.ended
    np.testing.assert_array_equal(one.codes[alive], other.codes[alive])
    np.testing.assert_allclose(one.pcm[alive], other.pcm[alive], atol=1e-4)
    assert not one.broken.any()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=3), Sampling(top_k=0, seed=4)], ids=str)
def test_graphs_say_what_the_operations_say(pair: tuple[FrameStep, FrameStep], sampling: Sampling) -> None:
    """Over all buckets, through slides and rewinds: a stale pointer or a shape that was frozen would show."""
    for step in pair:
        for slot in range(5):
            step.open(slot, sampling)
    for number, doing in enumerate(_plan(6 * WINDOW, seed=1)):
        _assert_same(*(_step(step, doing, number) for step in pair), doing)
        if number % 9 == 8:
            for step in pair:
                step.rewind(number % 5, min(2, step.frames(number % 5)))


def test_capturing_leaves_live_sessions_as_they_are(codec_dir: Path, decoder_dir: Path) -> None:
    codec, decoder = load_codec(codec_dir, device=CUDA), load_decoder(decoder_dir, device=CUDA)
    lazy, plain = (FrameStep(codec, decoder, 5, WINDOW, REWIND, graphs=graphs) for graphs in (True, False))
    for step in (lazy, plain):
        for slot in range(5):
            step.open(slot, Sampling(seed=slot))
    for number, doing in enumerate(_plan(4 * WINDOW, seed=2)):  # each bucket is captured when it is first met
        _assert_same(_step(lazy, doing, number), _step(plain, doing, number), doing)


def test_a_replay_is_one_launch_and_no_memory() -> None:
    """At full size, the memory that steps take must not grow, for hours."""
    step = FrameStep(random_codec(4, CUDA), random_decoder(LLAMA_MIMI_1_3B, CUDA, torch.bfloat16), 4, 255, 16)
    step.warm_up()
    for slot in range(4):
        step.open(slot, Sampling(seed=slot))
    for number in range(20):
        _step(step, "llll", number)
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    for number in range(300):
        assert not _step(step, "ssls", number).broken.any()
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == before
