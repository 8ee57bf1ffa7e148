"""Launches go where the tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from streaming.models.operations.triton.device import on_its_device


def test_a_launch_runs_on_its_tensors_device_and_leaves_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins `--device cuda:1`: Triton would launch on cuda:0, with pointers of another GPU."""
    entered = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = on_its_device(lambda number, tensor: tensor)
    launch(1, torch.zeros(1))
    assert not entered
    with FakeTensorMode():
        launch(1, torch.zeros(1, device="cuda:1"))
    assert entered == [torch.device("cuda:1")]
