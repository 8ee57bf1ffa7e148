"""The native protocol over a real socket, against a step without weights: every line of `docs/protocol.md`."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient, Event
from streaming.config import ModelVoices, Sampling
from streaming.conversation.conversation import Conversation
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, SamplingOptions, SessionStart
from streaming.protocol.opus import opus_available
from tests.engine.stub_step import StubStep, spoken
from tests.server.live_server import Client, LiveServer, client, get, run, serving

FAST = SessionStart(pace="fast", max_seconds=0.8, sampling=SamplingOptions(seed=5))
SPEECH = (np.arange(3 * FRAME) % 251).astype(np.int16)


async def _turn(url: str, start: SessionStart = FAST) -> bytes:
    async with client(url, start) as session:
        await session.hear(SPEECH)
        await session.speak()
        return session.spoken().tobytes()


async def _closing(session: Client) -> tuple[messages.Error | None, int | None]:
    """The last error, and the code with which the server closes."""
    try:
        while True:
            await session.expect(messages.Error)
    except ConnectionClosed:
        errors = [message for message in session.said if isinstance(message, messages.Error)]
        return (errors[-1] if errors else None), session.socket.close_code


def test_a_turn_is_announced_spoken_and_counted(server: LiveServer) -> None:
    """A client that trusts only the messages gets every sample and knows how many to expect."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            started = session.said[0]
            assert isinstance(started, messages.SessionStarted)
            assert (started.turn, started.frame_samples, started.sample_rate) == (1, FRAME, 24_000)
            await session.hear(SPEECH[:-100], piece=777)
            done = await session.speak()
            speaking = session.said[-2]
            assert isinstance(speaking, messages.TurnSpeaking)
            assert speaking.prompt_samples == len(SPEECH), "the last partial frame is padded"
            assert (done.turn, done.reason, done.samples) == (1, "max_seconds", 10 * FRAME)
            assert len(session.spoken()) == done.samples
            assert done.first_frame_ms is not None

    run(scenario())


def test_a_model_s_voice_is_told_before_the_audio_to_those_who_ask() -> None:
    """A strict client ends at a message that it did not ask for."""
    voices = ModelVoices(1, {code: f"voice {code}" for code in range(2048)})

    async def told(url: str, start: SessionStart) -> list[type[messages.Message]]:
        async with client(url, start) as session:
            await session.hear(SPEECH)
            await session.speak()
            for message in session.said:
                if isinstance(message, messages.TurnVoice):
                    assert message.turn == 1 and message.voice.startswith("voice ")
            return [type(message) for message in session.said[1:]]

    async def scenario() -> None:
        with Engine(StubStep(1), "stub", voices=voices) as engine, serving(engine) as server:
            asked = SessionStart(pace="fast", max_seconds=0.8, voices=True)
            assert await told(server.url, asked) == [messages.TurnSpeaking, messages.TurnVoice, messages.TurnDone]
            assert await told(server.url, FAST) == [messages.TurnSpeaking, messages.TurnDone]

    run(scenario())


def test_pieces_of_any_size_make_the_same_session(server: LiveServer) -> None:
    """Framing depended on how the client cut its audio."""

    async def spoken(piece: int) -> bytes:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH, piece=piece)
            await session.speak()
            return session.spoken().tobytes()

    assert len({run(spoken(piece)) for piece in (1 * FRAME, 960, 333, 3 * FRAME)}) == 1


def test_turns_follow_each_other_and_speak_goes_on_without_new_audio(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak(1)
            await session.hear(SPEECH, turn=2)
            await session.speak(2)
            await session.speak(3)
            assert [len(session.audio[turn]) for turn in (1, 2, 3)] == [10, 10, 10]

    run(scenario())
    kinds = [kind for kind, _ in step.streams[0].entries]
    assert kinds == ["heard"] * 3 + ["spoken"] * 10 + ["heard"] * 3 + ["spoken"] * 20


def test_realtime_pace_keeps_to_its_lead(server: LiveServer, step: StubStep) -> None:
    """An interruption would throw away whatever was generated too far ahead."""

    async def scenario() -> None:
        start = SessionStart(max_seconds=20, lead_ms=240)
        async with client(server.url, start) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))  # from here on the client tells
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 3)
            for played in range(1, 20):
                await session.send(messages.Played(turn=1, samples=played * FRAME))
                await session.expect_audio(1, played + 3)
            await session.send(messages.Ping(id=1, client_time_ms=0.0))
            await session.expect(messages.Pong)
            assert len(session.audio[1]) <= 19 + 3 + 1, "one frame may leave before the first report"

    run(scenario())


def test_a_client_that_has_heard_more_than_it_was_sent_is_not_believed(server: LiveServer, step: StubStep) -> None:
    """Whoever lies about its playback got the whole continuation at once, made by steps that others waited for."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=20, lead_ms=240)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))  # from here on the client tells
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 3)
            await session.send(messages.Played(turn=1, samples=2**31))
            await session.expect_audio(1, 6)
            await asyncio.sleep(0.3)
            assert len(step.streams[0].entries) <= len(SPEECH) // FRAME + 2 * (3 + 1)

    run(scenario())


def test_no_lead_is_longer_than_what_an_interruption_can_take_back(server: LiveServer, step: StubStep) -> None:
    """A client that asked for ten seconds got them, and what it had not heard stayed in the conversation."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=20, lead_ms=10_000)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, step.rewind_frames)
            await asyncio.sleep(0.3)
            assert len(step.streams[0].entries) <= len(SPEECH) // FRAME + step.rewind_frames + 1

    run(scenario())


def test_a_late_report_of_an_old_turn_is_none_of_the_next(server: LiveServer, step: StubStep) -> None:
    """A report that was on its way when the listener interrupted let the next turn run ahead of what was heard."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=20, lead_ms=240)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 3)
            await session.send(messages.Interrupt(turn=1, heard_samples=0))
            await session.expect(messages.Interrupted)
            await session.send(messages.Speak(turn=2))
            await session.send(messages.Played(turn=2, samples=0))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(2, 3)
            await session.send(messages.Played(turn=1, samples=3 * FRAME))
            await asyncio.sleep(0.3)
            assert len(step.streams[0].entries) <= len(SPEECH) // FRAME + 3 + 1

    run(scenario())


@pytest.mark.parametrize("codec", ["pcm16", "opus"])
def test_a_client_that_sends_too_much_is_read_more_slowly_whatever_it_did_before(
    server: LiveServer, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was silent for a while had saved up messages, and took the event loop from all others with them. Answers say
    when they were given: on a slow machine they are further apart, never closer.
    """
    per_s, count = (200, 400) if codec == "pcm16" else (400, 800)
    if codec == "pcm16":
        # Far below what any machine can take:
        monkeypatch.setattr("streaming.server.native.session.MESSAGES_PER_S", per_s)
    if codec == "opus" and not opus_available():
        pytest.skip("no libopus")

    async def scenario() -> None:
        async with client(server.url, SessionStart(codecs=(codec,))) as session:
            await asyncio.sleep(2.5)
            sending = asyncio.create_task(ask(session))
            answers = [await session.expect(messages.Pong) for _ in range(count)]
            await sending
            took_s = (answers[-1].server_time_ms - answers[0].server_time_ms) / 1e3
            assert took_s > count / per_s - 0.2

    async def ask(session: Client) -> None:
        for number in range(count):
            await session.send(messages.Ping(id=number, client_time_ms=0.0))

    run(scenario())


def test_who_opens_a_socket_and_says_nothing_is_sent_away(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a client answered pings, which kept it there for ever."""
    monkeypatch.setattr("streaming.server.native.service._START_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with connect(server.url, compression=None) as socket:
            error, code = await _closing(Client(socket))
            assert error is not None
            assert (error.code, code) == ("bad_message", 1008)

    run(scenario(), 20)


def test_a_client_that_never_reports_is_paced_by_the_clock(server: LiveServer) -> None:
    """Without reports nothing would ever be released, and the continuation would stop at its lead."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=0.8, lead_ms=160)) as session:
            await session.hear(SPEECH)
            done = await session.speak()
            assert (done.reason, len(session.spoken())) == ("max_seconds", 10 * FRAME)

    run(scenario())


def test_an_interruption_keeps_what_was_heard_and_the_next_turn_follows_it(server: LiveServer, step: StubStep) -> None:
    """The next prompt's audio is sent at once, without waiting for the answer."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=20, lead_ms=320)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 4)
            await session.send(messages.Interrupt(turn=1, heard_samples=2 * FRAME + 1000))
            await session.hear(SPEECH, turn=2)
            await session.send(messages.Speak(turn=2))
            done = await session.expect(messages.TurnDone)
            assert (done.turn, done.reason) == (1, "interrupted")
            assert (await session.expect(messages.Interrupted)).kept_samples == 2 * FRAME
            assert (await session.expect(messages.TurnSpeaking)).turn == 2

    run(scenario())
    kinds = [kind for kind, _ in step.streams[0].entries]
    assert kinds[:8] == ["heard"] * 3 + ["spoken"] * 2 + ["heard"] * 3


def test_an_interruption_after_the_end_still_cuts(server: LiveServer, step: StubStep) -> None:
    """What was generated but is still in the client's buffer is not part of the conversation."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            await session.send(messages.Interrupt(turn=1, heard_samples=7 * FRAME))
            assert (await session.expect(messages.Interrupted)).kept_samples == 7 * FRAME
            await session.speak(2)

    run(scenario())
    assert [kind for kind, _ in step.streams[0].entries] == ["heard"] * 3 + ["spoken"] * 17


def test_audio_of_a_turn_that_is_over_is_dropped(server: LiveServer, step: StubStep) -> None:
    """Stale audio would become part of the next prompt."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            await session.hear(SPEECH, turn=1)
            await session.hear(SPEECH[:FRAME], turn=2)
            await session.speak(2)

    run(scenario())
    kinds = [kind for kind, _ in step.streams[0].entries]
    assert kinds == ["heard"] * 3 + ["spoken"] * 10 + ["heard"] + ["spoken"] * 10


def test_audio_of_the_turn_that_is_being_spoken_is_dropped(server: LiveServer, step: StubStep) -> None:
    """Such audio became part of the next prompt if the engine had finished before the turn's end was told."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.hear(np.tile(SPEECH, 20), turn=1)
            await session.expect(messages.TurnDone)
            await session.speak(2)

    run(scenario())
    assert [kind for kind, _ in step.streams[0].entries] == ["heard"] * 3 + ["spoken"] * 20


def test_a_turn_that_is_asked_for_again_and_again_is_spoken_once(server: LiveServer, step: StubStep) -> None:
    """A second `speak` that met the end of the turn made the session wait for ever."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            for _ in range(300):
                await session.send(messages.Speak(turn=1))
            for _ in range(299):
                assert (await session.expect(messages.Error)).code == "bad_state"
            await session.speak(2)
            assert [len(session.audio[turn]) for turn in (1, 2)] == [10, 10]

    run(scenario())
    assert [kind for kind, _ in step.streams[0].entries] == ["heard"] * 3 + ["spoken"] * 20


def test_an_update_takes_effect_with_the_next_turn_and_keeps_the_seed(server: LiveServer, step: StubStep) -> None:
    """An update changed the turn that was being spoken, at a moment that nobody could name; one without a seed took the
    seed back.
    """

    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=0.8, sampling=SamplingOptions(seed=3))) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.send(messages.Played(turn=1, samples=0))
            await session.expect(messages.TurnSpeaking)
            await session.expect_audio(1, 3)
            for options in (SamplingOptions(seed=9), SamplingOptions(top_k=5)):
                await session.send(messages.SessionUpdate(sampling=options))
                assert (await session.expect(messages.SessionUpdated)).sampling.seed == 9
            for heard in range(3, 10):
                await session.send(messages.Played(turn=1, samples=heard * FRAME))
                await session.expect_audio(1, heard + 1)
            await session.expect(messages.TurnDone)
            await session.send(messages.Speak(turn=2))
            await session.expect(messages.TurnSpeaking)
            for heard in range(9):
                await session.send(messages.Played(turn=2, samples=heard * FRAME))
                await session.expect_audio(2, heard + 1)
            await session.expect(messages.TurnDone)

    run(scenario())
    entries = step.streams[0].entries
    assert entries[3:13] == [spoken(Sampling(seed=3))] * 10
    assert entries[13:] == [spoken(Sampling(seed=9, top_k=5))] * 10


def test_what_a_client_leaves_open_is_the_models_and_is_told() -> None:
    """Pins a top-p of 1.0 where the checkpoint has 0.9, and a client that cannot know what it is drawn with."""
    step = StubStep(1)
    usual = Sampling(temperature=0.8, top_k=30, top_p=0.9)

    async def scenario(url: str) -> None:
        start = SessionStart(pace="fast", max_seconds=0.16, sampling=SamplingOptions(temperature=0.5, seed=3))
        async with client(url, start) as session:
            started = session.said[0]
            assert isinstance(started, messages.SessionStarted)
            assert started.sampling == SamplingOptions(temperature=0.5, top_k=30, top_p=0.9, seed=3)
            await session.hear(SPEECH)
            await session.speak(1)
            await session.send(messages.SessionUpdate(sampling=SamplingOptions(top_k=5)))
            told = (await session.expect(messages.SessionUpdated)).sampling
            assert told == SamplingOptions(temperature=0.8, top_k=5, top_p=0.9, seed=3)
            await session.speak(2)
            await session.send(messages.Speak(turn=3, sampling=SamplingOptions(top_p=1.0, seed=4)))
            await session.expect(messages.TurnDone)

    with Engine(step, "stub", sampling=usual) as engine, serving(engine) as live:
        run(scenario(live.url))
    assert step.streams[0].entries[3:] == [
        *[spoken(Sampling(0.5, 30, 0.9, 3))] * 2,
        *[spoken(Sampling(0.8, 5, 0.9, 3))] * 2,
        *[spoken(Sampling(0.8, 30, 1.0, 4))] * 2,
    ]


def test_float32_is_heard_as_it_is() -> None:
    """A recording that was resampled lost what 16 bits do not hold on its way: one frame in forty had another code."""
    pcm = np.random.default_rng(0).uniform(-1, 1, FRAME).astype(np.float32)
    pcm[:2] = 1e-9, 1.5
    step = StubStep(1)

    async def scenario(url: str) -> None:
        start = SessionStart(pace="fast", max_seconds=0.08, codecs=("flac", "float32", "pcm16"))
        async with ContinuationClient.connect(url, start) as session:
            assert session.started.codec == "float32"
            await session.send(pcm)
            await session.speak()
            async for event in session.events():
                if isinstance(event, messages.TurnDone):
                    break
                assert not isinstance(event, Audio) or event.pcm.dtype == np.int16

    with Engine(step, "stub") as engine, serving(engine) as live:
        run(scenario(live.url))
    assert step.streams[0].entries[0] == ("heard", zlib.crc32(pcm.tobytes()))


@pytest.mark.parametrize("sample", [np.nan, np.inf, -1001.0], ids=str)
def test_float32_that_is_no_speech_ends_the_session_alone(server: LiveServer, sample: float) -> None:
    """A NaN would stay in the model's state for the rest of the session."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(codecs=("float32",))) as session:
            await session.socket.send(messages.encode_audio(AudioMessage(1, 0, np.float32([0.5, sample]))))
            error = await session.expect(messages.Error)
            assert (error.code, error.fatal) == ("bad_message", True)
            assert "NaN, infinity" in error.message

    run(scenario())


@pytest.mark.parametrize(
    ("codec", "pcm"),
    [("float32", np.zeros(2, np.int16)), ("pcm16", np.zeros(2, np.float32)), ("float32", np.zeros(24_001, np.float32))],
    ids=["other", "not-asked", "long"],
)
def test_a_session_has_one_kind_of_audio(server: LiveServer, codec: str, pcm: NDArray[Any]) -> None:
    """Pins float32 read as twice as many samples of 16 bits."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(codecs=(codec,)), max_size=None) as session:
            await session.socket.send(messages.encode_audio(AudioMessage(1, 0, pcm)))
            await session.expect(messages.Error)

    if len(pcm) < 24_000:
        run(scenario())
    else:
        with pytest.raises(ConnectionClosed):  # more than any message may be
            run(scenario())


def test_a_fault_of_the_servers_own_is_told_and_harms_nobody_else(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client got a close code without a word."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        async with client(server.url, FAST) as neighbour, client(server.url, FAST) as session:
            await neighbour.hear(SPEECH)
            await session.hear(SPEECH)
            with monkeypatch.context() as patch:
                patch.setattr(Conversation, "_speak", broken)
                await session.send(messages.Speak(turn=1))
                error, code = await _closing(session)
            assert error is not None
            assert (error.code, error.fatal, code) == ("internal", True, 1011)
            assert (await neighbour.speak()).samples == 10 * FRAME

    run(scenario())
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("broken_part", ["SpeechStream", "load_vad_model"])
def test_a_session_that_cannot_begin_gives_its_slot_back(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken_part: str
) -> None:
    """What failed between the slot and the first message kept the slot for ever."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(f"streaming.models.voice_activity.{broken_part}", broken)
            for _ in range(3):  # more than there are slots
                async with connect(server.url, compression=None) as socket:
                    session = Client(socket)
                    await session.send(SessionStart(turn_taking="vad"))
                    error, code = await _closing(session)
                    assert error is not None
                    assert (error.code, code) == ("internal", 1011)
        assert await _turn(server.url)

    run(scenario())
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_does_not_read_does_not_keep_the_server_from_stopping(step: StubStep) -> None:
    """The server's end waited for this client's keepalive: 19 s."""

    async def scenario(server: LiveServer) -> None:
        async with connect(server.url, compression=None, max_queue=1) as socket:
            session = Client(socket)
            await session.send(SessionStart(pace="fast", max_seconds=3600))
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            while not session.audio:
                data = await socket.recv()
                if isinstance(data, bytes):
                    session.take(messages.decode_audio(data))
            calls = -1
            while step.calls != calls:  # until nothing more fits between them
                calls = step.calls
                await asyncio.sleep(0.2)
            server.stop()
            server.stop()
            await asyncio.to_thread(server.join)
            socket.transport.abort()

    with Engine(step) as engine, serving(engine, keepalive_s=600) as server:
        run(scenario(server))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"type": "hum"}', "unknown_type"),
        ('{"type": "speak", "turn": 1}', "empty_prompt"),
        ('{"type": "speak", "turn": 7}', "bad_state"),
        ('{"type": "interrupt", "turn": 1, "heard_samples": 0}', "bad_state"),
        ('{"type": "session.start"}', "bad_state"),
    ],
)
def test_a_command_that_does_not_fit_is_answered_and_the_session_goes_on(
    server: LiveServer, text: str, code: str
) -> None:
    """One wrong word ended the session."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.socket.send(text)
            error = await session.expect(messages.Error)
            assert (error.code, error.fatal, error.in_reply_to) == (code, False, json.loads(text)["type"])
            await session.hear(SPEECH)
            assert (await session.speak()).reason == "max_seconds"

    run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{",
        '{"type": "speak"}',
        '{"type": "speak", "turn": -1}',
        '{"type": "speak", "turn": 1e999}',
        '{"type": "played", "turn": 1, "samples": 99999999999999999999999}',
        "[" * 50_000,
        b"",
        b"\x01" * 15,
        b"\x02" + b"\0" * 15,
        b"\x01" + b"\0" * 16,
        messages.encode_audio(messages.AudioMessage(1, 5, SPEECH)),
        messages.encode_audio(messages.AudioMessage(2, 0, SPEECH)),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_malformed_message_closes_that_session_alone_with_a_reason(server: LiveServer, data: str | bytes) -> None:
    """Rubbish from one client took the neighbours down, or vanished without a word."""

    async def scenario() -> None:
        async with client(server.url, FAST) as neighbour:
            await neighbour.hear(SPEECH)
            async with client(server.url, FAST) as session:
                await session.socket.send(data)
                error, code = await _closing(session)
                assert error is not None
                assert (error.code, error.fatal, code) == ("bad_message", True, 1007)
            await neighbour.speak()
            assert neighbour.spoken().tobytes() == await _turn(server.url)

    run(scenario())


@pytest.mark.parametrize("letter", ["a", "é", "😀"])
def test_the_reason_of_a_close_is_cut_to_what_a_close_frame_holds(server: LiveServer, letter: str) -> None:
    """A reason that repeats what the client sent made a frame that is none (RFC 6455, section 5.5): instead of the
    reason the client saw its connection fail.
    """

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            for shift in range(4):  # wherever the cut falls in a letter of several bytes
                async with client(server.url, FAST) as other:
                    word = "x" * shift + letter * 150
                    await other.socket.send(json.dumps({"type": "session.update", "turn_taking": word}))
                    error, code = await _closing(other)
                    assert error is not None and word in error.message
                    assert code == 1007
                    reason = other.socket.close_reason
                    assert reason is not None and 118 < len(reason.encode()) <= 123
                    assert error.message.startswith(reason)
            await session.hear(SPEECH)
            await session.speak()

    run(scenario())


def test_a_message_that_is_too_large_closes_the_session(server: LiveServer) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.socket.send(b"\x01" + b"\0" * messages.MAX_MESSAGE_BYTES)
            error, code = await _closing(session)
            assert (error, code) == (None, 1009)

    run(scenario())


@pytest.mark.parametrize(
    "first",
    [
        '{"type": "speak", "turn": 1}',
        '{"type": "hum"}',
        '{"type": "session.start", "pace": 1}',
        "hello",
        b"\x01" + b"\0" * 15,
    ],
)
def test_the_first_message_must_start_the_session(server: LiveServer, step: StubStep, first: str | bytes) -> None:
    async def scenario() -> None:
        async with connect(server.url, compression=None) as socket:
            session = Client(socket)
            await socket.send(first)
            error, code = await _closing(session)
            assert error is not None
            assert (error.code, error.fatal, code) == ("bad_message", True, 1008)

    run(scenario())
    assert not step.streams, "no slot was taken"


def test_another_protocol_version_is_refused(server: LiveServer) -> None:
    async def scenario() -> None:
        async with connect(server.url, compression=None) as socket:
            session = Client(socket)
            await socket.send('{"type": "session.start", "protocol": 2, "pace": "of the future"}')
            refused = await session.expect(messages.SessionRefused)
            assert (refused.code, refused.retry_after_ms) == ("unsupported_protocol", 0)

    run(scenario())


def test_a_full_server_refuses_at_once_and_has_room_again_later(server: LiveServer) -> None:
    """The fifth client of a peer's server waited in silence."""

    async def scenario() -> None:
        connection = connect(server.url, compression=None)
        async with client(server.url, FAST), client(server.url, FAST), connection as socket:
            session = Client(socket)
            await session.send(FAST)
            refused = await session.expect(messages.SessionRefused)
            assert refused.code == "full"
            assert refused.retry_after_ms > 0
            _, code = await _closing(session)
            assert code == 1013
        assert await _turn(server.url)

    run(scenario())


def test_a_prompt_longer_than_the_context_slides_and_says_so(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(np.zeros((step.context_frames + 5) * FRAME, np.int16))
            await session.send(messages.Speak(turn=1))
            assert (await session.expect(messages.TurnSpeaking)).dropped_samples == 6 * FRAME

    run(scenario())


def test_a_prompt_longer_than_the_context_is_an_error_where_the_client_asked_for_that(
    server: LiveServer, step: StubStep
) -> None:
    async def scenario() -> None:
        async with client(server.url, SessionStart(overflow="refuse", pace="fast")) as session:
            await session.hear(np.zeros((step.context_frames + 5) * FRAME, np.int16))
            error, code = await _closing(session)
            assert error is not None
            assert (error.code, error.fatal, code) == ("prompt_too_long", True, 1008)
        assert await _turn(server.url)

    run(scenario())


def test_ping_update_and_close_are_answered(server: LiveServer) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.send(messages.Ping(id=7, client_time_ms=1.5))
            pong = await session.expect(messages.Pong)
            assert (pong.id, pong.client_time_ms) == (7, 1.5)
            options = SamplingOptions(temperature=0.0, seed=9)
            await session.send(messages.SessionUpdate(max_seconds=0.16, sampling=options))
            told = (await session.expect(messages.SessionUpdated)).sampling
            assert told == SamplingOptions(temperature=0.0, top_k=30, top_p=1.0, seed=9)
            await session.hear(SPEECH)
            assert (await session.speak()).samples == 2 * FRAME
            await session.send(messages.SessionClose())
            assert (await session.expect(messages.SessionClosed)).reason == "client"
            _, code = await _closing(session)
            assert code == 1000

    run(scenario())


def test_a_client_that_leaves_gives_its_slot_back(server: LiveServer) -> None:
    """The client leaves in the middle of a continuation, without a closing handshake."""

    async def scenario() -> None:
        for _ in range(6):
            async with client(server.url, SessionStart(max_seconds=60)) as session:
                await session.hear(SPEECH)
                await session.send(messages.Speak(turn=1))
                await session.expect(messages.TurnSpeaking)
                session.socket.transport.abort()
            while json.loads(await asyncio.to_thread(get, f"{server.http}/health"))["sessions"]:
                await asyncio.sleep(0.01)

    run(scenario())


def test_a_server_that_stops_says_goodbye(server: LiveServer) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            server.stop()
            assert (await session.expect(messages.SessionClosed)).reason == "stopping"
            _, code = await _closing(session)
            assert code == 1001

    run(scenario())
    server.join()


def test_a_lost_device_ends_the_sessions_with_a_reason_and_the_server_too(
    step: StubStep, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead engine thread left every client waiting."""
    step.fatal = True

    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST) as session:
            step.failure = RuntimeError("the device fell off")
            await session.hear(SPEECH)
            error, code = await _closing(session)
            assert error is not None
            assert (error.code, error.fatal, code) == ("engine_stopped", True, 1011)
            assert "the device fell off" not in error.message, "the log has it"

    with Engine(step, "stub") as engine, serving(engine) as server:
        run(scenario(server))
        server.join()
    assert "the engine's thread failed" in caplog.text


def test_health_tells_the_engines_figures_and_other_paths_where_to_go(server: LiveServer) -> None:
    run(_turn(server.url))
    health = json.loads(get(f"{server.http}/health"))
    assert (health["status"], health["model"], health["slots"]) == ("ready", "stub", 2)
    assert health["steps"] > 0
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{server.http}/somewhere")
    with caught.value as answer:
        assert (answer.code, messages.PATH in answer.read().decode()) == (404, True)


def test_a_prompt_is_taken_again_and_the_talk_goes_on_from_the_take_that_is_kept(
    server: LiveServer, step: StubStep
) -> None:
    """Pins takes that the socket, the driver or the client loses: numbers, audio, the stream that is gone on with."""

    async def talk() -> None:
        start = SessionStart(pace="fast", max_seconds=0.4, takes=True, sampling=SamplingOptions(seed=5))
        async with ContinuationClient.connect(server.url, start) as client:
            assert client.started.takes == 4
            await client.send(SPEECH)
            assert await client.speak() == 1
            events = client.events()
            first = await _until_done(events)
            assert await client.take(1, sampling=SamplingOptions(seed=6)) == 2
            second = await _until_done(events)
            assert isinstance(second[0], messages.TakeStarted)
            assert (second[0].turn, second[0].of, second[0].sampling.seed) == (2, 1, 6)
            assert len(first) == len(second) - 1
            taken = [entry for entry in step.streams[0].entries if entry[0] == "spoken"]
            assert taken == [spoken(Sampling(seed=6))] * 5
            await client.keep(1)
            kept = await anext(events)
            assert kept == messages.TakeKept(turn=3, of=1)
            await client.send(SPEECH)
            assert await client.speak() == 3
            await _until_done(events)
            kinds = [entry for entry in step.streams[0].entries if entry[0] == "spoken"]
            assert kinds == [spoken(Sampling(seed=5))] * 10
            await client.take(9)
            error = await anext(events)
            assert isinstance(error, messages.Error)
            assert (error.code, error.fatal) == ("take_gone", False)

    run(talk())


async def _until_done(events: AsyncIterator[Event]) -> list[Event]:
    """What comes of a turn."""
    found: list[Event] = []
    async for event in events:
        found.append(event)
        if isinstance(event, messages.TurnDone):
            break
    return found
