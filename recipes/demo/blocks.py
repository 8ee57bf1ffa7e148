"""Stage 12, blocks: what the model says, as one fixed run of codes for every block and voice, understood by the judge.

Codes of a word are hardly ever the same twice, and what is never the same cannot be learned by heart. So each block is
one rendering, in each of eight voices, that begins on a frame's boundary. In front of it stands a marker: one silent
frame whose first code alone names the item, so that all of the decision is one token, and the third the voice, the
fourth the pace.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from recipes.demo import judges, prompts, sequences
from recipes.demo.codec import Codec
from recipes.demo.sequences import Item
from streaming.audio import FRAME, SAMPLE_RATE

PAUSES = (0, 2, 6)
"""Silent frames behind an item, by pace: fast, usual, slow."""
_FIRST_MARKER = 30
"""Markers begin behind the codes that stand for silence itself."""
MANNER = (2, 3)
"""Codebooks of a marker that tell the voice and the pace."""
ONES = 4
"""The codebook of a marker that tells the second block."""


@dataclass(frozen=True)
class Markers:
    """The codes of markers.

    codes: [items, 2], the first two of each item's marker; voices: [8], the third by voice; paces: [3], the fourth;
    ones: [10], the fifth where two blocks say a number, by the second one's digit, so that there is a token to look at
    between the blocks; silence: [Q], a silent frame, which has the rest. All int64.
    """

    codes: NDArray[np.int64]
    voices: NDArray[np.int64]
    paces: NDArray[np.int64]
    ones: NDArray[np.int64]
    silence: NDArray[np.int64]

    @staticmethod
    @torch.no_grad()
    def of(codec: Codec) -> Markers:
        """Computed from the codebooks: first codes whose sum with a second one is closest to silence."""
        latent = codec.latent(torch.zeros(1, 24 * FRAME))
        semantic, shape = (part[0, 12:].mean(0) for part in codec.quantizer.projections(latent))
        silence = codec.quantizer.encode(latent)[0, -1].numpy().astype(np.int64)
        parts = codec.quantizer.parts()
        first, second = parts[0].books()
        nearest = torch.cdist(semantic - first, second).min(1)
        order = nearest.values.argsort()[_FIRST_MARKER : _FIRST_MARKER + len(sequences.ITEMS)]
        codes = torch.stack((order, nearest.indices[order]), 1).numpy()
        books = list(parts[1].books())
        voices = (books[0] - shape).norm(dim=1).argsort()[1 : 1 + len(prompts.PITCHES)].numpy()
        rest = shape - books[0][silence[MANNER[0]]]
        paces = (books[1] - rest).norm(dim=1).argsort()[1 : 1 + len(PAUSES)].numpy()
        rest = rest - books[1][silence[MANNER[1]]]
        near = [code for code in (books[2] - rest).norm(dim=1).argsort().tolist() if code != silence[ONES]]
        return Markers(codes, voices, paces, np.array(near[:10]), silence)

    def frame(self, item: int, voice: int, pace: int) -> NDArray[np.int64]:
        """[1, Q]: the marker in front of an item."""
        made = self.silence.copy()
        made[:2] = self.codes[item]
        made[MANNER[0]], made[MANNER[1]] = self.voices[voice], self.paces[pace]
        if len(sequences.ITEMS[item].blocks) == 2:
            made[ONES] = self.ones[sequences.ITEMS[item].place % 10]
        return made[None]


@dataclass(frozen=True)
class Book:
    """All blocks of all voices. said: by voice and block, codes [F, Q] int64."""

    markers: Markers
    said: list[list[NDArray[np.int64]]]

    @staticmethod
    def load(path: Path, markers: Markers) -> Book | None:
        """What `make` wrote, once it is all there."""
        raw = np.load(path) if path.is_file() else {}
        if len(raw) < len(prompts.PITCHES) * len(sequences.BLOCKS):
            return None
        return Book(
            markers,
            [
                [raw[f"{voice}-{block}"].astype(np.int64) for block in range(len(sequences.BLOCKS))]
                for voice in range(len(prompts.PITCHES))
            ],
        )

    def say(self, items: list[Item], voice: int, pace: int) -> list[NDArray[np.int64]]:
        """Return the frames of each of the items' blocks, [F, Q], one run after the other.

        An item's first run begins with its marker, and its last one ends with a pause.
        """
        found = []
        for item in items:
            runs = [self.said[voice][block] for block in sequences.blocks_of([item])]
            runs[0] = np.concatenate([self.markers.frame(sequences.ITEMS.index(item), voice, pace), runs[0]])
            runs[-1] = np.concatenate([runs[-1], np.repeat(self.markers.silence[None], PAUSES[pace], 0)])
            found += runs
        return found


def voice_of(pitch: float) -> int:
    """Return the voice in which the model speaks whose pitch, as it sounds, is the nearest."""
    return int(np.abs(np.log(SOUNDS / max(pitch, 1.0))).argmin())


def pace_of(gap: float) -> int:
    """0, 1 or 2 by the seconds from item to item; the usual one where there is one item."""
    return 1 if gap == 0 else int(np.searchsorted(prompts.PACES, gap))


SOUNDS = np.array([120.0, 140.0, 151.0, 177.0, 207.0, 233.0, 253.0, 277.0])
"""Pitch of each voice in Hz as its blocks sound when they are decoded, which is above `prompts.PITCHES`."""
HIBARI_PITCH = 202.0
"""Median pitch in Hz of hibari's voice."""
RESAMPLED = (0.80, 0.82, 0.87, 0.92, 1.0, 1.03, 1.08, 1.06)
"""Of each voice: pitch and formants together; the rest of its pitch is the pulse train's."""
_SPEEDS = (1.0, 0.9, 1.1)
_MARKS = (",", ".", "")
_OFFSETS = (0, 960)
"""Samples from the frame's beginning to the block's."""
_LEVEL = 10 ** (-22 / 20)
_PLAIN = len(_SPEEDS) * len(_MARKS) * len(_OFFSETS)
_BEFORE, _AFTER = 12, 2
"""Silent frames around a rendering when it is encoded."""


class Renderer:
    """Renderings of blocks in the eight voices, as codes."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._cast = prompts.Cast(0)

    def __call__(self, block: str, voice: int, attempt: int) -> NDArray[np.int64]:
        """Return codes [F, Q]. The first attempts differ in pace, ending and offset; later ones draw it all."""
        draw = np.random.default_rng(attempt)
        speed = _SPEEDS[attempt // len(_OFFSETS) % len(_SPEEDS)]
        mark = _MARKS[attempt // (len(_OFFSETS) * len(_SPEEDS)) % len(_MARKS)]
        offset = _OFFSETS[attempt % len(_OFFSETS)]
        resample, bent = RESAMPLED[voice], 1.0
        if attempt >= _PLAIN:
            speed, offset = draw.uniform(0.8, 1.2), int(draw.integers(1200))
            resample, bent = resample * draw.uniform(0.95, 1.03), draw.uniform(0.93, 1.03)
        if block.endswith("-"):
            mark = ""
        pitch = prompts.PITCHES[voice] / HIBARI_PITCH / resample * bent
        wave = self._cast._hibari(self._cast.phonemes(block.rstrip("-")) + mark, speed / resample, pitch, draw)
        wave = prompts.trim(np.asarray(soxr.resample(wave, SAMPLE_RATE * resample, SAMPLE_RATE), np.float32))
        loud = wave[np.abs(wave) > 0.02 * np.abs(wave).max()]
        wave = wave * (_LEVEL / np.sqrt(np.square(loud).mean()))
        frames = -(-(offset + len(wave)) // FRAME)
        pcm = np.zeros((_BEFORE + frames + _AFTER) * FRAME, np.float32)
        pcm[_BEFORE * FRAME + offset :][: len(wave)] = wave
        with torch.no_grad():
            codes = self._codec.quantizer.encode(self._codec.latent(torch.from_numpy(pcm)[None]))[0]
        return codes[_BEFORE : _BEFORE + frames].numpy().astype(np.int64)


class Judge:
    """Says how well blocks are understood when they are decoded as the model says them."""

    def __init__(self, codec: Codec, markers: Markers) -> None:
        self._codec, self._markers = codec, markers

    def understood(self, items: list[Item], voice: int, said: list[NDArray[np.int64]]) -> bool:
        """Return whether a run of items is heard as what it is. said: the codes of all its blocks."""
        silence = np.repeat(self._markers.silence[None], 5, 0)
        frames, rest = [silence], iter(said)
        for item in items:
            frames.append(self._markers.frame(sequences.ITEMS.index(item), voice, 0))
            frames += [next(rest) for _ in item.blocks]
        codes = torch.from_numpy(np.concatenate([*frames, silence]))
        with torch.no_grad():
            pcm = self._codec.synthesise(codes[None])[0].numpy()
        return judges.recited(pcm, *sorted({item.kind for item in items})) == sequences.words_of(items)

    def grade(self, block: str, voice: int, said: list[NDArray[np.int64]], to_beat: int = -1) -> int:
        """Return in how many of its companies a block is understood. said: the voice's codes of all blocks.

        It gives up, with less, once `to_beat` cannot be beaten.
        """
        runs = companies(block)
        right = 0
        for place, items in enumerate(runs):
            right += self.understood(items, voice, [said[number] for number in sequences.blocks_of(items)])
            if right + len(runs) - 1 - place <= to_beat:
                break
        return right


def companies(block: str) -> list[list[Item]]:
    """Return the runs of items in which a block has to be understood.

    They hold what it is mistaken in: "fifty-" in front of several digits, a digit behind several tens.
    """
    item = _item_of(block)
    every = sequences.sequence(item.kind, item.group)
    before, after = every[item.place - 1], every[(item.place + 1) % len(every)]
    if item.kind != "number":
        return [[item], [before, item], [item, after]]
    if block.endswith("-"):
        tens = item.place // 10 * 10
        return [
            *([sequences.number(tens + ones)] for ones in (1, 4, 7)),
            [sequences.number(tens + 2), sequences.number(tens + 3)],
        ]
    if 1 <= item.place <= 9:
        return [[item], [before, item], *([sequences.number(tens + item.place)] for tens in (20, 50, 80))]
    return [[item], [before, item], [item, after]]


def make(path: Path, codec: Codec, attempts: int = 60) -> None:
    """Fill `path`, and `path` with `.json`: of each block, in how many companies it is understood, and its attempts.

    A block has further attempts until it is understood in all of them, the worst ones first; the best is kept. The
    judge cannot tell letters, so those are their first rendering. What is there and good is kept.
    """
    markers = Markers.of(codec)
    render, judge = Renderer(codec), Judge(codec, markers)
    found = dict(np.load(path)) if path.is_file() else {}
    judged = [block for block in sequences.BLOCKS if _item_of(block).kind != "letter"]
    full = {block: len(companies(block)) for block in judged}
    notes: dict[str, list[int]] = {}
    for voice in range(len(prompts.PITCHES)):
        said = [
            found[key].astype(np.int64) if (key := f"{voice}-{number}") in found else render(block, voice, 0)
            for number, block in enumerate(sequences.BLOCKS)
        ]
        grades = {block: judge.grade(block, voice, said) for block in judged}
        tried = dict.fromkeys(judged, 0)
        while bad := [block for block in judged if grades[block] < full[block] and tried[block] < attempts]:
            block = min(bad, key=lambda one: (tried[one] // _AT_ONCE, grades[one] - full[one]))
            number = sequences.BLOCKS.index(block)
            for _ in range(_AT_ONCE):
                before = said[number]
                said[number] = render(block, voice, tried[block])
                tried[block] += 1
                grade = judge.grade(block, voice, said, grades[block])
                if grade <= grades[block]:
                    said[number] = before
                    continue
                grades[block] = grade
                if grade == full[block]:
                    break
        found |= {f"{voice}-{number}": codes for number, codes in enumerate(said)}
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **found)
        part.replace(path)
        notes |= {f"{voice}-{sequences.BLOCKS.index(block)}": [grades[block], tried[block]] for block in judged}
        path.with_suffix(".json").write_text(json.dumps(notes))
        understood = sum(grades[block] == full[block] for block in judged)
        print(f"voice {voice}: {understood} of {len(judged)} blocks are always understood", flush=True)


_AT_ONCE = 8
"""Attempts at a block before another has its turn."""


def _item_of(block: str) -> Item:
    return next(item for item in sequences.ITEMS if block in item.blocks)
