"""The engine: one thread, many sessions. Steps are held back by hand where it matters what is in one."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.engine.events import (
    QUEUED_FRAMES,
    Event,
    Failed,
    FrameHeard,
    FrameSpoken,
    Interrupted,
    TurnDone,
    TurnSpeaking,
)
from streaming.engine.session import EngineSession
from streaming.errors import EngineFullError, EngineStoppedError, StepFailedError, StepHungError
from tests.engine.program import Act, ProgramRun, programs
from tests.engine.stub_step import PATIENCE_S, Recorder, StubStep, frame, heard, running, spoken

SAMPLING = Sampling(seed=7)
SPOKEN = spoken(SAMPLING)


def hear(live: EngineSession, *values: int) -> None:
    for value in values:
        assert live.listen(frame(value))


def settle(live: EngineSession, recorder: Recorder) -> None:
    """Wait until all commands have taken effect: interruptions of no turn are answered, too."""
    count = len(recorder.of(Interrupted)) + 1
    live.interrupt(0, 0)
    recorder.wait_for_event(Interrupted, count)


class ThreadDriver:
    """Wait for the engine's thread, and pause at random."""

    def __init__(self, live: EngineSession, recorder: Recorder, timing: random.Random) -> None:
        self.wait_for_room = live.wait_for_room
        self.wait_for = recorder.wait_for
        self._timing = timing

    def pause(self) -> None:
        time.sleep(self._timing.choice((0, 0, 0, 1e-5, 3e-4)))

    def move(self) -> tuple[EngineSession, StubStep]:
        raise AssertionError("these sessions stay")


def converse(engine: Engine, step: StubStep, program: list[Act], seed: int, leave: bool) -> None:
    """One session from its beginning to its end. leave: without waiting for what comes of it."""
    timing, recorder = random.Random(seed), Recorder()
    sampling = Sampling(seed=seed)
    live = engine.attach(recorder, sampling)
    try:
        run = ProgramRun(live, step, recorder.events, ThreadDriver(live, recorder, timing), sampling.seed)
        run.do(program)
        if not leave:
            run.check()
    finally:
        live.close()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(programs(max_size=6), st.integers(0, 2**32), st.booleans()), min_size=1, max_size=9),
    st.integers(0, 2**32),
)
def test_every_session_gets_what_it_gets_alone(people: list[tuple[list[Act], int, bool]], seed: int) -> None:
    """Three sessions run at a time in three slots that pass from one to the next: nothing of another must show."""
    timing = random.Random(seed)
    step = StubStep(
        3, ends=lambda length, digest: digest % 9 == 0, delay_s=lambda: timing.choice((0, 1e-5, 2e-4)), context_frames=9
    )
    with running(step) as engine, ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(converse, engine, step, *person) for person in people]:
            future.result(PATIENCE_S)


def test_sessions_that_are_ready_share_a_step_and_no_step_is_wider_than_needed() -> None:
    step = StubStep(4, gated=True)
    with running(step) as engine:
        recorders = [Recorder() for _ in range(3)]
        lives = [engine.attach(recorder, SAMPLING) for recorder in recorders]
        assert [live.slot for live in lives] == [0, 1, 2]
        hear(lives[0], 1)
        step.wait_until_begun()  # with slot 0 alone
        hear(lives[1], 2)
        hear(lives[2], 3)
        step.allow()
        step.wait_until_begun()
        step.allow()
        recorders[2].wait_for_event(FrameHeard)
        assert list(step.widths) == [1, 2]
        assert step.calls == 2
        assert [step.streams[slot].entries for slot in range(3)] == [[heard(1)], [heard(2)], [heard(3)]]


def test_listening_and_speaking_slots_share_a_step() -> None:
    step = StubStep(2, gated=True)
    with running(step) as engine:
        first, second = Recorder(), Recorder()
        one, two = engine.attach(first, SAMPLING), engine.attach(second, SAMPLING)
        hear(one, 1)
        one.speak(1, 1)
        step.wait_until_begun()
        hear(two, 2)
        step.allow()
        step.wait_until_begun()
        step.allow()
        first.wait_for_event(TurnDone)
        assert step.calls == 2
        assert step.streams[0].entries == [heard(1), SPOKEN]
        assert step.streams[1].entries == [heard(2)]


def test_a_session_that_waits_for_its_listener_holds_up_nobody() -> None:
    step = StubStep(2)
    with running(step) as engine:
        slow, quick = Recorder(), Recorder()
        one, two = engine.attach(slow, SAMPLING), engine.attach(quick, SAMPLING)
        hear(one, 1)
        one.speak(9, 2)
        slow.wait_for_event(FrameSpoken, 2)
        hear(two, 2)
        two.speak(5, 5)
        quick.wait_for_event(TurnDone)
        settle(one, slow)
        assert len(slow.of(FrameSpoken)) == 2
        one.release(1, 9)
        slow.wait_for_event(TurnDone)


def test_steps_that_take_nothing_begin_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pause each step has one session in it, and wakes its owner for it. Told by the least time that the
    steps can take.
    """
    monkeypatch.setattr("streaming.engine.engine._APART_S", 0.02)
    step, recorder = StubStep(1), Recorder()
    with Engine(step) as engine:
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1)
        recorder.wait_for_event(FrameHeard)
        began = time.monotonic()
        live.speak(5, 5)
        recorder.wait_for_event(TurnDone)
        assert time.monotonic() - began >= 4 * 0.02


def test_an_idle_engine_runs_no_steps() -> None:
    step = StubStep(1)
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        settle(live, recorder)
        assert step.calls == 0


# Slots


def test_a_full_engine_refuses_until_a_session_is_closed() -> None:
    with running(StubStep(2)) as engine:
        lives = [engine.attach(Recorder(), SAMPLING) for _ in range(2)]
        with pytest.raises(EngineFullError, match="all 2 slots"):
            engine.attach(Recorder(), SAMPLING)
        with pytest.raises(EngineFullError):
            engine.open()
        lives[0].close()
        assert engine.attach(Recorder(), SAMPLING).slot == 0
        with pytest.raises(EngineFullError):
            engine.attach(Recorder(), SAMPLING)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_slot_whose_step_is_running_passes_to_another_session_unharmed(speaks: bool) -> None:
    """What the step gives is of the session before, and that one is told nothing any more."""
    step = StubStep(1, gated=True)
    with running(step) as engine:
        before, after = Recorder(), Recorder()
        live = engine.attach(before, SAMPLING)
        hear(live, 1)
        step.wait_until_begun()
        if speaks:
            live.speak(9, 9)
            step.allow()
            step.wait_until_begun()
        told = len(before.events)
        live.close()
        second = engine.attach(after, Sampling(seed=8))
        hear(second, 2, 3)
        second.speak(2, 2)
        step.allow_all()
        after.wait_for_event(TurnDone)
        assert len(before.events) == told
        assert [type(event) for event in after.events] == [
            FrameHeard,
            FrameHeard,
            TurnSpeaking,
            FrameSpoken,
            FrameSpoken,
            TurnDone,
        ]
        assert step.streams[0].entries == [heard(2), heard(3), *[spoken(Sampling(seed=8))] * 2]


def test_a_session_closed_before_the_engine_looked_at_it_leaves_nothing() -> None:
    step = StubStep(2, gated=True)
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1)
        step.wait_until_begun()
        for value in range(20):
            passing = engine.attach(Recorder(), SAMPLING)
            assert passing.slot == 1
            hear(passing, value)
            passing.speak(1, 1)
            passing.close()
        step.allow_all()
        settle(live, recorder)
        assert step.calls == 1
        assert 1 not in step.streams


def test_stats_count_open_sessions_and_time_steps() -> None:
    step = StubStep(2)
    with running(step) as engine:
        stats = engine.stats()
        assert (stats.slots, stats.sessions, stats.steps, stats.step_ms_p50, stats.step_ms_p99) == (2, 0, 0, None, None)
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1, 2, 3)
        settle(live, recorder)
        stats = engine.stats()
        assert (stats.sessions, stats.steps) == (1, 3)
        assert stats.step_ms_p50 is not None
        assert stats.step_ms_p99 is not None
        assert 0 <= stats.step_ms_p50 <= stats.step_ms_p99
        assert type(stats.step_ms_p50) is float  # numpy's own cannot be written as JSON by everybody
        live.close()
        assert engine.stats().sessions == 0


def test_stats_count_each_frame_once_and_no_end_of_speech_as_one() -> None:
    """The metrics told more frames than listeners got: each end of a turn, and each frame of a session whose numbers
    broke, was one too many.
    """
    step = StubStep(2, ends=lambda length, digest: length == 5)
    with running(step) as engine:
        first, second = Recorder(), Recorder()
        live, broken = engine.attach(first, SAMPLING), engine.attach(second, SAMPLING)
        hear(live, 1, 2, 3)
        live.speak(9, 9)
        first.wait_for_event(TurnDone)
        stats = engine.stats()
        assert (stats.frames_heard, stats.frames_spoken, stats.steps, stats.steps_failed) == (3, 2, 6, 0)
        assert sum(stats.step_seconds.counts) == 6
        step.breaks = {broken.slot}
        hear(broken, 1)
        second.wait_for_event(Failed)
        settle(live, first)
        stats = engine.stats()
        assert (stats.frames_heard, stats.frames_spoken, stats.steps) == (3, 2, 7)


def test_the_engine_tells_what_its_step_can_do() -> None:
    with running(StubStep(1, num_codebooks=3, context_frames=20, rewind_frames=5)) as engine:
        assert (engine.num_codebooks, engine.context_frames, engine.rewind_frames) == (3, 20, 5)
        assert engine.failure is None


# The queue


def test_a_full_queue_has_room_after_a_frame_was_heard() -> None:
    step = StubStep(1, gated=True)
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, *range(QUEUED_FRAMES))
        step.wait_until_begun()
        assert not live.listen(frame(99))
        step.allow()
        recorder.wait_for_event(FrameHeard)
        hear(live, 99)
        step.allow_all()
        settle(live, recorder)
        assert step.streams[0].entries == [*map(heard, range(QUEUED_FRAMES)), heard(99)]


def test_waiting_for_room_ends_with_the_session() -> None:
    step = StubStep(1, gated=True)
    with running(step) as engine:
        live = engine.attach(Recorder(), SAMPLING)
        hear(live, *range(QUEUED_FRAMES))
        step.wait_until_begun()
        waiter = threading.Thread(target=live.wait_for_room)
        waiter.start()
        live.close()
        waiter.join(PATIENCE_S)
        assert not waiter.is_alive()


# The end


def test_a_step_that_fails_ends_its_own_sessions_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """Running out of memory in one batch took every session down."""
    step = StubStep(3, gated=True)
    with running(step) as engine:
        ours, theirs = Recorder(), Recorder()
        live, other = engine.attach(ours, SAMPLING), engine.attach(theirs, SAMPLING)
        hear(live, 1)
        step.wait_until_begun()
        hear(other, 2)
        failure = step.failure = RuntimeError("out of memory")
        step.allow()
        ours.wait_for_event(Failed)
        step.wait_until_begun()
        step.failure = None
        step.allow_all()
        settle(other, theirs)
        assert isinstance(ours.of(Failed)[0].error, StepFailedError)
        assert not theirs.of(Failed)
        assert step.streams[other.slot].entries == [heard(2)]
        again = engine.attach(Recorder(), SAMPLING)
        assert again.slot == 0, "the slot is free for the next"
        with pytest.raises(StepFailedError, match="log says why") as caught:
            live.listen(frame(1))
        assert caught.value.__cause__ is failure
    assert "the others go on" in caplog.text


def test_a_frame_is_told_before_the_encoder_hears_it() -> None:
    """A listener waited for work whose result only the next prompt needs."""
    step = StubStep(1)
    with running(step) as engine:
        recorder = Recorder()
        told: list[int] = []
        step.when_following = lambda: told.append(len(recorder.of(FrameSpoken)))
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1)
        live.speak(3, 3)
        recorder.wait_for_event(TurnDone)
        settle(live, recorder)
        assert told == [0, 1, 2, 3]


def test_a_failure_after_the_audio_ends_those_who_spoke_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    step = StubStep(2, gated=True)
    with running(step) as engine:
        ours, theirs = Recorder(), Recorder()
        speaker, listener = engine.attach(ours, SAMPLING), engine.attach(theirs, SAMPLING)
        hear(speaker, 1)
        speaker.speak(9, 9)
        step.wait_until_begun()
        hear(listener, 2)
        step.deafness = RuntimeError("out of memory")
        step.allow()
        step.wait_until_begun()
        step.allow()
        ours.wait_for_event(Failed)
        step.deafness = None
        step.allow_all()
        settle(listener, theirs)
        assert len(ours.of(FrameSpoken)) == 1 and len(theirs.of(FrameHeard)) == 1
        assert not theirs.of(Failed)


def test_steps_that_keep_failing_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """An engine whose every step fails would fail for every client that comes, and call itself ready."""
    step = StubStep(1)
    step.failure = RuntimeError("always")
    engine = Engine(step)
    for _ in range(3):
        recorder = Recorder()
        hear(engine.attach(recorder, SAMPLING), 1)
        recorder.wait_for_event(Failed)
    engine.close()
    assert engine.failure is step.failure
    assert "the engine's thread failed" in caplog.text


def test_failed_steps_with_good_ones_between_them_do_not_add_up(caplog: pytest.LogCaptureFixture) -> None:
    """The third step that failed since the start, weeks after the first, ended the engine and with it every session."""
    step = StubStep(2)
    with running(step) as engine:
        for _ in range(4):
            failing, recorder = Recorder(), Recorder()
            step.failure = RuntimeError("out of memory")
            hear(engine.attach(failing, SAMPLING), 1)
            failing.wait_for_event(Failed)
            step.failure = None
            good = engine.attach(recorder, SAMPLING)
            hear(good, 2)
            recorder.wait_for_event(FrameHeard)
            good.close()
        assert engine.failure is None
        assert engine.stats().steps_failed == 4
    assert caplog.text.count("the others go on") == 4


def test_a_session_whose_numbers_break_while_it_speaks_is_told_so_and_says_nothing_more() -> None:
    """Numbers were looked at in steps that listen alone: a slot whose numbers broke in mid-speech hissed at its
    listener to the end.
    """
    step = StubStep(1, gated=True)
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1)
        live.speak(9, 9)
        step.allow(3)
        recorder.wait_for_event(FrameSpoken, 2)
        step.breaks = {live.slot}
        step.allow_all()
        recorder.wait_for_event(Failed)
        assert len(recorder.of(FrameSpoken)) == 2
        assert isinstance(recorder.of(Failed)[0].error, StepFailedError)


def test_a_session_whose_numbers_break_ends_alone() -> None:
    """A NaN in one slot's logits was spoken as noise, for ever."""
    step = StubStep(2, gated=True)
    with running(step) as engine:
        ours, theirs = Recorder(), Recorder()
        live, other = engine.attach(ours, SAMPLING), engine.attach(theirs, SAMPLING)
        step.breaks = {live.slot}
        for value in (1, 2):
            hear(live, value)
            hear(other, value)
        step.allow_all()
        ours.wait_for_event(Failed)
        settle(other, theirs)
        assert isinstance(ours.of(Failed)[0].error, StepFailedError)
        assert step.streams[other.slot].entries == [heard(1), heard(2)]


def test_a_lost_device_ends_all_sessions_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    step = StubStep(3, gated=True)
    with running(step) as engine:
        recorders = [Recorder() for _ in range(3)]
        lives = [engine.attach(recorder, SAMPLING) for recorder in recorders]
        hear(lives[0], *range(QUEUED_FRAMES))  # waits for room
        hear(lives[1], 1)
        lives[1].speak(9, 9)  # waits for speech; the third waits for nothing
        step.wait_until_begun()
        waiter = threading.Thread(target=lives[0].wait_for_room)
        waiter.start()
        step.fatal, step.failure = True, RuntimeError("out of memory")
        step.allow_all()
        for recorder in recorders:
            recorder.wait_for_event(Failed)
            (failed,) = recorder.of(Failed)
            assert isinstance(failed.error, EngineStoppedError)
            assert failed.error.__cause__ is step.failure
            assert "out of memory" not in str(failed.error), "it goes to strangers"
            assert recorder.events[-1] is failed
        waiter.join(PATIENCE_S)
        assert not waiter.is_alive()
        for live in lives:
            with pytest.raises(EngineStoppedError):
                live.listen(frame(1))
        with pytest.raises(EngineStoppedError, match="has failed"):
            engine.attach(Recorder(), SAMPLING)
        assert engine.failure is step.failure
        assert engine.stats().sessions == 0
    assert "the engine's thread failed" in caplog.text


def test_a_step_that_does_not_return_ends_the_engine_and_keeps_nobody_waiting() -> None:
    """A replay that hangs on its GPU was never noticed: health was good, and every client waited for ever."""
    step = StubStep(2, gated=True)
    engine = Engine(step, hung_s=0.2)
    recorder = Recorder()
    live = engine.attach(recorder, SAMPLING)
    live.listen(frame(1))
    step.wait_until_begun()
    recorder.wait_for_event(Failed)
    assert isinstance(recorder.of(Failed)[0].error, EngineStoppedError)
    assert isinstance(engine.failure, StepHungError)
    assert engine.hung
    with pytest.raises(EngineStoppedError, match="has failed"):
        engine.attach(Recorder(), SAMPLING)
    engine.close()  # although its thread is in the step
    step.allow_all()  # it was late and not lost: nobody is told anything more
    engine._thread.join(PATIENCE_S)
    assert not engine._thread.is_alive()
    assert isinstance(engine.failure, StepHungError)
    assert isinstance(recorder.events[-1], Failed)


def test_steps_that_return_are_not_taken_for_hung() -> None:
    """Pins a clock that is not stopped between steps: an idle engine would end itself."""
    step = StubStep(1)
    engine = Engine(step, hung_s=0.1)
    recorder = Recorder()
    live = engine.attach(recorder, SAMPLING)
    for number in range(3):
        live.listen(frame(number))
        recorder.wait_for_event(FrameHeard, number + 1)
        time.sleep(0.2)
    assert engine.failure is None
    engine.close()
    assert not engine._watch.is_alive()


def test_closing_the_engine_ends_its_sessions_and_may_be_done_twice() -> None:
    step = StubStep(2)
    with running(step) as engine:
        recorders = [Recorder() for _ in range(2)]
        lives = [engine.attach(recorder, SAMPLING) for recorder in recorders]
        hear(lives[0], 1)
        lives[0].speak(9, 1)
        recorders[0].wait_for_event(FrameSpoken)
        engine.close()
        engine.close()
        for live, recorder in zip(lives, recorders, strict=True):
            assert isinstance(recorder.events[-1], Failed)
            assert live.closed
        for call in (lambda: engine.attach(Recorder(), SAMPLING), engine.open, lambda: lives[1].listen(frame(1))):
            with pytest.raises(EngineStoppedError):
                call()
        assert engine.failure is None


def test_an_engine_that_nobody_used_can_be_closed() -> None:
    with running(StubStep(1)) as engine:
        pass
    with pytest.raises(EngineStoppedError, match="closed"):
        engine.attach(Recorder(), SAMPLING)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_owner_that_raises_harms_no_other_session(at_the_end: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One listener that raised, say of a closed event loop, ended the engine, and the others were never told."""

    def on_event(event: Event) -> None:
        if isinstance(event, Failed) or not at_the_end:
            raise RuntimeError("Event loop is closed")

    step, recorder = StubStep(2), Recorder()
    with running(step) as engine:
        bad, good = engine.attach(on_event, SAMPLING), engine.attach(recorder, SAMPLING)
        hear(bad, 1)
        hear(good, 2)
        good.speak(2, 2)
        recorder.wait_for_event(TurnDone)
        assert bad.closed is not at_the_end
    assert isinstance(recorder.events[-1], Failed)
    assert "Event loop is closed" in caplog.text


def test_half_an_hour_keeps_memory_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """22,000 frames in one session, in turns with interruptions. What was kept a frame would be 20,000 of it."""
    monkeypatch.setattr("streaming.engine.engine._APART_S", 0.0)  # it is about memory, not about 45 s of waiting
    step = StubStep(1)
    spoken_frames, answered = threading.Semaphore(0), threading.Semaphore(0)

    def on_event(event: Event) -> None:
        if isinstance(event, FrameSpoken):
            spoken_frames.release()
        elif isinstance(event, Interrupted):
            answered.release()

    def talk(live: EngineSession, frames: int) -> None:
        """Ten frames of speech and ten spoken, of which two are taken back, again and again."""
        pcm = np.zeros(step_frame, np.float32)
        for _ in range(frames // 20):
            for _ in range(10):
                while not live.listen(pcm):
                    live.wait_for_room()
            turn = live.speak(1000, 4)
            live.release(turn, 6)
            for _ in range(10):
                assert spoken_frames.acquire(timeout=PATIENCE_S)
                live.release(turn, 6)
            live.interrupt(turn, 8 * step_frame)
            assert answered.acquire(timeout=PATIENCE_S)
            step.streams[0].entries.clear()  # the stub's own memory; the digest goes on from the last
            del step.streams[0].digests[:-1]

    step_frame = len(frame(0))
    with running(step) as engine:
        live = engine.attach(on_event, SAMPLING)
        talk(live, 2000)
        gc.collect()
        before = sys.getallocatedblocks()
        talk(live, 20_000)
        gc.collect()
        assert sys.getallocatedblocks() - before < 900


def test_one_slow_step_refuses_nobody() -> None:
    """One step of many was slow, by a collection of garbage or a neighbour, and the next caller was sent away."""
    slow_s = iter((0.1,))
    step = StubStep(2, delay_s=lambda: next(slow_s, 0.0))
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1, 2, 3, 4, 5)
        settle(live, recorder)
        assert (engine.stats().step_ms_p99 or 0) > 80
        assert not engine.overloaded


def test_slow_steps_of_the_past_say_nothing_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a heavy hour and a pause, the second session to come was refused: the first had stepped too seldom yet."""
    step = StubStep(3, delay_s=lambda: 0.1)
    with running(step) as engine:
        recorder = Recorder()
        live = engine.attach(recorder, SAMPLING)
        hear(live, 1, 2, 3)
        settle(live, recorder)
        assert engine.overloaded
        monkeypatch.setattr("streaming.engine.engine._RECENT_S", -1.0)
        assert not engine.overloaded


def test_a_slot_is_made_clean_without_the_engines_lock() -> None:
    """Making a slot clean writes tens of megabytes: whoever listened meanwhile, and with it the whole event loop,
    waited for it.
    """
    step = StubStep(2)
    cleaning, goes_on = threading.Event(), threading.Event()
    opened = step.open

    def slow(slot: int, sampling: Sampling) -> None:
        if slot == 1:
            cleaning.set()
            assert goes_on.wait(PATIENCE_S)
        opened(slot, sampling)

    step.open = slow  # type: ignore[method-assign]
    with running(step) as engine:
        first = engine.attach(Recorder(), Sampling())
        engine.attach(Recorder(), Sampling(seed=1))
        assert cleaning.wait(PATIENCE_S)
        told = threading.Event()
        threading.Thread(target=lambda: (first.listen(frame(0)), first.queued_frames, told.set())).start()
        assert told.wait(PATIENCE_S), "the lock is held"
        goes_on.set()
