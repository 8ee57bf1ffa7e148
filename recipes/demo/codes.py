"""Stage 8, the codes: the corpus as the encoder and the quantiser put it, clip by clip, at several levels.

From here on the encoder and the codebooks are held: what the language model learns, and what the decoder is refined on,
stands on these codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from recipes.demo import clips, joint
from recipes.demo.latents import Latents
from recipes.demo.recipe import CODEC, Run
from streaming.audio import FRAME

_PASSES = 2  # over the training clips, each at other levels
_GAIN = 5.0  # dB either way


@dataclass(frozen=True)
class VoiceCodes:
    """A voice's clips as codes. codes: [F, Q] int16; starts: of clips, in frames, and the end."""

    name: str
    codes: NDArray[np.int16]
    starts: NDArray[np.int64]

    def clips(self) -> list[NDArray[np.int16]]:
        """Each clip's codes, [F, Q]."""
        return [self.codes[start:end] for start, end in zip(self.starts[:-1], self.starts[1:], strict=True)]


@torch.no_grad()
def make(run: Run, oracle: bool) -> None:
    """Writes `codes/SPLIT/VOICE.npz` for every voice.

    oracle: of the latents themselves, for a language model that cannot wait for the encoder; they mean the same.
    """
    folder, latents = run.stages, Latents.load(run.stages)
    codec = joint.trained(folder)
    draw = np.random.default_rng(run.seed)
    for split in ("test", "train"):
        (folder / "codes" / split).mkdir(parents=True, exist_ok=True)
        for voice in tqdm(clips.load(run.cache, split), desc=f"codes/{split}", unit="voice"):
            found = []
            for _ in range(_PASSES if split == "train" else 1):
                for start, end in zip(voice.starts[:-1], voice.starts[1:], strict=True):
                    gain = 10 ** (draw.uniform(-_GAIN, _GAIN) / 20) if split == "train" else 1.0
                    pcm = voice.pcm[start:end].reshape(1, -1).astype(np.float32) * np.float32(gain / 32768)
                    assert pcm.shape[1] == (end - start) * FRAME
                    wave = torch.from_numpy(pcm)
                    if oracle:
                        prosody = torch.from_numpy(voice.prosody[start:end].astype(np.float32))
                        semantic, shape = latents(wave, prosody[None])
                        semantic = F.pad(semantic, (0, CODEC["codebook_dim"] - semantic.shape[-1]))
                        made = codec.quantizer.codes((semantic, shape))
                    else:
                        made = codec.quantizer.encode(codec.latent(wave))
                    found.append(made[0].numpy().astype(np.int16))
            starts = np.cumsum([0, *(len(clip) for clip in found)])
            np.savez(folder / "codes" / split / voice.name, codes=np.concatenate(found), starts=starts)


def load(folder: Path, split: str) -> list[VoiceCodes]:
    """Every voice's codes."""
    return [
        VoiceCodes(path.stem, raw["codes"], raw["starts"])
        for path in sorted((folder / "codes" / split).glob("*.npz"))
        for raw in [np.load(path)]
    ]


def perplexities(codes: NDArray[Any]) -> list[float]:
    """exp(entropy) of each codebook's use, as a share of its size. codes: [F, Q]."""
    size = CODEC["codebook_size"]
    shares = []
    for column in codes.T:
        share = np.bincount(column, minlength=size) / len(column)
        share = share[share > 0]
        shares.append(float(np.exp(-(share * np.log(share)).sum()) / size))
    return shares
