"""Quantised linear maps against the plain one, and each row against its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streaming.models.linear import Quantize, linear

KINDS: list[Quantize] = ["none", "int8", "int4"]
ERROR = {"none": 0.0, "int8": 0.02, "int4": 0.12}
"""Relative, on normally distributed numbers: half a step of 1/127, of 1/15 of a group's range."""


def weight(outputs: int = 96, inputs: int = 128) -> Tensor:
    return torch.randn(outputs, inputs) / inputs**0.5


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind: Quantize) -> None:
    """One range for the whole batch made a session change with the loudness of the others."""
    apply = linear(weight(), kind)
    row = torch.randn(1, 128)
    alone = apply(row)
    for neighbour in (torch.zeros(1, 128), 1e6 * torch.randn(1, 128), torch.full((1, 128), torch.nan)):
        together = apply(torch.cat((neighbour, row, neighbour)))
        if kind == "int8":
            assert torch.equal(together[1:2], alone)
        else:
            torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)  # another width, another order
        assert neighbour.isfinite().all() or not together[0].isfinite().any(), "what is not finite stays so"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_loudness_does_not_matter(kind: Quantize, scale: float) -> None:
    """A range in absolute numbers would lose small activations, and small weights."""
    x, matrix = torch.randn(4, 128), weight()
    wanted = x @ matrix.T
    for got in (linear(matrix, kind)(scale * x) / scale, linear(scale * matrix, kind)(x) / scale):
        assert float((got - wanted).norm() / wanted.norm()) < ERROR[kind] + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_zeros(kind: Quantize) -> None:
    assert torch.equal(linear(weight(), kind)(torch.zeros(2, 128)), torch.zeros(2, 96))
    assert linear(torch.zeros(96, 128), kind)(torch.randn(2, 128)).abs().max() < 1e-6
