"""What the tests measure against: tiny random checkpoints in the released models' layout, the published pipeline."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MimiConfig,
    MimiModel,
    PrefixConstrainedLogitsProcessor,
)

from recipes.demo.files import unit_tokenizer
from streaming import config
from streaming.models.checkpoint import TensorSource, read_config
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.base import Operations
from streaming.models.quantized_weights import Quantize
from streaming.models.token_layout import AUDIO, END_OF_AUDIO, TokenLayout, unit_name

FRAME = 1920
CODEBOOK_SIZE = 64
CPU = torch.device("cpu")

TINY_CODEC: dict[str, object] = {
    "num_filters": 4,
    "hidden_size": 32,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "codebook_size": CODEBOOK_SIZE,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "layer_scale_initial_scale": 0.5,
}
_CODEC = TINY_CODEC | {"sliding_window": 20, "num_quantizers": 8}
_DECODER: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    # Wavelengths of 6, 20, 63, 199 ... positions: below 64 / 4, between it and 64, above it: llama3's three bands.
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
}


def write_codec(folder: Path, **overrides: object) -> Path:
    """A tiny Mimi written by `transformers` itself, random in all that a released one has learned.

    Window of 20 steps, 8 codebooks of 64 codes, unless `overrides` (fields of `transformers.MimiConfig`) say otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    model = MimiModel(MimiConfig(**(_CODEC | overrides)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("scale"):
                tensor.copy_(0.5 + 0.1 * noise)  # attention must matter
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            else:
                tensor.copy_(noise * math.sqrt(2 / tensor[0].numel()))
            if tensor.shape[0] == 1:  # the last convolution: audio well inside +-1
                tensor.mul_(0.1)
        buffers = dict(model.named_buffers())
        for name, tensor in buffers.items():
            if name.endswith("embed_sum"):
                usage = buffers[name.replace("embed_sum", "cluster_usage")]
                usage.copy_(0.2 + 2 * torch.rand(usage.shape, generator=generator))
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * usage[:, None])
    model.save_pretrained(folder)
    return folder


def write_decoder(
    folder: Path,
    num_codebooks: int = 4,
    codebook_size: int = CODEBOOK_SIZE,
    shuffled: bool = False,
    bos: bool = True,
    shards: str = "1GB",
    **overrides: object,
) -> Path:
    """A tiny Llama with `num_quantizers`, written by `transformers` itself, and its tokenizer.

    shuffled: unit tokens get their ids in random order. bos: whether the tokenizer puts one in front.
    """
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, num_codebooks, codebook_size, shuffled, bos)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocab_size = len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"])  # the specials twice: spare rows
    fields = _DECODER | {"vocab_size": vocab_size, "num_quantizers": num_codebooks} | overrides
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 else noise * 1.5 / math.sqrt(tensor.shape[1]))
            if "embed" in name:
                tensor.mul_(2)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def write_tokenizer(
    folder: Path, num_codebooks: int, codebook_size: int = CODEBOOK_SIZE, shuffled: bool = False, bos: bool = True
) -> None:
    """The demo's tokenizer, as files."""
    tokenizer = json.loads(unit_tokenizer(num_codebooks, codebook_size).to_str())
    if shuffled:
        added = tokenizer["added_tokens"]
        order = torch.randperm(len(added) - 2, generator=torch.Generator().manual_seed(2)).tolist()
        contents = [added[2 + place]["content"] for place in order]
        for token, content in zip(added[2:], contents, strict=True):
            token["content"] = content
    if not bos:
        tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load_codec(
    folder: Path, num_codebooks: int = 4, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> StreamingMimi:
    """The codec under test."""
    source = TensorSource(folder, device, dtype)
    return StreamingMimi(source, config.MimiConfig.from_dict(read_config(folder)), num_codebooks)


def load_decoder(
    folder: Path,
    codebook_size: int = CODEBOOK_SIZE,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    operations: Operations | None = None,
    quantize: Quantize = "none",
) -> LlamaDecoder:
    """The decoder under test."""
    shape = config.LlamaConfig.from_dict(read_config(folder))
    layout = TokenLayout.load(folder, shape.num_codebooks, codebook_size, shape.vocab_size)
    return LlamaDecoder(TensorSource(folder, device, dtype), shape, layout, quantize, operations)


def speech(frames: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise whose level and colour change from frame to frame, so that its codes do too: [frames * 1920]."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((frames, FRAME))
    smooth = np.cumsum(noise, axis=1) / math.sqrt(FRAME)
    mix = random.random((frames, 1))
    level = 0.3 * random.random((frames, 1))
    return (level * (mix * noise + (1 - mix) * smooth)).astype(np.float32).reshape(-1)


def relative_error(value: Tensor | NDArray[np.float32], wanted: Tensor | NDArray[np.float32]) -> float:
    """|value - wanted| / |wanted|, of the whole."""
    a, b = (torch.as_tensor(x).double() for x in (value, wanted))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm() / b.norm())


class Published(NamedTuple):
    """prompt_codes: int64 [F, Q]; codes: int64 [n, Q], the continuation; pcm: float32 [(F + n) * 1920], prompt and
    continuation decoded as one stream; ended: whether `</audio>` came within `max_frames`.
    """

    prompt_codes: NDArray[np.int64]
    codes: NDArray[np.int64]
    pcm: NDArray[np.float32]
    ended: bool


@functools.cache
def _published_models(codec_dir: Path, model_dir: Path) -> tuple[LlamaForCausalLM, AutoTokenizer, MimiModel]:
    """Read the models of a session's checkpoints once: a test asks the pipeline for up to 20 prompts."""
    return (
        LlamaForCausalLM.from_pretrained(model_dir).eval(),
        AutoTokenizer.from_pretrained(model_dir),
        MimiModel.from_pretrained(codec_dir).eval(),
    )


@torch.inference_mode()
def published_pipeline(codec_dir: Path, model_dir: Path, pcm: NDArray[np.float32], max_frames: int) -> Published:
    """The batch job of the published `inference.py`, by `transformers` alone, at temperature 0.

    Encode everything, write the codes as text, tokenise, `generate`, read the codes back from text, decode everything.
    Generation is held to the tokens that a slot may emit: `</audio>` only in front of a frame. pcm: float32 [n], given
    to the codec as it is.
    """
    model, tokenizer, codec = _published_models(codec_dir, model_dir)
    books, size = model.config.num_quantizers, codec.config.codebook_size
    prompt = codec.encode(torch.from_numpy(pcm)[None, None], num_quantizers=books).audio_codes[0].T  # [F, Q]
    text = AUDIO + "".join(unit_name(code, book) for frame in prompt.tolist() for book, code in enumerate(frame))
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END_OF_AUDIO)
    units = [tokenizer.convert_tokens_to_ids([unit_name(c, book) for c in range(size)]) for book in range(books)]

    def allowed(_: int, ids: Tensor) -> list[int]:
        book = (len(ids) - tokens.shape[1]) % books
        return units[book] + ([end] if book == 0 else [])

    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_frames * books,
        eos_token_id=end,
        pad_token_id=end,
        logits_processor=LogitsProcessorList([PrefixConstrainedLogitsProcessor(allowed, 1)]),
    )[0, tokens.shape[1] :]
    spoken = tokenizer.decode(generated)
    codes = torch.tensor([int(code) for code in re.findall(r"<(\d+)_\d+>", spoken)], dtype=torch.int64).view(-1, books)
    audio = codec.decode(torch.cat((prompt, codes)).T[None]).audio_values[0, 0]
    return Published(prompt.numpy(), codes.numpy(), audio.numpy(), spoken.endswith(END_OF_AUDIO))
