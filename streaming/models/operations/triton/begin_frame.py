"""One launch at the beginning of a frame: positions, angles, and the prefix's keys turned to where the window starts.

Where the window starts is `context_window.window_start`'s arithmetic. The angles are those of
`attention.Rotary`: rounded to float32 up to position 8,192, exact beyond.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.attention import FLOAT32_POSITIONS, Rotary
from streaming.models.operations.triton.device import on_its_device


@triton.jit
def _angle(position, frequency, frequency64, float32_positions: tl.constexpr):
    rounded = (position.to(tl.float32) * frequency).to(tl.float64)
    return tl.where(position < float32_positions, rounded, position.to(tl.float64) * frequency64)


@triton.jit
def _kernel(
    slots,  # [B]
    frames,  # [S]
    prefix_keys,  # [L, H, P, D], contiguous
    keys,  # [S, L, H, P + size, D]
    frequency,  # [D / 2]
    frequency64,
    position,  # [B, Q]
    start,  # [B, 1]
    cos,  # [B, 1, Q, D]
    sin,
    slot_stride,
    layer_stride,
    head_stride,
    context_frames,
    heads: tl.constexpr,
    block_heads: tl.constexpr,
    half: tl.constexpr,
    prefix: tl.constexpr,
    books: tl.constexpr,
    float32_positions: tl.constexpr,
):
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    frame = tl.load(frames + slot)
    # As `context_window.window_start` and, below, `context_window.frame_positions`.
    opened = prefix + books * tl.maximum(frame + 1 - context_frames, 0)
    pair = tl.arange(0, half)
    head = tl.arange(0, block_heads)[:, None]
    single, double = tl.load(frequency + pair), tl.load(frequency64 + pair)
    held = (head < heads) & (pair >= 0)[None, :]
    for number in tl.static_range(prefix):
        angle = _angle(opened - prefix + number, single, double, float32_positions)
        c, s = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
        source = prefix_keys + ((layer * heads + head) * prefix + number) * (2 * half) + pair[None, :]
        low = tl.load(source, mask=held, other=0.0).to(tl.float32)
        high = tl.load(source + half, mask=held, other=0.0).to(tl.float32)
        to = keys + slot * slot_stride + layer * layer_stride + head * head_stride + number * (2 * half) + pair[None, :]
        tl.store(to, (low * c[None, :] - high * s[None, :]).to(keys.dtype.element_ty), mask=held)
        tl.store(to + half, (high * c[None, :] + low * s[None, :]).to(keys.dtype.element_ty), mask=held)
    if layer == 0:
        tl.store(start + row, opened)
        for book in tl.static_range(books):
            here = prefix - 1 + frame * books + book
            tl.store(position + row * books + book, here)
            turn = _angle(here, single, double, float32_positions)
            turn_cos, turn_sin = tl.cos(turn).to(tl.float32), tl.sin(turn).to(tl.float32)
            angles = (row * books + book) * (2 * half) + pair
            tl.store(cos + angles, turn_cos)
            tl.store(cos + angles + half, turn_cos)
            tl.store(sin + angles, turn_sin)
            tl.store(sin + angles + half, turn_sin)


@torch.library.custom_op("streaming::begin_frame", mutates_args=("keys",))
@on_its_device
def _begin_frame(
    slots: Tensor,
    frames: Tensor,
    prefix_keys: Tensor,
    keys: Tensor,
    frequency: Tensor,
    frequency64: Tensor,
    context_frames: int,
    books: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, heads, prefix, dim = prefix_keys.shape
    out = _empty(slots, books, dim)
    _kernel[(len(slots), layers)](
        slots,
        frames,
        prefix_keys,
        keys,
        frequency,
        frequency64,
        *out,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        context_frames,
        heads,
        triton.next_power_of_2(heads),
        dim // 2,
        prefix,
        books,
        FLOAT32_POSITIONS,
    )
    return out


@_begin_frame.register_fake
def _(
    slots: Tensor,
    frames: Tensor,
    prefix_keys: Tensor,
    keys: Tensor,
    frequency: Tensor,
    frequency64: Tensor,
    context_frames: int,
    books: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(slots, books, prefix_keys.shape[-1])


def _empty(slots: Tensor, books: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = slots.shape[0]
    angles = [slots.new_empty((batch, 1, books, dim), dtype=torch.float32) for _ in range(2)]
    return slots.new_empty((batch, books)), slots.new_empty((batch, 1)), angles[0], angles[1]


def begin_frame(
    slots: Tensor,
    frames: Tensor,
    prefix_keys: Tensor,
    keys: Tensor,
    rotary: Rotary,
    context_frames: int,
    books: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots: [B] int64; frames: [S] int64; prefix_keys: [L, H, P, D], not rotated; keys: [S, L, H, P + size, D], whose
    first P entries are written for these slots. Returns position [B, Q], start [B, 1], cos and sin [B, 1, Q, D].
    """
    return _begin_frame(slots, frames, prefix_keys, keys, rotary.frequency, rotary.frequency64, context_frames, books)
