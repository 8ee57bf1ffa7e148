"""Linear maps, quantised or not, against the plain product, and each row against its neighbours; in native code where
there is any, and in PyTorch's.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from streaming.errors import CheckpointError, StreamingError
from streaming.models.linear import Dense, Packed, linear
from streaming.models.operations.native.library import library
from streaming.models.operations.native.matrix import NativeLinear
from streaming.models.quantized_weights import Quantize

KINDS: list[Quantize] = ["none", "int8", "int4"]
INTEGERS = KINDS[1:]
ERROR = {"none": 0.0, "int8": 0.02, "int4": 0.12}
"""Relative, on normally distributed numbers: half a step of 1/127, of 1/15 of a group's range."""


@pytest.fixture(autouse=True, params=["native", "torch"])
def made_of(request: pytest.FixtureRequest) -> str:
    """Return whose products they are."""
    if request.param == "torch":
        request.getfixturevalue("without_native")
    elif library() is None:
        pytest.skip("no native operations here")
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, made_of: str) -> Quantize:
    """What PyTorch alone keeps on a CPU is not quantised."""
    if made_of == "torch" and request.param != "none":
        pytest.skip("refused: see below")
    return cast(Quantize, request.param)


def weight(outputs: int = 96, inputs: int = 128) -> Tensor:
    return torch.randn(outputs, inputs) / inputs**0.5


@pytest.mark.parametrize("shape", [(96, 128), (64, 96), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_map_is_the_map_but_for_its_rounding(
    kind: Quantize, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Pins scales of the wrong axis, packed halves swapped, a zero point off by one."""
    matrix = weight(*shape).to(dtype)
    x = torch.randn(3, 2, shape[1]).to(dtype)
    got, wanted = linear(matrix, kind)(x), x.float() @ matrix.float().T
    assert (got.shape, got.dtype) == (wanted.shape, dtype)
    error = float((got.float() - wanted).norm() / wanted.norm())
    assert error < ERROR[kind] + (0.006 if dtype is torch.bfloat16 else 1e-6), error


def test_a_row_does_not_depend_on_its_neighbours(kind: Quantize) -> None:
    """One range for the whole batch made a session change with the loudness of the others."""
    apply = linear(weight(), kind)
    row = torch.randn(1, 128)
    alone = apply(row)
    for neighbour in (torch.zeros(1, 128), 1e6 * torch.randn(1, 128), torch.full((1, 128), torch.nan)):
        together = apply(torch.cat((neighbour, row, neighbour)))
        assert torch.equal(together[1:2], alone)
        assert neighbour.isfinite().all() or not together[0].isfinite().any(), "what is not finite stays so"


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_loudness_does_not_matter(kind: Quantize, scale: float) -> None:
    """A range in absolute numbers would lose small activations, and small weights."""
    x, matrix = torch.randn(4, 128), weight()
    wanted = x @ matrix.T
    for got in (linear(matrix, kind)(scale * x) / scale, linear(scale * matrix, kind)(x) / scale):
        assert float((got - wanted).norm() / wanted.norm()) < ERROR[kind] + 1e-5


def test_nothing_but_zeros_gives_zeros(kind: Quantize) -> None:
    assert torch.equal(linear(weight(), kind)(torch.zeros(2, 128)), torch.zeros(2, 96))
    assert linear(torch.zeros(96, 128), kind)(torch.randn(2, 128)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_weights_are_packed_on_a_cpu_and_give_the_same(dtype: torch.dtype, biased: bool, made_of: str) -> None:
    """For any number of rows: packing is told of none. Minus infinity in the bias is how `</audio>` is kept out."""
    matrix, bias = weight(300, 200).to(dtype), torch.randn(300).to(dtype) if biased else None
    if bias is not None:
        bias[-1] = -torch.inf
    if made_of == "torch" and not Packed.can(matrix):
        pytest.skip("no oneDNN in this PyTorch")
    apply = linear(matrix, bias=bias)
    assert isinstance(apply, NativeLinear if made_of == "native" else Packed)
    for rows in (1, 2, 3, 17, 64):
        x = torch.randn(rows, 200).to(dtype)
        wanted = torch.nn.functional.linear(x.float(), matrix.float(), None if bias is None else bias.float())
        rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (0.01, 0.01)
        torch.testing.assert_close(apply(x).float(), wanted, rtol=rtol, atol=atol)
        x[0] = torch.nan
        torch.testing.assert_close(apply(x)[1:].float(), wanted[1:], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(768, 256), (512, 2048), (2049, 2048), (64, 64), (64, 7), (1, 192), (256, 3072)])
def test_a_row_is_the_same_to_the_last_bit_in_any_company(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Alone it was summed in another order: at a near-tie, what one session said depended on another's speaking."""
    apply = linear(weight(*shape).to(dtype), bias=torch.randn(shape[0]).to(dtype))
    if isinstance(apply, Dense):
        pytest.skip("no oneDNN in this PyTorch")
    x = torch.randn(40, shape[1]).to(dtype)
    together = apply(x)
    for rows in (1, 2, 3, 5, 8, 17):
        assert torch.equal(apply(x[:rows]), together[:rows])
    assert torch.equal(apply(x[None, None, 7]), together[None, None, 7])


def test_what_cannot_be_packed_is_left_as_it_is() -> None:
    """A kind of number that is multiplied neither here nor by oneDNN."""
    assert isinstance(linear(weight(300, 200).double()), Dense)


@pytest.mark.parametrize("quantize", INTEGERS)
def test_without_native_operations_a_cpu_keeps_no_integers(quantize: Quantize, made_of: str) -> None:
    """Pins int4 by PyTorch's own product, which took 10 s a step where float32 took 2.5, and int8 by oneDNN, whose sums
    saturate on a processor without VNNI. The message says what is missing.
    """
    if made_of == "native":
        linear(weight(), quantize)
        return
    with pytest.raises(StreamingError, match="C compiler"):
        linear(weight(), quantize)


@pytest.mark.parametrize("quantize", INTEGERS)
def test_a_weight_that_fits_no_group_is_refused(quantize: Quantize, made_of: str) -> None:
    if made_of == "native":
        with pytest.raises(CheckpointError, match="24 inputs"):
            linear(weight(96, 24), quantize)
