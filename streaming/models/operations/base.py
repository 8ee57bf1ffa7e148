"""The interface of the models' operations: what a decoder and a codec ask of whatever runs them.

`torch.py` is the reference, in plain PyTorch; `triton/` has kernels for a GPU, `native/` C for a CPU, and `choice.py`
says which of them a model gets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streaming.models.attention import FrameView, KeyValueRing, Rotary
from streaming.models.codec_state import HalfState
from streaming.models.contexts import Contexts
from streaming.models.linear import Linear
from streaming.models.sampler import Drawing, SamplerState


@dataclass(frozen=True)
class Layer:
    """One of a decoder's layers. norm1, norm2: [hidden]; qkv, out, gate_up, down: its products."""

    norm1: Tensor
    norm2: Tensor
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


class Layers(Protocol):
    """All of a decoder's layers, one after another."""

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream, and what is yet to be added to it. x: [B, T, hidden]; view: of these tokens."""


@dataclass(frozen=True)
class CodecLayer:
    """One of the codec's pre-norm layers with layer scale: `MimiTransformerLayer`. norm1, norm2: weight and bias,
    [hidden] each; scale1, scale2: [hidden]; qkv, out, up, down: its products.
    """

    norm1: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    qkv: Linear
    out: Linear
    scale1: Tensor
    up: Linear
    down: Linear
    scale2: Tensor


class CodecLayers(Protocol):
    """All layers of one of the codec's transformers, one after another."""

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> Tensor:
        """x: [B, T, hidden]; view: of these steps. Returns [B, T, hidden]."""


@dataclass(frozen=True)
class Convolution:
    """A causal convolution, plain or transposed.

    product: [kernel * channels] to [upsample * C_out]. activate: whether an ELU stands before it; its context has that
    behind it. adds: whether the input of the convolution before it, as it was before its ELU, is added to its result.
    replicates: whether a stream's first step stands before itself; otherwise zeros do.
    """

    product: Linear
    channels: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    upsample: int = 1
    activate: bool = False
    adds: bool = False
    replicates: bool = False

    @property
    def context(self) -> int:
        """The input steps before the current ones that the kernel reaches back to."""
        return (self.kernel - 1) * self.dilation + 1 - self.stride


class Convolutions(Protocol):
    """Convolutions one after another."""

    def __call__(self, x: Tensor, contexts: Contexts, lengths: Tensor | None = None) -> Tensor:
        """Return [B, T', C_out] of a frame x [B, T, C], where T and what follows from it are multiples of the strides.

        lengths: [B] int64, samples of the frame that belong to the stream; None: all. Every convolution then finds
        zeros in its own input behind the last step that holds one of them.
        """


@dataclass(frozen=True)
class EncoderParts:
    """The codec's way in. convolutions: from 24 kHz to 25; layers: a transformer's, which looks back `window` steps,
    with the eps of its norms; downsample: from two steps to a frame's latent.
    """

    convolutions: Sequence[Convolution]
    layers: Sequence[CodecLayer]
    downsample: Convolution
    rotary: Rotary
    window: int
    eps: float

    @property
    def width(self) -> int:
        """The elements that all contexts of a stream take."""
        return sum(conv.context * conv.channels for conv in (*self.convolutions, self.downsample))


@dataclass(frozen=True)
class DecoderParts:
    """The codec's way out. latents: [Q, K, hidden], of which a frame's is the sum of one a codebook; taps: [2 * STEPS,
    hidden], what each step takes of that, then of the frame's before it; the rest as on the way in.
    """

    latents: Tensor
    taps: Tensor
    layers: Sequence[CodecLayer]
    convolutions: Sequence[Convolution]
    rotary: Rotary
    window: int
    eps: float

    @property
    def width(self) -> int:
        """The elements that all contexts of a stream take; the latent before the current one is the first of them."""
        return self.taps.shape[1] + sum(conv.context * conv.channels for conv in self.convolutions)


class CodecEncoder(Protocol):
    """The codec's whole way in."""

    def __call__(
        self, pcm: Tensor, half: HalfState, active: Tensor, lengths: Tensor | None, slots: Tensor | None
    ) -> Tensor:
        """Return a frame's latents [B, hidden], and advance the streams: see `StreamingMimi.follow`."""


class CodecDecoder(Protocol):
    """The codec's whole way out."""

    def __call__(self, codes: Tensor, half: HalfState, active: Tensor, slots: Tensor | None) -> Tensor:
        """Return a frame's speech [B, 1920], and advance the streams: see `StreamingMimi.decode`."""


class Operations(ABC):
    """x, pending: [B, T, hidden]. `pending` is what a layer's half has yet to add to the residual stream `x`."""

    name: str
    """The name of these operations, for people who run or measure them."""
    bounded = False
    """True if attention reads no more than a slot holds. Then a step is not told how many entries to look at."""
    activations: torch.dtype | None = None
    """The type of what is passed between the matrices; None: the type in which the weights are kept."""

    @abstractmethod
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
        """Return positions and masks of the next frame of B rows; move the prefix in front of their slots' windows.

        slots: [B] int64, the slot of each row; frames: [S], every slot's position; prefix_keys: [L, H, P, D], not
        rotated; columns: how many entries of the ring to look at.
        """

    @abstractmethod
    def view(
        self, slots: Tensor, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int
    ) -> FrameView:
        """Return what `attend` wants to know of tokens at `position` [B, T] of the streams in `slots` [B].

        start: [B, T] or [B, 1], where their windows begin; the latter, if the ring has a prefix.
        """

    @abstractmethod
    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + pending, and that normed as by `LlamaRMSNorm`: in float32, scaled in x's dtype."""

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return `torch.nn.functional.layer_norm`. x: [..., hidden]."""

    @abstractmethod
    def gate(self, both: Tensor) -> Tensor:
        """Return SiLU of the gate times the rest, [B, T, I]. both: [B, T, 2 * I], the gate first."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Linear) -> Tensor:
        """Return the product, [B, T, N]. weight: from K to N."""

    @abstractmethod
    def linear_gelu(self, x: Tensor, weight: Linear) -> Tensor:
        """Return `linear`, and GELU by the error function."""

    @abstractmethod
    def add_linear(self, residual: Tensor, scale: Tensor, x: Tensor, weight: Linear) -> Tensor:
        """Return residual + scale * linear(x). residual: [B, T, N]; scale: [N]."""

    @abstractmethod
    def project(
        self, x: Tensor, pending: Tensor | None, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        """Return x + pending, and that normed and multiplied: [B, T, N]."""

    @abstractmethod
    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        """Return x + pending, and that normed, multiplied and gated: [B, T, I]. weight: from hidden to 2 * I."""

    @abstractmethod
    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        """Keep the keys and values of these tokens, and attend. Return [B, T, H * G * D].

        qkv: [B, T, (H * G + 2 * H) * D], not rotated; view: of these T tokens.
        """

    @abstractmethod
    def layers(self, layers: Sequence[Layer], eps: float) -> Layers:
        """Return a decoder's layers as one. eps: of their norms."""

    @abstractmethod
    def codec_layers(self, layers: Sequence[CodecLayer], eps: float) -> CodecLayers:
        """Return the codec's layers as one."""

    @abstractmethod
    def contexts(self, memory: Tensor, slots: Tensor, frames: Tensor) -> Contexts:
        """Return a frame's contexts: see `Contexts`."""

    @abstractmethod
    def convolutions(self, convolutions: Sequence[Convolution]) -> Convolutions:
        """Return convolutions, one at least, as one."""

    @abstractmethod
    def codec_encoder(self, parts: EncoderParts) -> CodecEncoder:
        """Return the codec's way in as one."""

    @abstractmethod
    def codec_decoder(self, parts: DecoderParts) -> CodecDecoder:
        """Return the codec's way out as one."""

    @abstractmethod
    def extend(self, context: Tensor, x: Tensor, activate: bool, lengths: Tensor | None = None, hop: int = 1) -> Tensor:
        """Return what a convolution reads: its context [B, C, N], and behind it x [B, T, N], or ELU of x if `activate`.

        lengths: [B] int64, how many samples each row's x stands for; hop: samples a step. Steps behind them are zeros.

        ELU to 6e-8 of `torch.nn.functional.elu`, which goes through `expm1` and takes a CPU five times as long
        (docs/decisions.md).
        """

    @abstractmethod
    def windows(self, x: Tensor, product: Linear, kernel: int, stride: int, dilation: int) -> Tensor:
        """Return a convolution as a product, [B, windows, N].

        A window is `kernel` steps, `dilation` steps apart; one begins every `stride` steps. x: [B, T, C]; product: from
        kernel * C to N.
        """

    @abstractmethod
    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        """Return each row's next token: see `sampler.draw`."""
