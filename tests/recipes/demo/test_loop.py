"""The training loop: nothing is lost when it is cut off."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from recipes.demo.loop import Loop


def _loop(path: Path, decay: float = 0.9) -> Loop:
    torch.manual_seed(3)
    return Loop(path, {"model": nn.Linear(4, 1)}, 1e-2, "model", decay)


def _train(loop: Loop, steps: int, stop: int | None = None) -> None:
    """`steps` steps of a problem whose batches depend on the step's number alone."""
    model = loop.modules["model"]
    done = 0

    def step() -> tuple[dict[str, float], float]:
        nonlocal done
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(loop.steps))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loop.update("model", loss)
        done += 1
        if done == steps:
            os.kill(os.getpid(), stop or signal.SIGTERM)
        return {"loss": loss.item()}, 1.0

    loop.run(step, lambda average: {"weight": float(next(average.parameters()).sum())}, minutes=1)
    assert done == steps


def _weights(loop: Loop) -> list[torch.Tensor]:
    return [parameter for module in (*loop.modules.values(), loop.average) for parameter in module.parameters()]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_and_resumed_is_the_run_that_was_not(stop: int, tmp_path: Path) -> None:
    """Optimiser, average and counters go on too: pins a resume that begins with a cold optimiser."""
    whole = _loop(tmp_path / "whole.pt")
    _train(whole, 30)
    _train(_loop(tmp_path / "cut.pt"), 12, stop)
    resumed = _loop(tmp_path / "cut.pt")
    assert (resumed.steps, resumed.audio_seconds) == (12, 12.0)
    _train(resumed, 18)
    for one, other in zip(_weights(whole), _weights(resumed), strict=True):
        assert torch.equal(one, other)
    log = (tmp_path / "cut.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in log] == ["check", "check"]


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while it writes leaves the last checkpoint as it was."""
    loop = _loop(tmp_path / "model.pt")
    _train(loop, 3)

    def torn(_state: object, path: Path) -> None:
        path.write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    loop.steps = 99
    with pytest.raises(KeyboardInterrupt):
        loop.save()
    assert _loop(tmp_path / "model.pt").steps == 3


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """One bad batch must not end hours of training."""
    loop = _loop(tmp_path / "model.pt")
    before = [weight.clone() for weight in _weights(loop)]
    model = loop.modules["model"]
    loop.update("model", model(torch.full((2, 4), torch.inf)).sum())
    assert all(torch.equal(one, other) for one, other in zip(before, _weights(loop), strict=True))


def test_a_module_that_a_stage_gained_since_begins_anew(tmp_path: Path) -> None:
    """The decoder's judges come in later than the decoder."""
    _train(_loop(tmp_path / "model.pt"), 3)
    grown = Loop(tmp_path / "model.pt", {"model": nn.Linear(4, 1), "judge": nn.Linear(1, 1)}, 1e-2, "model", 0.9)
    assert grown.steps == 3
    grown.save()
    assert "judge" in torch.load(tmp_path / "model.pt")["modules"]


def test_a_process_that_helps_trains_the_same_weights_and_is_counted(tmp_path: Path) -> None:
    """This process takes no step of its own: pins helpers that train a copy, or whose CPU time is left out."""
    loop = _loop(tmp_path / "helped.pt")
    model = loop.modules["model"]
    before = [weight.detach().clone() for weight in model.parameters()]

    def waits() -> tuple[dict[str, float], float]:
        time.sleep(0.01)
        if loop.audio_seconds >= 500.0:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}, 0.0

    def helps() -> tuple[dict[str, float], float]:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1.0)
        return {}, 100.0

    loop.run(waits, lambda _: {}, minutes=1, helpers=[helps])
    for weight, first in zip(model.parameters(), before, strict=True):
        assert bool((weight >= first + 4.9).all())
    resumed = _loop(tmp_path / "helped.pt")
    assert resumed.audio_seconds >= 500.0 and resumed.steps > resumed.audio_seconds / 100.0
    assert torch.equal(next(resumed.modules["model"].parameters()), next(model.parameters()))
