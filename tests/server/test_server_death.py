"""Servers as real processes that are stopped, or killed, in the middle of a conversation: it goes on at another."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import ServerAddress
from streaming.client.resumable_connection import ConnectionRestored
from streaming.errors import ContinuationError
from streaming.protocol.messages import Interrupted, SamplingOptions, SessionStart, TurnDone
from streaming.protocol.opus import opus_available
from tests.server.live_server import PATIENCE_S, run

ROOT = Path(__file__).parents[2]
SPEECH = (np.arange(12 * FRAME) % 251).astype(np.int16)
STUB = (sys.executable, "-m", "tests.server.store_process")
STEP_S = "0.02"


@contextmanager
def process(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its URL."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("listening on "), line
            yield server, line.split()[2]
        finally:
            server.kill()


class Person:
    """A client that goes wherever it is told, and keeps what it heard of each turn."""

    def __init__(self, session: ContinuationClient) -> None:
        self.session = session
        self.heard: dict[int, list[bytes]] = {}
        self.restored: list[ConnectionRestored] = []

    def goes_to(self, url: str) -> None:
        self.session._connection._address = ServerAddress.parse(url, None)

    async def say(self, speech: np.ndarray = SPEECH) -> int:
        await self.session.send(speech)
        return await self.session.speak()

    async def until(self, *, frames: int = 10**9, back: bool = False) -> None:
        """Listen until a turn is done, so many frames of one have come, or the session went back."""
        async for event in self.session.events():
            match event:
                case Audio(turn=turn, pcm=pcm):
                    self.heard.setdefault(turn, []).append(pcm.tobytes())
                    if len(self.heard[turn]) >= frames:
                        return
                case ConnectionRestored():
                    self.restored.append(event)
                    if back:
                        return
                case TurnDone() if not back:
                    return

    def turn(self, number: int) -> bytes:
        return b"".join(self.heard[number])


def started(pace: str = "fast", codec: str = "pcm16") -> SessionStart:
    return SessionStart(
        pace=pace,  # type: ignore[arg-type]
        codecs=(codec,),
        max_seconds=2.0,
        resume=True,
        sampling=SamplingOptions(seed=5),
    )


async def undisturbed(url: str, *speeches: np.ndarray) -> list[bytes]:
    """What the turns of a conversation are that nothing happens to."""
    async with ContinuationClient.connect(url, started()) as session:
        person = Person(session)
        turns = []
        for speech in speeches:
            turns.append(await person.say(speech))
            await person.until()
        return [person.turn(turn) for turn in turns]


def test_a_server_that_is_told_to_stop_hands_a_continuation_over_without_a_lost_or_doubled_sample(
    tmp_path: Path,
) -> None:
    """Pins a rolling restart, with processes, that cuts a conversation in the middle of a word."""

    async def talk(one: subprocess.Popen[str], here: str, there: str) -> None:
        whole = await undisturbed(there, SPEECH, SPEECH)
        async with ContinuationClient.connect(here, started()) as session:
            person = Person(session)
            await person.say()
            await person.until(frames=5)
            person.goes_to(there)
            one.send_signal(signal.SIGTERM)
            await person.until()
            await person.say()
            await person.until()
            assert [person.turn(1), person.turn(2)] == whole
            assert [each.turn for each in person.restored] == [None]
        assert await asyncio.to_thread(one.wait, PATIENCE_S) == 0

    with process(*STUB, str(tmp_path), STEP_S) as (one, here), process(*STUB, str(tmp_path), STEP_S) as (_, there):
        run(talk(one, here, there))


@pytest.mark.parametrize("when", ["speaking", "saying"])
def test_a_session_goes_on_from_its_last_finished_turn_when_its_server_is_killed(tmp_path: Path, when: str) -> None:
    """Pins a crash that ends every conversation, and one after which a client is not told what is lost."""

    async def talk(one: subprocess.Popen[str], here: str, there: str) -> None:
        whole = await undisturbed(there, SPEECH, SPEECH[:FRAME], SPEECH)
        async with ContinuationClient.connect(here, started()) as session:
            person = Person(session)
            await person.say()
            await person.until()
            await kept(tmp_path, 1)
            await session.send(SPEECH[: 3 * FRAME])
            if when == "speaking":
                await session.speak()
                await person.until(frames=4)
            person.goes_to(there)
            one.kill()
            await person.until(back=True)
            assert [each.turn for each in person.restored] == [2] and session.turn == 2
            person.heard.pop(2, None)
            for speech in (SPEECH[:FRAME], SPEECH):
                await person.say(speech)
                await person.until()
            assert [person.turn(turn) for turn in (1, 2, 3)] == whole

    with process(*STUB, str(tmp_path), STEP_S) as (one, here), process(*STUB, str(tmp_path), STEP_S) as (_, there):
        run(talk(one, here, there))


def voice(frames: int) -> NDArray[np.int16]:
    """Something like a voice, whose pitch glides."""
    at = np.arange(frames * FRAME) / SAMPLE_RATE
    phase = 2 * np.pi * (120 * at + 8 * np.sin(4 * at))
    return sum(2_500 * np.sin(k * phase) / k for k in range(1, 12)).astype(np.int16)  # type: ignore[union-attr]


def off(heard: bytes, said: NDArray[np.int16]) -> NDArray[np.float64]:
    """How far what was heard is from what was said in each 20 ms, as a share of what was said."""
    difference = np.frombuffer(heard, np.int16).astype(float) - said
    return np.sqrt(np.mean(difference.reshape(-1, 480) ** 2, 1) / np.mean(said.reshape(-1, 480).astype(float) ** 2, 1))


@pytest.mark.skipif(not opus_available(), reason="no libopus")
@pytest.mark.parametrize("when", ["saying", "speaking", "killed"])
def test_opus_goes_on_at_another_server_without_a_click(tmp_path: Path, when: str) -> None:
    """Pins a decoder that has not the stream's beginning, and an encoder whose rest is lost or said twice."""
    said = voice(25)  # as long as an echo is

    async def talk(one: subprocess.Popen[str], here: str, there: str) -> None:
        async with ContinuationClient.connect(there, started(codec="opus")) as session:
            stayed = Person(session)
            await stayed.say(said)
            await stayed.until()
            assert session.started.codec == "opus"
        async with ContinuationClient.connect(here, started(codec="opus")) as session:
            went = Person(session)
            went.goes_to(there)
            if when == "saying":
                await session.send(said[: 9 * FRAME + 500])
                one.send_signal(signal.SIGTERM)
                await session.send(said[9 * FRAME + 500 :])
                await session.speak()
            else:
                await went.say(said)
                await went.until(frames=7)
                if when == "speaking":
                    one.send_signal(signal.SIGTERM)
            await went.until()
            if when == "killed":
                await kept(tmp_path, 1)
                await session.send(said[: 4 * FRAME])
                await session.speak()
                await went.until(frames=3)
                one.kill()
                await went.until(back=True)
                assert session.turn == 2
                went.heard.pop(2, None)
                await session.send(said)
                await session.speak()
                await went.until()
            assert len(went.restored) == 1
        for turn in went.heard:
            assert len(went.turn(turn)) == len(stayed.turn(1)) == 2 * len(said)
            assert off(went.turn(turn), said).max() < 1.2 * off(stayed.turn(1), said).max()

    with (
        process(*STUB, str(tmp_path), STEP_S, "echo") as (one, here),
        process(*STUB, str(tmp_path), STEP_S, "echo") as (_, there),
    ):
        run(talk(one, here, there))


def test_an_interrupted_turn_is_finished_and_a_second_death_is_survived(tmp_path: Path) -> None:
    """Pins a turn that is gone on from as if all of it had been heard, and books that count from two beginnings."""

    async def one_turn(person: Person) -> None:
        await person.say()
        await person.until(frames=6)
        await person.session.interrupt(person.session.turn, 3 * FRAME)
        async for event in person.session.events():
            if isinstance(event, Interrupted):
                return

    async def reference(url: str) -> bytes:
        async with ContinuationClient.connect(url, started()) as session:
            person = Person(session)
            await one_turn(person)
            await person.say()
            await person.until()
            return person.turn(2)

    async def talk(servers: list[subprocess.Popen[str]], urls: list[str]) -> None:
        whole = await reference(urls[2])
        async with ContinuationClient.connect(urls[0], started()) as session:
            person = Person(session)
            await one_turn(person)
            await kept(tmp_path, 1)
            for place in (1, 2):
                before = kept_now(tmp_path)
                person.goes_to(urls[place])
                servers[place - 1].kill()
                await person.until(back=True)
                await kept(tmp_path, 1, before)
                await session.send(SPEECH[:700])  # which the first of them takes with it
            assert [each.turn for each in person.restored] == [2, 2]
            person.heard.pop(2, None)
            await session.send(SPEECH[700:])
            await session.speak()
            await person.until()
            assert person.turn(2) == whole

    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(process(*STUB, str(tmp_path), STEP_S)) for _ in range(3)]
        run(talk([server for server, _ in found], [url for _, url in found]), 2 * PATIENCE_S)


def test_what_was_not_heard_of_the_last_finished_turn_comes_from_the_next_server(tmp_path: Path) -> None:
    """Pins a client that waits for the rest of a turn which its server was done with, and which nobody says."""

    async def talk(one: subprocess.Popen[str], here: str, there: str) -> None:
        whole = await undisturbed(there, SPEECH, SPEECH)
        async with ContinuationClient.connect(here, started()) as session:
            person = Person(session)
            await person.say()
            await person.until(frames=4)
            socket = session._connection._socket
            socket.transport.pause_reading()
            person.goes_to(there)
            await kept(tmp_path, 1)
            one.kill()
            socket.transport.abort()  # and with it what is on its way
            await person.until()
            assert [each.turn for each in person.restored] == [2]
            await person.say()
            await person.until()
            assert [person.turn(1), person.turn(2)] == whole

    with process(*STUB, str(tmp_path), STEP_S) as (one, here), process(*STUB, str(tmp_path), STEP_S) as (_, there):
        run(talk(one, here, there))


def test_a_session_without_a_finished_turn_is_over_when_its_server_is_killed(tmp_path: Path) -> None:
    """Pins a client that tries to come back for as long as it may, to what cannot come back."""

    async def talk(one: subprocess.Popen[str], here: str, there: str) -> None:
        async with ContinuationClient.connect(here, started()) as session:
            person = Person(session)
            await session.send(SPEECH)
            person.goes_to(there)
            while not list((tmp_path / "owners").iterdir()):  # until the server has said that it lives
                await asyncio.sleep(0.05)
            began = time.monotonic()
            one.kill()
            with pytest.raises(ContinuationError, match="session_expired"):
                await person.until()
            assert time.monotonic() - began < 35

    with process(*STUB, str(tmp_path), STEP_S) as (one, here), process(*STUB, str(tmp_path), STEP_S) as (_, there):
        run(talk(one, here, there))


def kept_now(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in (folder / "turns").iterdir() if path.stat().st_size}


async def kept(folder: Path, count: int, but: set[tuple[str, int]] = frozenset()) -> None:  # type: ignore[assignment]
    """Wait until so many finished turns are in the store."""
    while len(kept_now(folder) - but) < count:
        await asyncio.sleep(0.05)
