"""Where the kernels run: in Triton's interpreter, or, marked `gpu`, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton")

from triton import language as tl
from triton.runtime import interpreter

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled here"), id="interpreted"),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")], id="gpu"),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The interpreter's, or a GPU."""
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The type of weights, activations and rings."""
    return request.param


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter cuts float32 off where a GPU rounds to bfloat16, multiplies matrices of bfloat16 as if their bits
    were whole numbers, and warns of infinities.
    """
    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: NDArray[Any], source: Any, to: Any, mode: Any) -> NDArray[Any]:
        if (source, to) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).reshape(data.shape))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, to, mode)

    def wide(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return multiply(self, wide(a), wide(b), d, precision, imprecise)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
