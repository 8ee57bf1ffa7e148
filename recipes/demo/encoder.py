"""Stage 4, the encoder: learns to see in the waveform what the latents say about each frame.

Mean squared error in the quantiser's own space, so that what is left over compares with what quantising leaves. Noise
is added to some inputs, never to the targets.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.demo import clips, features
from recipes.demo.codec import Codec
from recipes.demo.latents import PROSODY_WEIGHT, SEMANTIC, Latents
from recipes.demo.loop import Loop
from recipes.demo.recipe import CODEC, CPU, Run

FRAMES, _BATCH = 24, 6
RATE = 1e-3
DECAY = 0.999
_PROSODY_WEIGHT = 0.5
_NOISE_SHARE, _NOISE_LEVELS = 0.3, (-75.0, -45.0)  # dB


def loop(folder: Path, device: torch.device = CPU) -> Loop:
    """The stage's state, from its checkpoint if there is one."""
    return Loop(folder / "encoder.pt", {"codec": encoder_of(Codec(CODEC)).to(device)}, RATE, "codec", DECAY)


def encoder_of(codec: Codec) -> Codec:
    """The codec with only its encoder to be trained."""
    codec.requires_grad_(False)
    for part in codec.encoder_parts():
        part.requires_grad_(True)
    return codec


def train(run: Run) -> None:
    """Trains, from the checkpoint on."""
    state = loop(run.stages, run.device)
    state.rate *= run.rate
    crops, held_out = clips.material(run, FRAMES, state.steps, 32)
    latents = Latents.load(run.stages).to(run.device)
    batch = run.batch or _BATCH
    codec = state.modules["codec"]
    assert isinstance(codec, Codec)

    def step() -> tuple[dict[str, float], float]:
        pcm, prosody = crops.batch(batch)
        projected = codec.quantizer.projections(codec.latent(with_noise(pcm)))
        loss, figures = errors(projected, latents, pcm, prosody)
        figures["norm"] = state.update("codec", loss, clip=2.0)
        return figures, batch * FRAMES * 0.08

    def check(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Codec)
        pcm, prosody = held_out
        return errors(average.quantizer.projections(average.latent(pcm)), latents, pcm, prosody)[1]

    state.run(step, check, run.minutes)


def with_noise(pcm: Tensor) -> Tensor:
    """pcm: [B, N]. White noise on some rows, as a microphone or a room adds it."""
    low, high = _NOISE_LEVELS
    chance = torch.rand(2, len(pcm), 1, device=pcm.device)
    level = 10 ** ((low + (high - low) * chance[0]) / 20)
    return pcm + torch.randn_like(pcm) * level * (chance[1] < _NOISE_SHARE)


def errors(
    seen: tuple[Tensor, Tensor], latents: Latents, pcm: Tensor, prosody: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the unexplained share of the variance of envelope, voicing and pitch. seen: what is to be
    quantised, [B, F, dim] each.
    """
    semantic, acoustic = seen
    target, shape = latents(pcm, prosody)
    level, seen_level = target[..., features.PROSODY :], semantic[..., features.PROSODY : SEMANTIC]
    voicing, pitch = prosody.split(features.WINDOWS, -1)
    prosodic = semantic[..., : features.PROSODY] / (PROSODY_WEIGHT * latents.scale)
    seen_voicing, seen_pitch = prosodic.split(features.WINDOWS, -1)
    missed = (seen_level - level).square().sum(-1) + (acoustic - shape).square().sum(-1)
    envelope = missed.mean() / (level.square().sum(-1) + shape.square().sum(-1)).mean()
    voiced = (seen_voicing - voicing).square().mean()
    height = (seen_pitch - pitch).square().mean() / pitch.square().mean().clamp(min=0.1)
    loss = envelope + _PROSODY_WEIGHT * (voiced + height)
    sure = (voicing > 0) & (seen_voicing > 0)
    off = (seen_pitch - pitch).abs()[sure].mean() * features.PITCH_SPREAD if sure.any() else envelope.new_zeros(())
    figures = {"loss": loss, "envelope": envelope, "voicing": voiced, "pitch": height, "pitch_off": off}
    return loss, {name: float(value.detach()) for name, value in figures.items()}
