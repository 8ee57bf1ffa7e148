"""Join what a convolution reads, in one launch: its context, the ELU of what is new, zeros past a stream's end."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device

_BLOCK = 1024


@triton.jit
def _kernel(
    context,
    x,
    lengths,
    out,
    context_stride,
    old,
    new,
    channels,
    hop,
    activate: tl.constexpr,
    ends: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    before = column < old
    kept = tl.load(context + row * context_stride + column, mask=before, other=0.0)
    held = new
    if ends:
        held = tl.minimum(new, tl.cdiv(tl.load(lengths + row), hop) * channels)
    value = tl.load(x + row * new + column - old, mask=(column >= old) & (column < old + held), other=0.0)
    if activate:
        wide = value.to(tl.float32)
        value = tl.where(wide > 0, wide, tl.exp(wide) - 1.0).to(value.dtype)
    tl.store(out + row * (old + new) + column, tl.where(before, kept, value), mask=column < old + new)


@torch.library.custom_op("streaming::extend", mutates_args=())
@on_its_device
def extend(context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
    """context: [B, C, N], a row in one piece; x: [B, T, N]. Returns [B, C + T, N], x by its ELU if `activate`, with
    zeros from step lengths / hop on. lengths: [B] int64, in one piece.
    """
    x = x.contiguous()
    assert lengths is None or (lengths.shape == x.shape[:1] and lengths.is_contiguous())
    assert not context.numel() or context.stride()[1:] == (context.shape[2], 1)
    out = _together(context, x)
    old, new = (part.shape[1] * part.shape[2] for part in (context, x))
    grid = (len(x), triton.cdiv(old + new, _BLOCK))
    _kernel[grid](
        context,
        x,
        lengths,
        out,
        context.stride(0),
        old,
        new,
        x.shape[2],
        hop,
        activate,
        lengths is not None,
        _BLOCK,
        num_warps=4,
    )
    return out


@extend.register_fake
def _(context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
    return _together(context, x)


def _together(context: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], context.shape[1] + x.shape[1], x.shape[2]))
