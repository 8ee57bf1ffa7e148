"""`python -m recipes.demo.consistency DIR`: pairs for `python -m streaming.score --pairs DIR/pairs.csv`.

Small sets after SALMon (arXiv 2409.07437) and sBLIMP, from held-out clips of the demo's corpus. In every pair the two
sides have the same length and, where they are cut, are cut alike, so that the cut itself decides nothing:

voice   4 s of a speaker, then 4 s of another text: by the same speaker, or by another
level   8 s: at a steady level, or with a jump of 12 dB in the middle
words   8 s: as spoken, or with its words in another order
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

from recipes.demo import clips, judges, recipe
from recipes.demo.judges import Wave
from streaming.audio import FRAME, SAMPLE_RATE

_FRAMES = 100
_JUMP = 10 ** (12 / 20)
_FADE = 120  # samples over which a cut is blended
Pair = tuple[str, Wave, Wave]


def make(cache: Path, folder: Path, each: int, seed: int = 0) -> int:
    """Writes the recordings and `pairs.csv`: `each` pairs of every voice and task. Returns how many pairs."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    voices = {voice.name: _waves(voice, 2 * each) for voice in clips.load(cache, "test")}
    rows = []
    for number, (task, positive, negative) in enumerate(_pairs(voices, each, draw)):
        row = {"task": task}
        for side, wave in (("positive", positive), ("negative", negative)):
            assert wave.shape == positive.shape
            row[side] = f"{number:03d}-{task}-{side}.wav"
            soundfile.write(folder / row[side], wave.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
        rows.append(row)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["task", "positive", "negative"])
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def _waves(voice: clips.VoiceClips, most: int) -> list[Wave]:
    """Beginnings of held-out clips, 8 s each."""
    found = []
    for start, end in zip(voice.starts[:-1], voice.starts[1:], strict=True):
        places = range(start, end - _FRAMES + 1, _FRAMES)
        found += [voice.pcm[at : at + _FRAMES].reshape(-1).astype(np.float32) / np.float32(32768) for at in places]
    return found[:most]


def _pairs(voices: dict[str, list[Wave]], each: int, draw: np.random.Generator) -> Iterator[Pair]:
    half = _FRAMES // 2 * FRAME
    for name, waves in voices.items():
        for number in range(min(each, len(waves) - 1)):
            wave, other_text = waves[number], waves[number + 1]
            others = [other for other in voices if other != name]
            stranger = voices[others[draw.integers(len(others))]]
            strange = stranger[draw.integers(len(stranger))]
            yield "voice", _join([wave[:half], other_text[half:]]), _join([wave[:half], strange[half:]])
            gain = np.ones(len(wave), np.float32)
            gain[half:] = _JUMP if draw.random() < 0.5 else 1 / _JUMP
            steady = wave / np.float32(np.sqrt(_JUMP))  # loud enough to jump up and not clip
            yield "level", steady, steady * gain
            pieces = _words(wave)
            order = draw.permutation(len(pieces))
            yield "words", _join(pieces), _join([pieces[index] for index in order])


def _words(wave: Wave) -> list[Wave]:
    """The recording cut where the recogniser hears words begin."""
    cuts = [0, *judges.word_starts(wave), len(wave)]
    return [wave[first:last] for first, last in pairwise(cuts) if last > first]


def _join(pieces: list[Wave]) -> Wave:
    """Pieces one after the other, each faded in and out over 5 ms."""
    faded = []
    for piece in pieces:
        ramp = np.minimum(1.0, np.arange(1, len(piece) + 1) / _FADE)
        faded.append(piece * (ramp * ramp[::-1]).astype(np.float32))
    return np.concatenate(faded)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.consistency", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=recipe.root(), help="where the recipe keeps its cache")
    parser.add_argument("--each", type=int, default=5, help="pairs of every voice and task")
    options = parser.parse_args(arguments)
    print(f"{make(options.root / 'cache', options.folder, options.each)} pairs in {options.folder / 'pairs.csv'}")


if __name__ == "__main__":
    main()
