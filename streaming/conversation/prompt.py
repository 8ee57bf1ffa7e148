"""What was said in this turn so far: whole frames that were handed out, and the beginning of the next one."""

from __future__ import annotations

import numpy as np

from streaming.audio import FRAME, Framer, Pcm, Samples
from streaming.conversation.books import PromptBooks, bytes_of, samples_of


class Prompt:
    """One turn's input.

    frames: that the engine was given, or will be. speech_from: of these, what was said before the speech that is being
    heard, where turns are taken by voice.
    """

    def __init__(self, books: PromptBooks | None = None) -> None:
        self.frames = self.speech_from = 0
        self._framer = Framer(np.float32)
        if books is not None:
            self.frames, self.speech_from = books.frames, books.speech_from
            self._framer.push(samples_of(books.begun))

    def books(self) -> PromptBooks:
        """Return all of this."""
        begun = self._framer.flush()
        self._framer.push(begun)
        return PromptBooks(frames=self.frames, speech_from=self.speech_from, begun=bytes_of(begun))

    @property
    def samples(self) -> int:
        """All that was said, in samples."""
        return self.frames * FRAME + self._framer.pending_samples

    def push(self, pcm: Pcm) -> Samples:
        """Return the frames that these samples complete, float32 [n, 1920]."""
        return self._framer.push(pcm)

    def rest(self) -> Samples:
        """Return the last frame, which is not whole, float32 [n], and empty it."""
        return self._framer.flush()

    def keep(self, samples: int) -> int:
        """Clear all but the beginning. Return how many frames the engine has to take back.

        A frame of which something is kept stays whole.
        """
        kept = min(-(-samples // FRAME), self.frames)
        begun = self._framer.flush()[: max(0, samples - self.frames * FRAME)]
        self._framer.push(begun)
        cleared, self.frames = self.frames - kept, kept
        return cleared

    def begin(self) -> None:
        """Begin the next turn, with nothing said."""
        self.frames = self.speech_from = 0
