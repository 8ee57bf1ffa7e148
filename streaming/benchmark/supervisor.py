"""`python -m streaming.benchmark.supervisor SECONDS COMMAND...`: a command that ends in time, and with its starter.

The starter holds the other end of standard input: when the input ends, the starter is done or dead. All that the
command started ends with it, whatever session it is in: on Linux the orphans of this process's children become its
children (prctl(2), PR_SET_CHILD_SUBREAPER), and it leaves none. A GPU whose last measurement still runs is no use to
the next.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

TIMED_OUT, ABANDONED = 124, 125
"""Exit statuses: the time was over (as of timeout(1)), or the starter had gone."""
_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # linux/prctl.h
_LOOK_S = 0.05
_GRACE_S = 5.0
"""The time from SIGTERM to SIGKILL."""
_ROOT = Path(__file__).resolve().parents[2]


def run(
    command: Sequence[str], limit_s: float, output: IO[bytes], environment: Mapping[str, str] | None = None
) -> int | None:
    """Run a command under a supervisor, from the repository's root. Return its exit status, None if it took too long.

    output: what it says goes there as it is said, whatever ends it.
    """
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "streaming.benchmark.supervisor", f"{limit_s:g}", *command],
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    try:
        status = supervisor.wait()
    finally:
        supervisor.stdin.close()
        supervisor.wait()
    return None if status == TIMED_OUT else status


def main(arguments: list[str]) -> int:
    limit_s, command = float(arguments[0]), arguments[1:]
    on_linux = sys.platform == "linux"
    control = ctypes.CDLL(None).prctl if on_linux else None

    def tied() -> None:  # in the child: should this process be killed itself
        if control is not None:
            control(_SET_DEATH_SIGNAL, signal.SIGKILL)

    if control is not None:
        control(_SET_SUBREAPER, 1)
    until = time.monotonic() + limit_s
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=tied)
    why = None
    while child.poll() is None:
        if time.monotonic() > until:
            why = TIMED_OUT
        elif select.select([sys.stdin], [], [], _LOOK_S)[0] and not os.read(0, 4096):
            why = ABANDONED
        if why is not None:
            _end(child)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if on_linux:
        _end_orphans()
    return child.returncode if why is None else why


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and see to it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _end_orphans() -> None:
    """Kill this process's children until there are none: each one's own become this one's as it dies."""
    while found := _children():
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _children() -> list[int]:
    """Return the processes whose parent is this one (proc(5): the fourth field of `stat`)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has ended meanwhile
                continue
            if parent == os.getpid():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
