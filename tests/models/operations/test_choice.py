"""Kernels where they compile, the reference elsewhere, and a line in the log where somebody may wonder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from streaming.models.operations.choice import pick, pick_for_codec
from streaming.models.operations.native.library import library
from streaming.models.operations.native.operations import NativeOperations
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations
from streaming.models.random_weights import LLAMA_MIMI_1_3B as CONFIG
from streaming.models.random_weights import MIMI

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _fake_gpu() -> Iterator[None]:
    with FakeTensorMode():
        yield


def test_a_gpu_gets_the_kernels_and_a_cpu_does_not(caplog: pytest.LogCaptureFixture) -> None:
    assert type(pick(CONFIG, CUDA, torch.bfloat16)) is TritonOperations
    assert type(pick(CONFIG, torch.device("cpu"), torch.float32)) is not TritonOperations
    assert type(pick_for_codec(MIMI, CUDA, torch.float32)) is TritonOperations
    assert not caplog.records


@pytest.mark.skipif(library() is None, reason="no native operations here")
def test_a_cpu_gets_the_native_operations_where_they_fit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert type(pick(CONFIG, CPU, dtype)) is NativeOperations
        assert type(pick(replace(CONFIG, head_dim=4), CPU, dtype)) is TorchOperations
    assert type(pick_for_codec(MIMI, CPU, torch.float32)) is NativeOperations
    assert type(pick_for_codec(replace(MIMI, hidden_size=20), CPU, torch.float32)) is TorchOperations


@pytest.mark.usefixtures("without_native")
def test_a_cpu_without_a_compiler_runs_plain() -> None:
    assert type(pick(CONFIG, CPU, torch.float32)) is type(pick_for_codec(MIMI, CPU, torch.float32)) is TorchOperations


@pytest.mark.parametrize(
    "error",
    [
        CompilationError("source", None, "no"),
        OutOfResources(300, 200, "shared memory"),
        RuntimeError("no C compiler"),
        FileNotFoundError("ptxas"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("operation", ["begin_frame", "attend", "extend", "gate", "draw"])
def test_a_kernel_that_does_not_compile_costs_speed_and_not_the_server(
    error: Exception, operation: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins a server that does not start on a GPU that this Triton does not know."""

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TritonOperations, operation, broken)
    if operation != "extend":
        assert type(pick(CONFIG, CUDA, torch.bfloat16)) is TorchOperations
    if operation in ("attend", "extend"):
        assert type(pick_for_codec(MIMI, CUDA, torch.float32)) is TorchOperations
    assert len(caplog.records) == 1 + (operation == "attend")
    for record in caplog.records:
        assert "without Triton kernels" in record.message
        assert "\n" not in record.message


def test_a_machine_without_triton_runs_plain(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert type(pick(CONFIG, CUDA, torch.bfloat16)) is TorchOperations
    assert len(caplog.records) == 1


def test_heads_that_no_tile_fits_run_plain(caplog: pytest.LogCaptureFixture) -> None:
    assert type(pick(replace(CONFIG, head_dim=96), CUDA, torch.bfloat16)) is TorchOperations
    assert len(caplog.records) == 1


def test_a_lost_gpu_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a device that is out of memory or broken, taken for one that lacks a compiler."""

    def broken(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TritonOperations, "attend", broken)
    with pytest.raises(torch.OutOfMemoryError):
        pick(CONFIG, CUDA, torch.bfloat16)
