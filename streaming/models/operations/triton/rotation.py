"""One launch between the projection and attention: queries and keys turned, keys and values written into the ring."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device


@triton.jit
def _kernel(
    qkv,  # [B, T, (H * G + 2 * H) * D], contiguous
    cos,  # [B, 1, T, D], float32
    sin,
    slots,  # [B]
    position,  # [B, T]
    query,  # [B, T, H * G, D], contiguous
    keys,  # [S, H, prefix + size, D]
    values,
    slot_stride,
    head_stride,
    cos_stride,
    position_stride,
    prefix,
    size,
    time: tl.constexpr,
    heads: tl.constexpr,
    groups: tl.constexpr,
    block_groups: tl.constexpr,
    half: tl.constexpr,
):
    batch, t = (tl.program_id(0) // time).to(tl.int64), tl.program_id(0) % time
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dim: tl.constexpr = 2 * half
    pair = tl.arange(0, half)
    angles = batch * cos_stride + t * dim + pair
    c, s = tl.load(cos + angles), tl.load(sin + angles)
    row = qkv + token * (groups + 2) * heads * dim
    group = tl.arange(0, block_groups)[:, None]
    held = (group < groups) & (pair >= 0)[None, :]
    source = (head * groups + group) * dim + pair[None, :]
    low = tl.load(row + source, mask=held, other=0.0).to(tl.float32)
    high = tl.load(row + source + half, mask=held, other=0.0).to(tl.float32)
    to = query + token * groups * heads * dim + source
    kind = query.dtype.element_ty
    tl.store(to, (low * c[None, :] - high * s[None, :]).to(kind), mask=held)
    tl.store(to + half, (high * c[None, :] + low * s[None, :]).to(kind), mask=held)
    here = tl.load(position + batch * position_stride + t) - prefix
    entry = prefix + (here + size) % size  # `here` may be -1: see `KeyValueRing.index`
    place = tl.load(slots + batch) * slot_stride + head * head_stride + entry * dim + pair
    source = row + (heads * groups + head) * dim + pair
    low, high = tl.load(source).to(tl.float32), tl.load(source + half).to(tl.float32)
    tl.store(keys + place, (low * c - high * s).to(kind))
    tl.store(keys + place + half, (high * c + low * s).to(kind))
    source += heads * dim
    tl.store(values + place, tl.load(source))
    tl.store(values + place + half, tl.load(source + half))


@torch.library.custom_op("streaming::rotate_and_keep", mutates_args=("keys", "values"))
@on_its_device
def rotate_and_keep(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, position: Tensor, keys: Tensor, values: Tensor, prefix: int
) -> Tensor:
    """qkv: [B, T, (H * G + 2 * H) * D]; cos, sin: [B, 1, T, D]; slots: [B]; position: [B, T]; keys, values: one
    layer's, [S, H, prefix + size, D], written in place. Returns the queries, [B, T, H * G, D].
    """
    batch, time, _ = qkv.shape
    _, heads, entries, dim = keys.shape
    query = _queries(qkv, keys)
    groups = query.shape[2] // heads
    assert qkv.is_contiguous() and cos.stride() == sin.stride() and keys.stride() == values.stride()
    _kernel[(batch * time, heads)](
        qkv,
        cos,
        sin,
        slots,
        position,
        query,
        keys,
        values,
        keys.stride(0),
        keys.stride(1),
        cos.stride(0),
        position.stride(0),
        prefix,
        entries - prefix,
        time,
        heads,
        groups,
        triton.next_power_of_2(groups),
        dim // 2,
        num_warps=1,
    )
    return query


@rotate_and_keep.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, position: Tensor, keys: Tensor, values: Tensor, prefix: int
) -> Tensor:
    return _queries(qkv, keys)


def _queries(qkv: Tensor, keys: Tensor) -> Tensor:
    heads, dim = keys.shape[1], keys.shape[3]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // dim - 2 * heads, dim))
