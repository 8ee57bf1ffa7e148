"""Mimi as plain torch modules for training: the graph of `streaming.models.mimi` over whole clips, named as on disk.

`state_dict` is the checkpoint: what is trained here is saved as it is and read by the streaming modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = dict[str, Any]
"""A Mimi `config.json`."""


class _Elu(torch.autograd.Function):
    """ELU by `exp`: torch's own `elu` takes half of the training time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y: Tensor = ctx.saved_tensors[0]
        return gradient * y.clamp(max=0).add_(1)


def elu(x: Tensor) -> Tensor:
    """max(x, exp(min(x, 0)) - 1)."""
    return _Elu.apply(x)  # type: ignore[no-any-return]


class Conv(nn.Module):
    """Causal convolution over [B, C, T]; `transposed` upsamples and drops what would need the future."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, transposed: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        self.conv = kind(channels, out, kernel, stride, bias=bias)
        self._left = kernel - stride
        self._transposed = transposed
        fan = channels * (kernel // stride if transposed else kernel)
        nn.init.normal_(self.conv.weight, std=1 / math.sqrt(fan))
        if bias:
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self._transposed:
            y: Tensor = self.conv(x)
            return y[..., : y.shape[-1] - self._left]
        return self.conv(F.pad(x, (self._left, 0)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """x + conv(elu(conv(elu(x))))."""

    def __init__(self, channels: int, kernel: int, compress: int) -> None:
        super().__init__()
        inner = channels // compress
        self.block = nn.ModuleDict({"1": Conv(channels, inner, kernel), "3": Conv(inner, channels, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block["3"](elu(self.block["1"](elu(x))))  # type: ignore[no-any-return]


class SeaNet(nn.Module):
    """`SeaNet` of `streaming.models.seanet`: layers by their number on disk, where the ELUs count too."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer for index, layer in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in self.layers.items():
            x = layer(elu(x) if isinstance(layer, Conv) and index != "0" else x)
        return x


def sea_encoder(config: Config) -> SeaNet:
    """[B, 1, N] to [B, hidden, N / 960]."""
    width: int = config["num_filters"]
    layers: dict[int, nn.Module] = {0: Conv(1, width, config["kernel_size"])}
    index = 1
    for ratio in reversed(config["upsampling_ratios"]):
        layers[index] = Residual(width, config["residual_kernel_size"], config["compress"])
        layers[index + 2] = Conv(width, 2 * width, 2 * ratio, ratio)
        index, width = index + 3, 2 * width
    layers[index + 1] = Conv(width, config["hidden_size"], config["last_kernel_size"])
    return SeaNet(layers)


def sea_decoder(config: Config) -> SeaNet:
    """[B, hidden, T] to [B, 1, 960 T]."""
    width: int = config["num_filters"] << len(config["upsampling_ratios"])
    layers: dict[int, nn.Module] = {0: Conv(config["hidden_size"], width, config["kernel_size"])}
    index = 1
    for ratio in config["upsampling_ratios"]:
        layers[index + 1] = Conv(width, width // 2, 2 * ratio, ratio, transposed=True)
        layers[index + 2] = Residual(width // 2, config["residual_kernel_size"], config["compress"])
        index, width = index + 3, width // 2
    layers[index + 1] = Conv(width, 1, config["last_kernel_size"])
    return SeaNet(layers)


class _Scale(nn.Module):
    def __init__(self, hidden: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden,), initial))


class _Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.heads, self.dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
        inner = self.heads * self.dim
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        batch, time, _ = x.shape

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x).view(batch, time, self.heads, self.dim).transpose(1, 2)  # type: ignore[no-any-return]

        query, key = (_rotate(heads(projection), cos, sin) for projection in (self.q_proj, self.k_proj))
        y = F.scaled_dot_product_attention(query, key, heads(self.v_proj), attn_mask=visible)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner, bias=False)
        self.fc2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.input_layernorm = nn.LayerNorm(hidden, config["norm_eps"])
        self.self_attn = _Attention(config)
        self.self_attn_layer_scale = _Scale(hidden, config["layer_scale_initial_scale"])
        self.post_attention_layernorm = nn.LayerNorm(hidden, config["norm_eps"])
        self.mlp = _Mlp(hidden, config["intermediate_size"])
        self.mlp_layer_scale = _Scale(hidden, config["layer_scale_initial_scale"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn_layer_scale.scale * self.self_attn(self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp_layer_scale.scale * self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The causal transformer at 25 Hz over [B, hidden, T], each position seeing the last `sliding_window` ones."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))
        self._window = config["sliding_window"]
        half = torch.arange(config["head_dim"] // 2) * 2 / config["head_dim"]
        self._frequencies = config["rope_theta"] ** -half

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[-1]
        age = torch.arange(time)[:, None] - torch.arange(time)
        visible = ((age >= 0) & (age < self._window)).to(x.device)
        angles = torch.arange(time)[:, None] * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).to(x.device)
        cos, sin = angles.cos(), angles.sin()
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x, cos, sin, visible)
        return x.transpose(1, 2)


class _Codebook(nn.Module):
    """A codebook as Mimi stores it: sums and counts of what its codes stood for."""

    embed_sum: Tensor
    cluster_usage: Tensor
    initialized: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))
        self.register_buffer("initialized", torch.ones(1))


class _Book(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook = _Codebook(size, dim)


class ResidualQuantizer(nn.Module):
    """Projections in and out, trained; codebooks, made by k-means and held."""

    def __init__(self, config: Config, books: int) -> None:
        super().__init__()
        hidden, dim = config["hidden_size"], config["codebook_dim"]
        self.input_proj = nn.Conv1d(hidden, dim, 1, bias=False)
        self.output_proj = nn.Conv1d(dim, hidden, 1, bias=False)
        self.layers = nn.ModuleList(_Book(config["codebook_size"], dim) for _ in range(books))

    def books(self) -> Iterator[Tensor]:
        """Each codebook [K, dim]."""
        for layer in self.layers:
            yield layer.codebook.embed_sum  # type: ignore[union-attr, misc]

    def set_books(self, books: list[Tensor]) -> None:
        """Each [K, at most dim]; what is missing is zero."""
        for layer, book in zip(self.layers, books, strict=True):
            stored: Tensor = layer.codebook.embed_sum  # type: ignore[assignment, union-attr]
            stored.zero_()
            stored[:, : book.shape[1]] = book

    def codes(self, projected: Tensor) -> Tensor:
        """projected: [..., dim]. Returns the nearest codes of the residual quantiser [..., books]."""
        found = []
        for book in self.books():
            code = (projected @ book.T - book.square().sum(-1) / 2).argmax(-1)
            projected = projected - book[code]
            found.append(code)
        return torch.stack(found, -1)

    def sum(self, codes: Tensor) -> Tensor:
        """codes: [..., books]. Returns what they stand for, [..., dim]."""
        return torch.stack([book[codes[..., number]] for number, book in enumerate(self.books())]).sum(0)

    def latent(self, total: Tensor) -> Tensor:
        """total: [B, T, dim], of codes. Returns [B, hidden, T]."""
        return self.output_proj(total.transpose(1, 2))  # type: ignore[no-any-return]


class Quantizer(nn.Module):
    """Both parts; the semantic one has `num_semantic_quantizers` codebooks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        semantic = config["num_semantic_quantizers"]
        self.semantic_residual_vector_quantizer = ResidualQuantizer(config, semantic)
        self.acoustic_residual_vector_quantizer = ResidualQuantizer(config, config["num_quantizers"] - semantic)

    def parts(self) -> tuple[ResidualQuantizer, ResidualQuantizer]:
        """Semantic, acoustic."""
        return self.semantic_residual_vector_quantizer, self.acoustic_residual_vector_quantizer

    def set_books(self, books: tuple[list[Tensor], list[Tensor]]) -> None:
        """Of the semantic and of the acoustic part."""
        for part, made in zip(self.parts(), books, strict=True):
            part.set_books(made)

    def projections(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent: [B, hidden, T]. Returns what each part quantises, [B, T, dim]."""
        semantic, acoustic = (part.input_proj(latent).transpose(1, 2) for part in self.parts())
        return semantic, acoustic

    def encode(self, latent: Tensor) -> Tensor:
        """latent: [B, hidden, T]. Returns codes [B, T, Q]."""
        return self.codes(self.projections(latent))

    def codes(self, projected: tuple[Tensor, Tensor]) -> Tensor:
        """What each part quantises, [B, T, dim], to codes [B, T, Q]."""
        both = zip(self.parts(), projected, strict=True)
        return torch.cat([part.codes(x) for part, x in both], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes: [B, T, Q]. Returns [B, hidden, T]."""
        semantic, acoustic = self.parts()
        first = len(semantic.layers)
        return semantic.latent(semantic.sum(codes[..., :first])) + acoustic.latent(acoustic.sum(codes[..., first:]))

    def through(self, projected: tuple[Tensor, Tensor]) -> Tensor:
        """`decode` of the codes of what each part quantises, [B, T, dim], with a gradient that passes them by: as if
        nothing had been rounded. Returns [B, hidden, T].
        """
        found = []
        for part, x in zip(self.parts(), projected, strict=True):
            rounded = part.sum(part.codes(x.detach()))
            found.append(part.latent(x + (rounded - x).detach()))
        semantic, acoustic = found
        return semantic + acoustic


class Codec(nn.Module):
    """The whole of Mimi. Clips begin as streams do: with nothing before them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.encoder = sea_encoder(config)
        self.encoder_transformer = Transformer(config)
        self.downsample = Conv(hidden, hidden, 4, 2, bias=False)
        self.quantizer = Quantizer(config)
        self.upsample = nn.Module()
        self.upsample.conv = nn.ConvTranspose1d(hidden, hidden, 4, 2, groups=hidden, bias=False)
        self.decoder_transformer = Transformer(config)
        self.decoder = sea_decoder(config)
        with torch.no_grad():  # begins by holding each latent for two steps
            self.upsample.conv.weight.zero_()
            self.upsample.conv.weight[:, :, :2] = 1.0

    def latent(self, pcm: Tensor) -> Tensor:
        """pcm: [B, N], whole frames. Returns [B, hidden, F]."""
        x = self.encoder_transformer(self.encoder(pcm[:, None]))
        x = F.pad(x, (2, 0), mode="replicate")  # the checkpoint's only replicated padding
        return self.downsample.conv(x)  # type: ignore[no-any-return]

    def synthesise(self, codes: Tensor) -> Tensor:
        """codes: [B, F, Q]. Returns pcm [B, 1920 F]."""
        return self.speak(self.quantizer.decode(codes))

    def speak(self, decoded: Tensor) -> Tensor:
        """decoded: [B, hidden, F], of the quantiser. Returns pcm [B, 1920 F]."""
        x = self.upsample.conv(decoded)  # type: ignore[operator]
        x = self.decoder_transformer(x[..., :-2])
        return self.decoder(x).squeeze(1)  # type: ignore[no-any-return]

    def encoder_parts(self) -> list[nn.Module]:
        """What the encoder's stage trains."""
        projections = [part.input_proj for part in self.quantizer.parts()]
        return [self.encoder, self.encoder_transformer, self.downsample, *projections]

    def decoder_parts(self) -> list[nn.Module]:
        """What the decoder's stage trains."""
        projections = [part.output_proj for part in self.quantizer.parts()]
        return [self.decoder, self.decoder_transformer, self.upsample, *projections]
