"""`python -m tests.deploy.stub_server FLAG…`: `server.py` with all its flags and signals, and without weights.

It starts in a second, since torch is not imported, and says the same on every processor.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streaming.command import end_on_signals
from streaming.engine.engine import Engine
from tests.engine.stub_step import StubStep

_HERE = Path(__file__).parent
STUBBED = {"PYTHONPATH": f"{_HERE / 'stubbed'}{os.pathsep}{_HERE.parents[1]}"}
"""The environment in which every `server.py` that anybody starts has no weights."""


def load_engine(*_: Any, max_sessions: Any, **__: Any) -> Engine:
    slots = 4 if max_sessions == "auto" else int(max_sessions)
    return Engine(StubStep(slots, context_frames=256, rewind_frames=16), "stub")


def without_weights(load: Callable[..., Engine] = load_engine) -> None:
    """Let the server of this process run over the engine that `load` makes."""
    loading = types.ModuleType("streaming.loading")  # which brings torch
    vars(loading).update(load_engine=load, use_threads=lambda _: None)
    sys.modules["streaming.loading"] = loading


def main(load: Callable[..., Engine] = load_engine) -> int:
    """Run the server over the engine that `load` makes. Returns the exit status."""
    end_on_signals()
    without_weights(load)
    from streaming.server.command import parse
    from streaming.server.start import run

    return run(parse(sys.argv[1:], os.environ), "server.py")


if __name__ == "__main__":
    sys.exit(main())
