"""Stage 6, the decoder: learns to speak from codes.

It hears nothing but codes, so it can begin before the encoder is done, on codes of the latents themselves (`oracle`),
and go on with the encoder's once they are there. First with spectral distances alone, then against judges too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from streaming.demo import clips, encoder
from streaming.demo.adversary import Judges, fooling, judging
from streaming.demo.codec import Codec
from streaming.demo.latents import Latents
from streaming.demo.loop import Loop
from streaming.demo.losses import spectral
from streaming.demo.recipe import CODEC

FRAMES, BATCH = 16, 4
RATE = 7e-4
DECAY = 0.999
_JUDGED_SAMPLES = 9600
_SKIPPED = 1920  # a clip cut out of its middle begins abruptly, and no code says so
_FOOLING_WEIGHT, _LIKENESS_WEIGHT = 0.05, 0.5


def loop(folder: Path, judged: bool = False) -> Loop:
    """The stage's state, from its checkpoint if there is one. judged: with an adversary."""
    modules: dict[str, nn.Module] = {"codec": decoder_of(Codec(CODEC))}
    if judged:
        modules["judges"] = Judges()
    return Loop(folder / "decoder.pt", modules, RATE, "codec", DECAY)


def decoder_of(codec: Codec) -> Codec:
    """The codec with only its decoder to be trained."""
    codec.requires_grad_(False)
    for part in codec.decoder_parts():
        part.requires_grad_(True)
    return codec


def train(cache: Path, folder: Path, latents: Latents, minutes: float, seed: int, oracle: bool, judged: bool) -> None:
    """Trains for so many minutes. oracle: on codes of the latents themselves; judged: with an adversary."""
    state = loop(folder, judged)
    crops = clips.Crops(clips.load(cache, "train"), FRAMES, seed + state.steps)
    held_out = clips.Crops(clips.load(cache, "test"), FRAMES, 0).batch(24)
    codec = state.modules["codec"]
    assert isinstance(codec, Codec)
    hearing = encoder.loop(folder).average
    assert isinstance(hearing, Codec)
    for one in (codec, state.average, hearing):
        assert isinstance(one, Codec)
        one.quantizer.set_books(torch.load(folder / "quantizer.pt"))

    @torch.no_grad()
    def codes_of(pcm: Tensor, prosody: Tensor) -> Tensor:
        if not oracle:
            return hearing.quantizer.encode(hearing.latent(pcm))
        semantic, acoustic = latents(pcm, prosody)
        semantic = torch.nn.functional.pad(semantic, (0, CODEC["codebook_dim"] - semantic.shape[-1]))
        return codec.quantizer.codes((semantic, acoustic))

    def step() -> tuple[dict[str, float], float]:
        pcm, prosody = crops.batch(BATCH)
        made = codec.synthesise(codes_of(pcm, prosody))
        loss = spectral(made, pcm)
        figures = {"loss": loss.item()}
        if judged:
            judges = state.modules["judges"]
            at = int(crops.draw.integers(_SKIPPED, pcm.shape[1] - _JUDGED_SAMPLES))
            real, fake = (x[:, at : at + _JUDGED_SAMPLES] for x in (pcm, made))
            verdict = judging(judges(real), judges(fake.detach()))
            state.update("judges", verdict)
            judges.requires_grad_(False)
            disbelief, distance = fooling(judges(real), judges(fake))
            judges.requires_grad_(True)
            loss = loss + _FOOLING_WEIGHT * disbelief + _LIKENESS_WEIGHT * distance
            figures |= {"judging": verdict.item(), "disbelief": disbelief.item(), "likeness": distance.item()}
        figures["norm"] = state.update("codec", loss, clip=2.0)
        return figures, BATCH * FRAMES * 0.08

    def check(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, Codec)
        pcm, prosody = held_out
        return {"loss": spectral(average.synthesise(codes_of(pcm, prosody)), pcm).item()}

    state.run(step, check, minutes)
