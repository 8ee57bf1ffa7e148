"""Mimi's split residual vector quantizer, with only the codebooks that are used (arXiv 2410.00037, section 3.3).

The semantic and the acoustic part each quantise their own projection of the same latent; within a part every codebook
quantises what the ones before it left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streaming.config import MimiConfig
from streaming.errors import CheckpointError
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import Linear, linear
from streaming.models.operations.native.quantizer import NativeQuantizer

_EPSILON = 1e-5


@dataclass(frozen=True)
class SplitQuantizer:
    """projections: per part, hidden to codebook_dim, or None where the checkpoint has none.

    codebooks: [Q, K, codebook_dim]; nearness: per codebook, a residual r to r.c - |c|^2 / 2 of each entry c, which is
    largest for the nearest; latents: [Q, K, hidden], codebooks after the output projection, so that decoding is a sum
    of table rows. at_once: all of `encode` in one call, where a CPU has it.
    """

    projections: tuple[Linear | None, ...]
    codebooks: Tensor
    nearness: tuple[Linear, ...]
    latents: Tensor
    num_semantic: int
    at_once: NativeQuantizer | None

    @staticmethod
    def load(
        source: TensorSource, config: MimiConfig, num_codebooks: int, activations: torch.dtype | None = None
    ) -> SplitQuantizer:
        """Load the first `num_codebooks` codebooks. activations: the type of latents, by default the source's.

        Raises `CheckpointError` if the codec has fewer.
        """
        if not config.num_semantic < num_codebooks <= config.num_codebooks:
            raise CheckpointError(
                f"{num_codebooks} codebooks asked of a codec that has {config.num_codebooks}, {config.num_semantic} of "
                "them semantic: the decoder and the codec do not belong together"
            )
        projected = config.codebook_dim != config.hidden_size
        table = (config.codebook_size, config.codebook_dim)
        projections, codebooks, latents = [], [], []
        for part, count in (("semantic", config.num_semantic), ("acoustic", num_codebooks - config.num_semantic)):
            prefix = f"quantizer.{part}_residual_vector_quantizer"
            if projected:
                into = source.load(f"{prefix}.input_proj.weight", (config.codebook_dim, config.hidden_size, 1))
                out = source.load(f"{prefix}.output_proj.weight", (config.hidden_size, config.codebook_dim, 1))
            projections.append(linear(into.squeeze(-1)) if projected else None)
            for index in range(count):
                book = f"{prefix}.layers.{index}.codebook"
                usage = source.load(f"{book}.cluster_usage", table[:1], torch.float32).clamp(min=_EPSILON)
                codes = source.load(f"{book}.embed_sum", table, torch.float32) / usage[:, None]
                codebooks.append(codes)
                latents.append(codes @ out.squeeze(-1).float().T if projected else codes)
        stacked = torch.stack(codebooks)
        nearness = [linear(book, bias=book.square().sum(-1) / -2) for book in codebooks]
        latents_dtype = activations or source.dtype
        return SplitQuantizer(
            projections=tuple(projections),
            codebooks=stacked,
            nearness=tuple(nearness),
            latents=torch.stack(latents).to(latents_dtype),
            num_semantic=config.num_semantic,
            at_once=NativeQuantizer.of(projections, nearness, stacked, config.num_semantic, latents_dtype),
        )

    def encode(self, latent: Tensor) -> Tensor:
        """latent: [B, hidden]. Returns codes [B, Q] int64, the nearest entries, found in float32."""
        return self.one_by_one(latent) if self.at_once is None else self.at_once(latent)

    def one_by_one(self, latent: Tensor) -> Tensor:
        """`encode`, one codebook after another."""
        codes: list[Tensor] = []
        bounds = (0, self.num_semantic, self.codebooks.shape[0])
        for part, projection in enumerate(self.projections):
            residual = (latent if projection is None else projection(latent)).float()
            for book in range(bounds[part], bounds[part + 1]):
                if book > bounds[part]:
                    residual = residual - self.codebooks[book - 1].index_select(0, codes[-1])
                codes.append(self.nearness[book](residual).argmax(dim=-1))
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes: [B, Q] int64. Returns the latent [B, hidden]."""
        return latent_of(codes, self.latents)


def latent_of(codes: Tensor, latents: Tensor) -> Tensor:
    """Return the sum of a row of each codebook's table. codes: [B, Q] int64; latents: [Q, K, hidden]."""
    return latents[torch.arange(codes.shape[1], device=codes.device), codes].sum(dim=1)
