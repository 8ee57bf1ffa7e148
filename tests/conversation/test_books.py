"""A conversation's books: another conversation goes on with them and nobody notices, and none that lie are taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from streaming.conversation.books import ConversationBooks, samples_of
from streaming.conversation.conversation import Conversation
from streaming.errors import SnapshotError
from streaming.protocol.messages import SamplingOptions
from tests.conversation.engine_model import Talk, sampling
from tests.conversation.test_any_conversation import ACTS, STARTS, Checked


def moved(talk: Talk) -> None:
    """Go on with another conversation, from the bytes of this one's books, where this one is calm."""
    engine, before = talk.engine, talk.conversation
    if before.end is not None or not before.calm or engine._commands or engine.events:
        return
    speaking = engine._speaking
    books = msgspec.json.decode(msgspec.json.encode(before.books(talk.now)), type=ConversationBooks)
    books.check(engine._turn, speaking)
    after = Conversation(
        engine,
        talk.outbox,
        books.start,
        replace(sampling(), seed=books.start.sampling.seed or 0),
        rewind_frames=16,
        idle_s=60.0,
        observer=talk.counts,
        now=talk.now,
        sent_is_heard=before._sent_is_heard,
        books=books,
    )
    after._active_at, after._draining = before._active_at, before._draining
    after._lagging_told_at = before._lagging_told_at
    talk.conversation = after


@given(
    STARTS,
    st.lists(ACTS, min_size=1, max_size=30),
    st.integers(1, 25),
    st.booleans(),
    st.lists(st.booleans(), min_size=30, max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_whoever_goes_on_with_the_books_says_and_does_the_same(
    start: dict[str, object], acts: list[tuple[str, Any]], room: int, sent_is_heard: bool, moves: list[bool]
) -> None:
    """Pins anything that a conversation knows and its books do not: a prompt's beginning, the clock, a voice."""
    stayed, went = Checked(start, room, sent_is_heard), Checked(start, room, sent_is_heard)
    for (kind, what), moves_now in zip(acts, moves, strict=False):
        stayed.act(kind, what)
        went.act(kind, what)
        if moves_now:
            moved(went)
    stayed.finish()
    went.finish()
    told = [reply if not hasattr(reply, "pcm") else (reply.turn, reply.position_samples) for reply in stayed.taken]
    also = [reply if not hasattr(reply, "pcm") else (reply.turn, reply.position_samples) for reply in went.taken]
    assert told == also
    assert stayed.engine.log == went.engine.log
    assert [frame.tobytes() for frame in stayed.engine.frames] == [frame.tobytes() for frame in went.engine.frames]


def books() -> ConversationBooks:
    """Those of a conversation in its second turn."""
    talk = Talk()
    talk.turn(2)
    return talk.conversation.books(talk.now)


@pytest.mark.parametrize(
    "lie",
    [
        {"turn": 2},
        {"tip": 7},
        {"playback": None},
        {"heard_due_s": 1.0},
        {"unsaid": (1, 5)},
        {"applied": SamplingOptions()},
        {"cut": dict.fromkeys(range(1, 2000), 5)},
    ],
)
def test_books_that_contradict_themselves_are_refused(lie: dict[str, Any]) -> None:
    """Pins books that are believed, and make an assertion fail in the middle of a session."""
    told = books()
    told.check(1, True)
    with pytest.raises(SnapshotError):
        structs.replace(told, **lie).check(1, True)


def test_books_of_another_turn_than_the_engines_are_refused() -> None:
    """Pins a conversation and an engine that count differently."""
    with pytest.raises(SnapshotError):
        books().check(2, True)
    with pytest.raises(SnapshotError):
        books().check(1, False)


@pytest.mark.parametrize("data", [b"abc", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"])
def test_audio_that_is_none_is_refused(data: bytes) -> None:
    """Pins NaN that a model would never be rid of."""
    with pytest.raises(SnapshotError):
        samples_of(data)


def test_at_rest_nothing_is_said_or_played_and_the_settings_stay() -> None:
    """Pins a session that goes on after a crash in the middle of a turn that is lost."""
    talk = Talk(turn_taking="vad", max_seconds=3.0)
    talk.voice(0.9, 0.9, 0.9, 0.9)
    told = talk.conversation.books(talk.now)
    rest = told.at_rest(4)
    rest.check(4, False)
    assert (rest.position, rest.turn, rest.max_seconds, rest.playback) == (told.position, 4, 3.0, None)
    assert rest.taker is not None and rest.taker.state == "idle"
    went = Talk(turn_taking="vad", max_seconds=3.0)
    went.position = told.position + 9000
    went.conversation._go_on_with(rest, went.now)
    went.voice(0.9, 0.9, 0.9, 0.9)
    assert [reply.turn for reply in went.told() if reply.type == "speech.started"] == [4]
    assert went.engine.frames and not went.conversation.books(went.now).anew
