"""Stage 14, tests: prompts that the model is judged on and never trained on, as recordings and as codes.

trained   voices of the synthesisers that it was trained on, with starts and settings of their own
engine    festival, which it never heard: a diphone voice and an HTS voice
person    a real person: Debian's English recordings for Asterisk (CC-BY-SA 3.0), numbers, days and months
caller    another one, at a telephone's 8 kHz: Debian's saytime (recordings under the GPL), numbers below 60
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from recipes.demo import prompts, sequences
from recipes.demo.codec import Codec
from recipes.demo.prompts import Cast, Speaker, Wave
from recipes.demo.sequences import Item
from streaming.audio import FRAME, SAMPLE_RATE

FESTIVAL = ("ked_diphone", "cmu_us_slt_arctic_hts")
PERSON = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
CALLER = Path("/usr/share/saytime")
KINDS = ("number", "number", "number", "day", "month")
SETS = {"trained": 100, "engine": 60, "person": 60, "caller": 40}
"""Prompts of each."""


def _festival(voice: str) -> Speaker:
    @cache
    def say(text: str, mark: str) -> Wave:
        with tempfile.TemporaryDirectory() as folder:
            command = ["text2wave", "-eval", f"(voice_{voice})", "-o", f"{folder}/a.wav"]
            subprocess.run(command, input=text + mark, text=True, check=True, capture_output=True)
            wave, rate = soundfile.read(f"{folder}/a.wav", dtype="float32")
        return np.asarray(soxr.resample(wave, rate, SAMPLE_RATE), np.float32)

    return Speaker(f"festival {voice}", say, None)


@cache
def _recording(name: str) -> Wave:
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "g722",
        "-i",
        str(PERSON / f"{name}.g722"),
        "-f",
        "s16le",
        "-ar",
        "24000",
        "-",
    ]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    return prompts.trim(np.frombuffer(made, "<i2").astype(np.float32) / np.float32(32768))


def _recorded(text: str, mark: str) -> Wave:
    """An item in the person's voice; numbers such as 21 from two recordings."""
    item = next(item for item in sequences.ITEMS if item.text == text)
    if item.kind == "day":
        names = [f"digits/day-{(item.place + 1) % 7}"]
    elif item.kind == "month":
        names = [f"digits/mon-{item.place}"]
    elif item.place == 100:
        names = ["digits/1", "digits/hundred"]
    elif item.place > 20 and item.place % 10:
        names = [f"digits/{item.place // 10 * 10}", f"digits/{item.place % 10}"]
    else:
        names = [f"digits/{item.place}"]
    return np.concatenate([_recording(name) for name in names])


def _called(text: str, mark: str) -> Wave:
    """A number below 60 in the caller's voice; those such as 21 from two recordings."""
    place = next(item.place for item in sequences.ITEMS if item.text == text)
    names = [place] if place <= 20 or place % 10 == 0 else [place // 10 * 10, place % 10]
    waves = [soundfile.read(CALLER / f"{name}.au", dtype="float32") for name in names]
    return np.concatenate([prompts.trim(soxr.resample(wave, rate, SAMPLE_RATE)) for wave, rate in waves])


def _starts(draw: random.Random, caller: bool) -> list[Item]:
    """Items of a kind that the judge can tell, from one to four of them. caller: only what he has said."""
    while True:
        items = prompts.choose_items(draw)
        if (
            items
            and items[0].kind in KINDS
            and len(sequences.follow(items)) >= 3
            and sequences.follow(items)[0].kind != "rhyme"
            and (not caller or all(item.kind == "number" and item.place < 60 for item in items))
        ):
            return items


def make(root: Path, codec: Codec) -> None:
    """Fills `root/SET`: `NUMBER.flac`, `index.json` with what is said, `codes.npz` as the prompts' shards are."""
    for name, count in SETS.items():
        folder = root / name
        if (folder / "index.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        draw, cast = random.Random(name), Cast(90_000)  # noqa: S311
        numbers = np.random.default_rng(90_000)
        index, found = [], []
        for place in range(count):
            if name == "trained":
                speaker = cast.draw(("hibari", "flite", "espeak")[place % 3])
            elif name == "engine":
                speaker = _festival(FESTIVAL[place % 2])
            elif name == "person":
                speaker = Speaker("Allison", _recorded, None)
            else:
                speaker = Speaker("saytime", _called, None)
            items = _starts(draw, name == "caller")
            wave, spans = prompts.speak(speaker, items, draw, [])
            wave = wave[: len(wave) // FRAME * FRAME]
            loud = wave[np.abs(wave) > 0.02 * np.abs(wave).max()]
            heard = wave / np.sqrt(np.square(loud).mean()) + 10 ** (-45 / 20) * numbers.standard_normal(len(wave))
            heard = np.asarray(heard * 10 ** (draw.uniform(-27, -20) / 20), np.float32).clip(-1, 1)
            soundfile.write(folder / f"{place:03d}.flac", heard, SAMPLE_RATE, subtype="PCM_16")
            made = prompts.encoded(codec, wave, heard, items, spans, speaker.source)
            found.append(made)
            index.append({"said": made.said, "pitch": made.pitch, "gap": made.gap, "source": made.source})
        prompts.save(folder / "codes.npz", found)
        (folder / "index.json").write_text(json.dumps(index))
