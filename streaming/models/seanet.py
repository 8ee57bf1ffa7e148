"""SEANet, Mimi's causal convolutional encoder and decoder (arXiv 2009.02095, 2210.13438), one frame at a time.

Activations are [B, T, C]. Every convolution is one matrix product over its unfolded input (docs/decisions.md). A
transposed convolution is the same thing seen from its input: each input step gives `stride` outputs, from itself and
the few steps before it.

A layer's only state is its context, the last inputs that the next frame still needs. Layers take and return contexts;
who keeps them is not their business.

A stream may end within a frame. Every layer then finds zeros in its own input behind the last step that holds a sample
of the stream, as `transformers` pads the input of each convolution of an encoder (`MimiConv1d`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from streaming.audio import FRAME
from streaming.config import MimiConfig
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import Linear, linear
from streaming.models.operations.base import Operations

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class CausalConv1d:
    """A causal convolution, plain or transposed.

    product: [kernel * C_in] to [upsample * C_out].
    context: input steps before the current ones that the kernel reaches back to.
    """

    product: Linear
    channels: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    upsample: int = 1

    @staticmethod
    def load(
        source: TensorSource, name: str, shape: Shape, stride: int = 1, dilation: int = 1, bias: bool = True
    ) -> CausalConv1d:
        """Make one from a `Conv1d` on disk, weight `shape` = [C_out, C_in, kernel]."""
        out, channels, kernel = shape
        weight = source.load(f"{name}.conv.weight", shape).permute(0, 2, 1).reshape(out, kernel * channels)
        product = linear(weight, bias=source.load(f"{name}.conv.bias", (out,)) if bias else None)
        return CausalConv1d(product, channels, kernel, stride, dilation)

    @staticmethod
    def load_transposed(source: TensorSource, name: str, shape: Shape, stride: int) -> CausalConv1d:
        """Make one from a `ConvTranspose1d` on disk, weight `shape` = [C_in, C_out, kernel], trimmed on the right.

        Output t * stride + r is the sum over i of x[t - i] @ W[:, :, i * stride + r], so input step t - i needs the
        taps from i * stride: a causal convolution of ceil(kernel / stride) taps and stride * C_out outputs.
        """
        channels, out, kernel = shape
        taps = -(-kernel // stride)
        weight = F.pad(source.load(f"{name}.conv.weight", shape), (0, taps * stride - kernel)).view(
            channels, out, taps, stride
        )
        flat = weight.flip(2).permute(3, 1, 2, 0).reshape(stride * out, taps * channels)
        product = linear(flat, bias=source.load(f"{name}.conv.bias", (out,)).repeat(stride))
        return CausalConv1d(product, channels, taps, upsample=stride)

    @property
    def context(self) -> int:
        return (self.kernel - 1) * self.dilation + 1 - self.stride

    def __call__(
        self, x: Tensor, context: Tensor, operations: Operations, activate: bool = False, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: [B, T, C_in], a frame of T steps, T a multiple of the stride; context: [B, context, C_in]. activate:
        whether an ELU stands before the convolution; contexts have it behind them. lengths: [B] int64, samples of the
        frame that belong to the stream; None: all.

        Returns the output [B, T / stride * upsample, C_out] and the context for the next frame.
        """
        batch, time, _ = x.shape
        x = operations.extend(context, x, activate, lengths, FRAME // time)
        context = x[:, x.shape[1] - self.context :]
        y = operations.windows(x, self.product, self.kernel, self.stride, self.dilation)
        return y.view(batch, time // self.stride * self.upsample, -1), context


@dataclass(frozen=True)
class ResidualBlock:
    """x + conv(elu(conv(elu(x)))): `MimiResnetBlock`."""

    first: CausalConv1d
    second: CausalConv1d

    @staticmethod
    def load(source: TensorSource, name: str, config: MimiConfig, channels: int, number: int) -> ResidualBlock:
        """Return the block `number` of those at one scale; its first kernel is dilated by growth ** number."""
        hidden = channels // config.compress
        kernel, dilation = config.residual_kernel_size, config.dilation_growth_rate**number
        first = CausalConv1d.load(source, f"{name}.block.1", (hidden, channels, kernel), dilation=dilation)
        return ResidualBlock(first, CausalConv1d.load(source, f"{name}.block.3", (channels, hidden, 1)))


@dataclass(frozen=True)
class SeaNet:
    """A stack of convolutions and residual blocks, an ELU before each convolution but the first."""

    layers: tuple[CausalConv1d | ResidualBlock, ...]

    @staticmethod
    def load_encoder(source: TensorSource, config: MimiConfig) -> SeaNet:
        """Waveform [B, 1920, 1] to 25 Hz features [B, 2, hidden]."""
        width = config.num_filters
        layers: list[CausalConv1d | ResidualBlock] = [
            CausalConv1d.load(source, "encoder.layers.0", (width, 1, config.kernel_size))
        ]
        index = 1  # on disk the ELUs are counted too
        for ratio in reversed(config.upsampling_ratios):
            for number in range(config.num_residual_layers):
                layers.append(ResidualBlock.load(source, f"encoder.layers.{index}", config, width, number))
                index += 1
            shape = (2 * width, width, 2 * ratio)
            layers.append(CausalConv1d.load(source, f"encoder.layers.{index + 1}", shape, stride=ratio))
            index, width = index + 2, 2 * width
        shape = (config.hidden_size, width, config.last_kernel_size)
        layers.append(CausalConv1d.load(source, f"encoder.layers.{index + 1}", shape))
        return SeaNet(tuple(layers))

    @staticmethod
    def load_decoder(source: TensorSource, config: MimiConfig) -> SeaNet:
        """25 Hz features [B, 2, hidden] to waveform [B, 1920, 1]."""
        width = config.num_filters << len(config.upsampling_ratios)
        shape = (width, config.hidden_size, config.kernel_size)
        layers: list[CausalConv1d | ResidualBlock] = [CausalConv1d.load(source, "decoder.layers.0", shape)]
        index = 1
        for ratio in config.upsampling_ratios:
            shape = (width, width // 2, 2 * ratio)
            layers.append(CausalConv1d.load_transposed(source, f"decoder.layers.{index + 1}", shape, ratio))
            index, width = index + 2, width // 2
            for number in range(config.num_residual_layers):
                layers.append(ResidualBlock.load(source, f"decoder.layers.{index}", config, width, number))
                index += 1
        shape = (1, width, config.last_kernel_size)
        layers.append(CausalConv1d.load(source, f"decoder.layers.{index + 1}", shape))
        return SeaNet(tuple(layers))

    def convolutions(self) -> Iterator[CausalConv1d]:
        """Return all convolutions, in the order in which their contexts are given and returned."""
        for layer in self.layers:
            if isinstance(layer, ResidualBlock):
                yield layer.first
                yield layer.second
            else:
                yield layer

    def __call__(
        self, x: Tensor, contexts: Iterator[Tensor], operations: Operations, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x: [B, T, C], a frame; contexts as `convolutions` orders them; lengths: as `CausalConv1d` takes them. Returns
        the output and the next frame's contexts.
        """
        new: list[Tensor] = []

        def run(conv: CausalConv1d, x: Tensor, activate: bool = True) -> Tensor:
            y, context = conv(x, next(contexts), operations, activate, lengths)
            new.append(context)
            return y

        for position, layer in enumerate(self.layers):
            if isinstance(layer, ResidualBlock):
                x = x + run(layer.second, run(layer.first, x))
            else:
                x = run(layer, x, activate=position > 0)
        return x, new
