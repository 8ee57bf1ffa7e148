"""The Python API of a session: the same engine, with calls that block."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.config import Sampling
from streaming.engine.events import Event, Failed, FrameSpoken, Kept, Marked, TurnDone, WentBack
from streaming.engine.session import EngineSession, OnEvent
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import EngineStoppedError, SessionError
from streaming.files import write_private

LEAD_FRAMES = 4
"""The engine works so many frames ahead of whoever iterates."""
_LOUDEST = 1000.0
"""60 dB over full scale is no loud speech, but samples in another unit, and a model's numbers do not survive 1e30."""


class Host(Protocol):
    """An engine, as far as a session needs it. `streaming.engine.engine.Engine` is the real one."""

    def attach(
        self,
        on_event: OnEvent,
        sampling: Sampling,
        slides: bool = True,
        snapshot: SessionSnapshot | None = None,
    ) -> EngineSession: ...
    def pack(self, snapshot: SessionSnapshot) -> memoryview: ...


class Session:
    """Speech in, its continuation out. Not for use by several threads at once, but for `interrupt` and `close`.

    for frame in frames:
        session.listen(frame)
    for pcm in session.speak(max_frames=125):
        play(pcm)
    """

    def __init__(
        self, engine: Host, sampling: Sampling, slides: bool = True, snapshot: SessionSnapshot | None = None
    ) -> None:
        """snapshot: of the session that this one goes on with. What it was saying then counts as heard as far as its
        listener had had it.
        """
        self._events: queue.SimpleQueue[FrameSpoken | TurnDone | Failed] = queue.SimpleQueue()  # bounded by the lead
        self._answers: queue.SimpleQueue[Marked | WentBack | Kept | Failed] = queue.SimpleQueue()  # one a question
        self._engine, self._sampling = engine, sampling
        self._session = engine.attach(self._take, sampling, slides, snapshot)
        self._marks = itertools.count(1)
        self._turn = 0  # the turn that was spoken last
        self._interrupted = 0  # the last turn that `interrupt` was asked to end
        if snapshot is not None:
            self._turn = snapshot.books.turn - (not snapshot.books.speaking)
            if snapshot.books.speaking:
                self.interrupt(snapshot.books.released * FRAME)

    @property
    def seed(self) -> int:
        """The seed of the session's sampling."""
        return self._sampling.seed

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

    def mark(self) -> Mark:
        """Remember this moment, to return to it as often as one likes. It takes memory until `mark.forget()`, or until
        the session is closed: what the window holds, and of a further mark what has changed since the last.

        Raises `SessionError` while speaking.
        """
        name = str(next(self._marks))
        self._session.mark(name)
        answer = self._answer()
        assert isinstance(answer, Marked)
        return Mark(self, name)

    def return_to(
        self,
        mark: Mark,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Make the session what it was at a mark. What was listened to and spoken since then is as if it had not been.

        With the same options and seed it speaks again what it spoke then; what is given here holds from here on. Raises
        `SessionError` while speaking, and for a mark that is forgotten or another session's; `ValueError` for options
        out of range.
        """
        if mark.session is not self:
            raise SessionError("this is another session's mark")
        sampling = changed(self._sampling, temperature, top_k, top_p, seed)
        self._session.go_back(mark.name)
        if sampling != self._sampling:
            self._session.configure(sampling)
            self._sampling = sampling
        self._answer()

    def forget(self, mark: Mark) -> None:
        """Give a mark's memory back. Raises `SessionError` if it is forgotten already."""
        self._session.unmark(mark.name)
        self._answer()

    def fork(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Session:
        """Return a second session that goes on from this moment, in a slot of its own. What is left out is as in this
        one: with the same seed both say the same.

        Raises `SessionError` while speaking, `EngineFullError`; `ValueError` for options out of range.
        """
        sampling = changed(self._sampling, temperature, top_k, top_p, seed)
        return Session(self._engine, sampling, snapshot=self._snapshot())

    def save(self, path: str | Path) -> None:
        """Write the session to a file that only its owner may read, and that `engine.load` goes on with.

        Whoever has the file has the voice that was heard. Raises `SessionError` while speaking, `OSError` where it
        cannot be written: then a file that was there before is what it was.
        """
        write_private(Path(path), self._engine.pack(self._snapshot()))

    def _snapshot(self) -> SessionSnapshot:
        if self._session.speaking:
            raise SessionError("the session is speaking: let it end, or interrupt it first")
        self._session.keep()
        answer = self._answer()
        assert isinstance(answer, Kept)
        return answer.snapshot

    def _answer(self) -> Marked | WentBack | Kept:
        """Wait for the answer to a question. Raises the error that ended the session."""
        answer = self._answers.get()
        if isinstance(answer, Failed):
            self._answers.put(answer)  # the next question is answered with this, too
            raise answer.error
        return answer

    def close(self) -> None:
        """Give the slot back, from any thread; a continuation that is being iterated raises. May be called twice."""
        self._session.close()
        closed = Failed(EngineStoppedError("the session is closed"))
        self._events.put(closed)
        self._answers.put(closed)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, event: Event) -> None:
        if isinstance(event, FrameSpoken | TurnDone | Failed):
            self._events.put(event)
        if isinstance(event, Marked | WentBack | Kept | Failed):
            self._answers.put(event)


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a session. `Session.mark` sets one."""

    session: Session
    name: str

    def forget(self) -> None:
        """Give its memory back. Raises `SessionError` if that was done already."""
        self.session.forget(self)


def changed(
    sampling: Sampling, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    """Return the options with what is not None in its place. Raises `ValueError` for what is out of range."""
    return Sampling(
        temperature=sampling.temperature if temperature is None else temperature,
        top_k=sampling.top_k if top_k is None else top_k,
        top_p=sampling.top_p if top_p is None else top_p,
        seed=sampling.seed if seed is None else seed,
    )
