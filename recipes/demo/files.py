"""A checkpoint's files, as a hub repository has them: config, tensors, a tokenizer with the released models' tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, processors

from streaming.models.token_layout import AUDIO, END_OF_AUDIO, unit_name

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def write_checkpoint(folder: Path, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
    """config.json and model.safetensors, as a hub repository has them."""
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def unit_tokenizer(num_codebooks: int, codebook_size: int) -> Tokenizer:
    """A tokenizer with the tokens of the released models': bytes, `<bos>` put in front, the unit tokens added in code
    order.
    """
    vocabulary = {BOS: 0, EOS: 1} | {chr(c): i + 2 for i, c in enumerate(range(33, 127))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    units = [unit_name(code, book) for code in range(codebook_size) for book in range(num_codebooks)]
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in (AUDIO, END_OF_AUDIO, *units)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def write_tokenizer(folder: Path, num_codebooks: int, codebook_size: int) -> Tokenizer:
    """`unit_tokenizer` as files. Returns it."""
    tokenizer = unit_tokenizer(num_codebooks, codebook_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer
