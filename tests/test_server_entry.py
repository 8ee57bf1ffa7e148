"""`server.py` as a process: its announcement, its signals, its exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.command import STARTING
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.start import page_of
from tests.deploy.stub_server import STUBBED
from tests.engine.stub_step import StubStep
from tests.server.live_server import client, run, run_server_py, serving

ROOT = Path(__file__).parents[1]
SPEECH = np.zeros(2 * FRAME, np.int16)
SEEDED = messages.SamplingOptions(seed=1)
LOSES_ITS_DEVICE = """
import sys

from streaming.engine.engine import Engine
from tests.deploy.stub_server import main
from tests.engine.stub_step import StubStep

step = StubStep(1)
step.fatal, step.failure = True, RuntimeError("the device fell off the bus")
sys.exit(main(lambda *_, **__: Engine(step, "stub")))
"""
"""`server.py` over a step that is the last one."""
HANGS = """
import sys
import threading

from streaming.engine.engine import Engine
from tests.deploy.stub_server import main
from tests.engine.stub_step import StubStep

step = StubStep(1, delay_s=threading.Event().wait)
sys.exit(main(lambda *_, **__: Engine(step, "stub", hung_s=0.5)))
"""
"""`server.py` over a step that never returns."""


@contextmanager
def _server(
    *flags: str, program: tuple[str, ...] = ("server.py",), environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it has said where it listens. program: what Python runs; environment: variables besides this
    process' own.
    """
    process = subprocess.Popen(
        [sys.executable, *program, *flags],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on ws://127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_terminated_server_finishes_its_turns_and_its_port_can_be_had_at_once() -> None:
    """The server cut its turns off, left the address in use, or aborted at its exit because a thread waited for the end
    of standard input. The model is the demo, the step the real one, and the signal a real one.
    """

    async def scenario(url: str, process: subprocess.Popen[str]) -> None:
        async with client(url, SessionStart(pace="fast", max_seconds=2)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            process.send_signal(signal.SIGTERM)
            done = await session.expect(messages.TurnDone)
            assert done.reason in ("max_seconds", "end")  # the demo ends some turns itself
            assert len(session.spoken()) == done.samples
            assert (await session.expect(messages.SessionClosed)).reason == "stopping"

    with _server("--port", "0", "--until-eof") as (process, url):
        run(scenario(url, process))
        assert process.wait(60) == 0
        port = str(urlsplit(url).port)
        with _server("--port", port, environment=STUBBED) as (again, same):
            assert same == url
            again.send_signal(signal.SIGINT)
            again.send_signal(signal.SIGINT)
            assert again.wait(60) == 0


def test_two_servers_with_a_share_each_speak_at_once_on_one_machine(
    server_says: Callable[..., tuple[int | str | None, str]],
) -> None:
    """docs/gpu.md says how to start them. Both have their own weights and slots, and say the same. A share that is too
    small is told before anything is made.
    """

    async def turns(url: str) -> tuple[list[tuple[str, int]], NDArray[np.int16]]:
        async with client(url, SessionStart(pace="fast", max_seconds=0.4, sampling=SEEDED)) as session:
            done = []
            for turn in (1, 2, 3):  # the demo may end one of them at once
                await session.hear(SPEECH, turn)
                done.append(await session.speak(turn))
            said = np.concatenate([session.spoken(turn) for turn in (1, 2, 3)])
            assert len(said) == sum(each.samples for each in done)
            return [(each.reason, each.samples) for each in done], said

    async def both(*urls: str) -> list[tuple[list[tuple[str, int]], NDArray[np.int16]]]:
        return await asyncio.gather(*(turns(url) for url in urls))

    flags = ("--port", "0", "--device", "cpu", "--memory-share", "0.45", "--max-sessions", "2")
    with _server(*flags) as (_, one), _server(*flags) as (_, other):
        (done, said), (other_done, other_said) = run(both(one, other))
    assert done == other_done
    assert said.any()
    assert np.array_equal(said, other_said)
    status, told = server_says(*flags[2:4], "--memory-share", "0.001")
    assert status == 1
    assert "free: one alone needs" in told


def test_a_server_whose_engine_has_failed_ends_with_status_1() -> None:
    """With status 0 a supervisor took the loss of the GPU for a wish to stop, and did not start the server again."""

    async def scenario(url: str) -> None:
        async with client(url, SessionStart(pace="fast")) as session:
            await session.hear(SPEECH)
            assert (await session.expect(messages.Error)).code == "engine_stopped"

    with _server("--port", "0", "--log-format", "json", program=("-c", LOSES_ITS_DEVICE)) as (process, url):
        run(scenario(url))
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "the device fell off the bus" in process.stderr.read()


def test_a_server_whose_step_hangs_says_so_and_ends() -> None:
    """The step's thread cannot be ended, and Python waits at its exit for a device that does not answer."""

    async def scenario(url: str) -> None:
        async with client(url, SessionStart(pace="fast")) as session:
            await session.hear(SPEECH)
            assert (await session.expect(messages.Error)).code == "engine_stopped"

    with _server("--port", "0", program=("-c", HANGS)) as (process, url):
        run(scenario(url))
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "a step has not returned for 0.5 s" in process.stderr.read()


def test_a_port_that_is_taken_is_said_so_before_a_model_is_loaded() -> None:
    """The port was tried after the minutes that an 8B model takes to load."""
    with Engine(StubStep(1)) as engine, serving(engine) as server:
        done = run_server_py("--port", str(urlsplit(server.url).port), "--model", "/nowhere")
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "take another port with --port N, or any free one with --port 0" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "/nowhere"], "--model demo"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--context-tokens", "3"], "14 is the least that works"),
        (["--context-tokens", "8"], "14 is the least that works"),
        (["--context-tokens", "9999999999"], "one alone needs"),
        (["--max-sessions", "100000"], "100,000 sessions with 1,024 tokens of context need"),
        (["--max-sessions", "999999999999"], "fit"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_says_what_to_do(
    flags: list[str], said: str, server_says: Callable[..., tuple[int | str | None, str]]
) -> None:
    """The line was a traceback of forty lines, the last of them about an allocator."""
    status, told = server_says(*flags)
    assert status == 1
    starting, line = told.splitlines()
    assert starting == STARTING and said in line


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("ws://127.0.0.1:8765/v1/continue", "http://127.0.0.1:8765/"),
        ("wss://[::1]:1/v1/continue", "https://[::1]:1/"),
        ("ws://0.0.0.0:80/v1/continue", "http://localhost:80/"),
        ("wss://[::]:443/v1/continue", "https://localhost:443/"),
    ],
)
def test_the_page_is_where_a_browser_can_go(url: str, page: str) -> None:
    assert page_of(url) == page


def test_a_person_is_told_of_the_page_and_a_program_of_the_address() -> None:
    """The last thing that the server said was an address that no browser opens."""
    with _server("--port", "0", environment=STUBBED) as (process, url):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read() == "", "what programs read is one line"
        assert f"\nOpen {page_of(url)}\n" in process.stderr.read()
