"""The examples as a newcomer runs them, against a server whose words are known."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol.messages import SessionStart
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, client, run, serving

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKEN = "a-token-of-24-characters"  # noqa: S105
PROMPT = EXAMPLES / "prompt.wav"


@functools.cache
def _node() -> list[str] | None:
    """A Node that has WebSocket: from 22 on as it is, before that behind a flag that 20.10 has."""
    node = shutil.which("node")
    if node is None:
        return None
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip("v\n")
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < (20, 10):
        return None
    return [node] if major >= 22 else [node, "--experimental-websocket", "--no-warnings"]


def command(example: str) -> list[str]:
    if example.endswith(".py"):
        return [sys.executable, str(EXAMPLES / example)]
    node = _node()
    if node is None:
        pytest.skip("no Node with WebSocket: 22 or newer, or 20.10 or newer behind its flag")
    return [*node, str(EXAMPLES / example)]


def run_example(example: str, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMING_")}
    return subprocess.run(
        [*command(example), *map(str, arguments)],
        env=environment | ({} if token is None else {"STREAMING_TOKEN": token}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def samples(path: Path) -> NDArray[np.int16]:
    with wave.open(str(path)) as file:
        assert file.getparams()[:3] == (1, 2, 24_000)
        assert path.stat().st_size == 44 + 2 * file.getnframes()
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    same_seed = mock.patch("streaming.server.driver.secrets.randbits", return_value=7)
    with same_seed, Engine(StubStep(2, context_frames=256), "stub") as engine, serving(engine, keeper) as live:
        yield live


@pytest.fixture(scope="module")
def said(server: LiveServer) -> NDArray[np.int16]:
    """What the server says to the prompt when it is asked by other means."""

    async def ask() -> NDArray[np.int16]:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        async with client(server.url, SessionStart(pace="fast", max_seconds=5), additional_headers=bearer) as session:
            await session.hear(samples(PROMPT), piece=48_000)
            await session.speak()
            return session.spoken()

    return run(ask())


@pytest.mark.parametrize("example", ["continue_file.py", "continue_file.mjs"])
def test_an_example_keeps_what_the_server_said(
    example: str, server: LiveServer, said: NDArray[np.int16], tmp_path: Path
) -> None:
    """To the sample, and it is no silence: a header that was left in, or a piece that was lost, is heard as a click."""
    target = tmp_path / "out.wav"
    done = run_example(example, PROMPT, target, server.url, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    spoken = samples(target)
    assert len(spoken) == 63 * FRAME
    assert spoken.any()
    assert np.array_equal(spoken, said)


@pytest.mark.parametrize("example", ["continue_file.py", "continue_file.mjs"])
def test_an_example_that_fails_says_so(example: str, server: LiveServer, tmp_path: Path) -> None:
    """It wrote an empty file, or waited for ever."""
    target = tmp_path / "out.wav"
    silent = tmp_path / "silent.wav"
    with wave.open(str(silent), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
    rubbish = tmp_path / "rubbish.wav"
    rubbish.write_bytes(b"rubbish" * 20)
    for source, url, token in (
        (tmp_path / "none.wav", server.url, TOKEN),  # nothing there
        (rubbish, server.url, TOKEN),  # no WAV file
        (PROMPT, server.url, None),  # not let in
        (silent, server.url, TOKEN),  # nothing to continue
        (PROMPT, "ws://127.0.0.1:9/v1/continue", TOKEN),  # nobody there
    ):
        done = run_example(example, source, target, url, token=token)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not target.exists()
    assert "`python server.py`" in done.stderr, "nobody was there"
    used = run_example(example)
    assert used.returncode == 1
    assert f"{example} IN.wav OUT.wav [URL]" in used.stderr


@pytest.mark.parametrize("example", ["continue_file.py", "continue_file.mjs"])
def test_an_example_is_short(example: str) -> None:
    lines = (EXAMPLES / example).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
