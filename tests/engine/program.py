"""Random programs for a session, and a sequential model of what must come of them, whatever the timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import pytest
from hypothesis import strategies as st

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.engine.events import Event, FrameSpoken, InputCleared, Interrupted, TurnDone, TurnSpeaking, WentBack
from streaming.engine.session import EngineSession
from streaming.errors import EmptyPromptError, SessionError
from tests.engine.stub_step import Entry, Stream, StubStep, codes_of, frame, heard, pcm_of, spoken

E = TypeVar("E", bound=Event)

EVERYTHING = 1000 * FRAME
"""More samples than are ever spoken here."""


@dataclass(frozen=True)
class Hear:
    values: tuple[int, ...]


@dataclass(frozen=True)
class Say:
    """A turn. cuts: what the listener claims to have heard, in frames, one interruption each; none: it has all.

    released: how many frames are released before a cut. late: the cuts come after the end. hear_first: and after a
    frame of the next turn was heard. stale: an interruption and releases of other turns come between. moved: the
    session moves to another engine while it speaks.
    """

    max_frames: int
    lead_frames: int
    cuts: tuple[int, ...]
    released: int
    late: bool
    hear_first: bool
    stale: bool
    moved: bool = False


@dataclass(frozen=True)
class Configure:
    seed: int


@dataclass(frozen=True)
class Recall:
    """An interruption, of the turn so many before this one, by a listener who has heard everything."""

    turns_ago: int


@dataclass(frozen=True)
class Clear:
    """Take back the last frames heard in this turn."""

    frames: int


@dataclass(frozen=True)
class Mark:
    """Remember this moment."""

    name: str


@dataclass(frozen=True)
class GoBack:
    """Go on from a moment that was remembered, if it was."""

    name: str


@dataclass(frozen=True)
class Move:
    """Go on in another engine."""


Act = Hear | Say | Configure | Recall | Clear | Mark | GoBack | Move


@st.composite
def says(draw: st.DrawFn, rewind_frames: int, moves: bool = False) -> Say:
    lead = draw(st.integers(1, rewind_frames))
    released = draw(st.integers(0, 4))
    # Nobody hears what was not spoken, nor takes back what was released: then what is kept is the listener's to say.
    cuts = st.lists(st.integers(released, released + lead), max_size=3).map(lambda cuts: sorted(cuts, reverse=True))
    return Say(
        draw(st.integers(1, 9)),
        lead,
        tuple(draw(cuts)),
        released,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        moves and draw(st.booleans()),
    )


def programs(rewind_frames: int = 4, max_size: int = 10, moves: bool = False) -> st.SearchStrategy[list[Act]]:
    hears = st.lists(st.integers(0, 99), min_size=1, max_size=5).map(lambda values: Hear(tuple(values)))
    rare = st.one_of(
        st.builds(Configure, st.integers(0, 9)),
        st.builds(Recall, st.integers(-1, 3)),
        st.builds(Clear, st.integers(0, 6)),
        st.builds(Mark, st.sampled_from("ab")),
        st.builds(GoBack, st.sampled_from("ab")),
    )
    if moves:
        rare = st.one_of(rare, st.just(Move()))
    talks = says(rewind_frames, moves)
    return st.lists(st.one_of(hears, talks, talks, rare), max_size=max_size)


class Driver(Protocol):
    """How to wait: with a thread behind the session, or by doing its steps oneself."""

    def wait_for(self, predicate: Callable[[], bool]) -> None: ...
    def wait_for_room(self) -> None: ...
    def pause(self) -> None: ...
    def move(self) -> tuple[EngineSession, StubStep]: ...


class ProgramRun:
    """Does a program with a session, never waiting for more than a listener must, and keeps what must come of it."""

    def __init__(self, live: EngineSession, step: StubStep, events: list[Event], driver: Driver, seed: int) -> None:
        self._live, self._step, self._events, self._driver = live, step, events, driver
        self._sampling = Sampling(seed=seed)
        self._stream = Stream()
        self._turn, self._prompt_frames, self._heard_any = 1, 0, False
        self._kept = {-1: 0, 0: 0}  # frames of each turn's continuation
        self._started: list[TurnSpeaking] = []
        self._interrupted: list[Interrupted] = []
        self._cleared: list[InputCleared] = []
        self._marks: dict[str, tuple[list[Entry], int, bool]] = {}
        self._went_back: list[WentBack] = []
        self._since = 0  # the turn from which on the stream has not gone back
        self._longest = 0  # the stream was
        self._starts: dict[int, int] = {}  # of each turn's continuation, in the stream
        self._digests: dict[int, list[int]] = {}  # of each turn's whole continuation
        self._reasons: dict[int, str] = {}
        self._least: dict[int, int] = {}  # how many frames of it must have come

    @property
    def entries(self) -> list[Entry]:
        return self._stream.entries

    def do(self, program: Sequence[Act]) -> None:
        for act in program:
            self._driver.pause()
            match act:
                case Hear(values):
                    self._hear(values)
                case Say():
                    self._say(act)
                case Configure(seed):
                    self._sampling = replace(self._sampling, seed=seed)
                    self._live.configure(self._sampling)
                case Clear(frames):
                    self._clear(frames)
                case Mark(name):
                    self._live.mark(name)
                    self._marks[name] = (list(self.entries), self._prompt_frames, self._heard_any)
                case GoBack(name):
                    self._go_back(name)
                case Move():
                    self._move()
                case Recall(turns_ago):
                    self._interrupt(self._turn - turns_ago, EVERYTHING, self._kept_of(self._turn - turns_ago))

    def check(self) -> None:
        """Wait until all is done, and compare."""
        self._interrupt(0, 0, 0)
        self._driver.wait_for(lambda: len(self._of(Interrupted)) == len(self._interrupted))
        assert self._of(TurnSpeaking) == self._started
        assert self._of(Interrupted) == self._interrupted
        assert self._of(InputCleared) == self._cleared
        assert self._of(WentBack) == self._went_back
        assert self._step.streams[self._live.slot].entries == self.entries
        turns = [event for event in self._events if isinstance(event, TurnSpeaking | FrameSpoken | TurnDone)]
        for turn, digests in self._digests.items():
            started, *frames, done = [event for event in turns if event.turn == turn]
            del turns[: 2 + len(frames)]  # turns must not overlap, or the next one is cut short here
            assert isinstance(started, TurnSpeaking)
            assert isinstance(done, TurnDone)
            assert done.frames == len(frames) >= self._least[turn]
            if done.reason != "interrupted":
                assert (done.reason, len(frames)) == (self._reasons[turn], len(digests))
            assert (done.first_frame_ms is None) == (not frames)
            for index, (event, digest) in enumerate(zip(frames, digests, strict=False)):
                assert isinstance(event, FrameSpoken)
                assert event.index == index
                np.testing.assert_array_equal(event.pcm, pcm_of(digest))
                np.testing.assert_array_equal(event.codes, codes_of(digest, self._step.num_codebooks))
        assert turns == []

    def _of(self, kind: type[E]) -> list[E]:
        return [event for event in self._events if isinstance(event, kind)]

    def _hear(self, values: Sequence[int]) -> None:
        for value in values:
            while not self._live.listen(frame(value)):
                self._driver.wait_for_room()
            self._stream.add(heard(value))
        self._prompt_frames += len(values)
        self._heard_any = True

    def _go_back(self, name: str) -> None:
        if name not in self._marks:
            with pytest.raises(SessionError):
                self._live.go_back(name)
            return
        self._live.go_back(name)
        entries, self._prompt_frames, self._heard_any = self._marks[name]
        self._stream = Stream.of(entries)
        self._longest, self._since = len(entries) + self._step.rewind_frames, self._turn
        self._kept[self._turn - 1] = self._kept[self._turn - 2] = 0
        self._went_back.append(WentBack(self._turn, self._prompt_frames))

    def _move(self) -> None:
        self._live, self._step = self._driver.move()
        self._marks.clear()  # they stay where they were

    def _clear(self, frames: int) -> None:
        # How far back it can reach depends on how much was spoken before it was cut
        self._driver.wait_for(lambda: len(self._of(TurnDone)) == self._turn - 1)
        spoken_to = [self._starts[e.turn] + e.frames for e in self._of(TurnDone) if e.turn >= self._since]
        self._live.clear_input(max(0, self._prompt_frames - frames))
        frames, length = min(frames, self._prompt_frames), len(self.entries)
        self._longest = max(self._longest, length, *spoken_to)
        if frames == length:
            self._longest = 0
        else:
            frames = min(frames, length - max(0, self._longest - self._step.rewind_frames))
        self._stream.rewind(frames)
        self._prompt_frames -= frames
        self._heard_any = self._turn > 1 or self._prompt_frames > 0
        self._cleared.append(InputCleared(self._turn, frames, self._prompt_frames))

    def _say(self, say: Say) -> None:
        if not self._heard_any:
            with pytest.raises(EmptyPromptError):
                self._live.speak(say.max_frames, say.lead_frames)
            return
        turn = self._live.speak(say.max_frames, say.lead_frames)
        assert turn == self._turn == self._live.turn
        dropped = max(0, len(self.entries) + 1 - self._step.context_frames)
        self._started.append(TurnSpeaking(turn, self._prompt_frames, dropped))
        self._starts[turn] = len(self.entries)
        whole = self._continue(say.max_frames)
        if whole > say.lead_frames:  # then it cannot be over before something is released
            self._check_refusals()
        if say.stale:
            self._driver.pause()
            self._interrupt(turn - 1, 0, self._kept[turn - 1])
            self._live.release(turn - 1, 1000)
            self._live.release(turn + 1, 1000)
        cut_short = bool(say.cuts) and not say.late
        wanted = min(max(say.cuts), whole) if cut_short else whole
        if say.moved:
            self._driver.pause()
            self._move()
        for index in range(wanted):
            self._driver.wait_for(lambda index=index: self._frames_of(turn) > index)
            if not cut_short or index < say.released:
                self._live.release(turn, index + 1)
        self._least[turn] = wanted
        if cut_short:
            assert self._frames_of(turn) <= say.released + say.lead_frames
        else:
            self._driver.wait_for(lambda: any(done.turn == turn for done in self._of(TurnDone)))
        self._turn, self._prompt_frames, self._kept[turn] = turn + 1, 0, whole
        if say.late and say.hear_first:
            self._hear([turn])
        least = whole - self._step.rewind_frames if say.late else 0
        for heard_frames in say.cuts:
            kept = min(self._kept[turn], max(heard_frames, least))
            if say.late and say.hear_first:
                kept = whole
            self._stream.rewind(self._kept[turn] - kept)
            self._kept[turn] = kept
            self._interrupt(turn, heard_frames * FRAME + turn % FRAME, kept)
            self._driver.pause()

    def _continue(self, max_frames: int) -> int:
        """Speak to the end, in the model. Returns how many frames that is."""
        digests = self._digests[self._turn] = []
        self._reasons[self._turn] = "max_frames"
        entry = spoken(self._sampling)
        while len(digests) < max_frames:
            if self._step.ends(len(self.entries), self._stream.digest_with(entry)):
                self._reasons[self._turn] = "end"
                break
            digests.append(self._stream.add(entry))
        return len(digests)

    def _check_refusals(self) -> None:
        for call in (lambda: self._live.speak(1, 1), lambda: self._live.listen(frame(0))):
            with pytest.raises(SessionError):
                call()

    def _interrupt(self, turn: int, heard_samples: int, kept: int) -> None:
        self._interrupted.append(Interrupted(turn, kept))
        self._live.interrupt(turn, heard_samples)

    def _kept_of(self, turn: int) -> int:
        return self._kept[turn] if turn in (self._turn - 1, self._turn - 2) else 0

    def _frames_of(self, turn: int) -> int:
        return sum(event.turn == turn for event in self._of(FrameSpoken))
