"""Attention of a frame's tokens that reads the entries which a slot's window holds, and no others.

Which those are follows from the slot's position, so there is no mask, and nothing is read to be thrown away. The query
heads that share a key head are one tile: keys are read once. Where rows are few, a window is split over several
programs and a second launch joins their parts (flash-decoding, Dao et al. 2023). The parts are shares of what is held,
so all programs have work however short the stream is.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device

_PROGRAMS = 256
"""Enough to fill a GPU: an H100 has 132 multiprocessors, and two programs or more run on each."""
_MOST_SPLITS = 16
_BLOCK = 64
"""Entries that a program reads at once."""


@triton.jit
def _attend(
    query,  # [B, T, H * G, D], contiguous
    keys,  # [S, H, prefix + size, D]
    values,
    slots,  # [B]
    position,  # [B, T]
    start,  # [B, 1], or [B, T] where windows begin per query
    out,  # [B, T, H * G, D], if there is one split
    parts,  # [B, H, splits, T * G, D] float32, if there are more: sums of values by weight
    weights,  # [B, H, splits, T * G, 2] float32: the largest score, and the sum of weights
    slot_stride,
    head_stride,
    position_stride,
    start_stride,
    prefix,
    size,
    scale,  # of the scores, in powers of two
    time: tl.constexpr,
    heads: tl.constexpr,
    groups: tl.constexpr,
    rows: tl.constexpr,  # time * groups, as a tile
    dim: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    per_query: tl.constexpr,
):
    batch, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slots + batch)
    row = tl.arange(0, rows)
    used = row < time * groups
    column = tl.arange(0, dim)
    opened = tl.load(start + batch * start_stride)  # the oldest in any query's window
    here = tl.load(position + batch * position_stride + row // groups, mask=used, other=0)
    seen = (here - opened + 1).to(tl.int32)  # of the window, by each query: none if it stands before it
    total = prefix + tl.maximum(tl.max(tl.where(used, seen, 0), axis=0), 0)
    if per_query:
        skipped = (tl.load(start + batch * start_stride + row // groups, mask=used, other=0) - opened).to(tl.int32)
    oldest = ((opened - prefix) % size).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total, splits), block) * block
    first, last = split * share, tl.minimum(split * share + share, total)

    place = (batch * time + row // groups) * heads * groups + head * groups + row % groups
    place = place[:, None] * dim + column[None, :]
    q = tl.load(query + place, mask=used[:, None], other=0.0)
    keys += slot * slot_stride + head * head_stride
    values += slot * slot_stride + head * head_stride
    most = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    total_value = tl.zeros([rows, dim], tl.float32)
    for begin in range(first, last, block):
        number = begin + tl.arange(0, block)  # in the order of the stream: the prefix, then the window
        there = number < last
        turn = oldest + number - prefix
        entry = tl.where(number < prefix, number, prefix + tl.where(turn >= size, turn - size, turn))
        tile = entry[:, None] * dim + column[None, :]
        k = tl.load(keys + tile, mask=there[:, None], other=0.0)
        v = tl.load(values + tile, mask=there[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = (number[None, :] < prefix) | (number[None, :] - prefix < seen[:, None])
        if per_query:
            visible = visible & (number[None, :] - prefix >= skipped[:, None])
        score = tl.where(visible & there[None, :], score, float("-inf"))
        now = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        chance = tl.exp2(score - base[:, None])
        fade = tl.exp2(most - base)
        weight = weight * fade + tl.sum(chance, axis=1)
        total_value = total_value * fade[:, None] + tl.dot(chance.to(v.dtype), v, input_precision="ieee")
        most = now
    if splits == 1:
        tl.store(out + place, (total_value / weight[:, None]).to(out.dtype.element_ty), mask=used[:, None])
    else:
        part = ((batch * heads + head) * splits + split) * (time * groups) + row
        tl.store(weights + part * 2, most, mask=used)
        tl.store(weights + part * 2 + 1, weight, mask=used)
        if first < last:
            tl.store(parts + part[:, None] * dim + column[None, :], total_value, mask=used[:, None])


@triton.jit
def _join(
    parts,
    weights,
    out,
    time: tl.constexpr,
    heads: tl.constexpr,
    groups: tl.constexpr,
    dim: tl.constexpr,
    splits: tl.constexpr,
):
    batch, head, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, dim)
    part = ((batch * heads + head) * splits + tl.arange(0, splits)) * (time * groups) + row
    most = tl.load(weights + part * 2)
    factor = tl.exp2(most - tl.max(most, axis=0))  # 0 for a part that had nothing to read, and wrote nothing
    weight = tl.sum(factor * tl.load(weights + part * 2 + 1), axis=0)
    read = (most > float("-inf"))[:, None] & (column >= 0)[None, :]
    value = tl.load(parts + part[:, None] * dim + column[None, :], mask=read, other=0.0)
    value = tl.sum(factor[:, None] * value, axis=0) / weight
    place = (batch * time + row // groups) * heads * groups + head * groups + row % groups
    tl.store(out + place * dim + column, value.to(out.dtype.element_ty))


def splits_for(batch: int, heads: int, entries: int) -> int:
    """Over how many programs a row's window is split, a power of two: until the GPU is full, or nothing is left."""
    splits = 1
    while 2 * splits * batch * heads <= _PROGRAMS and splits < min(_MOST_SPLITS, -(-entries // _BLOCK)):
        splits *= 2
    return splits


@torch.library.custom_op("streaming::decode_attention", mutates_args=())
@on_its_device
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    position: Tensor,
    start: Tensor,
    prefix: int,
    splits: int,
) -> Tensor:
    """query: [B, T, H * G, D], rotated; keys, values: one layer's, [S, H, prefix + size, D]; slots: [B]; position: [B,
    T], ascending and written; start: the oldest position of the window, the prefix aside: [B, 1], or, without a prefix,
    [B, T]. Returns [B, T, H * G, D].

    One launch, or two if `splits` (`splits_for`) is more than 1.
    """
    batch, time, query_heads, dim = query.shape
    _, heads, entries, _ = keys.shape
    groups = query_heads // heads
    assert start.shape[1] == 1 or (prefix == 0 and start.shape == position.shape and start.stride(1) == 1)
    assert query.is_contiguous() and keys.stride() == values.stride() and keys.stride()[2:] == (dim, 1)
    out = torch.empty_like(query)
    parts = weights = out
    if splits > 1:
        parts = query.new_empty((batch, heads, splits, time * groups, dim), dtype=torch.float32)
        weights = query.new_empty((batch, heads, splits, time * groups, 2), dtype=torch.float32)
    _attend[(batch, heads, splits)](
        query,
        keys,
        values,
        slots,
        position,
        start,
        out,
        parts,
        weights,
        keys.stride(0),
        keys.stride(1),
        position.stride(0),
        start.stride(0),
        prefix,
        entries - prefix,
        math.log2(math.e) / math.sqrt(dim),
        time,
        heads,
        groups,
        max(16, triton.next_power_of_2(time * groups)),  # the least that tensor cores take
        dim,
        _BLOCK,
        splits,
        start.shape[1] > 1,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _join[(batch, heads, time * groups)](parts, weights, out, time, heads, groups, dim, splits, num_warps=1)
    return out


@decode_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    position: Tensor,
    start: Tensor,
    prefix: int,
    splits: int,
) -> Tensor:
    return torch.empty_like(query)
