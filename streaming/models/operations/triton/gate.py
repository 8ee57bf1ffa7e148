"""silu(gate) * up in one launch, rounded where PyTorch rounds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device

_BLOCK = 1024


@triton.jit
def _kernel(both, out, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    held = column < width
    gate = tl.load(both + row * 2 * width + column, mask=held, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + column, mask=held, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * width + column, (opened * up).to(kind), mask=held)


@torch.library.custom_op("streaming::gate", mutates_args=())
@on_its_device
def gate(both: Tensor) -> Tensor:
    """both: [B, T, 2 * I], the gate's half first. Returns [B, T, I]."""
    assert both.is_contiguous()
    out = _half(both)
    width = out.shape[-1]
    _kernel[(out.numel() // width, triton.cdiv(width, _BLOCK))](both, out, width, _BLOCK, num_warps=4)
    return out


@gate.register_fake
def _(both: Tensor) -> Tensor:
    return _half(both)


def _half(both: Tensor) -> Tensor:
    return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))
