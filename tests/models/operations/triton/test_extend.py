"""A context and the ELU behind it against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize(("old", "new", "channels"), [(0, 5, 3), (6, 1920, 1), (2, 1, 7), (2, 40, 40)])
def test_what_a_convolution_reads_is_the_reference_s(
    device: torch.device, dtype: torch.dtype, activate: bool, old: int, new: int, channels: int
) -> None:
    """Contexts are columns of one tensor for all layers; a new input may be a view. Pins NaN spread by a mask."""
    x = (4 * torch.randn(3, channels, new)).transpose(1, 2).to(device, dtype)
    x[0, 0, 0], x[1, -1, -1], x[2, 0, 0] = 200.0, -200.0, torch.nan
    context = torch.randn(3, 5 + old * channels).to(device, dtype)[:, 5:].view(3, old, channels)
    ours, wanted = (operations.extend(context, x, activate) for operations in (TritonOperations(), TorchOperations()))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance / 4, equal_nan=True)


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize(("old", "new", "channels", "hop"), [(6, 1920, 1, 1), (2, 96, 7, 20), (0, 2, 40, 960)])
def test_what_lies_past_the_end_of_a_stream_is_zero(
    device: torch.device, dtype: torch.dtype, activate: bool, old: int, new: int, channels: int, hop: int
) -> None:
    """What a row holds is to the bit what it is where no row ends. Pins an end rounded down: a step of samples lost."""
    x = torch.randn(4, new, channels).to(device, dtype)
    context = torch.randn(4, old, channels).to(device, dtype)
    lengths = torch.tensor([new * hop, new * hop - hop, 1, max(1, hop - 1)], device=device)
    ours, wanted = (
        operations.extend(context, x, activate, lengths, hop) for operations in (TritonOperations(), TorchOperations())
    )
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance / 4)
    undisturbed = TritonOperations().extend(context, x, activate)
    steps = [new, new - 1, 1, 1]
    for row, held in enumerate(steps):
        assert torch.equal(ours[row, : old + held], undisturbed[row, : old + held])
        assert not ours[row, old + held :].any()
