"""Rounding to 8 and to 4 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streaming.models import quantized_weights
from streaming.models.quantized_weights import Quantize, eight_bits, four_bits, rounding


def test_eight_bits_have_a_magnitude() -> None:
    """Pins a weight of -128, which has none in a byte: a processor without VNNI multiplies by magnitudes."""
    eight, scale = eight_bits(torch.tensor([[-1.0, 0.3, 1.0], [0.0, 0.0, 0.0], [-3.0, -2.0, 0.1]]))
    assert eight.tolist() == [[-127, 38, 127], [0, 0, 0], [-127, -85, 4]]
    assert scale.tolist() == pytest.approx([1 / 127, 0, 3 / 127])


@pytest.mark.parametrize(("inputs", "group", "most"), [(96, 32, 0.087), (192, 64, 0.094), (256, 128, 0.1)])
def test_four_bits_lose_the_least_of_what_is_tried(inputs: int, group: int, most: float) -> None:
    """Pins a scale of the wrong sign, a value that wraps around, and a cut that costs more than it gives."""
    wide = torch.randn(130, inputs)
    four, scales = four_bits(wide)
    assert four.amin() == -8 and four.amax() == 7
    groups = scales.shape[1]
    assert inputs // groups == group
    grouped = wide.view(130, groups, -1)
    largest = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True))

    def error(scale: Tensor) -> Tensor:
        return (grouped - (grouped / scale).round().clamp(-8, 7) * scale).square().sum(dim=-1)

    ours = (grouped - four.view_as(grouped) * scales.float()[..., None]).square().sum(dim=-1)
    assert torch.allclose(ours, error(scales.float()[..., None]))
    for steps in (8.0, 8.75, 9.5):
        assert (ours <= error((largest / -steps).bfloat16().float()) * 1.0001).all()
    assert (ours.sum() / wide.square().sum()) ** 0.5 < most


def test_other_rounding_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a saved session that went on with weights that had been rounded in other groups."""
    kinds: list[Quantize] = ["none", "int8", "int4"]
    before = [rounding(kind) for kind in kinds]
    assert len(set(before)) == 3
    monkeypatch.setattr(quantized_weights, "_GROUPS", (64, 32))
    assert [rounding(kind) == text for kind, text in zip(kinds, before, strict=True)] == [True, True, False]


def test_four_bits_of_nothing_and_of_no_number() -> None:
    four, scales = four_bits(torch.cat((torch.zeros(1, 64), torch.full((1, 64), torch.nan), torch.ones(1, 64))))
    assert four[0].eq(0).all() and scales[0].isfinite().all()
    assert scales[1].isnan().all() and four[2].float().mul(scales[2].float()).sub(1).abs().max() < 0.02
