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
VOICES = (0, 2, 4, 6)
"""Those of the eight voices in which the model learns to speak."""
MANNER = (2, 3)
"""Codebooks of a marker that tell the voice and the pace."""


@dataclass(frozen=True)
class Markers:
    """codes: [items, 2], the first two codes of each item's marker; voices: [8], the third by voice; paces: [3], the
    fourth; silence: [Q], a silent frame, which has the rest. All int64.
    """

    codes: NDArray[np.int64]
    voices: NDArray[np.int64]
    paces: NDArray[np.int64]
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
        return Markers(codes, voices, paces, silence)

    def frame(self, item: int, voice: int, pace: int) -> NDArray[np.int64]:
        """[1, Q]: the marker in front of an item."""
        made = self.silence.copy()
        made[:2] = self.codes[item]
        made[MANNER[0]], made[MANNER[1]] = self.voices[voice], self.paces[pace]
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
        """Each item's frames, [F, Q]: its marker, its blocks, a pause."""
        found = []
        for item in items:
            blocks = [self.said[voice][block] for block in sequences.blocks_of([item])]
            pause = np.repeat(self.markers.silence[None], PAUSES[pace], 0)
            found.append(np.concatenate([self.markers.frame(sequences.ITEMS.index(item), voice, pace), *blocks, pause]))
        return found


def voice_of(pitch: float) -> int:
    """The nearest of the voices in which the model speaks."""
    return VOICES[int(np.abs(np.log(prompts.PITCHES[list(VOICES)] / max(pitch, 1.0))).argmin())]


def pace_of(gap: float) -> int:
    """0, 1 or 2 by the seconds from item to item; the usual one where there is one item."""
    return 1 if gap == 0 else int(np.searchsorted(prompts.PACES, gap))


HIBARI_PITCH = 202.0
"""Median pitch in Hz of hibari's voice."""
RESAMPLED = (0.80, 0.82, 0.87, 0.92, 1.0, 1.03, 1.08, 1.15)
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
        """[F, Q]. Attempts differ in pace, ending and offset; later ones in the size of the speaker, too."""
        speed = _SPEEDS[attempt // len(_OFFSETS) % len(_SPEEDS)]
        mark = _MARKS[attempt // (len(_OFFSETS) * len(_SPEEDS)) % len(_MARKS)]
        if block.endswith("-"):
            mark = ""
        draw = np.random.default_rng(attempt)
        resample = RESAMPLED[voice] * (1.0 if attempt < _PLAIN else draw.uniform(0.93, 1.02))
        pitch = prompts.PITCHES[voice] / HIBARI_PITCH / resample
        phonemes = self._cast.phonemes(block.rstrip("-")) + mark
        wave = self._cast._hibari(phonemes, speed / resample, pitch, draw)
        wave = prompts.trim(np.asarray(soxr.resample(wave, SAMPLE_RATE * resample, SAMPLE_RATE), np.float32))
        loud = wave[np.abs(wave) > 0.02 * np.abs(wave).max()]
        wave = wave * (_LEVEL / np.sqrt(np.square(loud).mean()))
        offset = _OFFSETS[attempt % len(_OFFSETS)]
        frames = -(-(offset + len(wave)) // FRAME)
        pcm = np.zeros((_BEFORE + frames + _AFTER) * FRAME, np.float32)
        pcm[_BEFORE * FRAME + offset :][: len(wave)] = wave
        with torch.no_grad():
            codes = self._codec.quantizer.encode(self._codec.latent(torch.from_numpy(pcm)[None]))[0]
        return codes[_BEFORE : _BEFORE + frames].numpy().astype(np.int64)


class Judge:
    """Says whether blocks are understood when they are decoded as the model says them."""

    def __init__(self, codec: Codec, markers: Markers) -> None:
        self._codec, self._markers = codec, markers

    def __call__(self, said: list[tuple[Item, int, list[NDArray[np.int64]]]]) -> bool:
        """said: items, each with a voice and its blocks."""
        silence = np.repeat(self._markers.silence[None], 5, 0)
        frames = [silence]
        for item, voice, parts in said:
            frames += [self._markers.frame(sequences.ITEMS.index(item), voice, 0), *parts]
        codes = torch.from_numpy(np.concatenate([*frames, silence]))
        with torch.no_grad():
            pcm = self._codec.synthesise(codes[None])[0].numpy()
        items = [item for item, _, _ in said]
        kinds = sorted({item.kind for item in items})
        return judges.recited(pcm, *kinds) == sequences.words_of(items)


def make(path: Path, codec: Codec, attempts: int = 54) -> None:
    """Fills `path`, and `path` with `.json`: how well each block is understood, and after how many attempts.

    A block is taken when it is understood alone, and behind the one before it in its sequence; the judge cannot tell
    letters, so those are their first rendering. What is there and good is kept, and what is not has further attempts.
    """
    markers = Markers.of(codec)
    render, judge = Renderer(codec), Judge(codec, markers)
    found = dict(np.load(path)) if path.is_file() else {}
    notes_path = path.with_suffix(".json")
    notes: dict[str, list[int]] = json.loads(notes_path.read_text()) if notes_path.is_file() else {}
    for voice in range(len(prompts.PITCHES)):
        for number, block in enumerate(sequences.BLOCKS):
            key = f"{voice}-{number}"
            item = next(item for item in sequences.ITEMS if block in item.blocks)
            if key not in found:
                found[key], notes[key] = render(block, voice, 0), [0, 0]
            while item.kind != "letter" and notes[key][0] < _TWICE and notes[key][1] < attempts:
                made = render(block, voice, notes[key][1])
                reached = _understood(judge, found, item, voice, number, made)
                if reached > notes[key][0]:
                    found[key], notes[key][0] = made, reached
                notes[key][1] += 1
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **found)
        part.replace(path)
        notes_path.write_text(json.dumps(notes))
        grades = [notes[f"{voice}-{number}"][0] for number in range(len(sequences.BLOCKS))]
        tally = f"understood twice {grades.count(_TWICE)}, once {grades.count(1)}, of {len(grades)}"
        print(f"voice {voice}: {tally}", flush=True)


_TWICE = 2


def _understood(
    judge: Judge, found: dict[str, NDArray[np.int64]], item: Item, voice: int, number: int, made: NDArray[np.int64]
) -> int:
    """0, 1 or 2: alone, and in company too."""
    digit = sequences.BLOCKS.index("one")
    parts = [made, found[f"{voice}-{digit}"]] if sequences.BLOCKS[number].endswith("-") else [made]
    if not judge([(item, voice, parts)]):
        return 0
    before = sequences.ITEMS[sequences.ITEMS.index(item) - 1]
    if before.kind != item.kind:
        return _TWICE
    known = [found.get(f"{voice}-{block}") for block in sequences.blocks_of([before])]
    ready = [part for part in known if part is not None]
    if len(ready) < len(known):
        return _TWICE
    return _TWICE if judge([(before, voice, ready), (item, voice, parts)]) else 1
