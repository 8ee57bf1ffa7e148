"""The client's way to a session: a server of its own or the one that is named, the flags as a session's settings, and
a new session where one was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError, leads_to_this_machine
from streaming.errors import ContinuationError
from streaming.protocol.messages import SamplingOptions, SessionStart
from streaming.protocol.opus import opus_available
from streaming.terminal.own_server import ServerLine, own_server, server_command
from streaming.terminal.view import Meters, View

LEAD_MS = 400
"""The server runs at most this far ahead of playback."""
NO_OPUS = (
    "the server has no Opus (`pip install opuslib-next-bundled` there): audio is sent as it is, 384 kbit/s each way"
)
AGAIN_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Before each attempt to begin anew; the last one again and again."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is, and what lets us in."""

    url: str
    token: str | None


async def find_server(args: argparse.Namespace, session: contextlib.AsyncExitStack, view: View) -> Server:
    """Return the server at --url, or start one of our own, which ends with `session`."""
    if args.url is not None:
        return Server(args.url, os.environ.get("STREAMING_TOKEN", "").strip() or None)
    view.progress("starting a server")
    command = [*server_command(args.model, args.codec), "--max-sessions", "1"]
    # A token of its own: whoever else is on this machine can reach the port, and has no business there.
    token = secrets.token_urlsafe(32)
    # What the environment says to servers is not for this one: it could not even be reached with other tokens or TLS.
    # How it computes is another matter.
    ours = ("STREAMING_NATIVE",)
    environment = {
        name: value for name, value in os.environ.items() if name in ours or not name.startswith("STREAMING_")
    }
    environment["STREAMING_TOKENS"] = f"client:{token}"
    url = await session.enter_async_context(own_server(command, environment=environment, said=_teller(view)))
    view.event("server", {"url": url})
    return Server(url, token)


@contextlib.asynccontextmanager
async def connect(
    args: argparse.Namespace, server: Server, view: View, *, floats: bool = False
) -> AsyncIterator[ContinuationClient]:
    """floats: whether what will be sent is more than 16 bits hold."""
    plain = ("float32", "pcm16") if floats else ("pcm16",)
    start = SessionStart(
        turn_taking=args.turn,
        pace=args.pace,
        max_seconds=args.max_seconds,
        lag="wait" if args.input else "drop",  # a file is better late than with holes
        lead_ms=LEAD_MS,
        resume=args.url is not None,
        takes=args.input is None,
        codecs=("opus", *plain) if wants_opus(args, server) else plain,
        sampling=SamplingOptions(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
    )
    view.progress(f"connecting to {server.url}" if args.url is not None else "opening a session")
    async with ContinuationClient.connect(server.url, start, token=server.token) as client:
        if args.transport == "opus" and client.started.codec != "opus":
            view.event("notice", {"message": NO_OPUS})
        yield client


def wants_opus(args: argparse.Namespace, server: Server) -> bool:
    """Return whether audio goes as Opus: not on this machine, where Opus gains nothing and changes the voice."""
    if args.transport == "auto":
        return opus_available() and not leads_to_this_machine(server.url)
    return bool(args.transport == "opus")


async def begin_anew(
    args: argparse.Namespace, server: Server, session: contextlib.AsyncExitStack, view: View, meters: Meters
) -> ContinuationClient:
    """Open a new session, however long that takes. Raises `RefusedError` where there is no use in trying."""
    meters.away_seconds = 0.0
    for wait_s in itertools.chain(AGAIN_S, itertools.repeat(AGAIN_S[-1])):
        view.show(meters)
        await asyncio.sleep(wait_s)
        try:
            return await session.enter_async_context(connect(args, server, view))
        except RefusedError as error:
            if not error.retry_after_ms:
                raise
        except ContinuationError:
            pass  # it is away, perhaps for longer
    raise AssertionError


def _teller(view: View) -> Callable[[str], None]:
    """Return what shows the lines of a server that starts."""

    def tell(line: str) -> None:
        said = ServerLine.parse(line)
        if said.warning:
            view.event("notice", {"message": said.message})
        else:
            view.progress(f"starting a server: {said.message}", said.share)

    return tell
