"""The engine: slots, sessions, and one thread that runs steps.

A step is three verbs: schedule (which sessions are ready), run, postprocess (who is told what).
"""

from __future__ import annotations

import logging
import math
import mmap
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME, FRAME_RATE
from streaming.config import OVERLOAD, ModelVoices, Sampling
from streaming.engine.blocking import Session, changed
from streaming.engine.events import StepAudio
from streaming.engine.histogram import Counts, Histogram
from streaming.engine.session import EngineSession, OnEvent, Step, StepResult
from streaming.engine.slot_pool import SlotPool
from streaming.engine.snapshot import Books, SessionSnapshot
from streaming.errors import EngineStoppedError, SnapshotError, StepFailedError, StepHungError
from streaming.files import AnyBytes

_LOG = logging.getLogger(__name__)
_PUBLISHED = Sampling()
_TIMED_STEPS = 1000
_RECENT_STEPS = 25
_RECENT_S = 5.0
"""Older steps say nothing of the sessions that there are now."""
_ENGINE_FAILED = "the engine has failed; its log says why"
"""Clients are told so, too: what exactly went wrong is none of their business."""
_HOPELESS_STEPS = 3
"""The engine gives up after so many failed steps in a row."""
_BOOKS = "books"
"""The name of the session's own books in the header of a saved session."""
_CHORES_S = 0.002
"""Copying may hold up the next step for so long and one piece more: less than 8 ms together, a tenth of a frame."""
_APART_S = 0.002
"""Steps begin no closer together than this. Whoever comes alone does not wait for it, nor does anybody where a step
takes longer, as those of real models do. Below that, each step would have one session in it, and wake its owner for it.
"""
_HUNG_S = 60.0
"""A step that takes so long will not return: a GPU's fault can leave a replay waiting for ever. The slowest that was
measured, 8B on two cores, takes two seconds.
"""
_JOIN_S = 1.0
_STEP_BOUNDS_S = tuple(
    ms / 1e3 for ms in (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100, 120, 160, 240, 500, 1000)
)
"""Dense around a frame's 80 ms, which decide whether listeners hear gaps, and down to what a GPU takes."""


@dataclass(frozen=True)
class EngineStats:
    """An engine's figures. sessions: open ones. steps: run so far. step_ms_p50, step_ms_p99: over the last
    thousand, None before the first. step_seconds: of all of them. steps_failed: not among the others. frames_heard,
    frames_spoken: so far.
    """

    slots: int
    sessions: int
    steps: int
    step_ms_p50: float | None
    step_ms_p99: float | None
    step_seconds: Counts
    steps_failed: int
    frames_heard: int
    frames_spoken: int


@dataclass(frozen=True)
class _Plan:
    """One step's batch, a row for each of `sessions`: those that listen, then those that speak.

    slots: [R]; pcm: [R, 1920]; listening, speaking: [R]; lengths: [R], the samples heard.
    """

    sessions: list[EngineSession]
    slots: NDArray[np.int64]
    pcm: NDArray[np.float32]
    listening: NDArray[np.bool_]
    speaking: NDArray[np.bool_]
    lengths: NDArray[np.int64]


class Engine:
    """Runs `step` for its sessions until closed. `streaming.load_engine` makes one.

    model, notice, device, dtype, operations: what is said of the step, to clients and operators; suggestions: what a
    person might say to it; voices: those in which it goes on, by name. sampling: how sessions draw that do not say how;
    its seed is not looked at. hung_s: a step that takes longer ends the engine.
    """

    def __init__(
        self,
        step: Step,
        model: str = "",
        notice: str | None = None,
        device: str = "",
        dtype: str = "",
        sampling: Sampling = _PUBLISHED,
        operations: str = "",
        hung_s: float = _HUNG_S,
        suggestions: tuple[str, ...] = (),
        voices: ModelVoices | None = None,
    ) -> None:
        self.model, self.notice, self.device, self.dtype, self.operations = model, notice, device, dtype, operations
        self.sampling, self.suggestions, self.voices = sampling, suggestions, voices
        self._step = step
        self._pool = SlotPool(step.num_slots)
        self._changed = threading.Condition()
        self._sessions: dict[int, EngineSession] = {}
        self._steps = 0
        self._step_seconds: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._recent_steps: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)  # when each ended, its seconds
        self._step_histogram = Histogram(_STEP_BOUNDS_S)
        self._steps_failed = self._failed_in_a_row = 0
        self._frames_heard = self._frames_spoken = 0
        self._stopping = False
        self._failure: Exception | None = None
        self._began_at: float | None = None  # of the step that runs
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look_for_a_hung_step, args=(hung_s,), name="watch", daemon=True)
        self._watch.start()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_codebooks(self) -> int:
        return self._step.num_codebooks

    @property
    def context_frames(self) -> int:
        return self._step.context_frames

    @property
    def rewind_frames(self) -> int:
        return self._step.rewind_frames

    @property
    def most_packed_bytes(self) -> int:
        """A bound on what `pack` returns."""
        return self._step.most_packed_bytes

    @property
    def failure(self) -> Exception | None:
        """Return what ended the engine, or None."""
        return self._failure

    @property
    def hung(self) -> bool:
        """Return whether a step does not return: then the process cannot end in order either."""
        return isinstance(self._failure, StepHungError)

    @property
    def overloaded(self) -> bool:
        """Whether, by the steps measured last, one more session would make all of them late."""
        with self._changed:
            self._reap()
            since = time.monotonic() - _RECENT_S
            recent = [seconds for ended, seconds in self._recent_steps if ended >= since] if self._sessions else []
        return bool(recent) and float(np.median(recent)) > OVERLOAD / FRAME_RATE

    def attach(
        self,
        on_event: OnEvent,
        sampling: Sampling,
        slides: bool = True,
        snapshot: SessionSnapshot | None = None,
    ) -> EngineSession:
        """Return a session that calls `on_event` with each of its events, from the engine's thread.

        `on_event` must neither block nor call the engine; one that raises closes its session.
        slides: whether a prompt longer than the context pushes its oldest frames out, or is an error.
        snapshot: of the session that is gone on with; its books say whether it slides.
        Raises `EngineFullError`, `EngineStoppedError`; `SnapshotError` for one of another model.
        """
        if snapshot is not None and snapshot.copy.identity != self._step.identity:
            raise SnapshotError("the snapshot belongs to another model, another type of numbers, or another context")
        with self._changed:
            self._require_running()
            self._reap()
            slides = slides if snapshot is None else snapshot.books.slides
            slot = self._pool.acquire()
            session = EngineSession(slot, self._step, self._changed, on_event, sampling, slides, snapshot)
            self._sessions[session.slot] = session
            self._changed.notify_all()
            return session

    def open(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        slides: bool = True,
    ) -> Session:
        """Return a session with calls that block; `streaming.config.Sampling` says what the options mean.

        What is left out is as in the published script: temperature 0.8, top-k 30, the checkpoint's top-p.
        Without a seed, one is chosen at random, and `session.seed` tells it. slides: see `attach`.
        Raises `EngineFullError`, `EngineStoppedError`; `ValueError` for options out of range.
        """
        seed = secrets.randbits(63) if seed is None else seed
        return Session(self, changed(self.sampling, temperature, top_k, top_p, seed), slides)

    def load(
        self,
        path: str | Path,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Session:
        """Return a session that goes on with what `Session.save` wrote. What is left out is as it was then.

        Raises `SnapshotError` for a file that is no saved session of this model, before it is read into memory;
        `OSError` where it cannot be read; otherwise as `open` does.
        """
        with Path(path).open("rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # the file is empty
                raise SnapshotError(f"{path} is empty: it is no saved session") from None
            with mapped:
                snapshot, _ = self.unpack(mapped)
        sampling = changed(snapshot.books.sampling, temperature, top_k, top_p, seed)
        return Session(self, sampling, snapshot=snapshot)

    def pack(self, snapshot: SessionSnapshot, said: dict[str, str] | None = None) -> memoryview:
        """Return a snapshot as bytes, a safetensors file. said: what its owner wants back with it, by name.

        It takes as long as some megabytes take: call it from a thread that may wait.
        """
        books = msgspec.json.encode(snapshot.books).decode()
        return self._step.pack(snapshot.copy, {**(said or {}), _BOOKS: books})

    def unpack(self, data: AnyBytes) -> tuple[SessionSnapshot, dict[str, str]]:
        """Return what `pack` was given. Raises `SnapshotError` for bytes that `pack` does not make, or makes for
        another model; whoever gave them is not believed in anything.
        """
        copy, said = self._step.unpack(data)
        try:
            books = msgspec.json.decode(said.pop(_BOOKS, ""), type=Books)
        except (msgspec.DecodeError, RecursionError) as error:
            raise SnapshotError(f"this is no saved session: {error}") from None
        if not books.fits(copy.frames):
            raise SnapshotError("the saved session is damaged: its numbers contradict each other")
        return SessionSnapshot(books, copy), said

    def stats(self) -> EngineStats:
        with self._changed:
            times, steps, histogram = list(self._step_seconds), self._steps, self._step_histogram.read()
            failed, heard, spoken = self._steps_failed, self._frames_heard, self._frames_spoken
            active = sum(not session.closed for session in self._sessions.values())
        p50, p99 = (1e3 * float(p) for p in np.percentile(times, (50, 99))) if times else (None, None)
        return EngineStats(self._pool.size, active, steps, p50, p99, histogram, failed, heard, spoken)

    def close(self) -> None:
        """End all sessions and the thread, which is left behind in a step that hangs. May be called twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        while self._thread.is_alive() and not self.hung:
            self._thread.join(_JOIN_S)
        self._over.set()
        self._watch.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_running(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(_ENGINE_FAILED) from self._failure
        if self._stopping:
            raise EngineStoppedError("the engine is closed")

    # The engine's thread

    def _run(self) -> None:
        try:
            started, following = -math.inf, 0.0
            while (plan := self._schedule(started + _APART_S)) is not None:
                self._began_at = started = time.monotonic()
                try:
                    result = self._step(plan.slots, plan.pcm, plan.listening, plan.speaking, plan.lengths)
                except Exception as error:  # whatever a step raises concerns its sessions, and at first only them
                    self._step_failed(plan.sessions, error)
                    following, self._began_at = 0.0, None
                    continue
                sounded = time.monotonic()
                # What the step before left to be done after its audio counts as this one's: it takes the thread's time.
                self._postprocess(plan, result, following + sounded - started)
                told = time.monotonic()
                try:
                    self._step.follow()
                    self._failed_in_a_row = 0
                except Exception as error:  # as above
                    self._step_failed(plan.sessions[int(plan.listening.sum()) :], error)
                following, self._began_at = time.monotonic() - told, None
            self._end(EngineStoppedError("the engine was closed"))
        except Exception as error:  # the thread's boundary: whatever it was, nobody may wait for ever
            _LOG.exception("the engine's thread failed")
            self._failure = self._failure or error
            self._end(EngineStoppedError(_ENGINE_FAILED), error)

    def _end(self, ended: EngineStoppedError, cause: Exception | None = None) -> None:
        """Tell all sessions that it is over."""
        ended.__cause__ = cause
        with self._changed:
            self._stopping = True
            for session in self._sessions.values():
                session.fail(ended)
            self._reap()

    def _look_for_a_hung_step(self, hung_s: float) -> None:
        """The watch's thread: end the engine when a step does not return. Sessions are told, and health says so."""
        while not self._over.wait(hung_s / 8):
            began_at = self._began_at
            if began_at is None or time.monotonic() - began_at < hung_s:
                continue
            self._failure = StepHungError(f"a step has not returned for {hung_s:g} s: the device hangs")
            _LOG.critical("%s", self._failure)
            self._end(EngineStoppedError(_ENGINE_FAILED), self._failure)
            return

    def _step_failed(self, sessions: list[EngineSession], error: Exception) -> None:
        """End the sessions of a failed step; give up if the device is lost, or nothing works any more."""
        self._failed_in_a_row += 1
        with self._changed:
            self._steps_failed += 1
        if self._failed_in_a_row >= _HOPELESS_STEPS or self._step.is_fatal(error):
            raise error
        _LOG.error("a step failed; its %d sessions end, the others go on", len(sessions), exc_info=error)
        self._fail(sessions, "a step failed, and this session with it; the engine's log says why", error)

    def _schedule(self, not_before: float) -> _Plan | None:
        """Wait until a session is ready, and return the next step's batch; None when the engine is to stop.

        Between two steps the sessions' chores get their time, a little of it.
        """
        time.sleep(max(0.0, not_before - time.monotonic()))
        worked = False
        while True:
            with self._changed:
                awake = [session for session in self._sessions.values() if session.awake]
                if any(session.closed for session in awake):
                    self._reap()
                    awake = [session for session in awake if not session.closed]
                unclean = [session for session in awake if session.unclean]
                working = [session for session in awake if session.works]
                if not unclean:
                    if self._stopping:
                        return None
                    if worked or not working:
                        plan = self._next_plan(awake)
                        if plan is not None:
                            return plan
                        if not any(session.awake for session in self._sessions.values()):
                            self._changed.wait()
            for session in unclean:
                session.make_clean()
            worked = bool(working)
            self._work(working)

    def _work(self, sessions: list[EngineSession]) -> None:
        """Do a piece of each of these sessions' chores, over and over, until their time is up."""
        until = time.monotonic() + _CHORES_S
        while sessions:
            for session in sessions:
                try:
                    session.work()
                except Exception as error:  # as of a step: it concerns this session, unless the device is lost
                    if self._step.is_fatal(error):
                        raise
                    _LOG.error("a session could not be copied; it ends, the others go on", exc_info=error)
                    self._fail([session], "the session could not be copied; the engine's log says why", error)
                if time.monotonic() >= until:
                    return
            with self._changed:
                sessions = [session for session in sessions if session.works]

    def _fail(self, sessions: list[EngineSession], message: str, cause: Exception) -> None:
        """End these sessions, and tell them."""
        with self._changed:
            for session in sessions:
                failed = StepFailedError(message)
                failed.__cause__ = cause
                session.fail(failed)

    def _next_plan(self, awake: list[EngineSession]) -> _Plan | None:
        """Return the batch of all sessions that are ready, or None if there are none. The others sleep if they can."""
        hearing: list[EngineSession] = []
        speaking: list[EngineSession] = []
        frames: list[NDArray[np.float32]] = []
        for session in awake:
            frame = session.next_frame()
            if frame is not None:
                hearing.append(session)
                frames.append(frame)
            elif session.may_speak:
                speaking.append(session)
            else:
                session.awake = session.unclean or session.works or session.closed
        if not hearing and not speaking:
            return None
        sessions = hearing + speaking
        pcm = np.zeros((len(sessions), FRAME), np.float32)
        lengths = np.zeros(len(sessions), np.int64)
        for row, frame in enumerate(frames):
            pcm[row, : len(frame)] = frame
            lengths[row] = len(frame)
        slots = np.array([session.slot for session in sessions], np.int64)
        heard = np.arange(len(sessions)) < len(hearing)
        return _Plan(sessions, slots, pcm, heard, ~heard, lengths)

    def _postprocess(self, plan: _Plan, result: StepResult, seconds: float) -> None:
        heard = int(plan.listening.sum())
        audio = StepAudio(result.pcm[heard:])
        with self._changed:
            self._steps += 1
            self._step_seconds.append(seconds)
            self._recent_steps.append((time.monotonic(), seconds))
            self._step_histogram.observe(seconds)
            for row, session in enumerate(plan.sessions):
                if result.broken[row]:
                    session.fail(StepFailedError("the model's numbers are not finite any more"))
                elif row < heard:
                    self._frames_heard += 1
                    session.heard(result.codes[row])
                else:
                    self._frames_spoken += not result.ended[row]
                    session.spoke(audio, row - heard, result.codes[row], bool(result.ended[row]), seconds)
            self._changed.notify_all()  # wakes whoever waits for room in a queue

    def _reap(self) -> None:
        """Free the slots of closed sessions."""
        for slot in [slot for slot, session in self._sessions.items() if session.closed]:
            del self._sessions[slot]
            self._pool.release(slot)
