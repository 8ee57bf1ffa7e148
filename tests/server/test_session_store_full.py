"""The session store on a disk that is full: a small file system in memory, which only root can mount."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.client.client import ContinuationClient
from streaming.server import session_store
from streaming.server.session_store import SessionMovingError, SessionStore, StoreError
from tests.server.live_server import PATIENCE_S, run
from tests.server.test_server_death import STEP_S, STUB, Person, process, started, voice

NAME = "n" * 64


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    mount = ("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path))
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user cannot mount a file system")
    yield tmp_path
    subprocess.run(("umount", "--lazy", str(tmp_path)), check=True)


def fill(disk: Path, but_bytes: int) -> None:
    """Leave so much of the disk free."""
    found = os.statvfs(disk)
    (disk / f"{found.f_bavail} blocks").write_bytes(bytes(found.f_bavail * found.f_frsize - but_bytes))


def files(disk: Path, folder: str) -> list[str]:
    return [path.name for path in (disk / folder).iterdir()]


@pytest.mark.parametrize("free", [0, 16_384], ids=["full", "room for a part"])
def test_a_server_that_is_told_to_stop_finishes_the_turn_where_the_store_is_full(
    small: Path, free: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pins a conversation that is cut, and half of one that is taken for a whole one."""
    said = voice(25)

    async def talk(server: subprocess.Popen[str], url: str) -> None:
        async with ContinuationClient.connect(url, started()) as session:
            person = Person(session)
            await person.say(said)
            await person.until(frames=7)
            fill(small, free)
            server.send_signal(signal.SIGTERM)
            await person.until()
            assert person.turn(1) == said.tobytes()
            assert not person.restored
        assert await asyncio.to_thread(server.wait, PATIENCE_S) == 0

    with process(*STUB, str(small), STEP_S, "echo") as (server, url):
        run(talk(server, url))
    assert "could not be put into the session store: the session store failed: No space left on device" in (
        capfd.readouterr().err
    )
    assert files(small, "sessions") == []


def test_on_a_full_disk_nobody_is_taken_for_dead_and_the_turn_before_is_kept(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins a living server whose sessions others go on with, and a turn that goes because the next has no room."""
    monkeypatch.setattr(session_store, "DEAD_S", 0.3)

    async def test() -> None:
        living = SessionStore(str(small), None)
        await living.beat()
        await living.put_turn(NAME, b"first" * 1000)
        fill(small, 8192)
        with pytest.raises(StoreError, match="No space left on device"):
            await living.put_turn(NAME, b"second" * 10_000)
        fill(small, 0)
        other = SessionStore(str(small), None)  # one can be started, too
        assert "is full" in caplog.text
        for _ in range(5):
            await living.beat()
            with pytest.raises(SessionMovingError):
                await other.take(NAME)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        found = await other.take(NAME)
        assert found is not None and (found.data, found.owner) == (b"first" * 1000, living.mark)
        assert files(small, "turns") == [f"{NAME}.{living.mark}"]
        await other.delete(NAME)
        assert files(small, "turns") == [f"{NAME}.{other.mark}"] and files(small, "claims") == []

    run(test())
