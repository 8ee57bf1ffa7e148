"""A server with a session store and without weights, as a process of its own: `folder`, how long a step takes, and
`echo` for one that says what it hears. It takes another one for dead in half the time.
"""

from __future__ import annotations

import asyncio
import base64
import signal
import sys

import numpy as np

from streaming.audio import to_float, to_int16
from streaming.engine.engine import Engine
from streaming.server import session_store
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.server import ServerOptions, Shutdown, run_server
from streaming.server.session_store import SessionStore
from tests.engine.stub_step import Pcm, StubResult, StubStep


class Echo(StubStep):
    """Say what it has heard in the stream, frame by frame, and then again."""

    def _advance(self, slot: int, row: int, pcm: Pcm | None, result: StubResult) -> None:
        entries = self.streams[slot].entries
        super()._advance(slot, row, pcm, result)
        if pcm is not None:
            entries[-1] = base64.b64encode(to_int16(pcm).tobytes()).decode(), 0
        elif not result.ended[row]:
            heard = [entry for entry, _ in entries if entry != "spoken"]
            said = base64.b64decode(heard[(len(entries) - len(heard) - 1) % len(heard)])
            result.pcm[row] = to_float(np.frombuffer(said, np.int16))


async def serve(folder: str, step_s: float, step: type[StubStep]) -> None:
    shutdown = Shutdown()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, shutdown.request)
    keeper = Gatekeeper(check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False))
    options = ServerOptions(port=0, store=SessionStore(folder, None), resume_s=40.0, drain_s=5.0)
    with Engine(step(2, rewind_frames=16, delay_s=lambda: step_s), "stub") as engine:
        await run_server(engine, keeper, options, shutdown, lambda url: print(f"listening on {url}", flush=True))


if __name__ == "__main__":
    session_store.DEAD_S = 3.0
    asyncio.run(serve(sys.argv[1], float(sys.argv[2]), Echo if "echo" in sys.argv[3:] else StubStep))
