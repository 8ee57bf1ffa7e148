"""Linear maps, and the ways in which their weights may be kept: as they are, in 8 bits, in 4.

A row's result depends on that row alone, whatever the others in the batch hold, NaN included: sessions share batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.errors import CheckpointError
from streaming.models.checkpoint import TensorSource
from streaming.models.operations.native.matrix import TINY, NativeLinear

Quantize = Literal["none", "int8", "int4"]

_GROUPS = (64, 32)


class Linear(Protocol):
    """x: [..., K] to [..., N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


def linear(weight: Tensor, quantize: Quantize = "none", bias: Tensor | None = None) -> Linear:
    """From a weight [N, K] and a bias [N] on the device where they will be used. Only what is kept whole has a bias."""
    if quantize == "none" and NativeLinear.can(weight):
        return NativeLinear.pack(weight, bias)
    if quantize == "none":
        return Packed.pack(weight, bias) if Packed.can(weight) else Dense(weight, bias)
    assert bias is None
    if quantize == "int4":
        group = _group(weight)
        return NativeLinear.pack_int4(weight, group) if NativeLinear.can_integers(weight, group) else Int4.pack(weight)
    if NativeLinear.can_integers(weight, 16):
        return NativeLinear.pack_int8(*_eight_bits(weight))
    return Int8Cpu.pack(weight) if weight.device.type == "cpu" else Int8Gpu.pack(weight)


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
    """The same on a CPU, in the order in which oneDNN reads it: for a few rows twice as fast as `F.linear`, which
    leaves weights as they are and goes through a library that is at its best elsewhere (docs/decisions.md).

    A row comes out the same to the last bit, however many others there are.
    """

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def can(weight: Tensor) -> bool:
        """Whether this processor has it for this weight."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 or bfloat16

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None) -> Packed:
        return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        alone = len(rows) == 1  # a single row would be another product, with sums in another order
        two = rows.expand(2, -1).contiguous() if alone else rows
        out: Tensor = torch.ops.mkldnn._linear_pointwise(two, self.weight, self.bias, "none", [], "")
        return (out[:1] if alone else out).view(*x.shape[:-1], -1)


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, a scale for each output: int8 [N, K] and float32 [N]."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=TINY) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


@dataclass(frozen=True)
class Int8Cpu:
    """8-bit weights and activations, multiplied as integers by oneDNN: as fast for sixteen rows as for one.

    Every row of activations is divided by its own largest magnitude. weight: packed; scale: float32 [N]; zero: int32
    [N].
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor

    @staticmethod
    def pack(weight: Tensor) -> Int8Cpu:
        eight, scale = _eight_bits(weight)
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return Int8Cpu(torch.ops.onednn.qlinear_prepack(eight, None), scale, zero)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / 127  # not finite where a row is not,
        eight = (rows / scale).nan_to_num_(0.0, 0.0, 0.0).round_().add_(128).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            eight, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return (out * scale).view(*x.shape[:-1], -1).to(x.dtype)  # so that its result is not, and no other's


@dataclass(frozen=True)
class Int8Gpu:
    """8-bit weights, activations as they are. weight: int8 [N, K]; scale: [N]."""

    weight: Tensor
    scale: Tensor

    @staticmethod
    def pack(weight: Tensor) -> Int8Gpu:
        eight, scale = _eight_bits(weight)
        return Int8Gpu(eight, scale.to(weight.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)


def _group(weight: Tensor) -> int:
    """How many inputs share a scale in 4 bits."""
    inputs = weight.shape[1]
    group = next((size for size in _GROUPS if inputs % size == 0), 0)
    if not group:
        raise CheckpointError(f"a layer with {inputs} inputs cannot be kept in int4: use int8 or none")
    return group


@dataclass(frozen=True)
class Int4:
    """4-bit weights, activations as they are: a scale and a zero point for each group of inputs.

    weight: packed as the device wants it; scales: [K / group, N, 2].
    """

    weight: Tensor
    scales: Tensor
    group: int

    @staticmethod
    def pack(weight: Tensor) -> Int4:
        outputs, inputs = weight.shape
        group = _group(weight)
        wide = weight.float().view(outputs, -1, group)
        low, high = wide.amin(dim=-1, keepdim=True), wide.amax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=TINY)
        four = ((wide - low) / scale).round().clamp(0, 15).to(torch.int32).view(outputs, inputs)
        scales = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous()
        if weight.device.type == "cpu":
            return Int4(torch._convert_weight_to_int4pack_for_cpu(four, 1), scales, group)
        scales = scales.to(weight.dtype)
        pairs = (four[:, ::2] << 4 | four[:, 1::2]).to(torch.uint8)
        return Int4(torch._convert_weight_to_int4pack(pairs, 8), scales, group)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        multiply = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        out = multiply(rows.to(self.scales.dtype), self.weight, self.group, self.scales)
        return out.view(*x.shape[:-1], -1).to(x.dtype)
