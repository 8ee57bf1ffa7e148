"""Which operations a model runs with: what can be compiled for the device, the reference everywhere else."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator

import torch

from streaming.audio import FRAME
from streaming.config import LlamaConfig, MimiConfig
from streaming.errors import StreamingError
from streaming.models.attention import KeyValueRing, Rotary
from streaming.models.linear import Dense, Int8Gpu
from streaming.models.operations.base import Operations
from streaming.models.operations.native.operations import NativeOperations
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import KERNELS, WITHOUT
from streaming.models.quantized_weights import Quantize
from streaming.models.sampler import Drawing, SamplerState

_LOG = logging.getLogger(__name__)
_MANY, _SESSIONS = 8, 64
"""Tokens, and sessions, that run on other kernels than a few do."""


def pick(config: LlamaConfig, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none") -> Operations:
    """Return a decoder's operations. Where a kernel cannot be compiled or run, a line in the log says so.

    On CUDA they are kernels, if Triton is there, each of them if it runs for this decoder: what one that fails would
    compute is the reference's. On a CPU they are native, if there are such and the decoder's sizes are whole vectors.
    Otherwise they are the reference. Raises `StreamingError` for a kernel that breaks the device, and for names of
    kernels to leave out that there are not.
    """
    sizes = config.hidden_size, config.head_dim
    return _pick(sizes, device, dtype, "decoding", lambda made: rehearse(made, config, device, dtype, quantize))


def pick_for_codec(config: MimiConfig, device: torch.device, dtype: torch.dtype) -> Operations:
    """Return a codec's operations, in the same way."""
    sizes = config.hidden_size, config.head_dim
    return _pick(sizes, device, dtype, "coding", lambda made: rehearse_codec(made, config, device, dtype))


def _pick(
    sizes: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    doing: str,
    rehearsal: Callable[[Operations], Iterator[str]],
) -> Operations:
    """sizes: of activations and of a head. rehearsal: names each kernel, and then runs it."""
    if NativeOperations.can(device, dtype, *sizes):
        return NativeOperations()
    if device.type != "cuda":
        return TorchOperations()
    without = _left_out()
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
    while without < set(KERNELS):
        operations = TritonOperations(without=without)
        kernel = ""
        try:
            for following in rehearsal(operations):
                _finish(device)  # so that a fault of the kernel before is not taken for this one's
                kernel = following
            _finish(device)
        except torch.AcceleratorError as error:
            raise _broken(kernel, without, error) from error
        except torch.OutOfMemoryError:
            raise
        # No C compiler, a compiler that fails on this GPU, a launch that asks for more than it has.
        except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            if kernel in without or kernel not in KERNELS:
                raise
            try:
                _finish(device)
            except torch.AcceleratorError as lost:  # Triton's launcher tells its faults in its own words
                raise _broken(kernel, without, lost) from error
            told = " ".join(str(error).split())[:500]
            _LOG.warning("%s without the Triton kernel %s, slower: %s", doing, kernel, told)
            without |= {kernel}
        else:
            return operations
    _LOG.warning("%s without Triton kernels: all of them are left out", doing)
    return TorchOperations()


def _left_out() -> frozenset[str]:
    """Return the kernels that the environment leaves out. Raises `StreamingError` for names that none has."""
    told = os.environ.get(WITHOUT, "").strip()
    names = frozenset(KERNELS if told == "all" else filter(None, (name.strip() for name in told.split(","))))
    if unknown := sorted(names - set(KERNELS)):
        raise StreamingError(f"{WITHOUT}: there is no kernel {', '.join(unknown)}; there are {', '.join(KERNELS)}, all")
    return names


def _broken(kernel: str, without: frozenset[str], error: Exception) -> StreamingError:
    """Return what is said of a device that is lost to this process, so that nothing else can be tried in it."""
    names = ",".join(sorted(without | {kernel}))
    return StreamingError(f"{error}\nthe kernel {kernel} broke the device; {WITHOUT}={names} leaves it out")


def _finish(device: torch.device) -> None:
    """Wait for the device, unless it is a test's fake one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)


@torch.inference_mode()
def rehearse(
    operations: Operations, config: LlamaConfig, device: torch.device, dtype: torch.dtype, quantize: Quantize = "none"
) -> Iterator[str]:
    """Run every kernel for one slot, in a decoder's shapes and on numbers that mean nothing. Yields each one's name
    before it is run.
    """

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def weight(*shape: int) -> Dense | Int8Gpu:
        if quantize == "int8":
            return Int8Gpu(torch.zeros(shape, device=device, dtype=torch.int8), zeros(shape[0]))
        return Dense(zeros(*shape))  # 4 bits are the library's alone

    heads, dim, books, prefix = config.num_kv_heads, config.head_dim, config.num_codebooks, 2
    hidden, inner = config.hidden_size, config.intermediate_size
    norm, eps = zeros(hidden), config.norm_eps
    few, many = ([zeros(count, 1, hidden) for count in counts] for counts in ({1, books}, {_MANY}))
    yield "norm"
    for x in (*few, *many):
        operations.norm(x, None, norm, eps)
        operations.norm(x, x, norm, eps)
    yield "gate"
    operations.gate(zeros(_MANY, 1, 2 * inner))
    ring = KeyValueRing.allocate(1, 1, heads, 1024, dim, prefix, device, dtype)
    slots = frames = torch.zeros(1, device=device, dtype=torch.int64)
    rotary = Rotary(config.rope, dim, device)
    yield "begin_frame"
    view = operations.begin_frame(slots, frames, zeros(1, heads, prefix, dim), ring, rotary, 256, books, prefix + 1024)
    yield "attend"
    for time in {1, books}:
        operations.attend(zeros(1, time, (config.num_heads + 2 * heads) * dim), ring, 0, view.columns(0, time))
    qkv, gate_up, down = (
        weight(*shape)
        for shape in (((config.num_heads + 2 * heads) * dim, hidden), (2 * inner, hidden), (hidden, inner))
    )
    yield "matvec"
    for x in few:
        operations.project(x, None, norm, eps, qkv)
        operations.project(x, x, norm, eps, qkv)
        _, gated = operations.project_gated(x, x, norm, eps, gate_up)
        operations.linear(gated, down)
    yield "windows"
    for x in many:
        operations.linear(x, qkv)
    flags = torch.ones(3, 1, device=device, dtype=torch.bool)
    codes = torch.zeros(1, books, device=device, dtype=torch.int64)
    drawing = Drawing(slots, frames, flags[0], flags[0], codes, flags[1], flags[2])
    yield "draw"
    for some in (True, False):
        operations.draw(zeros(1, 2049), 0, SamplerState.allocate(1, device), drawing, few=some)


@torch.inference_mode()
def rehearse_codec(
    operations: Operations, config: MimiConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    """The same in a codec's shapes."""
    heads, dim = config.num_kv_heads, config.head_dim
    ring = KeyValueRing.allocate(1, 1, heads, config.window + 4, dim, 0, device, dtype)
    position = torch.arange(2, device=device)[None]
    yield "attend"
    view = operations.view(
        position[:, 0], position, position, ring, Rotary(config.rope, dim, device), config.window + 4
    )
    operations.attend(
        torch.zeros(1, 2, (config.num_heads + 2 * heads) * dim, device=device, dtype=dtype), ring, 0, view
    )
    yield "extend"
    x = torch.zeros(1, 2, config.hidden_size, device=device, dtype=dtype)
    for activate in (False, True):
        operations.extend(x, x, activate)
    yield "windows"
    x = torch.zeros(_SESSIONS, FRAME, 16, device=device, dtype=dtype)
    operations.windows(x, Dense(torch.zeros(64, 16, device=device, dtype=dtype)), 1, 1, 1)
