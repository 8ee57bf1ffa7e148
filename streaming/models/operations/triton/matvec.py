"""A product with few rows, and the norm before it and the gate after it, in one launch: for 1 to 4 tokens at once.

Such a product is a walk through the weights: each program takes some of their rows, once, and norms the token for
itself rather than wait for a launch that does. Sums are in float32; all else is rounded where the reference rounds.
Whether it beats a library's product and two launches is for a measurement on the GPU at hand to say:
`TritonOperations(matvec_rows=4)`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device

MOST_ROWS = 4
_BLOCK_OUT, _BLOCK_IN = 8, 512


@triton.jit
def _residual(x, added, place, held, adds: tl.constexpr):
    total = tl.load(x + place, mask=held, other=0.0)
    if adds:
        wide = total.to(tl.float32) + tl.load(added + place, mask=held, other=0.0).to(tl.float32)
        total = wide.to(total.dtype)
    return total


@triton.jit
def _kernel(
    x,  # [rows, width]
    added,
    norm,  # [width]
    weight,  # [count, width], or [2 * count, width] if it is gated
    total,  # [rows, width]
    out,  # [rows, count]
    rows,
    count,
    eps,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    block_width: tl.constexpr,
    adds: tl.constexpr,
    norms: tl.constexpr,
    gated: tl.constexpr,
):
    row = tl.arange(0, block_rows)
    number = tl.program_id(0) * block_out + tl.arange(0, block_out)
    wanted = number < count
    kind = out.dtype.element_ty
    scale = tl.zeros([block_rows], tl.float32)
    if norms:
        column = tl.arange(0, block_width)
        held = (row < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        whole = _residual(x, added, place, held, adds)
        if adds:
            tl.store(total + place, whole, mask=held & (tl.program_id(0) == 0))
        scale = tl.rsqrt(tl.sum(whole.to(tl.float32) * whole.to(tl.float32), axis=1) / width + eps)
    products = tl.zeros([block_rows, block_out, block_in], tl.float32)
    others = tl.zeros([block_rows, block_out, block_in], tl.float32)
    for first in range(0, width, block_in):
        at = first + tl.arange(0, block_in)
        inside = at < width
        token_held = (row < rows)[:, None] & inside[None, :]
        token = _residual(x, added, row[:, None] * width + at[None, :], token_held, adds)
        if norms:
            normed = (token.to(tl.float32) * scale[:, None]).to(kind).to(tl.float32)
            factor = tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
            token = (normed * factor[None, :]).to(kind)
        spread = token.to(tl.float32)[:, None, :]
        tile = number.to(tl.int64)[:, None] * width + at[None, :]
        tile_held = wanted[:, None] & inside[None, :]
        part = tl.load(weight + tile, mask=tile_held, other=0.0, eviction_policy="evict_first").to(tl.float32)
        products += part[None, :, :] * spread
        if gated:
            other = weight + count * width + tile
            part = tl.load(other, mask=tile_held, other=0.0, eviction_policy="evict_first").to(tl.float32)
            others += part[None, :, :] * spread
    result = tl.sum(products, axis=2).to(kind)
    if gated:
        gate = result.to(tl.float32)
        opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        result = (opened * tl.sum(others, axis=2).to(kind).to(tl.float32)).to(kind)
    place = row[:, None] * count + number[None, :]
    tl.store(out + place, result, mask=(row < rows)[:, None] & wanted[None, :])


@torch.library.custom_op("streaming::matvec", mutates_args=())
@on_its_device
def matvec(
    x: Tensor, added: Tensor | None, norm: Tensor | None, weight: Tensor, eps: float, gated: bool
) -> tuple[Tensor, Tensor]:
    """x, added: [B, T, width], at most `MOST_ROWS` tokens; norm: [width]; weight: [N, width]. `added` takes a `norm`.

    Returns x + added (empty without), and that normed if there is a norm, multiplied, and gated if wanted: [B, T, N],
    or [B, T, N / 2].
    """
    assert x.is_contiguous() and weight.is_contiguous()
    assert added is None or (added.is_contiguous() and norm is not None)
    total, out = _results(x, added, weight, gated)
    width, count = x.shape[-1], out.shape[-1]
    rows = x.numel() // width
    assert rows <= MOST_ROWS
    _kernel[(triton.cdiv(count, _BLOCK_OUT),)](
        x,
        x if added is None else added,
        x if norm is None else norm,
        weight,
        total,
        out,
        rows,
        count,
        eps,
        width,
        triton.next_power_of_2(rows),
        _BLOCK_OUT,
        _BLOCK_IN,
        triton.next_power_of_2(width),
        added is not None,
        norm is not None,
        gated,
        num_warps=8 if rows > 1 else 4,
        num_stages=3,
    )
    return total, out


@matvec.register_fake
def _(
    x: Tensor, added: Tensor | None, norm: Tensor | None, weight: Tensor, eps: float, gated: bool
) -> tuple[Tensor, Tensor]:
    return _results(x, added, weight, gated)


def _results(x: Tensor, added: Tensor | None, weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if added is None else torch.empty_like(x)
    return total, x.new_empty((*x.shape[:-1], weight.shape[0] // (1 + gated)))
