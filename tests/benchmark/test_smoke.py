"""What a new GPU is asked first: whether the kernels agree, and if not, which of them does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch

from streaming.benchmark import smoke
from streaming.benchmark.models import StepModels
from streaming.benchmark.smoke import SmokeError, _Run
from streaming.models.operations.base import Operations
from streaming.models.operations.torch import TorchOperations

fused = pytest.importorskip("streaming.models.operations.triton.operations", exc_type=ImportError)


@dataclass
class _Model:
    operations: Operations
    device = torch.device("cpu")

    def on(self, operations: Operations) -> _Model:
        return _Model(operations)


def _loaded(without: tuple[str, ...] = ()) -> StepModels:
    codec, decoder = (_Model(fused.TritonOperations(without=without)) for _ in range(2))
    return StepModels("stub", cast(Any, codec), cast(Any, decoder))


def _measured(loaded: StepModels, wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge these models, whose codes are others where any of the wrong kernels takes part."""

    def run(codec: Any, decoder: Any, graphs: bool) -> _Run:
        kernels = isinstance(decoder.operations, fused.TritonOperations)
        bad = kernels and bool(wrong - decoder.operations.without)
        codes = torch.full((12, 4), int(bad))
        return _Run(codes, codes, np.ones(12 * 1920, np.float32), 1.0, 1.0, False)

    monkeypatch.setattr(smoke, "_run", run)
    monkeypatch.setattr(smoke, "losses", lambda decoder, codes: torch.zeros(4))
    monkeypatch.setattr(smoke.models, "load", lambda options: loaded)
    smoke.measure(cast(Any, None))


def test_the_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test said only that kernels do not agree, and nothing more was measured."""
    with pytest.raises(SmokeError, match="only 0 % of the codes") as found:
        _measured(_loaded(), {"draw"}, monkeypatch)
    assert str(found.value).endswith("\nwithout draw they agree; STREAMING_WITHOUT_KERNELS=draw leaves it out")


def test_what_is_left_out_already_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmokeError, match="without matvec they agree; STREAMING_WITHOUT_KERNELS=gate,matvec leaves"):
        _measured(_loaded(("gate",)), {"matvec"}, monkeypatch)


def test_two_wrong_kernels_are_told_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmokeError, match=r"do not agree without any one of the kernels either$"):
        _measured(_loaded(), {"matvec", "draw"}, monkeypatch)


def test_kernels_that_agree_pass_and_a_model_without_any_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a fallback that is measured for the kernels."""
    _measured(_loaded(), set(), monkeypatch)
    loaded = _loaded()
    loaded.codec.operations = TorchOperations()
    with pytest.raises(SmokeError, match="the codec runs on plain PyTorch"):
        _measured(loaded, set(), monkeypatch)
