"""The session store in S3, as moto plays it. Skipped without `pip install s3fs "moto[server]"`, which are not among the
development dependencies: s3fs pins a version of fsspec, and moto brings some forty packages.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.client.client import ContinuationClient
from streaming.server import store_files
from streaming.server.session_store import ClaimedEntry, SessionMovingError, SessionStore, StoreError
from tests.server.live_server import LiveServer, run
from tests.server.test_session_store import FRAME, KEY, SPEECH, Roaming, moves_within, server, start

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

SLOW_MACHINE_S = 60.0


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """S3's process, and the variables that lead to it."""
    command = (sys.executable, "-m", "tests.server.s3_process")
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url, key, secret = process.stdout.readline().split()
            variables = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
            yield process, {**variables, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        finally:
            process.kill()


@pytest.fixture
def s3(
    moto: tuple[subprocess.Popen[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    for name, value in moto[1].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store_files, "_CALL_S", SLOW_MACHINE_S)
    monkeypatch.setattr("streaming.server.native.session._PUT_DOWN_S", SLOW_MACHINE_S)
    files = fsspec.get_filesystem_class("s3")
    files.clear_instance_cache()  # which keys they have is found out when they are made
    yield moto[0]
    files.clear_instance_cache()


def test_a_session_goes_on_at_another_server(s3: subprocess.Popen[str]) -> None:
    """Pins a folder that is not there because nothing is in it, and what else an object store does otherwise."""
    moves_within("s3://sessions/moves")


def test_one_of_two_servers_gets_a_session(s3: subprocess.Popen[str]) -> None:
    """Pins a claim that is looked for first and made then."""

    async def test() -> None:
        one, other = (SessionStore("s3://sessions/claims", KEY) for _ in range(2))
        for number in range(10):
            name = f"{number:064x}"
            assert await one.take(name) is None
            await one.put(name, b"session")
            taken = await asyncio.gather(one.take(name), other.take(name), return_exceptions=True)
            assert sorted(type(each).__name__ for each in taken) == ["ClaimedEntry", "SessionMovingError"]
            await one.give_back(name)
            assert isinstance(await other.take(name), ClaimedEntry)
            with pytest.raises(SessionMovingError):
                await one.take(name)
            await other.delete(name)
            await other.forget_turn(name)
            assert await one.take(name) is None

    run(test(), SLOW_MACHINE_S)


def test_a_claim_whose_answer_was_lost_is_its_makers(s3: subprocess.Popen[str]) -> None:
    """Pins a session that nobody gets: the library asked again, and was told that the file is there already."""
    store = SessionStore("s3://sessions/again", None)
    files = store._files._fs
    write = files.pipe_file

    def twice(path: str, data: bytes, **more: str) -> None:
        write(path, data, **more)
        write(path, data, **more)

    files.pipe_file = twice
    try:
        assert store._files.create("claims/a")
    finally:
        del files.pipe_file
    assert not store._files.create("claims/a")


@pytest.mark.parametrize(
    ("url", "variable", "value", "said"),
    [
        ("s3://nosuchbucket/here", "AWS_DEFAULT_REGION", "us-east-1", "bucket does not exist"),
        ("s3://sessions/here", "AWS_ACCESS_KEY_ID", "AKIAWRONG", "Access Key Id"),
        ("s3://sessions/here", "AWS_SECRET_ACCESS_KEY", "wrong", "signature"),
        ("s3://sessions/here", "AWS_ENDPOINT_URL", "http://127.0.0.1:9", "[Cc]onnect|did not answer"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_when_the_server_starts(
    s3: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, url: str, variable: str, value: str, said: str
) -> None:
    """Pins a bucket that is made because its name was mistyped, and keys that are first found wrong at a drain."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreError, match=f"^the session store {url} cannot be used: .*{said}"):
        SessionStore(url, None)


def test_an_endpoint_that_never_answers_does_not_hold_up_the_start(
    s3: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a server that starts for minutes, and says nothing."""
    monkeypatch.setattr(store_files, "_START_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"cannot be used: it did not answer in 0\.5 s"):
            SessionStore("s3://sessions/here", None)


def test_a_store_that_stops_answering_loses_no_session_and_keeps_nothing_stale(
    s3: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a server that hangs with its store, and an entry that is written once its session has long gone on."""

    async def talk(one: LiveServer) -> None:
        async with ContinuationClient.connect(one.url, start("realtime", max_seconds=2)) as session:
            went = Roaming(session)
            await session.send(SPEECH)
            await session.speak()
            await went.until(5 * FRAME)
            monkeypatch.setattr(store_files, "_CALL_S", 0.5)
            s3.send_signal(signal.SIGSTOP)
            one.stop()
            assert await went.until()
            assert len(went.heard()) == 2 * 25 * FRAME and not went.lost

    store = SessionStore("s3://sessions/stops", None)
    try:
        with server(store) as one:
            run(talk(one))
    finally:
        s3.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + SLOW_MACHINE_S
    while any(thread.name == "session store" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = store._files._fs.find("sessions/stops/sessions")
    assert not [path for path in left if not path.rpartition("/")[2].startswith(".")]
