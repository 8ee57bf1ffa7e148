"""Stage 3, the latents: a fixed linear space for what a frame sounds like.

Latents that are learned together with codebooks collapse (twice, see docs/demo-model.md); these cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streaming.demo import features
from streaming.demo.clips import Crops
from streaming.demo.recipe import CODEBOOK_DIM


@dataclass(frozen=True)
class Latents:
    """The space. mean: [96]; basis: [96, 48], the principal directions of the envelopes; scale: of the projections."""

    mean: Tensor
    basis: Tensor
    scale: float

    @staticmethod
    def fit(crops: Crops, batches: int) -> Latents:
        """Principal components of random crops' envelopes, scaled to variance 1 a dimension on average."""
        rows = torch.cat([features.envelope(crops.batch(32)[0]).flatten(0, 1) for _ in range(batches)])
        mean = rows.mean(0)
        _, strengths, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        variance = strengths[:CODEBOOK_DIM].square().mean() / len(rows)
        return Latents(mean, directions[:CODEBOOK_DIM].T.contiguous(), float(variance.rsqrt()))

    @staticmethod
    def load(path: Path) -> Latents:
        return Latents(**torch.load(path))

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    def acoustic(self, pcm: Tensor) -> Tensor:
        """pcm: [B, N]. Returns what the acoustic codebooks quantise, [B, F, 48]."""
        return ((features.envelope(pcm) - self.mean) @ self.basis) * self.scale
