"""The events that a session tells its owner, in order, from the engine's thread."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streaming.audio import Pcm16, to_int16
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import StreamingError

EndReason = Literal["end", "max_frames", "interrupted"]


QUEUED_FRAMES = 25
"""Most frames of speech that wait for a step (2 s). Then a session's `listen` says no until a `FrameHeard` is told."""


class StepAudio:
    """The audio of a step's speaking rows: float32 [B, 1920] and, converted for all rows at once, int16 [B, 1920]."""

    def __init__(self, pcm: NDArray[np.float32]) -> None:
        self.pcm = pcm

    @functools.cached_property
    def pcm16(self) -> Pcm16:
        return to_int16(self.pcm)


@dataclass(frozen=True, slots=True)
class FrameHeard:
    """A frame of speech was taken from the queue: there is room for another."""

    codes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TurnSpeaking:
    """The continuation begins. dropped_frames: how many of the stream's frames no longer fit the context."""

    turn: int
    prompt_frames: int
    dropped_frames: int


@dataclass(frozen=True, slots=True)
class FrameSpoken:
    """One frame of the continuation. index: its number in the turn; row: of the step's audio; codes: int64 [Q]."""

    turn: int
    index: int
    audio: StepAudio
    row: int
    codes: NDArray[np.int64]

    @property
    def pcm(self) -> NDArray[np.float32]:
        """float32 [1920]."""
        pcm: NDArray[np.float32] = self.audio.pcm[self.row]
        return pcm

    @property
    def pcm16(self) -> Pcm16:
        """int16 [1920]."""
        pcm: Pcm16 = self.audio.pcm16[self.row]
        return pcm


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The continuation is over. first_frame_ms: from the prompt's end to the first frame; None if there was none."""

    turn: int
    reason: EndReason
    frames: int
    first_frame_ms: float | None
    mean_step_ms: float | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The answer to every interruption: how many frames of the turn's continuation the context keeps.

    0 for turns other than the two that were spoken last: of those nothing can be cut, and nothing is known.
    """

    turn: int
    kept_frames: int


@dataclass(frozen=True, slots=True)
class InputCleared:
    """The last `frames` of this turn's prompt were taken back; `kept_frames` of it remain."""

    turn: int
    frames: int
    kept_frames: int


@dataclass(frozen=True, slots=True)
class Marked:
    """The answer to `mark` and to `unmark`: all marks of this session hold so many bytes now."""

    held_bytes: int


@dataclass(frozen=True, slots=True)
class WentBack:
    """The answer to `go_back`: the stream is again what it was at a mark, `prompt_frames` into a prompt."""

    turn: int
    prompt_frames: int


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer to `keep`: the session as it was once all that was told before had happened."""

    snapshot: SessionSnapshot


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is over, through no fault of its owner. It is the last event."""

    error: StreamingError


Event = (
    FrameHeard | TurnSpeaking | FrameSpoken | TurnDone | Interrupted | InputCleared | Marked | WentBack | Kept | Failed
)
