"""Decide who speaks when: voice activity in a session's input, and the policy that turns it into actions.

Two parts: the edges of speech (`SpeechDetector`) and the policy (`TurnTaker`). Probabilities of speech come in, one for
each window of 32 ms. There are no threads and no clocks here: time is the position in the session's input, in samples
at 24 kHz.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from streaming.audio import SPEECH_WINDOW
from streaming.conversation.books import TurnTakerBooks, bytes_of, samples_of

Pcm = npt.NDArray[np.float32]

SAMPLES_PER_MS = 24
MIN_SPEECH_MS = 96  # a sound shorter than this is a blip: it does not start speech
HYSTERESIS = 0.15  # speech begins at `threshold` and lasts while the probability is above `threshold - HYSTERESIS`
MAX_HELD_MS = 5_000  # audio held after a barge-in; past this the oldest is dropped, so that what is left has no gap


class TurnOptions(Protocol):
    """Options: how speech is told from silence, and whether it may interrupt. The protocol's `VadOptions` serves, too.

    threshold: the probability at which a window is speech, between 0 and 1.
    silence_ms: this much silence ends the speech; it is counted in whole windows of 32 ms, rounded up.
    prefix_ms: how much audio before the onset belongs to the prompt.
    barge_in: speech while the machine speaks interrupts it; otherwise it is ignored until the machine is done.
    respond: the end of speech is the word to speak; otherwise nothing follows it.
    """

    @property
    def threshold(self) -> float: ...
    @property
    def silence_ms(self) -> int: ...
    @property
    def prefix_ms(self) -> int: ...
    @property
    def barge_in(self) -> bool: ...
    @property
    def respond(self) -> bool: ...


# Edges of speech


@dataclass(frozen=True, slots=True)
class SpeechEdge:
    """Speech began or ended at `at_samples`; that was certain once the input up to `decided_samples` was heard."""

    speaking: bool
    at_samples: int
    decided_samples: int


class SpeechDetector:
    """Find where speech begins and ends: a trigger with hysteresis, then a minimum length for either change.

    Windows of 768 samples follow each other from `position` on. `speaking` tells the present state, `since_samples`
    where it began.
    """

    def __init__(self, options: TurnOptions, position: int = 0) -> None:
        self.configure(options)
        self._position = position  # the end of the last window
        self._agreed = position  # the end of the last window in which the trigger and `speaking` agreed
        self._active = False  # the trigger
        self.speaking = False
        self.since_samples = position

    def configure(self, options: TurnOptions) -> None:
        """Change how speech is told from silence from here on."""
        self._enter = options.threshold
        self._leave = max(options.threshold - HYSTERESIS, 0.01)  # a low threshold must not make speech endless
        self._silence_samples = options.silence_ms * SAMPLES_PER_MS

    @property
    def position(self) -> tuple[int, int, bool]:
        """The end of the last window, the end of the last in which trigger and `speaking` agreed, and the trigger."""
        return self._position, self._agreed, self._active

    def restore(self, books: TurnTakerBooks) -> None:
        """Go on where these books were written."""
        self._position, self._agreed, self._active = books.detected, books.agreed, books.active
        self.speaking, self.since_samples = books.speaking, books.since

    def push(self, probabilities: Iterable[float]) -> list[SpeechEdge]:
        """Return the edges that the next windows make certain. probabilities: that each of them holds speech."""
        edges = []
        for probability in probabilities:
            self._active = probability >= (self._leave if self._active else self._enter)
            self._position += SPEECH_WINDOW
            needed = MIN_SPEECH_MS * SAMPLES_PER_MS if self._active else self._silence_samples
            if self._active == self.speaking:
                self._agreed = self._position
            elif self._position - self._agreed >= needed:
                self.speaking, self.since_samples = self._active, self._agreed
                self._agreed = self._position
                edges.append(SpeechEdge(self.speaking, self.since_samples, self._position))
        return edges

    def assume_silence(self) -> None:
        """Take what was heard so far for silence: speech that still goes on begins here, once it is long enough."""
        self.speaking = False
        self.since_samples = self._agreed = self._position


# The policy


@dataclass(frozen=True, slots=True, eq=False)
class Listen:
    """Feed this to the speech model. Any length; positions rise, and have no gap within a prompt."""

    pcm: Pcm  # [samples] float32, the caller's to keep
    at_samples: int


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """The person began to speak; the prompt follows as `Listen`, from `prefix_ms` before."""

    at_samples: int


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """The person's speech ended; the silence after it that made this certain is part of the prompt."""

    at_samples: int


@dataclass(frozen=True, slots=True)
class Speak:
    """The prompt is whole: speak. An owner who cannot calls `speaking_ended()`."""


@dataclass(frozen=True, slots=True)
class BargeIn:
    """The person spoke while the machine did: stop it, cut the context to what was heard, then call `interrupted()`."""

    at_samples: int


Action = Listen | SpeechStarted | SpeechStopped | Speak | BargeIn


class TurnState(enum.StrEnum):
    IDLE = "idle"  # nobody speaks
    HEARING = "hearing"  # the person does: audio is handed out as it comes
    SPEAKING = "speaking"  # the machine does
    INTERRUPTING = "interrupting"  # the person barged in: audio is held until `interrupted()`


class TurnTaker:
    """One session's policy: its input goes in, actions come out, in the order in which they are to be done.

        IDLE ── onset: SpeechStarted, Listen ─▶ HEARING ── silence: SpeechStopped, Speak ─▶ SPEAKING
        SPEAKING ── onset, with barge_in: BargeIn ─▶ INTERRUPTING ── interrupted(): Listen ─▶ HEARING
        SPEAKING ── speaking_ended(), or interrupted() that nobody's voice asked for ─▶ IDLE

        HEARING ── silence, without respond: SpeechStopped ─▶ IDLE
        IDLE, HEARING ── speak(): SpeechStopped, where somebody was being heard ─▶ SPEAKING
        HEARING ── clear(): what was being said is no prompt any more ─▶ IDLE
        INTERRUPTING ── clear(): what was being said is no prompt any more ─▶ SPEAKING, until `interrupted()`

    No action but BargeIn comes while the machine speaks. The same input gives the same actions however it is cut into
    pushes; only `Listen` is cut differently.
    """

    def __init__(self, options: TurnOptions, position: int = 0) -> None:
        self.state = TurnState.IDLE
        self._detector = SpeechDetector(options, position)
        self._take(options)
        self._recent: Pcm = np.zeros(0, np.float32)  # the end of the input, bounded by _trim
        self._position = position  # the end of the input
        self._handed_out = position  # input before this is never handed out (again)

    @classmethod
    def of(cls, books: TurnTakerBooks, options: TurnOptions) -> Self:
        """Return the turn taker that these books describe."""
        taker = cls(options, books.position)
        taker.state = TurnState(books.state)
        taker._recent, taker._handed_out = samples_of(books.recent), books.handed_out
        taker._detector.restore(books)
        return taker

    def books(self) -> TurnTakerBooks:
        """Return what another turn taker needs to go on with this one, the options apart."""
        detected, agreed, active = self._detector.position
        return TurnTakerBooks(
            state=self.state.value,
            detected=detected,
            agreed=agreed,
            active=active,
            speaking=self._detector.speaking,
            since=self._detector.since_samples,
            recent=bytes_of(self._recent),
            position=self._position,
            handed_out=self._handed_out,
        )

    def configure(self, options: TurnOptions) -> None:
        """Change how turns are taken from here on."""
        self._detector.configure(options)
        self._take(options)

    def _take(self, options: TurnOptions) -> None:
        self._barge_in, self._respond = options.barge_in, options.respond
        self._prefix_samples = options.prefix_ms * SAMPLES_PER_MS

    def push(self, pcm: Pcm, probabilities: Sequence[float]) -> list[Action]:
        """Return what follows from the next of the session's input.

        pcm: [any length] float32 at 24 kHz; probabilities: of speech, for each window that it completes.
        """
        assert pcm.dtype == np.float32, pcm.dtype
        self._recent = np.concatenate((self._recent, pcm))
        self._position += len(pcm)
        actions: list[Action] = []
        for edge in self._detector.push(probabilities):
            actions += self._listen(edge.decided_samples)
            actions += self._onset(edge.at_samples) if edge.speaking else self._stop(edge.at_samples)
        actions += self._listen(self._position)
        self._trim()
        return actions

    def speaking_ended(self) -> None:
        """Note that what the machine said was played to its end: until then, speech is still a barge-in.

        A person who is still speaking begins a prompt here. After a `BargeIn`, `interrupted()` is awaited all the same.
        """
        if self.state is TurnState.SPEAKING:
            self.state = TurnState.IDLE
            self._detector.assume_silence()

    def speak(self) -> list[Action]:
        """Let the machine speak because it was told to: whoever was heard is heard no more. Not after a `BargeIn`."""
        assert self.state in (TurnState.IDLE, TurnState.HEARING), self.state
        actions: list[Action] = [SpeechStopped(self._position)] if self.state is TurnState.HEARING else []
        self.state = TurnState.SPEAKING
        return actions

    def clear(self) -> None:
        """Hand out no input so far (again). A person who is still speaking begins a prompt here."""
        self._handed_out = self._position
        if self.state is TurnState.HEARING:
            self.state = TurnState.IDLE
        elif self.state is TurnState.INTERRUPTING:
            self.state = TurnState.SPEAKING
        self._detector.assume_silence()

    def interrupted(self) -> list[Action]:
        """Release the held audio: the machine was stopped and its context cut, after a `BargeIn` or unasked."""
        if self.state is not TurnState.INTERRUPTING:
            self.speaking_ended()
            return []
        self.state = TurnState.HEARING
        actions = self._listen(self._position)
        if not self._detector.speaking:
            actions += self._stop(self._detector.since_samples)
        return actions

    def _onset(self, at_samples: int) -> list[Action]:
        if self.state is TurnState.SPEAKING and not self._barge_in:
            return []
        if self.state is TurnState.INTERRUPTING:
            return []  # speech that paused while the context was being cut is one prompt
        self._handed_out = max(at_samples - self._prefix_samples, self._handed_out)
        if self.state is TurnState.SPEAKING:
            self.state = TurnState.INTERRUPTING
            return [BargeIn(at_samples)]
        self.state = TurnState.HEARING
        return [SpeechStarted(at_samples)]

    def _stop(self, at_samples: int) -> list[Action]:
        if self.state is not TurnState.HEARING:
            return []
        if not self._respond:
            self.state = TurnState.IDLE
            return [SpeechStopped(at_samples)]
        self.state = TurnState.SPEAKING
        return [SpeechStopped(at_samples), Speak()]

    def _listen(self, until: int) -> list[Action]:
        if self.state is not TurnState.HEARING or until == self._handed_out:
            return []
        start, self._handed_out = self._handed_out, until
        first = self._position - len(self._recent)
        return [Listen(self._recent[start - first : until - first], start)]

    def _trim(self) -> None:
        """Keep what an onset in the next window can reach back to, or what is held for `interrupted()`."""
        keep = self._prefix_samples + MIN_SPEECH_MS * SAMPLES_PER_MS
        if self.state is TurnState.INTERRUPTING:
            limit = max(keep, MAX_HELD_MS * SAMPLES_PER_MS)
            self._handed_out = max(self._handed_out, self._position - limit)
            keep = self._position - self._handed_out
        self._recent = self._recent[max(len(self._recent) - keep, 0) :]
