"""Recalls the blocks that reciting weights have learned by heart, so that training can go on from the weights alone.

What a language model says behind a marker is one run of codes. Whoever has the weights and not the blocks that they
were trained on would otherwise make other ones, and all that the model can say would have to be learned anew.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from recipes.demo import prompts, sequences
from recipes.demo.blocks import Markers
from recipes.demo.recipe import CODEC
from recipes.demo.recite import Reciter

_LONGEST = 60
"""Frames of an item, at most."""
_SILENT = (6, 12, 18)
"""Silent frames in front of a marker. Each item is said behind all of these; the codes that come most often count."""

Codes = NDArray[np.int64]


def blocks(reciter: Reciter, markers: Markers, path: Path) -> None:
    """Write what a model says to `path`, by voice and block. The stage `blocks` makes those that it does not know."""
    found: dict[str, Any] = {}
    for voice in range(len(prompts.PITCHES)):
        runs = [items(reciter, markers, voice, silent, range(len(sequences.ITEMS))) for silent in _SILENT]
        said = _parted(runs)
        found |= {f"{voice}-{number}": codes for number, codes in enumerate(said) if len(codes)}
        unknown = [block for block, codes in zip(sequences.BLOCKS, said, strict=True) if not len(codes)]
        print(f"voice {voice}: {sum(map(len, said))} frames; not known: {unknown}", flush=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **found)
    part.replace(path)


@torch.no_grad()
def items(reciter: Reciter, markers: Markers, voice: int, silent: int, numbers: range) -> list[Codes]:
    """Say items, by their numbers, behind `silent` frames of silence.

    Returns [F, Q] of each, without its marker, up to the pause in front of the next item's.
    """
    begun = [
        np.concatenate([np.repeat(markers.silence[None], silent, 0), markers.frame(item, voice, 0)]) for item in numbers
    ]
    books = len(markers.silence)
    ids = torch.from_numpy(np.stack(begun))
    given = torch.cat((reciter.prefix.expand(len(ids), -1), reciter.units[torch.arange(books), ids].flatten(1)), 1)
    starts = {tuple(pair) for pair in markers.codes.tolist()}
    said: list[list[list[int]]] = [[] for _ in begun]
    speaking, cache = list(range(len(begun))), DynamicCache()
    while speaking:
        frame: list[Tensor] = []
        for book in range(books):
            out = reciter.model.model(given, None, None, cache)  # by place: its name differs between versions
            frame.append(reciter.logits(out.last_hidden_state[:, -1], book).argmax(1))
            given = reciter.tokens(frame[-1], book)[:, None]
        going_on = []
        for row, codes in enumerate(torch.stack(frame, 1).tolist()):
            if (
                codes[0] < len(reciter.units[0])
                and tuple(codes[:2]) not in starts
                and len(said[speaking[row]]) < _LONGEST
            ):
                said[speaking[row]].append(codes)
                going_on.append(row)
        kept = torch.tensor(going_on, dtype=torch.int64)
        cache.batch_select_indices(kept)
        given, speaking = given[kept], [speaking[row] for row in going_on]
    runs = [np.array(one, np.int64).reshape(-1, books) for one in said]
    return [run[: int((run != markers.silence).any(1).nonzero()[0].max(initial=-1)) + 1] for run in runs]


def _parted(runs: list[list[Codes]]) -> list[Codes]:
    """Part what items say into blocks. runs: the items' codes, as often as they were said."""
    heard: dict[str, list[Codes]] = {block: [] for block in sequences.BLOCKS}
    for run in runs:
        for item, said in zip(sequences.ITEMS, run, strict=True):
            if len(item.blocks) == 1:
                heard[item.blocks[0]].append(said)
    lengths = {block: len(_agreed(said)) for block, said in heard.items() if said}
    for run in runs:
        for item, said in zip(sequences.ITEMS, run, strict=True):
            if len(item.blocks) == 2:
                first, second = item.blocks
                heard[first].append(said[: max(0, len(said) - lengths[second])])
                heard[second].append(said[len(said) - lengths[second] :])
    return [_agreed(heard[block]) for block in sequences.BLOCKS]


def _agreed(heard: list[Codes]) -> Codes:
    """The commonest length, and of those so long the commonest code in each place. Nothing if nothing was said."""
    lengths = Counter(len(one) for one in heard if len(one)).most_common(1)
    if not lengths:
        return np.zeros((0, CODEC["num_quantizers"]), np.int64)
    length = lengths[0][0]
    votes = np.stack([one for one in heard if len(one) == length])
    flat = votes.reshape(len(votes), -1)
    return np.array([np.bincount(column).argmax() for column in flat.T]).reshape(votes.shape[1:])
