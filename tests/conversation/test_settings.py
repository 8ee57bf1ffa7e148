"""A session's settings over those that its client left open."""

from __future__ import annotations

from streaming.config import Sampling
from streaming.conversation.settings import Settings, filled, sampling_of
from streaming.protocol.messages import SamplingOptions, SessionStart, SessionUpdate, VadOptions

USUAL = Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=7)


def settings(**options: object) -> Settings:
    sampling = filled(SamplingOptions(**options), USUAL)  # type: ignore[arg-type]
    return Settings(SessionStart(sampling=sampling, max_seconds=3.0), USUAL)


def test_what_is_left_open_is_the_models() -> None:
    """An update that named a temperature alone switched the checkpoint's top-p off."""
    made = settings()
    made.update(SessionUpdate(sampling=SamplingOptions(temperature=0.0)))
    assert sampling_of(made.sampling) == Sampling(temperature=0.0, top_k=30, top_p=0.9, seed=7)


def test_an_update_keeps_the_sessions_own_seed() -> None:
    made = settings(seed=11)
    made.update(SessionUpdate(sampling=SamplingOptions(top_k=5)))
    assert made.sampling.seed == 11


def test_what_an_update_does_not_name_stays() -> None:
    made = settings(top_k=5)
    made.update(SessionUpdate(vad=VadOptions(silence_ms=100)))
    assert (made.max_seconds, made.sampling.top_k, made.vad.silence_ms) == (3.0, 5, 100)
    made.update(SessionUpdate(max_seconds=9.0))
    assert (made.max_seconds, made.vad.silence_ms) == (9.0, 100)
