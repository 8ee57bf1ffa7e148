"""Stage 13, reciting: the language model learns to understand how a sequence begins, and to say how it goes on.

The prompts' frames after which somebody might begin to speak each have the first code of the right item's marker as
their target: the first token is the head that understands. Heads that are thrown away, for the item being said and
for the speaker's voice, help it to listen. What follows a marker is one fixed run of codes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from recipes.demo import blocks, export, prompts, sequences, shipped
from recipes.demo.blocks import Book, Markers
from recipes.demo.files import unit_tokenizer
from recipes.demo.loop import Loop
from recipes.demo.muon import Muon
from recipes.demo.prompts import Prompt
from recipes.demo.recipe import CODEC, Run
from streaming.config import Sampling
from streaming.models.token_layout import AUDIO, END_OF_AUDIO, unit_name

RATE = 2e-3
DECAY = 0.99
BATCH = 6
CONTINUATION = 34
"""Frames of a continuation in training: some four items. With ten, what follows its own first item was not learned."""
LOOSE_CONTINUATION = 50
"""The same in loose rows."""
CORRUPTED = 0.03
"""Of the codes that are given, so many are any others; but for markers, of what is said, too."""
WEIGHTS = {"begin": 1.0, "item": 0.3, "voice": 0.3, "said": 1.0, "manner": 1.0}
LOOSE = 0.2
"""Share of rows without a prompt: the context is like that when it has slid past the prompt."""
TAILS = 0.6
"""Share of loose rows that begin with the end of any prompt, and go on with an item of which it tells nothing."""
LOOSE_KINDS = {"number": 0.42, "day": 0.12, "month": 0.14, "letter": 0.14, "rhyme": 0.18}
"""Shares of the kinds among loose rows."""
BEGINNINGS = 0.1
"""Share of batches that hold nothing but beginnings: a few frames of anything, a marker, and how its block begins. What
follows has to be read from the marker alone; in longer rows, what was said before gives most of it away.
"""
BEGINNINGS_SIZE = 8
"""A batch of beginnings has so many rows for each row of another batch."""
BEGINNING_KINDS = {"number": 0.6, "day": 0.05, "month": 0.07, "letter": 0.1, "rhyme": 0.18}
"""Shares of the kinds among beginnings."""
WHOLE = 0.9
"""Share of beginnings that go on to their item's end."""
FRIENDLY_KEPT = 0.25
"""Of the targets that are the friendly beginning, which are a third of all and easy."""
SHARPNESS = 4.0
"""What is exported has its logits multiplied by this: the default temperature of 0.8 draws as 0.2 would. What is right
is one token nearly everywhere, and a wrong one in a block is heard.
"""
_LOOK_STEPS = 200
"""Steps after which new shards and blocks are looked for."""
_NONE = -100
_VOICE = blocks.MANNER[0]


class Reciter(nn.Module):
    """The language model and its heads, which are not exported."""

    units: Tensor

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        width = model.config.hidden_size
        self.item = nn.Linear(width, len(sequences.ITEMS))
        self.voice = nn.Linear(width, len(prompts.PITCHES))
        tokenizer = unit_tokenizer(CODEC["num_quantizers"], CODEC["codebook_size"])
        units = [
            [tokenizer.token_to_id(unit_name(code, book)) for code in range(CODEC["codebook_size"])]
            for book in range(CODEC["num_quantizers"])
        ]
        self.register_buffer("units", torch.tensor(units), persistent=False)
        end = tokenizer.token_to_id(END_OF_AUDIO)
        assert end is not None
        self.end = end
        self.prefix = torch.tensor(tokenizer.encode(AUDIO).ids)

    def hidden(self, codes: Tensor) -> Tensor:
        """codes: [B, F, Q]. Returns what predicts each code, [B, F + 1, Q, D]; of the last frame the first is all."""
        books = torch.arange(codes.shape[2])
        ids = torch.cat((self.prefix.expand(len(codes), -1), self.units[books, codes].flatten(1)), 1)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, len(self.prefix) - 1 :]
        pad = codes.shape[2] - hidden.shape[1] % codes.shape[2]
        frames: Tensor = F.pad(hidden, (0, 0, 0, pad)).unflatten(1, (-1, codes.shape[2]))
        return frames

    def logits(self, hidden: Tensor, book: int) -> Tensor:
        """hidden: [N, D]. Returns [N, K] of a codebook's codes; of the first one [N, K + 1], the last is `</audio>`."""
        rows = self.units[book]
        if book == 0:
            rows = torch.cat((rows, rows.new_tensor([self.end])))
        embedding: Tensor = self.model.model.embed_tokens.weight
        return hidden @ embedding[rows].T

    def all_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of all tokens, [N, V], of hidden states [N, D].

        Training is against all of them: other programs generate without a mask of the codebook whose turn it is.
        """
        embedding: Tensor = self.model.model.embed_tokens.weight
        return hidden @ embedding.T

    def tokens(self, codes: Tensor, book: int) -> Tensor:
        """Return the tokens of a codebook's codes, [N]; K of the first one is `</audio>`."""
        ends = codes == self.units.shape[1]
        return torch.where(ends, self.end, self.units[book][codes.masked_fill(ends, 0)])


@dataclass(frozen=True)
class Batch:
    """given: [B, F, Q] codes, padded. The targets, -100 where there is none: begin [B, F + 1] of the first code, K for
    the end; item, voice [B, F + 1]; said [B, F, Q]; manner [B, F, Q], voice and pace in a first marker.
    """

    given: Tensor
    begin: Tensor
    item: Tensor
    voice: Tensor
    said: Tensor
    manner: Tensor


class Rows:
    """Draws rows: prompts, most of them gone on with once there is a book."""

    def __init__(self, found: list[Prompt], markers: Markers, book: Book | None, seed: int, alone: float) -> None:
        self.found, self.markers, self.book, self.alone = found, markers, book, alone
        self.draw = np.random.default_rng(seed)
        self.order: list[int] = []

    def batch(self, size: int) -> Batch:
        """Rows of similar length."""
        if self.book is not None and self.found and self.draw.random() < BEGINNINGS:
            return collate([self.beginning() for _ in range(BEGINNINGS_SIZE * size)])
        if not self.order:
            drawn = self.draw.permutation(len(self.found))[: 8 * size]
            drawn = drawn[np.argsort([len(self.found[index].codes) for index in drawn])]
            groups = [drawn[at : at + size] for at in range(0, len(drawn), size)]
            self.order = [int(index) for group in self.draw.permutation(len(groups)) for index in groups[group]]
        picked, self.order = self.order[:size], self.order[size:]
        loose = [self.book is not None and self.draw.random() < LOOSE for _ in picked]
        drawn_rows = zip(picked, loose, strict=True)
        return collate([self.loose() if is_loose else self.row(self.found[index]) for index, is_loose in drawn_rows])

    def row(self, prompt: Prompt) -> dict[str, NDArray[np.int64]]:
        """One row's arrays, as in `Batch`."""
        cut = len(prompt.codes)
        after: list[NDArray[np.int64]] = []
        ended = False
        if self.book is not None and self.draw.random() >= self.alone:
            places = np.flatnonzero(prompt.begin >= 0)
            places = places[places >= 4] if len(places[places >= 4]) else places
            if len(places):
                other = places[prompt.begin[places] != sequences.ITEMS.index(sequences.follow([])[0])]
                places = other if len(other) and self.draw.random() >= FRIENDLY_KEPT else places
                cut = int(places[self.draw.integers(len(places))]) + 1
                after, ended = self._continuation(prompt, int(prompt.begin[cut - 1]))
        return lay(prompt, cut, after, ended, self.markers, self.draw)

    def loose(self) -> dict[str, NDArray[np.int64]]:
        """A row that begins within what the model itself says; from its second item on there are targets."""
        assert self.book is not None
        begun = [self._item(LOOSE_KINDS)]
        if begun[0].kind == "number":  # the one before tells the step
            before = begun[0].place - int(self.draw.choice(sequences.STEPS))
            begun = [sequences.number(before), *begun] if 0 <= before <= 100 else begun
        items = [*begun, *sequences.rest(begun)]
        said = self.book.say(items, int(self.draw.integers(len(blocks.SOUNDS))), int(self.draw.integers(3)))
        if self.found and self.draw.random() < TAILS:
            return self._after_a_tail(*_at_most(said, LOOSE_CONTINUATION))
        known = len(sequences.blocks_of(begun))
        heard = np.concatenate(said[:known])
        codes = heard[int(self.draw.integers(len(said[0]))) :].astype(np.int16)
        nobody = np.full(len(codes), -1, np.int16)
        kept, ended = _at_most(said[known:], LOOSE_CONTINUATION)
        return lay(Prompt(codes, nobody, nobody, 0.0, 0.0, [], ""), len(codes), kept, ended, self.markers, self.draw)

    def beginning(self) -> dict[str, NDArray[np.int64]]:
        """Return a row: the first frames of any item, behind the last ones of any prompt or of another item."""
        assert self.book is not None
        item = self._item(BEGINNING_KINDS)
        voice, pace = int(self.draw.integers(len(blocks.SOUNDS))), int(self.draw.integers(3))
        said = self.book.say([item], voice, pace)
        frames = sum(map(len, said)) if self.draw.random() < WHOLE else int(self.draw.integers(3, 6))
        if self.draw.random() < 0.3:
            other = sequences.ITEMS[int(self.draw.integers(len(sequences.ITEMS)))]
            tail = np.concatenate(self.book.say([other], voice, pace))[-int(self.draw.integers(1, 8)) :]
            return self._behind(tail.astype(np.int16), _at_most(said, frames)[0], False)
        return self._after_a_tail(_at_most(said, frames)[0], False)

    def _item(self, kinds: dict[str, float]) -> sequences.Item:
        """Draw an item. kinds: their shares."""
        kind = self.draw.choice(list(kinds), p=list(kinds.values()))
        of_kind = [item for item in sequences.ITEMS if item.kind == kind]
        return of_kind[int(self.draw.integers(len(of_kind)))]

    def _after_a_tail(self, said: list[NDArray[np.int64]], ended: bool) -> dict[str, NDArray[np.int64]]:
        """What is said behind the last frames of any prompt, which do not tell item, voice or pace."""
        prompt = self.found[int(self.draw.integers(len(self.found)))]
        return self._behind(prompt.codes[-int(self.draw.integers(1, 12)) :], said, ended)

    def _behind(
        self, tail: NDArray[np.int16], said: list[NDArray[np.int64]], ended: bool
    ) -> dict[str, NDArray[np.int64]]:
        nobody = np.full(len(tail), -1, np.int16)
        row = lay(Prompt(tail, nobody, nobody, 0.0, 0.0, [], ""), len(tail), said, ended, self.markers, self.draw)
        row["begin"][len(tail)] = row["manner"][len(tail)] = _NONE
        return row

    def _continuation(self, prompt: Prompt, first: int) -> tuple[list[NDArray[np.int64]], bool]:
        assert self.book is not None
        items = going_on(prompt, first)
        said = self.book.say(items, blocks.voice_of(prompt.pitch), blocks.pace_of(prompt.gap))
        return _at_most(said, CONTINUATION)


def _at_most(said: list[NDArray[np.int64]], frames: int) -> tuple[list[NDArray[np.int64]], bool]:
    """The first frames of what is said, item by item, and whether that is all of it."""
    kept: list[NDArray[np.int64]] = []
    for part in said:
        room = frames - sum(map(len, kept))
        if room <= 0:
            return kept, False
        kept.append(part[:room])
    return kept, not kept or len(kept[-1]) == len(said[-1])


def going_on(prompt: Prompt, first: int) -> list[sequences.Item]:
    """All items from the first one that is said, as the prompt's speaker would have it."""
    begun = sequences.ITEMS[first]
    said = [sequences.ITEMS[number] for number in prompt.said]
    for length in range(len(said), -1, -1):
        rest = sequences.follow(said[:length])
        if rest[0] == begun:
            return rest
    raise AssertionError("a prompt's targets are what follows some of its items")


def lay(
    prompt: Prompt,
    cut: int,
    after: list[NDArray[np.int64]],
    ended: bool,
    markers: Markers,
    draw: np.random.Generator | None,
) -> dict[str, NDArray[np.int64]]:
    """A prompt's first `cut` frames and what is said then, as a row.

    draw: of what is corrupted, and of which friendly targets are kept; without it, nothing is and all are.
    """
    codes = np.concatenate([prompt.codes[:cut].astype(np.int64), *after])
    frames, books = codes.shape
    begin, item, voice = (np.full(frames + 1, _NONE) for _ in range(3))
    said, manner = (np.full((frames, books), _NONE) for _ in range(2))
    wanted = prompt.begin[:cut]
    begin[1 : cut + 1] = np.where(wanted >= 0, markers.codes[wanted, 0], _NONE)
    item[1 : cut + 1] = np.where(prompt.item[:cut] >= 0, prompt.item[:cut], _NONE)
    if prompt.pitch > 0:
        voice[1 : cut + 1] = np.where(wanted >= 0, blocks.voice_of(prompt.pitch), _NONE)
    given = codes.copy()
    if draw is not None:
        friendly = begin == markers.codes[sequences.ITEMS.index(sequences.follow([])[0]), 0]
        begin[friendly & (draw.random(frames + 1) >= FRIENDLY_KEPT)] = _NONE
        wrong = draw.random((frames, books)) < CORRUPTED
        wrong[cut + np.cumsum([0, *map(len, after)])[:-1]] = False
        given[wrong] = draw.integers(CODEC["codebook_size"], size=int(wrong.sum()))
    said[cut:] = codes[cut:]
    place = cut
    for part in after:  # what is decided: which item, by its marker's first code, and how each of its blocks begins
        for first in range(place, min(place + 2, frames)):
            begin[first], said[first, 0] = codes[first, 0], _NONE
        place += len(part)
    if after:
        manner[cut, list(blocks.MANNER)], said[cut, list(blocks.MANNER)] = codes[cut, list(blocks.MANNER)], _NONE
    if ended:
        begin[frames] = CODEC["codebook_size"]
    targets = {"begin": begin, "item": item, "voice": voice, "said": said, "manner": manner}
    return {"given": given} | targets


def collate(rows: list[dict[str, NDArray[np.int64]]]) -> Batch:
    """Rows padded at their ends."""
    longest = max(len(row["given"]) for row in rows)

    def padded(name: str, extra: int) -> Tensor:
        made = np.full((len(rows), longest + extra, *rows[0][name].shape[1:]), 0 if name == "given" else _NONE)
        for place, row in enumerate(rows):
            made[place, : len(row[name])] = row[name]
        return torch.from_numpy(made)

    return Batch(*(padded(name, name in ("begin", "item", "voice")) for name in Batch.__dataclass_fields__))


def losses(reciter: Reciter, batch: Batch) -> dict[str, Tensor]:
    """Mean losses in nats, by name; those without any target are left out."""
    hidden = reciter.hidden(batch.given)
    ends = hidden[:, :, 0]
    found = {}
    for name, head in (("begin", None), ("item", reciter.item), ("voice", reciter.voice)):
        target = getattr(batch, name)
        where = target != _NONE
        if where.any():
            rows = ends[where]
            if head is None:
                found[name] = F.cross_entropy(reciter.all_logits(rows), reciter.tokens(target[where], 0))
            else:
                found[name] = F.cross_entropy(head(rows), target[where])
    for name in ("said", "manner"):
        target = getattr(batch, name)
        total, count = torch.zeros(()), 0
        for book in range(target.shape[2]):
            where = target[:, :, book] != _NONE
            if where.any():
                logits = reciter.all_logits(hidden[:, :-1, book][where])
                tokens = reciter.tokens(target[:, :, book][where], book)
                total = total + F.cross_entropy(logits, tokens, reduction="sum")
                count += int(where.sum())
        if count:
            found[name] = total / count
    return found


def reciter() -> Reciter:
    """Return the shipped weights as `ship` found them, before it sharpened them."""
    made = Reciter(shipped.language_model())
    with torch.no_grad():
        made.model.model.norm.weight.div_(SHARPNESS)
    return made


def state(folder: Path) -> Loop:
    """The stage's state, from its checkpoint or from the shipped weights."""
    return Loop(folder / "recite.pt", {"model": reciter()}, RATE, "model", DECAY, optimiser=_optimiser)


def _optimiser(reciter: nn.Module, rate: float) -> Muon:
    return Muon(reciter, rate, (0.9, 0.999), lambda name: ".layers." in name)


def shards(folder: Path) -> list[Prompt]:
    """All prompts of a folder."""
    return [prompt for path in sorted(folder.glob("*.npz")) for prompt in prompts.load(path)]


def last_targets(found: list[Prompt]) -> Iterator[tuple[Prompt, int]]:
    """Each prompt with the last frame that has a target."""
    for prompt in found:
        places = np.flatnonzero(prompt.begin >= 0)
        if len(places) and prompt.said:
            yield prompt, int(places[-1])


@torch.no_grad()
def understood(reciter: Reciter, markers: Markers, found: list[Prompt], size: int = 8) -> tuple[float, float]:
    """Return of how many prompts the likeliest first token is the right item's, and of how many the likeliest voice is
    the nearest to the speaker's. Both are shares.
    """
    right = near = total = 0
    pairs = sorted(last_targets(found), key=lambda pair: len(pair[0].codes))
    for at in range(0, len(pairs), size):
        some = pairs[at : at + size]
        rows = []
        for prompt, last in some:
            voice, pace = blocks.voice_of(prompt.pitch), blocks.pace_of(prompt.gap)
            rows.append(lay(prompt, last + 1, [markers.frame(prompt.begin[last], voice, pace)], False, markers, None))
        hidden = reciter.hidden(collate(rows).given)
        for place, (prompt, last) in enumerate(some):
            item, voice = (
                int(reciter.logits(hidden[place, last + 1, book][None], book).argmax()) for book in (0, _VOICE)
            )
            right += item == markers.codes[prompt.begin[last], 0]
            near += voice == markers.voices[blocks.voice_of(prompt.pitch)]
            total += 1
    return right / max(1, total), near / max(1, total)


def train(run: Run, budget: float, falling: float, alone: float, processes: int) -> None:
    """Train until so many CPU seconds were spent in all; the rate falls over the last `falling` ones.

    alone: share of prompts that are not gone on with. processes: so many train the same weights. Shards and blocks
    that appear meanwhile are taken up.
    """
    codec = shipped.codec()
    markers = Markers.of(codec)
    loop = state(run.stages)
    tests = {folder.name: shards(folder) for folder in sorted((run.root / "tests").glob("*"))}
    tests = {name: found for name, found in tests.items() if found}
    reciter = loop.modules["model"]
    assert isinstance(reciter, Reciter)
    base = RATE * run.rate
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # elsewhere bfloat16 is slower

    def steps_of(seed: int) -> Callable[[], tuple[dict[str, float], float]]:
        """Steps on rows of its own."""
        rows = Rows([], markers, None, seed, alone)
        taken = 0

        def step() -> tuple[dict[str, float], float]:
            nonlocal taken
            if taken % _LOOK_STEPS == 0:
                rows.found = shards(run.root / "prompts")
                rows.book = Book.load(run.root / "blocks.npz", markers)
            taken += 1
            loop.rate = base * min(1.0, max(0.05, (budget - loop.seconds) / falling))
            batch = rows.batch(run.batch or BATCH)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                found = losses(reciter, batch)
            norm = loop.update("model", sum((WEIGHTS[name] * loss for name, loss in found.items()), torch.zeros(())))
            return {name: loss.item() for name, loss in found.items()} | {"norm": norm}, batch.given[
                ..., 0
            ].numel() * 0.08

        return step

    def check(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Reciter)
        shares = {name: understood(average, markers, found[:200]) for name, found in tests.items()}
        return {name: right for name, (right, _) in shares.items()} | {
            f"{name} voice": near for name, (_, near) in shares.items()
        }

    first, *others = (steps_of(run.seed + loop.steps + 1_000_000 * number) for number in range(processes))
    loop.run(first, check, run.minutes, budget, others)


def ship(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `target/decoder` from the last weights, and `target/codec`, which is the package's own.

    At the end of training, when the rate is low, their average is no better.
    """
    reciter = state(folder).modules["model"]
    assert isinstance(reciter, Reciter)
    with torch.no_grad():
        reciter.model.model.norm.weight.mul_(SHARPNESS)
    export.write_decoder(target / "decoder", reciter.model, dtype)
    sampling = {"do_sample": True, "temperature": Sampling().temperature, "top_k": Sampling().top_k}
    (target / "decoder" / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(shipped.FOLDER / "codec", target / "codec", dirs_exist_ok=True)
