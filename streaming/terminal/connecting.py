"""The client's way to a session: a server of its own or the one that is named, the flags as a session's settings, and
a new session where one was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import itertools
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError, leads_to_this_machine
from streaming.errors import ContinuationError
from streaming.files import write_private
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
"""The wait before each attempt to begin anew; the last one holds for all further attempts."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server's address, and what lets us in."""

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
    # Settings of servers in the environment are not for this one: with other tokens or TLS it could not be reached.
    # Settings of how it computes are.
    ours = ("STREAMING_NATIVE", "STREAMING_WITHOUT_KERNELS")
    environment = {
        name: value for name, value in os.environ.items() if name in ours or not name.startswith("STREAMING_")
    }
    environment["STREAMING_TOKENS"] = f"client:{token}"
    if args.save is not None or args.load is not None:
        command.append("--allow-save")
        environment["STREAMING_SESSION_KEY"] = own_key(os.environ)
    url = await session.enter_async_context(own_server(command, environment=environment, said=_teller(view)))
    view.event("server", {"url": url})
    return Server(url, token)


@contextlib.asynccontextmanager
async def connect(
    args: argparse.Namespace, server: Server, view: View, *, floats: bool = False, again: bool = False
) -> AsyncIterator[ContinuationClient]:
    """floats: whether what will be sent is more than 16 bits hold. again: what --load names has been gone on with."""
    plain = ("float32", "pcm16") if floats else ("pcm16",)
    start = SessionStart(
        turn_taking=args.turn,
        pace=args.pace,
        max_seconds=args.max_seconds,
        lag="wait" if args.input else "drop",  # a file is better late than with holes
        lead_ms=LEAD_MS,
        resume=args.url is not None,
        takes=args.input is None,
        voices=True,
        codecs=("opus", *plain) if wants_opus(args, server) else plain,
        sampling=SamplingOptions(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
    )
    view.progress(f"connecting to {server.url}" if args.url is not None else "opening a session")
    saved = b"" if args.load is None or again else read_saved(args.load)
    if args.save is not None:
        check_writable(args.save)
    async with ContinuationClient.connect(server.url, start, token=server.token, saved=saved) as client:
        if args.save is not None and not client.started.saves:
            raise ContinuationError("the server keeps no conversations: it would have to run with --allow-save")
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
            return await session.enter_async_context(connect(args, server, view, again=True))
        except RefusedError as error:
            if not error.retry_after_ms:
                raise
        except ContinuationError:
            pass  # the server is away, perhaps for longer
    raise AssertionError


def read_saved(path: str) -> bytes:
    """Return a saved conversation. Raises `ContinuationError`."""
    try:
        saved = Path(path).read_bytes()
    except OSError as error:
        raise ContinuationError(f"cannot read {path}: {error.strerror}") from None
    if not saved:
        raise ContinuationError(f"{path} is empty: it is no saved conversation")
    return saved


def check_writable(path: str) -> None:
    """Raise `ContinuationError` where `save` could not write, before there is a conversation that would be lost."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        raise ContinuationError(f"cannot write {path}: {error.strerror}") from None


async def save(client: ContinuationClient, path: str, view: View) -> None:
    """Keep the conversation in a file that its owner alone may read. Raises `ContinuationError`."""
    saved = await client.save()
    try:
        write_private(Path(path), saved)
    except OSError as error:
        raise ContinuationError(f"cannot write {path}: {error.strerror}") from None
    view.event("saved", {"file": path, "bytes": len(saved)})


def own_key(environment: Mapping[str, str]) -> str:
    """Return the secret that this user's own servers sign conversations with: the one in the environment, or one that
    is made the first time and kept in a file that the user alone may read. Raises `ContinuationError`.
    """
    given = environment.get("STREAMING_SESSION_KEY", "").strip()
    if given:
        return given
    home = environment.get("XDG_STATE_HOME")
    path = (Path(home) if home else Path.home() / ".local" / "state") / "streaming-continuation" / "session.key"
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, secrets.token_urlsafe(32).encode())
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ContinuationError(f"cannot keep the key of saved conversations in {path}: {error.strerror}") from None


def _teller(view: View) -> Callable[[str], None]:
    """Return a function that shows the lines of a server that starts."""

    def tell(line: str) -> None:
        said = ServerLine.parse(line)
        if said.warning:
            view.event("notice", {"message": said.message})
        else:
            view.progress(f"starting a server: {said.message}", said.share)

    return tell
