"""A server with a session store and without weights, as a process of its own: `folder`, and how long a step takes."""

from __future__ import annotations

import asyncio
import signal
import sys

from streaming.engine.engine import Engine
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.server import ServerOptions, Shutdown, run_server
from streaming.server.session_store import SessionStore
from tests.engine.stub_step import StubStep


async def serve(folder: str, step_s: float) -> None:
    shutdown = Shutdown()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.request)
    keeper = Gatekeeper(check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False))
    options = ServerOptions(port=0, store=SessionStore(folder, None), resume_s=40.0, drain_s=5.0)
    with Engine(StubStep(2, rewind_frames=16, delay_s=lambda: step_s), "stub") as engine:
        await run_server(engine, keeper, options, shutdown, lambda url: print(f"listening on {url}", flush=True))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2])))
