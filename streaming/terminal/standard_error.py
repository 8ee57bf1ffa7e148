"""Standard error while something is drawn on the terminal: what libraries in C write there (ALSA,
PortAudio, WebRTC) would go through the middle of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator

MAX_LINES = 200
"""Lines that are held; the oldest go."""
_END_S = 1.0


@contextlib.contextmanager
def held_back() -> Iterator[deque[str]]:
    """While it lasts, lines that are written to descriptor 2 are put into what it yields, the newest `MAX_LINES`. What
    Python itself writes to `sys.stderr` arrives as ever. Where descriptor 2 is no terminal, nothing is done.
    """
    lines: deque[str] = deque(maxlen=MAX_LINES)
    if sys.stderr is None or not os.isatty(2):
        yield lines
        return
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def read() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
            lines.extend(line.rstrip() for line in pipe if line.strip())

    reader = threading.Thread(target=read, name="standard error", daemon=True)
    reader.start()
    try:
        with os.fdopen(os.dup(terminal), "w", buffering=1, encoding=before.encoding, errors=before.errors) as ours:
            sys.stderr = ours
            yield lines
    finally:
        sys.stderr = before
        os.dup2(terminal, 2)  # the pipe's last end, unless a child has one: the reader ends
        os.close(terminal)
        reader.join(_END_S)
