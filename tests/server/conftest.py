"""A live server over a step without weights, as most tests of what goes over the wire want it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streaming.engine.engine import Engine
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, serving
from tests.server.openai.client import LoudIsSpeech


@pytest.fixture
def step() -> StubStep:
    return StubStep(2, rewind_frames=16)


@pytest.fixture
def server(step: StubStep, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    monkeypatch.setattr("streaming.models.voice_activity.load_vad_model", LoudIsSpeech)
    with Engine(step, "stub") as engine, serving(engine) as live:
        yield live
