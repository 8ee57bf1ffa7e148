"""The products of integers as PyTorch computes them: the same rounding, sums and order, so the same bits."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [..., K] by the largest magnitude of each row: whole numbers from -127 to 127, and a scale [...]."""
    scale = x.abs().amax(dim=-1).clamp(min=1e-30) / 127
    return (x * (1 / scale)[..., None]).round(), scale


def int8_product(x: Tensor, eight: Tensor, scale: Tensor) -> Tensor:
    """x: [R, K]; eight: [N, K]; scale: [N]. Returns [R, N]."""
    values, of_row = rounded(x)
    sums = values.double() @ eight.double().T  # exact: whole numbers far below 2^53
    return sums.float() * (scale * of_row[:, None])


def int4_product(x: Tensor, four: Tensor, scales: Tensor) -> Tensor:
    """x: [R, K]; four: [N, K]; scales: [N, groups]. Returns [R, N]."""
    groups = scales.shape[1]
    values, of_group = rounded(x.unflatten(1, (groups, -1)))
    weights, out = four.unflatten(1, (groups, -1)).double(), torch.zeros(len(x), len(four))
    for group in range(groups):
        sums = values[:, group].double() @ weights[:, group].T
        out = out + sums.float() * (scales[:, group].float() * of_group[:, group, None])
    return out
