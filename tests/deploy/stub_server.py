"""`python -m tests.deploy.stub_server FLAG…`: `server.py` with all its flags and signals, and without weights."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

from streaming.command import end_on_signals
from streaming.engine.engine import Engine
from tests.engine.stub_step import StubStep


def load_engine(*_: Any, max_sessions: Any, **__: Any) -> Engine:
    return Engine(StubStep(int(max_sessions), context_frames=256, rewind_frames=16), "stub")


def main() -> int:
    end_on_signals()
    loading = types.ModuleType("streaming.loading")  # which brings torch
    vars(loading).update(load_engine=load_engine, use_threads=lambda _: None)
    sys.modules["streaming.loading"] = loading
    from streaming.server.command import parse
    from streaming.server.start import run

    return run(parse(sys.argv[1:], os.environ), "server.py")


if __name__ == "__main__":
    sys.exit(main())
