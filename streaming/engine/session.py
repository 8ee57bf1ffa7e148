"""One session: its stream of commands, its turns, and how far it may run ahead of its listener.

Commands are queued in the order in which they are given and take effect in that order, so what a session does depends
on what it was told and never on when. They never block; what comes of them is told to the session's owner.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from threading import Condition
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.config import Sampling
from streaming.engine.events import (
    QUEUED_FRAMES,
    EndReason,
    Event,
    Failed,
    FrameHeard,
    FrameSpoken,
    InputCleared,
    Interrupted,
    Kept,
    Marked,
    StepAudio,
    TurnDone,
    TurnSpeaking,
    WentBack,
)
from streaming.engine.snapshot import Books, SessionSnapshot
from streaming.errors import EmptyPromptError, EngineStoppedError, PromptTooLongError, SessionError, StreamingError
from streaming.files import AnyBytes

_LOG = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]
"""A function of the session's owner, called with each event."""


class StepResult(Protocol):
    """The result of a step of R rows: pcm float32 [R, 1920], codes int64 [R, Q], ended, broken bool [R].

    The arrays are the caller's to keep: they go to the sessions' owners as they are.
    """

    @property
    def pcm(self) -> NDArray[np.float32]: ...
    @property
    def codes(self) -> NDArray[np.int64]: ...
    @property
    def ended(self) -> NDArray[np.bool_]: ...
    @property
    def broken(self) -> NDArray[np.bool_]: ...


class SlotCopy(Protocol):
    """A slot's state in the host's memory, made by a step and for steps of the same `identity`.

    frames: how long its stream was; reach: how far it can be rewound. pieces: the bytes of each part of it, by a number
    of its own; copies of one stream share parts.
    """

    @property
    def identity(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def reach(self) -> int: ...
    def pieces(self) -> dict[int, int]: ...


class Step(Protocol):
    """The frame step, as the engine sees it. `streaming.frame_step.FrameStep` is the real one."""

    @property
    def num_slots(self) -> int: ...
    @property
    def num_codebooks(self) -> int: ...
    @property
    def context_frames(self) -> int: ...
    @property
    def rewind_frames(self) -> int: ...
    @property
    def identity(self) -> str: ...
    def open(self, slot: int, sampling: Sampling) -> None: ...
    def configure(self, slot: int, sampling: Sampling) -> None: ...
    def rewind(self, slot: int, frames: int) -> None: ...
    def reach(self, slot: int) -> int: ...
    def frames(self, slot: int) -> int: ...
    def copy(self, slot: int, reach: int, base: Any = None, common: int = 0) -> Generator[None, None, SlotCopy]: ...
    def put(
        self, slot: int, copy: Any, sampling: Sampling, common: int = 0, longest: int | None = None
    ) -> Generator[None]: ...
    @property
    def most_packed_bytes(self) -> int: ...
    def pack(self, copy: Any, said: dict[str, str]) -> memoryview: ...
    def unpack(self, data: AnyBytes) -> tuple[SlotCopy, dict[str, str]]: ...
    def is_fatal(self, error: Exception) -> bool: ...
    def follow(self) -> None: ...
    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: NDArray[np.float32],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64],
    ) -> StepResult: ...


class State(enum.Enum):
    LISTENING = enum.auto()
    SPEAKING = enum.auto()
    CLOSED = enum.auto()


@dataclass(frozen=True, slots=True)
class _Listen:
    pcm: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Speak:
    max_frames: int
    lead_frames: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class _Interrupt:
    turn: int
    heard_frames: int


@dataclass(frozen=True, slots=True)
class _ClearInput:
    keep_frames: int


@dataclass(frozen=True, slots=True)
class _Configure:
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class _SetMark:
    name: str


@dataclass(frozen=True, slots=True)
class _DropMark:
    name: str


@dataclass(frozen=True, slots=True)
class _GoBack:
    name: str


@dataclass(frozen=True, slots=True)
class _Keep:
    pass


_Command = _Listen | _Speak | _Interrupt | _ClearInput | _Configure | _SetMark | _DropMark | _GoBack | _Keep
_AT_ANY_TIME = _Interrupt | _Configure | _DropMark | _Keep
"""Commands that take effect while the session speaks, too."""
_ONWARD = _Listen | _Speak | _Configure
"""Commands that may take effect while a mark is being copied: they take nothing back, and copy nothing."""


@dataclass(slots=True)
class _Mark:
    """A moment to go back to. common: how many frames its stream and the slot's have had in common ever since, from
    the first on. longest: the longest that the slot's stream has been since.
    """

    copy: SlotCopy
    prompt_frames: int
    common: int
    longest: int


@dataclass(slots=True)
class _Chore:
    """Work that the engine's thread does for a session in pieces, between steps. done: called at the end, with the copy
    that it made. longest: how long the stream may get meanwhile.
    """

    work: Generator[None, None, SlotCopy | None]
    done: Callable[[SlotCopy | None], None]
    longest: int


class EngineSession:
    """A session as the server drives it. `Engine.attach` makes one; its methods may be called from any thread.

    `turn` counts from 1. Everything marked "engine's thread" is called by the scheduler, with the engine's lock held.
    """

    def __init__(
        self,
        slot: int,
        step: Step,
        changed: Condition,
        on_event: OnEvent,
        sampling: Sampling,
        slides: bool,
        snapshot: SessionSnapshot | None = None,
    ) -> None:
        """snapshot: of the session that this one goes on with."""
        self.slot = slot
        self.seed = sampling.seed
        self._step, self._changed, self._on_event = step, changed, on_event
        self._slides = slides
        self._error: StreamingError | None = None  # what ended it
        self._state = State.LISTENING
        self.awake = True
        """True if the engine has to look at it: it was told something, or has more to do. The engine clears this."""
        self.unclean = True
        """True if something of an earlier stream may be in the slot: no command takes effect before `make_clean`."""
        self._commands: deque[_Command] = deque()
        self._queued_frames = 0
        self._heard_any = False
        self._sampling = sampling
        # The state once all commands given so far have taken effect: what a new command has to fit
        self._speaking_next = False
        self._turn_next = 1
        self._prompt_next = 0
        # The state now
        self._turn = 1
        self._prompt_frames = 0  # heard in this turn
        self._spoken = 0  # frames kept of the continuation in this turn, or, while listening, in the last
        self._spoken_before = 0  # the same of the continuation before that one
        self._released = 0
        self._speak = _Speak(0, 0, 0.0)
        self._first_frame_ms: float | None = None
        self._step_seconds = 0.0
        self._steps = 0
        # The marks by name; and for each mark that was asked for, the state that a new command has to fit there
        self._marks: dict[str, _Mark] = {}
        self._marks_next: dict[str, tuple[int, bool]] = {}
        self._chore: _Chore | None = None
        if snapshot is not None:
            self._resume(snapshot)

    # Commands, from any thread

    @property
    def turn(self) -> int:
        """The turn that a new command belongs to."""
        with self._changed:
            return self._turn_next

    @property
    def speaking(self) -> bool:
        """Whether, after all commands given so far, the session speaks."""
        with self._changed:
            return self._speaking_next

    @property
    def closed(self) -> bool:
        return self._state is State.CLOSED

    def listen(self, pcm: NDArray[np.float32]) -> bool:
        """Hear one frame, float32 [1920], which is now the session's: do not write into it again. One of fewer samples
        (at least one) is the end of what is said: the encoder takes it as it takes the end of a file.

        False if `QUEUED_FRAMES` wait already: offer it again after a `FrameHeard`.

        Raises `SessionError` while speaking. A session that does not slide fails with `PromptTooLongError` when it
        hears more than its context holds.
        """
        assert pcm.ndim == 1 and 1 <= len(pcm) <= FRAME and pcm.dtype == np.float32, (pcm.shape, pcm.dtype)
        with self._changed:
            self._require_open()
            if self._speaking_next:
                raise SessionError("the session is speaking: interrupt it before it listens again")
            if self._queued_frames >= QUEUED_FRAMES:
                return False
            self._queued_frames += 1
            self._prompt_next += 1
            self._heard_any = True
            self._give(_Listen(pcm))
            return True

    @property
    def queued_frames(self) -> int:
        """Frames of speech that wait for a step: how far the session is behind its speaker."""
        with self._changed:
            return self._queued_frames

    def wait_for_room(self) -> None:
        """Block until `listen` has room again, or the session is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued_frames < QUEUED_FRAMES or self._state is State.CLOSED)

    def speak(self, max_frames: int, lead_frames: int) -> int:
        """Speak once everything before is heard: at most `max_frames`, never more than `lead_frames` ahead of
        `release`.

        Returns the number of the turn. Raises `EmptyPromptError` if nothing was ever heard, `SessionError` while
        speaking.
        """
        assert max_frames >= 1 and lead_frames >= 1, (max_frames, lead_frames)
        with self._changed:
            self._require_open()
            if self._speaking_next:
                raise SessionError("the session is already speaking")
            if not self._heard_any:
                raise EmptyPromptError("nothing was heard yet: send at least one sample of speech first")
            self._speaking_next = True
            self._give(_Speak(max_frames, lead_frames, time.monotonic()))
            return self._turn_next

    def release(self, turn: int, frames: int) -> None:
        """Note that the listener has had the first `frames` of this turn's continuation. Ignored for other turns."""
        with self._changed:
            if turn == self._turn and frames > self._released:
                self._released = frames
                if self._due:
                    self._wake()

    def interrupt(self, turn: int, heard_samples: int) -> None:
        """End the turn's continuation, and cut what was not heard of it, to the frame. Answered with `Interrupted`.

        After the continuation has ended it still cuts, unless the next turn has begun to listen.
        """
        assert heard_samples >= 0, heard_samples
        with self._changed:
            self._require_open()
            if self._speaking_next and turn == self._turn_next:
                self._begin_next_turn()
            self._give(_Interrupt(turn, heard_samples // FRAME))

    def clear_input(self, keep_frames: int) -> None:
        """Take back what was heard in this turn but for its first frames, as far as can be. Answered with
        `InputCleared`, which says what is kept.

        A stream that holds nothing else can be emptied; any other can be cut back by the step's `rewind_frames`. Raises
        `SessionError` while speaking.
        """
        assert keep_frames >= 0, keep_frames
        with self._changed:
            self._require_open()
            if self._speaking_next:
                raise SessionError("the session is speaking: interrupt it first")
            self._prompt_next = min(self._prompt_next, keep_frames)
            self._heard_any = self._heard_any and (self._turn_next > 1 or self._prompt_next > 0)
            self._give(_ClearInput(keep_frames))

    def mark(self, name: str) -> None:
        """Remember this moment of the stream, to go back to. Answered with `Marked`. Raises `SessionError` while
        speaking. A mark of the same name is forgotten.
        """
        with self._changed:
            self._require_open()
            if self._speaking_next:
                raise SessionError("the session is speaking: a mark is set before it speaks, or after")
            self._marks_next[name] = (self._prompt_next, self._heard_any)
            self._give(_SetMark(name))

    def unmark(self, name: str) -> None:
        """Forget a mark. Answered with `Marked`. Raises `SessionError` if there is none of this name."""
        with self._changed:
            self._require_mark(name)
            del self._marks_next[name]
            self._give(_DropMark(name))

    def go_back(self, name: str) -> None:
        """Make the stream what it was at a mark, as if nothing had been since. Answered with `WentBack`.

        Turns are counted on. Raises `SessionError` while speaking, and if there is no mark of this name.
        """
        with self._changed:
            self._require_mark(name)
            if self._speaking_next:
                raise SessionError("the session is speaking: interrupt it before it goes back")
            self._prompt_next, self._heard_any = self._marks_next[name]
            self._give(_GoBack(name))

    def keep(self) -> None:
        """Copy the session out once all that was told before has happened, speaking or not. Answered with `Kept`."""
        with self._changed:
            self._require_open()
            self._give(_Keep())

    def configure(self, sampling: Sampling) -> None:
        """Change how tokens are drawn from here on."""
        with self._changed:
            self._require_open()
            self._give(_Configure(sampling))

    def close(self) -> None:
        """End the session; its slot is free for the next. May be called twice."""
        with self._changed:
            self._state = State.CLOSED
            self._commands.clear()
            self._wake()

    def _give(self, command: _Command) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        self.awake = True
        self._changed.notify_all()

    def _require_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._state is State.CLOSED:
            raise EngineStoppedError("the session is closed")

    def _require_mark(self, name: str) -> None:
        self._require_open()
        if name not in self._marks_next:
            raise SessionError(f"there is no mark {name!r} to go back to")

    def _begin_next_turn(self) -> None:
        """Count what is given from here on to the next turn."""
        self._speaking_next = False
        self._turn_next += 1
        self._prompt_next = 0

    # Engine's thread

    def next_frame(self) -> NDArray[np.float32] | None:
        """Let all commands that are due take effect, and return the frame to hear now, if there is one."""
        while self._commands and not self.unclean and self._state is not State.CLOSED:
            if not self._may_take(self._commands[0]):
                return None
            command = self._commands.popleft()
            assert self._state is State.LISTENING or isinstance(command, _AT_ANY_TIME), command
            match command:
                case _Listen(pcm):
                    if self._slides or self._step.frames(self.slot) < self._step.context_frames:
                        return pcm
                    self.fail(self._too_long())
                case _Speak():
                    self._start_speaking(command)
                case _Interrupt(turn, heard_frames):
                    self._cut(turn, heard_frames)
                case _ClearInput(keep_frames):
                    self._take_back(keep_frames)
                case _Configure(sampling):
                    self._sampling = sampling
                    self._step.configure(self.slot, sampling)
                case _SetMark(name):
                    self._set_mark(name)
                case _DropMark(name):
                    del self._marks[name]
                    self._tell(Marked(self._held_bytes()))
                case _GoBack(name):
                    self._go_back(name)
                case _Keep():
                    self._copy_out()
        return None

    def _may_take(self, command: _Command) -> bool:
        return self._chore is None or (isinstance(command, _ONWARD) and self._may_advance)

    @property
    def _may_advance(self) -> bool:
        longest = None if self._chore is None else self._chore.longest
        return longest is None or (longest > 0 and self._step.frames(self.slot) < longest)

    @property
    def works(self) -> bool:
        """Return whether `work` has something to do."""
        return self._chore is not None and not self.unclean and self._state is not State.CLOSED

    def work(self) -> None:
        """Do a piece of the work between steps, of at most about a megabyte. Called without the engine's lock."""
        chore = self._chore
        assert chore is not None
        try:
            next(chore.work)
        except StopIteration as ended:
            with self._changed:
                self._chore = None
                chore.done(ended.value)

    def make_clean(self) -> None:
        """Give the slot to this stream. Called without the engine's lock: it may write many megabytes."""
        self._step.open(self.slot, self._sampling)
        self.unclean = False

    @property
    def may_speak(self) -> bool:
        """Return whether a frame of the continuation is due."""
        return self._due and self._may_advance

    @property
    def _due(self) -> bool:
        return self._state is State.SPEAKING and self._spoken - self._released < self._speak.lead_frames

    def heard(self, codes: NDArray[np.int64]) -> None:
        """Note that the frame that `next_frame` gave was heard by a step. The engine wakes whoever waits for room, once
        for all sessions of the step.
        """
        self._queued_frames -= 1
        self._prompt_frames += 1
        self._tell(FrameHeard(codes))

    def spoke(self, audio: StepAudio, row: int, codes: NDArray[np.int64], ended: bool, seconds: float) -> None:
        """Note a step of the continuation, which gave a frame unless the model `ended` its speech."""
        if self._state is not State.SPEAKING:
            return
        self._steps += 1
        self._step_seconds += seconds
        if ended:
            self._stop_speaking("end")
            return
        if self._first_frame_ms is None:
            self._first_frame_ms = 1e3 * (time.monotonic() - self._speak.asked_at)
        self._spoken += 1
        self._tell(FrameSpoken(self._turn, self._spoken - 1, audio, row, codes))
        if self._spoken == self._speak.max_frames and not self.closed:
            self._stop_speaking("max_frames")

    def fail(self, error: StreamingError) -> None:
        """End the session, and tell its owner why."""
        if self._state is not State.CLOSED:
            self._tell(Failed(error))
            self._error = error
            self.close()

    def _tell(self, event: Event) -> None:
        if self._state is State.CLOSED:
            return
        try:
            self._on_event(event)
        except Exception:  # the boundary to whoever owns the session: its fault is not the other sessions'
            _LOG.exception("a session's `on_event` failed; the session is closed")
            self.close()

    def _too_long(self) -> PromptTooLongError:
        seconds = self._step.context_frames * FRAME / SAMPLE_RATE
        return PromptTooLongError(
            f"the prompt is longer than the context of {seconds:.1f} s; make it shorter, or let the context slide"
        )

    def _start_speaking(self, speak: _Speak) -> None:
        self._state, self._speak = State.SPEAKING, speak
        self._spoken_before = self._spoken
        self._spoken = self._released = self._steps = 0
        self._step_seconds, self._first_frame_ms = 0.0, None
        dropped = max(0, self._step.frames(self.slot) + 1 - self._step.context_frames)
        self._tell(TurnSpeaking(self._turn, self._prompt_frames, dropped))

    def _stop_speaking(self, reason: EndReason) -> None:
        mean_ms = 1e3 * self._step_seconds / self._steps if self._steps else None
        done = TurnDone(self._turn, reason, self._spoken, self._first_frame_ms, mean_ms)
        self._state = State.LISTENING
        if self._turn_next == self._turn:  # no interruption in the queue was meant for it
            self._begin_next_turn()
        self._turn += 1
        self._prompt_frames = 0
        self._tell(done)

    def _take_back(self, keep_frames: int) -> None:
        frames = max(0, self._prompt_frames - keep_frames)
        if frames and frames == self._step.frames(self.slot):
            self.unclean = True
            self._changed_from(0)
        else:
            frames = min(frames, self._step.reach(self.slot))
            self._rewind(frames)
        self._prompt_frames -= frames
        self._tell(InputCleared(self._turn, frames, self._prompt_frames))

    def _cut(self, turn: int, heard_frames: int) -> None:
        speaking, spoken = self._state is State.SPEAKING, self._spoken
        last = self._turn if speaking else self._turn - 1  # the turn that was spoken last
        kept = {last: spoken, last - 1: self._spoken_before}.get(turn, 0)
        if turn == last and (speaking or self._prompt_frames == 0):
            kept = min(spoken, max(heard_frames, spoken - self._step.reach(self.slot)))
            self._rewind(spoken - kept)
            if speaking:
                self._stop_speaking("interrupted")
            self._spoken = kept  # a second, late interruption counts from here
        self._tell(Interrupted(turn, kept))

    # Marks and snapshots

    def _rewind(self, frames: int) -> None:
        self._changed_from(self._step.frames(self.slot) - frames)
        self._step.rewind(self.slot, frames)

    def _changed_from(self, frames: int) -> None:
        """Note that the stream is another from here on: the marks have no more in common with it."""
        longest = self._step.frames(self.slot)
        for mark in self._marks.values():
            mark.longest = max(mark.longest, longest)
            mark.common = min(mark.common, frames)

    def _held_bytes(self) -> int:
        pieces: dict[int, int] = {}
        for mark in self._marks.values():
            pieces |= mark.copy.pieces()
        return sum(pieces.values())

    def _set_mark(self, name: str) -> None:
        self._marks.pop(name, None)
        frames, prompt_frames = self._step.frames(self.slot), self._prompt_frames
        base = max(self._marks.values(), key=lambda mark: mark.common, default=None)

        def marked(copy: SlotCopy | None) -> None:
            assert copy is not None
            self._marks[name] = _Mark(copy, prompt_frames, frames, frames)
            self._tell(Marked(self._held_bytes()))

        common = 0 if base is None else min(base.common, base.copy.frames)
        work = self._step.copy(self.slot, 0, None if base is None else base.copy, common)
        self._chore = _Chore(work, marked, frames + self._step.rewind_frames)

    def _go_back(self, name: str) -> None:
        mark = self._marks[name]
        self._changed_from(min(self._step.frames(self.slot), mark.common))
        work = self._step.put(self.slot, mark.copy, self._sampling, mark.common, mark.longest)

        def is_back(_: SlotCopy | None) -> None:
            self._prompt_frames, self._spoken, self._spoken_before = mark.prompt_frames, 0, 0
            mark.common = mark.longest = mark.copy.frames
            self._tell(WentBack(self._turn, mark.prompt_frames))

        self._chore = _Chore(work, is_back, 0)

    def _copy_out(self) -> None:
        frames = self._step.frames(self.slot)
        books = Books(
            slides=self._slides,
            sampling=self._sampling,
            speaking=self._state is State.SPEAKING,
            turn=self._turn,
            prompt_frames=self._prompt_frames,
            spoken=self._spoken,
            spoken_before=self._spoken_before,
            released=self._released,
            max_frames=self._speak.max_frames,
            lead_frames=self._speak.lead_frames,
            first_frame_ms=self._first_frame_ms,
            step_seconds=self._step_seconds,
            steps=self._steps,
        )

        def kept(copy: SlotCopy | None) -> None:
            self._tell(Kept(SessionSnapshot(books, copy)))

        work = self._step.copy(self.slot, self._step.reach(self.slot))
        self._chore = _Chore(work, kept, frames)

    def _resume(self, snapshot: SessionSnapshot) -> None:
        """Become the session of a snapshot, whose copy is put into the slot by and by."""
        books = snapshot.books
        self._state = State.SPEAKING if books.speaking else State.LISTENING
        self._heard_any = snapshot.copy.frames > 0
        self._speaking_next = books.speaking
        self._turn = self._turn_next = books.turn
        self._prompt_frames = self._prompt_next = books.prompt_frames
        self._spoken, self._spoken_before, self._released = books.spoken, books.spoken_before, books.released
        self._speak = _Speak(books.max_frames, books.lead_frames, time.monotonic())
        self._first_frame_ms, self._step_seconds, self._steps = books.first_frame_ms, books.step_seconds, books.steps
        self.unclean = False  # putting makes it clean
        work = self._step.put(self.slot, snapshot.copy, self._sampling)
        self._chore = _Chore(work, lambda _: None, 0)
