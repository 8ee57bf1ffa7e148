"""Linear maps, and the ways in which their weights may be kept: as they are, in 8 bits, in 4.

A row's result depends on that row alone, whatever the others in the batch hold, NaN included: sessions share batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.errors import CheckpointError, StreamingError
from streaming.models.checkpoint import TensorSource
from streaming.models.operations.native.library import library
from streaming.models.operations.native.matrix import NativeLinear
from streaming.models.quantized_weights import Quantize, eight_bits, four_bits

_MULTIPLE = 16
"""Inputs that a processor multiplies at once."""


class Linear(Protocol):
    """x: [..., K] to [..., N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


def linear(weight: Tensor, quantize: Quantize = "none", bias: Tensor | None = None) -> Linear:
    """Make a map from a weight [N, K] and a bias [N], which lie where they will be used. Integers take no bias.

    Raises `StreamingError` where a CPU lacks what multiplies integers, `CheckpointError` for a weight whose inputs
    cannot be put into groups.
    """
    if quantize == "none":
        if NativeLinear.can(weight):
            return NativeLinear.pack(weight, bias)
        return Packed.pack(weight, bias) if Packed.can(weight) else Dense(weight, bias)
    assert bias is None
    on_cpu = weight.device.type == "cpu"
    if on_cpu and library() is None:
        raise StreamingError(
            f"{quantize} on a CPU needs the native operations, which could not be compiled or are switched off: "
            "install a C compiler (Debian: apt install gcc libc6-dev), or use --quantize none"
        )
    if quantize == "int8":
        if on_cpu and weight.shape[1] % _MULTIPLE:
            raise CheckpointError(f"a layer with {weight.shape[1]} inputs cannot be kept in int8 on a CPU: use none")
        return NativeLinear.pack_int8(*eight_bits(weight)) if on_cpu else Int8Gpu.pack(weight)
    return NativeLinear.pack_int4(*four_bits(weight)) if on_cpu else Int4Gpu.pack(weight)


def load_linear(
    source: TensorSource, name: str, parts: Mapping[str, tuple[int, int]], quantize: Quantize = "none"
) -> Linear:
    """Maps of the same input as one, their outputs in order. parts: shapes [N, K], by what follows `name` on disk."""
    return linear(torch.cat([source.load(f"{name}.{part}.weight", shape) for part, shape in parts.items()]), quantize)


@dataclass(frozen=True)
class Dense:
    """weight: [N, K]; bias: [N]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Packed:
    """A dense weight on a CPU without a compiler, in the order in which oneDNN reads it: for a few rows twice as fast
    as `F.linear`, which leaves weights as they are and goes through a library that is at its best elsewhere
    (docs/decisions.md). The product is in float32 whatever comes: not every processor multiplies bfloat16, and then it
    takes ten times as long.

    A row comes out the same to the last bit, however many others there are.
    """

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def can(weight: Tensor) -> bool:
        """Return whether this processor has such a product for this weight."""
        float_on_cpu = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        return float_on_cpu and torch.backends.mkldnn.is_available()

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None) -> Packed:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous())
        return Packed(packed, None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        alone = len(rows) == 1  # a single row would be another product, with sums in another order
        two = rows.expand(2, -1).contiguous() if alone else rows
        out: Tensor = torch.ops.mkldnn._linear_pointwise(two, self.weight, self.bias, "none", [], "")
        return (out[:1] if alone else out).view(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True)
class Int8Gpu:
    """8-bit weights, activations as they are. weight: int8 [N, K]; scale: [N]."""

    weight: Tensor
    scale: Tensor

    @staticmethod
    def pack(weight: Tensor) -> Int8Gpu:
        eight, scale = eight_bits(weight)
        return Int8Gpu(eight, scale.to(weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Int4Gpu:
    """4-bit weights, activations as they are.

    weight: packed as the device wants it; scales: [K / group, N, 2], a scale and zero for each group of inputs.
    """

    weight: Tensor
    scales: Tensor
    group: int

    @staticmethod
    def pack(weight: Tensor) -> Int4Gpu:
        four, scale = four_bits(weight)
        shifted = (four + 8).to(torch.uint8)
        scales = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous().to(weight.dtype)
        packed = torch._convert_weight_to_int4pack(shifted[:, ::2] << 4 | shifted[:, 1::2], 8)
        return Int4Gpu(packed, scales, weight.shape[1] // scale.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch._weight_int4pack_mm(rows, self.weight, self.group, self.scales).view(*x.shape[:-1], -1)
