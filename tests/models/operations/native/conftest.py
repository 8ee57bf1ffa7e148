"""The native operations, as compiled for this processor and for lesser ones."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streaming.models.operations.native import library as native

PROCESSORS = ["native", "x86-64-v3", "x86-64"]
"""What `-march` says: all that this one has; AVX2 without AVX-512; neither."""


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiled for it, and loaded."""
    if request.param != "native":
        if platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported():
            pytest.skip("another family of processors")
        flags = [flag.replace("-march=native", f"-march={request.param}") for flag in native._FLAGS]
        monkeypatch.setattr(native, "_FLAGS", tuple(flags))
        native.library.cache_clear()
    if native.library() is None:
        pytest.skip("no native operations here")
    yield request.param
    if request.param != "native":
        native.library.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, empty, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "streaming-continuation" / "native"
    native.library.cache_clear()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
