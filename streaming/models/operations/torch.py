"""Both models' operations in plain PyTorch: what runs anywhere, and what every kernel is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.models import sampler
from streaming.models.attention import FrameView, KeyValueRing, Rotary, attend, rotate
from streaming.models.linear import Linear
from streaming.models.sampler import Drawing, SamplerState


class Plain:
    """x, pending: [B, T, hidden]. `pending` is what a layer's half has yet to add to the residual stream `x`."""

    bounded = False
    """Whether attention reads only what a slot holds, so that a step need not be told how many entries to look at."""
    activations: torch.dtype | None = None
    """What runs between the matrices; None: the type in which the weights are kept."""

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
        """Positions and masks of the next frame of the first B slots; moves the prefix in front of their windows.

        frames: [B]; prefix_keys: [L, H, P, D], not rotated; columns: how many entries of the ring to look at.
        """
        frames = frames[:, None]
        start = ring.prefix + books * (frames + 1 - context_frames).clamp(min=0)  # [B, 1]
        cos, sin = rotary(start - ring.prefix + torch.arange(ring.prefix, device=frames.device))  # [B, P, D]
        cos, sin = cos[:, None, None], sin[:, None, None]
        ring.keys[: len(frames), :, :, : ring.prefix] = rotate(prefix_keys, cos, sin)
        position = ring.prefix - 1 + frames * books + torch.arange(books, device=frames.device)
        return self.view(position, start, ring, rotary, columns)

    def view(self, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int) -> FrameView:
        """What `attend` wants to know of tokens at `position` [B, T], whose windows begin at `start` [B, T] or [B, 1];
        the latter, if the ring has a prefix.
        """
        cos, sin = rotary(position)
        index, visible = ring.index(position), ring.visible(position, start, columns)
        return FrameView(position, start, cos.unsqueeze(1), sin.unsqueeze(1), index, visible)

    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`LlamaRMSNorm`: normalised in float32, scaled in x's dtype. Returns x + pending, and that normed."""
        x = x if pending is None else x + pending
        wide = x.float()
        return x, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x: [..., hidden]."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def gate(self, both: Tensor) -> Tensor:
        """both: [B, T, 2 * I], the gate first. Returns [B, T, I]."""
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """weight: from K to N. Returns [B, T, N]."""
        return weight(x)

    def linear_gelu(self, x: Tensor, weight: Linear) -> Tensor:
        """`linear`, and GELU by the error function."""
        return F.gelu(self.linear(x, weight))

    def add_linear(self, residual: Tensor, scale: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """Returns residual + scale * linear(x). residual: [B, T, N]; scale: [N]."""
        return torch.addcmul(residual, scale, self.linear(x, weight))

    def project(
        self, x: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        """Returns x + pending, and that normed and multiplied: [B, T, N]."""
        x, normed = self.norm(x, pending, norm, eps)
        return x, self.linear(normed, weight)

    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        """The same, and gated: from hidden to 2 * I. Returns x + pending and [B, T, I]."""
        x, both = self.project(x, pending, norm, eps, weight)
        return x, self.gate(both)

    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        """Keeps the keys and values of these tokens, and attends. qkv: [B, T, (H * G + 2 * H) * D], not rotated; view:
        of these T tokens. Returns [B, T, H * G * D].
        """
        assert view.index is not None and view.visible is not None
        h = qkv.view(*qkv.shape[:2], -1, ring.keys.shape[4]).transpose(1, 2)
        return attend(ring.keep(h, layer, view.index, view.cos, view.sin), ring, layer, view.visible)

    def extend(self, context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
        """What a convolution reads: its context [B, C, N], and x [B, T, N], by its ELU if `activate`, behind it.

        lengths: [B] int64, how many samples each row's x stands for; hop: samples a step. Steps behind them are zeros.

        ELU to 6e-8 of `torch.nn.functional.elu`, which goes through `expm1` and takes a CPU five times as long
        (docs/decisions.md).
        """
        if lengths is not None:
            x = ended(x, lengths, hop)
        if activate:
            x = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        return torch.cat((context, x), dim=1)

    def windows(self, x: Tensor, product: Linear, kernel: int, stride: int, dilation: int) -> Tensor:
        """A convolution as a product: of every window of `kernel` steps, `dilation` steps apart, one in `stride` steps.

        x: [B, T, C]; product: from kernel * C to N. Returns [B, windows, N].
        """
        batch, time, channels = x.shape
        count = (time - (kernel - 1) * dilation - 1) // stride + 1
        row, step, one = x.stride()
        unfolded = x.as_strided((batch, count, kernel, channels), (row, stride * step, dilation * step, one))
        return product(unfolded.reshape(batch * count, -1)).view(batch, count, -1)

    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        """See `sampler.draw`."""
        return sampler.draw(logits, book, state, frame, few)


def ended(x: Tensor, lengths: Tensor, hop: int) -> Tensor:
    """x: [B, T, N], `hop` samples a step; lengths: [B] int64, in samples. Returns x with zeros in the steps that hold
    none of them.
    """
    held = torch.arange(x.shape[1], device=x.device) * hop < lengths[:, None]  # [B, T]
    return torch.where(held.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
