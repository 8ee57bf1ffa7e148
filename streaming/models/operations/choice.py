"""Which operations a model runs with: what can be compiled for the device, the reference everywhere else."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable

import torch

from streaming.audio import FRAME
from streaming.config import LlamaConfig, MimiConfig
from streaming.models.attention import KeyValueRing, Rotary
from streaming.models.linear import Dense
from streaming.models.operations.base import Operations
from streaming.models.operations.native.operations import NativeOperations
from streaming.models.operations.torch import TorchOperations
from streaming.models.sampler import Drawing, SamplerState

_LOG = logging.getLogger(__name__)
_MANY, _SESSIONS = 8, 64
"""Tokens, and sessions, that run on other kernels than a few do."""


def pick(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Return a decoder's operations. Where they cannot be compiled, a line in the log says so.

    On CUDA they are kernels, if Triton is there and compiles them for this decoder. On a CPU they are native, if there
    are such and the decoder's sizes are whole vectors. Otherwise they are the reference.
    """
    sizes = config.hidden_size, config.head_dim
    return _pick(sizes, device, dtype, "decoding", lambda made: rehearse(made, config, device, dtype))


def pick_for_codec(config: MimiConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Return a codec's operations, in the same way."""
    sizes = config.hidden_size, config.head_dim
    return _pick(sizes, device, dtype, "coding", lambda made: rehearse_codec(made, config, device, dtype))


def _pick(
    sizes: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    doing: str,
    rehearsal: Callable[[Operations], None],
) -> Operations:
    """sizes: of activations and of a head."""
    if NativeOperations.can(device, dtype, *sizes):
        return NativeOperations()
    if device.type != "cuda":
        return TorchOperations()
    _, head_dim = sizes
    if head_dim < 16 or head_dim & (head_dim - 1):
        _LOG.warning("%s without Triton kernels: heads of %d are not a power of two", doing, head_dim)
        return TorchOperations()
    try:
        from triton.errors import TritonError

        from streaming.models.operations.triton.operations import TritonOperations
    except ImportError as error:
        _LOG.warning("%s without Triton kernels: %s", doing, error)
        return TorchOperations()
    operations = TritonOperations()
    try:
        rehearsal(operations)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise  # the device's fault, which no other kernel mends
    # No C compiler, a compiler that fails on this GPU, a launch that asks for more than it has.
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        _LOG.warning("%s without Triton kernels: %s", doing, " ".join(str(error).split())[:500])
        return TorchOperations()
    return operations


@torch.inference_mode()
def rehearse(operations: Operations, config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Runs every operation once for one slot, in a decoder's shapes and on numbers that mean nothing."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    heads, dim, books, prefix = config.num_kv_heads, config.head_dim, config.num_codebooks, 2
    ring = KeyValueRing.allocate(1, 1, heads, 1024, dim, prefix, device, dtype)
    slots = frames = torch.zeros(1, device=device, dtype=torch.int64)
    rotary = Rotary(config.rope, dim, device)
    view = operations.begin_frame(slots, frames, zeros(1, heads, prefix, dim), ring, rotary, 256, books, prefix + 1024)
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
    x = zeros(_MANY, 1, hidden)
    x, _ = operations.project(x, None, norm, config.norm_eps, qkv)
    operations.project_gated(x, x, norm, config.norm_eps, gate_up)
    flags = torch.ones(3, 1, device=device, dtype=torch.bool)
    codes = torch.zeros(1, books, device=device, dtype=torch.int64)
    drawing = Drawing(slots, frames, flags[0], flags[0], codes, flags[1], flags[2])
    operations.draw(zeros(1, 2049), 0, SamplerState.allocate(1, device), drawing, few=True)
    operations.draw(zeros(1, 2049), 0, SamplerState.allocate(1, device), drawing, few=False)


@torch.inference_mode()
def rehearse_codec(operations: Operations, config: MimiConfig, device: torch.device, dtype: torch.dtype) -> None:
    """The same in a codec's shapes."""
    heads, dim = config.num_kv_heads, config.head_dim
    ring = KeyValueRing.allocate(1, 1, heads, config.window + 4, dim, 0, device, dtype)
    position = torch.arange(2, device=device)[None]
    view = operations.view(
        position[:, 0], position, position, ring, Rotary(config.rope, dim, device), config.window + 4
    )
    operations.attend(
        torch.zeros(1, 2, (config.num_heads + 2 * heads) * dim, device=device, dtype=dtype), ring, 0, view
    )
    x = torch.zeros(1, 2, config.hidden_size, device=device, dtype=dtype)
    for activate in (False, True):
        operations.extend(x, x, activate)
    x = torch.zeros(_SESSIONS, FRAME, 16, device=device, dtype=dtype)
    operations.windows(x, Dense(torch.zeros(64, 16, device=device, dtype=dtype)), 1, 1, 1)
