"""Stage 10, export: the trained parts as two small checkpoint folders in the released models' layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recipes.demo import files, joint, language
from recipes.demo.codec import Codec
from recipes.demo.recipe import CODEC


def write_codec(folder: Path, codec: Codec, dtype: torch.dtype) -> None:
    """config.json and model.safetensors of a codec."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_checkpoint(folder, CODEC, _as(dtype, codec.state_dict()))


def write_decoder(folder: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """config.json, model.safetensors and the tokenizer of a language model."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tokenizer(folder, CODEC["num_quantizers"], CODEC["codebook_size"])
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    files.write_checkpoint(folder, language.config(), _as(dtype, tensors))


def export(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes `target/codec` and, if there is one, `target/decoder`."""
    write_codec(target / "codec", joint.trained(folder), dtype)
    if (folder / "language.pt").is_file():
        write_decoder(target / "decoder", language.loop(folder).average, dtype)


def _as(dtype: torch.dtype, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
