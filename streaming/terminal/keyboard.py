"""The keys that a talk knows, from a terminal in the state that they need, or from lines of anything else.

A terminal tells of keys that are pressed, and repeats them while they are held, but of keys that are released it tells
only where it speaks kitty's keyboard protocol (kitty, foot, Ghostty, Alacritty, WezTerm, iTerm2 and others, though not
through tmux): there a key can be held to talk. Elsewhere it starts and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

MAX_KEYS = 16
"""Keys that wait; more are ignored, since nobody means them."""
REPEAT_S = 0.7
"""A key that comes again within so long is still held: terminals wait up to 0.66 s before they repeat."""
_ANSWER_S = 0.3
"""A terminal on the far end of a slow line may take as long to say what it is."""
_KITTY = re.compile(rb"\x1b\[\?\d+u")
_WHO_ARE_YOU = re.compile(rb"\x1b\[\?[\d;]*c")
_KEY = re.compile(
    rb"\x1b\[(?P<code>\d+)(?::\d*)*(?:;(?P<modifiers>\d*)(?::(?P<event>\d))?[\d;:]*)?u"
    rb"|\x1b\[[\d;:?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]?|(?P<byte>.)",
    re.DOTALL,
)
_CTRL = 4
_ENTER, _SPACE = 13, 32


class Key(enum.Enum):
    """An event of the keyboard."""

    ENTER = "enter"
    SPACE = "space"
    TAKE = "take"
    """The letter t."""
    RELEASED = "released"
    """Space or Enter. Only some terminals tell."""


_KEYS = {_ENTER: Key.ENTER, _SPACE: Key.SPACE, ord("t"): Key.TAKE, ord("T"): Key.TAKE}


class KeyParser:
    """Read keys from what a terminal or a pipe sends. Pure, but for the clock that it is given.

    steady: a key that is held is one key. Without it, every byte is one.
    """

    def __init__(self, *, steady: bool) -> None:
        self._steady = steady
        self._last_s: dict[int, float] = {}
        self.ended = False
        """After Ctrl-D."""
        self.interrupted = False
        """After a Ctrl-C that came as a key instead of as a signal."""

    def feed(self, data: bytes, now_s: float) -> list[Key]:
        keys = []
        for match in _KEY.finditer(data):
            if match["byte"] is not None:
                code, event, modifiers = match["byte"][0], 1, 0
                if code in (4, 10):
                    code, modifiers = (100, _CTRL) if code == 4 else (_ENTER, 0)
            elif match["code"] is not None:
                code, event = int(match["code"]), int(match["event"] or 1)
                modifiers = max(0, int(match["modifiers"] or 1) - 1)
            else:
                continue  # some other key
            if modifiers & _CTRL and event != 3:
                self.ended |= code == ord("d")
                self.interrupted |= code == ord("c")
            elif code in _KEYS:
                keys += self._key(code, event, now_s)
        return keys

    def _key(self, code: int, event: int, now_s: float) -> list[Key]:
        if event == 3:
            self._last_s.pop(code, None)
            return [] if _KEYS[code] is Key.TAKE else [Key.RELEASED]
        again = now_s - self._last_s.get(code, float("-inf")) < REPEAT_S
        self._last_s[code] = now_s
        if (self._steady or _KEYS[code] is Key.TAKE) and (event == 2 or again):
            return []
        return [_KEYS[code]]


class Keyboard:
    """The keys of a descriptor, as an asynchronous iterator that ends with Ctrl-D, or with the input.

    A daemon thread reads, because no event loop can wait for a terminal on every system; it reads the descriptor,
    because a thread that holds `sys.stdin` when the interpreter ends makes it abort. Made within a running loop.
    """

    def __init__(self, descriptor: int = 0, *, steady: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Key | None] = asyncio.Queue(MAX_KEYS + 1)
        self._descriptor, self._parser = descriptor, KeyParser(steady=steady)
        self._over = False
        threading.Thread(target=self._read, name="keyboard", daemon=True).start()

    def __aiter__(self) -> Keyboard:
        return self

    async def __anext__(self) -> Key:
        key = None if self._over else await self._queue.get()
        if key is None:
            self._over = True
            raise StopAsyncIteration
        return key

    def _put(self, key: Key | None) -> None:
        if key is None or self._queue.qsize() < MAX_KEYS:
            with contextlib.suppress(asyncio.QueueFull):  # the end was told before
                self._queue.put_nowait(key)

    def _read(self) -> None:
        # OSError: the descriptor was closed. RuntimeError: the loop is gone when a key comes at the very end.
        with contextlib.suppress(OSError, RuntimeError):
            while not self._parser.ended and (data := os.read(self._descriptor, 1_024)):
                for key in self._parser.feed(data, time.monotonic()):
                    self._loop.call_soon_threadsafe(self._put, key)
                if self._parser.interrupted:
                    self._parser.interrupted = False
                    os.kill(os.getpid(), signal.SIGINT)
            self._loop.call_soon_threadsafe(self._put, None)


@contextlib.contextmanager
def key_by_key(*, releases: bool, descriptor: int = 0, tell: Callable[[bytes], None] | None = None) -> Iterator[bool]:
    """While it lasts, a terminal gives each key at once, shows none, and is not suspended. Then it is as it was.

    releases: ask it to tell of releases, too; yields whether it will. Where `descriptor` is no terminal, or the system
    not POSIX, nothing is done. tell: how to speak to the terminal, by default over standard output if that is one.
    """
    try:
        import termios
    except ImportError:  # not a POSIX system
        yield False
        return
    if not os.isatty(descriptor) or _in_background(descriptor):
        yield False
        return
    if tell is None:
        tell = _tell if sys.stdout.isatty() else None
    before = termios.tcgetattr(descriptor)
    mode = list(before)
    mode[3] &= ~(termios.ECHO | termios.ICANON)
    mode[6] = list(before[6])
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    mode[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(descriptor, termios.TCSADRAIN, mode)
    told = False
    try:
        if releases and tell is not None:
            tell(b"\x1b[?u\x1b[c")
            told = _answered(descriptor)
            if told:
                tell(b"\x1b[>3u")  # modified keys, and releases
        yield told
    finally:
        if told and tell is not None:
            tell(b"\x1b[<u")
        # What was typed and not read must not reach the shell, above all the release of a key.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def _in_background(descriptor: int) -> bool:
    """Return whether a shell runs this as a job without the terminal: setting the terminal up would stop the job."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:  # a terminal that does not control this process
        return False


def _tell(data: bytes) -> None:
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), data)


def _answered(descriptor: int) -> bool:
    """Return whether the terminal says that it knows kitty's protocol, before it says what every terminal does."""
    said, deadline = b"", time.monotonic() + _ANSWER_S
    while not _WHO_ARE_YOU.search(said) and (left := deadline - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            said += os.read(descriptor, 256)
    return bool(_KITTY.search(said))
