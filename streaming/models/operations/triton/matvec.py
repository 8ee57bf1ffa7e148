"""A product with few rows, and the norm before it and the gate after it, in one launch: for 1 to 4 tokens at once.

Such a product is a walk through the weights, and a GPU reads at its full rate if enough is asked for at once. So each
program takes some of the weights' rows whole, 32 KB of them, asks for all of it at once, and only then waits for the
kernel that writes its tokens: on Hopper its weights are on their way while that one still runs. It norms the tokens for
itself rather than wait for a launch that does. Sums are in float32; all else is rounded where the reference rounds.

Weights may be of 8 bits, with a scale for each output, which is applied to the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from streaming.models.operations.triton.device import follows_early, on_its_device

MOST_ROWS = 4
TILE = 16 * 1024
"""Weights of a program. In bfloat16 they are 32 KB: a multiprocessor holds four such programs, and 20 KB on their way
fill its share of an H100's memory. Twice as many would not fit the registers.
"""
WARPS = 4


@triton.jit
def _kernel(
    x,  # [rows, width]
    added,
    norm,  # [width]
    weight,  # [count, width], or [2 * count, width] if it is gated
    scale,  # [count], or [2 * count], if the weights are of 8 bits
    total,  # [rows, width]
    out,  # [rows, count]
    count,
    eps,
    rows: tl.constexpr,
    width: tl.constexpr,
    block_out: tl.constexpr,
    block_width: tl.constexpr,
    adds: tl.constexpr,
    norms: tl.constexpr,
    gated: tl.constexpr,
    scaled: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        gdc_launch_dependents()
    number = tl.program_id(0) * block_out + tl.arange(0, block_out)
    column = tl.arange(0, block_width)
    wanted, inside = number < count, column < width
    tile = number.to(tl.int64)[:, None] * width + column[None, :]
    held = wanted[:, None] & inside[None, :]
    part = tl.load(weight + tile, mask=held, other=0.0, eviction_policy="evict_first")
    if gated:
        other = tl.load(weight + count * width + tile, mask=held, other=0.0, eviction_policy="evict_first")
    kind = out.dtype.element_ty
    if norms:
        factor = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    if early:
        gdc_wait()
    for row in tl.static_range(rows):
        token = tl.load(x + row * width + column, mask=inside, other=0.0)
        if adds:
            wide = token.to(tl.float32) + tl.load(added + row * width + column, mask=inside, other=0.0).to(tl.float32)
            token = wide.to(token.dtype)
            tl.store(total + row * width + column, token, mask=inside & (tl.program_id(0) == 0))
        if norms:
            wide = token.to(tl.float32)
            wide = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)).to(kind).to(tl.float32)
            token = (wide * factor).to(kind)
        spread = token.to(tl.float32)[None, :]
        result = tl.sum(part.to(tl.float32) * spread, axis=1)
        if scaled:
            result *= tl.load(scale + number, mask=wanted, other=0.0).to(tl.float32)
        result = result.to(kind)
        if gated:
            gate, up = result.to(tl.float32), tl.sum(other.to(tl.float32) * spread, axis=1)
            if scaled:
                up *= tl.load(scale + count + number, mask=wanted, other=0.0).to(tl.float32)
            opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
            result = (opened * up.to(kind).to(tl.float32)).to(kind)
        tl.store(out + row * count + number, result, mask=wanted)


def outputs_of_a_program(width: int, itemsize: int, gated: bool) -> int:
    """Return how many outputs a program computes: as many as make a `TILE`, a power of two. itemsize: of a weight."""
    row = triton.next_power_of_2(width) * (1 + gated) * max(1, itemsize // 2)
    return max(1, TILE // row)


@torch.library.custom_op("streaming::matvec", mutates_args=())
@on_its_device
def matvec(
    x: Tensor,
    added: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """x, added: [B, T, width], at most `MOST_ROWS` tokens; norm: [width]; weight: [N, width], of x's type, or int8 with
    a scale [N]. `added` takes a `norm`.

    Returns x + added (empty without), and that normed if there is a norm, multiplied, and gated if wanted: [B, T, N],
    or [B, T, N / 2].
    """
    assert x.is_contiguous() and weight.is_contiguous() and (weight.dtype == torch.int8) == (scale is not None)
    assert added is None or (added.is_contiguous() and norm is not None)
    total, out = _results(x, added, weight, gated)
    width, count = x.shape[-1], out.shape[-1]
    rows = x.numel() // width
    assert rows <= MOST_ROWS
    block_out = outputs_of_a_program(width, weight.itemsize, gated)
    early = follows_early(x)
    _kernel[(triton.cdiv(count, block_out),)](
        x,
        x if added is None else added,
        x if norm is None else norm,
        weight,
        x if scale is None else scale,
        total,
        out,
        count,
        eps,
        rows,
        width,
        block_out,
        triton.next_power_of_2(width),
        added is not None,
        norm is not None,
        gated,
        scale is not None,
        early,
        num_warps=WARPS,
        launch_pdl=early,
    )
    return total, out


@matvec.register_fake
def _(
    x: Tensor,
    added: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    return _results(x, added, weight, gated)


def _results(x: Tensor, added: Tensor | None, weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if added is None else torch.empty_like(x)
    return total, x.new_empty((*x.shape[:-1], weight.shape[0] // (1 + gated)))
