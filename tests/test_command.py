"""What all commands share."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios

import pytest

from streaming.command import complain

LINE = "client.py: nothing answers at ws://nowhere.test:8765/v1/continue (Name or service not known); is it running?"


def test_a_complaint_on_a_terminal_is_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal broke the word "service" in two. An address stays whole, so that it can be copied."""
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        complain(LINE)
        complain("client.py: one\nclient.py: two")
        shown = ""
        while shown.count("\n") < 4:
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    lines = shown.split("\r\n")
    assert lines[0].endswith("(Name or") and lines[1] == "service not known); is it running?"
    assert lines[2:] == ["client.py: one", "client.py: two", ""]


def test_a_complaint_that_is_not_for_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    complain(LINE)
    assert capsys.readouterr().err == LINE + "\n"
