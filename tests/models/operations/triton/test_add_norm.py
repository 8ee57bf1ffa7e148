"""The fused norm against `LlamaRMSNorm` written out."""

from __future__ import annotations

import pytest
import torch

from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations


@pytest.mark.parametrize("width", [64, 96, 2048])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "added"])
def test_norms_are_the_reference_s(device: torch.device, dtype: torch.dtype, width: int, adds: bool) -> None:
    """Pins a mean over the padded width, a sum that is normed before it is rounded, a weight applied in float32."""
    x, added = 3 * torch.randn(2, 2, 3, width).to(device, dtype)
    weight = torch.randn(width).to(device, dtype)
    before = x.clone()
    total, normed = TritonOperations().norm(x, added if adds else None, weight, 1e-5)
    wanted_total, wanted = TorchOperations().norm(x, added if adds else None, weight, 1e-5)
    assert torch.equal(total, wanted_total)
    assert torch.equal(x, before)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # a rounding of the mean may turn one of a result
    torch.testing.assert_close(normed, wanted, rtol=tolerance, atol=1e-6)
    assert (normed != wanted).float().mean() < (1 if dtype == torch.float32 else 0.02)
