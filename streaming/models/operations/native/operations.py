"""The reference's operations (`../torch.py`), from C where there is C for them. Activations are float32."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from streaming.audio import FRAME
from streaming.models.attention import FLOAT32_POSITIONS, FrameView, KeyValueRing, Rotary
from streaming.models.codec_state import HalfState
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
)
from streaming.models.operations.native.library import library
from streaming.models.operations.native.matrix import FLOATS, NativeLinear, pointer
from streaming.models.operations.torch import TorchOperations
from streaming.models.sampler import Drawing, SamplerState


class _Ring(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "prefix", "size", "slot_stride", "head_stride")),
        *((name, c_void_p) for name in ("keys", "values")),
    )


class _View(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("slots", "position", "start", "cos", "sin")),
        *((name, c_int64) for name in ("position_stride", "start_stride", "start_step", "angle_stride")),
    )


class _Layer(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("norm1", "norm2", "qkv", "out", "gate_up", "down"))


class _CodecLayer(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in ("norm1", "bias1", "norm2", "bias2", "scale1", "scale2", "qkv", "out", "up", "down")
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "ring", "view")),
        *((name, c_int64) for name in ("layer_stride", "batch", "time", "heads", "groups", "dim")),
        ("eps", c_float),
        ("threads", c_int),
    )


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("product", c_void_p),
        *((name, c_int64) for name in ("channels", "context", "kernel", "stride", "dilation", "upsample")),
        *((name, c_int64) for name in ("activate", "adds", "replicates")),
    )


class _Contexts(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("memory", "slots", "frames")),
        *((name, c_int64) for name in ("depth", "width", "offset")),
    )


class _Half(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("convolutions", "downsample", "layers")),
        *((name, c_void_p) for name in ("frequency", "taps", "latents", "frequency64")),
        *((name, c_int64) for name in ("convolution_count", "layer_count", "heads", "groups", "dim")),
        *((name, c_int64) for name in ("window", "rounded", "books", "entries")),
        ("eps", c_float),
    )


class _HalfState(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("frames", "contexts")),
        *((name, c_int64) for name in ("depth", "width")),
        ("ring", _Ring),
        ("layer_stride", c_int64),
    )


class _Streams(ctypes.Structure):
    _fields_ = (("batch", c_int64), ("slots", c_void_p), ("active", c_void_p), ("threads", c_int))


class _Drawing(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("temperature", "top_p", "top_k", "seed", "slots", "frames")),
        *((name, c_void_p) for name in ("listening", "speaking")),
        ("flag_stride", c_int64),
        *((name, c_void_p) for name in ("codes", "ended", "finite")),
    )


@dataclass(frozen=True)
class NativeView(FrameView):
    """A view as `attention.h` reads it, one for all layers."""

    @cached_property
    def native(self) -> _View:
        position, start, cos, sin = self.position, self.start, self.cos, self.sin
        assert position.stride(-1) == 1 and cos.stride() == sin.stride() and cos.stride()[-2:] == (cos.shape[-1], 1)
        assert self.slots.is_contiguous()
        addresses = [tensor.data_ptr() for tensor in (self.slots, position, start, cos, sin)]
        step = start.stride(1) if start.shape[1] > 1 else 0
        return _View(*addresses, position.stride(0), start.stride(0), step, cos.stride(0))


class NativeLayers:
    """A decoder's layers in one call: what `LayerByLayer` gives, to the bit. See `Layers`."""

    def __init__(self, opened: ctypes.CDLL, layers: Sequence[Layer], eps: float) -> None:
        """layers: one at least, such as `can` says."""
        self._run, self.layers, self.eps = opened.native_layers, layers, eps
        products = [natives(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in layers]
        norms = [(pointer(layer.norm1), pointer(layer.norm2)) for layer in layers]
        self._native = (_Layer * len(layers))(
            *(_Layer(*two, *(one.address for one in four)) for two, four in zip(norms, products, strict=True))
        )
        self._attended = products[0][1].inputs

    @staticmethod
    def can(layers: Sequence[Layer]) -> bool:
        """Return whether these run in one call: all of their products are native, and their gates, too."""
        products = [product for layer in layers for product in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        gates = [layer.gate_up for layer in layers]
        native = all(isinstance(product, NativeLinear) for product in products)
        return bool(layers) and native and all(isinstance(gate, NativeLinear) and gate.gates for gate in gates)

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total, pending = torch.empty_like(x), torch.empty_like(x)
        _run_layers(self._run, self._native, self.eps, self._attended, x, ring, view, total, pending)
        return total, pending


class NativeCodecLayers:
    """One of the codec's transformers in one call: what `CodecLayerByLayer` gives, to the bit. See `CodecLayers`."""

    def __init__(self, opened: ctypes.CDLL, layers: Sequence[CodecLayer], eps: float) -> None:
        """layers: one at least, whose products are all native."""
        self._run, self.layers, self.eps = opened.native_codec_layers, layers, eps
        products = [natives(layer.qkv, layer.out, layer.up, layer.down) for layer in layers]
        vectors = [(*layer.norm1, *layer.norm2, layer.scale1, layer.scale2) for layer in layers]
        self._native = (_CodecLayer * len(layers))(
            *(
                _CodecLayer(*map(pointer, six), *(one.address for one in four))
                for six, four in zip(vectors, products, strict=True)
            )
        )
        self._attended = products[0][1].inputs

    def __call__(self, x: Tensor, ring: KeyValueRing, view: FrameView) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _run_layers(self._run, self._native, self.eps, self._attended, x, ring, view, out)
        return out


class NativeContexts(Contexts):
    """Contexts as `convolutions.h` reads and writes them, in their place."""

    def take(self, steps: int, channels: int) -> Tensor:
        self._place = self._next(steps * channels)
        before = self.memory[self.slots, (self.frames - 1).remainder(self.memory.shape[1]), self._place]
        return torch.where((self.frames == 0)[:, None], 0.0, before).view(len(before), steps, channels)

    def leave(self, context: Tensor) -> None:
        self.memory[self.slots, self.frames.remainder(self.memory.shape[1]), self._place] = context.flatten(1)

    def keep(self) -> None:
        """Everything is where it belongs."""

    def native(self, width: int) -> _Contexts:
        """Return the next so many elements, which `native_convolutions` takes and leaves."""
        assert self.memory.dtype == torch.float32
        addresses = (pointer(tensor) for tensor in (self.memory, self.slots, self.frames))
        return _Contexts(*addresses, *self.memory.shape[1:], self._next(width).start)


class NativeConvolutions:
    """Convolutions in one call. See `Convolutions`."""

    def __init__(self, opened: ctypes.CDLL, convolutions: Sequence[Convolution]) -> None:
        """convolutions: one at least, whose products are all native."""
        self._run, self.convolutions = opened.native_convolutions, convolutions
        self._native = (_Convolution * len(convolutions))(
            *(
                _Convolution(product.address, c.channels, c.context, c.kernel, c.stride, c.dilation, c.upsample, *flags)
                for c in convolutions
                for product in natives(c.product)
                for flags in [(c.activate, c.adds, c.replicates)]
            )
        )
        self._width = sum(c.context * c.channels for c in convolutions)
        ups, strides = (math.prod(getattr(c, name) for c in convolutions) for name in ("upsample", "stride"))
        self._ratio = Fraction(ups, strides)
        last = convolutions[-1]
        self._channels = natives(last.product)[0].outputs // last.upsample

    def __call__(self, x: Tensor, contexts: Contexts, lengths: Tensor | None = None) -> Tensor:
        assert isinstance(contexts, NativeContexts) and x.dtype == torch.float32
        batch, time, channels = x.shape
        assert channels == self.convolutions[0].channels
        x = x.contiguous()
        out = torch.empty(batch, int(time * self._ratio), self._channels)
        if self._run(
            self._native,
            len(self.convolutions),
            byref(contexts.native(self._width)),
            pointer(x),
            batch,
            time,
            pointer(lengths),
            FRAME,
            pointer(out),
            torch.get_num_threads(),
        ):
            raise MemoryError(f"no memory for the convolutions of {batch} rows")
        return out


class _NativeHalf:
    """What the codec's two halves have in common. See `codec.h`."""

    def __init__(
        self,
        parts: EncoderParts | DecoderParts,
        convolutions: NativeConvolutions,
        layers: NativeCodecLayers,
        downsample: NativeConvolutions | None = None,
        latents: Tensor | None = None,
        taps: Tensor | None = None,
    ) -> None:
        self.parts, self._kept = parts, (convolutions, layers, downsample, latents, taps)
        self._dim = 2 * parts.rotary.frequency.numel()
        qkv, out = natives(parts.layers[0].qkv, parts.layers[0].out)
        heads = (qkv.outputs - out.inputs) // 2 // self._dim
        self._heads, self._layers, self._width = heads, len(parts.layers), parts.width
        self._native = _Half(
            ctypes.addressof(convolutions._native),
            None if downsample is None else ctypes.addressof(downsample._native),
            ctypes.addressof(layers._native),
            *(pointer(t) for t in (parts.rotary.frequency, taps, latents, parts.rotary.frequency64)),
            *(len(parts.convolutions), len(parts.layers), heads, out.inputs // self._dim // heads, self._dim),
            *(parts.window, FLOAT32_POSITIONS),
            *((0, 0) if latents is None else latents.shape[:2]),
            parts.eps,
        )

    def _given(self, half: HalfState, active: Tensor, slots: Tensor | None) -> tuple[object, object, object]:
        """Return what both calls begin with. active, slots: contiguous."""
        ring, memory = half.ring, half.contexts
        keys = ring.keys
        assert memory.dtype == torch.float32 and memory.shape[2] == self._width and active.dtype == torch.bool
        assert keys.is_contiguous() and ring.values.is_contiguous() and ring.prefix == 0
        assert keys.shape[1:3] == (self._layers, self._heads) and keys.shape[4] == self._dim
        assert slots is None or (slots.dtype == torch.int64 and len(slots) == len(active))
        slot, layer, head, _, _ = keys.stride()
        first = _Ring(FLOATS[keys.dtype], 0, ring.size, slot, head, keys.data_ptr(), ring.values.data_ptr())
        state = _HalfState(pointer(half.frames), pointer(memory), *memory.shape[1:], first, layer)
        streams = _Streams(len(active), pointer(slots), pointer(active), torch.get_num_threads())
        return byref(self._native), byref(state), byref(streams)


class NativeEncoder(_NativeHalf):
    """The codec's way in, in one call: what `EncoderPartByPart` gives, but for the last bit of an angle."""

    parts: EncoderParts

    def __init__(
        self,
        opened: ctypes.CDLL,
        parts: EncoderParts,
        convolutions: NativeConvolutions,
        layers: NativeCodecLayers,
        downsample: NativeConvolutions,
    ) -> None:
        """convolutions, layers, downsample: of these parts."""
        super().__init__(parts, convolutions, layers, downsample)
        self._run, self._hidden = opened.native_encode, natives(parts.downsample.product)[0].outputs

    def __call__(
        self, pcm: Tensor, half: HalfState, active: Tensor, lengths: Tensor | None, slots: Tensor | None
    ) -> Tensor:
        assert pcm.dtype == torch.float32 and (lengths is None or lengths.dtype == torch.int64)
        pcm, active = pcm.contiguous(), active.contiguous()
        latent = torch.empty(len(pcm), self._hidden)
        given = self._given(half, active, slots if slots is None else slots.contiguous())
        lengths = lengths if lengths is None else lengths.contiguous()
        if self._run(*given, pcm.data_ptr(), pcm.shape[1], pointer(lengths), latent.data_ptr()):
            raise MemoryError(f"no memory to encode {len(pcm)} rows")
        return latent


class NativeDecoder(_NativeHalf):
    """The codec's way out, in one call: what `DecoderPartByPart` gives, but for the last bit of an angle or a sum."""

    parts: DecoderParts

    def __init__(
        self, opened: ctypes.CDLL, parts: DecoderParts, convolutions: NativeConvolutions, layers: NativeCodecLayers
    ) -> None:
        """convolutions, layers: of these parts."""
        latents, taps = parts.latents.contiguous(), parts.taps.contiguous()
        assert latents.dtype == taps.dtype == torch.float32
        super().__init__(parts, convolutions, layers, None, latents, taps)
        self._run, self._books = opened.native_decode, len(latents)

    def __call__(self, codes: Tensor, half: HalfState, active: Tensor, slots: Tensor | None) -> Tensor:
        assert codes.dtype == torch.int64 and codes.shape[1] == self._books
        codes, active = codes.contiguous(), active.contiguous()
        pcm = torch.empty(len(codes), FRAME)
        given = self._given(half, active, slots if slots is None else slots.contiguous())
        failed = self._run(*given, codes.data_ptr(), FRAME, pcm.data_ptr())
        if failed > 0:
            raise IndexError("a code that its codebook does not have")
        if failed:
            raise MemoryError(f"no memory to decode {len(codes)} rows")
        return pcm


def natives(*products: Linear) -> list[NativeLinear]:
    """Return the products that are native."""
    return [product for product in products if isinstance(product, NativeLinear)]


def _run_layers(
    run: Callable[..., int],
    layers: ctypes.Array[_Layer] | ctypes.Array[_CodecLayer],
    eps: float,
    attended: int,
    x: Tensor,
    ring: KeyValueRing,
    view: FrameView,
    *out: Tensor,
) -> None:
    """Call a function of `layers.h`. attended: how many inputs the product behind attention has."""
    assert isinstance(view, NativeView) and x.dtype == torch.float32
    batch, time, _ = x.shape
    heads, dim = ring.keys.shape[2], ring.keys.shape[4]
    first = _ring(ring, view, 0)
    given = _Pass(
        pointer(x),
        ctypes.addressof(first),
        ctypes.addressof(view.native),
        ring.keys.stride(1),
        batch,
        time,
        heads,
        attended // dim // heads,
        dim,
        eps,
        torch.get_num_threads(),
    )
    if run(layers, len(layers), byref(given), *map(pointer, out)):
        raise MemoryError(f"no memory for the layers of {batch * time} rows")


def _ring(ring: KeyValueRing, view: FrameView, layer: int) -> _Ring:
    """Return a layer's keys and values as C reads them."""
    keys = ring.keys
    assert view.start.shape[1] == 1 or ring.prefix == 0
    assert keys.is_contiguous() and ring.values.shape == keys.shape and ring.values.is_contiguous()
    slot, step, head, _, _ = keys.stride()
    offset = layer * step * keys.itemsize
    places = keys.data_ptr() + offset, ring.values.data_ptr() + offset
    return _Ring(FLOATS[keys.dtype], ring.prefix, ring.size, slot, head, *places)


class NativeOperations(TorchOperations):
    """See `Operations` for what each does."""

    name = "native"
    bounded = True
    activations = torch.float32

    def __init__(self) -> None:
        opened = library()
        assert opened is not None
        self._library = opened

    @staticmethod
    def can(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
        """Return whether this processor has them for weights of this type, and activations and heads of these sizes."""
        opened = library() if device.type == "cpu" and dtype in FLOATS else None
        return opened is not None and all(size % int(opened.native_lanes()) == 0 for size in sizes)

    def view(
        self, slots: Tensor, position: Tensor, start: Tensor, ring: KeyValueRing, rotary: Rotary, columns: int
    ) -> FrameView:
        cos, sin = rotary(position)
        return NativeView(slots, position, start, cos.unsqueeze(1), sin.unsqueeze(1), None, None)

    def norm(self, x: Tensor, pending: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        added, normed = x if pending is None else torch.empty_like(x), torch.empty_like(x)
        size = weight.numel()
        self._library.native_rms_norm(
            pointer(x), pointer(pending), pointer(weight), eps, x.numel() // size, size, pointer(added), pointer(normed)
        )
        return added, normed

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        normed, size = torch.empty_like(x), weight.numel()
        self._library.native_layer_norm(
            pointer(x), pointer(weight), pointer(bias), eps, x.numel() // size, size, pointer(normed)
        )
        return normed

    def project_gated(
        self, x: Tensor, pending: Tensor, norm: Tensor, eps: float, weight: Linear
    ) -> tuple[Tensor, Tensor]:
        if not (isinstance(weight, NativeLinear) and weight.gates):
            return super().project_gated(x, pending, norm, eps, weight)
        x, normed = self.norm(x, pending, norm, eps)
        return x, weight.run(normed, "gated")

    def linear_gelu(self, x: Tensor, weight: Linear) -> Tensor:
        return weight.run(x, "gelu") if isinstance(weight, NativeLinear) else super().linear_gelu(x, weight)

    def add_linear(self, residual: Tensor, scale: Tensor, x: Tensor, weight: Linear) -> Tensor:
        if not isinstance(weight, NativeLinear):
            return super().add_linear(residual, scale, x, weight)
        return weight.run(x, scale=scale, residual=residual.contiguous())

    def attend(self, qkv: Tensor, ring: KeyValueRing, layer: int, view: FrameView) -> Tensor:
        assert isinstance(view, NativeView)
        batch, time, width = qkv.shape
        heads, dim = ring.keys.shape[2], ring.keys.shape[4]
        groups = width // dim // heads - 2
        out = torch.empty(batch, time, heads * groups * dim)
        if self._library.native_attend(
            byref(_ring(ring, view, layer)),
            byref(view.native),
            pointer(qkv),
            batch,
            time,
            heads,
            groups,
            dim,
            pointer(out),
            torch.get_num_threads(),
        ):
            raise MemoryError(f"no memory for the scores of {batch} rows")
        return out

    def layers(self, layers: Sequence[Layer], eps: float) -> Layers:
        if NativeLayers.can(layers):
            return NativeLayers(self._library, layers, eps)
        return super().layers(layers, eps)

    def codec_layers(self, layers: Sequence[CodecLayer], eps: float) -> CodecLayers:
        if all(len(natives(layer.qkv, layer.out, layer.up, layer.down)) == 4 for layer in layers):
            return NativeCodecLayers(self._library, layers, eps)
        return super().codec_layers(layers, eps)

    def contexts(self, memory: Tensor, slots: Tensor, frames: Tensor) -> Contexts:
        return NativeContexts(memory, slots, frames)

    def convolutions(self, convolutions: Sequence[Convolution]) -> Convolutions:
        if all(natives(conv.product) for conv in convolutions):
            return NativeConvolutions(self._library, convolutions)
        return super().convolutions(convolutions)

    def codec_encoder(self, parts: EncoderParts) -> CodecEncoder:
        convolutions, downsample = self.convolutions(parts.convolutions), self.convolutions([parts.downsample])
        layers = self.codec_layers(parts.layers, parts.eps)
        if not isinstance(convolutions, NativeConvolutions) or not isinstance(downsample, NativeConvolutions):
            return super().codec_encoder(parts)
        if not isinstance(layers, NativeCodecLayers):
            return super().codec_encoder(parts)
        return NativeEncoder(self._library, parts, convolutions, layers, downsample)

    def codec_decoder(self, parts: DecoderParts) -> CodecDecoder:
        convolutions, layers = self.convolutions(parts.convolutions), self.codec_layers(parts.layers, parts.eps)
        if isinstance(layers, NativeCodecLayers) and isinstance(convolutions, NativeConvolutions):
            return NativeDecoder(self._library, parts, convolutions, layers)
        return super().codec_decoder(parts)

    def draw(self, logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
        if not few:
            return super().draw(logits, book, state, frame, few)
        batch, size = logits.shape
        assert frame.listening.stride() == frame.speaking.stride() and logits.dtype == torch.float32
        units = torch.empty_like(frame.slots)
        drawing = _Drawing(
            *(pointer(t) for t in (state.temperature, state.top_p, state.top_k, state.seed, frame.slots, frame.frames)),
            frame.listening.data_ptr(),
            frame.speaking.data_ptr(),
            frame.listening.stride(0),
            *(pointer(t) for t in (frame.codes, frame.ended, frame.finite)),
        )
        self._library.native_draw(
            pointer(logits), byref(drawing), batch, size, book, frame.codes.shape[1], pointer(units)
        )
        return units
