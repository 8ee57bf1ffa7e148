"""The Live protocol over a real socket, against the stub step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from websockets.asyncio.client import connect

from streaming.audio import FRAME
from streaming.protocol import messages
from streaming.protocol.messages import PATH, AudioMessage
from streaming.server.openai import LIVE_PATH
from streaming.server.openai.live import LiveDialect
from streaming.server.openai.live_events import SessionOption, SessionStart
from streaming.server.openai.realtime_options import Model
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, run
from tests.server.openai.client import LOUD, QUIET, Client, encoded, kinds, live, said_by


@pytest.fixture
def step() -> StubStep:
    return StubStep(2, rewind_frames=16, context_frames=10)  # so long does it speak without a limit


async def say(session: Client, *pcm: np.ndarray | bytes) -> None:
    for part in pcm:
        await session.send("session.input_audio.append", audio=encoded(part))


def test_what_is_said_is_answered_and_counted(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        async with live(server.url) as session:
            resource = session.seen[0]["session"]
            assert (resource["model"], resource["status"]) == ("any", "active")
            await say(session, *[LOUD] * 4, *[QUIET] * 10)
            usage = (await session.until("session.usage.updated"))["usage"]
            assert usage["seconds"] == pytest.approx((14 + 10) * 0.08)
            assert session.audio[""] == said_by(step.streams[0])
            await session.send("session.close", event_id="bye")
            closed = await session.until("session.closed")
            assert (closed["reason"], closed["usage"], closed["session"]["id"]) == (
                "close_requested",
                usage,
                resource["id"],
            )
            await session.socket.wait_closed()
            assert session.socket.close_code == 1000

    run(scenario())
    assert kinds(step.streams[0]).endswith("s" * 10)


def test_all_that_was_sent_before_a_voice_interrupted_counts_as_heard(server: LiveServer, step: StubStep) -> None:
    """Live's clients do not tell what was heard, and play what was sent to its end."""
    step.context_frames = 100

    async def scenario() -> None:
        async with live(server.url) as session:
            await say(session, *[LOUD] * 4, *[QUIET] * 8)
            for _ in range(3):
                await session.until("session.output_audio.delta")
            await say(session, *[LOUD] * 6, *[QUIET] * 8)
            for _ in range(8):
                await session.until("session.output_audio.delta")
            assert session.audio[""] == said_by(step.streams[0])[: len(session.audio[""])]

    run(scenario())


@pytest.mark.parametrize(
    ("format", "frame_bytes"),
    [({"type": "audio/pcm", "rate": 16000}, 2560), ({"type": "audio/pcmu", "rate": 8000}, 640)],
)
def test_other_formats_go_both_ways(server: LiveServer, format: dict, frame_bytes: int) -> None:
    async def scenario() -> None:
        async with live(server.url, format) as session:
            assert session.seen[0]["session"]["audio"]["format"] == format
            loud = LOUD[: frame_bytes // 2].tobytes() if format["type"] == "audio/pcm" else bytes(frame_bytes)
            quiet = bytes(frame_bytes) if format["type"] == "audio/pcm" else b"\xff" * frame_bytes
            await say(session, *[loud] * 6, *[quiet] * 12)
            await session.until("session.usage.updated")
            assert len(session.audio[""]) == 10 * frame_bytes

    run(scenario())


def test_a_muted_voice_is_silence(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        async with live(server.url) as session:
            await session.send("session.input_audio.mute", event_id="m")
            assert (await session.until("session.input_audio.muted"))["client_event_id"] == "m"
            await say(session, *[LOUD] * 6, *[QUIET] * 10)
            await session.send("session.input_audio.unmute")
            await session.until("session.input_audio.unmuted")

    run(scenario())
    assert not any(stream.entries for stream in step.streams.values())


def test_words_are_acknowledged(server: LiveServer) -> None:
    async def scenario() -> None:
        async with live(server.url) as session:
            for kind in ("instructions", "thinking", "commentary"):
                await session.send(f"session.{kind}.append", content="a word", delegation_id=None, event_id=kind)
                assert (await session.until(f"session.{kind}.appended"))["client_event_id"] == kind
            await session.send("session.update", session={})
            await session.until("session.updated")

    run(scenario())


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "hum"}, "invalid_value"),
        ({"type": "session.start", "session": {}}, "session_already_started"),
        ({"type": "session.input_audio.append", "audio": "AAAA"}, "invalid_value"),
        ({"type": "session.input_audio.append", "audio": "?"}, "invalid_value"),
    ],
)
def test_a_mistake_is_told_and_the_session_goes_on(server: LiveServer, event: dict, code: str) -> None:
    async def scenario() -> None:
        async with live(server.url) as session:
            await session.socket.send(json.dumps(event | {"event_id": "asked"}))
            error = (await session.next())["error"]
            assert (error["code"], error["type"]) == (code, "invalid_request_error")
            assert error["client_event_id"] == "asked"
            await session.send("session.close")
            await session.until("session.closed")

    run(scenario())


@pytest.mark.parametrize(
    "first",
    [
        '{"type": "session.close"}',
        '{"type": "session.start", "session": {"audio": {"format": {"type": "audio/pcm", "rate": 11025}}}}',
        "hello",
        b"hello",
    ],
)
def test_a_session_that_cannot_start_is_refused_with_a_reason(server: LiveServer, first: str | bytes) -> None:
    async def scenario() -> None:
        async with connect(server.url.replace(PATH, LIVE_PATH)) as socket:
            await socket.send(first)
            assert json.loads(await socket.recv())["type"] == "error"
            await socket.wait_closed()
            assert socket.close_code == 1008

    run(scenario())


def test_usage_is_told_now_and_then() -> None:
    """Usage was told with every frame, or only at the end of a long turn."""
    start = SessionStart(session=SessionOption(model="any"))
    dialect = LiveDialect(Model("any", 4, 64), start)

    def say(reply: messages.Message | AudioMessage) -> list[str]:
        return [json.loads(event)["type"] for event in dialect.encode(reply)]

    told = [say(AudioMessage(1, FRAME * number, np.zeros(FRAME, np.int16))) for number in range(3 * 125)]
    assert [kind for kinds in told for kind in kinds].count("session.usage.updated") == 5, "in half a minute"
