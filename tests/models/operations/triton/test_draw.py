"""Draws in one launch against `sampler.draw`: the same code, to the bit, whatever the logits and the options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from streaming.models.operations.triton.operations import TritonOperations
from streaming.models.sampler import SamplerState, uniform
from tests.models.operations.triton.draws import OPTIONS, assert_same_draws, drawing, options


@pytest.mark.parametrize(("size", "book", "count"), [(17, 2, 7), (65, 0, 7), (2049, 0, 1)])
def test_codes_are_the_reference_s(device: torch.device, dtype: torch.dtype, size: int, book: int, count: int) -> None:
    """Pins another order among equal logits, a sum rounded otherwise, a division that is not exact, another u."""
    logits = (2 * torch.randn(count, size)).to(device, dtype)
    if book:
        logits[:, -1] = -torch.inf
    drawn = assert_same_draws(TritonOperations(), logits, options(count, device), book)
    assert drawn.finite.all()


def test_a_row_may_be_longer_than_its_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Output layers are padded: what stands behind a row's logits was drawn from, or taken for the next row."""
    logits = torch.full((3, 72), 100.0)
    logits[:, :65] = 2 * torch.randn(3, 65)
    assert_same_draws(TritonOperations(), logits.to(device, dtype)[:, :65], options(3, device), 0)


def test_equal_logits_minus_zero_and_forbidden_ones(device: torch.device, dtype: torch.dtype) -> None:
    """Pins ties broken by the sort's own order, and tokens drawn that are not allowed."""
    count = len(OPTIONS)
    logits = torch.randint(-1, 2, (count, 65)).float()
    logits[:, ::7], logits[:, 3::7] = -0.0, 0.0
    logits[1::2, 5:] = -torch.inf
    assert_same_draws(TritonOperations(), logits.to(device, dtype), options(count, device), 1)


def test_speech_ends_where_the_end_is_likeliest_and_the_slot_speaks(device: torch.device, dtype: torch.dtype) -> None:
    """Pins an end drawn by a slot that listens, and a code beyond the codebook written for it."""
    logits = torch.randn(3, 65)
    logits[:, -1] = 100.0
    drawn = assert_same_draws(TritonOperations(), logits.to(device, dtype), options(3, device), 0)
    assert torch.equal(drawn.ended, drawn.speaking)
    assert int(drawn.codes.max()) == 63


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_slot_whose_numbers_broke_is_told_and_stays_within_its_codebook(
    device: torch.device, dtype: torch.dtype, bad: float
) -> None:
    """Pins NaN that is drawn as a code past the table, or that marks its neighbour."""
    logits = torch.randn(3, 65)
    logits[1, 7] = bad
    logits[2, -1] = -torch.inf  # forbidden, not broken
    ours = drawing(3, 4, device)
    TritonOperations().draw(logits.to(device, dtype), 1, options(3, device), ours, few=True)
    assert ours.finite.tolist() == [True, False, True]
    assert 0 <= int(ours.codes.min()) <= int(ours.codes.max()) < 64


def test_draws_from_flat_chances_agree(device: torch.device) -> None:
    """Where a sum that was off by a rounding would show soonest. On a GPU, 20,000 draws."""
    count = 7 if device.type == "cpu" else 20_000
    logits = (torch.randn(1, 65, device=device) / 50).repeat(count, 1)
    drawn = assert_same_draws(TritonOperations(), logits, options(count, device), 0, seed=3)
    assert len(drawn.codes[:, 0].unique()) > 2


def test_uniform_numbers_reach_the_kernel(device: torch.device) -> None:
    """Two equal chances: the first below a half, the second from there on. Pins seeds and numbers beyond 32 bits."""
    seeds = torch.tensor([0, 1, 2**31, 2**40 + 7, 2**62, 2**63 - 1], device=device)
    state = SamplerState.allocate(6, device)
    state.temperature.fill_(1.0)
    state.top_k.fill_(64)
    state.top_p.fill_(1.0)
    state.seed.copy_(seeds)
    logits = torch.full((6, 65), -torch.inf, device=device)
    logits[:, 10] = logits[:, 20] = 0.0
    for seed in range(1 if device.type == "cpu" else 50):
        ours = drawing(6, 4, device, seed)
        listening = torch.zeros_like(ours.listening)
        ours = replace(ours, listening=listening, speaking=~listening)
        TritonOperations().draw(logits, 3, state, ours, few=True)
        u = uniform(seeds, ours.frames * 4 + 3)[ours.slots]
        assert torch.equal(ours.codes[:, 3], torch.where(u < 0.5, 10, 20))
