"""All of the quantizer's codebooks in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from streaming.models.operations.native.library import library
from streaming.models.operations.native.matrix import NativeLinear, pointer


class _Quantizer(ctypes.Structure):
    _fields_ = (
        ("projections", c_void_p * 2),
        *((name, c_void_p) for name in ("nearness", "codebooks")),
        *((name, c_int64) for name in ("books", "semantic", "entries", "width")),
    )


class NativeQuantizer:
    """latent: [B, hidden] float32. Returns codes [B, Q] int64: what `SplitQuantizer.one_by_one` gives, to the bit."""

    def __init__(
        self, projections: Sequence[NativeLinear], nearness: Sequence[NativeLinear], codebooks: Tensor, semantic: int
    ) -> None:
        """projections: none, or one for each part; codebooks: [Q, K, D] float32, `semantic` of them of the first part;
        nearness: of each.
        """
        opened = library()
        assert opened is not None and codebooks.dtype == torch.float32 and len(projections) in (0, 2)
        self._run = opened.native_quantise
        self._kept = (*projections, *nearness, codebooks.contiguous())
        self._nearness = (c_void_p * len(nearness))(*(matrix.address for matrix in nearness))
        self._books = len(nearness)
        self._hidden = (projections or nearness)[0].inputs
        self._native = _Quantizer(
            (c_void_p * 2)(*(matrix.address for matrix in projections)),
            ctypes.addressof(self._nearness),
            pointer(codebooks),
            self._books,
            semantic,
            *codebooks.shape[1:],
        )

    @staticmethod
    def of(
        projections: Sequence[Any], nearness: Sequence[Any], codebooks: Tensor, semantic: int, latents: torch.dtype
    ) -> NativeQuantizer | None:
        """Return them in one call, or None where not all products are native, or latents not in float32. projections:
        one for each part, or None.
        """
        into = [one for one in projections if one is not None]
        if latents != torch.float32 or not all(isinstance(one, NativeLinear) for one in (*into, *nearness)):
            return None
        return NativeQuantizer(into, nearness, codebooks, semantic)

    def __call__(self, latent: Tensor) -> Tensor:
        assert latent.dtype == torch.float32 and latent.shape[1] == self._hidden
        latent = latent.contiguous()
        codes = torch.empty(len(latent), self._books, dtype=torch.int64)
        if self._run(byref(self._native), latent.data_ptr(), len(latent), codes.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for the codes of {len(latent)} rows")
        return codes
