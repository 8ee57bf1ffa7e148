"""Rings as streams leave them: written where a slot's window is, and NaN where nothing was."""

from __future__ import annotations

import torch
from torch import Tensor

from streaming.models.attention import KeyValueRing


def scattered(rows: int, device: torch.device) -> Tensor:
    """Return slots for so many rows, [B]: none of them their own number, and not in their order."""
    return 2 * torch.arange(rows, device=device).flip(0) + 1


def poisoned_ring(
    slots: Tensor,
    position: Tensor,
    start: Tensor,
    layers: int,
    heads: int,
    size: int,
    dim: int,
    prefix: int,
    dtype: torch.dtype,
) -> KeyValueRing:
    """slots: [B], of the rows; position: [B, T], the tokens that are fed next; start: [B, 1] or [B, T]. All other slots
    are NaN, and so is one more than there are.
    """
    shape = (2 * len(slots) + 1, layers, heads, prefix + size, dim)
    ring = KeyValueRing(torch.full(shape, torch.nan), torch.full(shape, torch.nan), prefix)
    for memory in (ring.keys, ring.values):
        memory[slots.cpu(), :, :, :prefix] = torch.randn(len(slots), layers, heads, prefix, dim)
        for row, slot in enumerate(slots.tolist()):
            newest = int(position[row, 0])
            held = ring.index(torch.arange(min(int(start[row, 0]), newest), newest)[None])[0]
            memory[slot, :, :, held] = torch.randn(layers, heads, len(held), dim)
    device = position.device
    return KeyValueRing(ring.keys.to(device, dtype), ring.values.to(device, dtype), prefix)


def cleaned(ring: KeyValueRing) -> KeyValueRing:
    """A copy for the reference, which multiplies what it does not see by zero: NaN would come through."""
    return KeyValueRing(ring.keys.nan_to_num(), ring.values.nan_to_num(), ring.prefix)


def others(memory: Tensor, slots: Tensor) -> Tensor:
    """Return the memory of the slots that are no row's."""
    left = torch.ones(len(memory), dtype=torch.bool)
    left[slots.cpu()] = False
    return memory[left.to(memory.device)]


def assert_same_ring(ours: KeyValueRing, wanted: KeyValueRing, tolerance: float) -> None:
    """The same entries, and NaN kept where nothing was written."""
    for one, other in ((ours.keys, wanted.keys), (ours.values, wanted.values)):
        torch.testing.assert_close(one.nan_to_num(), other.nan_to_num(), rtol=tolerance, atol=1e-6)
