"""A decoder's weights as llama.cpp runs them, through the packages `llama-cpp-python` and `gguf`.

Its vocabulary is cut to the codes, as ours is: with all of Llama's words a token would take it a fifth longer.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.config import LlamaConfig
from streaming.errors import StreamingError
from streaming.models.attention import Rotary
from streaming.models.checkpoint import TensorSource
from streaming.models.token_layout import TokenLayout

MISSING = "not compared with llama.cpp: `pip install llama-cpp-python gguf` adds it"


def installed() -> bool:
    """Return whether llama.cpp and what writes its files can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_gguf(source: TensorSource, config: LlamaConfig, layout: TokenLayout, path: Path, wide: bool = False) -> None:
    """Write a decoder as llama.cpp reads it: in bfloat16, or in float32 if `wide`. Its tokens are the codes, codebook
    by codebook, and the prefix behind them.
    """
    import gguf

    kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(path, "llama")
    rows = torch.cat((layout.units.flatten(), torch.tensor(layout.prefix)))
    writer.add_vocab_size(len(rows))
    writer.add_context_length(131_072)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("none")

    def add(name: str, tensor: Tensor) -> None:
        values = tensor.float().contiguous().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    table = (config.vocab_size, hidden)
    add("token_embd", source.load_rows("model.embed_tokens.weight", table, rows))
    if not config.tied or "lm_head.weight" in source:
        add("output", source.load_rows("lm_head.weight", table, rows))
    add("output_norm", source.load("model.norm.weight", (hidden,)))
    slowed = Rotary(config.rope, dim, torch.device("cpu")).frequency
    plain = 1.0 / (config.rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    add("rope_freqs", plain / slowed)
    matrices = {
        "attn_q": ("self_attn.q_proj", (config.num_heads * dim, hidden)),
        "attn_k": ("self_attn.k_proj", (config.num_kv_heads * dim, hidden)),
        "attn_v": ("self_attn.v_proj", (config.num_kv_heads * dim, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, config.num_heads * dim)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        add(f"blk.{layer}.attn_norm", source.load(f"{name}.input_layernorm.weight", (hidden,)))
        add(f"blk.{layer}.ffn_norm", source.load(f"{name}.post_attention_layernorm.weight", (hidden,)))
        for theirs, (ours, shape) in matrices.items():
            weight = source.load(f"{name}.{ours}.weight", shape)
            if theirs in ("attn_q", "attn_k"):  # llama.cpp rotates neighbouring numbers, not halves
                weight = weight.view(-1, 2, dim // 2, hidden).transpose(1, 2).reshape(shape)
            add(f"blk.{layer}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_q4_0(wide: Path, path: Path) -> None:
    """Write the same in 4 bits, a scale for 32 weights, as llama.cpp's own tool does. Raises `StreamingError`."""
    import llama_cpp

    _quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, torch.get_num_threads()
    if llama_cpp.llama_model_quantize(bytes(wide), bytes(path), ctypes.byref(params)):
        raise StreamingError(f"llama.cpp could not make 4 bits of {wide}")


class LlamaCpp:
    """A decoder of llama.cpp's, on as many threads as PyTorch has. Close it."""

    def __init__(self, path: Path, tokens: int) -> None:
        """tokens: the longest stream. Raises `StreamingError`."""
        import llama_cpp

        _quiet()
        self._library: Any = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        if not self._model:
            raise StreamingError(f"llama.cpp does not read {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = tokens
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise StreamingError(f"llama.cpp does not run {path}")
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Give its memory back."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def reset(self) -> None:
        """Begin a stream anew."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after these tokens, [vocabulary], until the next call. Raises `StreamingError`."""
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(given, len(tokens))):
            raise StreamingError("llama.cpp could not take these tokens")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._size,))

    def speak(self, prompt: Iterable[int], books: Sequence[range], frames: int) -> None:
        """Begin anew with a prompt, and draw the likeliest codes of so many frames. books: tokens of each codebook."""
        self.reset()
        logits = self.feed(list(prompt))
        for _ in range(frames):
            for book in books:
                logits = self.feed([book.start + int(logits[book.start : book.stop].argmax())])


@functools.cache
def _quiet() -> object:
    """Keep what llama.cpp says of its files off standard error. Returns what must live as long as the process."""
    import llama_cpp

    said = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(said, None)
    return said
