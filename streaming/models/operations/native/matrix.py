"""Matrices packed for `products.h`, in four kinds of weights. Activations are float32 whatever the weights are.

A row's result depends on that row alone, to the last bit.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.models.huge_pages import on_huge_pages
from streaming.models.operations.native.library import library

Activation = Literal["none", "gelu", "gated"]

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_ACTIVATIONS: dict[Activation, int] = {"none": 0, "gelu": 1, "gated": 2}


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "inputs", "outputs", "group")),
        *((name, c_void_p) for name in ("weight", "scales", "bias")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("x", c_void_p), *((name, c_int64) for name in ("batch", "rows", "batch_stride", "row_stride")))


class _After(ctypes.Structure):
    _fields_ = (
        ("activation", c_int64),
        *((name, c_void_p) for name in ("scale", "residual")),
        *((name, c_int64) for name in ("elu", "gap")),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor, or null for None. The caller has checked its type and size."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class NativeLinear:
    """x: [..., inputs] to [..., outputs], in x's dtype."""

    def __init__(
        self,
        kind: int,
        shape: tuple[int, int],
        weight: Tensor,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        group: int = 0,
    ) -> None:
        """shape: outputs, inputs; weight, scales: as `products.h` wants them. See `pack`, `pack_int8`, `pack_int4`."""
        opened = library()
        assert opened is not None
        self._product = opened.native_product
        self.outputs, self.inputs = shape
        self._kept = (on_huge_pages(weight), scales, None if bias is None else bias.float().contiguous())
        pointers = [pointer(tensor) for tensor in self._kept]
        self._matrix = _Matrix(kind, self.inputs, self.outputs, group, *pointers)
        self._matrix_at = byref(self._matrix)
        self.address = ctypes.addressof(self._matrix)
        """Of what C knows of it; good as long as this lives."""
        self.gates = self.outputs % (2 * int(opened.native_block())) == 0
        """Whether `run` can apply a gate."""

    @staticmethod
    def can(weight: Tensor) -> bool:
        """Return whether a weight can be packed here as it is."""
        return weight.device.type == "cpu" and weight.dtype in FLOATS and library() is not None

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        """weight: [outputs, inputs] float32 or bfloat16; bias: [outputs].

        Weights that came from a checkpoint in bfloat16 go back to it: the same numbers, so the same results, in half of
        the bytes.
        """
        opened = library()
        assert opened is not None
        low = weight.bfloat16()
        if torch.equal(low.float(), weight.float()):
            weight = low
        outputs, inputs = weight.shape
        if outputs == 1:
            return NativeLinear(FLOATS[torch.float32], (outputs, inputs), weight.float().flatten(), bias=bias)
        block, lanes = int(opened.native_block()), int(opened.native_lanes())
        whole, rest = outputs // block * block, outputs % block

        def by_input(blocks: Tensor) -> Tensor:  # [blocks, outputs, inputs]
            columns = blocks.transpose(1, 2)
            if weight.dtype == torch.bfloat16 and columns.shape[2] > lanes:
                columns = columns.unflatten(2, (-1, 2, lanes)).transpose(3, 4)
            return columns.flatten()

        packed = by_input(weight[:whole].view(-1, block, inputs))
        if rest:
            filled = F.pad(weight[whole:], (0, 0, 0, int(opened.native_width(rest)) - rest))
            packed = torch.cat((packed, by_input(filled[None])))
        return NativeLinear(FLOATS[weight.dtype], (outputs, inputs), packed, bias=bias)

    @staticmethod
    def pack_int8(eight: Tensor, scale: Tensor) -> NativeLinear:
        """Weights in 8 bits [outputs, inputs], -127 to 127, with a scale for each output [outputs]; activations too,
        with a scale for each row.
        """
        opened = library()
        assert opened is not None
        outputs, inputs = eight.shape
        start = -128 * eight.sum(dim=1, dtype=torch.int32)
        block = int(opened.native_block())
        scales = _blocks(torch.stack((scale.view(torch.int32), start), dim=1), block)  # [outputs / block, block, 2]
        packed = _blocks(eight, block).view(-1, block, inputs // 4, 4).transpose(1, 2).contiguous()
        return NativeLinear(_INT8, (outputs, inputs), packed, scales.transpose(1, 2).contiguous(), group=inputs)

    @staticmethod
    def pack_int4(four: Tensor, scale: Tensor) -> NativeLinear:
        """Weights in 4 bits [outputs, inputs], -8 to 7, with a scale in bfloat16 for each group of inputs [outputs,
        groups]; activations in 8 bits, with a scale for each group.
        """
        opened = library()
        assert opened is not None
        outputs, inputs = four.shape
        groups, block = scale.shape[1], int(opened.native_block())
        group = inputs // groups
        assert group * groups == inputs and (group == 32 or group % 64 == 0) and scale.dtype == torch.bfloat16
        eights = _blocks((four + 8).to(torch.uint8), block).view(-1, block, groups, group // 8, 2, 4)
        nibbles = (eights[..., 0, :] | eights[..., 1, :] << 4).permute(
            0, 2, 3, 1, 4
        )  # [.., groups, group / 8, block, 4]
        scales = _blocks(scale, block).transpose(1, 2).contiguous().view(torch.uint8)  # [.., groups, 2 * block]
        packed = torch.cat((scales, nibbles.flatten(2)), dim=2)
        return NativeLinear(_INT4, (outputs, inputs), packed, group=group)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return self.run(x.contiguous())
        return self.run(x.float().contiguous()).to(x.dtype)

    def run(
        self,
        x: Tensor,
        activation: Activation = "none",
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """residual + scale * activation(x W + bias); float32 and in one piece all of them.

        x: [..., inputs]; scale: [outputs]; residual: as the result. "gated": silu of the first half of the outputs
        times the second. Returns [..., outputs], or half as many.
        """
        assert x.shape[-1] == self.inputs and x.dtype == torch.float32
        assert activation != "gated" or self.gates
        rows, width = x.numel() // self.inputs, self.outputs // 2 if activation == "gated" else self.outputs
        out = torch.empty(*x.shape[:-1], width)
        assert scale is None or (scale.dtype == torch.float32 and scale.numel() == self.outputs)
        assert residual is None or (residual.dtype == torch.float32 and residual.numel() == out.numel())
        given = _Rows(pointer(x), 1, rows, 0, self.inputs)
        after = _After(_ACTIVATIONS[activation], pointer(scale), pointer(residual))
        if self._product(self._matrix_at, byref(given), byref(after), out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for {rows} rows of {self.inputs} activations")
        return out


def _blocks(rows: Tensor, block: int) -> Tensor:
    """rows: [N, ...], filled up with zeros to whole blocks: [N / block, block, ...]."""
    missing = -len(rows) % block
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))).view(-1, block, *rows.shape[1:])
