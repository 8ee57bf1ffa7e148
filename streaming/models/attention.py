"""Rotary positions, the ring of keys and values that a slot owns, and attention over it.

A stream's position only grows, for hours if need be. Three things follow from its being the only clock:

- The ring holds the last `size` positions; which position an entry holds follows from the slot's own position, so
  nothing is ever marked, moved or cleared. Writing ahead of the position is harmless: until the position advances,
  those entries are invalid. So a row may be computed with the others and simply not advance its slot.
- Rewinding a stream is subtracting from its position. It is exact as long as the ring is longer than the attention
  window by what may be rewound.
- Rotary scores depend on differences of positions alone, so a window slides without touching a cached key. Only a
prefix
  that stays in front of the window (`<bos><audio>`) has to move along with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.config import Rope
from streaming.models.huge_pages import huge_zeros

# Up to here angles are rounded as `transformers` rounds them (float32), so that greedy tokens agree to the last bit of
# a near-tie. Beyond, float32 would lose the fast angles (0.008 rad at an hour of speech), so they are computed in
# float64.
FLOAT32_POSITIONS = 8192


class Rotary:
    """cos and sin of rotary angles. Source: `transformers.models.llama.modeling_llama.LlamaRotaryEmbedding`."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        frequency = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if rope.factor != 1.0:
            frequency = _llama3(frequency, rope)
        self.frequency = frequency.to(device)  # [D/2], float32
        self.frequency64 = self.frequency.double()

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position: [...] int64. Returns cos, sin: [..., D] float32."""
        position = position.unsqueeze(-1)
        exact = position.double() * self.frequency64
        rounded = (position.float() * self.frequency).double()
        angle = torch.where(position < FLOAT32_POSITIONS, rounded, exact)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().float(), angle.sin().float()


def _llama3(frequency: Tensor, rope: Rope) -> Tensor:
    wavelength = 2 * math.pi / frequency
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = torch.where(wavelength > low, frequency / rope.factor, frequency)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, H, T, D]; cos, sin: [B, 1, T, D] float32. Rotated in float32, returned in x's dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


@dataclass
class KeyValueRing:
    """Keys and values of every slot, all layers.

    keys, values: [S, L, H, prefix + size, D]. The first `prefix` entries are the stream's first tokens, for good;
    position p >= prefix lives at `prefix + (p - prefix) % size`.
    """

    keys: Tensor
    values: Tensor
    prefix: int

    @staticmethod
    def allocate(
        slots: int,
        layers: int,
        heads: int,
        size: int,
        head_dim: int,
        prefix: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> KeyValueRing:
        shape = (slots, layers, heads, prefix + size, head_dim)
        return KeyValueRing(huge_zeros(shape, device, dtype), huge_zeros(shape, device, dtype), prefix)

    @property
    def size(self) -> int:
        return self.keys.shape[3] - self.prefix

    def index(self, position: Tensor) -> Tensor:
        """Return where positions are kept, [B, T]. position: [B, T] int64, each >= prefix - 1."""
        return self.prefix + (position - self.prefix).remainder(self.size)

    def visible(self, position: Tensor, start: Tensor, columns: int) -> Tensor:
        """Return which of the first `columns` entries each query may look at.

        position: [B, T] of the queries, ascending. Entries of the later ones need not be written yet.
        start: [B, T] or [B, 1], oldest position inside each query's window (>= prefix).
        Returns [B, 1, T, columns] bool. Every query sees at least itself or the prefix.
        """
        entry = torch.arange(self.prefix, columns, device=position.device)
        newest = position[:, -1:]  # [B, 1]
        held = newest - (newest - entry).remainder(self.size)  # [B, columns - prefix]: the position that an entry holds
        held = held.unsqueeze(1)
        ring = (held >= start.unsqueeze(-1)) & (held <= position.unsqueeze(-1))  # [B, T, columns - prefix]
        prefix = ring.new_ones(()).expand(*ring.shape[:2], self.prefix)
        return torch.cat((prefix, ring), dim=-1).unsqueeze(1)

    def keep(self, qkv: Tensor, layer: int, view: FrameView) -> Tensor:
        """Write keys, rotated, and values, where the view says. qkv: [B, H * G + 2 * H, T, D]. Returns the queries,
        rotated, [B, H * G, T, D].
        """
        assert view.index is not None
        heads = self.keys.shape[2]
        turned, value = rotate(qkv[:, :-heads], view.cos, view.sin), qkv[:, -heads:]
        self.update(layer, view.slots, view.index, turned[:, -heads:], value)
        return turned[:, :-heads]

    def update(self, layer: int, slots: Tensor, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Write in place. slots: [B]; index: [B, T]; key, value: [B, H, T, D]."""
        self.keys[:, layer].transpose(1, 2)[slots[:, None], index] = key.transpose(1, 2)
        self.values[:, layer].transpose(1, 2)[slots[:, None], index] = value.transpose(1, 2)

    def scrub(self, slot: int) -> None:
        """Forget what a slot's stream held, a NaN included (a masked NaN value would still poison attention).

        The prefix stays: it is the same for every stream.
        """
        self.keys[slot, :, :, self.prefix :].zero_()
        self.values[slot, :, :, self.prefix :].zero_()


@dataclass(frozen=True)
class FrameView:
    """The values that the Q sub-steps of one frame share, for B rows.

    slots: [B] int64, the slot that each row is. position: [B, Q] of the tokens to be fed; start: the oldest position in
    the window, [B, 1], or [B, Q] where windows begin per token; cos, sin: [B, 1, Q, D]. index: [B, Q], where they go;
    visible: [B, 1, Q, C]: left out where kernels compute both from the position.
    """

    slots: Tensor
    position: Tensor
    start: Tensor
    cos: Tensor
    sin: Tensor
    index: Tensor | None
    visible: Tensor | None

    def columns(self, first: int, last: int) -> FrameView:
        """Return the view of tokens first .. last - 1 alone."""
        part = slice(first, last)
        return type(self)(
            self.slots,
            self.position[:, part],
            self.start if self.start.shape[1] == 1 else self.start[:, part],
            self.cos[:, :, part],
            self.sin[:, :, part],
            None if self.index is None else self.index[:, part],
            None if self.visible is None else self.visible[:, :, part],
        )


def attend(query: Tensor, ring: KeyValueRing, layer: int, slots: Tensor, visible: Tensor) -> Tensor:
    """Grouped-query attention of B rows over their slots' rings.

    query: [B, H * G, T, D], rotated; slots: [B]; visible: [B, 1, T, C] bool. Returns [B, T, H * G * D].
    The G query heads that share a key head are folded into the time axis, so that keys are read once and never
    expanded.
    """
    batch, query_heads, time, head_dim = query.shape
    heads, columns = ring.keys.shape[2], visible.shape[-1]
    groups = query_heads // heads
    keys = ring.keys[:, layer, :, :columns][slots]
    values = ring.values[:, layer, :, :columns][slots]
    folded = query.reshape(batch, heads, groups * time, head_dim)
    mask = visible.expand(batch, groups, time, columns).reshape(batch, 1, groups * time, columns)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    out = out.view(batch, query_heads, time, head_dim)
    return out.transpose(1, 2).reshape(batch, time, query_heads * head_dim)
