"""The native operations, as compiled for this processor and for lesser ones."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from streaming.models.operations.native import library as native
from tests.models.operations.native.remote import Remote, compile_remote

PROCESSORS = ["native", "x86-64", "x86-64-v3", "x86-64-v4", "native by clang", "armv8-a"]
"""What `-march` says: all that this one has; SSE2; AVX2; AVX512 without VNNI; another compiler; NEON, by qemu. Each has
another path through the code (`vectors.h`), and each path is taken.
"""
OF_INTEGERS = [*PROCESSORS, "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm"]
"""Those, and two that only differ in products of integers (`integers.h`): dot products of bytes, and of matrices."""
QUICKLY = "-O1"
"""How everything but the native operations themselves is compiled: in half the time, by the same paths."""
_CROSS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


def missing(processor: str) -> str | None:
    """Why this machine cannot run it."""
    if processor == "native by clang":
        return None if shutil.which("clang") else "no clang here"
    if processor.startswith("arm"):
        return None if all(map(shutil.which, _CROSS)) else f"no {' and '.join(_CROSS)} here"
    if processor != "native" and platform.machine() != "x86_64":
        return "another family of processors"
    if processor == "x86-64-v3" and not torch.cpu._is_avx2_supported():
        return "no AVX2 here"
    return "no AVX512 here" if processor == "x86-64-v4" and not torch.cpu._is_avx512_supported() else None


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Remote]]:
    """`emulated(target)`: the operations for it, in a process that lasts as long as the tests."""
    compiler, emulator = _CROSS
    running: dict[str, Remote] = {}

    def run(target: str) -> Remote:
        if target not in running:
            program = compile_remote([compiler], target, tmp_path_factory.mktemp("remote"), QUICKLY)
            running[target] = Remote([emulator, "-cpu", "max", str(program)])
        return running[target]

    yield run
    for remote in running.values():
        remote.close()


@pytest.fixture(params=PROCESSORS)
def processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, emulated: Callable[[str], Remote]
) -> Iterator[str]:
    """A processor that the operations are compiled for, and loaded."""
    yield from _loaded(request.param, monkeypatch, emulated)


@pytest.fixture(params=OF_INTEGERS)
def processor_of_integers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, emulated: Callable[[str], Remote]
) -> Iterator[str]:
    """A processor that the operations are compiled for, and loaded."""
    yield from _loaded(request.param, monkeypatch, emulated)


def _loaded(processor: str, monkeypatch: pytest.MonkeyPatch, emulated: Callable[[str], Remote]) -> Iterator[str]:
    reason = missing(processor)
    if native.library() is None or reason:
        pytest.skip(reason or "no native operations here")
    if processor.startswith("arm"):
        monkeypatch.setattr(native, "build", lambda: emulated(processor))
    else:
        target, _, compiler = processor.partition(" by ")
        if compiler:
            monkeypatch.setenv("CC", compiler)
        if processor != native.NATIVE:
            monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, QUICKLY))
        monkeypatch.setattr(native, "build", functools.partial(native.build, target))
    native.library.cache_clear()
    assert native.library() is not None
    yield processor
    native.library.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, empty, and nothing loaded yet. What is compiled for it is not optimised, which takes a third
    of the time.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))
    native.library.cache_clear()
    yield tmp_path / "streaming-continuation" / "native"
    native.library.cache_clear()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
