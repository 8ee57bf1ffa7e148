"""What libraries write to standard error while something is drawn on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from streaming.terminal.standard_error import MAX_LINES, held_back

pty = pytest.importorskip("pty", reason="no terminals here")

LIBRARY = """
import os, sys
from streaming.terminal.standard_error import held_back
with held_back() as lines:
    os.write(2, b"ALSA lib pcm.c: Unknown PCM\\nALSA lib")
    print("ours", file=sys.stderr)
    os.write(2, b" pcm.c: again\\n")
os.write(2, b"as ever\\n")
print(*lines, sep="|")
"""
MANY = """
import os
from streaming.terminal.standard_error import held_back
with held_back() as lines:
    for number in range(5000):
        os.write(2, b"underrun %d\\n" % number)
print(len(lines), lines[-1])
"""


def on_a_terminal(program: str) -> tuple[str, str]:
    """Run a program whose standard error is a terminal; return what it printed, and what the terminal got."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60, check=True
        )
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # Linux: its other end is closed
            pass
        return done.stdout, shown.decode()
    finally:
        os.close(ours)


def test_a_librarys_lines_are_held_and_ours_arrive() -> None:
    """ALSA's lines went through the middle of the view and doubled its rows."""
    printed, shown = on_a_terminal(LIBRARY)
    assert printed == "ALSA lib pcm.c: Unknown PCM|ALSA lib pcm.c: again\n"
    assert shown == "ours\r\nas ever\r\n"


def test_of_many_lines_the_newest_are_kept() -> None:
    """A conversation of hours must neither fill the memory nor stop because a pipe is full."""
    printed, shown = on_a_terminal(MANY)
    assert printed == f"{MAX_LINES} underrun 4999\n"
    assert shown == ""


def test_a_file_gets_what_it_would(capfd: pytest.CaptureFixture[str]) -> None:
    with held_back() as lines:
        os.write(2, b"to a file\n")
    assert not lines
    assert capfd.readouterr().err == "to a file\n"
