"""Compiles every kernel as a 1.3B decoder launches it, down to an H100's machine code, and prints one line for each.

No GPU is needed: launches are turned into compilations, and the tensors have no memory. Run by `test_compiles.py`, in a
process of its own, because the interpreter replaces the compiler for a whole process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from streaming.models.operations.triton.add_norm import add_norm, norm
from streaming.models.operations.triton.begin_frame import _begin_frame
from streaming.models.operations.triton.decode_attention import decode_attention, splits_for
from streaming.models.operations.triton.draw import draw
from streaming.models.operations.triton.extend import extend
from streaming.models.operations.triton.gate import gate
from streaming.models.operations.triton.matvec import matvec
from streaming.models.operations.triton.rotation import rotate_and_keep
from streaming.models.random_weights import LLAMA_MIMI_1_3B, MIMI


class _H100:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    made = _run(self, *args, grid=grid, warmup=True, **options)
    print(self.fn.__module__.rpartition(".")[2], self.fn.__name__, len(made.asm["cubin"]))


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


if __name__ == "__main__":
    driver.set_active(_H100())
    _run, JITFunction.run = JITFunction.run, _compile
    config, slots, books, prefix = LLAMA_MIMI_1_3B, 2, 4, 2
    dim, heads, query_heads, hidden = config.head_dim, config.num_kv_heads, config.num_heads, config.hidden_size
    memory = _empty(slots, 1, heads, prefix + 1092, dim)
    ring, whole = memory[:, 0], torch.int64
    frequencies = _empty(dim // 2, dtype=torch.float32), _empty(dim // 2, dtype=torch.float64)
    named = _empty(slots, dtype=whole)
    _begin_frame._init_fn(named, named, _empty(1, heads, prefix, dim), memory, *frequencies, 255, books)
    for time in (1, books):
        position = _empty(slots, books, dtype=whole)[:, :time]
        angles = _empty(slots, 1, books, dim, dtype=torch.float32)[:, :, :time]
        qkv = _empty(slots, time, (query_heads + 2 * heads) * dim)
        rotate_and_keep._init_fn(qkv, angles, angles, named, position, ring, ring, prefix)
        for splits in (1, splits_for(slots, heads, 1094)):
            query, start = _empty(slots, time, query_heads, dim), _empty(slots, 1, dtype=whole)
            decode_attention._init_fn(query, ring, ring, named, position, start, prefix, splits)
    codec, exact = MIMI, torch.float32
    memory = _empty(slots, codec.num_layers, codec.num_kv_heads, codec.window + 36, codec.head_dim, dtype=exact)
    position, ring = _empty(slots, 2, dtype=whole), memory[:, 0]
    angles = _empty(slots, 1, 2, codec.head_dim, dtype=exact)
    qkv = _empty(slots, 2, 3 * codec.hidden_size, dtype=exact)
    query = rotate_and_keep._init_fn(qkv, angles, angles, named, position, ring, ring, 0)
    for splits in (1, splits_for(slots, codec.num_kv_heads, memory.shape[3])):
        decode_attention._init_fn(query, ring, ring, named, position, position, 0, splits)
    for activate, lengths in ((False, None), (True, None), (True, _empty(slots, dtype=whole))):
        context, frame = _empty(slots, 6, 64, dtype=exact), _empty(slots, 1920, 64, dtype=exact)
        extend._init_fn(context, frame, activate, lengths, 1)
    x, weight = _empty(slots, 1, hidden), _empty(hidden)
    add_norm._init_fn(x, x, weight, config.norm_eps)
    norm._init_fn(x, weight, config.norm_eps)
    gate._init_fn(_empty(slots, 1, 2 * config.intermediate_size))
    for rows in (1, 4):
        x, inner = _empty(rows, 1, hidden), config.intermediate_size
        matvec._init_fn(x, None, weight, _empty(hidden, hidden), config.norm_eps, False)
        matvec._init_fn(x, x, weight, _empty(2 * inner, hidden), config.norm_eps, True)
        matvec._init_fn(_empty(rows, 1, inner), None, None, _empty(hidden, inner), 0.0, False)
    flags = _empty(slots, 2, dtype=torch.bool)
    draw._init_fn(
        _empty(slots, 2049),
        _empty(slots, dtype=torch.float32),
        _empty(slots, dtype=whole),
        _empty(slots, dtype=torch.float32),
        *(_empty(slots, dtype=whole) for _ in range(3)),
        flags[:, 0],
        flags[:, 1],
        _empty(slots, books, dtype=whole),
        _empty(slots, dtype=torch.bool),
        _empty(slots, dtype=torch.bool),
        0,
    )
