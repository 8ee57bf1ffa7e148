"""A server of the client's own: started on a free port, ended with the client, that very process and no other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streaming.command import STARTING
from streaming.errors import ContinuationError

START_TIMEOUT_S = 900.0
"""Longest that a server which does not listen yet may say nothing. Loading a model takes minutes; while the server
downloads one it says how far it is.
"""
_GRACE_S = 5.0
_EXIT_S = 0.5
_LAST_LINES = 20
_LISTENING = re.compile(r"listening on (wss?://\S+)")
_PACKAGE = Path(__file__).parents[1]
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from streaming.entry import server; sys.exit(server())"
"""The package by its place: it need not be installed, and the current folder may hold another of its name."""
_LOGGED = re.compile(r"\S+Z (?P<level>[A-Z]+) (?P<message>.*)")
_LOGGER = re.compile(r" logger=\S+$")
_DOWNLOADED = re.compile(r"([\d.]+) (\w+) of ([\d.]+) (\w+) downloaded")
_UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_TOLD_LATER = "note: "
"""The server's line about its model, which `session.started` repeats."""


@dataclass(frozen=True, slots=True)
class ServerLine:
    """A line of a server that starts: what it does, how much of it is done if it tells, or a warning."""

    message: str
    share: float | None = None
    warning: bool = False

    @classmethod
    def parse(cls, line: str) -> Self:
        """Return what a line of its standard error means, which may be one of its log or not."""
        logged = _LOGGED.fullmatch(line)
        message = line if logged is None else _LOGGER.sub("", logged["message"])
        share, done = None, _DOWNLOADED.search(message)
        if done is not None and done[2] in _UNITS and done[4] in _UNITS:
            whole = float(done[3]) * _UNITS[done[4]]
            share = min(1.0, float(done[1]) * _UNITS[done[2]] / whole) if whole else None
        return cls(message, share, logged is not None and logged["level"] not in ("DEBUG", "INFO"))


class ServerStartError(ContinuationError):
    """The client's own server did not come up. The message ends with what it last said."""


def server_command(model: str, codec: str | None = None) -> list[str]:
    """Return what starts this very package's server on a free port, to end with us."""
    codec_flags = [] if codec is None else ["--codec", codec]
    command = [sys.executable, "-P", "-c", _START, str(_PACKAGE.parent), "--port", "0", "--until-eof"]
    return [*command, "--model", model, *codec_flags]


@contextlib.asynccontextmanager
async def own_server(
    command: Sequence[str],
    *,
    timeout_s: float = START_TIMEOUT_S,
    grace_s: float = _GRACE_S,
    environment: Mapping[str, str] | None = None,
    said: Callable[[str], None] = lambda _: None,
    started: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[str]:
    """Run `command` while the block lasts and gives the URL from its line `listening on ws://...`.

    environment: the server's, instead of this process's. `said` gets each line of the server's standard error while it
    starts, `started` its process id. On the way out, for whatever reason, the process gets SIGTERM, and is killed when
    it is still there after `grace_s`.

    Raises `ServerStartError` when the process ends, or has said nothing for `timeout_s` before it says that it listens.
    A `ContinuationError` of the block is told together with the server's end, if that is its cause.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,  # it is closed when this process ends, however that happens
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        # Its own session, so that Ctrl-C reaches the client alone, which then ends both in order.
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    started(process.pid)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    spoke_at = time.monotonic()

    def on_output(line: str) -> None:
        listening = _LISTENING.search(line)
        if listening and not url.done():
            url.set_result(listening[1])

    def on_error(line: str) -> None:
        nonlocal spoke_at
        spoke_at = time.monotonic()
        last_lines.append(line)
        if not url.done() and not line.startswith((STARTING, _TOLD_LATER)):
            said(line)

    # Both are read to their ends, since a full pipe would stop the server.
    readers = [
        asyncio.create_task(_each_line(process.stdout, on_output)),
        asyncio.create_task(_each_line(process.stderr, on_error)),
    ]
    ended = asyncio.create_task(process.wait())
    try:
        first: set[asyncio.Future[Any]] = {url, ended}
        while (left := spoke_at + timeout_s - time.monotonic()) > 0 and not url.done() and not ended.done():
            await asyncio.wait(first, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not url.done():
            if not ended.done():
                raise ServerStartError(f"the server said nothing for {timeout_s:g} s{_story(last_lines)}")
            await asyncio.wait(readers, timeout=_EXIT_S)
            raise ServerStartError(
                f"the server ended with status {ended.result()} before it listened{_story(last_lines)}"
            )
        yield url.result()
    except ServerStartError:
        raise
    except ContinuationError as error:
        await asyncio.wait({ended}, timeout=_EXIT_S)
        if not ended.done():
            raise
        raise ContinuationError(f"{error}; the server ended with status {ended.result()}{_story(last_lines)}") from None
    finally:
        try:
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await process.wait()
        finally:
            # This is also done when a second Ctrl-C ends the wait.
            if process.returncode is None:
                process.kill()
        # Bounded: a grandchild may keep the pipes open.
        await asyncio.wait({ended, *readers}, timeout=_EXIT_S)
        for task in (ended, *readers):
            task.cancel()
        await asyncio.gather(ended, *readers, return_exceptions=True)


def _story(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


async def _each_line(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue  # longer than the reader's limit of 64 KiB: dropped by it, and no line of interest
        if not line:
            return
        on_line(line.decode(errors="replace").rstrip())
