"""The course of a session, without an event loop or an engine: turns, playback, interruptions, settings, ends."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.config import ModelVoices
from streaming.conversation.conversation import HEARD_TIMEOUT_S, MAX_UNSENT, HeardByClock
from streaming.conversation.ends import CLIENT_LEFT
from streaming.conversation.outbox import Echo, End
from streaming.conversation.settings import filled
from streaming.engine import events
from streaming.errors import PromptTooLongError, ProtocolError, StepFailedError
from streaming.protocol import messages
from streaming.protocol.close_codes import CloseCode
from streaming.protocol.messages import (
    AudioMessage,
    InputClear,
    InputCleared,
    InputDropped,
    InputLagging,
    Interrupt,
    Interrupted,
    Played,
    SamplingOptions,
    SessionUpdate,
    Speak,
    SpeechStarted,
    SpeechStopped,
    TurnSpeaking,
    UnknownTypeError,
    VadOptions,
)
from tests.conversation.engine_model import CODES, EngineModel, Talk, sampling, untimed

SPEAK = Speak(turn=messages.OPEN_TURN)
FRAME_S = 0.08
W = 768
VAD = VadOptions(silence_ms=96, prefix_ms=0)  # 3 windows are speech, 3 are silence
YES, NO = [0.9], [0.0]
SAID = [*YES * 5, *NO * 3]  # an utterance and the silence that ends it, 3.2 frames; with the padding 4


def speaking(turn: int = 1, prompt: int = 1) -> TurnSpeaking:
    return TurnSpeaking(turn=turn, prompt_samples=prompt * FRAME, dropped_samples=0)


def interrupted(turn: int, frames: int) -> Interrupted:
    return Interrupted(turn=turn, kept_samples=frames * FRAME)


def by_voice(**changes: object) -> Talk:
    return Talk(turn_taking="vad", vad=VAD, **changes)  # type: ignore[arg-type]


def the_error(talk: Talk) -> tuple[str, str | None]:
    (error,) = talk.replies()
    assert isinstance(error, messages.Error)
    assert not error.fatal
    return error.code, error.in_reply_to


def the_end(talk: Talk) -> End:
    *_, end = talk.replies()
    assert isinstance(end, End)
    assert end is talk.conversation.end
    return end


# Turns


def test_a_turn_is_what_was_heard_and_what_is_said_to_it() -> None:
    talk = Talk(engine=EngineModel(length=3))
    talk.turn(2)
    assert talk.engine.log == [("listen",), ("listen",), ("speak", 250, 5)]
    assert talk.told() == [speaking(prompt=2), "audio 3", (1, "end", 3)]
    talk.turn(1)
    assert talk.told() == [speaking(2, 1), "audio 3", (2, "end", 3)]
    assert talk.counts.frames_heard == 3


@pytest.mark.parametrize("named", [True, False])
def test_a_model_with_voices_of_its_own_says_in_which_one_it_goes_on(named: bool) -> None:
    """A person was answered in somebody else's voice, and was not told. Of a voice without a name nothing is said."""
    voices = ModelVoices(2, {int(CODES[2]) if named else 7: "a deep voice"})
    talk = Talk(engine=EngineModel(length=3), voices=voices)
    for turn in (1, 2):
        talk.turn(1)
        said = [messages.TurnVoice(turn=turn, voice="a deep voice")] if named else []
        assert talk.told() == [speaking(turn), *said, "audio 3", (turn, "end", 3)]


def test_audio_has_its_place_in_the_turn() -> None:
    talk = Talk(max_seconds=0.16)
    talk.turn()
    audio = [reply for reply in talk.replies() if isinstance(reply, AudioMessage)]
    assert [(one.turn, one.position_samples, int(one.pcm[0])) for one in audio] == [(1, 0, 1), (1, FRAME, 2)]


def test_a_last_frame_that_is_not_whole_is_heard_as_it_is() -> None:
    """The last of what was said, less than 80 ms, was never heard; or it was padded, which gave its codes to other
    words.
    """
    talk = Talk()
    talk.hear(1.5)
    talk.say(SPEAK)
    assert [len(frame) for frame in talk.engine.frames] == [FRAME, FRAME // 2]


def test_a_turn_may_have_its_own_length_and_sampling() -> None:
    """The next turn went on with the sampling of one that had its own."""
    talk = Talk()
    talk.hear()
    own = SamplingOptions(temperature=0.0)
    talk.say(Speak(turn=1, max_seconds=0.16, sampling=own))
    talk.step()
    talk.turn()
    changed = ("configure", sampling(temperature=0.0)), ("configure", sampling())
    assert talk.engine.log == [
        ("listen",),
        changed[0],
        ("speak", 2, 5),
        ("listen",),
        changed[1],
        ("speak", 250, 5),
    ]


def test_nothing_follows_from_nothing() -> None:
    talk = Talk()
    talk.say(SPEAK)
    assert the_error(talk) == ("empty_prompt", "speak")
    talk.turn(0.001)
    assert talk.told() == [speaking(), "audio 5"]


def test_a_turn_without_new_audio_goes_on() -> None:
    talk = Talk(max_seconds=0.08)
    talk.turn()
    assert talk.told() == [speaking(), "audio 1", (1, "max_seconds", 1)]
    talk.turn(0)
    assert talk.told() == [speaking(2, 0), "audio 1", (2, "max_seconds", 1)]


def test_words_for_another_turn_are_refused() -> None:
    talk = Talk()
    talk.hear()
    talk.say(Speak(turn=2))
    assert the_error(talk) == ("bad_state", "speak")
    talk.say(Interrupt(turn=1, heard_samples=0))
    assert the_error(talk) == ("bad_state", "interrupt")
    talk.say(SPEAK, SPEAK)
    assert the_error(talk) == ("bad_state", "speak")
    talk.say(InputClear())
    assert the_error(talk) == ("bad_state", "input.clear")
    talk.say(HeardByClock(2))
    assert the_error(talk) == ("bad_state", "interrupt")


def test_audio_of_a_turn_that_is_over_is_not_heard() -> None:
    """What was on its way when the machine began to speak became the next turn's prompt."""
    talk = Talk(max_seconds=0.08)
    talk.turn()
    talk.hear(turn=1)
    assert len(talk.engine.frames) == 1
    talk.hear(turn=2)
    talk.hear(turn=0)
    assert len(talk.engine.frames) == 3


def test_audio_over_the_machine_is_not_heard_in_manual_mode() -> None:
    talk = Talk()
    talk.turn()
    talk.hear(2)
    assert len(talk.engine.frames) == 1


def test_audio_of_a_turn_that_has_not_begun_ends_the_session() -> None:
    talk = Talk()
    talk.hear(turn=2)
    assert the_end(talk).code == CloseCode.INVALID_DATA


def test_audio_that_leaves_a_gap_ends_the_session() -> None:
    talk = Talk()
    talk.position = 8
    talk.hear()
    end = the_end(talk)
    assert isinstance(end.message, messages.Error)
    assert (end.message.code, end.message.fatal, end.code) == ("bad_message", True, CloseCode.INVALID_DATA)


def test_frames_of_an_old_turn_that_leave_late_are_none_of_the_next() -> None:
    """A client that read slowly and interrupted had the next turn run ahead by what was still on its way to it."""
    talk = Talk()
    talk.turn()
    talk.say(Interrupt(turn=1, heard_samples=0), SPEAK)
    for _ in range(3):
        talk.conversation.sent(1, talk.now)
    talk.say(Played(turn=2, samples=3 * FRAME))  # which it was never sent
    assert talk.counts.reports == [(2, 0, 0)]


# Taking input back


@pytest.mark.parametrize(("keep", "kept", "pending"), [(0, 0, 0), (1, 1, 0), (FRAME, 1, 0), (3 * FRAME + 9, 3, 9)])
def test_the_beginning_of_a_prompt_can_be_kept(keep: int, kept: int, pending: int) -> None:
    """A frame that holds both stays whole, and so does the beginning of one that is not full."""
    talk = Talk()
    talk.hear(3.5)
    talk.say(InputClear(keep_samples=keep))
    talk.step()
    assert talk.engine.log[3:] == [("clear_input", kept)]
    assert talk.told() == [InputCleared(turn=1, kept_samples=kept * FRAME)]
    talk.say(SPEAK)
    assert len(talk.engine.frames) == 3 + bool(pending)
    if pending:
        assert np.count_nonzero(talk.engine.frames[-1]) == pending


def test_a_prompt_of_which_not_all_could_be_taken_back_is_as_long_as_the_client_was_told() -> None:
    """The conversation took the prompt for as short as it was to be. What the client wanted kept from then on was
    beyond its end, and so a second clear took back nothing.
    """
    talk = Talk()
    talk.engine.reach = 2
    talk.hear(5)
    talk.step()
    talk.say(InputClear())
    talk.hear(1)  # before the answer
    talk.step()
    assert talk.told() == [InputCleared(turn=1, kept_samples=3 * FRAME)]
    talk.hear(2)
    talk.say(InputClear(keep_samples=4 * FRAME))
    talk.step()
    assert talk.engine.log[-1] == ("clear_input", 4)
    assert talk.told()[-1] == InputCleared(turn=1, kept_samples=4 * FRAME)


def test_a_prompt_that_was_taken_back_whole_is_empty() -> None:
    talk = Talk()
    talk.hear(1.5)
    talk.say(InputClear(), SPEAK)
    assert the_error(talk) == ("empty_prompt", "speak")


# Interruptions


def test_an_interruption_cuts_to_what_was_heard_and_counts_what_was_sent() -> None:
    """`turn.done` counted frames that were spoken and never sent, and the client waited for them."""
    talk = Talk()
    talk.turn()
    assert len(talk.replies(4)) == 4  # the beginning of the turn and three of five frames
    talk.say(Interrupt(turn=1, heard_samples=2 * FRAME + 5))
    assert talk.engine.log[-1] == ("interrupt", 1, 2 * FRAME + 5)
    talk.step()
    assert talk.told() == [(1, "interrupted", 3), interrupted(1, 2)]


def test_nobody_has_heard_what_was_not_sent() -> None:
    talk = Talk()
    talk.turn()
    talk.replies(2)
    talk.say(Interrupt(turn=1, heard_samples=10**9))
    assert talk.engine.log[-1] == ("interrupt", 1, FRAME)


def test_the_next_turn_may_begin_before_the_interruption_is_answered() -> None:
    talk = Talk()
    talk.turn()
    talk.replies()
    talk.say(Interrupt(turn=1, heard_samples=FRAME), talk.audio(FRAME, turn=2), SPEAK)
    talk.step()
    assert talk.told() == [(1, "interrupted", 5), interrupted(1, 1), speaking(2), "audio 5"]


def test_frames_of_an_interrupted_turn_that_were_on_their_way_are_not_sent() -> None:
    talk = Talk()
    talk.turn(1)
    talk.replies(1)
    late = talk.engine
    talk.say(Interrupt(turn=1, heard_samples=0))
    frame = events.FrameSpoken(1, 5, events.StepAudio(np.zeros((1, FRAME), np.float32)), 0, np.zeros(4, np.int64))
    talk.conversation.happened(frame, talk.now)
    assert talk.told() == []
    assert late.log[-1] == ("interrupt", 1, 0)


def test_a_turn_that_is_over_can_still_be_cut() -> None:
    talk = Talk(engine=EngineModel(length=3))
    talk.turn()
    assert talk.told() == [speaking(), "audio 3", (1, "end", 3)]
    talk.say(Interrupt(turn=1, heard_samples=FRAME))
    talk.step()
    assert talk.told() == [interrupted(1, 1)]


def test_the_end_of_a_turn_counts_no_audio_that_was_cut_before_it_was_sent() -> None:
    """`turn.done` waited behind audio that an interruption took out, and still counted it."""
    talk = Talk(engine=EngineModel(length=3))
    talk.turn()
    talk.replies(2)
    talk.say(Interrupt(turn=1, heard_samples=FRAME))
    talk.step()
    assert talk.told() == [(1, "end", 1), interrupted(1, 1)]


def test_the_clock_says_what_was_heard_when_the_client_does_not() -> None:
    talk = Talk()
    talk.turn()
    talk.replies()
    talk.wait(2.5 * FRAME_S)
    talk.say(HeardByClock(1))
    name, turn, heard = talk.engine.log[-1]
    assert (name, turn) == ("interrupt", 1)
    assert heard == pytest.approx(2.5 * FRAME, abs=2)


# By voice


def test_the_end_of_speech_is_the_word_to_go_on() -> None:
    talk = by_voice()
    talk.voice(*NO * 2, *SAID)
    talk.step()
    assert talk.told() == [
        SpeechStarted(turn=1, at_samples=2 * W),
        SpeechStopped(turn=1, at_samples=7 * W),
        speaking(prompt=4),
        "audio 5",
    ]


def over_the_machine(**changes: object) -> Talk:
    """A session that has sent two of its frames, a frame and a half ago, when a voice interrupts it."""
    talk = by_voice(**changes)
    talk.voice(*SAID)
    talk.step()
    talk.replies(2 + 1 + 2)
    talk.wait(1.5 * FRAME_S)
    talk.voice(*YES * 3)
    return talk


def test_a_voice_interrupts_and_the_client_says_what_it_heard() -> None:
    talk = over_the_machine()
    assert talk.told()[:1] == ["audio 3"]
    talk.wait(0.9 * HEARD_TIMEOUT_S)
    assert talk.engine.log[-1][0] == "speak"
    talk.say(Interrupt(turn=1, heard_samples=FRAME))
    talk.step()
    assert talk.engine.log[-2:] == [("interrupt", 1, FRAME), ("listen",)]
    assert talk.told() == [(1, "interrupted", 5), interrupted(1, 1)]
    talk.wait(2 * HEARD_TIMEOUT_S)
    assert talk.engine.log[-1] == ("listen",), "the clock interrupted a second time"
    talk.voice(*NO * 3)
    talk.step()
    assert talk.told()[0].turn == 2


def test_a_voice_interrupts_and_the_client_says_nothing() -> None:
    """What was heard is what the clock had played when the client was told to stop."""
    talk = over_the_machine()
    talk.wait(HEARD_TIMEOUT_S + 0.001)
    name, turn, heard = talk.engine.log[-1]
    assert (name, turn) == ("interrupt", 1)
    assert heard == pytest.approx(1.5 * FRAME, abs=2)
    talk.step()
    assert talk.told()[-2:] == [(1, "interrupted", 2), interrupted(1, 1)]
    assert talk.engine.log[-1] == ("listen",)


def test_a_client_that_never_says_what_it_heard_has_heard_what_was_sent() -> None:
    talk = over_the_machine(sent_is_heard=True)
    assert talk.engine.log[-1] == ("interrupt", 1, 2 * FRAME)
    talk.step()
    assert talk.told() == [SpeechStarted(turn=1, at_samples=8 * W), (1, "interrupted", 2), interrupted(1, 2)]


def test_a_voice_over_the_end_of_a_turn_interrupts_its_playback() -> None:
    talk = by_voice(max_seconds=0.16)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.voice(*YES * 3)
    assert talk.told() == [SpeechStarted(turn=1, at_samples=8 * W)]
    talk.wait(HEARD_TIMEOUT_S)
    assert talk.engine.log[-1] == ("interrupt", 1, 0)


def test_once_all_was_played_a_voice_is_a_turn_of_its_own() -> None:
    talk = by_voice(max_seconds=0.16)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.wait(3 * FRAME_S)
    talk.voice(*YES * 3)
    assert talk.told() == [SpeechStarted(turn=2, at_samples=8 * W)]
    talk.wait(2 * HEARD_TIMEOUT_S)
    assert talk.told() == []


def test_without_respond_the_end_of_speech_is_told_and_nothing_follows() -> None:
    talk = by_voice()
    talk.say(SessionUpdate(vad=VadOptions(silence_ms=96, prefix_ms=0, respond=False)))
    talk.replies()
    talk.voice(*SAID)
    talk.step()
    assert talk.told() == [SpeechStarted(turn=1, at_samples=0), SpeechStopped(turn=1, at_samples=5 * W)]
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [speaking(prompt=4), "audio 5"]


def test_two_speeches_in_one_message_are_two_speeches() -> None:
    """Without `respond`, the second was taken for an interruption of a turn that never was, and the session failed."""
    talk = Talk(turn_taking="vad", vad=VadOptions(silence_ms=96, prefix_ms=0, respond=False))
    talk.voice(*SAID, *SAID)
    assert talk.told() == [
        SpeechStarted(turn=1, at_samples=0),
        SpeechStopped(turn=1, at_samples=5 * W),
        SpeechStarted(turn=1, at_samples=8 * W),
        SpeechStopped(turn=1, at_samples=13 * W),
    ]


def test_clearing_takes_back_the_speech_that_is_being_heard() -> None:
    """What was said before that speech stays."""
    talk = Talk(turn_taking="vad", vad=VadOptions(silence_ms=96, prefix_ms=0, respond=False))
    talk.voice(*SAID)
    talk.voice(*YES * 5)
    talk.step()
    talk.replies()
    talk.say(InputClear())
    talk.step()
    assert talk.told() == [InputCleared(turn=1, kept_samples=3 * FRAME)]
    talk.voice(*NO * 5)
    talk.say(InputClear())
    talk.step()
    assert talk.told() == [InputCleared(turn=1, kept_samples=3 * FRAME)], "nothing was being said"


def test_input_that_is_cleared_while_an_interruption_is_under_way_is_not_answered() -> None:
    """The cut was followed at once by a turn with an empty prompt."""
    talk = over_the_machine()
    talk.say(Interrupt(turn=1, heard_samples=FRAME), InputClear())
    talk.voice(*NO * 4)
    talk.step()
    assert talk.engine.log[-2:] == [("interrupt", 1, FRAME), ("clear_input", 0)]
    assert talk.told()[-3:] == [(1, "interrupted", 2), interrupted(1, 1), InputCleared(turn=2, kept_samples=0)]
    talk.voice(*SAID)
    talk.step()
    assert SpeechStarted(turn=2, at_samples=15 * W) in talk.told()


def test_a_client_may_not_speak_before_it_has_said_what_it_heard() -> None:
    """The clock's word on the old turn, when it came, interrupted the new one."""
    talk = by_voice(max_seconds=0.16)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.voice(*YES * 3)
    talk.say(InputClear(), SPEAK)
    talk.step()
    *_, error, cleared = talk.replies()
    assert isinstance(error, messages.Error)
    assert (error.code, error.in_reply_to, cleared) == ("bad_state", "speak", InputCleared(turn=2, kept_samples=0))
    talk.wait(HEARD_TIMEOUT_S)
    talk.step()
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [interrupted(1, 0), speaking(2, 0), "audio 2", (2, "max_seconds", 2)]


def test_a_command_to_speak_ends_what_is_being_heard() -> None:
    talk = by_voice()
    talk.voice(*YES * 5)
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [
        SpeechStarted(turn=1, at_samples=0),
        SpeechStopped(turn=1, at_samples=5 * W),
        speaking(prompt=2),
        "audio 5",
    ]


def test_a_command_to_speak_during_playback_takes_the_rest_for_heard() -> None:
    talk = by_voice(max_seconds=0.16)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [speaking(2, 0), "audio 2", (2, "max_seconds", 2)]


def test_a_speech_that_the_engine_had_no_room_for_leaves_the_session_listening() -> None:
    """The turn taker waited for the end of a turn that had not begun, for ever."""
    talk = Talk(turn_taking="vad", vad=VAD, engine=EngineModel(room=0))
    talk.voice(*SAID, *YES * 3)
    assert [type(reply) for reply in talk.replies()] == [
        SpeechStarted,
        InputDropped,
        SpeechStopped,
        InputDropped,
        messages.Error,
        SpeechStarted,
        InputDropped,
    ]
    talk.engine.room = 25
    talk.voice(*YES * 5, *NO * 3)
    talk.step()
    assert speaking(prompt=4) in talk.told()


# Waiting for room


def test_commands_wait_behind_the_frames_that_the_engine_has_no_room_for() -> None:
    """An interruption overtook the turn that it was for."""
    talk = Talk(engine=EngineModel(room=2), lag="wait")
    talk.hear(4)
    assert talk.engine.log == [("listen",)] * 2
    assert not talk.conversation.ready
    talk.step(2)
    assert talk.conversation.ready
    talk.say(Speak(turn=0, sampling=SamplingOptions(temperature=0.0)))
    assert talk.engine.log[4:] == [("configure", sampling(temperature=0.0)), ("speak", 250, 5)]
    talk.step()
    assert talk.told() == [speaking(prompt=4), "audio 5"]


def test_what_is_said_behind_a_full_engine_takes_effect_in_order() -> None:
    talk = Talk(engine=EngineModel(room=2), lag="wait")
    talk.hear(2.5)
    talk.say(Speak(turn=0, sampling=SamplingOptions(temperature=0.0)))
    assert talk.engine.log == [("listen",)] * 2
    talk.conversation.receive(Interrupt(turn=1, heard_samples=0), talk.now)  # though it is not ready
    talk.step()
    assert talk.engine.log == [
        ("listen",),
        ("listen",),
        ("listen",),
        ("configure", sampling(temperature=0.0)),
        ("speak", 250, 5),
        ("interrupt", 1, 0),
    ]
    assert talk.told() == [speaking(prompt=3), (1, "interrupted", 0), interrupted(1, 0)]


def test_a_live_client_loses_what_the_engine_has_no_room_for() -> None:
    talk = Talk(engine=EngineModel(room=2))
    talk.hear(5)
    assert talk.told() == [InputDropped(turn=1, samples=3 * FRAME)]
    assert talk.conversation.ready
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [speaking(prompt=2), "audio 5"]


def test_a_fast_client_loses_nothing() -> None:
    talk = Talk(engine=EngineModel(room=2), pace="fast", lag="drop")
    talk.hear(5)
    talk.step()
    assert talk.told() == []
    assert len(talk.engine.frames) == 5


def test_what_was_said_without_a_connection_is_not_dropped() -> None:
    """What was said meanwhile comes faster than it was said: the client lost what it had kept for just this."""
    talk = Talk(engine=EngineModel(room=2))
    talk.conversation.expect_replay(5 * FRAME)
    talk.hear(5)
    assert talk.told() == []
    talk.step()
    assert len(talk.engine.frames) == 5
    talk.hear(3)
    assert talk.told() == [InputDropped(turn=1, samples=FRAME)]


def test_a_client_is_told_once_a_second_that_the_engine_lags() -> None:
    talk = Talk()
    talk.hear(events.QUEUED_FRAMES // 2)
    lagging = InputLagging(turn=1, behind_ms=80.0 * (events.QUEUED_FRAMES // 2))
    assert talk.told() == [lagging]
    talk.hear(1)
    assert talk.told() == []
    talk.wait(1.0)
    talk.hear(1)
    assert [type(reply) for reply in talk.replies()] == [InputLagging]


def test_no_message_is_taken_while_too_many_replies_wait() -> None:
    talk = Talk()
    for number in range(MAX_UNSENT):
        talk.say(messages.Ping(id=number, client_time_ms=1.0))
    assert not talk.conversation.ready
    assert talk.replies(1) == [messages.Pong(id=0, client_time_ms=1.0, server_time_ms=1e5)]
    assert talk.conversation.ready


# Pacing


def test_the_engine_runs_on_as_the_client_says_that_it_plays() -> None:
    talk = Talk()
    talk.turn()
    assert talk.told() == [speaking(), "audio 5"]
    talk.say(Played(turn=1, samples=2 * FRAME, underruns=3))
    talk.step()
    assert talk.told() == ["audio 2"]
    assert talk.counts.reports == [(1, 3, 5)]
    talk.wait(10.0)
    talk.step()
    assert talk.told() == [], "the clock counts no more once the client says"
    talk.say(Played(turn=2, samples=5 * FRAME))
    talk.step()
    assert talk.told() == []
    assert len(talk.counts.reports) == 1


def test_the_engine_runs_on_by_the_clock_for_a_client_that_never_says() -> None:
    talk = Talk()
    talk.turn()
    talk.replies()
    talk.wait(2.5 * FRAME_S)
    talk.step()
    assert talk.told() == ["audio 2"]


def test_at_fast_pace_what_is_sent_is_played() -> None:
    talk = Talk(pace="fast")
    talk.turn()
    assert talk.told() == [speaking(), "audio 16"]
    talk.step()
    assert talk.told() == ["audio 16"]
    talk.wait(1.0)
    talk.step()
    assert talk.told() == ["audio 16"]


def test_at_fast_pace_and_by_voice_a_turn_is_over_when_it_is_sent() -> None:
    talk = by_voice(pace="fast", max_seconds=0.16)
    talk.voice(*SAID)
    talk.step()
    talk.replies()
    talk.voice(*YES * 3)
    assert talk.told() == [SpeechStarted(turn=2, at_samples=8 * W)]


# Settings


def test_settings_take_effect_with_the_next_turn() -> None:
    talk = Talk()
    talk.hear()
    talk.say(SessionUpdate(max_seconds=0.16, sampling=SamplingOptions(top_k=5)))
    updated = messages.SessionUpdated(
        max_seconds=0.16, sampling=filled(SamplingOptions(top_k=5), sampling()), turn_taking="manual", vad=VadOptions()
    )
    assert talk.told() == [updated]
    talk.say(SPEAK)
    assert talk.engine.log[1:] == [("configure", sampling(top_k=5)), ("speak", 2, 5)]


def test_turns_are_taken_by_voice_from_here_on() -> None:
    talk = Talk()
    talk.hear(0.5)
    talk.say(SessionUpdate(turn_taking="vad", vad=VAD))
    assert talk.conversation.hears_voice
    talk.replies()
    talk.voice(*SAID)
    assert talk.told() == [
        SpeechStarted(turn=1, at_samples=FRAME // 2),
        SpeechStopped(turn=1, at_samples=FRAME // 2 + 5 * W),
    ]


def test_a_voice_may_interrupt_a_turn_that_was_begun_by_hand() -> None:
    talk = Talk()
    talk.turn()
    talk.replies()
    talk.say(SessionUpdate(turn_taking="vad", vad=VAD))
    talk.replies()
    talk.voice(*YES * 3)
    assert talk.told() == [SpeechStarted(turn=1, at_samples=FRAME)]


def test_by_hand_again_what_is_being_said_begins_the_prompt() -> None:
    talk = by_voice()
    talk.voice(*YES * 5)
    talk.say(SessionUpdate(turn_taking="manual"))
    assert not talk.conversation.hears_voice
    assert [type(reply) for reply in talk.replies()] == [SpeechStarted, SpeechStopped, messages.SessionUpdated]
    talk.hear()
    talk.say(SPEAK)
    talk.step()
    assert talk.told() == [speaking(prompt=3), "audio 5"]


@pytest.mark.parametrize("said", [True, False])
def test_by_hand_again_in_the_midst_of_an_interruption(said: bool) -> None:
    """Where the client had said already what it heard, the clock cut the turn a second time and shorter."""
    talk = over_the_machine()
    if said:
        talk.say(Interrupt(turn=1, heard_samples=2 * FRAME))
    talk.say(SessionUpdate(turn_taking="manual"))
    cuts = [command for command in talk.engine.log if command[0] == "interrupt"]
    assert len(cuts) == 1
    assert cuts[0][2] == (2 * FRAME if said else pytest.approx(1.5 * FRAME, abs=2))
    kinds = [type(reply) for reply in talk.replies() if not isinstance(reply, AudioMessage)]
    assert kinds == [SpeechStarted, SpeechStopped, messages.SessionUpdated]
    talk.wait(2 * HEARD_TIMEOUT_S)
    talk.step()
    talk.say(SPEAK)
    talk.step()
    assert speaking(2, 2) in talk.told(), "what was held is the beginning of the prompt"


def test_by_hand_again_while_the_machine_speaks_it_goes_on() -> None:
    talk = by_voice()
    talk.voice(*SAID)
    talk.step()
    talk.say(SessionUpdate(turn_taking="manual"))
    talk.replies()
    talk.wait(FRAME_S)
    talk.step()
    assert talk.told() == ["audio 1"]


def test_by_hand_again_in_silence() -> None:
    talk = by_voice()
    talk.voice(*NO * 5)
    talk.say(SessionUpdate(turn_taking="manual"))
    assert [type(reply) for reply in talk.replies()] == [messages.SessionUpdated]


# Errors and ends


def test_what_is_not_known_is_answered_and_what_is_damaged_ends_the_session() -> None:
    talk = Talk()
    talk.say(UnknownTypeError("sing", frozenset({"speak"})))
    assert the_error(talk) == ("unknown_type", "sing")
    talk.say(messages.SessionStart())
    assert the_error(talk) == ("bad_state", "session.start")
    talk.say(ProtocolError("not JSON"))
    assert the_end(talk).code == CloseCode.INVALID_DATA


def test_a_prompt_too_long_is_fatal_whoever_tells_it_first() -> None:
    """The engine refused the next frame before its event came: the client was told of an error that it could mend."""
    talk = Talk()
    talk.engine.failure = PromptTooLongError("too long")
    talk.hear()
    end = the_end(talk)
    assert isinstance(end.message, messages.Error)
    assert (end.message.code, end.code) == ("prompt_too_long", CloseCode.POLICY_VIOLATION)
    talk = Talk()
    talk.conversation.happened(events.Failed(PromptTooLongError("too long")), talk.now)
    assert the_end(talk) == end


def test_a_step_that_failed_ends_the_session() -> None:
    talk = Talk()
    talk.turn()
    talk.engine.failure = StepFailedError("the step failed")
    talk.say(Interrupt(turn=1, heard_samples=0))
    assert the_end(talk).code == CloseCode.INTERNAL_ERROR


def test_a_failed_engine_ends_the_session_from_an_event_and_from_the_clock() -> None:
    talk = over_the_machine()
    talk.engine.failure = StepFailedError("the step failed")
    talk.wait(HEARD_TIMEOUT_S)
    assert the_end(talk).code == CloseCode.INTERNAL_ERROR
    talk = Talk(engine=EngineModel(room=1), lag="wait")
    talk.hear(2)
    talk.engine.failure = StepFailedError("the step failed")
    talk.step()
    assert the_end(talk).code == CloseCode.INTERNAL_ERROR


def test_after_the_end_nothing_happens() -> None:
    talk = Talk()
    talk.turn()
    talk.replies()
    talk.conversation.receive(messages.SessionClose(), talk.now)
    assert talk.replies() == [CLIENT_LEFT]
    talk.conversation.finish(End(None, 1000, "later"))
    talk.conversation.receive(SPEAK, talk.now)
    talk.conversation.happened(events.Failed(StepFailedError("late")), talk.now)
    talk.conversation.tick(talk.now + 1000)
    assert talk.replies() == []
    assert talk.conversation.end is CLIENT_LEFT


def test_an_echo_comes_out_where_it_went_in() -> None:
    talk = Talk()
    token = object()
    talk.say(messages.Ping(id=1, client_time_ms=0.0), Echo(token), messages.Ping(id=2, client_time_ms=0.0))
    _, echo, _ = talk.replies()
    assert isinstance(echo, Echo)
    assert echo.token is token


def test_a_session_that_listens_is_drained_at_once() -> None:
    talk = Talk()
    talk.hear()
    talk.conversation.drain()
    assert the_end(talk).code == CloseCode.GOING_AWAY


def test_a_session_that_speaks_is_drained_when_its_turn_is_over() -> None:
    talk = Talk(max_seconds=0.16)
    talk.hear()
    talk.say(SPEAK)
    talk.conversation.drain()
    assert talk.conversation.end is None
    talk.step()
    *told, end = talk.told()
    assert told == [speaking(), "audio 2", (1, "max_seconds", 2)]
    assert end is talk.conversation.end


def test_the_end_of_the_turn_before_does_not_end_a_session_that_is_being_drained() -> None:
    """A turn was interrupted and the next one begun: the end of the first was taken for that of the second."""
    talk = Talk(max_seconds=0.48)
    talk.turn()
    talk.replies()
    talk.say(Interrupt(turn=1, heard_samples=0), SPEAK)
    talk.conversation.drain()
    talk.step(3)
    assert talk.conversation.end is None
    talk.wait(2.0)
    while talk.conversation.end is None:
        talk.replies()
        talk.wait(1.0)
        talk.step()
    assert untimed(talk.replies()[-2]) == (2, "max_seconds", 6)


def test_a_client_that_does_nothing_is_told_goodbye() -> None:
    talk = Talk(idle_s=5.0)
    talk.wait(4.9)
    talk.hear()
    talk.wait(4.9)
    assert talk.conversation.end is None
    talk.wait(0.2)
    end = the_end(talk)
    assert (end.message, end.code) == (messages.SessionClosed(reason="idle"), CloseCode.NORMAL)


def test_who_is_spoken_to_is_not_idle() -> None:
    """A client that only listened was told goodbye as soon as the turn was over."""
    talk = Talk(idle_s=5.0, pace="fast")
    talk.turn()
    talk.say(Played(turn=1, samples=0))
    talk.wait(9.9)
    assert talk.conversation.end is None
    talk.engine.length = 16
    talk.replies()
    talk.step()
    talk.wait(4.9)
    assert talk.conversation.end is None
    talk.wait(0.2)
    assert talk.conversation.end is not None
