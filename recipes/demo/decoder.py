"""Stage 6, the decoder: learns to speak from codes.

It hears nothing but codes, so it can begin before the encoder is done, on codes of the latents themselves (`oracle`),
and go on with the encoder's once they are there. First with spectral distances alone, then against judges too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.demo import adversary, clips, encoder
from recipes.demo.adversary import Judges
from recipes.demo.codec import Codec
from recipes.demo.latents import Latents
from recipes.demo.loop import Loop
from recipes.demo.losses import spectral
from recipes.demo.recipe import CODEC, CPU, Run

FRAMES, _BATCH = 16, 4
RATE = 7e-4
DECAY = 0.999


def loop(folder: Path, judged: bool = False, device: torch.device = CPU) -> Loop:
    """The stage's state, from its checkpoint if there is one. judged: with an adversary."""
    modules: dict[str, nn.Module] = {"codec": decoder_of(Codec(CODEC)).to(device)}
    if judged:
        modules["judges"] = Judges().to(device)
    return Loop(folder / "decoder.pt", modules, RATE, "codec", DECAY)


def decoder_of(codec: Codec) -> Codec:
    """The codec with only its decoder to be trained."""
    codec.requires_grad_(False)
    for part in codec.decoder_parts():
        part.requires_grad_(True)
    return codec


def train(run: Run, oracle: bool, judged: bool) -> None:
    """Trains, from the checkpoint on. oracle: on codes of the latents themselves; judged: with an adversary."""
    state = loop(run.stages, judged, run.device)
    state.rate *= run.rate
    crops, held_out = clips.material(run, FRAMES, state.steps, 24)
    latents = Latents.load(run.stages).to(run.device)
    batch = run.batch or _BATCH
    codec = state.modules["codec"]
    assert isinstance(codec, Codec)
    hearing = encoder.loop(run.stages, run.device).average
    assert isinstance(hearing, Codec)
    for one in (codec, state.average, hearing):
        assert isinstance(one, Codec)
        one.quantizer.set_books(torch.load(run.stages / "quantizer.pt", map_location=run.device))

    @torch.no_grad()
    def codes_of(pcm: Tensor, prosody: Tensor) -> Tensor:
        if not oracle:
            return hearing.quantizer.encode(hearing.latent(pcm))
        semantic, acoustic = latents(pcm, prosody)
        semantic = torch.nn.functional.pad(semantic, (0, CODEC["codebook_dim"] - semantic.shape[-1]))
        return codec.quantizer.codes((semantic, acoustic))

    def step() -> tuple[dict[str, float], float]:
        pcm, prosody = crops.batch(batch)
        made = codec.synthesise(codes_of(pcm, prosody))
        loss = spectral(made, pcm)
        figures = {"loss": loss.item()}
        if judged:
            added, verdicts = adversary.judged(state, made, pcm, crops.draw)
            loss, figures = loss + added, figures | verdicts
        figures["norm"] = state.update("codec", loss, clip=2.0)
        return figures, batch * FRAMES * 0.08

    def check(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Codec)
        pcm, prosody = held_out
        return {"loss": spectral(average.synthesise(codes_of(pcm, prosody)), pcm).item()}

    state.run(step, check, run.minutes)
