"""A convolution as a product that reads its windows where they lie, for many rows: nothing is unfolded first.

It is a product of matrices, too (a window of one step), with weights of 8 bits if need be: what a library has no good
kernel for. float32 is multiplied on tensor cores as three products of its halves (`tf32x3`), which keeps some 21 of 24
bits: the codec's codes are chosen by it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device

LEAST_ROWS = 64
"""Sessions from which it is worth it: below, a window's copy is small, and a library splits a product better."""
LEAST_TILES = 2 * 132
"""Programs that fill an H100."""
BLOCK_OUT, BLOCK_IN, WARPS, STAGES = 64, 32, 8, 3
_MOST_BLOCK_ROWS = 128


@triton.jit
def _kernel(
    x,  # [B, T, channels]
    weight,  # [count, inner]
    scale,  # [count], if the weights are of 8 bits
    bias,  # [count], if there is any
    out,  # [B, windows, count]
    rows,  # B * windows
    count,
    windows,
    batch_stride,
    window_stride,
    step_stride,
    channels: tl.constexpr,
    inner: tl.constexpr,  # steps of a window * channels
    dense: tl.constexpr,  # whether a window's steps follow each other without a gap
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    biased: tl.constexpr,
    scaled: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    number = tl.program_id(1) * block_out + tl.arange(0, block_out)
    taken, wanted = row < rows, number < count
    begin = (row // windows).to(tl.int64) * batch_stride + (row % windows) * window_stride
    total = tl.zeros([block_rows, block_out], tl.float32)
    for first in range(0, inner, block_in):
        at = first + tl.arange(0, block_in)
        inside = at < inner
        offset = at
        if not dense:
            offset = at // channels * step_stride + at % channels
        given = tl.load(x + begin[:, None] + offset[None, :], mask=taken[:, None] & inside[None, :], other=0.0)
        part = tl.load(
            weight + number[None, :] * inner + at[:, None], mask=inside[:, None] & wanted[None, :], other=0.0
        )
        if scaled:
            part = part.to(tl.float32).to(given.dtype)  # exactly; from 8 bits at once, not every Triton does it
        total = tl.dot(given, part, total, input_precision="tf32x3")
    if scaled:
        total *= tl.load(scale + number, mask=wanted, other=0.0).to(tl.float32)[None, :]
    if biased:
        total += tl.load(bias + number, mask=wanted, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * count + number[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=taken[:, None] & wanted[None, :])


def fills_a_gpu(rows: int, count: int) -> bool:
    """Return whether so many windows and outputs make enough programs."""
    return triton.cdiv(rows, _MOST_BLOCK_ROWS) * triton.cdiv(count, BLOCK_OUT) >= LEAST_TILES


@torch.library.custom_op("streaming::windows", mutates_args=())
@on_its_device
def windows(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, kernel: int, stride: int, dilation: int
) -> Tensor:
    """x: [B, T, C]; weight: [N, kernel * C], of x's type, or int8 with a scale [N]; bias: [N]. A window is `kernel`
    steps, `dilation` steps apart, and one begins every `stride` steps. Returns [B, windows, N].
    """
    assert x.is_contiguous() and weight.is_contiguous() and (weight.dtype == torch.int8) == (scale is not None)
    batch, time, channels = x.shape
    out = _out(x, weight, kernel, stride, dilation)
    each, count = out.shape[1:]
    block_rows = min(_MOST_BLOCK_ROWS, max(16, triton.next_power_of_2(batch * each)))
    block_out = min(BLOCK_OUT, max(16, triton.next_power_of_2(count)))
    _kernel[(triton.cdiv(batch * each, block_rows), triton.cdiv(count, block_out))](
        x,
        weight,
        x if scale is None else scale,
        x if bias is None else bias,
        out,
        batch * each,
        count,
        each,
        time * channels,
        stride * channels,
        dilation * channels,
        channels,
        kernel * channels,
        dilation == 1 or kernel == 1,
        block_rows,
        block_out,
        BLOCK_IN,
        bias is not None,
        scale is not None,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


@windows.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, kernel: int, stride: int, dilation: int
) -> Tensor:
    return _out(x, weight, kernel, stride, dilation)


def _out(x: Tensor, weight: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    batch, time, _ = x.shape
    return x.new_empty((batch, (time - (kernel - 1) * dilation - 1) // stride + 1, weight.shape[0]))
