"""One session: its stream of commands, its turns, and how far it may run ahead of its listener.

Commands are queued in the order in which they are given and take effect in that order, so what a session does depends
on what it was told and never on when. They never block; what comes of them is told to the session's owner.
"""

from __future__ import annotations

import enum
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition
from typing import Protocol

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
    StepAudio,
    TurnDone,
    TurnSpeaking,
)
from streaming.errors import EmptyPromptError, EngineStoppedError, PromptTooLongError, SessionError, StreamingError

_LOG = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]
"""What a session's owner has called with each of its events."""


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
    def open(self, slot: int, sampling: Sampling) -> None: ...
    def configure(self, slot: int, sampling: Sampling) -> None: ...
    def rewind(self, slot: int, frames: int) -> None: ...
    def reach(self, slot: int) -> int: ...
    def frames(self, slot: int) -> int: ...
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
    frames: int


@dataclass(frozen=True, slots=True)
class _Configure:
    sampling: Sampling


_Command = _Listen | _Speak | _Interrupt | _ClearInput | _Configure


class EngineSession:
    """A session as the server drives it. `Engine.attach` makes one; its methods may be called from any thread.

    `turn` counts from 1. Everything marked "engine's thread" is called by the scheduler, with the engine's lock held.
    """

    def __init__(
        self, slot: int, step: Step, changed: Condition, on_event: OnEvent, sampling: Sampling, slides: bool
    ) -> None:
        self.slot = slot
        self.seed = sampling.seed
        self._step, self._changed, self._on_event = step, changed, on_event
        self._slides = slides
        self._error: StreamingError | None = None  # what ended it
        self._state = State.LISTENING
        self.unclean = True
        """Whether something of an earlier stream may be in the slot: no command takes effect before `make_clean`."""
        self._commands: deque[_Command] = deque()
        self._queued_frames = 0
        self._heard_any = False
        self._sampling = sampling
        # How things will be once all commands given so far have taken effect: what a new command has to fit
        self._speaking_next = False
        self._turn_next = 1
        self._prompt_next = 0
        # How things are
        self._turn = 1
        self._prompt_frames = 0  # heard in this turn
        self._spoken = 0  # frames kept of the continuation in this turn, or, while listening, in the last
        self._spoken_before = 0  # the same of the continuation before that one
        self._released = 0
        self._speak = _Speak(0, 0, 0.0)
        self._first_frame_ms: float | None = None
        self._step_seconds = 0.0
        self._steps = 0

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
        with self._changed:
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
                if self.may_speak:
                    self._changed.notify_all()

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

    def clear_input(self, frames: int) -> None:
        """Take back the last frames heard in this turn, as far as can be. Answered with `InputCleared`.

        A stream that holds nothing else can be emptied; any other can be cut back by the step's `rewind_frames`. Raises
        `SessionError` while speaking.
        """
        assert frames >= 0, frames
        with self._changed:
            self._require_open()
            if self._speaking_next:
                raise SessionError("the session is speaking: interrupt it first")
            self._prompt_next = max(0, self._prompt_next - frames)
            self._heard_any = self._heard_any and (self._turn_next > 1 or self._prompt_next > 0)
            self._give(_ClearInput(frames))

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
            self._changed.notify_all()

    def _give(self, command: _Command) -> None:
        self._commands.append(command)
        self._changed.notify_all()

    def _require_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._state is State.CLOSED:
            raise EngineStoppedError("the session is closed")

    def _begin_next_turn(self) -> None:
        """Count what is given from here on to the next turn."""
        self._speaking_next = False
        self._turn_next += 1
        self._prompt_next = 0

    # Engine's thread

    def next_frame(self) -> NDArray[np.float32] | None:
        """Let all commands that are due take effect, and return the frame to hear now, if there is one."""
        while self._commands and not self.unclean and self._state is not State.CLOSED:
            command = self._commands.popleft()
            assert self._state is State.LISTENING or isinstance(command, _Interrupt | _Configure), command
            match command:
                case _Listen(pcm):
                    if self._slides or self._step.frames(self.slot) < self._step.context_frames:
                        return pcm
                    self.fail(self._too_long())
                case _Speak():
                    self._start_speaking(command)
                case _Interrupt(turn, heard_frames):
                    self._cut(turn, heard_frames)
                case _ClearInput(frames):
                    self._take_back(frames)
                case _Configure(sampling):
                    self._sampling = sampling
                    self._step.configure(self.slot, sampling)
        return None

    def make_clean(self) -> None:
        """Give the slot to this stream. Called without the engine's lock: it may write many megabytes."""
        self._step.open(self.slot, self._sampling)
        self.unclean = False

    @property
    def may_speak(self) -> bool:
        """Whether a frame of the continuation is due."""
        return self._state is State.SPEAKING and self._spoken - self._released < self._speak.lead_frames

    def heard(self, codes: NDArray[np.int64]) -> None:
        """Note that the frame that `next_frame` gave was heard by a step."""
        self._queued_frames -= 1
        self._prompt_frames += 1
        self._changed.notify_all()
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

    def _take_back(self, frames: int) -> None:
        frames = min(frames, self._prompt_frames)
        if frames and frames == self._step.frames(self.slot):
            self.unclean = True
        else:
            frames = min(frames, self._step.reach(self.slot))
            self._step.rewind(self.slot, frames)
        self._prompt_frames -= frames
        self._tell(InputCleared(self._turn, frames, self._prompt_frames))

    def _cut(self, turn: int, heard_frames: int) -> None:
        speaking, spoken = self._state is State.SPEAKING, self._spoken
        last = self._turn if speaking else self._turn - 1  # the turn that was spoken last
        kept = {last: spoken, last - 1: self._spoken_before}.get(turn, 0)
        if turn == last and (speaking or self._prompt_frames == 0):
            kept = min(spoken, max(heard_frames, spoken - self._step.reach(self.slot)))
            self._step.rewind(self.slot, spoken - kept)
            if speaking:
                self._stop_speaking("interrupted")
            self._spoken = kept  # a second, late interruption counts from here
        self._tell(Interrupted(turn, kept))
