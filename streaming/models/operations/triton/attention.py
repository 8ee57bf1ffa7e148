"""Attention of a frame's tokens in one launch: heads turned, keys and values kept, and all that is seen read.

Which entries of a ring a window holds follows from the slot's position, so there is no mask, and nothing is read to be
thrown away. The query heads that share a key head are one tile: keys are read once. Where rows are few, a window is
split over several programs (flash-decoding, Dao et al. 2023): each takes a share of what is held, so all have work
however short the stream is, and whichever comes last joins their parts, always in the same order.

This frame's own tokens are not read back from the ring: the last share takes them from the projection, and writes them.
The entries that it overwrites have left every window, so no other program reads them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streaming.models.operations.triton.device import follows_early, on_its_device

PROGRAMS = 256
"""Enough to fill a GPU: an H100 has 132 multiprocessors, and two programs or more run on each."""
_MOST_SPLITS = 16
BLOCK = 64
"""Entries that a program reads at once."""
WARPS = 4


@triton.jit
def _turned(source, cos, sin, place, angle, held, column, half: tl.constexpr):
    """Return heads [N, D], turned in float32 and rounded as they were. place, angle: [N, 1], where each begins."""
    here = tl.load(source + place + column, mask=held, other=0.0)
    other = tl.load(source + place + (column + half) % (2 * half), mask=held, other=0.0).to(tl.float32)
    c = tl.load(cos + angle + column, mask=held, other=0.0)
    s = tl.load(sin + angle + column, mask=held, other=0.0)
    return (here.to(tl.float32) * c + tl.where(column < half, -other, other) * s).to(here.dtype)


@triton.jit
def _look(query, k, v, visible, scale, most, weight, total):
    """One step of a running softmax: more keys and values [N, D], of which each query [R, D] sees some."""
    score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    score = tl.where(visible, score, float("-inf"))
    now = tl.maximum(most, tl.max(score, axis=1))
    base = tl.where(now == float("-inf"), 0.0, now)
    chance = tl.exp2(score - base[:, None])
    fade = tl.exp2(most - base)
    total = total * fade[:, None] + tl.dot(chance.to(v.dtype), v, input_precision="ieee")
    return now, weight * fade + tl.sum(chance, axis=1), total


@triton.jit
def _kernel(
    qkv,  # [B, T, (H * G + 2 * H) * D], contiguous
    cos,  # [B, 1, T, D], float32
    sin,
    keys,  # [S, H, prefix + size, D]
    values,
    slots,  # [B]
    position,  # [B, T]
    start,  # [B, 1], or [B, T] where windows begin per query
    out,  # [B, T, H * G, D]
    parts,  # [B, H, splits, T * G, D] float32: sums of values by weight
    weights,  # [B, H, splits, T * G, 2] float32: the largest score, and the sum of weights
    arrived,  # [B * H] int32, zeros before and after
    slot_stride,
    head_stride,
    cos_stride,
    position_stride,
    start_stride,
    prefix,
    size,
    scale,  # of the scores, in powers of two
    time: tl.constexpr,
    heads: tl.constexpr,
    groups: tl.constexpr,
    rows: tl.constexpr,  # time * groups, as a tile
    new: tl.constexpr,  # time, as a tile
    half: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    per_query: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        gdc_launch_dependents()
        gdc_wait()
    batch, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dim: tl.constexpr = 2 * half
    kind = keys.dtype.element_ty
    slot = tl.load(slots + batch)
    row, column = tl.arange(0, rows), tl.arange(0, dim)[None, :]
    used = row < time * groups
    token = batch * time + row // groups
    query_head = head * groups + row % groups
    opened = tl.load(start + batch * start_stride)  # the oldest in any query's window
    held = tl.load(position + batch * position_stride) - opened  # of the window before this frame
    total_old = prefix + tl.maximum(held, 0).to(tl.int32)
    first_seen = tl.zeros([rows], tl.int32)  # in each query's window
    if per_query:
        first_seen += (tl.load(start + batch * start_stride + row // groups, mask=used, other=0) - opened).to(tl.int32)
    oldest = ((opened - prefix) % size).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total_old, splits), block) * block
    first, last = split * share, tl.minimum(split * share + share, total_old)

    wide: tl.constexpr = (heads * groups + 2 * heads) * dim
    turn = (batch * cos_stride + row // groups * dim)[:, None]
    place = (token * wide + query_head * dim)[:, None]
    query = _turned(qkv, cos, sin, place, turn, used[:, None] & (column >= 0), column, half)
    keys += slot * slot_stride + head * head_stride
    values += slot * slot_stride + head * head_stride
    most = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    total = tl.zeros([rows, dim], tl.float32)
    for begin in range(first, last, block):
        number = begin + tl.arange(0, block)  # in the order of the stream: the prefix, then the window
        there = number < last
        after = oldest + number - prefix
        entry = tl.where(number < prefix, number, prefix + tl.where(after >= size, after - size, after))
        tile = entry[:, None] * dim + column
        k = tl.load(keys + tile, mask=there[:, None], other=0.0)
        v = tl.load(values + tile, mask=there[:, None], other=0.0)
        visible = there[None, :] & used[:, None]
        if per_query:
            visible = visible & (number[None, :] - prefix >= first_seen[:, None])
        most, weight, total = _look(query, k, v, visible, scale, most, weight, total)
    if split == splits - 1:  # this frame's tokens, each seen by itself and by those after it
        fresh = tl.arange(0, new)
        given = fresh < time
        here = tl.load(position + batch * position_stride + fresh, mask=given, other=0)
        place = ((batch * time + fresh) * wide + (heads * groups + head) * dim)[:, None]
        turn = (batch * cos_stride + fresh * dim)[:, None]
        taken = given[:, None] & (column >= 0)
        k = _turned(qkv, cos, sin, place, turn, taken, column, half)
        v = tl.load(qkv + place + heads * dim + column, mask=taken, other=0.0)
        entry = prefix + ((here - prefix + size) % size)  # before its first frame a stream is at prefix - 1
        tile = entry[:, None] * dim + column
        tl.store(keys + tile, k.to(kind), mask=taken)
        tl.store(values + tile, v.to(kind), mask=taken)
        visible = given[None, :] & used[:, None] & (fresh[None, :] <= (row // groups)[:, None])
        visible = visible & ((here - opened)[None, :] >= first_seen[:, None])
        most, weight, total = _look(query, k, v, visible, scale, most, weight, total)
    target = ((token * heads * groups + query_head) * dim)[:, None] + column
    if splits == 1:
        tl.store(out + target, (total / weight[:, None]).to(out.dtype.element_ty), mask=used[:, None])
    else:
        mine = (batch * heads + head) * splits * (time * groups) + row
        part = mine + split * (time * groups)
        tl.store(weights + part * 2, most, mask=used)
        tl.store(weights + part * 2 + 1, weight, mask=used)
        tl.store(parts + part[:, None] * dim + column, total, mask=used[:, None])
        tl.debug_barrier()  # all of this program's writes, before it says that it was here
        before = tl.atomic_add(arrived + batch * heads + head, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:
            largest = tl.full([rows], float("-inf"), tl.float32)
            for other in range(splits):
                part = mine + other * (time * groups)
                largest = tl.maximum(largest, tl.load(weights + part * 2, mask=used, other=0.0, cache_modifier=".cg"))
            weight = tl.zeros([rows], tl.float32)
            total = tl.zeros([rows, dim], tl.float32)
            for other in range(splits):
                part = mine + other * (time * groups)
                reached = tl.load(weights + part * 2, mask=used, other=0.0, cache_modifier=".cg")
                factor = tl.exp2(reached - largest)  # 0 for a part that had nothing to read
                weight += factor * tl.load(weights + part * 2 + 1, mask=used, other=0.0, cache_modifier=".cg")
                tile = part[:, None] * dim + column
                total += factor[:, None] * tl.load(parts + tile, mask=used[:, None], other=0.0, cache_modifier=".cg")
            tl.store(out + target, (total / weight[:, None]).to(out.dtype.element_ty), mask=used[:, None])
            tl.store(arrived + batch * heads + head, 0)


def splits_for(batch: int, heads: int, entries: int) -> int:
    """Over how many programs a row's window is split, a power of two: until the GPU is full, or nothing is left."""
    splits = 1
    while 2 * splits * batch * heads <= PROGRAMS and splits < min(_MOST_SPLITS, -(-entries // BLOCK)):
        splits *= 2
    return splits


def counters(device: torch.device) -> Tensor:
    """Return what `attend` counts its programs with, for every launch in line: zeros, and zeros again after each."""
    return torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


@torch.library.custom_op("streaming::attend", mutates_args=("keys", "values", "arrived"))
@on_its_device
def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    position: Tensor,
    start: Tensor,
    arrived: Tensor,
    prefix: int,
    splits: int,
) -> Tensor:
    """qkv: [B, T, (H * G + 2 * H) * D], not rotated; cos, sin: [B, 1, T, D]; keys, values: one layer's, [S, H, prefix +
    size, D], to which these tokens' are added; slots: [B]; position: [B, T], ascending; start: the oldest position of
    the window, the prefix aside: [B, 1], or, without a prefix, [B, T]; arrived: `counters`; splits: `splits_for`.
    Returns [B, T, H * G * D].
    """
    batch, time, wide = qkv.shape
    _, heads, entries, dim = keys.shape
    groups = wide // dim // heads - 2
    assert start.shape[1] == 1 or (prefix == 0 and start.shape == position.shape and start.stride(1) == 1)
    assert position.stride(1) == 1 and cos.stride() == sin.stride() and cos.stride()[2:] == (dim, 1)
    assert qkv.is_contiguous() and keys.stride() == values.stride() and keys.stride()[2:] == (dim, 1)
    assert splits == 1 or batch * heads <= len(arrived)
    out = _attended(qkv, heads, dim)
    parts = weights = out
    if splits > 1:
        parts = qkv.new_empty((batch, heads, splits, time * groups, dim), dtype=torch.float32)
        weights = qkv.new_empty((batch, heads, splits, time * groups, 2), dtype=torch.float32)
    early = follows_early(qkv)
    _kernel[(batch, heads, splits)](
        qkv,
        cos,
        sin,
        keys,
        values,
        slots,
        position,
        start,
        out,
        parts,
        weights,
        arrived,
        keys.stride(0),
        keys.stride(1),
        cos.stride(0),
        position.stride(0),
        start.stride(0),
        prefix,
        entries - prefix,
        math.log2(math.e) / math.sqrt(dim),
        time,
        heads,
        groups,
        max(16, triton.next_power_of_2(time * groups)),  # the least that tensor cores take
        max(16, triton.next_power_of_2(time)),
        dim // 2,
        BLOCK,
        splits,
        start.shape[1] > 1,
        early,
        num_warps=WARPS,
        num_stages=2,
        launch_pdl=early,
    )
    return out


@attend.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    position: Tensor,
    start: Tensor,
    arrived: Tensor,
    prefix: int,
    splits: int,
) -> Tensor:
    return _attended(qkv, keys.shape[1], keys.shape[3])


def _attended(qkv: Tensor, heads: int, dim: int) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] - 2 * heads * dim))
