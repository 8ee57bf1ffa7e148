"""A session's commands and turns, with the steps done by hand: no thread, so every interleaving can be had."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.engine import session as session_module
from streaming.engine.events import (
    QUEUED_FRAMES,
    Event,
    Failed,
    FrameHeard,
    FrameSpoken,
    InputCleared,
    Interrupted,
    Kept,
    StepAudio,
    TurnDone,
    TurnSpeaking,
)
from streaming.engine.session import EngineSession
from streaming.engine.snapshot import Books, SessionSnapshot
from streaming.errors import EmptyPromptError, EngineStoppedError, PromptTooLongError, SessionError
from tests.engine.program import Act, ProgramRun, programs
from tests.engine.stub_step import Entry, Stream, StubStep, codes_of, frame, heard, never, pcm_of, spoken

SAMPLING = Sampling(seed=7)
SPOKEN = spoken(SAMPLING)


SLOTS = np.zeros(1, np.int64)
"""The slots of a step for the one slot that there is."""


def held() -> threading.Condition:
    """The engine's lock, held by this, the only thread, for good."""
    changed = threading.Condition()
    changed.acquire()
    return changed


class Bench:
    """One session in one slot, stepped by hand. `pause` steps as often as the random numbers say."""

    def __init__(
        self,
        ends: Callable[[int, int], bool] = never,
        context_frames: int = 64,
        slides: bool = True,
        timing: random.Random | None = None,
    ) -> None:
        self._ends, self._context_frames = ends, context_frames
        self.step = StubStep(1, ends=ends, context_frames=context_frames)
        self.events: list[Event] = []
        self.live = EngineSession(0, self.step, held(), self.events.append, SAMPLING, slides)
        self._timing = timing

    def step_once(self, seconds: float = 0.002) -> bool:
        """What the engine's thread does for a slot, in a step that takes so long. False if there was nothing to do."""
        works = self.live.works
        if works:
            self.live.work()
        pcm = self.next_frame()
        if pcm is None and not self.live.may_speak:
            return works or self.live.works
        mask = np.array([True])
        if pcm is not None:
            self.live.heard(self.step(SLOTS, pcm[None], mask, ~mask).codes[0])
        else:
            result = self.step(SLOTS, np.zeros((1, FRAME), np.float32), ~mask, mask)
            self.live.spoke(StepAudio(result.pcm), 0, result.codes[0], bool(result.ended[0]), seconds)
        return True

    def next_frame(self) -> NDArray[np.float32] | None:
        """What the engine's thread looks for, once it has made the slot clean where need be."""
        while (pcm := self.live.next_frame()) is None and self.live.unclean:
            self.live.make_clean()
        return pcm

    def next_frame_is_spoken(self, meanwhile: Callable[[], None]) -> None:
        """One step, during which something happens."""
        assert self.next_frame() is None
        assert self.live.may_speak
        result = self.step(SLOTS, np.zeros((1, FRAME), np.float32), np.array([False]), np.array([True]))
        meanwhile()
        self.live.spoke(StepAudio(result.pcm), 0, result.codes[0], bool(result.ended[0]), 0.002)

    def run(self) -> None:
        """Run steps until the session has nothing to do."""
        while self.step_once():
            pass

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        while not predicate():
            assert self.step_once() or predicate(), f"waited in vain; events: {self.events[-8:]}"

    def wait_for_room(self) -> None:
        assert self.step_once()

    def pause(self) -> None:
        for _ in range(0 if self._timing is None else self._timing.choice((0, 0, 1, 3, 30))):
            self.step_once()

    def move(self) -> tuple[EngineSession, StubStep]:
        """Go on with a snapshot of the session in another engine, which knows of it what is in its bytes."""
        kept = [event for event in self.events if isinstance(event, Kept)]
        self.live.keep()
        self.wait_for(lambda: len([event for event in self.events if isinstance(event, Kept)]) > len(kept))
        self.live.close()
        at = max(index for index, event in enumerate(self.events) if isinstance(event, Kept))
        del self.events[at + 1 :]  # the session goes on, but not for us
        snapshot = next(event for event in reversed(self.events) if isinstance(event, Kept)).snapshot
        books = msgspec.json.decode(msgspec.json.encode(snapshot.books), type=Books)
        copy, _ = self.step.unpack(self.step.pack(snapshot.copy, {}))
        assert books == snapshot.books and books.fits(copy.frames)
        self.step = StubStep(1, ends=self._ends, context_frames=self._context_frames)
        snapshot = SessionSnapshot(books, copy)
        self.live = EngineSession(0, self.step, held(), self.events.append, books.sampling, books.slides, snapshot)
        return self.live, self.step

    def hear(self, *values: int) -> None:
        for value in values:
            assert self.live.listen(frame(value))

    def speak(self, frames: int, max_frames: int = 1000) -> None:
        """So many frames of a new turn; it goes on after them only when they are released."""
        self.live.speak(max_frames, frames)
        self.run()

    @property
    def entries(self) -> list[Entry]:
        return self.step.streams[0].entries

    def last(self, count: int) -> list[Event]:
        return self.events[-count:]

    def index_of_frames(self, turn: int) -> list[int]:
        return [e.index for e in self.events if isinstance(e, FrameSpoken) and e.turn == turn]

    def done(self) -> list[tuple[int, str, int]]:
        return [(e.turn, e.reason, e.frames) for e in self.events if isinstance(e, TurnDone)]

    def interrupted(self) -> list[tuple[int, int]]:
        return [(e.turn, e.kept_frames) for e in self.events if isinstance(e, Interrupted)]


@settings(max_examples=300, deadline=None)
@given(programs(moves=True), st.integers(0, 2**32), st.sampled_from([0, 5, 9]), st.sampled_from([6, 64]))
def test_what_comes_of_commands_does_not_depend_on_when_they_are_given(
    program: list[Act], seed: int, ends_every: int, context_frames: int
) -> None:
    """Cuts depended on the engine's state when a command was given, and not when it took effect."""
    ends = (lambda length, digest: digest % ends_every == 0) if ends_every else never
    bench = Bench(ends, context_frames, timing=random.Random(seed))
    run = ProgramRun(bench.live, bench.step, bench.events, bench, SAMPLING.seed)
    run.do(program)
    run.check()


# Listening


def test_frames_are_heard_in_order_and_told_one_by_one() -> None:
    bench = Bench()
    bench.hear(1, 2, 3)
    bench.run()
    model = Stream()
    for event, value in zip(bench.events, (1, 2, 3), strict=True):
        assert isinstance(event, FrameHeard)
        np.testing.assert_array_equal(event.codes, codes_of(model.add(heard(value)), 4))
    assert bench.entries == model.entries


def test_the_queue_is_full_until_a_frame_was_heard() -> None:
    """A frame that is in a step still counts: it is told as heard later."""
    bench = Bench()
    bench.hear(*range(QUEUED_FRAMES))
    assert not bench.live.listen(frame(99))
    assert bench.next_frame() is not None
    assert not bench.live.listen(frame(99))
    bench.live.heard(np.zeros(4, np.int64))
    assert bench.live.listen(frame(99))
    assert not bench.live.listen(frame(99))


@pytest.mark.parametrize(
    "pcm", [*(np.zeros(shape, np.float32) for shape in (FRAME + 1, 0, (1, FRAME))), np.zeros(FRAME)]
)
def test_a_frame_of_another_shape_or_type_is_a_programmers_error(pcm: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        Bench().live.listen(pcm)


def too_long(bench: Bench) -> bool:
    """Whether the session has failed because its prompt is too long."""
    last = bench.events[-1]
    if isinstance(last, Failed):
        assert isinstance(last.error, PromptTooLongError)
        assert "context of 0.5 s" in str(last.error)
        with pytest.raises(PromptTooLongError):
            bench.live.speak(1, 1)
    return isinstance(last, Failed)


def test_a_prompt_that_must_not_slide_is_refused_at_the_context_exactly() -> None:
    bench = Bench(context_frames=6, slides=False)
    bench.hear(*range(6))
    bench.run()
    assert not too_long(bench)
    bench.hear(7)
    bench.run()
    assert too_long(bench)
    assert len(bench.entries) == 6


@pytest.mark.parametrize("at_once", [False, True])
def test_what_was_spoken_and_kept_counts_as_context_whenever_it_is_cut(at_once: bool) -> None:
    """A prompt right after an interruption was refused or not, depending on whether the engine had seen to the cut."""
    bench = Bench(context_frames=6, slides=False)
    bench.hear(1)
    bench.speak(4)
    bench.live.interrupt(1, 2 * FRAME)
    if not at_once:
        bench.run()
    bench.hear(2, 3, 4)
    bench.run()
    assert not too_long(bench)
    bench.hear(5)
    bench.run()
    assert too_long(bench)


def test_a_sliding_prompt_is_not_refused_and_what_is_cleared_is_told() -> None:
    bench = Bench(context_frames=6)
    bench.hear(*range(9))
    bench.speak(1)
    assert TurnSpeaking(1, 9, 4) in bench.events


# Speaking


def test_a_turn_is_told_from_its_start_to_its_end() -> None:
    bench = Bench()
    bench.hear(1, 2)
    assert bench.live.speak(3, 3) == 1
    bench.run()
    model = Stream()
    for entry in (heard(1), heard(2)):
        model.add(entry)
    _, _, started, *frames, done = bench.events
    assert started == TurnSpeaking(1, 2, 0)
    for index, event in enumerate(frames):
        assert isinstance(event, FrameSpoken)
        assert (event.turn, event.index) == (1, index)
        digest = model.add(SPOKEN)
        np.testing.assert_array_equal(event.pcm, pcm_of(digest))
        np.testing.assert_array_equal(event.codes, codes_of(digest, 4))
    assert isinstance(done, TurnDone)
    assert (done.turn, done.reason, done.frames) == (1, "max_frames", 3)
    assert done.first_frame_ms is not None
    assert done.first_frame_ms >= 0
    assert done.mean_step_ms == pytest.approx(2.0)


def test_speech_that_ends_gives_no_frame_for_its_end() -> None:
    bench = Bench(ends=lambda length, digest: length == 3)
    bench.hear(1)
    bench.live.speak(9, 9)
    bench.run()
    assert bench.index_of_frames(1) == [0, 1]
    assert bench.done() == [(1, "end", 2)]
    assert bench.entries == [heard(1), SPOKEN, SPOKEN]


def test_speech_that_ends_at_once_has_no_first_frame() -> None:
    bench = Bench(ends=lambda length, digest: True)
    bench.hear(1)
    bench.live.speak(9, 9)
    bench.run()
    (done,) = bench.last(1)
    assert isinstance(done, TurnDone)
    assert (done.reason, done.frames, done.first_frame_ms) == ("end", 0, None)
    assert done.mean_step_ms is not None


def test_the_figures_of_a_turn_are_of_that_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn was told with the steps of all turns before it in its mean, and with the first turn's wait for a first
    frame: dashboards showed a server that had become slow as still fast.
    """
    now = 100.0
    monkeypatch.setattr(session_module, "time", SimpleNamespace(monotonic=lambda: now))
    bench = Bench()
    bench.hear(1)
    figures = []
    for wait_s, step_s in ((0.050, 0.002), (0.200, 0.030)):
        bench.live.speak(2, 2)
        now += wait_s
        bench.step_once(step_s)
        bench.step_once(step_s)
        bench.run()
        (done,) = bench.last(1)
        assert isinstance(done, TurnDone)
        figures.append((done.first_frame_ms, done.mean_step_ms))
    assert figures == [(pytest.approx(50), pytest.approx(2)), (pytest.approx(200), pytest.approx(30))]


def test_the_lead_is_never_exceeded_and_other_turns_releases_are_ignored() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(2)
    assert len(bench.index_of_frames(1)) == 2
    for turn in (0, 2):
        bench.live.release(turn, 50)
        bench.run()
        assert len(bench.index_of_frames(1)) == 2
    bench.live.release(1, 3)
    bench.live.release(1, 1)  # late, and of no effect
    bench.run()
    assert len(bench.index_of_frames(1)) == 5


def test_a_release_in_one_turn_is_none_in_the_next() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(2, max_frames=4)
    bench.live.release(1, 2)  # while it is spoken: afterwards nothing is released any more
    bench.run()
    assert bench.done() == [(1, "max_frames", 4)]
    bench.speak(2)
    assert len(bench.index_of_frames(2)) == 2


def test_a_turn_without_new_speech_goes_on_from_the_last() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(2, max_frames=2)
    bench.speak(2, max_frames=2)
    assert bench.entries == [heard(1), *[SPOKEN] * 4]
    assert TurnSpeaking(2, 0, 0) in bench.events


def test_nothing_can_be_said_before_something_was_heard() -> None:
    bench = Bench()
    with pytest.raises(EmptyPromptError):
        bench.live.speak(1, 1)
    bench.hear(1)
    bench.speak(1, max_frames=1)
    assert bench.done() == [(1, "max_frames", 1)]


def test_a_session_that_will_speak_neither_listens_nor_speaks_again() -> None:
    """The state that counts is the one after all commands, not the one that the engine has come to."""
    bench = Bench()
    bench.hear(1)
    bench.live.speak(9, 2)
    for _ in range(2):
        assert bench.live.speaking
        with pytest.raises(SessionError, match="interrupt it before it listens"):
            bench.live.listen(frame(2))
        with pytest.raises(SessionError, match="already speaking"):
            bench.live.speak(9, 2)
        bench.run()
    bench.live.interrupt(1, 0)
    assert not bench.live.speaking
    bench.hear(2)
    bench.run()
    assert bench.entries == [heard(1), heard(2)]


@pytest.mark.parametrize(("max_frames", "lead_frames"), [(0, 1), (1, 0)])
def test_a_turn_of_nothing_is_a_programmers_error(max_frames: int, lead_frames: int) -> None:
    bench = Bench()
    bench.hear(1)
    with pytest.raises(AssertionError):
        bench.live.speak(max_frames, lead_frames)


def test_tokens_are_drawn_differently_from_the_command_on() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(1)
    bench.live.configure(Sampling(seed=8))
    bench.live.release(1, 1)
    bench.run()
    assert bench.entries == [heard(1), SPOKEN, spoken(Sampling(seed=8))]


def test_options_outlive_a_prompt_that_is_all_taken_back() -> None:
    """The slot is opened anew for such a session, and was given the options that it had begun with: a temperature that
    had been changed since was lost.
    """
    bench = Bench()
    bench.live.configure(Sampling(seed=8))
    bench.hear(1)
    bench.live.clear_input(0)
    bench.hear(2)
    bench.speak(1)
    assert bench.entries == [heard(2), spoken(Sampling(seed=8))]


# Interrupting


@pytest.mark.parametrize("heard_samples", [0, FRAME - 1, FRAME, 2 * FRAME + 5, 4 * FRAME, 9 * FRAME])
def test_the_context_goes_on_from_what_was_heard_to_the_whole_frame(heard_samples: int) -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(4)
    bench.live.interrupt(1, heard_samples)
    bench.hear(2)
    bench.run()
    kept = min(4, heard_samples // FRAME)
    assert bench.entries == [heard(1), *[SPOKEN] * kept, heard(2)]
    assert bench.interrupted() == [(1, kept)]
    assert bench.done() == [(1, "interrupted", 4)]


def test_a_turn_is_done_before_its_interruption_is_answered() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(2)
    bench.live.interrupt(1, FRAME)
    bench.run()
    done, answer = bench.last(2)
    assert isinstance(done, TurnDone)
    assert answer == Interrupted(1, 1)


def test_a_turn_interrupted_before_it_began_says_nothing() -> None:
    bench = Bench()
    bench.hear(1)
    bench.live.speak(5, 5)
    bench.live.interrupt(1, 0)
    bench.run()
    started, done, answer = bench.last(3)
    assert started == TurnSpeaking(1, 1, 0)
    assert done == TurnDone(1, "interrupted", 0, None, None)
    assert answer == Interrupted(1, 0)


def test_an_interruption_during_a_step_comes_after_its_frame() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(3)
    bench.live.release(1, 3)
    bench.next_frame_is_spoken(lambda: bench.live.interrupt(1, 3 * FRAME))
    bench.run()
    assert bench.done() == [(1, "interrupted", 4)]
    assert bench.entries == [heard(1), *[SPOKEN] * 3]


def test_more_is_kept_than_was_heard_where_the_step_cannot_rewind_so_far() -> None:
    """The answer says how much is kept, since the next prompt follows that."""
    bench = Bench()
    bench.hear(1)
    bench.speak(9)
    bench.live.interrupt(1, 2 * FRAME)
    bench.run()
    assert bench.interrupted() == [(1, 5)]
    assert bench.entries == [heard(1), *[SPOKEN] * 5]


def test_two_interruptions_together_do_not_rewind_further_than_one() -> None:
    """Each interruption was allowed `rewind_frames`; the second went back to what the step had overwritten."""
    bench = Bench()
    bench.hear(1)
    bench.speak(9)
    bench.live.interrupt(1, 6 * FRAME)
    bench.live.interrupt(1, 1 * FRAME)
    bench.live.interrupt(1, 0)
    bench.run()
    assert bench.interrupted() == [(1, 6), (1, 5), (1, 5)]
    assert bench.entries == [heard(1), *[SPOKEN] * 5]


def test_after_a_cut_the_next_turn_can_be_cut_to_its_beginning() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(9)
    bench.live.interrupt(1, 0)
    bench.speak(3)
    bench.live.interrupt(2, 0)
    bench.run()
    assert bench.interrupted() == [(1, 5), (2, 0)]
    assert bench.entries == [heard(1), *[SPOKEN] * 5]


def test_a_second_interruption_can_take_back_more_but_give_nothing_back() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(4)
    for heard_frames in (3, 1, 4):
        bench.live.interrupt(1, heard_frames * FRAME)
        bench.run()
    assert bench.interrupted() == [(1, 3), (1, 1), (1, 1)]
    assert bench.done() == [(1, "interrupted", 4)]
    assert bench.entries == [heard(1), SPOKEN]


@pytest.mark.parametrize("ends", [never, lambda length, digest: length == 4])
def test_a_turn_that_is_over_can_still_be_cut(ends: Callable[[int, int], bool]) -> None:
    bench = Bench(ends)
    bench.hear(1)
    bench.speak(3, max_frames=3)
    bench.live.interrupt(1, FRAME)
    bench.hear(2)
    bench.run()
    assert bench.interrupted() == [(1, 1)]
    assert len(bench.done()) == 1
    assert bench.entries == [heard(1), SPOKEN, heard(2)]


def test_a_turn_that_ends_just_before_its_interruption_is_cut_all_the_same() -> None:
    """The interruption is in the queue when the step gives the last frame."""
    bench = Bench()
    bench.hear(1)
    bench.live.speak(2, 1)
    bench.run()
    bench.live.release(1, 1)
    bench.next_frame_is_spoken(lambda: bench.live.interrupt(1, FRAME))
    assert bench.done() == [(1, "max_frames", 2)]
    bench.hear(2)
    bench.live.speak(1, 1)
    bench.run()
    assert bench.interrupted() == [(1, 1)]
    assert bench.entries == [heard(1), SPOKEN, heard(2), SPOKEN]


@pytest.mark.parametrize("run", [False, True])
def test_nothing_is_cut_once_the_next_turn_has_begun_to_listen(run: bool) -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(3, max_frames=3)
    bench.hear(2)
    if run:
        bench.run()
    bench.live.interrupt(1, FRAME)
    bench.run()
    assert bench.interrupted() == [(1, 3)]
    assert bench.entries == [heard(1), *[SPOKEN] * 3, heard(2)]


def test_an_interruption_of_the_turn_before_is_answered_for_that_turn() -> None:
    """The answer had the frames of the turn that is being spoken."""
    bench = Bench()
    bench.hear(1)
    bench.speak(3, max_frames=3)
    bench.speak(1)
    for turn in (0, 1, 3, 99):
        bench.live.interrupt(turn, 0)
        bench.run()
    assert bench.live.speaking
    assert bench.interrupted() == [(0, 0), (1, 3), (3, 0), (99, 0)]
    bench.live.interrupt(2, FRAME)
    bench.hear(2)
    bench.live.interrupt(3, 0)
    bench.run()
    assert bench.interrupted()[4:] == [(2, 1), (3, 0)]
    assert bench.entries == [heard(1), *[SPOKEN] * 4, heard(2)]


def test_a_prompt_that_is_taken_back_was_never_heard() -> None:
    """A push-to-talk that was let go by mistake was part of what the next one continued."""
    bench = Bench()
    bench.hear(*range(9))  # more than the step can rewind: but there is nothing else to keep
    bench.run()
    bench.live.clear_input(0)
    bench.hear(20)
    bench.speak(2)
    assert bench.entries == [heard(20), SPOKEN, SPOKEN]
    assert InputCleared(1, 9, 0) in bench.events


def test_after_a_prompt_was_all_taken_back_the_next_one_can_be_taken_back_too() -> None:
    """The session went on counting from the length of the cleared prompt: the next time that its user took something
    back, a number of frames below zero was asked for in the engine's thread, and everybody's session ended.
    """
    bench = Bench()
    bench.hear(*range(9))
    bench.live.clear_input(0)
    bench.hear(1, 2)
    bench.live.clear_input(1)
    bench.run()
    assert bench.last(1) == [InputCleared(1, 1, 1)]
    assert bench.entries == [heard(1)]


def test_the_committed_part_of_a_prompt_is_kept() -> None:
    bench = Bench()
    bench.hear(1, 2, 3)
    bench.live.clear_input(2)
    bench.run()
    assert bench.entries == [heard(1), heard(2)]
    assert bench.last(1) == [InputCleared(1, 1, 2)]


def test_nothing_of_the_turns_before_is_taken_back_with_a_prompt() -> None:
    """What is further back than the step can rewind stays, too, and the answer says how much."""
    bench = Bench()
    bench.hear(0)
    bench.speak(2, max_frames=2)
    bench.hear(1, 2, 3)
    bench.live.clear_input(0)
    bench.run()
    assert bench.entries == [heard(0), SPOKEN, SPOKEN]
    bench.hear(*range(9))
    bench.live.clear_input(0)
    bench.run()
    assert bench.last(1) == [InputCleared(2, 4, 5)], "the stub rewinds 4 frames"
    assert bench.entries[3:] == [heard(value) for value in range(5)]


def test_a_late_cut_after_a_prompt_was_taken_back_rewinds_no_further_than_can_be() -> None:
    """The frames of the cleared prompt have overwritten what the cut would need."""
    bench = Bench()
    bench.hear(0)
    bench.speak(4, max_frames=4)
    bench.hear(1, 2, 3)
    bench.live.clear_input(0)
    bench.live.interrupt(1, 0)
    bench.run()
    assert bench.interrupted() == [(1, 3)]
    assert bench.entries == [heard(0), *[SPOKEN] * 3]


def test_a_prompt_that_was_all_taken_back_cannot_be_continued() -> None:
    bench = Bench()
    bench.hear(1)
    bench.live.clear_input(0)
    with pytest.raises(EmptyPromptError):
        bench.live.speak(1, 1)
    bench.hear(1)
    bench.live.speak(1, 1)
    with pytest.raises(SessionError):
        bench.live.clear_input(0)


def test_a_clear_beyond_reach_does_not_shorten_what_the_next_one_keeps() -> None:
    """A clear said how much to take back. After one that reached further back than the step can rewind, the session
    took the prompt for shorter than it was: the next clear left it, as it thought, without a frame, and `speak` was
    refused although much had been heard.
    """
    bench = Bench()
    bench.hear(*range(9))
    bench.live.clear_input(2)
    bench.run()
    assert bench.last(1) == [InputCleared(1, 4, 5)], "the stub rewinds 4 frames"
    bench.live.clear_input(3)
    bench.run()
    assert bench.last(1) == [InputCleared(1, 0, 5)]
    bench.hear(20, 21)
    bench.live.clear_input(6)
    bench.speak(1, max_frames=1)
    assert bench.entries == [*(heard(value) for value in range(5)), heard(20), SPOKEN]


def test_the_turn_of_new_commands_is_told_before_the_old_one_has_ended() -> None:
    """`turn` was the engine's: an interruption of the turn just asked for was then taken for that of another."""
    bench = Bench()
    bench.hear(1)
    bench.speak(2)
    bench.live.interrupt(1, FRAME)
    assert bench.live.turn == 2
    bench.hear(2)
    assert bench.live.speak(5, 2) == 2
    bench.live.interrupt(1, 0)  # again; the turn that speaks next is not meant
    assert bench.live.speaking
    bench.live.interrupt(2, 0)
    assert not bench.live.speaking
    assert bench.live.turn == 3
    bench.hear(3)
    bench.run()
    assert bench.interrupted() == [(1, 1), (1, 1), (2, 0)]
    assert bench.entries == [heard(1), SPOKEN, heard(2), heard(3)]


def test_nobody_hears_less_than_nothing() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(1)
    with pytest.raises(AssertionError):
        bench.live.interrupt(1, -1)


# The end


def give_nothing(bench: Bench) -> None: ...


def give_speech(bench: Bench) -> None:
    bench.hear(1, 2)


def give_speech_in_a_step(bench: Bench) -> None:
    bench.hear(1, 2)
    bench.next_frame()


def let_it_speak(bench: Bench) -> None:
    bench.hear(1)
    bench.speak(2)


def interrupt_it(bench: Bench) -> None:
    let_it_speak(bench)
    bench.live.interrupt(1, 0)


@pytest.mark.parametrize(
    "before", [give_nothing, give_speech, give_speech_in_a_step, let_it_speak, interrupt_it], ids=lambda f: f.__name__
)
def test_a_closed_session_tells_nothing_and_takes_nothing(before: Callable[[Bench], None]) -> None:
    bench = Bench()
    before(bench)
    told, calls = len(bench.events), bench.step.calls
    bench.live.close()
    bench.live.close()
    assert bench.live.closed
    bench.live.heard(np.zeros(4, np.int64))  # of a step that was running
    bench.live.spoke(StepAudio(frame(0)[None]), 0, np.zeros(4, np.int64), False, 0.0)
    bench.run()
    bench.live.fail(EngineStoppedError("too late"))
    bench.live.release(1, 9)
    bench.live.wait_for_room()
    assert (len(bench.events), bench.step.calls) == (told, calls)
    for call in (
        lambda: bench.live.listen(frame(1)),
        lambda: bench.live.speak(1, 1),
        lambda: bench.live.interrupt(1, 0),
        lambda: bench.live.configure(SAMPLING),
    ):
        with pytest.raises(EngineStoppedError, match="closed"):
            call()


def test_a_failure_is_the_last_event() -> None:
    bench = Bench()
    bench.hear(1)
    bench.speak(1)
    error = EngineStoppedError("why")
    bench.live.fail(error)
    bench.live.fail(error)
    assert bench.events[-1] == Failed(error)
    assert sum(isinstance(event, Failed) for event in bench.events) == 1
    assert bench.live.closed


@pytest.mark.parametrize("kind", [FrameHeard, TurnSpeaking, FrameSpoken, TurnDone, Interrupted])
@pytest.mark.parametrize("raises", [True, False])
def test_an_owner_that_raises_or_closes_ends_its_session(
    kind: type[Event], raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A session that was closed while it told of its last frame was set to listening again."""
    told: list[Event] = []

    def on_event(event: Event) -> None:
        told.append(event)
        if isinstance(event, kind):
            if raises:
                raise RuntimeError("the loop is closed")
            live.close()

    bench = Bench()
    live = bench.live = EngineSession(0, bench.step, held(), on_event, SAMPLING, True)
    bench.hear(1)
    live.speak(1, 1)
    live.interrupt(1, 0) if kind is Interrupted else None
    bench.run()
    assert live.closed
    assert isinstance(told[-1], kind)
    assert [record.name for record in caplog.records] == [session_module.__name__] * raises
