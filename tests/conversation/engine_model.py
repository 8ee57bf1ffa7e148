"""A model of the engine's session: what a conversation commands takes effect when the test says `step`."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.config import ModelVoices, Sampling
from streaming.conversation.conversation import Conversation, Received
from streaming.conversation.outbox import Outbox, Reply
from streaming.conversation.settings import filled
from streaming.conversation.takes import Takes, TakesMemory
from streaming.engine.events import (
    QUEUED_FRAMES,
    Event,
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
from streaming.errors import StreamingError
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message, SessionStart

SAMPLES_PER_VALUE = 8
"""Input tells its own position: so many samples have the same value, which rises from 1."""
CODES = np.zeros(4, np.int64)


class EngineModel:
    """Keep the contract of `streaming.engine.session.EngineSession`, and assert that its owner does.

    room: how many frames may wait. length: after how many frames the speech of a turn ends by itself. failure: raised
    by every command while set. log: the commands, without `release`; events: what its listener is to be told.
    """

    def __init__(self, room: int = QUEUED_FRAMES, length: int = 10**9) -> None:
        self.room, self.length = room, length
        self.failure: StreamingError | None = None
        self.log: list[tuple[Any, ...]] = []
        self.frames: list[NDArray[np.float32]] = []  # frames that were heard or wait to be heard
        self.events: deque[Event] = deque()
        self.released = 0
        self.marks: set[str] = set()
        self.mark_bytes = 1000
        self.reach = 1_000  # frames that a clear or an interruption can take back
        self._held: dict[str, int] = {}  # frames of the prompt at each mark
        self._commands: deque[tuple[Any, ...]] = deque()
        self._queued = 0
        self._speaking_next, self._turn_next, self._heard_any = False, 1, False
        self._speaking, self._turn, self._prompt, self._spoken = False, 1, 0, 0
        self._most, self._lead = 0, 0

    # Commands

    def listen(self, pcm: NDArray[np.float32]) -> bool:
        self._fail()
        assert not self._speaking_next, "the session is speaking"
        assert pcm.ndim == 1 and 1 <= len(pcm) <= FRAME and pcm.dtype == np.float32
        if self._queued >= self.room:
            return False
        self._queued += 1
        self._heard_any = True
        self.frames.append(pcm)
        self._give("listen")
        return True

    def speak(self, max_frames: int, lead_frames: int) -> int:
        assert not self._speaking_next and max_frames >= 1 and lead_frames >= 1
        assert self._heard_any, "nothing was heard yet"
        self._speaking_next = True
        self._give("speak", max_frames, lead_frames)
        return self._turn_next

    def release(self, turn: int, frames: int) -> None:
        if turn == self._turn:
            self.released = max(self.released, frames)

    def interrupt(self, turn: int, heard_samples: int) -> None:
        assert 1 <= turn <= self._turn_next and heard_samples >= 0
        if self._speaking_next and turn == self._turn_next:
            self._speaking_next, self._turn_next = False, turn + 1
        self._give("interrupt", turn, heard_samples)

    def clear_input(self, keep_frames: int) -> None:
        assert not self._speaking_next and keep_frames >= 0
        self._give("clear_input", keep_frames)

    def configure(self, sampling: Sampling) -> None:
        self._give("configure", sampling)

    def mark(self, name: str) -> None:
        assert not self._speaking_next
        self.marks.add(name)
        self._give("mark", name)

    def unmark(self, name: str) -> None:
        self.marks.remove(name)
        self._give("unmark", name)

    def go_back(self, name: str) -> None:
        assert not self._speaking_next and name in self.marks
        self._give("go_back", name)

    def keep(self) -> None:
        self._give("keep")

    def _give(self, *command: Any) -> None:
        self._fail()
        self.log.append(command)
        self._commands.append(command)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    # The engine's thread

    def step(self) -> bool:
        """Do what is due and advance by a frame, if there is one. Return whether anything was done."""
        due = bool(self._commands)
        while self._commands:
            match self._commands.popleft():
                case ("listen",):
                    self._queued -= 1
                    self._prompt += 1
                    self.events.append(FrameHeard(CODES))
                    return True
                case ("speak", most, lead):
                    self._speaking, self._most, self._lead = True, most, lead
                    self._spoken = self.released = 0
                    self.events.append(TurnSpeaking(self._turn, self._prompt, 0))
                case ("interrupt", turn, heard_samples):
                    last = self._turn if self._speaking else self._turn - 1
                    kept = 0
                    if turn == last:
                        kept = min(self._spoken, max(heard_samples // FRAME, self._spoken - self.reach))
                        if self._prompt and not self._speaking:
                            kept = self._spoken
                        if self._speaking:
                            self._stop("interrupted")
                        self._spoken = kept
                    self.events.append(Interrupted(turn, kept))
                case ("mark", name):
                    self._held[name] = self._prompt
                    self.events.append(Marked(self.mark_bytes * len(self._held)))
                case ("unmark", name):
                    del self._held[name]
                    self.events.append(Marked(self.mark_bytes * len(self._held)))
                case ("go_back", name):
                    self._prompt, self._spoken = self._held[name], 0
                    self.events.append(WentBack(self._turn, self._prompt))
                case ("keep",):
                    self.events.append(Kept(("snapshot", self._turn, self._prompt)))  # type: ignore[arg-type]
                case ("clear_input", keep):
                    frames = min(max(0, self._prompt - keep), self.reach)
                    self._prompt -= frames
                    self.events.append(InputCleared(self._turn, frames, self._prompt))
        if not self._speaking or self._spoken - self.released >= self._lead:
            return due
        if self._spoken == self.length:
            self._stop("end")
            return True
        self._spoken += 1
        audio = StepAudio(np.full((1, FRAME), self._spoken / 2**15, np.float32))
        self.events.append(FrameSpoken(self._turn, self._spoken - 1, audio, 0, CODES))
        if self._spoken == self._most:
            self._stop("max_frames")
        return True

    def _stop(self, reason: Any) -> None:
        self.events.append(TurnDone(self._turn, reason, self._spoken, 1.0, 1.0))
        self._speaking = False
        if self._turn_next == self._turn:
            self._speaking_next, self._turn_next = False, self._turn + 1
        self._turn += 1
        self._prompt = 0


class Counts:
    """An observer that counts."""

    def __init__(self) -> None:
        self.replies: list[Message | AudioMessage] = []
        self.frames_heard = 0
        self.reports: list[tuple[int, int, int]] = []

    def said(self, reply: Message | AudioMessage) -> None:
        self.replies.append(reply)

    def heard(self) -> None:
        self.frames_heard += 1

    def played(self, turn: int, underruns: int, sent_frames: int) -> None:
        self.reports.append((turn, underruns, sent_frames))


class Talk:
    """A conversation, its engine and its client, all driven by hand. now: the time."""

    def __init__(
        self,
        *,
        engine: EngineModel | None = None,
        idle_s: float = 60.0,
        rewind_frames: int = 16,
        sent_is_heard: bool = False,
        takes: TakesMemory | None = None,
        voices: ModelVoices | None = None,
        **start: Any,
    ) -> None:
        self.now = 100.0
        self.engine = engine or EngineModel()
        self.counts, self.outbox = Counts(), Outbox()
        options = SessionStart(sampling=filled(messages.SamplingOptions(), sampling()), **start)
        self.conversation = Conversation(
            self.engine,
            self.outbox,
            options,
            sampling(),
            rewind_frames=rewind_frames,
            idle_s=idle_s,
            observer=self.counts,
            now=self.now,
            sent_is_heard=sent_is_heard,
            takes=None if takes is None else Takes(takes),
            voices=voices,
        )
        self.position = 0

    # The client

    def say(self, *received: Received) -> None:
        for one in received:
            assert self.conversation.ready
            self.conversation.receive(one, self.now)

    def audio(self, samples: int, turn: int = 0) -> AudioMessage:
        """Return the next samples of the input."""
        values = 1 + np.arange(self.position, self.position + samples) // SAMPLES_PER_VALUE
        audio = AudioMessage(turn, self.position, values.astype(np.int16))
        self.position += samples
        return audio

    def hear(self, frames: float = 1, turn: int = 0) -> None:
        self.say(self.audio(round(frames * FRAME), turn))

    def voice(self, *probabilities: float) -> None:
        """One message with a window of 32 ms for each of these."""
        assert self.conversation.ready
        self.conversation.receive(self.audio(768 * len(probabilities)), self.now, probabilities)

    # Time, engine, socket

    def step(self, steps: int = 1000) -> None:
        """Let the engine do so many steps, until there is nothing to do, and tell of them."""
        for _ in range(steps):
            if not self.engine.step():
                break
            while self.engine.events:
                self.conversation.happened(self.engine.events.popleft(), self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass; the conversation is ticked when it wants to be."""
        until = self.now + seconds
        while self.conversation.end is None and (due := self.conversation.deadline(self.now)) <= until:
            assert due > self.now
            self.now = due
            self.conversation.tick(self.now)
        self.now = max(self.now, until)

    def replies(self, most: int = 10**9) -> list[Reply]:
        """Return the replies that wait, as if the socket took them."""
        taken: list[Reply] = []
        while len(taken) < most and (reply := self.outbox.take()) is not None:
            if isinstance(reply, AudioMessage):
                self.conversation.sent(reply.turn, self.now)
            taken.append(reply)
        return taken

    def told(self) -> list[Any]:
        """Return the replies that wait, with one `audio N` for N frames in a row."""
        found: list[Any] = []
        count = 0
        for reply in [*self.replies(), None]:
            if isinstance(reply, AudioMessage):
                count += 1
                continue
            if count:
                found.append(f"audio {count}")
                count = 0
            if reply is not None:
                found.append(untimed(reply))
        return found

    def turn(self, frames: float = 1) -> None:
        """Hear so much, go on, speak as far as can be; nothing is sent yet."""
        self.hear(frames)
        self.say(messages.Speak(turn=messages.OPEN_TURN))
        self.step()


def untimed(reply: Any) -> Any:
    """A reply without the engine's times."""
    if isinstance(reply, messages.TurnDone):
        return reply.turn, reply.reason, reply.samples // FRAME
    return reply


def sampling(**options: Any) -> Sampling:
    return replace(Sampling(0.8, 30, 1.0, 7), **options)
