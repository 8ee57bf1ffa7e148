"""A network that drops everything without a word, and what must not be taken for one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streaming.client import resumable_connection
from streaming.client.client import ContinuationClient
from streaming.server import connection
from streaming.server.session_store import SessionStore
from tests.server.cut_proxy import cut_proxy
from tests.server.live_server import LiveServer, run
from tests.server.test_server_death import STEP_S, STUB, Person, process, started
from tests.server.test_session_store import FRAME, KEY, SPEECH, Roaming, server, start, whole

SILENCE_S = 3.0
"""Less than there is, for tests that wait for it; more than a busy machine takes."""


@contextmanager
def impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_RETURNS_AFTER_S", SILENCE_S)
        patch.setattr(resumable_connection, "SILENCE_S", SILENCE_S)
        yield


@pytest.mark.parametrize("when", ["listening", "speaking"])
def test_both_sides_soon_notice_that_the_network_is_gone(when: str) -> None:
    """Pins 20 s in which nobody says a word, and 20 more in which no other server may have the session."""

    async def talk(one: LiveServer, other: LiveServer) -> None:
        stayed = await whole(other.url)
        async with (
            cut_proxy(one.url) as proxy,
            ContinuationClient.connect(proxy.url, start("realtime")) as session,
        ):
            went = Roaming(session)
            went.goes_to(other.url)
            await session.send(SPEECH)
            if when == "speaking":
                await session.speak()
                await went.until(7 * FRAME)
            else:
                await asyncio.sleep(0.5)
            proxy.frozen = True
            began = time.monotonic()
            if when == "listening":
                await session.speak()
            await went.until(8 * FRAME)
            await went.until()
            await session.send(SPEECH[:FRAME])
            await session.speak()
            await went.until()
            assert went.heard() == stayed
            assert went.lost == went.restored == 1
            assert time.monotonic() - began > SILENCE_S / 2, "the network did not fall silent"

    place = f"memory://silent-{when}"
    with impatient(), server(SessionStore(place, KEY)) as one, server(SessionStore(place, KEY)) as other:
        run(talk(one, other))


def test_a_network_that_is_slow_is_not_taken_for_one_that_is_gone() -> None:
    """Pins answers that wait behind what was sent before, for longer than silence may last."""

    async def talk(one: LiveServer) -> None:
        stayed = await whole(one.url)
        async with cut_proxy(one.url) as proxy, ContinuationClient.connect(proxy.url, start("fast")) as session:
            went = Roaming(session)
            proxy.bytes_per_s = 22_000
            began = time.monotonic()
            await session.send(SPEECH)
            await session.speak()
            await went.until()
            assert time.monotonic() - began > 2 * SILENCE_S
            proxy.bytes_per_s = None
            await session.send(SPEECH[:FRAME])
            await session.speak()
            await went.until()
            assert went.heard() == stayed and not went.lost

    with impatient(), server(None) as one:
        run(talk(one))


def test_a_server_that_stands_still_for_three_seconds_is_not_given_up(tmp_path: Path) -> None:
    """Pins a client that leaves a server which was only stopped for a moment."""

    async def talk(one: subprocess.Popen[str], url: str) -> None:
        async with ContinuationClient.connect(url, started("realtime")) as session:
            person = Person(session)
            await person.say()
            await person.until(frames=5)
            one.send_signal(signal.SIGSTOP)
            listening = asyncio.create_task(person.until())
            await asyncio.sleep(3.0)
            one.send_signal(signal.SIGCONT)
            await listening
            assert len(person.turn(1)) == 2 * 25 * FRAME and not person.restored

    with process(*STUB, str(tmp_path), STEP_S) as (one, url):
        run(talk(one, url))
