"""The weights in the package, as modules that can be trained on: where reciting begins."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from recipes.demo.codec import Codec
from recipes.demo.recipe import CODEC

FOLDER = Path(__file__).parents[2] / "streaming" / "demo" / "voice"


def codec(folder: Path = FOLDER) -> Codec:
    """The codec of a folder with `codec/`, in float32, held."""
    made = Codec(CODEC)
    tensors = load_file(folder / "codec" / "model.safetensors")
    made.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return made.requires_grad_(False).eval()


def language_model(folder: Path = FOLDER) -> LlamaForCausalLM:
    """The language model of a folder with `decoder/`, in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    return model
