"""Stage 5, the quantiser: k-means codebooks in the space of the latents.

First of the latents themselves, so that the decoder can begin; then, going on from those, of what the encoder makes of
the waveform, so that its errors are part of what the codes stand for.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.demo import clips, encoder
from recipes.demo.codec import Codec
from recipes.demo.latents import SEMANTIC, Latents
from recipes.demo.recipe import CODEBOOK_DIM, CODEC, Run

_FRAMES = 60_000
_ROUNDS = 15


@torch.no_grad()
def make(run: Run, oracle: bool) -> None:
    """Writes `quantizer.pt`: the semantic and the acoustic codebooks.

    oracle: of the latents themselves instead of the encoder's.
    """
    latents = Latents.load(run.stages)
    crops = clips.Crops(clips.load(run.cache, "train"), encoder.FRAMES, run.seed)
    rows: list[tuple[Tensor, Tensor]] = []
    codec = encoder.loop(run.stages).average
    assert isinstance(codec, Codec)
    for _ in tqdm(range(_FRAMES // (encoder.FRAMES * 16)), desc="latents", unit="batch"):
        pcm, prosody = crops.batch(16)
        if oracle:
            semantic, acoustic = latents(pcm, prosody)
        else:
            semantic, acoustic = codec.quantizer.projections(codec.latent(pcm))
        rows.append((semantic[..., :SEMANTIC].flatten(0, 1), acoustic.flatten(0, 1)))
    path = run.stages / "quantizer.pt"
    if path.is_file():
        before = torch.load(path)
    else:
        semantic_books = CODEC["num_semantic_quantizers"]
        size = CODEC["codebook_size"]
        before = [
            [torch.zeros(size, SEMANTIC)] * semantic_books,
            [torch.zeros(size, CODEBOOK_DIM)] * (CODEC["num_quantizers"] - semantic_books),
        ]
    made, left = [], []
    for part, start in enumerate(before):
        books, shares = fit(torch.cat([row[part] for row in rows]), start, _ROUNDS)
        made.append(books)
        left.append([round(share, 4) for share in shares])
    torch.save(made, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    path.with_suffix(".json").write_text(json.dumps({"left": left, "oracle": oracle}))


def fit(rows: Tensor, before: list[Tensor], rounds: int) -> tuple[list[Tensor], list[float]]:
    """Residual k-means from the codebooks `before`, or from random rows where those are empty.

    rows: [N, dim]. Returns codebooks [K, dim], and the share of energy that is left after each.
    """
    total = (rows - rows.mean(0)).square().sum()
    residual, books, shares = rows.clone(), [], []
    for start in tqdm(before, desc="quantiser", unit="codebook"):
        drawn = residual[torch.randperm(len(rows))[: len(start)]]
        centres = _kmeans(residual, start if start.any() else drawn, rounds)
        residual -= centres[_nearest(residual, centres)]
        books.append(centres)
        shares.append(float(residual.square().sum() / total))
    return books, shares


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    halves = centres.square().sum(1) / 2
    return torch.cat([(some @ centres.T - halves).argmax(1) for some in rows.split(8192)])


def _kmeans(rows: Tensor, centres: Tensor, rounds: int) -> Tensor:
    for _ in range(rounds):
        nearest = _nearest(rows, centres)
        count = torch.bincount(nearest, minlength=len(centres)).unsqueeze(1)
        total = torch.zeros_like(centres).index_add_(0, nearest, rows)
        strays = rows[torch.randint(len(rows), (len(centres),))]  # a code that stands for nothing is put somewhere else
        centres = torch.where(count > 0, total / count.clamp(min=1), strays)
    return centres
