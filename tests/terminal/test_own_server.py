"""The client's own server, played by small scripts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.errors import ContinuationError
from streaming.terminal.own_server import ServerLine, ServerStartError, own_server, server_command

LISTENS = "import os, time; print('pid', os.getpid()); print('listening on ws://127.0.0.1:1/v1/continue', flush=True);"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_url_is_the_one_that_it_prints() -> None:
    async def test() -> None:
        async with own_server(python(LISTENS + "time.sleep(60)")) as url:
            assert url == "ws://127.0.0.1:1/v1/continue"

    asyncio.run(test())


@pytest.mark.parametrize(
    ("habit", "grace_s"),
    [("", 5.0), ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);", 0.1)],
    ids=["polite", "deaf to SIGTERM"],
)
def test_it_ends_with_the_client_even_when_that_fails(tmp_path: Path, habit: str, grace_s: float) -> None:
    async def test() -> int:
        code = habit + f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));" + LISTENS
        with pytest.raises(ZeroDivisionError):
            async with own_server(python(code + "time.sleep(60)"), grace_s=grace_s):
                raise ZeroDivisionError
        return int((tmp_path / "pid").read_text())

    assert not alive(asyncio.run(test()))


def test_a_server_that_says_how_far_it_is_may_take_its_time() -> None:
    """Pins a download of 32 GB that was ended after a quarter of an hour."""
    code = "import sys, time\nfor n in range(8): print(n, 'GB', file=sys.stderr, flush=True); time.sleep(0.5)\n"

    async def test() -> None:
        async with own_server(python(code + LISTENS + "time.sleep(60)"), timeout_s=3.0) as url:
            assert url.startswith("ws://")

    asyncio.run(test())


def test_a_server_that_ends_tells_why() -> None:
    async def test() -> None:
        said: list[str] = []
        with pytest.raises(ServerStartError, match=r"(?s)ended with status 3.*no such model: x") as info:
            async with own_server(
                python("import sys; print('no such model: x', file=sys.stderr); sys.exit(3)"), said=said.append
            ):
                pass
        assert said == ["no such model: x"]
        assert isinstance(info.value, ContinuationError)

    asyncio.run(test())


def test_a_server_that_never_listens_is_ended() -> None:
    async def test() -> None:
        with pytest.raises(ServerStartError, match=r"said nothing for 0\.2 s"):
            async with own_server(python("import time; time.sleep(60)"), timeout_s=0.2):
                pass

    asyncio.run(test())


def test_a_server_that_says_a_lot_is_not_stopped_by_a_full_pipe() -> None:
    """A server whose standard error nobody reads hangs after 64 KiB of log."""
    code = LISTENS + (
        "import sys\nfor n in range(20000): print('line', n, file=sys.stderr)\n"
        "print('x' * 200_000)\nopen(sys.argv[1], 'w').close(); time.sleep(60)"
    )

    async def test(done: Path) -> None:
        async with own_server([*python(code), str(done)]):
            while not done.exists():
                await asyncio.sleep(0.01)

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(asyncio.wait_for(test(Path(directory) / "done"), 20))


def test_its_end_in_mid_session_is_told_with_the_error() -> None:
    async def test() -> None:
        with pytest.raises(
            ContinuationError, match=r"(?s)connection broke; the server ended with status 1.*MemoryError"
        ):
            async with own_server(python(LISTENS + "raise MemoryError")):
                raise ContinuationError("the connection broke")

    asyncio.run(test())


def test_the_server_is_that_of_this_package_wherever_it_is_started(tmp_path: Path) -> None:
    """The client started a file that an installed package has not; and another package of this name may lie where it is
    started.
    """
    (tmp_path / "streaming").mkdir()
    (tmp_path / "streaming" / "__init__.py").write_text("raise SystemExit('another package')")
    command = [*server_command("demo", "mimi"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("usage: streaming-server"), done.stderr


@pytest.mark.parametrize(
    ("line", "message", "share", "warning"),
    [
        ("2026-01-02T03:04:05.678Z INFO loading PyTorch logger=streaming.server", "loading PyTorch", None, False),
        ("2026-01-02T03:04:05.678Z INFO x/y: 500 MB of 2 GB downloaded logger=a.b", None, 0.25, False),
        ("2026-01-02T03:04:05.678Z INFO x/y: 3 GB of 2 GB downloaded", None, 1.0, False),
        ("2026-01-02T03:04:05.678Z WARNING it will stutter logger=a.b", "it will stutter", None, True),
        ("demo: 6 codebooks, 13.6 s of context", "demo: 6 codebooks, 13.6 s of context", None, False),
    ],
)
def test_what_a_server_says_while_it_starts(line: str, message: str | None, share: float | None, warning: bool) -> None:
    """The lines of the server's log were shown as they are, each a line and a half of a terminal."""
    said = ServerLine.parse(line)
    assert (said.share, said.warning) == (share, warning)
    assert message is None or said.message == message
