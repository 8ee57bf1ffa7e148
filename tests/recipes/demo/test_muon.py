"""The optimiser of the language model: orthogonal steps for matrices, Adam's for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.demo.muon import Muon, orthogonal


def _module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))


def _steps(module: nn.Module, optimiser: torch.optim.Optimizer, count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimiser.zero_grad()
        module(torch.randn(16, 8, generator=generator)).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_all_singular_values_become_nearly_one(shape: tuple[int, int]) -> None:
    """Also those that are a hundred times smaller than the largest."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    made = orthogonal(left @ torch.diag(torch.logspace(0, -2, min(shape))) @ right)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_step_has_the_size_of_adams() -> None:
    """A matrix moves by 0.2 rates in the root mean square, however small its gradient is."""
    module = _module(0)
    weight = module.get_parameter("0.weight")
    before = weight.detach().clone()
    optimiser = Muon(module, 1e-3, (0.9, 0.999), lambda name: name == "0.weight")
    (1e-6 * module(torch.randn(16, 8)).square().mean()).backward()
    optimiser.step()
    moved = (weight.detach() - before * (1 - 1e-5)).square().mean().sqrt()
    assert 0.6 * 0.2e-3 < moved < 1.3 * 0.2e-3


def test_parameters_that_are_no_chosen_matrices_move_as_in_adam() -> None:
    """The embedding and the norms have Adam's steps; a bias is none of Muon's even where its name is chosen."""
    ours, theirs = _module(0), _module(0)
    _steps(ours, Muon(ours, 1e-3, (0.9, 0.99), lambda name: "bias" in name), 5)
    _steps(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.9, 0.99)), 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)


def test_going_on_from_a_checkpoint_is_going_on() -> None:
    """The moments and the count of steps are in the optimiser's state."""
    whole, first, second = _module(0), _module(0), _module(1)
    _steps(whole, optimiser := Muon(whole, 1e-3, (0.9, 0.99), lambda name: name.startswith("0")), 3)
    _steps(whole, optimiser, 3, seed=2)
    _steps(first, begun := Muon(first, 1e-3, (0.9, 0.99), lambda name: name.startswith("0")), 3)
    second.load_state_dict(first.state_dict())
    resumed = Muon(second, 1e-3, (0.9, 0.99), lambda name: name.startswith("0"))
    resumed.load_state_dict(begun.state_dict())
    _steps(second, resumed, 3, seed=2)
    for mine, reference in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, reference)
