"""The Enter key, as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator

MAX_PRESSES = 16
"""Presses that wait; more are ignored, since nobody means them."""


async def presses(descriptor: int = 0) -> AsyncIterator[None]:
    """One item for each line of standard input; ends with it (Ctrl-D).

    A daemon thread reads, because no event loop can wait for a terminal on every system; it reads the descriptor,
    because a thread that holds `sys.stdin` when the interpreter ends makes it abort.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bool] = asyncio.Queue(MAX_PRESSES + 1)

    def put(pressed: bool) -> None:
        if not pressed or queue.qsize() < MAX_PRESSES:
            queue.put_nowait(pressed)

    def read() -> None:
        # OSError: the descriptor was closed. RuntimeError: the loop is gone when a key comes at the very end.
        with contextlib.suppress(OSError, RuntimeError):
            while data := os.read(descriptor, 1_024):
                for _ in range(data.count(b"\n")):
                    loop.call_soon_threadsafe(put, True)
            loop.call_soon_threadsafe(put, False)

    threading.Thread(target=read, name="keyboard", daemon=True).start()
    while await queue.get():
        yield None


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """While it lasts, a terminal does not echo: an echoed Enter would push the live view apart. Elsewhere, nothing."""
    try:
        import termios
    except ImportError:  # not a POSIX system
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
