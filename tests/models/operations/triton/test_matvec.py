"""Products with few rows against the library's, with the norm before and the gate after."""

from __future__ import annotations

import pytest
import torch

from streaming.models.linear import Dense, Int8Gpu
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations


@pytest.mark.parametrize(("rows", "width", "count"), [(1, 640, 20), (3, 96, 9), (4, 512, 16)])
def test_products_are_the_reference_s(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, count: int
) -> None:
    """Pins rows and columns beyond a block's edge, a norm of the wrong row, the residual summed without rounding, gate
    and up swapped.
    """
    x, pending = torch.randn(2, rows, 1, width).to(device, dtype)
    norm = torch.randn(width).to(device, dtype)
    weight = Dense(torch.randn(2 * count, width).to(device, dtype) / width**0.5)
    few, plain = TritonOperations(matvec_rows=4), TorchOperations()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    found = [
        *few.project(x, None, norm, 1e-5, weight),
        *few.project(x, pending, norm, 1e-5, weight),
        *few.project_gated(x, pending, norm, 1e-5, weight),
        few.linear(x, weight),
    ]
    wanted = [
        *plain.project(x, None, norm, 1e-5, weight),
        *plain.project(x, pending, norm, 1e-5, weight),
        *plain.project_gated(x, pending, norm, 1e-5, weight),
        plain.linear(x, weight),
    ]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5])
def test_products_with_eight_bits_are_their_weights_times_their_scales(
    device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    """By `matvec` up to four tokens, by `windows` beyond. Pins a scale of another output, or of the other half."""
    width, count = 96, 20
    x, pending = torch.randn(2, rows, 1, width).to(device, dtype)
    norm = torch.randn(width).to(device, dtype)
    weight = Int8Gpu.pack((torch.randn(2 * count, width) / width**0.5).to(device, dtype))
    whole = Dense((weight.weight.float() * weight.scale.float()[:, None]).to(dtype))
    fused, plain = TritonOperations(), TorchOperations()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    for one, other in zip(
        (fused.linear(x, weight), *fused.project_gated(x, pending, norm, 1e-5, weight)),
        (plain.linear(x, whole), *plain.project_gated(x, pending, norm, 1e-5, whole)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_more_rows_than_that_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a batch that reads the weights once a token."""
    monkeypatch.setattr("streaming.models.operations.triton.operations.matvec", None)
    x, weight = torch.randn(5, 1, 16), Dense(torch.randn(8, 16))
    torch.testing.assert_close(TritonOperations(matvec_rows=4).linear(x, weight), TorchOperations().linear(x, weight))
    none = TritonOperations(matvec_rows=0)
    torch.testing.assert_close(none.linear(x[:1], weight), TorchOperations().linear(x[:1], weight))
