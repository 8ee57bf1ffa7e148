"""Both models' operations as Triton kernels, with the reference's signatures.

What no kernel covers, the reference does, and what a kernel covers that is left out.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from streaming.models.attention import FrameView, KeyValueRing, Rotary
from streaming.models.linear import Dense, Int8Gpu, Linear
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import KERNELS, NAME
from streaming.models.operations.triton.add_norm import add_norm, norm
from streaming.models.operations.triton.attention import attend, counters, splits_for
from streaming.models.operations.triton.begin_frame import begin_frame
from streaming.models.operations.triton.draw import draw
from streaming.models.operations.triton.extend import extend
from streaming.models.operations.triton.gate import gate
from streaming.models.operations.triton.matvec import MOST_ROWS, matvec
from streaming.models.operations.triton.windows import LEAST_ROWS, fills_a_gpu, windows
from streaming.models.sampler import Drawing, SamplerState

MATVEC_ROWS = MOST_ROWS
"""Chosen by the bytes and launches that it saves; it has not been measured on a GPU yet (docs/performance.md)."""


class TritonOperations(TorchOperations):
    """See `Operations` for what each does."""

    def __init__(self, matvec_rows: int | None = None, without: Collection[str] = ()) -> None:
        """matvec_rows: up to so many tokens at once (at most `matvec.MOST_ROWS`) go through `matvec` instead of the
        library's products; None: `MATVEC_ROWS`. without: which `KERNELS` are left out.
        """
        assert matvec_rows is None or 0 <= matvec_rows <= MOST_ROWS
        assert set(without) <= set(KERNELS)
        self.without = frozenset(without)
        self.name = NAME if not without else f"{NAME} without {', '.join(sorted(without))}"
        self.bounded = self._has("attend")
        self._matvec_rows = matvec_rows if self._has("matvec") else 0
        self._counters: dict[torch.device, Tensor] = {}

    def _has(self, kernel: str) -> bool:
        return kernel not in self.without

    def begin_frame(
        self,
        slots: Tensor,
        frames: Tensor,
        prefix_keys: Tensor,
        ring: KeyValueRing,
        rotary: Rotary,
        context_frames: int,
        books: int,
        columns: int,
    ) -> FrameView:
        if not (self._has("begin_frame") and self._has("attend")):  # only the kernel attends without masks
            return super().begin_frame(slots, frames, prefix_keys, ring, rotary, context_frames, books, columns)
        where = begin_frame(slots, frames, prefix_keys, ring.keys, rotary, context_frames, books)
        return FrameView(slots, *where, None, None)

    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not self._has("norm"):
            return super().norm(x, pending, weight, eps)
        if pending is None:
            return x, norm(x, weight, eps)
        return add_norm(x, pending, weight, eps)

    def gate(self, both: Tensor) -> Tensor:
        return gate(both) if self._has("gate") else super().gate(both)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        held = _held(weight)
        if held is None:
            return super().linear(x, weight)
        if self._few(x):
            return matvec(x, None, None, *held, 0.0, False)[1]
        if isinstance(weight, Int8Gpu) and self._has("windows"):
            rows = x.reshape(-1, 1, x.shape[-1])
            return windows(rows, weight.weight, weight.scale, None, 1, 1, 1).view(*x.shape[:-1], -1)
        return super().linear(x, weight)

    def project(
        self, x: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        held = _held(weight)
        if held is None or not self._few(x):
            return super().project(x, pending, norm, eps, weight)
        total, out = matvec(x, pending, norm, *held, eps, False)
        return x if pending is None else total, out

    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        held = _held(weight)
        if held is None or not self._few(x):
            return super().project_gated(x, pending, norm, eps, weight)
        return matvec(x, pending, norm, *held, eps, True)

    def _few(self, x: Tensor) -> bool:
        most = MATVEC_ROWS if self._matvec_rows is None else self._matvec_rows
        return x.shape[0] * x.shape[1] <= most

    def windows(self, x: Tensor, product: Linear, kernel: int, stride: int, dilation: int) -> Tensor:
        if self._has("windows") and isinstance(product, Dense) and len(x) >= LEAST_ROWS:
            count = (x.shape[1] - (kernel - 1) * dilation - 1) // stride + 1
            if fills_a_gpu(len(x) * count, len(product.weight)):
                return windows(x, product.weight, None, product.bias, kernel, stride, dilation)
        return super().windows(x, product, kernel, stride, dilation)

    def view(
        self, slots: Tensor, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int
    ) -> FrameView:
        if not self._has("attend"):
            return super().view(slots, position, start, ring, rotary, columns)
        cos, sin = rotary(position)
        return FrameView(slots, position, start, cos.unsqueeze(1), sin.unsqueeze(1), None, None)

    def extend(self, context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
        if not self._has("extend"):
            return super().extend(context, x, activate, lengths, hop)
        return extend(context, x, activate, lengths, hop)

    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        if not self._has("attend"):
            return super().attend(qkv, ring, layer, view)
        keys, values = ring.keys[:, layer], ring.values[:, layer]
        splits = splits_for(len(qkv), keys.shape[1], keys.shape[2])
        arrived = self._arrived(qkv.device)
        return attend(
            qkv, view.cos, view.sin, keys, values, view.slots, view.position, view.start, arrived, ring.prefix, splits
        )

    def _arrived(self, device: torch.device) -> Tensor:
        """Return the counters of a device, the same in every launch: made before anything is captured."""
        if device not in self._counters:
            self._counters[device] = counters(device)
        return self._counters[device]

    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        if not few or not self._has("draw"):
            return super().draw(logits, book, state, frame, few)
        return draw(
            logits,
            state.temperature,
            state.top_k,
            state.top_p,
            state.seed,
            frame.slots,
            frame.frames,
            frame.listening,
            frame.speaking,
            frame.codes,
            frame.ended,
            frame.finite,
            book,
        )


def _held(weight: Linear) -> tuple[Tensor, Tensor | None] | None:
    """Return what `matvec` takes of a weight: numbers, and the scales of 8 bits; None if it takes none of it."""
    if isinstance(weight, Dense):
        return None if weight.bias is not None else (weight.weight, None)
    return (weight.weight, weight.scale) if isinstance(weight, Int8Gpu) else None
