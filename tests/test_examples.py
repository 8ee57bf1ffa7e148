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
from streaming.server.door.session_key import SessionKey
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
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
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
    saving = {"allow_save": True, "session_key": SessionKey("k" * 32)}
    with (
        same_seed,
        Engine(StubStep(2, context_frames=256), "stub") as engine,
        serving(engine, keeper, **saving) as live,
    ):
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
    """The file is the server's words to the sample, and no silence: a header that was left in, or a piece that was
    lost, is heard as a click.
    """
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
    """An example that failed wrote an empty file, or waited for ever."""
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


def test_the_example_of_takes_has_three_and_the_conversation_goes_on(
    server: LiveServer, said: NDArray[np.int16], tmp_path: Path
) -> None:
    """Pins takes that are the same, a first one that is not the one kept, and a saved conversation that begins anew."""
    folder = tmp_path / "talk"
    takes = []
    for turn in (1, 4):
        done = run_example("three_takes.py", PROMPT, folder, server.url, token=TOKEN)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Three takes of turn {turn} are in {folder}; the conversation is in ")
        takes += [samples(folder / f"take-{number}.wav") for number in (1, 2, 3)]
    assert np.array_equal(takes[0], said)
    assert len({take.tobytes() for take in takes}) == 6
    assert (folder / "talk.session").stat().st_mode & 0o077 == 0, "it holds a voice"


def test_the_example_of_takes_ends_with_a_sentence(server: LiveServer, tmp_path: Path) -> None:
    """Pins tracebacks for what a newcomer gets wrong, and half a file."""
    folder, damaged = tmp_path / "talk", tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "talk.session").write_bytes(bytes(1000))
    silent = tmp_path / "silent.wav"
    with wave.open(str(silent), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))
    for source, target, url, token, words in (
        (tmp_path / "none.wav", folder, server.url, TOKEN, "none.wav"),
        (PROMPT, PROMPT, server.url, TOKEN, "exists"),  # no folder
        (PROMPT, folder, server.url, None, "token"),
        (silent, folder, server.url, TOKEN, "no audio"),
        (PROMPT, damaged, server.url, TOKEN, "bad_snapshot"),
        (PROMPT, folder, "ws://127.0.0.1:9", TOKEN, "127.0.0.1:9"),
    ):
        done = run_example("three_takes.py", source, target, url, token=token)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert words in done.stderr
        assert not list(folder.glob("*.wav"))
    assert "three_takes.py IN FOLDER [URL]" in run_example("three_takes.py").stderr


@pytest.mark.parametrize("takes", [0, 3])
def test_the_example_of_takes_says_what_the_server_does_not_do(takes: int, tmp_path: Path) -> None:
    """Pins a wait for takes that never come."""
    with Engine(StubStep(1, context_frames=256), "stub") as engine, serving(engine, takes=takes) as live:
        done = run_example("three_takes.py", PROMPT, tmp_path, live.url)
    if takes:
        assert (done.returncode, done.stderr) == (0, "")
        assert "; this server saves no conversations." in done.stdout
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert "`--takes 3`" in done.stderr
