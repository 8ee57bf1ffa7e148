"""A conversation's books: all that it knows between two messages, so that another server can go on with it.

They are pure values. Whoever reads them from bytes believes nothing in them: every number has its bounds, and what
contradicts something else is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.errors import SnapshotError
from streaming.protocol.messages import LOUDEST, NonNegative, SamplingOptions, Seconds, SessionStart, Turn, VadOptions

_MAX_CUT_TURNS = 1024
_MAX_HELD_SAMPLES = 240_000
"""The most audio that books may hold for a voice that interrupts: 10 s, more than is ever kept."""
_Wait = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Samples = Annotated[bytes, msgspec.Meta(max_length=4 * _MAX_HELD_SAMPLES)]


class _Books(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class PromptBooks(_Books, frozen=True, kw_only=True):
    """The input of this turn. begun: float32, the beginning of the next frame."""

    frames: NonNegative
    speech_from: NonNegative
    begun: Annotated[bytes, msgspec.Meta(max_length=4 * FRAME - 4)]


class PlaybackBooks(_Books, frozen=True, kw_only=True):
    """One turn at its listener. ends_in_s: when what was sent will have been played, if it is played as it comes."""

    turn: Turn
    frames: NonNegative | None
    over: bool
    sent_frames: NonNegative
    ends_in_s: _Wait
    reported: NonNegative | None
    stopped: NonNegative | None


class TurnTakerBooks(_Books, frozen=True, kw_only=True):
    """The state of turn taking. detected, agreed, active, speaking, since: where the search for the edges of speech is.

    recent: float32, the end of the input; handed_out: what comes before is not handed out again.
    """

    state: Literal["idle", "hearing", "speaking", "interrupting"]
    detected: NonNegative
    agreed: NonNegative
    active: bool
    speaking: bool
    since: NonNegative
    recent: _Samples
    position: NonNegative
    handed_out: NonNegative


class ConversationBooks(_Books, frozen=True, kw_only=True):
    """start: what the client asked for, its sampling filled. sampling, max_seconds, vad: of the next turn. applied: how
    the engine draws now. cut: what was sent of turns that were interrupted and are not done. heard_due_s: how long the
    client has left to say what it heard. anew: the input goes on at whatever position it comes next. unsaid: a turn of
    which nothing is to be left, and how many frames are.
    """

    version: Literal[1] = 1
    start: SessionStart
    sampling: SamplingOptions
    max_seconds: Seconds
    vad: VadOptions
    applied: SamplingOptions
    anew: bool = False
    prompt: PromptBooks
    taker: TurnTakerBooks | None
    playback: PlaybackBooks | None
    position: NonNegative
    patient_until: NonNegative
    turn: Turn
    tip: NonNegative
    cut: dict[Turn, NonNegative]
    heard_due_s: _Wait | None
    unsaid: tuple[Turn, NonNegative] | None

    @property
    def speaking(self) -> bool:
        """Return whether this turn is being spoken."""
        return self.playback is not None and self.playback.turn == self.turn

    def check(self, turn: int, speaking: bool) -> None:
        """Raise `SnapshotError` where these books contradict themselves, or the books of an engine in this turn."""
        drawn = (self.sampling, self.applied, self.start.sampling)
        taker, playback = self.taker, self.playback
        fits = (
            (self.turn, self.speaking) == (turn, speaking)
            and all(None not in structs.astuple(sampling) for sampling in drawn)
            and self.prompt.speech_from <= self.prompt.frames
            and self.tip < self.turn + speaking
            and (playback is None or playback.turn <= self.turn)
            and len(self.cut) <= _MAX_CUT_TURNS
            and (self.unsaid is None or self.unsaid[0] < self.turn)
            and (self.heard_due_s is None or (taker is not None and playback is not None))
        )
        if taker is not None:
            fits = (
                fits
                and taker.handed_out <= taker.position
                and len(taker.recent) // 4 <= taker.position
                and (taker.state != "hearing" or taker.handed_out == taker.position)
                and (taker.state != "interrupting" or self.heard_due_s is not None)
            )
        if not fits:
            raise SnapshotError("the saved conversation is damaged: its numbers contradict each other")
        samples_of(self.prompt.begun)
        if taker is not None:
            samples_of(taker.recent)

    def at_rest(self, turn: int) -> ConversationBooks:
        """Return the books of the same conversation between two turns, with the settings that it has: nothing is said
        in this turn, nothing is played, and the input goes on at whatever position it comes next.
        """
        return structs.replace(
            self,
            prompt=PromptBooks(frames=0, speech_from=0, begun=b""),
            anew=True,
            taker=None if self.taker is None else _quiet(self.position),
            playback=None,
            patient_until=self.position,
            turn=turn,
            tip=turn - 1,
            cut={},
            heard_due_s=None,
            unsaid=None,
        )


def first_books(start: SessionStart, turn: int, prompt_frames: int) -> ConversationBooks:
    """Return the books of a conversation that begins in this turn, of which so much was heard before. start: what its
    client asked for, its sampling filled.
    """
    return ConversationBooks(
        start=start,
        sampling=start.sampling,
        max_seconds=start.max_seconds,
        vad=start.vad,
        applied=start.sampling,
        prompt=PromptBooks(frames=prompt_frames, speech_from=prompt_frames, begun=b""),
        taker=_quiet(0) if start.turn_taking == "vad" else None,
        playback=None,
        position=0,
        patient_until=0,
        turn=turn,
        tip=turn - 1,
        cut={},
        heard_due_s=None,
        unsaid=None,
    )


def _quiet(position: int) -> TurnTakerBooks:
    """Return the books of a session in which nobody speaks and nothing was heard before this position."""
    return TurnTakerBooks(
        state="idle",
        detected=position,
        agreed=position,
        active=False,
        speaking=False,
        since=position,
        recent=b"",
        position=position,
        handed_out=position,
    )


def bytes_of(samples: NDArray[np.float32]) -> bytes:
    """Return samples as they stand in the books."""
    return samples.astype("<f4", copy=False).tobytes()


def samples_of(data: bytes) -> NDArray[np.float32]:
    """Return the samples that `bytes_of` was given. Raises `SnapshotError` where they are no speech."""
    if len(data) % 4:
        raise SnapshotError("the saved conversation is damaged: its audio ends within a sample")
    samples = np.frombuffer(data, "<f4").astype(np.float32)
    if not (abs(samples) <= LOUDEST).all():  # neither is NaN
        raise SnapshotError("the saved conversation is damaged: it holds numbers that are no audio")
    return samples
