"""Attention over what a slot holds, and the writing before it, against masks over the whole ring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streaming.config import Rope
from streaming.models.attention import FrameView, Rotary
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import operations as fused
from streaming.models.operations.triton.attention import splits_for
from streaming.models.operations.triton.operations import TritonOperations
from tests.models.operations.triton.rings import assert_same_ring, cleaned, others, poisoned_ring, scattered

BOOKS, CONTEXT, DEPTH, PREFIX = 4, 30, 3, 2
SIZE = BOOKS * (CONTEXT + DEPTH)


def frame_view(frames: Tensor, rotary: Rotary) -> FrameView:
    """As `TorchOperations.begin_frame` makes it, at any context. frames: [B], of each row."""
    slots = scattered(len(frames), frames.device)
    start = PREFIX + BOOKS * (frames[:, None] + 1 - CONTEXT).clamp(min=0)
    position = PREFIX - 1 + frames[:, None] * BOOKS + torch.arange(BOOKS, device=frames.device)
    cos, sin = (angles.unsqueeze(1) for angles in rotary(position))
    nothing = poisoned_ring(slots[:0], position[:0], start[:0], 1, 1, SIZE, 2, PREFIX, torch.float32)
    visible = nothing.visible(position, start, PREFIX + SIZE)
    return FrameView(slots, position, start, cos, sin, nothing.index(position), visible)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("by_token", [False, True], ids=["by-frame", "by-token"])
@pytest.mark.parametrize(("dim", "heads", "groups"), [(64, 1, 4), (128, 2, 2), (16, 1, 3)])
def test_attention_sees_what_the_masks_show_and_touches_nothing_else(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    heads: int,
    groups: int,
    by_token: bool,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pins a window off by one, a wrap missed, a later token of the frame seen, a query head or a row with another's
    keys, a part of a split window counted twice, and any read of memory that was never written: it is NaN.

    At the first frame, in the first block, before and after the window is full and the ring wraps, and hours on.
    """
    monkeypatch.setattr(fused, "splits_for", lambda batch, heads, entries: splits)
    frames = torch.tensor([0, 5, CONTEXT - 1, CONTEXT + DEPTH + 2, 180_007], device=device)
    view = frame_view(frames, Rotary(Rope(10_000.0), dim, device))
    ring = poisoned_ring(view.slots, view.position, view.start, 2, heads, SIZE, dim, PREFIX, dtype)
    reference = cleaned(ring)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for first, last in [(book, book + 1) for book in range(2)] if by_token else [(0, BOOKS)]:
        qkv = torch.randn(len(frames), last - first, (groups + 2) * heads * dim).to(device, dtype)
        part = view.columns(first, last)
        ours = TritonOperations().attend(qkv, ring, 1, part)
        wanted = TorchOperations().attend(qkv, reference, 1, part)
        torch.testing.assert_close(ours, wanted, rtol=4 * tolerance, atol=4 * tolerance)
        assert_same_ring(ring, reference, tolerance)
    assert others(ring.keys, view.slots).isnan().all()
    assert ring.keys[:, 0, :, PREFIX:].isnan().any()


def test_a_window_of_one_frame_sees_the_prefix_at_its_first_token(device: torch.device) -> None:
    """Pins a division by no weight at all: that token stands in front of its own window."""
    rotary = Rotary(Rope(10_000.0), 16, device)
    start, position = torch.tensor([[PREFIX + BOOKS]]), torch.tensor([[PREFIX + BOOKS - 1]])
    start, position = start.to(device), position.to(device)
    cos, sin = (angles.unsqueeze(1) for angles in rotary(position))
    slots = scattered(1, device)
    ring = poisoned_ring(slots, position, start, 1, 1, SIZE, 16, PREFIX, torch.float32)
    reference = cleaned(ring)
    visible = reference.visible(position, start, PREFIX + SIZE)
    view = FrameView(slots, position, start, cos, sin, reference.index(position), visible)
    qkv = torch.randn(1, 1, 3 * 16, device=device)
    torch.testing.assert_close(
        TritonOperations().attend(qkv, ring, 0, view), TorchOperations().attend(qkv, reference, 0, view)
    )


@pytest.mark.parametrize("splits", [1, 4])
def test_windows_may_begin_per_query(
    device: torch.device, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the codec's do, whose rings have no prefix. Pins the first query's window taken for all: the oldest entry
    would be seen by those who have left it behind.
    """
    monkeypatch.setattr(fused, "splits_for", lambda batch, heads, entries: splits)
    window, time, dim, heads = 20, 3, 16, 2
    position = torch.tensor([0, 7, window - 2, 3 * window, 90_000], device=device)[:, None]
    position = position + torch.arange(time, device=device)
    start = (position - (window - 1)).clamp(min=0)
    slots = scattered(len(position), device)
    ring = poisoned_ring(slots, position, start, 1, heads, window + 6, dim, 0, dtype)
    reference, rotary = cleaned(ring), Rotary(Rope(10_000.0), dim, device)
    qkv = torch.randn(len(position), time, 3 * heads * dim).to(device, dtype)
    ours, wanted = (
        operations.attend(qkv, held, 0, operations.view(slots, position, start, held, rotary, window + 6))
        for operations, held in ((TritonOperations(), ring), (TorchOperations(), reference))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    assert_same_ring(ring, reference, tolerance)


@pytest.mark.parametrize(("rows", "splits"), [(1, 16), (2, 16), (4, 8), (16, 2), (32, 1), (512, 1)])
def test_few_rows_are_split_until_they_fill_a_gpu(rows: int, splits: int) -> None:
    """Pins one session that runs on 8 of 132 multiprocessors, and many that pay for a second launch."""
    assert splits_for(rows, 8, 1094) == splits
    assert splits_for(rows, 8, 60) == 1
