"""Stage 3, the latents: a fixed linear space for what a frame sounds like.

Latents that are learned together with codebooks collapse (twice, see docs/demo-model.md); these cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipes.demo import features
from recipes.demo.clips import Crops
from recipes.demo.recipe import CODEBOOK_DIM

_FILE = "latents.pt"
PROSODY_WEIGHT = 10.0
"""Against log amplitudes: leaves pitch off by 4 %, and costs the envelope nothing that matters."""
SEMANTIC = features.PROSODY + features.WINDOWS


@dataclass(frozen=True)
class Latents:
    """The space: distances in it are those of log spectra, of pitch and of voicing. mean: [96], of envelopes; basis:
    [92, 48], the principal directions of their shapes, levels apart; scale: of everything, for comfortable numbers.
    """

    mean: Tensor
    basis: Tensor
    scale: float

    @staticmethod
    def fit(crops: Crops, batches: int) -> Latents:
        """Principal components of random crops, scaled to variance 1 a dimension on average."""
        rows = torch.cat([features.envelope(crops.batch(32)[0]).flatten(0, 1) for _ in range(batches)])
        mean = rows.mean(0)
        variance = (rows - mean).square().sum(1).mean() / CODEBOOK_DIM
        directions = torch.linalg.svd(_split(rows - mean)[1], full_matrices=False)[2]
        return Latents(mean, directions[:CODEBOOK_DIM].T.contiguous(), float(variance.rsqrt()))

    @staticmethod
    def load(stages: Path) -> Latents:
        """From the stages' folder."""
        return Latents(**torch.load(stages / _FILE))

    def to(self, device: torch.device) -> Latents:
        """The same on a device."""
        return Latents(self.mean.to(device), self.basis.to(device), self.scale)

    def save(self, stages: Path) -> None:
        """To the stages' folder."""
        torch.save(vars(self), stages / _FILE)

    def __call__(self, pcm: Tensor, prosody: Tensor) -> tuple[Tensor, Tensor]:
        """pcm: [B, N]; prosody: [B, F, 8]. What the semantic codebooks quantise, voicing, pitch and levels, [B, F, 12],
        and what the acoustic ones do, the shape of the spectra, [B, F, 48].
        """
        levels, shapes = _split(features.envelope(pcm) - self.mean)
        semantic = torch.cat((prosody * PROSODY_WEIGHT, levels), -1)
        return semantic * self.scale, (shapes @ self.basis) * self.scale


def _split(envelopes: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 96] to the windows' levels [..., 4] and the rest [..., 92]."""
    cepstra = envelopes.unflatten(-1, (features.WINDOWS, features.CEPSTRA))
    return cepstra[..., 0], cepstra[..., 1:].flatten(-2)
