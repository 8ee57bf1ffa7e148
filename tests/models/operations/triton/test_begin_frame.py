"""Positions, angles and the prefix's keys, from the beginning of a stream to years into it."""

from __future__ import annotations

import pytest
import torch

from streaming.config import Rope
from streaming.models.attention import Rotary
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations
from tests.models.operations.triton.rings import assert_same_ring, cleaned, others, poisoned_ring, scattered

ROPE = Rope(500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
FRAMES = [0, 3, 19, 20, 2048, 2049, 20_000_000]
"""At the beginning, around a full window of 20, around position 8,192, and two years on."""


@pytest.mark.parametrize(("dim", "heads", "prefix", "books"), [(64, 2, 2, 4), (128, 3, 1, 8)])
def test_a_frame_begins_as_the_reference_has_it(
    device: torch.device, dtype: torch.dtype, dim: int, heads: int, prefix: int, books: int
) -> None:
    """Pins angles rounded otherwise, a prefix turned to the wrong place, a layer, a head or a slot without its own."""
    slots = scattered(len(FRAMES), device)
    frames = torch.full((2 * len(FRAMES) + 1,), 7, device=device)
    frames[slots] = torch.tensor(FRAMES, device=device)
    size, rotary = books * 26, Rotary(ROPE, dim, device)
    prefix_keys = torch.randn(3, heads, prefix, dim).to(device, dtype)
    nowhere = torch.zeros(len(slots), 1, dtype=torch.int64, device=device)
    ring = poisoned_ring(slots, nowhere, nowhere, 3, heads, size, dim, prefix, dtype)
    reference = cleaned(ring)
    wanted = TorchOperations().begin_frame(slots, frames, prefix_keys, reference, rotary, 20, books, prefix + size)
    view = TritonOperations().begin_frame(slots, frames, prefix_keys, ring, rotary, 20, books, 0)
    assert torch.equal(view.slots, slots)
    assert torch.equal(view.position, wanted.position)
    assert torch.equal(view.start, wanted.start)
    assert torch.equal(view.cos, wanted.cos)
    assert torch.equal(view.sin, wanted.sin)
    assert_same_ring(ring, reference, 1e-6 if dtype == torch.float32 else 2**-7)
    assert ring.keys[:, :, :, prefix:].isnan().all()
    assert others(ring.keys, slots).isnan().all()
