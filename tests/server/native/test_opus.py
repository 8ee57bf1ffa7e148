"""Opus on the wire of a real server: who gets it, what stays exact, and who may not harm whom with it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, OpusMessage, SessionStart, Speak, encode_audio
from streaming.protocol.opus import OpusSender, opus_available
from tests.engine.stub_step import StubResult, StubStep
from tests.server.live_server import LiveServer, client, run, serving

pytestmark = pytest.mark.skipif(not opus_available(), reason="no libopus")

SPEECH = (3_000 * np.sin(np.arange(10 * FRAME + 50) / 9)).astype(np.int16)


async def _turn(session: ContinuationClient) -> tuple[NDArray[np.int16], messages.TurnSpeaking]:
    for at in range(0, len(SPEECH), 480):
        await session.send(SPEECH[at : at + 480])
    await session.speak()
    pcm: list[NDArray[np.int16]] = []
    speaking: list[messages.TurnSpeaking] = []
    async for event in session.events():
        match event:
            case Audio():
                pcm.append(event.pcm)
            case messages.TurnSpeaking():
                speaking.append(event)
            case messages.TurnDone():
                break
    return np.concatenate(pcm), speaking[0]


@pytest.mark.parametrize("pace", ["fast", "realtime"])
def test_turns_are_as_long_as_with_pcm(server: LiveServer, pace: str) -> None:
    """Prompts were one frame longer, or clients took continuations for cut short."""

    async def scenario(codec: str) -> list[tuple[int, int]]:
        start = SessionStart(pace=pace, lag="wait", max_seconds=0.8, codecs=(codec,))  # type: ignore[arg-type]
        async with ContinuationClient.connect(server.url, start) as session:
            assert session.started.codec == codec
            turns = [await _turn(session) for _ in range(2)]
            return [(len(pcm), speaking.prompt_samples) for pcm, speaking in turns]

    assert run(scenario("opus")) == run(scenario("pcm16")) == [(10 * FRAME, 11 * FRAME)] * 2


def test_what_is_heard_is_what_was_said() -> None:
    heard: list[NDArray[np.float32]] = []

    class Listening(StubStep):
        def __call__(
            self,
            slots: NDArray[np.int64],
            pcm: NDArray[np.float32],
            listening: NDArray[np.bool_],
            speaking: NDArray[np.bool_],
            lengths: NDArray[np.int64],
        ) -> StubResult:
            heard.extend(np.array(pcm[row]) for row in np.flatnonzero(listening))
            return super().__call__(slots, pcm, listening, speaking, lengths)

    async def scenario(url: str) -> None:
        start = SessionStart(pace="fast", max_seconds=0.4, codecs=("opus",))
        async with ContinuationClient.connect(url, start) as session:
            await _turn(session)

    with Engine(Listening(2), "stub") as engine, serving(engine) as live:
        run(scenario(live.url))
    got = np.concatenate(heard)[: len(SPEECH)] * 32_768
    said = SPEECH.astype(float)
    assert np.dot(got, said) > 0.9 * np.linalg.norm(got) * np.linalg.norm(said)


@pytest.mark.parametrize(
    ("codecs", "wanted"),
    [
        (("pcm16",), "pcm16"),
        (("opus",), "opus"),
        (("opus", "pcm16"), "opus"),
        (("pcm16", "opus"), "pcm16"),
        (("flac", "opus"), "opus"),
        (("flac",), "pcm16"),
        ((), "pcm16"),
    ],
)
def test_the_client_chooses_among_what_there_is(server: LiveServer, codecs: tuple[str, ...], wanted: str) -> None:
    async def scenario() -> None:
        async with client(server.url, SessionStart(codecs=codecs)) as session:
            started = session.said[0]
            assert isinstance(started, messages.SessionStarted)
            assert started.codec == wanted

    run(scenario())


def test_a_server_without_the_package_goes_on_with_pcm(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.server.native.service.opus_available", lambda: False)

    async def scenario() -> None:
        start = SessionStart(pace="fast", max_seconds=0.4, codecs=("opus",))
        async with ContinuationClient.connect(server.url, start) as session:
            assert session.started.codec == "pcm16"
            pcm, _ = await _turn(session)
            assert len(pcm) == 5 * FRAME

    run(scenario())


def test_one_frame_ahead_is_not_enough(server: LiveServer) -> None:
    """The last 6.5 ms of a frame come with the next one: with a lead of one frame both sides waited for each other."""

    async def scenario() -> None:
        start = SessionStart(max_seconds=0.4, lead_ms=80, codecs=("opus",))
        async with ContinuationClient.connect(server.url, start) as session:
            await session.send(SPEECH)
            await session.speak()
            played = 0
            async for event in session.events():
                if isinstance(event, Audio):
                    played += len(event.pcm)
                    await session.played(1, played)
                elif isinstance(event, messages.TurnDone):
                    assert played == event.samples
                    break

    run(scenario(), 20)


def test_an_interruption_keeps_what_was_heard(server: LiveServer) -> None:
    async def scenario() -> None:
        async with ContinuationClient.connect(server.url, SessionStart(max_seconds=60, codecs=("opus",))) as session:
            await session.send(SPEECH)
            await session.speak()
            heard = 0
            async for event in session.events():
                match event:
                    case Audio():
                        heard += len(event.pcm)
                        if heard == 4 * FRAME - 156:
                            await session.interrupt(1, heard)
                    case messages.Interrupted():
                        assert event.kept_samples == 3 * FRAME
                        break
            await session.send(SPEECH)
            await session.speak()
            heard = 0
            async for event in session.events():
                if isinstance(event, Audio):
                    assert event.turn == 2
                    heard += len(event.pcm)
                    await session.played(2, heard)
                    if heard > 4 * FRAME:
                        break

    run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        encode_audio(AudioMessage(1, 0, SPEECH[:FRAME])),
        encode_audio(OpusMessage(1, 0, True, 0, 480, (b"\x00",))),
        encode_audio(OpusMessage(1, 0, False, 0, 960, OpusSender().push(AudioMessage(1, 0, SPEECH))[0].packets)),
        encode_audio(OpusMessage(1, 0, True, 0, 960, (bytes([2 << 3 | 3, 3]) + b"\xff" * 40,))),
        b"\x02\x01" + bytes(14) + b"\x10\x00\x01\x00\xff" + b"\xff" * 90_000,
    ],
    ids=["pcm", "too few samples", "no beginning", "corrupt", "huge"],
)
def test_a_hostile_message_ends_its_own_session(server: LiveServer, data: bytes) -> None:
    async def scenario() -> None:
        start = SessionStart(pace="fast", max_seconds=0.4, codecs=("opus",))
        async with ContinuationClient.connect(server.url, start) as healthy, client(server.url, start) as hostile:
            await hostile.socket.send(data)
            error = await hostile.expect(messages.Error)
            assert (error.code, error.fatal) == ("bad_message", True)
            with pytest.raises(ConnectionClosed):
                await hostile.expect(messages.Message)
            assert hostile.socket.close_code == 1007
            pcm, _ = await _turn(healthy)
            assert len(pcm) == 5 * FRAME

    run(scenario())


def test_a_flood_is_read_more_slowly(server: LiveServer) -> None:
    """A few bytes of Opus are 120 ms of sound and a third of a millisecond of the event loop that all share."""
    packets = OpusSender().push(AudioMessage(1, 0, np.zeros(3 * 960, np.int16)))[0].packets

    async def scenario() -> None:
        start = SessionStart(pace="fast", codecs=("opus",))
        async with client(server.url, start) as hostile:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(800):
                await hostile.socket.send(encode_audio(OpusMessage(1, 0, number == 0, 2_880, 0, packets)))
            await hostile.send(Speak(turn=9))
            await hostile.expect(messages.Error)
            assert loop.time() - began > 1.5

    run(scenario())
