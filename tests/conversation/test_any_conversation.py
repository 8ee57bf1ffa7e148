"""Whatever is said, told and waited for, in any order: what holds of every conversation."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from streaming.audio import FRAME
from streaming.conversation.conversation import HeardByClock, HeardNothing, Received
from streaming.conversation.outbox import End, Reply
from streaming.conversation.takes import TakesMemory
from streaming.engine.events import QUEUED_FRAMES
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Interrupted, TurnDone, TurnSpeaking, VadOptions
from tests.conversation.engine_model import EngineModel, Talk

W = 768
TURNS = st.sampled_from([0, 0, 0, 0, 1, 2])
"""0: the last that the client was told of."""
SAMPLES = st.sampled_from([0, 1, FRAME - 1, FRAME, 3 * FRAME, 10**9])
VADS = st.builds(
    VadOptions,
    silence_ms=st.sampled_from([80, 160]),
    prefix_ms=st.sampled_from([0, 100]),
    barge_in=st.booleans(),
    respond=st.booleans(),
)
SAMPLINGS = st.none() | st.builds(messages.SamplingOptions, top_k=st.integers(0, 3))
SECONDS = st.sampled_from([None, 0.08, 0.4])
WORDS: st.SearchStrategy[Received] = st.one_of(
    st.builds(messages.Speak, turn=TURNS, max_seconds=SECONDS, sampling=SAMPLINGS),
    st.builds(messages.Interrupt, turn=TURNS, heard_samples=SAMPLES),
    st.builds(HeardByClock, TURNS),
    st.builds(HeardNothing, TURNS),
    st.builds(messages.Played, turn=TURNS, samples=SAMPLES),
    st.builds(messages.InputClear, keep_samples=SAMPLES),
    st.builds(
        messages.SessionUpdate,
        turn_taking=st.sampled_from([None, "manual", "vad"]),
        vad=st.none() | VADS,
        max_seconds=SECONDS,
        sampling=SAMPLINGS,
    ),
)
STARTS = st.fixed_dictionaries(
    {
        "turn_taking": st.sampled_from(["manual", "vad"]),
        "pace": st.sampled_from(["realtime", "fast"]),
        "lag": st.sampled_from(["drop", "wait"]),
        "max_seconds": st.sampled_from([0.08, 0.4, 4.0]),
        "lead_ms": st.sampled_from([80, 240]),
        "vad": VADS,
    }
)
SPEECHES = st.lists(st.tuples(st.sampled_from([0.0, 0.9]), st.integers(1, 6)), min_size=1, max_size=4)
"""Windows of silence and of speech, in runs."""
ACTS = st.one_of(
    st.tuples(st.just("voice"), SPEECHES),
    st.tuples(st.just("say"), WORDS),
    st.tuples(st.just("say"), WORDS),
    st.tuples(st.just("turn"), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 8)),
    st.tuples(st.just("send"), st.integers(1, 8)),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.08, 0.3, 1.0])),
    st.tuples(st.just("drain"), st.none()),
)


class Checked(Talk):
    """A conversation whose replies and deadlines are looked at as they come."""

    def __init__(self, start: dict[str, object], room: int, sent_is_heard: bool, takes: int = 0) -> None:
        memory = TakesMemory(takes) if takes else None
        engine = EngineModel(room=room, length=9)
        engine.reach = 3
        super().__init__(engine=engine, sent_is_heard=sent_is_heard, takes=memory, **start)
        self.taken: list[Reply] = []
        self.interrupted: dict[int, int] = {}  # by turn: how many replies were taken before the client said so

    def act(self, kind: str, what: object) -> None:
        if kind == "voice":
            assert isinstance(what, list)
            if self.conversation.ready:
                self.voice(*(probability for probability, windows in what for _ in range(windows)))
        elif kind == "say":
            self.speak_up(what)
        elif kind == "turn":
            assert isinstance(what, int)
            self.act("voice", [(0.9, 5), (0.0, 5)])
            self.speak_up(messages.Speak(turn=messages.OPEN_TURN))
            self.step(20)
            self.taken += self.replies(what)
        elif kind == "step":
            assert isinstance(what, int)
            self.step(what)
        elif kind == "send":
            assert isinstance(what, int)
            self.taken += self.replies(what)
        elif kind == "wait":
            assert isinstance(what, float)
            self.wait(what)
        else:
            self.conversation.drain()
        if self.conversation.end is None:
            self.conversation.tick(self.now)
        if self.conversation.end is None:
            assert self.conversation.deadline(self.now) > self.now

    def speak_up(self, word: object) -> None:
        if not self.conversation.ready or self.conversation.end is not None:
            return
        if isinstance(word, messages.Interrupt | HeardByClock | HeardNothing | messages.Played) and word.turn == 0:
            word = replace(word, turn=max(1, self.turns()))
        errors = self.errors()
        self.conversation.receive(word, self.now)  # type: ignore[arg-type]
        if isinstance(word, messages.Interrupt | HeardByClock | HeardNothing) and self.errors() == errors:
            self.interrupted.setdefault(word.turn, len(self.taken))

    def turns(self) -> int:
        return sum(isinstance(reply, TurnSpeaking) for reply in self.counts.replies)

    def errors(self) -> int:
        return sum(isinstance(reply, messages.Error) for reply in self.counts.replies)

    def finish(self) -> None:
        """Let all that was begun come to its end."""
        for _ in range(40):
            self.step()
            self.taken += self.replies()
            self.wait(0.5)


def replace(word: Any, **changes: Any) -> Any:
    if isinstance(word, HeardByClock | HeardNothing):
        return dataclasses.replace(word, **changes)
    return structs.replace(word, **changes)


def check_replies(talk: Checked) -> None:
    """Check the course of the turns, as a client sees it."""
    speaking = sent = 0  # the turn that is being spoken, and samples of it
    done = 0
    for place, reply in enumerate(talk.taken):
        match reply:
            case TurnSpeaking(turn=turn):
                assert turn == done + 1 and not speaking, "turns come one after another"
                speaking, sent = turn, 0
            case AudioMessage(turn, position, pcm):
                assert turn == speaking, "audio comes within its turn"
                assert position == sent, "audio has no gap"
                assert place < talk.interrupted.get(turn, 10**9), "audio came after the interruption"
                sent += len(pcm)
            case TurnDone(turn=turn, samples=samples):
                assert turn == speaking
                assert samples == sent, "the end counts what was sent"
                done, speaking = turn, 0
            case Interrupted(turn=turn, kept_samples=kept):
                assert turn <= done and not speaking
                assert kept <= sent or turn < done
            case End():
                assert place == len(talk.taken) - 1
            case messages.Error(fatal=fatal):
                assert not fatal


def check_input(talk: Checked) -> None:
    """Check that the engine hears what was said, in order and nothing twice."""
    heard = np.concatenate([np.zeros(1, np.float32), *talk.engine.frames]) * 2**15
    values = heard[heard > 0]  # without padding
    assert np.all(np.diff(values) >= 0)
    counts = np.unique_counts(values).counts
    assert np.all(counts <= 8)


@settings(max_examples=250)
@given(
    start=STARTS,
    room=st.sampled_from([1, 3, QUEUED_FRAMES]),
    sent_is_heard=st.booleans(),
    takes=st.sampled_from([0, 1]),
    acts=st.lists(ACTS, max_size=30),
)
def test_any_conversation_keeps_its_promises(
    start: dict[str, object], room: int, sent_is_heard: bool, takes: int, acts: list[tuple[str, object]]
) -> None:
    """Commands are legal (the engine's model asserts it), turns follow each other, audio is whole, time goes on."""
    talk = Checked(start, room, sent_is_heard, takes)
    for kind, what in acts:
        talk.act(kind, what)
    talk.finish()
    check_replies(talk)
    check_input(talk)
    assert talk.conversation.end is not None or talk.conversation.ready, "everything that waits is handled at last"
    times = [turn.turn for turn in talk.taken if isinstance(turn, AudioMessage)]
    assert all(before <= after for before, after in pairwise(times))
