"""A measurement that outlives whoever started it holds the GPU, and spoils the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streaming.benchmark import supervisor

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
FAMILY = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
same = subprocess.Popen(sleep)
apart = subprocess.Popen(sleep, start_new_session=True)  # as a server of a benchmark's own is
print(same.pid, apart.pid, flush=True)
time.sleep({seconds})
"""
STARTER = """
import sys
from pathlib import Path
from streaming.benchmark import supervisor
with Path(sys.argv[1]).open("ab") as said:
    supervisor.run([sys.executable, "-c", sys.argv[2]], 600.0, said)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes as Linux has them")


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(said: Path) -> list[int]:
    """The processes that the family has told of."""
    deadline = time.monotonic() + PATIENCE_S
    while len(told := said.read_text().split()) < 2:
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.05)
    return [int(word) for word in told]


def _assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(map(_alive, processes)):
        assert time.monotonic() < deadline, f"{[p for p in processes if _alive(p)]} still run"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_all_that_was_started_ends_with_a_starter_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """`results` was killed, and the server of its benchmark went on holding the GPU."""
    said = tmp_path / "said"
    said.touch()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(said), FAMILY.format(seconds=600)], cwd=ROOT)
    family = _wait_for(said)
    assert all(map(_alive, family))
    os.kill(starter.pid, number)
    starter.wait(PATIENCE_S)
    _assert_gone(family)


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with said.open("ab") as output:
        assert supervisor.run([sys.executable, "-c", FAMILY.format(seconds=600)], 3.0, output) is None
    _assert_gone(_wait_for(said))


def test_what_ends_by_itself_leaves_nothing_and_tells_its_status(tmp_path: Path) -> None:
    """A benchmark that broke left its server behind."""
    said = tmp_path / "said"
    with said.open("ab") as output:
        assert supervisor.run([sys.executable, "-c", FAMILY.format(seconds=0) + "sys.exit(3)"], 60.0, output) == 3
    _assert_gone(_wait_for(said))


def test_one_that_does_not_listen_to_reason_is_killed(tmp_path: Path) -> None:
    """A process that waits for a GPU does not hear SIGTERM."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    said = tmp_path / "said"
    with said.open("ab") as output:
        assert supervisor.run([sys.executable, "-c", deaf], 2.0, output) is None
    assert said.read_text() == "deaf\n"
