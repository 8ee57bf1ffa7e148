"""A server without weights, as a process of its own, for those flags of server.py that the benchmark gives it."""

from __future__ import annotations

import argparse
import sys

from tests.engine.stub_step import StubStep, running
from tests.server.live_server import serving


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-sessions", type=int, required=True)
    slots = parser.parse_args().max_sessions
    with running(StubStep(slots)) as engine, serving(engine) as server:
        print(f"listening on {server.url}", flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
