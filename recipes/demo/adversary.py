"""Judges of spectrograms at three resolutions: they tell made from recorded speech; the decoder learns to fool them.

A spectral distance alone is smallest for the mean of what could be, and the mean of harmonics is a blur. Small ones (16
channels, 0.4 s a step), because everything here is paid for in CPU time. After UnivNet (arXiv 2106.07889).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.demo.loop import Loop

_SIZES = (1536, 768, 384)
_CHANNELS = 16
_FLOOR = 1e-4
_SAMPLES = 9600
_SKIPPED = 1920  # a clip cut out of its middle begins abruptly, and no code says so
_FOOLING_WEIGHT, _LIKENESS_WEIGHT = 0.05, 0.5


class _Judge(nn.Module):
    """Convolutions over the log spectrogram of one resolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(1, _CHANNELS, (3, 9), (1, 2), (1, 4)),
                nn.Conv2d(_CHANNELS, _CHANNELS, (3, 9), (1, 2), (1, 4)),
                nn.Conv2d(_CHANNELS, _CHANNELS, (3, 9), (2, 2), (1, 4)),
                nn.Conv2d(_CHANNELS, 2 * _CHANNELS, (3, 5), (2, 2), (1, 2)),
                nn.Conv2d(2 * _CHANNELS, 2 * _CHANNELS, 3, 1, 1),
                nn.Conv2d(2 * _CHANNELS, 1, 3, 1, 1),
            ]
        )
        self.register_buffer("window", torch.hann_window(size), persistent=False)

    def forward(self, pcm: Tensor) -> list[Tensor]:
        """pcm: [B, N]. Returns the output of every layer; the last is the verdict."""
        spectrum = torch.stft(pcm, self.size, self.size // 4, window=self.window, return_complex=True)  # type: ignore[arg-type]
        power = torch.view_as_real(spectrum).square().sum(-1)
        x = ((power + 1e-10).sqrt() * (4 / self.size) + _FLOOR).log().transpose(1, 2).unsqueeze(1) / 3 + 2
        found = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.layers) - 1:
                x = F.leaky_relu(x, 0.1)
            found.append(x)
        return found


class Judges(nn.Module):
    """One judge a resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.judges = nn.ModuleList(_Judge(size) for size in _SIZES)

    def forward(self, pcm: Tensor) -> list[list[Tensor]]:
        return [judge(pcm) for judge in self.judges]


def judging(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    """What the judges minimise: least squares to 1 for recorded and 0 for made speech."""
    total = sum((1 - r[-1]).square().mean() + m[-1].square().mean() for r, m in zip(real, made, strict=True))
    assert isinstance(total, Tensor)
    return total / len(real)


def fooling(real: list[list[Tensor]], made: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """What the decoder minimises: the judges' disbelief, and the distance of what their layers see."""
    disbelief = sum((1 - m[-1]).square().mean() for m in made)
    distance = sum(
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp(min=1e-3)
        for r, m in zip(real, made, strict=True)
        for a, b in zip(r[:-1], m[:-1], strict=True)
    )
    assert isinstance(disbelief, Tensor) and isinstance(distance, Tensor)
    return disbelief / len(made), distance / (len(made) * (len(made[0]) - 1))


def judged(state: Loop, made: Tensor, pcm: Tensor, draw: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Trains the loop's judges on a piece, drawn, of made and recorded speech, [B, N]. Returns what the speaker adds to
    its loss, and figures.
    """
    judges = state.modules["judges"]
    at = int(draw.integers(_SKIPPED, pcm.shape[1] - _SAMPLES))
    real, fake = (x[:, at : at + _SAMPLES] for x in (pcm, made))
    verdict = judging(judges(real), judges(fake.detach()))
    state.update("judges", verdict)
    judges.requires_grad_(False)
    disbelief, distance = fooling(judges(real), judges(fake))
    judges.requires_grad_(True)
    figures = {"judging": verdict, "disbelief": disbelief, "likeness": distance}
    return (
        _FOOLING_WEIGHT * disbelief + _LIKENESS_WEIGHT * distance,
        {name: value.item() for name, value in figures.items()},
    )
