"""How many sessions a server takes that was told no number: what is in time, what fits, and why, in one line."""

from __future__ import annotations

import pytest
import torch

from streaming import most_sessions as module
from streaming.frame_step import FrameStep
from streaming.loading import load_engine, load_models
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.most_sessions import most_sessions


class _Clock:
    """Stand for `FrameStep`: a step takes so long for one session, and so much more for each further one."""

    def __init__(self, first_ms: float, more_ms: float) -> None:
        self.first_ms, self.more_ms, self.spent_s = first_ms, more_ms, 0.0
        self.asked: list[int] = []

    def __call__(
        self, codec: StreamingMimi, decoder: LlamaDecoder, slots: int, context_frames: int, rewind_frames: int
    ) -> _Clock:
        self.slots = slots
        return self

    def rehearse(self, rows: int) -> float:
        assert 1 <= rows <= self.slots
        self.asked.append(rows)
        seconds = (self.first_ms + (rows - 1) * self.more_ms) / 1e3
        self.spent_s += seconds
        return seconds


def found(clock: _Clock, monkeypatch: pytest.MonkeyPatch, fitting: int | None = None) -> int:
    models = load_models("demo", device="cpu")
    monkeypatch.setattr(module, "FrameStep", clock)
    return most_sessions(models.codec, models.decoder, 20, 4, fitting)


@pytest.mark.parametrize(
    ("first_ms", "more_ms", "sessions"),
    [(8.0, 3.0, 19), (8.0, 0.05, 512), (8.0, 0.0, 512), (63.0, 20.0, 1), (70.0, 1.0, 1), (30.0, 10.0, 4)],
)
def test_it_is_what_a_step_of_all_has_time_for(
    first_ms: float, more_ms: float, sessions: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four sessions were the default everywhere: one machine starved by it, another had room for fifty."""
    clock = _Clock(first_ms, more_ms)
    with caplog.at_level("INFO"):
        assert found(clock, monkeypatch) == sessions
    assert f"{sessions} sessions: a step takes {first_ms:.1f} ms for one" in caplog.text


@pytest.mark.parametrize("first_ms", [0.5, 5.0, 30.0, 79.0, 81.0, 390.0, 410.0, 1900.0])
@pytest.mark.parametrize("more", [0.1, 1.0])
def test_measuring_takes_two_seconds_at_most(first_ms: float, more: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that measured for longer would be slow to start for nothing."""
    clock = _Clock(first_ms, more * first_ms)
    assert found(clock, monkeypatch) >= 1
    assert clock.spent_s <= 2.0
    assert max(clock.asked) <= 8


def test_a_model_that_cannot_speak_in_real_time_says_so_and_what_would_help(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first client found out, by the gaps in what it heard."""
    assert found(_Clock(95.0, 1.0), monkeypatch) == 1
    assert "one session alone takes 95 ms for each 80 ms of speech here" in caplog.text
    assert "--quantize auto" in caplog.text and "GPU" in caplog.text


def test_it_is_no_more_than_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a machine that is fast enough for more sessions than it has room for, and starts with none."""
    clock = _Clock(1.0, 0.1)
    assert found(clock, monkeypatch, fitting=3) == 3
    assert clock.slots == 3
    assert found(clock, monkeypatch, fitting=0) == 1


def test_a_rehearsal_speaks_with_full_contexts_and_leaves_a_clean_step() -> None:
    """Pins a measurement of empty contexts, whose steps are the quickest that there are."""
    models = load_models("demo", device="cpu")
    step = FrameStep(models.codec, models.decoder, 3, 20, 4)
    assert step.rehearse(2) > 0
    assert step._device.decoder_state.frames.tolist() == [21, 21, 0, 0]
    for half in (step._device.codec_state.encoder, step._device.codec_state.decoder):
        assert torch.equal(half.frames, step._device.decoder_state.frames)


def test_an_engine_that_chooses_has_a_slot_at_least() -> None:
    """It has one, whatever else this machine does at the time."""
    with load_engine("demo", device="cpu", max_sessions="auto") as engine:
        assert 1 <= engine.stats().slots <= 512
        with engine.open(seed=1) as session:
            assert session.seed == 1
