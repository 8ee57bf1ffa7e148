"""Which operations a model runs with: what can be compiled for the device, the reference everywhere else."""

from __future__ import annotations

import logging
import subprocess

import torch

from streaming.config import LlamaConfig, MimiConfig
from streaming.models.attention import KeyValueRing, Rotary
from streaming.models.kernels.plain import Plain
from streaming.models.linear import Dense
from streaming.models.native.operations import Native
from streaming.models.sampler import Drawing, SamplerState

_LOG = logging.getLogger(__name__)


def pick(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Plain:
    """Kernels on CUDA, if Triton is there and compiles them for this decoder, native operations on a CPU; else the
    reference, and a line in the log says why.
    """
    if Native.can(device, config.hidden_size, config.head_dim):
        return Native()
    if device.type != "cuda":
        return Plain()
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        _LOG.warning("decoding without Triton kernels: heads of %d are not a power of two", config.head_dim)
        return Plain()
    try:
        from triton.errors import TritonError

        from streaming.models.kernels.fused import Fused
    except ImportError as error:
        _LOG.warning("decoding without Triton kernels: %s", error)
        return Plain()
    operations = Fused()
    try:
        rehearse(operations, config, device, dtype)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise  # the device's fault, which no other kernel mends
    # No C compiler, a compiler that fails on this GPU, a launch that asks for more than it has.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        _LOG.warning("decoding without Triton kernels: %s", " ".join(str(error).split())[:500])
        return Plain()
    return operations


def pick_for_codec(config: MimiConfig, device: torch.device) -> Plain:
    """The native operations on a CPU, if they are to be had for this codec; else the reference."""
    return Native() if Native.can(device, config.hidden_size, config.head_dim) else Plain()


@torch.inference_mode()
def rehearse(operations: Plain, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Runs every operation once for one slot, in a decoder's shapes and on numbers that mean nothing."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    heads, dim, books, prefix = config.num_kv_heads, config.head_dim, config.num_codebooks, 2
    ring = KeyValueRing.allocate(1, 1, heads, 1024, dim, prefix, device, dtype)
    frames = torch.zeros(1, device=device, dtype=torch.int64)
    rotary = Rotary(config.rope, dim, device)
    view = operations.begin_frame(frames, zeros(1, heads, prefix, dim), ring, rotary, 256, books, prefix + 1024)
    hidden, inner = config.hidden_size, config.intermediate_size
    norm = zeros(hidden)
    qkv, gate_up, down = (
        Dense(zeros(*shape))
        for shape in (((config.num_heads + 2 * heads) * dim, hidden), (2 * inner, hidden), (hidden, inner))
    )
    for time in {1, books}:
        x = zeros(1, time, hidden)
        x, projected = operations.project(x, None, norm, config.norm_eps, qkv)
        operations.attend(projected, ring, 0, view.columns(0, time))
        x, gated = operations.project_gated(x, x, norm, config.norm_eps, gate_up)
        operations.norm(x, operations.linear(gated, down), norm, config.norm_eps)
    flags = torch.ones(3, 1, device=device, dtype=torch.bool)
    codes = torch.zeros(1, books, device=device, dtype=torch.int64)
    drawing = Drawing(frames, flags[0], flags[0], codes, flags[1], flags[2])
    operations.draw(zeros(1, 2049), 0, SamplerState.allocate(1, device), drawing, few=True)
    operations.draw(zeros(1, 2049), 0, SamplerState.allocate(1, device), drawing, few=False)
