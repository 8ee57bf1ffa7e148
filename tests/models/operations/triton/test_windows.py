"""Convolutions that read their windows where they lie, against the reference, which unfolds them."""

from __future__ import annotations

import pytest
import torch

from streaming.models.linear import Dense
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import operations as fused
from streaming.models.operations.triton.operations import TritonOperations
from streaming.models.operations.triton.windows import fills_a_gpu


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize(
    ("channels", "count", "kernel", "stride", "dilation"), [(1, 20, 7, 1, 1), (6, 70, 3, 1, 2), (16, 5, 4, 2, 1)]
)
def test_convolutions_are_the_reference_s(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    count: int,
    kernel: int,
    stride: int,
    dilation: int,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pins a window of the neighbour's row, a dilation that is lost, edges of tiles, a bias of another output."""
    monkeypatch.setattr(fused, "LEAST_ROWS", 1)
    monkeypatch.setattr(fused, "fills_a_gpu", lambda rows, count: True)
    x = torch.randn(3, 17, channels).to(device, dtype)
    weight = (torch.randn(count, kernel * channels) / (kernel * channels) ** 0.5).to(device, dtype)
    product = Dense(weight, torch.randn(count).to(device, dtype) if bias else None)
    ours, wanted = (
        operations.windows(x, product, kernel, stride, dilation)
        for operations in (TritonOperations(), TorchOperations())
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


def test_few_rows_and_small_products_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a layer of few windows that runs on a few multiprocessors."""
    monkeypatch.setattr(fused, "windows", None)
    product = Dense(torch.randn(4, 6))
    for rows, steps in ((1, 2000), (64, 5)):
        TritonOperations().windows(torch.randn(rows, steps, 2), product, 3, 1, 1)
    assert fills_a_gpu(64 * 1920, 64)
    assert not fills_a_gpu(64 * 2, 1024)
