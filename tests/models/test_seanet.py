"""The convolutions against torch's own, whole and in frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from streaming.models.checkpoint import TensorSource
from streaming.models.linear import linear
from streaming.models.operations.base import Convolution, Operations
from streaming.models.operations.native.library import library
from streaming.models.operations.native.operations import NativeOperations
from streaming.models.operations.torch import TorchOperations
from streaming.models.seanet import load_transposed

CPU = torch.device("cpu")


OPERATIONS = [TorchOperations(), *([NativeOperations()] if library() else [])]


def in_pieces(conv: Convolution, x: Tensor, sizes: list[int], operations: Operations) -> Tensor:
    """x: [B, T, C], piece by piece from an empty context."""
    run = operations.convolutions([conv])
    memory = torch.full((len(x), 2, conv.context * conv.channels), torch.nan)
    slots = torch.arange(len(x))
    out = []
    for frame, piece in enumerate(x.split(sizes, dim=1)):
        contexts = operations.contexts(memory, slots, torch.full_like(slots, frame))
        out.append(run(piece, contexts))
        contexts.keep()
    return torch.cat(out, dim=1)


def source(folder: Path, **tensors: Tensor) -> TensorSource:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return TensorSource(folder, CPU, torch.float32)


pieces = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(steps=pieces, kernel=st.integers(1, 5), stride=st.integers(1, 3), dilation=st.integers(1, 3))
def test_pieces_of_any_size_equal_the_whole(steps: list[int], kernel: int, stride: int, dilation: int) -> None:
    """Pins a context too short for the dilation, or one that a piece shorter than it does not carry on."""
    if kernel * dilation < stride:
        kernel = stride
    out, channels = 3, 2
    weight, bias = torch.randn(out, channels, kernel), torch.randn(out)
    flat = weight.permute(0, 2, 1).reshape(out, kernel * channels)
    conv = Convolution(linear(flat, bias=bias), channels, kernel, stride, dilation)
    if conv.context < 0:
        return
    sizes = [count * stride for count in steps]
    x = torch.randn(2, sum(sizes), channels)
    padded = F.pad(x.transpose(1, 2), (conv.context, 0))
    wanted = F.conv1d(padded, weight, bias, stride, dilation=dilation).transpose(1, 2)
    for operations in OPERATIONS:
        torch.testing.assert_close(in_pieces(conv, x, sizes, operations), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (16, 8), (5, 2), (3, 3), (2, 3), (7, 3)])
def test_a_transposed_convolution_equals_torch_trimmed_on_the_right(tmp_path: Path, kernel: int, stride: int) -> None:
    """Behind an ELU. Pins taps in reversed order, and kernels that are not a multiple of the stride."""
    channels, out = 3, 2
    weight, bias = torch.randn(channels, out, kernel), torch.randn(out)
    files = source(tmp_path, up__conv__weight=weight, up__conv__bias=bias)
    conv = load_transposed(files, "up", (channels, out, kernel), stride)
    x = torch.randn(2, 6, channels)
    wanted = F.conv_transpose1d(F.elu(x).transpose(1, 2), weight, bias, stride)
    wanted = F.pad(wanted, (0, max(0, 6 * stride - wanted.shape[-1])))[..., : 6 * stride].transpose(1, 2)
    if kernel < stride:  # where no tap reaches, torch's whole output ends early: the bias is still there
        wanted[:, -(stride - kernel) :] = bias
    for operations in OPERATIONS:
        torch.testing.assert_close(in_pieces(conv, x, [1, 3, 2], operations), wanted, rtol=1e-4, atol=1e-5)
