"""Turn taking: the edges of speech and the policy, with scripted probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio import SPEECH_WINDOW
from streaming.conversation.turn_taking import (
    MAX_HELD_MS,
    SAMPLES_PER_MS,
    Action,
    BargeIn,
    Listen,
    Speak,
    SpeechDetector,
    SpeechEdge,
    SpeechStarted,
    SpeechStopped,
    TurnState,
    TurnTaker,
)
from streaming.protocol.messages import VadOptions

Pcm = npt.NDArray[np.float32]

W = SPEECH_WINDOW
PROMPT = Path(__file__).parents[2] / "examples" / "prompt.wav"
OPTIONS = VadOptions(silence_ms=160, prefix_ms=64)  # 5 windows of silence, 2 of prefix; 3 windows are speech
PREFIX = 64 * SAMPLES_PER_MS
NO, YES = [0.0], [0.9]


def positions(windows: float, start: int = 0) -> Pcm:
    """Input whose samples are their own positions: float32 is exact up to 16 million."""
    return np.arange(start, start + round(windows * W), dtype=np.float32)


def edges(script: Sequence[float], options: VadOptions = OPTIONS) -> list[SpeechEdge]:
    return SpeechDetector(options).push(script)


class Scripted:
    """A TurnTaker over a script, the input so far, and what came out with its `Listen`s joined."""

    def __init__(self, script: Sequence[float], options: VadOptions = OPTIONS) -> None:
        self.taker = TurnTaker(options)
        self.script = script
        self.position = 0
        self.log: list[Action] = []

    def hear(self, windows: float) -> list[Action]:
        return self.record(self.push(round(windows * W)))

    def push(self, samples: int) -> list[Action]:
        """So much more of the input, with the script's probability of each window that it completes."""
        pcm = positions(samples / W, self.position)
        before, self.position = self.position, self.position + len(pcm)
        return self.taker.push(pcm, self.script[before // W : self.position // W])

    def interrupted(self) -> list[Action]:
        return self.record(self.taker.interrupted())

    def record(self, actions: list[Action]) -> list[Action]:
        """The actions as logged; a first `Listen` that goes on from the last one is returned whole, with it."""
        start = len(self.log)
        for action in actions:
            last = self.log[-1] if self.log else None
            if isinstance(action, Listen) and isinstance(last, Listen):
                assert action.at_samples == last.at_samples + len(last.pcm)
                start = min(start, len(self.log) - 1)
                self.log[-1] = Listen(np.concatenate((last.pcm, action.pcm)), last.at_samples)
            else:
                self.log.append(action)
        return self.log[start:]


def plain(actions: Sequence[Action]) -> list[object]:
    """Actions that compare: a `Listen` becomes the slice of the input that it holds."""
    result: list[object] = []
    for action in actions:
        if isinstance(action, Listen):
            stop = action.at_samples + len(action.pcm)
            np.testing.assert_array_equal(action.pcm, np.arange(action.at_samples, stop, dtype=np.float32))
            result.append(slice(action.at_samples, stop))
        else:
            result.append(action)
    return result


# Edges of speech


def test_speech_starts_at_its_first_window_once_it_is_long_enough() -> None:
    """The onset is where the sound began, not where it was found to be speech."""
    assert edges(NO * 4 + YES * 3) == [SpeechEdge(True, 4 * W, 7 * W)]


def test_a_blip_starts_nothing() -> None:
    """A click or a cough of 64 ms opened a turn; blips in a row must not add up to speech either."""
    assert edges((NO * 2 + YES * 2) * 8) == []


def test_a_blip_restarts_the_count_of_silence() -> None:
    """Silence is contiguous: 4 windows, a sound, 4 windows are not 5 windows of silence."""
    assert edges(YES * 3 + (NO * 4 + YES) * 6)[1:] == []


def test_speech_is_entered_at_the_threshold_and_left_below_threshold_minus_hysteresis() -> None:
    """A probability that hovers around one threshold cut words to pieces."""
    assert edges([0.49] * 20) == []
    assert edges([0.5] * 3) == [SpeechEdge(True, 0, 3 * W)]
    assert edges([0.5] + [0.36] * 30) == [SpeechEdge(True, 0, 3 * W)]
    assert edges([0.5] * 3 + [0.34] + [0.49] * 4) == [SpeechEdge(True, 0, 3 * W), SpeechEdge(False, 3 * W, 8 * W)]


def test_a_threshold_below_the_hysteresis_still_ends_speech() -> None:
    """`threshold - 0.15` was negative, no probability lies below it, and speech never ended."""
    low = VadOptions(threshold=0.1, silence_ms=160)
    assert edges(YES * 3 + NO * 5, low) == [SpeechEdge(True, 0, 3 * W), SpeechEdge(False, 3 * W, 8 * W)]


@pytest.mark.parametrize(("silence_ms", "windows"), [(80, 3), (160, 5), (161, 6), (480, 15), (500, 16)])
def test_silence_of_exactly_silence_ms_ends_speech_and_a_window_less_does_not(silence_ms: int, windows: int) -> None:
    """The end of speech was off by one window. A silence_ms between windows rounds up."""
    options = VadOptions(silence_ms=silence_ms)
    assert edges(YES * 3 + NO * (windows - 1) + YES * 20, options)[1:] == []
    assert edges(YES * 3 + NO * windows, options)[1:] == [SpeechEdge(False, 3 * W, (3 + windows) * W)]


# The policy


def test_a_prompt_is_the_prefix_the_speech_and_the_silence_that_ended_it() -> None:
    """The first sounds of a word are quieter than the threshold: without a prefix they were lost."""
    talk = Scripted(NO * 6 + YES * 4 + NO * 6)
    assert plain(talk.hear(16)) == [
        SpeechStarted(6 * W),
        slice(6 * W - PREFIX, 15 * W),
        SpeechStopped(10 * W),
        Speak(),
    ]
    assert talk.taker.state is TurnState.SPEAKING


def test_audio_in_speech_is_handed_out_at_once_and_not_window_by_window() -> None:
    """Waiting for whole windows would add up to 32 ms to every frame of a prompt."""
    talk = Scripted(YES * 9)
    talk.hear(3)
    assert plain(talk.hear(0.25)) == [slice(0, round(3.25 * W))]


def test_the_prefix_never_repeats_what_the_last_prompt_held() -> None:
    """With a prefix longer than the pause, the end of the last prompt was heard twice."""
    options = VadOptions(silence_ms=80, prefix_ms=2_000, barge_in=False)
    talk = Scripted(YES * 3 + NO * 3 + YES * 3, options)
    talk.hear(6)
    talk.taker.speaking_ended()
    assert plain(talk.hear(3)) == [SpeechStarted(6 * W), slice(6 * W, 9 * W)]


def speaking(rest: Sequence[float], options: VadOptions = OPTIONS) -> Scripted:
    """A conversation in which the machine has begun to speak, 8 windows in."""
    talk = Scripted(YES * 3 + NO * 5 + list(rest), options)
    talk.hear(8)
    assert talk.taker.state is TurnState.SPEAKING
    talk.log.clear()
    return talk


def test_barge_in_is_told_at_once_and_its_audio_waits_for_the_cut() -> None:
    """Audio fed before the context was cut would be forgotten by the cut, and with it the first words."""
    talk = speaking(NO * 10 + YES * 10)
    assert plain(talk.hear(17)) == [BargeIn(18 * W)]
    assert plain(talk.interrupted()) == [slice(18 * W - PREFIX, 25 * W)]
    assert plain(talk.hear(1)) == [slice(18 * W - PREFIX, 26 * W)]
    assert talk.taker.state is TurnState.HEARING


def test_speech_that_ends_while_the_context_is_cut_is_answered_after_the_cut() -> None:
    """A short "no!" was over before `interrupted()` came: the turn hung in HEARING until the next word."""
    talk = speaking(NO * 10 + YES * 3 + NO * 7)
    assert plain(talk.hear(20)) == [BargeIn(18 * W)]
    assert plain(talk.interrupted()) == [
        slice(18 * W - PREFIX, 28 * W),
        SpeechStopped(21 * W),
        Speak(),
    ]


def test_speech_that_pauses_while_the_context_is_cut_is_one_prompt() -> None:
    """A second onset during the cut reported a second barge-in, and its prefix replaced the first words."""
    talk = speaking(NO * 10 + YES * 3 + NO * 6 + YES * 3)
    assert plain(talk.hear(22)) == [BargeIn(18 * W)]
    assert plain(talk.interrupted()) == [slice(18 * W - PREFIX, 30 * W)]
    assert talk.taker.state is TurnState.HEARING


def test_held_audio_is_bounded_and_keeps_the_newest() -> None:
    """An owner that never answered a barge-in made the session grow for as long as the microphone was open."""
    limit = MAX_HELD_MS * SAMPLES_PER_MS
    talk = speaking(NO * 10 + YES * 600)
    for _ in range(240):
        talk.hear(2.5)
        assert len(talk.taker._recent) <= limit
    [held] = talk.interrupted()
    assert plain([held]) == [slice(talk.position - limit, talk.position)]
    assert plain(talk.hear(1)) == [slice(talk.position - W - limit, talk.position)]


def test_what_is_kept_without_speech_is_the_prefix_and_the_shortest_speech() -> None:
    """An idle session must not remember the whole evening."""
    talk = Scripted(NO * 200)
    for _ in range(80):
        assert talk.hear(2.5) == []
        assert len(talk.taker._recent) <= (64 + 96) * SAMPLES_PER_MS


def test_without_barge_in_speech_over_the_machine_is_ignored() -> None:
    """An echo of the machine's own voice made it interrupt itself."""
    talk = speaking(YES * 6 + NO * 10, VadOptions(silence_ms=160, barge_in=False))
    assert talk.hear(12) == []
    talk.taker.speaking_ended()
    assert talk.hear(4) == []
    assert talk.taker.state is TurnState.IDLE


def test_speech_that_outlasts_the_machine_begins_a_prompt_where_it_ended() -> None:
    """No onset comes for speech that is already on: the person had to stop and start again to be heard."""
    talk = speaking(YES * 12 + NO * 5, VadOptions(silence_ms=160, prefix_ms=64, barge_in=False))
    assert talk.hear(6) == []
    talk.taker.speaking_ended()
    assert plain(talk.hear(11)) == [
        SpeechStarted(14 * W),
        slice(14 * W - PREFIX, 25 * W),
        SpeechStopped(20 * W),
        Speak(),
    ]


def test_a_pause_for_breath_at_the_machines_end_is_not_taken_for_speech() -> None:
    """Speech that ended just before the machine did made a prompt of nothing but silence; so did a blip after it."""
    talk = speaking(YES * 6 + NO * 3 + YES + NO * 7, VadOptions(silence_ms=160, barge_in=False))
    talk.hear(9)  # the detector still calls it speech: the silence is 3 windows long
    talk.taker.speaking_ended()
    assert talk.hear(8) == []


def test_an_interruption_without_a_voice_leaves_the_session_listening() -> None:
    """A client may send `interrupt` of its own accord (a key); nothing is held then, and nothing is to be released."""
    talk = speaking(NO * 2 + YES * 3)
    talk.hear(2)
    assert talk.interrupted() == []
    assert talk.taker.state is TurnState.IDLE
    assert plain(talk.hear(3))[0] == SpeechStarted(10 * W)


def test_the_end_of_playback_does_not_replace_the_cut() -> None:
    """The machine's turn ran out between barge-in and cut: the held audio was released into the uncut context."""
    talk = speaking(YES * 6)
    talk.hear(4)
    talk.taker.speaking_ended()
    assert talk.taker.state is TurnState.INTERRUPTING
    assert plain(talk.interrupted()) == [slice(8 * W, 12 * W)]


def test_audio_that_was_handed_out_is_not_the_callers_buffer() -> None:
    """A microphone callback reuses its buffer: held audio changed under the owner's hands."""
    taker = TurnTaker(OPTIONS)
    buffer = np.ones(3 * W, np.float32)
    listen = taker.push(buffer, YES * 3)[-1]
    buffer[:] = 0
    assert isinstance(listen, Listen)
    assert listen.pcm.all()


# Properties

scripts = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.9]), st.integers(1, 9)), min_size=1, max_size=20
).map(lambda runs: [p for p, length in runs for _ in range(length)])
calls = st.lists(st.tuples(st.integers(0, 120 * W), st.sampled_from(["ended", "interrupted"])), max_size=12)
cuts = st.lists(st.integers(0, 120 * W), max_size=40)
all_options = st.builds(
    VadOptions,
    silence_ms=st.integers(80, 400),
    prefix_ms=st.integers(0, 500),
    barge_in=st.booleans(),
    respond=st.booleans(),
)


def converse(script: list[float], options: VadOptions, calls: list[tuple[int, str]], cuts: list[int]) -> list[object]:
    """Push the script's audio cut at `cuts`, with the owner's calls at their positions: actions and calls in order."""
    talk = Scripted(script, options)
    end = len(script) * W
    result: list[object] = []
    for at, call in sorted([*calls, *((cut, "") for cut in cuts), (end, "")]):
        if at > end:
            break
        result += talk.push(at - talk.position)
        if call:
            result.append(call)
        if call == "ended":
            talk.taker.speaking_ended()
        elif call == "interrupted":
            result += talk.taker.interrupted()
    return result


def joined(log: list[object]) -> list[object]:
    """The log with each run of `Listen`s as one slice of the input."""
    result: list[object] = []
    for entry in log:
        if isinstance(entry, Listen):
            start, stop = entry.at_samples, entry.at_samples + len(entry.pcm)
            last = result[-1] if result else None
            if isinstance(last, slice) and last.stop == start:
                result[-1] = slice(last.start, stop)
            else:
                result.append(slice(start, stop))
        else:
            result.append(entry)
    return result


@settings(deadline=None, max_examples=300)
@given(scripts, all_options, calls, cuts)
def test_any_cut_of_the_input_gives_the_same_actions(
    script: list[float], options: VadOptions, calls: list[tuple[int, str]], cuts: list[int]
) -> None:
    """An edge inside a long message took effect at the message's end: the network decided the prompt's length."""
    cut_at_calls = [at for at, _ in calls]  # an owner's call falls between two pushes in any case
    assert joined(converse(script, options, calls, cut_at_calls)) == joined(converse(script, options, calls, cuts))


@settings(deadline=None, max_examples=300)
@given(scripts, all_options, calls, cuts)
def test_prompts_are_contiguous_slices_in_order_and_never_come_over_the_machine(
    script: list[float], options: VadOptions, calls: list[tuple[int, str]], cuts: list[int]
) -> None:
    """Pins samples that are lost, repeated, or fed to a context that is speaking or not yet cut."""
    state = "idle"  # by the actions and calls alone
    fed = 0
    for entry in converse(script, options, calls, cuts):
        match entry:
            case SpeechStarted(at) | BargeIn(at):
                barge_in = isinstance(entry, BargeIn)
                assert state == ("speaking" if barge_in else "idle")
                assert options.barge_in or not barge_in
                state = "interrupting" if barge_in else "hearing"
                fed = max(fed, at - options.prefix_ms * SAMPLES_PER_MS)
            case Listen(pcm, at):
                assert (state, at) == ("hearing", fed)
                np.testing.assert_array_equal(pcm, np.arange(at, at + len(pcm), dtype=np.float32))
                fed += len(pcm)
            case SpeechStopped(at):
                assert state == "hearing"
                assert fed - at >= options.silence_ms * SAMPLES_PER_MS
                state = "stopped" if options.respond else "idle"
            case Speak():
                assert state == "stopped"
                state = "speaking"
            case "ended" | "interrupted" if state == "speaking":
                state = "idle"
            case "interrupted" if state == "interrupting":
                state = "hearing"


def test_a_command_to_speak_ends_what_is_being_heard() -> None:
    """Whoever shows that somebody speaks must learn that nobody is listened to any more."""
    talk = Scripted(YES * 6 + NO * 8 + YES * 4)
    talk.hear(5)
    assert talk.record(talk.taker.speak()) == [SpeechStopped(5 * W)]
    assert plain(talk.hear(9)) == [], "the rest of it is no new speech"
    assert talk.hear(4) == [BargeIn(14 * W)]


def test_a_command_to_speak_in_silence_says_nothing() -> None:
    talk = Scripted(NO * 4)
    talk.hear(4)
    assert talk.taker.speak() == []
    assert talk.taker.state is TurnState.SPEAKING


def test_cleared_input_is_never_heard() -> None:
    """It is not heard even as the prefix of what follows. Who goes on speaking is heard from there."""
    talk = Scripted(NO * 4 + YES * 12)
    talk.hear(8)
    talk.taker.clear()
    assert talk.taker.state is TurnState.IDLE
    assert plain(talk.hear(6))[:2] == [SpeechStarted(8 * W), slice(8 * W, 14 * W)]


def test_input_that_is_cleared_while_the_context_is_cut_is_never_heard() -> None:
    """The cut was followed by `Speak`: the machine answered what had been taken back."""
    talk = speaking(NO * 10 + YES * 6 + NO * 10 + YES * 4)
    assert plain(talk.hear(14)) == [BargeIn(18 * W)]
    talk.taker.clear()
    assert plain(talk.hear(4)) == []
    assert plain(talk.interrupted()) == []
    assert talk.taker.state is TurnState.IDLE
    assert plain(talk.hear(12))[0] == SpeechStarted(34 * W)


def test_without_respond_the_end_of_speech_leaves_the_session_listening() -> None:
    """The next speech in the same push was taken for a barge-in, over a machine that was silent."""
    talk = Scripted((YES * 3 + NO * 5) * 2, VadOptions(silence_ms=160, prefix_ms=0, respond=False))
    assert plain(talk.hear(16)) == [
        SpeechStarted(0),
        slice(0, 8 * W),
        SpeechStopped(3 * W),
        SpeechStarted(8 * W),
        slice(8 * W, 16 * W),
        SpeechStopped(11 * W),
    ]
    assert talk.taker.state is TurnState.IDLE


def test_options_change_in_mid_stream() -> None:
    """A new detector would count positions from zero again, and forget that somebody is speaking."""
    talk = Scripted(YES * 4 + NO * 20)
    talk.hear(4)
    talk.taker.configure(VadOptions(silence_ms=320, prefix_ms=64))
    assert all(isinstance(action, Listen) for action in talk.hear(9))
    assert talk.hear(2)[-2:] == [SpeechStopped(4 * W), Speak()]


def test_positions_go_on_from_where_turn_taking_begins() -> None:
    """Turn taking that was switched on in mid-session told positions of an input of its own."""
    taker = TurnTaker(OPTIONS, 100 * W)
    assert plain(taker.push(positions(3, 100 * W), YES * 3)) == [SpeechStarted(100 * W), slice(100 * W, 103 * W)]
