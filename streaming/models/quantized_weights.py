"""Round weights to 8 and to 4 bits, on every device alike."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streaming.errors import CheckpointError

Quantize = Literal["none", "int8", "int4"]
QuantizeOption = Literal["auto", "none", "int8", "int4"]
"""`auto`: the one that loses least and is fast enough on this machine."""

_GROUPS = (128, 64, 32)
"""Inputs that share a scale in 4 bits: as many as divide a layer's."""
_STEPS = (8.0, 8.75, 9.5)
"""Tried in 4 bits: how many steps it is to a group's largest magnitude."""
_ROUNDED_AT_ONCE = 64
"""Outputs that are rounded in one piece."""
_TINY = 1e-30
"""The least that a scale may be."""


def rounding(quantize: Quantize) -> str:
    """Return a text that differs where weights are rounded differently."""
    return f"{quantize} {_GROUPS} {_STEPS}" if quantize == "int4" else quantize


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return how weights are rounded to 8 bits on every device: int8 [N, K], -127 to 127, and a scale for each output,
    float32 [N].
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=_TINY) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return how weights are rounded to 4 bits on every device: int8 [N, K], -8 to 7, and a scale for each group of
    inputs, bfloat16 [N, K / group]. Raises `CheckpointError`.

    There are more negative numbers than positive ones, so a group's largest magnitude becomes the lowest, by the sign
    of its scale. Whether it is to be one of them, or to be cut off so that the others lie closer, is tried: the least
    sum of squared errors wins.
    """
    outputs, inputs = weight.shape
    group = next((size for size in _GROUPS if inputs % size == 0), 0)
    if not group:
        raise CheckpointError(f"a layer with {inputs} inputs cannot be kept in int4: use int8 or none")
    values = torch.empty(outputs, inputs // group, group, dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, inputs // group, dtype=torch.bfloat16, device=weight.device)
    for first in range(0, outputs, _ROUNDED_AT_ONCE):  # what is tried stays in the cache
        rows = slice(first, first + _ROUNDED_AT_ONCE)
        wide = weight[rows].float().view(-1, inputs // group, group)
        low, high = wide.amin(dim=-1), wide.amax(dim=-1)
        largest = torch.where(-low > high, low, high)
        largest = torch.where(largest.abs() < _TINY, _TINY, largest)
        least = torch.full_like(largest, torch.inf)
        for steps in _STEPS:
            scale = (largest / -steps).bfloat16()
            tried = (wide / scale.float()[..., None]).round().clamp(-8, 7)
            error = torch.addcmul(wide, tried, scale.float()[..., None], value=-1).square_().sum(dim=-1)
            better = ~(error >= least)  # NaN stays NaN
            least = torch.where(better, error, least)
            scales[rows] = torch.where(better, scale, scales[rows])
            values[rows] = torch.where(better[..., None], tried.to(torch.int8), values[rows])
    return values.view(outputs, inputs), scales
