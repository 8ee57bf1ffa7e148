"""The input of a turn so far: whole frames that were handed out, and the beginning of the next one."""

from __future__ import annotations

from collections import deque

import numpy as np

from streaming.audio import FRAME, Framer, Pcm, Samples
from streaming.conversation.books import PromptBooks, bytes_of, samples_of


class Clears:
    """Clears of one prompt that are not answered yet. An answer may say that more is kept than was asked for: what an
    engine cannot rewind stays.
    """

    def __init__(self) -> None:
        self._asked: deque[int | None] = deque()

    def ask(self, keep: int) -> None:
        """Note that all but so much is to be cleared."""
        self._asked.append(keep)

    def answer(self, kept: int) -> int:
        """Note that a clear is answered. Return by how much the prompt is longer than was thought: 0 where another
        clear is under way, whose answer will say so.
        """
        asked = self._asked.popleft()
        return 0 if asked is None or self._asked else max(0, kept - asked)

    def forget(self) -> None:
        """Take the answers that are still to come for those of an old prompt."""
        self._asked = deque([None] * len(self._asked))


class Prompt:
    """One turn's input.

    frames: that the engine was given, or will be. speech_from: of these, what was said before the speech that is being
    heard, where turns are taken by voice.
    """

    def __init__(self, books: PromptBooks | None = None) -> None:
        self.frames = self.speech_from = 0
        self._framer = Framer(np.float32)
        self._clears = Clears()
        if books is not None:
            self.frames, self.speech_from = books.frames, books.speech_from
            self._framer.push(samples_of(books.begun))

    def books(self) -> PromptBooks:
        """Return what another prompt needs to go on with this one."""
        begun = self._framer.flush()
        self._framer.push(begun)
        return PromptBooks(frames=self.frames, speech_from=self.speech_from, begun=bytes_of(begun))

    @property
    def samples(self) -> int:
        """Return how much was said, in samples."""
        return self.frames * FRAME + self._framer.pending_samples

    def push(self, pcm: Pcm) -> Samples:
        """Return the frames that these samples complete, float32 [n, 1920]."""
        return self._framer.push(pcm)

    def rest(self) -> Samples:
        """Return the last frame, which is not whole, float32 [n], and empty it."""
        return self._framer.flush()

    def keep(self, samples: int) -> int:
        """Clear all but the beginning. Return how many frames the engine has to keep; `cleared` is told what it keeps.

        A frame of which any part is kept stays whole.
        """
        kept = min(-(-samples // FRAME), self.frames)
        begun = self._framer.flush()[: max(0, samples - self.frames * FRAME)]
        self._framer.push(begun)
        self.frames = kept
        self._clears.ask(kept)
        return kept

    def cleared(self, kept_frames: int) -> None:
        """Note how many frames the engine has kept: more than it was to keep, where it could reach back no further."""
        more = self._clears.answer(kept_frames)
        self.frames += more
        self.speech_from += more

    def begin(self) -> None:
        """Begin the next turn, with nothing said."""
        self.frames = self.speech_from = 0
        self._clears.forget()
