"""The Python API of a session: the same engine, with calls that block."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.engine.events import Event, Failed, FrameSpoken, TurnDone
from streaming.engine.session import EngineSession, OnEvent
from streaming.errors import EngineStoppedError

LEAD_FRAMES = 4
"""How far the engine works ahead of whoever iterates."""
_LOUDEST = 1000.0
"""60 dB over full scale is no loud speech, but samples in another unit, and a model's numbers do not survive 1e30."""


class Session:
    """Speech in, its continuation out. Not for use by several threads at once, but for `interrupt` and `close`.

    for frame in frames:
        session.listen(frame)
    for pcm in session.speak(max_frames=125):
        play(pcm)
    """

    def __init__(self, attach: Callable[[OnEvent], EngineSession], seed: int) -> None:
        """attach: opens the engine's session, which gives each event to that function. seed: of its sampling."""
        self._events: queue.SimpleQueue[FrameSpoken | TurnDone | Failed] = queue.SimpleQueue()  # bounded by the lead
        self._session = attach(self._take)
        self._turn = 0  # the one that was spoken last
        self._interrupted = 0  # the last one of which `interrupt` was asked
        self.seed = seed

    def listen(self, frame: NDArray[np.float32]) -> None:
        """Hear one frame, float32 [1920] in [-1, 1]; wait while too many are queued. The last frame of what is said
        may be shorter: the encoder takes it as it takes the end of a file.

        Raises `ValueError` for another shape, for integers, and for what is not finite or far out of range;
        `SessionError` while speaking, `PromptTooLongError` where the context does not slide.
        """
        given = np.asarray(frame)
        if given.ndim != 1 or not 1 <= len(given) <= FRAME:
            raise ValueError(
                f"a frame is {FRAME} samples, the last one 1 to {FRAME}; got an array of shape {given.shape}"
            )
        if given.dtype.kind != "f":
            raise ValueError(
                f"a frame is float32 in [-1, 1], got {given.dtype}; streaming.audio.to_float converts int16"
            )
        if not (abs(given) <= _LOUDEST).all():  # neither is NaN
            raise ValueError("speech is float32 in [-1, 1]; this frame holds NaN, infinity or numbers far beyond")
        pcm = given.astype(np.float32)  # a copy: whoever records writes into the same buffer again
        while not self._session.listen(pcm):
            self._session.wait_for_room()

    def speak(self, max_frames: int) -> Iterator[NDArray[np.float32]]:
        """Speak: yield pcm float32 [1920] until the model ends its speech, `max_frames` are reached, or `interrupt`.

        Leaving the loop early interrupts: what was yielded counts as heard. Raises `EmptyPromptError`, `SessionError`
        at once.
        """
        if max_frames < 1:
            raise ValueError(f"max_frames is {max_frames}, must be at least 1")
        self._turn = self._session.speak(max_frames, LEAD_FRAMES)
        return self._spoken(self._turn)

    def _spoken(self, turn: int) -> Iterator[NDArray[np.float32]]:
        taken, done = 0, False
        try:
            while not done and self._wanted(turn):
                event = self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                if event.turn != turn:
                    continue
                done = isinstance(event, TurnDone)
                if isinstance(event, FrameSpoken) and self._wanted(turn):
                    taken += 1
                    self._session.release(turn, taken)
                    yield event.pcm
        finally:
            if not done and self._wanted(turn):
                with contextlib.suppress(EngineStoppedError):
                    self._session.interrupt(turn, taken * FRAME)

    def _wanted(self, turn: int) -> bool:
        """Return whether this turn is neither interrupted nor followed by another."""
        return self._interrupted < turn == self._turn

    def interrupt(self, heard_samples: int) -> None:
        """End the continuation, from any thread: only this much of it was heard, and only that is remembered.

        May also follow a continuation that has ended, as long as nothing was listened to since.
        """
        if heard_samples < 0:
            raise ValueError(f"heard_samples is {heard_samples}, must be 0 or more")
        turn = self._turn
        self._session.interrupt(turn, heard_samples)
        self._interrupted = turn  # not before: whoever iterates may listen as soon as it sees this

    def close(self) -> None:
        """Give the slot back, from any thread; a continuation that is being iterated raises. May be called twice."""
        self._session.close()
        self._events.put(Failed(EngineStoppedError("the session is closed")))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, event: Event) -> None:
        if isinstance(event, FrameSpoken | TurnDone | Failed):
            self._events.put(event)
