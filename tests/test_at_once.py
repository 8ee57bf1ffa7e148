"""Marks, forks, saved sessions and several continuations at once, with the real step: equal to the bit."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import streaming
from streaming.engine.blocking import Session
from streaming.engine.engine import Engine
from streaming.errors import EmptyPromptError, EngineFullError, SessionError, SnapshotError
from streaming.frame_step import FrameStep
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from tests.reference import FRAME, speech

WINDOW, REWIND = 12, 4
Audio = NDArray[np.float32]


@pytest.fixture
def engine(codec: StreamingMimi, decoder: LlamaDecoder) -> Iterator[Engine]:
    with Engine(FrameStep(codec, decoder, 4, WINDOW, REWIND), "tiny") as engine:
        yield engine


def hear(session: Session, frames: int, seed: int = 0) -> None:
    for frame in speech(frames, seed).reshape(frames, FRAME):
        session.listen(frame)


def say(session: Session, frames: int = 10) -> Audio:
    return np.stack(list(session.speak(frames)))


@pytest.mark.parametrize("heard", [2, 30])
def test_a_session_returns_to_a_mark_as_often_as_one_likes(engine: Engine, heard: int) -> None:
    """Pins a second take that remembers the first, also once the window has slid over the prompt."""
    with engine.open(seed=1) as session:
        hear(session, heard)
        mark = session.mark()
        first = say(session, 30)
        session.return_to(mark, seed=2)
        second = say(session, 30)
        hear(session, 3, seed=5)
        session.return_to(mark, seed=1)
        assert np.array_equal(say(session, 30), first)
        session.return_to(mark, seed=2)
        assert np.array_equal(say(session, 30), second)
        assert not np.array_equal(first, second)


def test_the_conversation_goes_on_from_the_take_that_is_returned_to(engine: Engine) -> None:
    """Pins an earlier continuation that is gone once another was made."""
    with engine.open(seed=1) as session, engine.open(seed=1) as stays:
        for each in (session, stays):
            hear(each, 5)
        before = session.mark()
        assert np.array_equal(say(session), say(stays))
        after = session.mark()
        session.return_to(before, seed=9)
        say(session, 25)
        session.return_to(after, seed=1)
        for each in (session, stays):
            hear(each, 2, seed=3)
        assert np.array_equal(say(session), say(stays))


def test_a_fork_says_the_same_with_the_same_seed_and_something_else_with_another(engine: Engine) -> None:
    """Pins a fork that shares a slot's state with its origin."""
    with engine.open(seed=1) as session:
        hear(session, 5)
        with session.fork() as same, session.fork(seed=2) as other:
            hear(other, 1, seed=8)
            said = say(session)
            assert np.array_equal(say(same), said)
            assert not np.array_equal(say(other), said)


def test_a_session_that_was_saved_goes_on_in_another_engine(
    codec: StreamingMimi, decoder: LlamaDecoder, tmp_path: Path
) -> None:
    """Pins a talk that begins anew tomorrow, and a voice that anybody on the machine may read."""
    path = tmp_path / "talk.session"
    with Engine(FrameStep(codec, decoder, 1, WINDOW, REWIND)) as engine, engine.open(seed=4) as session:
        hear(session, 20)
        say(session, 3)
        hear(session, 2, seed=7)
        session.save(path)
        wanted = say(session)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["talk.session"]
    with Engine(FrameStep(codec, decoder, 2, WINDOW, REWIND)) as engine, engine.open() as first:
        hear(first, 1)
        with engine.load(path) as session:
            assert session.seed == 4
            assert np.array_equal(say(session), wanted)


def test_a_file_that_is_no_saved_session_is_refused_and_the_engine_goes_on(engine: Engine, tmp_path: Path) -> None:
    """Pins a wrong file that takes a slot, or the engine, with it."""
    path = tmp_path / "talk.session"
    for content in (b"", b"x", b"\x80\x04\x95" * 100):
        path.write_bytes(content)
        with pytest.raises(SnapshotError):
            engine.load(path)
    with pytest.raises(FileNotFoundError):
        engine.load(tmp_path / "nothing")
    assert engine.stats().sessions == 0


def test_what_cannot_be_is_refused_and_nothing_is_lost(engine: Engine, tmp_path: Path) -> None:
    """Pins a mark, a fork or a file of a session in the middle of a word."""
    with engine.open(seed=1) as session, engine.open(seed=1) as other:
        hear(session, 3)
        hear(other, 3)
        mark = session.mark()
        speaking = session.speak(5)
        first = next(speaking)
        for call in (session.mark, session.fork, lambda: session.save(tmp_path / "x"), lambda: session.return_to(mark)):
            with pytest.raises(SessionError):
                call()
        assert np.array_equal(np.stack([first, *speaking]), say(other, 5))
        with pytest.raises(SessionError):
            other.return_to(mark)
        with pytest.raises(ValueError, match="temperature"):
            session.return_to(mark, temperature=-1)
        mark.forget()
        for call in (mark.forget, lambda: session.return_to(mark)):
            with pytest.raises(SessionError):
                call()
        hear(session, 1)
    assert list(tmp_path.iterdir()) == []


def test_several_continuations_are_those_that_each_seed_gives_alone(engine: Engine) -> None:
    """Pins continuations that depend on how many are made."""
    prompt = speech(4, seed=2)[:-700]
    several = streaming.continuations(prompt, 4, max_frames=6, engine=engine, seeds=[5, 6, 7, 8])
    alone = streaming.continuations(prompt, 1, max_frames=6, engine=engine, seeds=[7])
    assert [pcm.shape for pcm in several] == [(6 * FRAME,)] * 4
    assert np.abs(several[2] - alone[0]).max() < 1e-4
    assert not np.array_equal(several[0], several[1])
    assert engine.stats().sessions == 0


def test_continuations_that_cannot_be_are_refused_and_leave_no_session(engine: Engine) -> None:
    """Pins slots that an error keeps for good."""
    with pytest.raises(EmptyPromptError):
        streaming.continuations(np.zeros(0, np.float32), 1, engine=engine)
    with pytest.raises(EngineFullError):
        streaming.continuations(speech(1), 5, engine=engine)
    with pytest.raises(ValueError, match="seeds"):
        streaming.continuations(speech(1), 2, engine=engine, seeds=[1])
    with pytest.raises(ValueError, match="count"):
        streaming.continuations(speech(1), 0, engine=engine)
    assert engine.stats().sessions == 0
