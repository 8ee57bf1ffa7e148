"""Compiles every kernel as a 1.3B decoder launches it, down to an H100's machine code, and prints one line for each.

A line has module, function, bytes of machine code, asynchronous copies, how many loads come before it waits for the
launch in front, -1 if it does not wait, a thread's registers, what it keeps outside them, in bytes, and instructions.

No GPU is needed: launches are turned into compilations, and the tensors have no memory. Run by `test_compiles.py`, in a
process of its own, because the interpreter replaces the compiler for a whole process, and with `--branches`: without
the launches that take no branch of their own, and without the count of instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from streaming.models.operations.triton import attention
from streaming.models.operations.triton import matvec as products
from streaming.models.operations.triton.add_norm import add_norm, norm
from streaming.models.operations.triton.attention import PROGRAMS, attend, splits_for
from streaming.models.operations.triton.begin_frame import _begin_frame
from streaming.models.operations.triton.draw import draw
from streaming.models.operations.triton.extend import extend
from streaming.models.operations.triton.gate import gate
from streaming.models.operations.triton.matvec import matvec
from streaming.models.operations.triton.windows import windows
from streaming.models.random_weights import LLAMA_MIMI_1_3B, MIMI

_BRANCHES = "--branches" in sys.argv[1:]
"""Whether one launch is enough for each branch of a kernel."""


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
    code = made.asm["ptx"]
    before, waits, _ = code.partition("griddepcontrol.wait")
    found = (len(made.asm["cubin"]), code.count("cp.async.c"), before.count("ld.global") if waits else -1)
    print(self.fn.__module__.rpartition(".")[2], self.fn.__name__, *found, *_dumped(made.asm["cubin"]), flush=True)


def _dumped(cubin: bytes) -> tuple[int, int, int]:
    """Return a thread's registers, the bytes of its stack and local memory, and how many instructions there are."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *([] if _BRANCHES else ["--dump-sass"]), file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told)
    registers, stack, local = map(int, used)
    return registers, stack + local, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", told, re.MULTILINE))


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


if __name__ == "__main__":
    driver.set_active(_H100())
    attention.follows_early = products.follows_early = lambda _: True
    _run, JITFunction.run = JITFunction.run, _compile
    config, slots, books, prefix = LLAMA_MIMI_1_3B, 2, 4, 2
    dim, heads, query_heads, hidden = config.head_dim, config.num_kv_heads, config.num_heads, config.hidden_size
    memory = _empty(slots, 1, heads, prefix + 1092, dim)
    ring, whole = memory[:, 0], torch.int64
    frequencies = _empty(dim // 2, dtype=torch.float32), _empty(dim // 2, dtype=torch.float64)
    named, arrived = _empty(slots, dtype=whole), _empty(PROGRAMS, dtype=torch.int32)
    _begin_frame._init_fn(named, named, _empty(1, heads, prefix, dim), memory, *frequencies, 255, books)
    for time in (1, books):
        position = _empty(slots, books, dtype=whole)[:, :time]
        angles = _empty(slots, 1, books, dim, dtype=torch.float32)[:, :, :time]
        qkv = _empty(slots, time, (query_heads + 2 * heads) * dim)
        start = _empty(slots, 1, dtype=whole)
        both = (1, splits_for(slots, heads, 1094))
        for splits in (both[time == 1],) if _BRANCHES else both:
            attend._init_fn(qkv, angles, angles, ring, ring, named, position, start, arrived, prefix, splits)
    codec, exact = MIMI, torch.float32
    memory = _empty(slots, codec.num_layers, codec.num_kv_heads, codec.window + 36, codec.head_dim, dtype=exact)
    position, ring = _empty(slots, 2, dtype=whole), memory[:, 0]
    angles = _empty(slots, 1, 2, codec.head_dim, dtype=exact)
    qkv = _empty(slots, 2, 3 * codec.hidden_size, dtype=exact)
    both = (1, splits_for(slots, codec.num_kv_heads, memory.shape[3]))
    for splits in both[1:] if _BRANCHES else both:
        attend._init_fn(qkv, angles, angles, ring, ring, named, position, position, arrived, 0, splits)
    for steps, channels, outputs, kernel, stride, dilation in ((1926, 1, 64, 7, 1, 1), (1922, 128, 256, 10, 5, 1)):
        frame, weight = _empty(64, steps, channels, dtype=exact), _empty(outputs, kernel * channels, dtype=exact)
        windows._init_fn(frame, weight, None, _empty(outputs, dtype=exact), kernel, stride, dilation)
    eight, gates = (_empty(count, hidden, dtype=torch.int8) for count in (3072, 2 * config.intermediate_size))
    windows._init_fn(_empty(64, 1, hidden), eight, _empty(3072), None, 1, 1, 1)
    for activate, lengths in ((False, None), (True, None), (True, _empty(slots, dtype=whole))):
        context, frame = _empty(slots, 6, 64, dtype=exact), _empty(slots, 1920, 64, dtype=exact)
        extend._init_fn(context, frame, activate, lengths, 1)
    x, weight = _empty(slots, 1, hidden), _empty(hidden)
    add_norm._init_fn(x, x, weight, config.norm_eps)
    norm._init_fn(x, weight, config.norm_eps)
    gate._init_fn(_empty(slots, 1, 2 * config.intermediate_size))
    for rows in (1, 4):
        x, inner = _empty(rows, 1, hidden), config.intermediate_size
        if rows == 4 or not _BRANCHES:
            matvec._init_fn(x, None, weight, _empty(hidden, hidden), None, config.norm_eps, False)
            matvec._init_fn(x, x, weight, _empty(2 * inner, hidden), None, config.norm_eps, True)
            matvec._init_fn(_empty(rows, 1, inner), None, None, _empty(hidden, inner), None, 0.0, False)
        if rows == 1 or not _BRANCHES:
            matvec._init_fn(x, x, weight, gates, _empty(2 * inner), config.norm_eps, True)
        if not _BRANCHES:
            matvec._init_fn(x, x, weight, eight, _empty(3072), config.norm_eps, False)
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
