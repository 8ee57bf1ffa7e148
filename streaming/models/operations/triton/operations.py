"""Both models' operations as Triton kernels, with the reference's signatures.

What no kernel covers, the reference does.
"""

from __future__ import annotations

from torch import Tensor

from streaming.models.attention import FrameView, KeyValueRing, Rotary
from streaming.models.linear import Dense, Linear
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.add_norm import add_norm, norm
from streaming.models.operations.triton.begin_frame import begin_frame
from streaming.models.operations.triton.decode_attention import decode_attention, splits_for
from streaming.models.operations.triton.draw import draw
from streaming.models.operations.triton.extend import extend
from streaming.models.operations.triton.gate import gate
from streaming.models.operations.triton.matvec import MOST_ROWS, matvec
from streaming.models.operations.triton.rotation import rotate_and_keep
from streaming.models.sampler import Drawing, SamplerState


class TritonOperations(TorchOperations):
    """See `Operations` for what each does."""

    name = "Triton"
    bounded = True

    def __init__(self, matvec_rows: int = 0) -> None:
        """matvec_rows: up to so many tokens at once (at most `matvec.MOST_ROWS`) go through `matvec` instead of the
        library's products. Off until a measurement says otherwise.
        """
        assert 0 <= matvec_rows <= MOST_ROWS
        self._matvec_rows = matvec_rows

    def begin_frame(
        self,
        frames: Tensor,
        prefix_keys: Tensor,
        ring: KeyValueRing,
        rotary: Rotary,
        context_frames: int,
        books: int,
        columns: int,
    ) -> FrameView:
        return FrameView(*begin_frame(frames, prefix_keys, ring.keys, rotary, context_frames, books), None, None)

    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if pending is None:
            return x, norm(x, weight, eps)
        return add_norm(x, pending, weight, eps)

    def gate(self, both: Tensor) -> Tensor:
        return gate(both)

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        if not (isinstance(weight, Dense) and self._few(x)):
            return super().linear(x, weight)
        return matvec(x, None, None, weight.weight, 0.0, False)[1]

    def project(
        self, x: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        if not (isinstance(weight, Dense) and self._few(x)):
            return super().project(x, pending, norm, eps, weight)
        total, out = matvec(x, pending, norm, weight.weight, eps, False)
        return x if pending is None else total, out

    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        if not (isinstance(weight, Dense) and self._few(x)):
            return super().project_gated(x, pending, norm, eps, weight)
        return matvec(x, pending, norm, weight.weight, eps, True)

    def _few(self, x: Tensor) -> bool:
        return x.shape[0] * x.shape[1] <= self._matvec_rows

    def view(self, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int) -> FrameView:
        cos, sin = rotary(position)
        return FrameView(position, start, cos.unsqueeze(1), sin.unsqueeze(1), None, None)

    def extend(self, context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
        return extend(context, x, activate, lengths, hop)

    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        keys, values = ring.keys[:, layer], ring.values[:, layer]
        query = rotate_and_keep(qkv, view.cos, view.sin, view.position, keys, values, ring.prefix)
        splits = splits_for(len(qkv), keys.shape[1], keys.shape[2])
        out = decode_attention(query, keys, values, view.position, view.start, ring.prefix, splits)
        return out.flatten(2)

    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        if not few:
            return super().draw(logits, book, state, frame, few)
        return draw(
            logits,
            state.temperature,
            state.top_k,
            state.top_p,
            state.seed,
            frame.frames,
            frame.listening,
            frame.speaking,
            frame.codes,
            frame.ended,
            frame.finite,
            book,
        )
