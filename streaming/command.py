"""Parts that the commands share: what signals do before a command handles them, and the lines for the terminal.

It imports nothing that takes time: a command calls `end_on_signals` before its other imports.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from streaming.errors import StreamingError

VERSION = "0.1.0"
"""The package's version, which pyproject.toml takes from here."""
STARTING = "starting ..."
"""The line that a command prints before it does anything that takes time."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses after Ctrl-C and after SIGTERM, as shells have them: 128 and the signal's number."""


class OutputError(StreamingError):
    """Standard output, or a file for results, cannot be written."""

    code = "bad_output"


def end_on_signals(status: int | None = None) -> None:
    """Let Ctrl-C and SIGTERM end the process at once and without a word, until it handles them itself.

    status: the exit status then; by default what the signal's is.

    An exception in the middle of an import is told as a traceback of whatever was being imported; and process 1 of a
    container would not be ended by SIGTERM at all.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED if status is None else status))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED if status is None else status))


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt`, so that what is open is closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def call_at_end_of_input(act: Callable[[], object]) -> None:
    """Read standard input to its end in a thread, and then call `act` there: the `call_soon_threadsafe` of a loop."""

    def wait_for_eof() -> None:
        with suppress(OSError):  # an input that cannot be read has ended
            # Not through Python's buffer: a thread that holds its lock makes the interpreter abort at exit.
            while os.read(0, 4096):
                pass
        with suppress(RuntimeError):  # the loop is closed: everything has ended by itself
            act()

    threading.Thread(target=wait_for_eof, name="stdin", daemon=True).start()


def say(line: str) -> None:
    """Print a line to standard output at once. Raises `OutputError`; what could not be written is then dropped."""
    try:
        print(line, flush=True)
    except OSError as error:
        drop_output()
        raise OutputError(f"cannot write to standard output: {error.strerror or error}") from None


def complain(line: str) -> None:
    """Print a line to standard error, if that can be written: there is nowhere else to say that it cannot."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def drop_output(descriptor: int = 1) -> None:
    """Forget what waits for standard output, or standard error (2): the interpreter would try to write it once more at
    its end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def end_output(status: int, program: str) -> int:
    """Write out what waits for standard output and standard error. Return the exit status: an output that cannot be
    written makes a failure of a success; complaints that cannot be written change nothing.

    The interpreter would do it after this, and end with 120 and a message of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        if status == 0:
            complain(f"{program}: cannot write to standard output: {error.strerror or error}")
        status = status or 1
    try:
        sys.stderr.flush()
    except OSError:
        drop_output(2)
    return status


def check_result(flag: str, path: Path | None) -> None:
    """Raise `OutputError` if the file that `flag` names cannot be written: better before the work than after."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{flag} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{flag} {path} cannot be written to; choose another place")


def write_result(flag: str, path: Path, text: str) -> None:
    """Write results to the file that `flag` names.

    Where that fails they go to standard output, so that nothing is lost, and `OutputError` is raised.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        say(text)
        raise OutputError(
            f"cannot write {flag} {path}: {error.strerror or error}; the results are on standard output instead"
        ) from None
