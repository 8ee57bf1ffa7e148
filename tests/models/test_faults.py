"""Errors as torch 2.11 to 2.14, cuBLAS and Triton word them."""

from __future__ import annotations

import pytest
import torch

from streaming.models.faults import is_lost, is_want_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_no_lost_device(error: BaseException) -> None:
    """The engine would be ended, though a narrower step fits."""
    assert is_want_of_memory(error)
    assert not is_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb )`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=repr,
)
def test_a_library_s_error_means_a_lost_device_too(error: BaseException) -> None:
    """cuBLAS' errors are no `AcceleratorError`: the engine went on, and every session got the same error."""
    assert is_lost(error)
    assert not is_want_of_memory(error)


def test_other_errors_are_neither_a_lost_device_nor_want_of_memory() -> None:
    """Pins a wrong shape that is told as want of memory."""
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x3 and 4x5)")
    assert not is_lost(error)
    assert not is_want_of_memory(error)
