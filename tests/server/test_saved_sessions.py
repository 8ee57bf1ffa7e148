"""Sessions that their holders keep: given out signed, and gone on with at any server with the same key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.asyncio.client import connect

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import RefusedError
from streaming.engine.engine import Engine
from streaming.errors import ContinuationError
from streaming.protocol import messages
from streaming.protocol.messages import Error, SamplingOptions, SessionSave, SessionStart, TurnDone
from streaming.server.door.session_key import SessionKey
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, client, run, serving

KEY, OTHER_KEY = SessionKey("k" * 32), SessionKey("o" * 32)
START = SessionStart(pace="fast", max_seconds=0.8, sampling=SamplingOptions(seed=5))
SPEECH = (np.arange(6 * FRAME) % 251).astype(np.int16)


@contextmanager
def saving(key: SessionKey | None = KEY, identity: str = "stub", allow: bool = True) -> Iterator[LiveServer]:
    """A server of its own, which lets sessions be saved."""
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(StubStep(2, rewind_frames=16, identity=identity), "stub"))
        yield stack.enter_context(serving(engine, allow_save=allow, session_key=key))


async def turn(session: ContinuationClient, speech: NDArray[np.int16]) -> NDArray[np.int16]:
    """Say this and return what the server says."""
    if len(speech):
        await session.send(speech)
    await session.speak()
    pieces = []
    async for event in session.events():
        if isinstance(event, Audio):
            pieces.append(event.pcm)
        if isinstance(event, TurnDone):
            return np.concatenate(pieces)
    raise AssertionError


def test_a_session_goes_on_elsewhere_as_if_it_had_stayed() -> None:
    """Pins anything of a stream that a file does not hold: its sampling, its turn, half a prompt."""

    async def talk(url: str, elsewhere: str) -> None:
        async with ContinuationClient.connect(url, START) as session:
            assert session.started.saves and session.turn == 1
            await turn(session, SPEECH)
            await session.send(SPEECH[: 2 * FRAME])
            saved = await session.save()
            stayed = await turn(session, SPEECH[2 * FRAME :])
        for place in (url, elsewhere):
            start = SessionStart(pace="fast", max_seconds=0.8)
            async with ContinuationClient.connect(place, start, saved=saved) as again:
                assert (again.turn, again.started.seed) == (2, 5)
                assert (await turn(again, SPEECH[2 * FRAME :])).tobytes() == stayed.tobytes()
                assert len(await turn(again, SPEECH[:0]))

    with saving() as one, saving() as other:
        run(talk(one.url, other.url))


def test_another_seed_makes_another_continuation() -> None:
    """Pins a seed that a client gives and the saved one wins over."""

    async def talk(url: str) -> None:
        async with ContinuationClient.connect(url, START) as session:
            await session.send(SPEECH)
            saved = await session.save()
        said = []
        for seed in (None, 5, 6):
            start = SessionStart(pace="fast", max_seconds=0.8, sampling=SamplingOptions(seed=seed))
            async with ContinuationClient.connect(url, start, saved=saved) as again:
                said.append((await turn(again, SPEECH[:0])).tobytes())
        assert said[0] == said[1] != said[2]

    with saving() as server:
        run(talk(server.url))


def test_what_this_server_has_not_signed_is_refused() -> None:
    """Pins a file that another server, or anybody, has made, and one that was cut or altered."""

    async def talk(url: str, other_key: str, other_model: str) -> None:
        async with ContinuationClient.connect(url, START) as session:
            await turn(session, SPEECH)
            saved = await session.save()
        altered = bytearray(saved)
        altered[20] ^= 1
        for place, data in [
            (url, bytes(altered)),
            (url, saved[:-1]),
            (url, saved + b"x"),
            (url, b"x" * 33),
            (url, b"x"),
            (url, bytes(2 << 20)),
            (other_key, saved),
            (other_model, saved),
        ]:
            with pytest.raises(RefusedError) as refused:
                async with ContinuationClient.connect(place, START, saved=data):
                    pass
            assert refused.value.refusal == "bad_snapshot" and not refused.value.retry_after_ms
        async with ContinuationClient.connect(url, START, saved=saved) as session:
            assert session.turn == 2

    with saving() as one, saving(OTHER_KEY) as other, saving(identity="another") as third:
        run(talk(one.url, other.url, third.url))


def test_a_server_that_does_not_allow_it_neither_gives_nor_takes() -> None:
    """Pins somebody's voice that leaves a server whose operator did not say so."""

    async def talk(url: str) -> None:
        async with ContinuationClient.connect(url, START) as session:
            assert not session.started.saves
            with pytest.raises(ContinuationError, match="saving_unavailable"):
                await session.save()
            await turn(session, SPEECH)  # the session goes on
        with pytest.raises(RefusedError) as refused:
            async with ContinuationClient.connect(url, START, saved=b"x" * 100):
                pass
        assert refused.value.refusal == "saving_unavailable"

    with saving(allow=False) as server:
        run(talk(server.url))


def test_a_session_that_speaks_is_not_saved_and_goes_on() -> None:
    """Pins a file that is in the middle of a turn, which nobody could go on with."""

    async def talk(url: str) -> None:
        start = SessionStart(max_seconds=60)
        async with client(url, start) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect_audio(1, 0)
            await session.expect(messages.TurnSpeaking)
            await session.send(SessionSave())
            error = await session.expect(Error)
            assert (error.code, error.in_reply_to, error.fatal) == ("bad_state", "session.save", False)
            await session.send(messages.Interrupt(turn=1, heard_samples=0))
            await session.expect(messages.Interrupted)
            await session.send(SessionSave())
            saved = await session.expect(messages.SessionSaved)
            assert saved.turn == 2

    with saving() as server:
        run(talk(server.url))


@pytest.mark.parametrize("wrong", [b"", b"\x04", messages.encode_piece(messages.SavedPiece(7, b"x")), "{}"])
def test_pieces_out_of_place_end_that_connection_alone(wrong: bytes | str) -> None:
    """Pins a session that begins with holes, and a client that makes the server wait for ever."""

    async def talk(url: str) -> None:
        async with connect(url, compression=None) as socket:
            await socket.send(messages.encode(SessionStart(saved_bytes=100)))
            await socket.send(wrong)
            answer = messages.decode_server(await socket.recv())
            assert isinstance(answer, Error) and answer.code == "bad_message"
        async with ContinuationClient.connect(url, START) as session:
            await turn(session, SPEECH)

    with saving() as server:
        run(talk(server.url))


def test_others_are_not_held_up_by_files_that_never_come() -> None:
    """Pins memory that grows with everybody who says that a file comes."""

    async def talk(url: str) -> None:
        async with connect(url, compression=None) as one, connect(url, compression=None) as other:
            for socket in (one, other):
                await socket.send(messages.encode(SessionStart(saved_bytes=100)))
            await asyncio.sleep(0.2)
            with pytest.raises(RefusedError) as refused:
                async with ContinuationClient.connect(url, START, saved=b"x" * 100):
                    pass
            assert refused.value.refusal == "full" and refused.value.retry_after_ms
            async with ContinuationClient.connect(url, START) as session:
                await turn(session, SPEECH)

    with saving() as server:
        run(talk(server.url))
