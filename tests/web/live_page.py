"""A page against a live server over a step without weights: what the browser tests have in common."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.config import ModelVoices
from streaming.engine.engine import Engine
from streaming.server.door.gatekeeper import Gatekeeper
from tests.server.live_server import LiveServer, serving
from tests.web.browser import Page
from tests.web.voice import VoiceStep

NOTICE = "This model is a step without weights, for tests."
OTHER_HOST = "elsewhere.test"
"""A name that the browser takes for this machine, and that is not loopback's."""


@dataclass(frozen=True)
class Served:
    """A live server and what is behind it."""

    live: LiveServer
    engine: Engine
    step: VoiceStep


@contextmanager
def served(
    slots: int = 4,
    keeper: Gatekeeper | None = None,
    suggestions: tuple[str, ...] = (),
    voices: ModelVoices | None = None,
    **options: Any,
) -> Iterator[Served]:
    """A server with `ServerOptions`. suggestions: what its model might be told; voices: those that it has."""
    step = VoiceStep(slots, delay_s=lambda: 0.005)
    with (
        Engine(step, "stub", NOTICE, suggestions=suggestions, voices=voices) as engine,
        serving(engine, keeper, **options) as live,
    ):
        yield Served(live, engine, step)


def open_page(page: Page, live: LiveServer, microphone: str = "granted", **settings: Any) -> None:
    """Open the page once it knows its server. settings: as `settings.js` keeps them."""
    page.allow_microphone(live.http, microphone)
    page.before_scripts(f"localStorage.settings ??= {json.dumps(json.dumps({'maxSeconds': 2} | settings))}")
    page.open(f"{live.http}/")
    page.wait_for("document.querySelector('#server').dataset.state === 'ready'")


def talk(page: Page, seconds: float) -> None:
    """Hold the space bar for so long, from when it is heard."""
    with page.holding_space():
        page.wait_for_phase("talking")
        time.sleep(seconds)


def keep(page: Page, name: str) -> None:
    """A screenshot for whoever wants to look: into the folder that `PAGE_SHOTS` names."""
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")
