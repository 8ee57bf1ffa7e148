"""Both models' operations in plain PyTorch: what runs anywhere, and what every kernel is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming.audio import FRAME
from streaming.models import sampler
from streaming.models.attention import FrameView, KeyValueRing, Rotary, attend, rotate
from streaming.models.codec_state import STEPS, HalfState
from streaming.models.context_window import frame_positions, window_start
from streaming.models.contexts import Contexts
from streaming.models.linear import Linear
from streaming.models.operations.base import (
    CodecDecoder,
    CodecEncoder,
    CodecLayer,
    CodecLayers,
    Convolution,
    Convolutions,
    DecoderParts,
    EncoderParts,
    Layer,
    Layers,
    Operations,
)
from streaming.models.quantizer import latent_of
from streaming.models.sampler import Drawing, SamplerState


class TorchOperations(Operations):
    """See `Operations` for what each does."""

    name = "PyTorch"

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
        frames = frames[slots, None]
        start = window_start(frames, context_frames, books, ring.prefix)
        cos, sin = rotary(start - ring.prefix + torch.arange(ring.prefix, device=frames.device))  # [B, P, D]
        cos, sin = cos[:, None, None], sin[:, None, None]
        ring.keys[slots, :, :, : ring.prefix] = rotate(prefix_keys, cos, sin).to(ring.keys.dtype)
        position = frame_positions(frames, books, ring.prefix)
        return self.view(slots, position, start, ring, rotary, columns)

    def view(
        self, slots: Tensor, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int
    ) -> FrameView:
        cos, sin = rotary(position)
        index, visible = ring.index(position), ring.visible(position, start, columns)
        return FrameView(slots, position, start, cos.unsqueeze(1), sin.unsqueeze(1), index, visible)

    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x if pending is None else x + pending
        wide = x.float()
        return x, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        return weight(x)

    def linear_gelu(self, x: Tensor, weight: Linear) -> Tensor:
        return F.gelu(self.linear(x, weight))

    def add_linear(self, residual: Tensor, scale: Tensor, x: Tensor, weight: Linear) -> Tensor:
        return torch.addcmul(residual, scale, self.linear(x, weight))

    def project(
        self, x: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.norm(x, pending, norm, eps)
        return x, self.linear(normed, weight)

    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        x, both = self.project(x, pending, norm, eps, weight)
        return x, self.gate(both)

    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        assert view.visible is not None
        h = qkv.view(*qkv.shape[:2], -1, ring.keys.shape[4]).transpose(1, 2)
        return attend(ring.keep(h, layer, view), ring, layer, view.slots, view.visible)

    def layers(self, layers: Sequence[Layer], eps: float) -> Layers:
        return LayerByLayer(self, layers, eps)

    def codec_layers(self, layers: Sequence[CodecLayer], eps: float) -> CodecLayers:
        return CodecLayerByLayer(self, layers, eps)

    def contexts(self, memory: Tensor, slots: Tensor, frames: Tensor) -> Contexts:
        return Contexts(memory, slots, frames)

    def convolutions(self, convolutions: Sequence[Convolution]) -> Convolutions:
        return ConvolutionByConvolution(self, convolutions)

    def codec_encoder(self, parts: EncoderParts) -> CodecEncoder:
        return EncoderPartByPart(self, parts)

    def codec_decoder(self, parts: DecoderParts) -> CodecDecoder:
        return DecoderPartByPart(self, parts)

    def extend(self, context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
        if lengths is not None:
            x = ended(x, lengths, hop)
        if activate:
            x = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        return torch.cat((context, x), dim=1)

    def windows(self, x: Tensor, product: Linear, kernel: int, stride: int, dilation: int) -> Tensor:
        batch, time, channels = x.shape
        count = (time - (kernel - 1) * dilation - 1) // stride + 1
        row, step, one = x.stride()
        unfolded = x.as_strided((batch, count, kernel, channels), (row, stride * step, dilation * step, one))
        return product(unfolded.reshape(batch * count, -1)).view(batch, count, -1)

    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        return sampler.draw(logits, book, state, frame, few)


@dataclass(frozen=True)
class LayerByLayer:
    """A decoder's layers, one operation after another. See `Layers`."""

    operations: Operations
    layers: Sequence[Layer]
    eps: float

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> tuple[Tensor, Tensor | None]:
        operations, pending = self.operations, None
        for number, layer in enumerate(self.layers):
            x, qkv = operations.project(x, pending, layer.norm1, self.eps, layer.qkv)
            x, pending = finish(operations, layer, self.eps, x, operations.attend(qkv, ring, number, view))
        return x, pending


@dataclass(frozen=True)
class CodecLayerByLayer:
    """The codec's layers, one operation after another. See `CodecLayers`."""

    operations: Operations
    layers: Sequence[CodecLayer]
    eps: float

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> Tensor:
        operations, eps = self.operations, self.eps
        for number, layer in enumerate(self.layers):
            h = operations.linear(operations.layer_norm(x, *layer.norm1, eps), layer.qkv)
            h = operations.attend(h, ring, number, view)
            x = operations.add_linear(x, layer.scale1, h, layer.out)
            h = operations.linear_gelu(operations.layer_norm(x, *layer.norm2, eps), layer.up)
            x = operations.add_linear(x, layer.scale2, h, layer.down)
        return x


@dataclass(frozen=True)
class ConvolutionByConvolution:
    """Convolutions, one operation after another. See `Convolutions`."""

    operations: Operations
    convolutions: Sequence[Convolution]

    def __call__(self, x: Tensor, contexts: Contexts, lengths: Tensor | None = None) -> Tensor:
        before = x
        for conv in self.convolutions:
            batch, time, _ = x.shape
            context = contexts.take(conv.context, conv.channels)
            if conv.replicates:
                context = torch.where((contexts.frames == 0)[:, None, None], x[:, :1], context)
            read = self.operations.extend(context, x, conv.activate, lengths, FRAME // time)
            contexts.leave(read[:, read.shape[1] - conv.context :])
            y = self.operations.windows(read, conv.product, conv.kernel, conv.stride, conv.dilation)
            y = y.view(batch, time // conv.stride * conv.upsample, -1)
            before, x = x, before + y if conv.adds else y
        return x


class EncoderPartByPart:
    """The codec's way in, one part after another. See `CodecEncoder`."""

    def __init__(self, operations: Operations, parts: EncoderParts) -> None:
        self.operations, self.parts = operations, parts
        self._convolutions = operations.convolutions(parts.convolutions)
        self._layers = operations.codec_layers(parts.layers, parts.eps)
        self._downsample = operations.convolutions([parts.downsample])

    def __call__(
        self, pcm: Tensor, half: HalfState, active: Tensor, lengths: Tensor | None, slots: Tensor | None
    ) -> Tensor:
        slots = _rows(slots, pcm)
        frames = half.frames[slots]
        contexts = self.operations.contexts(half.contexts, slots, frames)
        x = self._convolutions(pcm.unsqueeze(-1), contexts, lengths)
        x = self._layers(x, half.ring, view_of_steps(self.operations, self.parts, slots, frames, half.ring))
        if lengths is not None:  # here the padding is replicated: a last step without a second one is read twice
            x = torch.where((lengths <= FRAME // STEPS)[:, None, None], x[:, :1], x)
        x = self._downsample(x, contexts)
        contexts.keep()
        half.frames[slots] = frames + active
        return x.squeeze(1)


class DecoderPartByPart:
    """The codec's way out, one part after another. See `CodecDecoder`."""

    def __init__(self, operations: Operations, parts: DecoderParts) -> None:
        self.operations, self.parts = operations, parts
        self._layers = operations.codec_layers(parts.layers, parts.eps)
        self._convolutions = operations.convolutions(parts.convolutions)

    def __call__(self, codes: Tensor, half: HalfState, active: Tensor, slots: Tensor | None) -> Tensor:
        slots, taps = _rows(slots, codes), self.parts.taps
        frames = half.frames[slots]
        contexts = self.operations.contexts(half.contexts, slots, frames)
        latent = latent_of(codes, self.parts.latents).unsqueeze(1)  # [B, 1, hidden]
        x = latent * taps[:STEPS] + contexts.take(1, latent.shape[2]) * taps[STEPS:]
        contexts.leave(latent)
        x = self._layers(x, half.ring, view_of_steps(self.operations, self.parts, slots, frames, half.ring))
        x = self._convolutions(x, contexts)
        contexts.keep()
        half.frames[slots] = frames + active
        return x.squeeze(-1)


def view_of_steps(
    operations: Operations, parts: EncoderParts | DecoderParts, slots: Tensor, frames: Tensor, ring: KeyValueRing
) -> FrameView:
    """Return the view of the two steps of each stream's next frame."""
    position = frames[:, None] * STEPS + torch.arange(STEPS, device=frames.device)
    start = (position - (parts.window - 1)).clamp(min=0)
    return operations.view(slots, position, start, ring, parts.rotary, ring.keys.shape[3])


def _rows(slots: Tensor | None, batch: Tensor) -> Tensor:
    return torch.arange(len(batch), device=batch.device) if slots is None else slots


def finish(operations: Operations, layer: Layer, eps: float, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual stream behind a layer's attention, and what is yet to be added to it."""
    pending = operations.linear(attended, layer.out)
    x, inner = operations.project_gated(x, pending, layer.norm2, eps, layer.gate_up)
    return x, operations.linear(inner, layer.down)


def ended(x: Tensor, lengths: Tensor, hop: int) -> Tensor:
    """x: [B, T, N], `hop` samples a step; lengths: [B] int64, in samples. Returns x with zeros in the steps that hold
    none of them.
    """
    held = torch.arange(x.shape[1], device=x.device) * hop < lengths[:, None]  # [B, T]
    return torch.where(held.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
