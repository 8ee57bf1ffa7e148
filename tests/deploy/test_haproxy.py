"""`deploy/haproxy/haproxy.cfg` before two server processes that share a session store: servers come and go, and the
conversations stay. Skips itself where there is no HAProxy.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from streaming.protocol.messages import PATH
from tests.deploy.talk import Talk
from tests.server.live_server import run

ROOT = Path(__file__).parents[2]
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
CONFIG = (ROOT / "deploy/haproxy/haproxy.cfg").read_text(encoding="utf-8")
PATIENCE_S = 60.0
SESSIONS = 6

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="no HAProxy: the Debian package haproxy")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(port: int) -> bool:
    """Whether a server, or one behind the balancer, would take a newcomer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready(port):
        assert time.monotonic() < deadline, f"nothing on port {port} is ready"
        time.sleep(0.05)


class Fleet:
    """Two servers on ports of their own, and the balancer on `port`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.port, *self.ports = (free_port() for _ in range(3))
        self._servers = [self._start(port) for port in self.ports]
        for port in self.ports:
            wait_until_ready(port)
        config = CONFIG
        for given, own in zip((8764, 8765, 8766), (self.port, *self.ports), strict=True):
            assert len(re.findall(f":{given}\\b", config)) == 1
            config = re.sub(f":{given}\\b", f":{own}", config)
        path = folder / "haproxy.cfg"
        path.write_text(config.replace("bind :", "bind 127.0.0.1:"), encoding="utf-8")
        assert HAPROXY is not None
        stack.callback(end, subprocess.Popen([HAPROXY, "-q", "-f", str(path)]))
        wait_until_ready(self.port)

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        flags = ["--port", str(port), "--max-sessions", "8", "--session-store", str(self._folder / "store")]
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.deploy.stub_server",
                *flags,
                "--drain-seconds",
                "20",
                "--trusted-proxy",
                "127.0.0.1",
            ],
            cwd=ROOT,
            env=os.environ | {"STREAMING_SESSION_KEY": "k" * 32},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self._stack.callback(end, server)
        return server

    def replace(self, which: int) -> None:
        """Tell a server to stop, and start another in its place once it has."""
        server, port = self._servers[which], self.ports[which]
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        self._servers[which] = self._start(port)
        wait_until_ready(port)
        time.sleep(1.2)  # until the balancer has seen it


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(folder, stack)


def test_a_rolling_redeploy_behind_haproxy_cuts_no_conversation(tmp_path: Path) -> None:
    """One server after the other is replaced under load. Pins a balancer that sends who comes back to the one that
    leaves, and any sample that is lost or said twice on the way.
    """

    async def scenario(behind: Fleet) -> None:
        url = f"ws://127.0.0.1:{behind.port}{PATH}"
        done = asyncio.Event()
        talks = [Talk() for _ in range(SESSIONS)]
        talking = asyncio.gather(*(talk.run(url, done, 10**6, "realtime") for talk in talks))
        await asyncio.sleep(1.0)
        try:
            for which in (0, 1):
                await asyncio.to_thread(behind.replace, which)
        finally:
            done.set()
        await talking
        stayed = Talk()
        await stayed.run(url, asyncio.Event(), max(len(talk.turns) for talk in talks), "fast")
        for talk in talks:
            assert talk.turns == stayed.turns[: len(talk.turns)], "to the sample"
            assert talk.lost == len(talk.away_ms)
            assert talk.lost >= 1, "it was on one of the two, and both were replaced"
        assert stayed.lost == 0

    with fleet(tmp_path) as behind:
        run(scenario(behind), 120)
    assert not list((tmp_path / "store" / "sessions").iterdir()), "what was taken is still there"
