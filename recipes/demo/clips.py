"""Stage 2, the cache: the corpus decoded once into flat files that all training processes map into memory.

It is derived from the corpus and can be deleted at any time. It grows with the corpus: what is there is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from recipes.demo import features
from recipes.demo.recipe import CPU, Run
from streaming.audio import FRAME


def build(corpus: Path, cache: Path) -> None:
    """`cache/SPLIT/VOICE.{pcm,prosody,json}` of every voice whose clips have changed in number."""
    for split in ("train", "test"):
        for folder in tqdm(sorted(corpus.glob(f"*/{split}")), desc=f"cache/{split}", unit="voice"):
            paths = sorted(folder.glob("*.flac"))
            base = cache / split / folder.parent.name
            index = base.with_suffix(".json")
            if not paths or (index.is_file() and len(json.loads(index.read_text())["blocks"]) == len(paths)):
                continue
            base.parent.mkdir(parents=True, exist_ok=True)
            frames, prosodies = [], []
            with base.with_suffix(".pcm.part").open("wb") as file:
                for path in paths:
                    pcm = soundfile.read(path, dtype="int16")[0]
                    pcm = pcm[: len(pcm) // FRAME * FRAME]
                    file.write(pcm.tobytes())
                    frames.append(len(pcm) // FRAME)
                    prosodies.append(features.prosody(pcm.astype(np.float32) / 32768))
            with base.with_suffix(".prosody.part").open("wb") as file:
                np.save(file, np.concatenate(prosodies).astype(np.float16))
            index.unlink(missing_ok=True)
            for kind in ("pcm", "prosody"):
                base.with_suffix(f".{kind}.part").replace(base.with_suffix(f".{kind}"))
            index.write_text(json.dumps({"blocks": [int(path.stem) for path in paths], "frames": frames}))


@dataclass(frozen=True)
class VoiceClips:
    """All clips of a voice, one after the other. pcm: [F, 1920] int16; prosody: [F, 8]; starts: of clips, in frames,
    and the end; blocks: what is read in each clip.
    """

    name: str
    pcm: NDArray[np.int16]
    prosody: NDArray[np.float16]
    starts: NDArray[np.int64]
    blocks: list[int]


def load(cache: Path, split: str) -> list[VoiceClips]:
    """Every voice in the cache, mapped into memory."""
    voices = []
    for index in sorted((cache / split).glob("*.json")):
        raw = json.loads(index.read_text())
        pcm = np.memmap(index.with_suffix(".pcm"), np.int16, "r").reshape(-1, FRAME)
        prosody = np.load(index.with_suffix(".prosody"))
        starts = np.concatenate([[0], np.cumsum(raw["frames"])])
        voices.append(VoiceClips(index.stem, pcm, prosody, starts, raw["blocks"]))
    return voices


class Crops:
    """Random crops, a voice as often as the root of its length, each crop with its own level.

    Recordings reach a microphone at any level: `_GAIN` dB either way.
    """

    _GAIN = 5.0

    def __init__(self, voices: list[VoiceClips], frames: int, seed: int, device: torch.device = CPU) -> None:
        self.voices, self.frames, self.device = voices, frames, device
        self.draw = np.random.default_rng(seed)
        weights = np.sqrt([float(voice.starts[-1]) for voice in voices])
        self._weights = weights / weights.sum()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """pcm [B, 1920 F] and prosody [B, F, 8], float32."""
        pcm = np.empty((size, self.frames * FRAME), np.float32)
        prosody = np.empty((size, self.frames, features.PROSODY), np.float32)
        for row in range(size):
            voice = self.voices[self.draw.choice(len(self.voices), p=self._weights)]
            while True:
                clip = self.draw.integers(len(voice.starts) - 1)
                room = voice.starts[clip + 1] - voice.starts[clip] - self.frames
                if room >= 0:
                    break
            at = voice.starts[clip] + self.draw.integers(room + 1)
            gain = 10 ** (self.draw.uniform(-self._GAIN, self._GAIN) / 20)
            pcm[row] = voice.pcm[at : at + self.frames].reshape(-1).astype(np.float32) * np.float32(gain / 32768)
            prosody[row] = voice.prosody[at : at + self.frames]
        return torch.from_numpy(pcm).to(self.device), torch.from_numpy(prosody).to(self.device)


def material(run: Run, frames: int, steps: int, held_out: int) -> tuple[Crops, tuple[Tensor, Tensor]]:
    """Crops to train on from step `steps` on, and one batch of `held_out` of them that stays the same."""
    crops = Crops(load(run.cache, "train"), frames, run.seed + steps, run.device)
    return crops, Crops(load(run.cache, "test"), frames, 0, run.device).batch(held_out)
