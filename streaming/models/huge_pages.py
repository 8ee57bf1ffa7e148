"""Memory on pages of 2 MiB, where Linux gives them: a processor reads ahead to the end of a page, and no further."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import sys

import torch
from torch import Tensor

_PAGE = 2**21
"""Bytes."""


def huge_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `torch.zeros`; on a CPU on huge pages, unless it is small or there are none."""
    return _huge(shape, device, dtype).zero_()


def on_huge_pages(weight: Tensor) -> Tensor:
    """Return the same numbers on huge pages; as they are, if they are few or there are none."""
    if sys.platform != "linux" or weight.nbytes < _PAGE:
        return weight
    return _huge(tuple(weight.shape), weight.device, weight.dtype).copy_(weight)


def _huge(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `torch.empty`, which is not touched yet: pages are given when it is. Raises `RuntimeError` as it does."""
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or device.type != "cpu" or not _PAGE <= size < sys.maxsize - _PAGE:
        return torch.empty(shape, device=device, dtype=dtype)
    room = torch.empty(size + _PAGE, device=device, dtype=torch.uint8)
    if room.device.type != "cpu":  # a fake tensor, of a mode that measures
        return room[:size].view(dtype).view(shape)
    start = -room.data_ptr() % _PAGE
    _madvise()(
        room.data_ptr() + start, size, mmap.MADV_HUGEPAGE
    )  # a kernel without huge pages returns an error, and does nothing
    return room[start : start + size].view(dtype).view(shape)


@functools.cache
def _madvise() -> ctypes._FuncPointer:
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
