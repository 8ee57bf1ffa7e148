"""SEANet, Mimi's causal convolutional encoder and decoder (arXiv 2009.02095, 2210.13438), one frame at a time.

It is a stack of convolutions and residual blocks, with an ELU before each convolution but the first.
Activations are [B, T, C]. Every convolution is one matrix product over its unfolded input (docs/decisions.md). A
transposed convolution is the same thing seen from its input: each input step gives `stride` outputs, from itself and
the few steps before it.

A layer's only state is its context, the last inputs that the next frame still needs (`contexts.py`).

A stream may end within a frame. Every layer then finds zeros in its own input behind the last step that holds a sample
of the stream, as `transformers` pads the input of each convolution of an encoder (`MimiConv1d`).
"""

from __future__ import annotations

import torch.nn.functional as F

from streaming.config import MimiConfig
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import linear
from streaming.models.operations.base import Convolution

Shape = tuple[int, int, int]


def load_convolution(
    source: TensorSource,
    name: str,
    shape: Shape,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = True,
    activate: bool = True,
    adds: bool = False,
    replicates: bool = False,
) -> Convolution:
    """Make one from a `Conv1d` on disk, weight `shape` = [C_out, C_in, kernel]. The flags: see `Convolution`."""
    out, channels, kernel = shape
    weight = source.load(f"{name}.conv.weight", shape).permute(0, 2, 1).reshape(out, kernel * channels)
    product = linear(weight, bias=source.load(f"{name}.conv.bias", (out,)) if bias else None)
    return Convolution(product, channels, kernel, stride, dilation, 1, activate, adds, replicates)


def load_transposed(source: TensorSource, name: str, shape: Shape, stride: int) -> Convolution:
    """Make one, behind an ELU, from a `ConvTranspose1d` on disk, weight `shape` = [C_in, C_out, kernel], trimmed on the
    right.

    Output t * stride + r is the sum over i of x[t - i] @ W[:, :, i * stride + r], so input step t - i needs the taps
    from i * stride: a causal convolution of ceil(kernel / stride) taps and stride * C_out outputs.
    """
    channels, out, kernel = shape
    taps = -(-kernel // stride)
    weight = F.pad(source.load(f"{name}.conv.weight", shape), (0, taps * stride - kernel)).view(
        channels, out, taps, stride
    )
    flat = weight.flip(2).permute(3, 1, 2, 0).reshape(stride * out, taps * channels)
    product = linear(flat, bias=source.load(f"{name}.conv.bias", (out,)).repeat(stride))
    return Convolution(product, channels, taps, upsample=stride, activate=True)


def _residual_block(
    source: TensorSource, name: str, config: MimiConfig, channels: int, number: int
) -> tuple[Convolution, Convolution]:
    """Return x + conv(elu(conv(elu(x)))), `MimiResnetBlock`, the block `number` of those at one scale; its first kernel
    is dilated by growth ** number.
    """
    hidden = channels // config.compress
    kernel, dilation = config.residual_kernel_size, config.dilation_growth_rate**number
    return (
        load_convolution(source, f"{name}.block.1", (hidden, channels, kernel), dilation=dilation),
        load_convolution(source, f"{name}.block.3", (channels, hidden, 1), adds=True),
    )


def load_encoder(source: TensorSource, config: MimiConfig) -> tuple[Convolution, ...]:
    """Return what takes a waveform [B, 1920, 1] to 25 Hz features [B, 2, hidden]."""
    width = config.num_filters
    layers = [load_convolution(source, "encoder.layers.0", (width, 1, config.kernel_size), activate=False)]
    index = 1  # on disk the ELUs are counted too
    for ratio in reversed(config.upsampling_ratios):
        for number in range(config.num_residual_layers):
            layers.extend(_residual_block(source, f"encoder.layers.{index}", config, width, number))
            index += 1
        shape = (2 * width, width, 2 * ratio)
        layers.append(load_convolution(source, f"encoder.layers.{index + 1}", shape, stride=ratio))
        index, width = index + 2, 2 * width
    shape = (config.hidden_size, width, config.last_kernel_size)
    layers.append(load_convolution(source, f"encoder.layers.{index + 1}", shape))
    return tuple(layers)


def load_decoder(source: TensorSource, config: MimiConfig) -> tuple[Convolution, ...]:
    """Return what takes 25 Hz features [B, 2, hidden] to a waveform [B, 1920, 1]."""
    width = config.num_filters << len(config.upsampling_ratios)
    shape = (width, config.hidden_size, config.kernel_size)
    layers = [load_convolution(source, "decoder.layers.0", shape, activate=False)]
    index = 1
    for ratio in config.upsampling_ratios:
        shape = (width, width // 2, 2 * ratio)
        layers.append(load_transposed(source, f"decoder.layers.{index + 1}", shape, ratio))
        index, width = index + 2, width // 2
        for number in range(config.num_residual_layers):
            layers.extend(_residual_block(source, f"decoder.layers.{index}", config, width, number))
            index += 1
    shape = (1, width, config.last_kernel_size)
    layers.append(load_convolution(source, f"decoder.layers.{index + 1}", shape))
    return tuple(layers)
