"""A residual added and the sum normed, in one launch: `LlamaRMSNorm`, in float32 inside, rounded where that rounds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device


@triton.jit
def _kernel(x, added, weight, total, out, eps, width: tl.constexpr, block: tl.constexpr, adds: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, block)
    held = column < width
    kind = out.dtype.element_ty
    wide = tl.load(x + row + column, mask=held, other=0.0).to(tl.float32)
    if adds:
        summed = (wide + tl.load(added + row + column, mask=held, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + row + column, summed, mask=held)
        wide = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * scale).to(kind).to(tl.float32)
    factor = tl.load(weight + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row + column, (normed * factor).to(kind), mask=held)


def _launch(x: Tensor, added: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, adds: bool) -> None:
    width = x.shape[-1]
    assert x.is_contiguous() and added.is_contiguous()
    block = triton.next_power_of_2(width)
    warps = min(8, max(1, block // 512))
    _kernel[(x.numel() // width,)](x, added, weight, total, out, eps, width, block, adds, num_warps=warps)


@torch.library.custom_op("streaming::add_norm", mutates_args=())
@on_its_device
def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, added: [B, T, hidden]. Returns x + added, and that normed."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, added, weight, total, out, eps, adds=True)
    return total, out


@add_norm.register_fake
def _(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("streaming::norm", mutates_args=())
@on_its_device
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [B, T, hidden], normed."""
    out = torch.empty_like(x)
    _launch(x, x, weight, x, out, eps, adds=False)
    return out


@norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)
