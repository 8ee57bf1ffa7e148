"""How far a made waveform is from the recording, to an ear that is deaf to phase: spectra at five resolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.demo.features import mel_filters

_SIZES = ((2048, 96), (1024, 80), (512, 64), (256, 32), (128, 16))
"""Window and mel bands of each resolution; the hop is a quarter of the window."""
_FLOOR = 1e-4
"""Of mel amplitudes where speech has a root mean square of 0.07: a higher one leaves a steady tone near 6 kHz."""
_CONVERGENCE_WEIGHT = 0.2


def spectral(made: Tensor, pcm: Tensor) -> Tensor:
    """made, pcm: [B, N]. Mean over the resolutions of the L1 distance of log mels, plus spectral convergence."""
    total = made.new_zeros(())
    both = torch.cat((made, pcm))
    for size, mels in _SIZES:
        window = torch.hann_window(size, device=both.device)
        spectrum = torch.stft(both, size, size // 4, window=window, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        amplitude = (power + 1e-10).sqrt() * (2 / window.sum())
        mel = (amplitude.transpose(1, 2) @ mel_filters(size, mels).to(both.device) + _FLOOR).log()
        mel_made, mel_pcm = mel.chunk(2)
        amplitude_made, amplitude_pcm = amplitude.chunk(2)
        distance = (amplitude_made - amplitude_pcm).square().sum().add(1e-12).sqrt()
        convergence = distance / amplitude_pcm.square().sum().add(1e-6).sqrt()
        total = total + (mel_made - mel_pcm).abs().mean() + _CONVERGENCE_WEIGHT * convergence
    return total / len(_SIZES)
