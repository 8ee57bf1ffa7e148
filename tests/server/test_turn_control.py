"""What a client may change while a session runs: who takes the turns, what a turn is like, what was said."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from msgspec import structs

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.protocol import messages
from streaming.protocol.messages import OPEN_TURN, SamplingOptions, SessionStart, SessionUpdate, VadOptions
from tests.engine.stub_step import StubStep
from tests.server.live_server import Client, LiveServer, client, run
from tests.server.openai.client import LOUD, QUIET, SPEECH, kinds

SAMPLING = SamplingOptions(seed=5)
FAST = SessionStart(pace="fast", lag="wait", max_seconds=0.4, sampling=SAMPLING)
VAD = VadOptions(silence_ms=160, prefix_ms=80)
TURN = np.concatenate([*[LOUD] * 4, *[QUIET] * 6])


def test_a_turn_may_have_a_length_and_sampling_of_its_own(server: LiveServer, step: StubStep) -> None:
    """An update for one turn changes the next ones, too, unless it is taken back in time."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH, turn=OPEN_TURN)
            own = messages.Speak(turn=OPEN_TURN, max_seconds=0.16, sampling=SamplingOptions(temperature=0.1))
            await session.send(own)
            assert (await session.expect(messages.TurnDone)).samples == 2 * FRAME
            assert (await session.speak(2)).samples == 5 * FRAME

    run(scenario())
    said = [digest for kind, digest in step.streams[0].entries if kind == "spoken"]
    assert [said.count(digest) for digest in dict.fromkeys(said)] == [2, 5]


@pytest.mark.parametrize(("keep_samples", "frames"), [(0, 0), (1, 1), (FRAME, 1), (FRAME + 1, 2), (10**9, 3)])
def test_a_prompt_is_taken_back_to_the_frame(
    server: LiveServer, step: StubStep, keep_samples: int, frames: int
) -> None:
    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.send(messages.InputClear(keep_samples=keep_samples))
            cleared = await session.expect(messages.InputCleared)
            assert (cleared.turn, cleared.kept_samples) == (1, frames * FRAME)
            await session.hear(SPEECH[:FRAME])
            await session.speak()

    run(scenario())
    assert kinds(step.streams[0]) == "h" * (frames + 1) + "s" * 5


def test_part_of_a_frame_is_kept_and_the_rest_of_it_forgotten(server: LiveServer, step: StubStep) -> None:
    """100 samples to be kept stood in one frame with 860 to be taken back, and these were kept, too."""

    async def scenario(*pieces: np.ndarray, clear: bool) -> bytes:
        async with client(server.url, FAST) as session:
            await session.hear(pieces[0])
            if clear:
                await session.hear(SPEECH[:860])
                await session.send(messages.InputClear(keep_samples=len(pieces[0])))
                await session.expect(messages.InputCleared)
            await session.hear(pieces[1])
            await session.speak()
            return session.spoken().tobytes()

    first, then = SPEECH[:100], SPEECH[: 2 * FRAME]
    assert run(scenario(first, then, clear=True)) == run(scenario(first, then, clear=False))


def test_nothing_is_taken_back_from_under_a_turn(server: LiveServer) -> None:
    async def scenario() -> None:
        async with client(server.url, SessionStart(max_seconds=3600)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            await session.send(messages.InputClear())
            error = await session.expect(messages.Error)
            assert (error.code, error.in_reply_to) == ("bad_state", "input.clear")

    run(scenario())


def test_the_voice_takes_turns_from_when_it_is_told_to_and_until(server: LiveServer, step: StubStep) -> None:
    """Positions are the session's, whenever turn taking began."""

    async def scenario() -> None:
        async with client(server.url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            await session.send(SessionUpdate(turn_taking="vad", vad=VAD))
            updated = await session.expect(messages.SessionUpdated)
            assert (updated.turn_taking, updated.vad, updated.max_seconds) == ("vad", VAD, 0.4)
            await session.hear(np.concatenate((QUIET, TURN)))
            assert (await session.expect(messages.SpeechStarted)).at_samples >= 4 * FRAME - 768
            assert (await session.expect(messages.TurnDone)).turn == 2
            await session.send(SessionUpdate(turn_taking="manual"))
            await session.expect(messages.SessionUpdated)
            await session.hear(TURN, turn=3)
            await session.send(messages.Speak(turn=3))
            speaking = await session.expect(messages.TurnSpeaking)
            assert speaking.prompt_samples == len(TURN), "and no voice had said it before"

    run(scenario())


def test_who_is_being_heard_when_the_turns_become_the_clients_is_not_lost(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        start = SessionStart(turn_taking="vad", vad=VAD, pace="fast", lag="wait", max_seconds=0.4)
        async with client(server.url, start) as session:
            await session.hear(np.concatenate([LOUD] * 5))
            await session.expect(messages.SpeechStarted)
            await session.send(SessionUpdate(turn_taking="manual"))
            await session.expect(messages.SpeechStopped)
            await session.hear(LOUD)
            await session.speak()

    run(scenario())
    assert kinds(step.streams[0]) == "h" * 6 + "s" * 5


def test_speech_ends_without_an_answer_and_is_continued_on_demand(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        vad = VadOptions(silence_ms=160, prefix_ms=80, respond=False)
        start = SessionStart(turn_taking="vad", vad=vad, pace="fast", lag="wait", max_seconds=0.4)
        async with client(server.url, start) as session:
            for _ in range(2):
                await session.hear(TURN)
                await session.expect(messages.SpeechStopped)
            assert not any(isinstance(message, messages.TurnSpeaking) for message in session.said)
            assert (await session.speak()).samples == 5 * FRAME

    run(scenario())
    assert kinds(step.streams[0]).count("s") == 5


def test_a_word_to_speak_ends_what_is_being_heard(server: LiveServer) -> None:
    """A client that shows who speaks went on showing the person."""

    async def scenario() -> None:
        start = SessionStart(turn_taking="vad", vad=VAD, pace="fast", lag="wait", max_seconds=0.4)
        async with client(server.url, start) as session:
            await session.hear(np.concatenate([LOUD] * 4))
            await session.expect(messages.SpeechStarted)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.SpeechStopped)
            assert (await session.expect(messages.TurnDone)).samples == 5 * FRAME
            await session.hear(TURN)
            assert (await session.expect(messages.TurnDone)).turn == 2, "and the voice goes on taking turns"

    run(scenario())


def test_speech_that_is_cleared_is_no_prompt(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        start = SessionStart(turn_taking="vad", vad=VAD, pace="fast", lag="wait", max_seconds=0.4)
        async with client(server.url, start) as session:
            await session.hear(np.concatenate([LOUD] * 4))
            await session.expect(messages.SpeechStarted)
            await session.send(messages.InputClear())
            assert (await session.expect(messages.InputCleared)).kept_samples == 0
            await session.hear(np.concatenate([QUIET] * 6))
            await session.hear(TURN)
            await session.expect(messages.TurnDone)

    run(scenario())
    assert 4 <= kinds(step.streams[0]).count("h") <= 8


def test_who_never_says_what_was_played_stopped_when_the_voice_was_heard(server: LiveServer, step: StubStep) -> None:
    """Half a second more counted as heard: the server waits so long to be told what was played."""

    async def scenario() -> None:
        start = SessionStart(turn_taking="vad", vad=VAD, lag="wait", max_seconds=20, lead_ms=640)
        async with client(server.url, start) as session:
            began = time.monotonic()
            await session.hear(TURN)
            await session.expect(messages.TurnSpeaking)
            await session.hear(np.concatenate([LOUD] * 3))
            await session.expect(messages.SpeechStarted)
            played = SAMPLE_RATE * (time.monotonic() - began)  # at most
            assert (await session.expect(messages.Interrupted)).kept_samples <= 3 * FRAME + played

    run(scenario())


BY_VOICE = SessionStart(turn_taking="vad", vad=VAD, lag="wait", max_seconds=20, lead_ms=640)


async def _interrupted_by_voice(session: Client, start: SessionStart) -> None:
    """In the middle of a continuation, of which the client has played nothing yet, a voice is heard."""
    await session.hear(TURN)
    await session.expect(messages.TurnSpeaking)
    await session.send(messages.Played(turn=1, samples=0))
    if start.max_seconds < 1:
        await session.expect(messages.TurnDone)
    else:
        await session.expect_audio(1, 4)
    await session.hear(np.concatenate([LOUD] * 4))
    assert (await session.expect(messages.SpeechStarted)).turn == 1


def test_who_has_said_what_was_heard_is_not_interrupted_again(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second later the server cut once more, to what it took for heard: the next prompt followed half a word.

    Here it is a second and a half, since a busy machine may stand still for half of one.
    """
    monkeypatch.setattr("streaming.conversation.conversation.HEARD_TIMEOUT_S", 1.5)

    async def scenario() -> None:
        async with client(server.url, BY_VOICE) as session:
            await _interrupted_by_voice(session, BY_VOICE)
            await session.send(messages.Interrupt(turn=1, heard_samples=2 * FRAME))
            assert (await session.expect(messages.Interrupted)).kept_samples == 2 * FRAME
            await asyncio.sleep(1.7)
            await session.send(messages.Ping(id=1, client_time_ms=0.0))
            await session.expect(messages.Pong)
            assert sum(isinstance(said, messages.Interrupted) for said in session.said) == 1

    run(scenario())


@pytest.mark.usefixtures("heard_in_time")
def test_speak_has_to_wait_for_what_was_heard(server: LiveServer) -> None:
    """A `speak` between a voice's interruption and its answer ended the session as a fault of the server's."""

    async def scenario() -> None:
        start = structs.replace(BY_VOICE, max_seconds=0.4)
        async with client(server.url, start) as session:
            await _interrupted_by_voice(session, start)
            await session.send(messages.Speak(turn=OPEN_TURN))
            error = await session.expect(messages.Error)
            assert (error.code, error.in_reply_to, error.fatal) == ("bad_state", "speak", False)
            await session.send(messages.Interrupt(turn=1, heard_samples=0))
            await session.expect(messages.Interrupted)
            assert (await session.speak(OPEN_TURN)).turn == 2

    run(scenario())


@pytest.mark.usefixtures("heard_in_time")
def test_a_voice_that_has_interrupted_is_not_lost_when_the_turns_become_the_clients(server: LiveServer) -> None:
    """What was said until then waited for an answer that nobody asked for any more."""

    async def scenario() -> None:
        async with client(server.url, BY_VOICE) as session:
            await _interrupted_by_voice(session, BY_VOICE)
            await session.send(SessionUpdate(turn_taking="manual"))
            assert (await session.expect(messages.Interrupted)).kept_samples == 0, "as far as was played"
            await session.send(messages.Speak(turn=2, max_seconds=0.08))
            assert (await session.expect(messages.TurnSpeaking)).prompt_samples >= 3 * FRAME

    run(scenario())


def test_a_voice_interrupts_a_turn_that_was_asked_for_by_hand(server: LiveServer) -> None:
    """A server that was told to take the turns while it spoke took a voice over its own for the next prompt."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(lag="wait", max_seconds=20)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            await session.send(SessionUpdate(turn_taking="vad", vad=VAD))
            await session.hear(np.concatenate([LOUD] * 4))
            assert (await session.expect(messages.SpeechStarted)).turn == 1
            assert (await session.expect(messages.Interrupted)).turn == 1

    run(scenario())


def test_after_an_interruption_by_hand_the_voice_begins_a_turn_of_its_own(server: LiveServer) -> None:
    """The turn that was over counted as still being played: whoever spoke next interrupted it, and was not answered."""

    async def scenario() -> None:
        async with client(server.url, SessionStart(lag="wait", max_seconds=20, lead_ms=80)) as session:
            await session.hear(SPEECH)
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.TurnSpeaking)
            await session.send(messages.Interrupt(turn=1, heard_samples=0))
            await session.expect(messages.Interrupted)
            await session.send(SessionUpdate(turn_taking="vad", vad=VAD))
            await session.hear(TURN)
            assert (await session.expect(messages.SpeechStarted)).turn == 2
            assert (await session.expect(messages.TurnSpeaking)).turn == 2

    run(scenario())
