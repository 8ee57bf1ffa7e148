"""A client's connection to its session: what is said through it, and in which order."""

from __future__ import annotations

import asyncio

import numpy as np
from msgspec import structs

from streaming.client.resumable_connection import ResumableConnection
from streaming.protocol.messages import (
    Ack,
    AudioMessage,
    ClientMessage,
    Resumption,
    SessionStart,
    Speak,
    TurnSpeaking,
)
from streaming.protocol.replay import WINDOW
from tests.client.fake_server import STARTED, Peer, fake_server
from tests.server.live_server import run

RESUMABLE = structs.replace(STARTED, resume=Resumption(token="a-token", seconds=30.0, window=WINDOW))  # noqa: S106


def test_who_has_waited_to_speak_speaks_first() -> None:
    """The last word of a prompt waited for room in the window; the word to go on, said when there was room, overtook
    it, and the server ended the session over audio of a turn that was spoken already.
    """
    heard_before_speak: list[int] = []

    async def script(peer: Peer, message: ClientMessage) -> None:
        if isinstance(message, Speak):
            heard_before_speak.append(len(peer.heard))

    async def scenario() -> None:
        async with fake_server(script, opening=RESUMABLE) as server:
            connection = await ResumableConnection.open(server.url, SessionStart(resume=True), None, 5.0)
            for position in range(WINDOW):
                await connection.send(AudioMessage(1, position, np.zeros(1, np.int16)))
            last_word = asyncio.create_task(connection.send(AudioMessage(1, WINDOW, np.zeros(1, np.int16))))
            await asyncio.sleep(0.1)
            assert not last_word.done()
            (peer,) = server.peers
            await peer.send(Ack(received=2))  # room for two
            await peer.send(TurnSpeaking(turn=1, prompt_samples=0, dropped_samples=0))
            assert isinstance(await connection.receive(), TurnSpeaking)
            await connection.send(Speak(turn=1))
            await last_word
            while not heard_before_speak:
                await asyncio.sleep(0.01)
            await connection.close(None)

    run(scenario(), 20)
    assert heard_before_speak == [WINDOW + 1]
