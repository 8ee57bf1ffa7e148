"""Tell what an error of PyTorch, cuBLAS or Triton means: memory that ran out, a device that is lost, or something else.

CUDA's errors stay: after a kernel that failed, every call of the process fails. PyTorch raises `AcceleratorError` for
its own calls, but a plain `RuntimeError` for what cuBLAS, cuDNN and Triton's launcher report.
"""

from __future__ import annotations

import re

import torch

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
_LOST = re.compile(r"CUDA error|CU(?:BLAS|DNN|FFT)_STATUS_|Triton Error \[CUDA\]")


def is_want_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the device or of the machine: less may fit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def is_lost(error: BaseException) -> bool:
    """Return whether the device is lost to this process."""
    if is_want_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )
