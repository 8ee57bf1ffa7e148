"""A server of two slots, which the native protocol's tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streaming.engine.engine import Engine
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, serving


@pytest.fixture
def step() -> StubStep:
    return StubStep(2)


@pytest.fixture
def server(step: StubStep) -> Iterator[LiveServer]:
    with Engine(step, "stub") as engine, serving(engine) as live:
        yield live
