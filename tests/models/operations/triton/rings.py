"""Rings as streams leave them: written where a slot's window is, and NaN where nothing was."""

from __future__ import annotations

import torch
from torch import Tensor

from streaming.models.attention import KeyValueRing


def poisoned_ring(
    position: Tensor, start: Tensor, layers: int, heads: int, size: int, dim: int, prefix: int, dtype: torch.dtype
) -> KeyValueRing:
    """position: [B, T], the tokens that are fed next; start: [B, 1] or [B, T]. One slot more than B, which is empty."""
    slots = len(position) + 1
    shape = (slots, layers, heads, prefix + size, dim)
    ring = KeyValueRing(torch.full(shape, torch.nan), torch.full(shape, torch.nan), prefix)
    for memory in (ring.keys, ring.values):
        memory[:-1, :, :, :prefix] = torch.randn(slots - 1, layers, heads, prefix, dim)
        for slot in range(slots - 1):
            newest = int(position[slot, 0])
            held = ring.index(torch.arange(min(int(start[slot, 0]), newest), newest)[None])[0]
            memory[slot, :, :, held] = torch.randn(layers, heads, len(held), dim)
    device = position.device
    return KeyValueRing(ring.keys.to(device, dtype), ring.values.to(device, dtype), prefix)


def cleaned(ring: KeyValueRing) -> KeyValueRing:
    """A copy for the reference, which multiplies what it does not see by zero: NaN would come through."""
    return KeyValueRing(ring.keys.nan_to_num(), ring.values.nan_to_num(), ring.prefix)


def assert_same_ring(ours: KeyValueRing, wanted: KeyValueRing, tolerance: float) -> None:
    """The same entries, and NaN kept where nothing was written."""
    for one, other in ((ours.keys, wanted.keys), (ours.values, wanted.values)):
        torch.testing.assert_close(one.nan_to_num(), other.nan_to_num(), rtol=tolerance, atol=1e-6)
