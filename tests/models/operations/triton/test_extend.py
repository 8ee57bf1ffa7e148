"""A context and the ELU behind it against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from streaming.models.operations.torch import Plain
from streaming.models.operations.triton.operations import Fused


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize(("old", "new", "channels"), [(0, 5, 3), (6, 1920, 1), (2, 1, 7), (2, 40, 40)])
def test_what_a_convolution_reads(
    device: torch.device, dtype: torch.dtype, activate: bool, old: int, new: int, channels: int
) -> None:
    """Contexts are columns of one tensor for all layers; a new input may be a view. Pins NaN spread by a mask."""
    x = (4 * torch.randn(3, channels, new)).transpose(1, 2).to(device, dtype)
    x[0, 0, 0], x[1, -1, -1], x[2, 0, 0] = 200.0, -200.0, torch.nan
    context = torch.randn(3, 5 + old * channels).to(device, dtype)[:, 5:].view(3, old, channels)
    ours, wanted = (operations.extend(context, x, activate) for operations in (Fused(), Plain()))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance / 4, equal_nan=True)
