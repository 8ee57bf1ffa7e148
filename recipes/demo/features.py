"""A frame's sound in numbers: pitch and voicing for the semantic codebook, the spectral envelope for the others.

Staged training needs latents that cannot collapse, so they are computed from the signal, and the encoder learns to see
them. Pitch apart from envelope, because a mel spectrum fine enough to show harmonics spends its bits on ripples.
Each of the 4 windows of a frame ends inside it: nothing here looks ahead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME, SAMPLE_RATE

WINDOWS = 4
"""Analysis windows a frame: 50 Hz."""
HOP = FRAME // WINDOWS
WINDOW = 1024
MELS = 80
CEPSTRA = 24
"""Of the 80 mels' cosine transform; what lies beyond is harmonics."""
_FLOOR = 6.25e-5  # of mel amplitudes, where clips have a root mean square of 0.07
PITCH_RANGE = (55.0, 500.0)
PITCH_CENTRE, PITCH_SPREAD = math.log(180.0), 0.4
ENVELOPE = WINDOWS * CEPSTRA
PROSODY = 2 * WINDOWS


@lru_cache
def mel_filters(fft: int, mels: int) -> Tensor:
    """Triangles of the HTK mel scale up to 12 kHz, each of area 1: [fft // 2 + 1, mels]."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    centres = 700 * (10 ** (torch.linspace(0, top, mels + 2) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, fft // 2 + 1)
    width = centres[1:] - centres[:-1]
    rising = (bins[:, None] - centres[:-2]) / width[:-1]
    falling = (centres[2:] - bins[:, None]) / width[1:]
    filters = torch.minimum(rising, falling).clamp(min=0)
    total = filters.sum(0, keepdim=True)
    narrow = total[0] < 1e-3  # between two bins: take the nearest
    if narrow.any():
        nearest = (centres[1:-1] / (SAMPLE_RATE / 2) * (fft // 2)).round().long()
        filters[nearest[narrow], narrow] = 1.0
        total = filters.sum(0, keepdim=True)
    return filters / total


def log_mel(pcm: Tensor) -> Tensor:
    """pcm: [B, N], whole frames. Returns log mel amplitudes [B, N // 480, 80], each window ending at its hop's end."""
    padded = torch.nn.functional.pad(pcm, (WINDOW - HOP, 0))
    window = torch.hann_window(WINDOW, device=pcm.device)
    spectrum = torch.fft.rfft(padded.unfold(1, WINDOW, HOP) * window).abs()
    mel = spectrum @ mel_filters(WINDOW, MELS).to(pcm.device)
    level: Tensor = mel * (2 / window.sum()) + _FLOOR
    return level.log()


@lru_cache
def cosines() -> Tensor:
    """Orthonormal DCT-II, its first `CEPSTRA` rows: [MELS, CEPSTRA]."""
    mel, order = torch.arange(MELS)[:, None] + 0.5, torch.arange(CEPSTRA)
    basis = torch.cos(math.pi / MELS * mel * order) * math.sqrt(2 / MELS)
    basis[:, 0] /= math.sqrt(2)
    return basis


def envelope(pcm: Tensor) -> Tensor:
    """pcm: [B, N]. Returns the cepstra of each frame's windows, [B, F, ENVELOPE]."""
    cepstra = log_mel(pcm) @ cosines().to(pcm.device)
    return cepstra.reshape(pcm.shape[0], -1, ENVELOPE)


def prosody(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    """pcm: [N], whole frames. Voicing (+-1) and pitch (0 where unvoiced) of each frame's windows: [F, PROSODY]."""
    import pyworld

    wave = pcm.astype(np.float64)
    pitch, times = pyworld.dio(wave, SAMPLE_RATE, *PITCH_RANGE, frame_period=10.0, speed=4)
    pitch = pyworld.stonemask(wave, pitch, times, SAMPLE_RATE)
    ends = np.arange(1, len(pcm) // HOP + 1) * HOP
    at = np.clip(np.rint((ends - WINDOW / 2) / SAMPLE_RATE * 100).astype(int), 0, len(pitch) - 1)
    pitch = pitch[at]
    voiced = pitch > 0
    height = np.where(voiced, (np.log(np.maximum(pitch, 1.0)) - PITCH_CENTRE) / PITCH_SPREAD, 0.0)
    both = np.stack([np.where(voiced, 1.0, -1.0), height]).reshape(2, -1, WINDOWS)
    return np.concatenate([both[0], both[1]], axis=1).astype(np.float32)
