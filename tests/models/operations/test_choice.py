"""Kernels where they compile, the reference elsewhere, and a line in the log where somebody may wonder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from streaming.errors import StreamingError
from streaming.models.operations.choice import pick, pick_for_codec
from streaming.models.operations.native.library import library
from streaming.models.operations.native.operations import NativeOperations
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import WITHOUT
from streaming.models.operations.triton import operations as fused
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
@pytest.mark.parametrize(
    ("kernel", "launches", "decodes", "codes"),
    [
        ("begin_frame", ["begin_frame"], True, False),
        ("attend", ["attend"], True, True),
        ("norm", ["norm", "add_norm"], True, False),
        ("gate", ["gate"], True, False),
        ("matvec", ["matvec"], True, False),
        ("windows", ["windows"], False, True),
        ("extend", ["extend"], False, True),
        ("draw", ["draw"], True, False),
    ],
)
def test_a_kernel_that_does_not_run_is_left_out_alone(
    error: Exception,
    kernel: str,
    launches: list[str],
    decodes: bool,
    codes: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pins a server that does not start on a GPU that this Triton does not know, and one that runs without any kernel
    for the sake of one.
    """

    def broken(*_: object, **__: object) -> None:
        raise error

    for launch in launches:
        monkeypatch.setattr(fused, launch, broken)
    for uses, made in (
        (decodes, pick(CONFIG, CUDA, torch.bfloat16)),
        (codes, pick_for_codec(MIMI, CUDA, torch.float32)),
    ):
        assert isinstance(made, TritonOperations)
        assert made.without == ({kernel} if uses else set())
        assert made.name == (f"Triton without {kernel}" if uses else "Triton")
        assert made.bounded == ("attend" not in made.without)
    assert len(caplog.records) == decodes + codes
    for record in caplog.records:
        assert f"without the Triton kernel {kernel}" in record.message
        assert "\n" not in record.message


def test_kernels_of_8_bits_are_tried_where_they_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of bfloat16 were rehearsed whatever the weights, and the first int8 product ended the server's start."""
    kept = []
    matvec, windows = fused.matvec, fused.windows

    def seen(launch: Callable[..., object], which: int) -> Callable[..., object]:
        def run(*args: Any) -> object:
            kept.append(args[which].dtype)
            return launch(*args)

        return run

    monkeypatch.setattr(fused, "matvec", seen(matvec, 3))
    monkeypatch.setattr(fused, "windows", seen(windows, 1))
    assert type(pick(CONFIG, CUDA, torch.bfloat16, "int8")) is TritonOperations
    assert set(kept) == {torch.int8}
    kept.clear()
    pick(CONFIG, CUDA, torch.bfloat16)
    assert set(kept) == {torch.bfloat16}


@pytest.mark.parametrize("told", ["matvec", " draw, gate ", "all"])
def test_kernels_are_left_out_that_the_environment_names(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that says something wrong could only be left out with all others."""
    monkeypatch.setenv(WITHOUT, told)
    made = pick(CONFIG, CUDA, torch.bfloat16)
    if told == "all":
        assert type(made) is TorchOperations
    else:
        assert isinstance(made, TritonOperations)
        assert made.without == {name.strip() for name in told.split(",")}
        assert made._few(torch.zeros(1, 1, 8)) == (told != "matvec")


def test_a_kernel_to_leave_out_that_there_is_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slip of the pen the kernel ran on."""
    monkeypatch.setenv(WITHOUT, "matvec,drwa")
    with pytest.raises(StreamingError, match="no kernel drwa; there are begin_frame"):
        pick(CONFIG, CUDA, torch.bfloat16)


def test_a_kernel_that_breaks_the_device_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is lost to the process, and nobody knew which kernel to leave out."""

    def broken(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(fused, "attend", broken)
    monkeypatch.setenv(WITHOUT, "draw")
    with pytest.raises(StreamingError, match=f"illegal memory.*\n.*attend broke.*{WITHOUT}=attend,draw leaves it out"):
        pick(CONFIG, CUDA, torch.bfloat16)


def test_what_fails_without_the_kernel_too_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a search for a kernel to leave out that never ends."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(fused, "gate", broken)
    monkeypatch.setattr(TorchOperations, "gate", broken)
    with pytest.raises(RuntimeError, match="no such product"):
        pick(CONFIG, CUDA, torch.bfloat16)


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

    monkeypatch.setattr(fused, "attend", broken)
    with pytest.raises(torch.OutOfMemoryError):
        pick(CONFIG, CUDA, torch.bfloat16)
