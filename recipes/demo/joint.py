"""Stage 7, encoder and decoder together: what the one says and what the other hears of it grow towards each other.

The codebooks are held, and the encoder stays bound to the latents, so codes go on meaning what they meant; but where
the latents leave it a choice, it is the sound that decides. The gradient passes the codes by as if nothing had been
rounded (arXiv 1711.00937).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from recipes.demo import adversary, clips, decoder, encoder
from recipes.demo.adversary import Judges
from recipes.demo.codec import Codec
from recipes.demo.latents import Latents
from recipes.demo.loop import Loop
from recipes.demo.losses import spectral
from recipes.demo.recipe import CPU, Run

RATE = 5e-4
DECAY = 0.999
_BATCH = 4
_LATENTS_WEIGHT = 0.5


def assemble(folder: Path) -> Codec:
    """The codec of the encoder's, the quantiser's and the decoder's stages, averaged weights."""
    codec, decoding = encoder.loop(folder).average, decoder.loop(folder).average
    assert isinstance(codec, Codec) and isinstance(decoding, Codec)
    codec.quantizer.set_books(torch.load(folder / "quantizer.pt"))
    for mine, theirs in zip(codec.decoder_parts(), decoding.decoder_parts(), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return codec.requires_grad_(False)


def loop(folder: Path, judged: bool = False, device: torch.device = CPU) -> Loop:
    """The stage's state, from its checkpoint, or from what the stages before have made. judged: with an adversary."""
    modules: dict[str, nn.Module] = {"codec": assemble(folder).requires_grad_(True).to(device)}
    if judged:
        modules["judges"] = Judges().to(device)
    return Loop(folder / "joint.pt", modules, RATE, "codec", DECAY)


def trained(folder: Path) -> Codec:
    """The codec as far as it has come, averaged weights."""
    codec = loop(folder).average if (folder / "joint.pt").is_file() else assemble(folder)
    assert isinstance(codec, Codec)
    return codec


def train(run: Run, judged: bool) -> None:
    """Trains, from the checkpoint on. judged: with an adversary."""
    state = loop(run.stages, judged, run.device)
    state.rate *= run.rate
    crops, held_out = clips.material(run, decoder.FRAMES, state.steps, 24)
    latents = Latents.load(run.stages).to(run.device)
    batch = run.batch or _BATCH
    codec = state.modules["codec"]
    assert isinstance(codec, Codec)

    def step() -> tuple[dict[str, float], float]:
        pcm, prosody = crops.batch(batch)
        projected = codec.quantizer.projections(codec.latent(encoder.with_noise(pcm)))
        missed, seen = encoder.errors(projected, latents, pcm, prosody)
        made = codec.speak(codec.quantizer.through(projected))
        distance = spectral(made, pcm)
        loss = distance + _LATENTS_WEIGHT * missed
        figures = {"loss": distance.item(), "envelope": seen["envelope"], "voicing": seen["voicing"]}
        if judged:
            added, verdicts = adversary.judged(state, made, pcm, crops.draw)
            loss, figures = loss + added, figures | verdicts
        figures["norm"] = state.update("codec", loss, clip=2.0)
        return figures, batch * decoder.FRAMES * 0.08

    def check(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Codec)
        pcm, prosody = held_out
        projected = average.quantizer.projections(average.latent(pcm))
        seen = encoder.errors(projected, latents, pcm, prosody)[1]
        made = average.speak(average.quantizer.through(projected))
        return {"loss": spectral(made, pcm).item(), "envelope": seen["envelope"], "voicing": seen["voicing"]}

    state.run(step, check, run.minutes)
