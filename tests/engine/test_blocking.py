"""The Python API: calls that block, and none that blocks for ever."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.engine.blocking import LEAD_FRAMES, Session
from streaming.engine.engine import Engine
from streaming.engine.events import QUEUED_FRAMES
from streaming.errors import EmptyPromptError, EngineStoppedError, PromptTooLongError, SessionError
from tests.engine.stub_step import PATIENCE_S, Entry, Pcm, Stream, StubStep, frame, heard, pcm_of, running, spoken

SPOKEN = spoken(Sampling(seed=7))


@pytest.fixture
def step() -> StubStep:
    return StubStep(1, rewind_frames=2 * LEAD_FRAMES)


@pytest.fixture
def engine(step: StubStep) -> Iterator[Engine]:
    with running(step) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with engine.open(seed=7) as session:
        yield session


def stream(step: StubStep, session: Session) -> list[Entry]:
    """What the slot holds once all that was asked for is done: a last turn of no consequence tells when."""
    session.listen(frame(-1))
    for _ in session.speak(1):
        pass
    entries = step.streams[0].entries
    assert entries[-2:] == [heard(-1), SPOKEN]
    return entries[:-2]


def continuation(entries: list[Entry], frames: int) -> list[Pcm]:
    """What a slot that holds these goes on with."""
    model = Stream()
    for entry in entries:
        model.add(entry)
    return [pcm_of(model.add(SPOKEN)) for _ in range(frames)]


def in_background(call: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def finish(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "blocked for ever"


def test_what_is_heard_is_continued(step: StubStep, session: Session) -> None:
    for value in range(3):
        session.listen(frame(value))
    pcm = list(session.speak(max_frames=20))
    np.testing.assert_array_equal(pcm, continuation([heard(0), heard(1), heard(2)], 20))
    session.listen(frame(3))
    assert len(list(session.speak(max_frames=2))) == 2
    assert stream(step, session) == [heard(0), heard(1), heard(2), *[SPOKEN] * 20, heard(3), *[SPOKEN] * 2]


def test_the_iteration_ends_with_the_speech() -> None:
    step = StubStep(1, ends=lambda length, digest: length == 3)
    with running(step) as engine, engine.open() as session:
        session.listen(frame(0))
        assert len(list(session.speak(9))) == 2


def test_the_engine_works_ahead_of_whoever_iterates_but_not_further(step: StubStep, session: Session) -> None:
    session.listen(frame(0))
    speech = session.speak(100)
    next(speech)
    next(speech)
    with pytest.raises(SessionError):
        session.listen(frame(1))
    session.interrupt(2 * FRAME)
    list(speech)
    session.listen(frame(1))
    assert 1 + 2 <= step.calls <= 1 + 2 + LEAD_FRAMES + 1


@pytest.mark.parametrize("taken", [1, 3, 7])
def test_leaving_the_loop_counts_what_was_yielded_as_heard(step: StubStep, session: Session, taken: int) -> None:
    session.listen(frame(0))
    for count, _ in enumerate(session.speak(100), 1):
        if count == taken:
            break
    session.listen(frame(1))
    assert stream(step, session) == [heard(0), *[SPOKEN] * taken, heard(1)]


def test_turns_that_follow_each_other_at_once_do_not_mix(step: StubStep, session: Session) -> None:
    """The turn was read from where the engine was: frames and the end of the one before were taken for this one's."""
    session.listen(frame(0))
    entries = [heard(0)]
    for _ in range(200):
        speech = session.speak(100)
        np.testing.assert_array_equal(next(speech), continuation(entries, 1)[0])
        speech.close()  # type: ignore[attr-defined]
        entries.append(SPOKEN)
    assert stream(step, session) == entries


def test_a_turn_that_nobody_iterates_can_be_interrupted(step: StubStep, session: Session) -> None:
    session.listen(frame(0))
    speech = session.speak(100)
    session.interrupt(0)
    session.listen(frame(1))
    np.testing.assert_array_equal(list(session.speak(3)), continuation([heard(0), heard(1)], 3))
    assert list(speech) == []


def test_an_interruption_from_another_thread_ends_the_loop_at_once(step: StubStep, session: Session) -> None:
    """Frames that the engine had worked ahead were still played after it."""
    session.listen(frame(0))
    taken = 0
    for _ in session.speak(100):
        taken += 1
        if taken == 3:
            thread, raised = in_background(lambda: session.interrupt(2 * FRAME))
            finish(thread)
            assert raised == []
    assert taken == 3
    session.listen(frame(1))
    assert stream(step, session) == [heard(0), *[SPOKEN] * 2, heard(1)]


def test_an_interruption_at_any_moment_cuts_the_turn_that_was_asked_for_last() -> None:
    """Turn and state were read one after the other: a turn that ended in between was not cut at all."""
    step = StubStep(1, rewind_frames=2 * LEAD_FRAMES)
    with running(step) as engine, engine.open(seed=7) as session:
        session.listen(frame(0))
        for _ in range(100):
            session.speak(LEAD_FRAMES)  # is over at any moment
            session.interrupt(0)
        assert stream(step, session) == [heard(0)]


def test_a_continuation_that_has_ended_can_be_cut(step: StubStep, session: Session) -> None:
    session.listen(frame(0))
    assert len(list(session.speak(5))) == 5
    session.interrupt(3 * FRAME)
    session.listen(frame(1))
    session.interrupt(0)  # too late
    assert stream(step, session) == [heard(0), *[SPOKEN] * 3, heard(1)]


def test_listening_blocks_while_the_queue_is_full_and_resumes() -> None:
    step = StubStep(1, gated=True)
    with running(step) as engine, engine.open(seed=7) as session:
        count = QUEUED_FRAMES + 3
        thread, raised = in_background(lambda: [session.listen(frame(value)) for value in range(count)] and None)
        for _ in range(count):
            step.wait_until_begun()
            step.allow()
        finish(thread)
        assert raised == []
        step.allow_all()
        assert stream(step, session) == [heard(value) for value in range(count)]


def test_the_callers_buffer_may_be_used_again() -> None:
    """The frame was kept, not copied: a recorder that fills one buffer over and over was heard wrongly."""
    step = StubStep(1, gated=True)
    with running(step) as engine, engine.open(seed=7) as session:
        buffer = frame(0)
        for value in range(4):
            buffer[:] = value
            session.listen(buffer)
        buffer[:] = 99
        step.allow_all()
        assert stream(step, session) == [heard(value) for value in range(4)]


@pytest.mark.parametrize(
    "pcm", [np.zeros(FRAME + 1), np.zeros(0), np.zeros((1, FRAME)), np.float32(0), np.zeros((FRAME, 1))]
)
def test_another_shape_is_refused(session: Session, pcm: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a frame is 1920 samples"):
        session.listen(pcm)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e39, 32_000.0])
def test_numbers_that_are_no_speech_are_refused_and_the_session_goes_on(
    step: StubStep, session: Session, value: float
) -> None:
    """1e30 is finite, and ended the session: the model's numbers did not survive it."""
    pcm = np.zeros(FRAME)
    pcm[7] = value
    with pytest.raises(ValueError, match="speech is float32"):
        session.listen(pcm)
    session.listen(frame(5))
    assert stream(step, session) == [heard(5)]


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.uint8, np.bool_, np.complex64, object])
def test_samples_that_are_no_floats_are_refused(session: Session, kind: type) -> None:
    """int16 was taken for float: speech 90 dB over full scale."""
    with pytest.raises(ValueError, match="to_float"):
        session.listen(np.ones(FRAME, kind))


def test_denormals_are_speech(step: StubStep, session: Session) -> None:
    quiet = np.full(FRAME, 1e-40, np.float32)
    session.listen(quiet)
    assert stream(step, session) == [("heard", zlib.crc32(quiet.tobytes()))]


def test_other_types_of_samples_are_converted(step: StubStep, session: Session) -> None:
    session.listen(frame(5).astype(np.float64))
    assert stream(step, session) == [heard(5)]


def test_calls_that_do_not_fit_raise_at_once(session: Session) -> None:
    """They raise when they are made, and not when the iteration begins."""
    with pytest.raises(EmptyPromptError):
        session.speak(1)
    session.interrupt(0)  # of nothing
    session.listen(frame(0))
    with pytest.raises(ValueError, match="max_frames is 0"):
        session.speak(0)
    with pytest.raises(ValueError, match="heard_samples is -1"):
        session.interrupt(-1)
    speech = session.speak(100)
    with pytest.raises(SessionError):
        session.speak(1)
    with pytest.raises(SessionError):
        session.listen(frame(0))
    next(speech)


def test_a_prompt_that_must_not_slide_is_refused() -> None:
    with running(StubStep(1, context_frames=3)) as engine, engine.open(slides=False) as session:
        for value in range(4):
            session.listen(frame(value))
        with pytest.raises(PromptTooLongError):
            list(session.speak(1))


def test_sampling_is_the_callers_and_a_seed_is_drawn(engine: Engine) -> None:
    with engine.open(temperature=0.0, top_k=5) as session:
        first = session.seed
    with engine.open() as session:
        assert session.seed != first
    with engine.open(seed=3) as session:
        assert session.seed == 3
    with pytest.raises(ValueError, match="temperature"):
        engine.open(temperature=-1.0)
    assert engine.stats().sessions == 0


def test_the_last_frame_may_be_shorter_and_the_step_is_told(session: Session, step: StubStep) -> None:
    """Pins a rest of a recording that could not be heard, or was heard as if silence followed it."""
    session.listen(frame(1))
    session.listen(frame(2)[:700])
    assert len(list(session.speak(1))) == 1
    assert list(step.lengths[session._session.slot]) == [FRAME, 700]


def test_what_is_left_out_is_drawn_as_the_model_would_have_it() -> None:
    """Pins a top-p of 1 for a checkpoint that says 0.9."""
    step = StubStep(1)
    with Engine(step, sampling=Sampling(0.7, 20, 0.9)) as engine, engine.open(top_k=5, seed=3) as session:
        session.listen(frame(1))
        assert len(list(session.speak(1))) == 1
    assert step.streams[0].entries[-1] == spoken(Sampling(0.7, 5, 0.9, 3))


def test_a_closed_session_raises_and_its_slot_is_free(engine: Engine, session: Session) -> None:
    session.listen(frame(0))
    speech = session.speak(9)
    next(speech)
    session.close()
    session.close()
    with pytest.raises(EngineStoppedError):
        list(speech)
    for call in (lambda: session.listen(frame(0)), lambda: session.speak(1), lambda: session.interrupt(0)):
        with pytest.raises(EngineStoppedError):
            call()
    engine.open().close()


def test_closing_from_another_thread_ends_an_iteration_that_waits() -> None:
    """The iteration waited for ever: a session that is closed tells nothing any more."""
    step = StubStep(1, gated=True)
    with running(step) as engine, engine.open() as session:
        session.listen(frame(0))
        speech = session.speak(9)
        step.wait_until_begun()
        thread, raised = in_background(lambda: [*speech] and None)
        session.close()
        finish(thread)
        assert [type(error) for error in raised] == [EngineStoppedError]


def test_closing_from_another_thread_ends_a_listening_that_waits() -> None:
    step = StubStep(1, gated=True)
    with running(step) as engine, engine.open() as session:
        thread, raised = in_background(lambda: [session.listen(frame(0)) for _ in range(QUEUED_FRAMES + 1)] and None)
        step.wait_until_begun()
        session.close()
        finish(thread)
        assert [type(error) for error in raised] == [EngineStoppedError]


def test_an_iteration_ends_with_the_engine(engine: Engine, session: Session) -> None:
    session.listen(frame(0))
    speech = session.speak(100)
    next(speech)
    engine.close()
    with pytest.raises(EngineStoppedError, match="the engine was closed"):
        list(speech)
    with pytest.raises(EngineStoppedError):
        session.speak(1)


def test_a_step_that_raises_ends_an_iteration_that_waits() -> None:
    step = StubStep(1, gated=True)
    with running(step) as engine, engine.open() as session:
        session.listen(frame(0))
        thread, raised = in_background(lambda: [*session.speak(9)] and None)
        step.wait_until_begun()
        step.fatal, step.failure = True, RuntimeError("no more")
        step.allow_all()
        finish(thread)
        assert [type(error) for error in raised] == [EngineStoppedError]


def test_leaving_the_loop_of_a_session_that_is_closed_is_no_error(session: Session) -> None:
    session.listen(frame(0))
    for _ in session.speak(100):
        session.close()
        break
