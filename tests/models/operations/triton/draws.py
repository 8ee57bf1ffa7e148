"""Draws of slots with many kinds of options, by kernels and by the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from streaming.config import Sampling
from streaming.models.operations.base import Operations
from streaming.models.operations.torch import TorchOperations
from streaming.models.sampler import Drawing, SamplerState

OPTIONS = [
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, top_k=64, top_p=0.9, seed=2**63 - 1),
    Sampling(temperature=1e-30, top_k=5, seed=4),
    Sampling(temperature=10.0, top_k=1, seed=5),
    Sampling(temperature=0.7, top_k=64, top_p=1e-6, seed=6),
    Sampling(temperature=2.5, top_k=63, top_p=0.5, seed=7),
]


def options(count: int, device: torch.device) -> SamplerState:
    state = SamplerState.allocate(count, device)
    for slot in range(count):
        sampling = OPTIONS[slot % len(OPTIONS)]
        state.set(slot, replace(sampling, seed=sampling.seed + slot % 5 if sampling.seed < 2**62 else sampling.seed))
    return state


def drawing(count: int, books: int, device: torch.device, seed: int = 0) -> Drawing:
    """Rows of which a third listens, a third speaks and a third does neither. Their slots are not in their order."""
    generator = torch.Generator().manual_seed(seed)
    doing = torch.arange(count) % 3
    flags = torch.stack((doing == 0, doing == 1), dim=1).to(device)  # as the step has them: columns of one tensor
    return Drawing(
        (torch.arange(count) + 3).remainder(count).flip(0).to(device),
        torch.randint(10**6, (count,), generator=generator).to(device),
        flags[:, 0],
        flags[:, 1],
        torch.randint(7, (count, books), generator=generator).to(device),
        torch.zeros(count, dtype=torch.bool, device=device),
        torch.ones(count, dtype=torch.bool, device=device),
    )


def assert_same_draws(operations: Operations, logits: Tensor, state: SamplerState, book: int, seed: int = 0) -> Drawing:
    ours, wanted = (drawing(len(logits), 4, logits.device, seed) for _ in range(2))
    unit = operations.draw(logits, book, state, ours, few=True)
    assert torch.equal(unit, TorchOperations().draw(logits, book, state, wanted, few=True))
    for name in ("codes", "ended", "finite"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name)), name
    return ours
