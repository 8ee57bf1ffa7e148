"""The optimiser of the language model: Muon for its layers' matrices, Adam for the rest, in float32 on a CPU.

Muon (Keller Jordan et al., https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix orthogonal by
Newton and Schulz's iteration before it is applied. `torch.optim.Muon` iterates in bfloat16, which is some twenty
times slower on a processor without its instructions. Rates are those of AdamW (Moonlight, arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2
"""An update's root mean square in rates, as AdamW's is."""


def orthogonal(matrix: Tensor) -> Tensor:
    """Return nearly the orthogonal factor of a matrix's polar decomposition, whose singular values are near 1.

    matrix: [A, B].
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class Muon(torch.optim.Optimizer):
    """Muon for a module's matrices whose names are chosen, Adam for all its other parameters."""

    def __init__(
        self, module: nn.Module, rate: float, betas: tuple[float, float], matrices: Callable[[str], bool]
    ) -> None:
        trained = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [one for name, one in trained if one.dim() == 2 and matrices(name)], "muon": True},
            {"params": [one for name, one in trained if not (one.dim() == 2 and matrices(name))], "muon": False},
        ]
        super().__init__(groups, {"lr": rate, "betas": betas})
        for group in self.param_groups:
            for parameter in group["params"]:
                names = ("exp_avg",) if group["muon"] else ("exp_avg", "exp_avg_sq", "step")
                self.state[parameter] = {
                    name: torch.zeros(()) if name == "step" else torch.zeros_like(parameter) for name in names
                }

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the gradients once. A closure is not called."""
        for group in self.param_groups:
            given = [one for one in group["params"] if one.grad is not None]
            if group["muon"]:
                self._orthogonal(given, group["lr"])
            else:
                self._adam(given, group["lr"], group["betas"])
        return None

    def _orthogonal(self, parameters: Iterable[Tensor], rate: float) -> None:
        for one in parameters:
            assert one.grad is not None
            momentum = self.state[one]["exp_avg"].lerp_(one.grad, 1 - _MOMENTUM)
            change = orthogonal(one.grad.lerp(momentum, _MOMENTUM))
            one.mul_(1 - rate * _WEIGHT_DECAY).add_(change, alpha=-rate * _RMS * max(one.shape) ** 0.5)

    def _adam(self, parameters: Iterable[Tensor], rate: float, betas: tuple[float, float]) -> None:
        for one in parameters:
            assert one.grad is not None
            state = self.state[one]
            state["step"] += 1
            mean = state["exp_avg"].lerp_(one.grad, 1 - betas[0])
            square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(one.grad, one.grad, value=1 - betas[1])
            first, second = (1 - beta ** state["step"].item() for beta in betas)
            one.addcdiv_(mean, (square / second).sqrt_().add_(1e-8), value=-rate / first)
