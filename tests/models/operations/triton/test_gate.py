"""silu(gate) * up against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations


@pytest.mark.parametrize("width", [48, 1024, 1500])
def test_gated_values_are_the_reference_s(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Pins halves swapped, a row's last columns left out, an overflow of exp at very negative gates."""
    both = 4 * torch.randn(2, 3, 2 * width)
    both[0, 0, :3], both[1, 1, 2 * width - 3 :] = torch.tensor([-200.0, 200.0, 0.0]), 1e4
    both = both.to(device, dtype)
    ours, wanted = TritonOperations().gate(both), TorchOperations().gate(both)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=1e-6)
    assert (ours != wanted).float().mean() < (1 if dtype == torch.float32 else 0.02)
