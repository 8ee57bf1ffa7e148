"""A Realtime session's input buffer: what a client appends, what of it is committed, and what is held back for now."""

from __future__ import annotations

from collections import deque

import numpy as np

from streaming.audio import SAMPLE_RATE
from streaming.conversation.prompt import Clears
from streaming.protocol import messages
from streaming.protocol.messages import OPEN_TURN, AudioMessage
from streaming.server.openai.formats import Format, FormatDecoder, Pcm16

MAX_HELD_SAMPLES = 30 * SAMPLE_RATE
"""Input that is kept while it cannot be heard, because a response is being spoken. Past this the oldest is dropped."""


class InputBuffer:
    """The buffer of one session. Audio is given to the conversation as it comes, and taken back if it is cleared.

    position: samples given to the conversation so far. committed: of what was given in this turn, how much was
    committed. uncommitted: samples that were not, given or held.
    """

    def __init__(self, format: Format) -> None:
        self.position = self.committed = self.uncommitted = 0
        self._decoder = FormatDecoder(format)
        self._given = 0  # samples given to the conversation in this turn
        self._clears = Clears()
        self._held: deque[Pcm16] = deque()
        self._held_samples = 0

    def append(self, audio: bytes) -> None:
        """Add audio in the client's format."""
        self._add(self._decoder.push(audio))

    def complete(self) -> None:
        """Add what the decoder still holds: the input is complete."""
        self._add(self._decoder.flush())

    def change_format(self, format: Format) -> None:
        """Take what is appended from here on to have this format."""
        self.complete()
        self._decoder = FormatDecoder(format)

    def _add(self, pcm: Pcm16) -> None:
        self._held.append(pcm)
        self._held_samples += len(pcm)
        self.uncommitted += len(pcm)

    def hold(self) -> None:
        """Keep what was added until it can be heard, or the last of it."""
        while self._held and self._held_samples - len(self._held[0]) >= MAX_HELD_SAMPLES:
            self._held_samples -= len(self._held.popleft())

    def release(self) -> list[AudioMessage]:
        """Return what was added and not given yet, for the conversation."""
        held = np.concatenate([*self._held, np.zeros(0, np.int16)])
        self._held.clear()
        self._held_samples = 0
        given = []
        for at in range(0, len(held), messages.MAX_AUDIO_SAMPLES):
            piece = held[at : at + messages.MAX_AUDIO_SAMPLES]
            given.append(AudioMessage(OPEN_TURN, self.position, piece))
            self.position += len(piece)
            self._given += len(piece)
        return given

    def commit(self) -> None:
        """Note that the client has committed all its input."""
        self.committed, self.uncommitted = self._given + self._held_samples, 0

    def clear_held(self) -> None:
        """Forget what was neither given nor committed."""
        self._decoder.flush()
        committed = np.concatenate([*self._held, np.zeros(0, np.int16)])
        committed = committed[: max(0, self._held_samples - self.uncommitted)]
        self._held = deque([committed])
        self._held_samples, self.uncommitted = len(committed), 0

    def clear_given(self) -> int:
        """Forget what was given and not committed. Return how many samples of the turn stay."""
        self._given = min(self._given, self.committed)
        self._clears.ask(self.committed)
        return self.committed

    def cleared(self, kept_samples: int) -> None:
        """Note how many samples of the turn have stayed. What could not be forgotten counts as committed."""
        more = self._clears.answer(kept_samples)
        self._given += more
        self.committed += more

    def begin_turn(self) -> None:
        """Begin the next turn: a response was asked for. What is held is not committed."""
        self._given = self.committed = 0
        self._clears.forget()

    def restart(self) -> None:
        """Commit nothing of what was said before: the client says from here on what is committed."""
        self._given = self.committed = self.uncommitted = 0
        self._clears.forget()

    def heard(self) -> None:
        """Note that speech has ended, and so is committed."""
        self.committed = self.uncommitted = 0
