"""Note what a piece of work must at least read and multiply, from its own operations while it runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from streaming.models.attention import FrameView, KeyValueRing
from streaming.models.contexts import Contexts
from streaming.models.operations.native.matrix import NativeLinear
from streaming.models.operations.native.operations import (
    NativeCodecLayers,
    NativeConvolutions,
    NativeDecoder,
    NativeEncoder,
    NativeLayers,
    NativeOperations,
)
from streaming.models.operations.torch import (
    CodecLayerByLayer,
    ConvolutionByConvolution,
    DecoderPartByPart,
    EncoderPartByPart,
    LayerByLayer,
)
from streaming.models.quantizer import SplitQuantizer

_GATHERS = ("embedding", "index.Tensor", "gather", "index_select")
"""Operations that read only what they give."""
_VIEWS = (
    "view",
    "slice",
    "select",
    "expand",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "split",
    "detach",
    "aten.t.",
)


_PRODUCTS = ("linear_pointwise", "int8pack_mm", "int4pack_mm")
"""Operations that torch's own counter does not know."""


@dataclass(frozen=True)
class Work:
    """read_bytes: of weights, each time that an operation reads them. operations: two for each product and sum."""

    read_bytes: int
    operations: int


def work_of(run: Callable[[], object], weights: object) -> Work:
    """weights: whatever object holds them; all tensors that can be reached from it count."""
    reads = _Reads({_place(tensor) for tensor in tensors_in(weights)})
    with FlopCounterMode(display=False) as operations, reads, _native_products(reads):
        run()
    return Work(reads.bytes, operations.get_total_flops() + reads.more_operations)


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Return every tensor that an object holds."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_in(part)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from tensors_in(getattr(thing, field.name))
    elif type(thing).__module__.startswith("streaming."):
        yield from tensors_in(vars(thing))


def _place(tensor: Tensor) -> int:
    """Return where a tensor's numbers are; oneDNN's packed weights have no storage, and are themselves."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


@contextmanager
def _native_products(reads: _Reads) -> Iterator[None]:
    """Note products of native operations, which PyTorch does not see."""
    run = NativeLinear.run

    def noted(self: NativeLinear, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        reads.bytes += sum(tensor.nbytes for tensor in tensors_in(self))
        reads.more_operations += 2 * x.numel() * self.outputs
        return run(self, x, *rest, **more)

    def layers(self: NativeLayers, x: Tensor, ring: KeyValueRing, view: FrameView) -> tuple[Tensor, Tensor | None]:
        return LayerByLayer(NativeOperations(), self.layers, self.eps)(x, ring, view)

    def codec_layers(self: NativeCodecLayers, x: Tensor, ring: KeyValueRing, view: FrameView) -> Tensor:
        return CodecLayerByLayer(NativeOperations(), self.layers, self.eps)(x, ring, view)

    def convolutions(self: NativeConvolutions, x: Tensor, contexts: Contexts, lengths: Tensor | None = None) -> Tensor:
        return ConvolutionByConvolution(NativeOperations(), self.convolutions)(x, contexts, lengths)

    def encoder(self: NativeEncoder, *given: Any) -> Tensor:
        return EncoderPartByPart(NativeOperations(), self.parts)(*given)

    def decoder(self: NativeDecoder, *given: Any) -> Tensor:
        return DecoderPartByPart(NativeOperations(), self.parts)(*given)

    with (
        patch.object(NativeEncoder, "__call__", encoder),
        patch.object(NativeDecoder, "__call__", decoder),
        patch.object(SplitQuantizer, "encode", SplitQuantizer.one_by_one),
        patch.object(NativeLinear, "run", noted),
        patch.object(NativeLayers, "__call__", layers),
        patch.object(NativeCodecLayers, "__call__", codec_layers),
        patch.object(NativeConvolutions, "__call__", convolutions),
    ):
        yield


class _Reads(TorchDispatchMode):
    def __init__(self, places: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places
        self.bytes = 0
        self.more_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not any(view in name for view in _VIEWS):
            for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
                if _place(tensor) in self._places:
                    gathers = any(gather in name for gather in _GATHERS)
                    self.bytes += out.nbytes if gathers else tensor.numel() * tensor.itemsize
            if any(product in name for product in _PRODUCTS):
                self.more_operations += 2 * args[0].shape[-1] * out.numel()
        return out
