"""Models of the released shapes with random weights, made in memory: speed does not depend on what the weights say."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from streaming.config import LlamaConfig, MimiConfig, Rope
from streaming.models.checkpoint import Fingerprint, TensorSource
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.base import Operations
from streaming.models.quantized_weights import Quantize
from streaming.models.token_layout import TokenLayout

MIMI = MimiConfig(
    num_filters=64,
    hidden_size=512,
    upsampling_ratios=(8, 6, 5, 4),
    num_residual_layers=1,
    kernel_size=7,
    last_kernel_size=3,
    residual_kernel_size=3,
    dilation_growth_rate=2,
    compress=2,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=2048,
    norm_eps=1e-5,
    window=250,
    rope=Rope(10_000.0),
    codebook_size=2048,
    codebook_dim=256,
    num_codebooks=32,
    num_semantic=1,
)
"""kyutai/mimi."""
LLAMA_MIMI_1_3B = LlamaConfig(
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    norm_eps=1e-5,
    rope=Rope(500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    tied=True,
    vocab_size=128_256 + 4 * 2048 + 2,
    num_codebooks=4,
)
"""llm-jp/Llama-Mimi-1.3B: Llama 3.2 1B with 8,194 tokens more."""
LLAMA_MIMI_8B = replace(
    LLAMA_MIMI_1_3B,
    hidden_size=4096,
    num_layers=32,
    head_dim=128,
    intermediate_size=14_336,
    rope=replace(LLAMA_MIMI_1_3B.rope, factor=8.0),
    tied=False,
)
"""llm-jp/Llama-Mimi-8B: Llama 3.1 8B with 8,194 tokens more."""
TINY = replace(LLAMA_MIMI_1_3B, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=256)
TINY_MIMI = replace(
    MIMI,
    num_filters=8,
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    codebook_dim=32,
)
"""Shapes of no released model, for whatever is to be tried quickly; the codebooks are the released ones' in number."""
DECODERS = {"1.3b": LLAMA_MIMI_1_3B, "8b": LLAMA_MIMI_8B, "tiny": TINY}
CODECS = {"tiny": TINY_MIMI}
"""The codecs of those decoders whose codec is not Mimi as it was released."""


class RandomSource(TensorSource):
    """Has every tensor that it is asked for, drawn so that levels stay what they are through the layers."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.fingerprint = Fingerprint()

    def __contains__(self, name: str) -> bool:
        return False

    def load(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Source for the shapes' meaning: the layouts that `llama.py` and `mimi.py` read."""
        tensor = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        if len(shape) == 1:
            return tensor.fill_(0.0 if name.endswith(".bias") else 0.01 if name.endswith(".scale") else 1.0)
        tensor.normal_(std=1 / math.sqrt(math.prod(shape[1:])))
        self.fingerprint.note(name, tensor)
        return tensor

    def load_rows(self, name: str, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return self.load(name, (len(rows), *shape[1:]))


def random_codec(
    num_codebooks: int, device: torch.device, dtype: torch.dtype = torch.float32, config: MimiConfig = MIMI
) -> StreamingMimi:
    """Return a Mimi of this shape."""
    return StreamingMimi(RandomSource(device, dtype), config, num_codebooks)


def random_decoder(
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    operations: Operations | None = None,
) -> LlamaDecoder:
    """Return a decoder of this shape over as many of Mimi's codebooks as it has."""
    return LlamaDecoder(RandomSource(device, dtype), config, codes_layout(config), quantize, operations)


def codes_layout(config: LlamaConfig) -> TokenLayout:
    """Return the codes' tokens behind Llama's own."""
    first, units = 128_256, config.num_codebooks * MIMI.codebook_size
    ids = torch.arange(first, first + units).view(config.num_codebooks, -1)
    return TokenLayout((128_000, first + units), ids, first + units + 1)
