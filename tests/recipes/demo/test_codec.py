"""The training graph against the streaming modules: what is trained is what is heard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.demo.codec import Codec, Config
from recipes.demo.files import write_checkpoint
from recipes.demo.recipe import CODEC
from streaming.audio import FRAME
from tests.reference import TINY_CODEC, load_codec, relative_error, speech

_FRAMES = 24  # more than the transformers' window
_SMALL: Config = CODEC | TINY_CODEC


def _codec(config: Config) -> Codec:
    codec = Codec(config).requires_grad_(False)
    for part in codec.quantizer.parts():
        part.set_books([torch.randn(config["codebook_size"], config["codebook_dim"]) for _ in part.layers])
    codec.upsample.conv.weight.normal_()  # type: ignore[union-attr, operator]
    return codec


@pytest.mark.parametrize("config", [_SMALL, _SMALL | {"compress": 2, "upsampling_ratios": [8, 6, 5, 4]}])
def test_streaming_gives_what_the_training_graph_gives(config: Config, tmp_path: Path) -> None:
    """Beyond the window too: without a windowed mask, training would see what streaming has forgotten."""
    codec = _codec(config)
    write_checkpoint(tmp_path, config, codec.state_dict())
    streaming = load_codec(tmp_path, config["num_quantizers"])
    pcm = torch.from_numpy(speech(_FRAMES)).view(1, -1)
    latent = codec.latent(pcm)
    state, active = streaming.init_state(1), torch.ones(1, dtype=torch.bool)
    frames = pcm.view(_FRAMES, 1, FRAME)
    streamed = torch.stack([streaming.follow(frame, state, active) for frame in frames], dim=2)
    assert relative_error(streamed, latent) < 1e-5

    codes = codec.quantizer.encode(latent)
    assert torch.equal(codes[0], torch.cat([streaming.quantizer.encode(x) for x in streamed.unbind(2)]))
    made = torch.cat([streaming.decode(frame[None], state, active) for frame in codes[0]], dim=1)
    assert relative_error(made, codec.synthesise(codes)) < 1e-5


def test_a_gradient_passes_the_codes_by() -> None:
    """What is heard is what the codes give, and what is learned is as if nothing had been rounded: pins a joint
    training in which the encoder learns nothing from the sound.
    """
    codec = _codec(_SMALL)
    projected = codec.quantizer.projections(codec.latent(torch.from_numpy(speech(6)).view(1, -1)))
    for x in projected:
        x.requires_grad_()
    through = codec.quantizer.through(projected)
    assert relative_error(through.detach(), codec.quantizer.decode(codec.quantizer.codes(projected))) < 1e-6
    weight = torch.randn_like(through)
    (through * weight).sum().backward()
    for part, x in zip(codec.quantizer.parts(), projected, strict=True):
        straight = part.output_proj.weight.squeeze(-1).T @ weight
        assert x.grad is not None and relative_error(x.grad, straight.transpose(1, 2)) < 1e-5


def test_every_tensor_of_the_training_graph_is_one_of_mimis(codec_checkpoint: object, tmp_path: Path) -> None:
    """`transformers` reads the same file, so the names are those of the released checkpoints."""
    from transformers import MimiModel

    write_checkpoint(tmp_path, _SMALL, _codec(_SMALL).state_dict())
    _, report = MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
