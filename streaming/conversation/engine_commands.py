"""A conversation's commands to the engine's session, in order. A frame waits until the engine has room for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streaming.config import Sampling


class SessionCommands(Protocol):
    """The engine's session, as a conversation commands it. `streaming.engine.session.EngineSession` is the real one."""

    def listen(self, pcm: NDArray[np.float32]) -> bool: ...
    def speak(self, max_frames: int, lead_frames: int) -> int: ...
    def release(self, turn: int, frames: int) -> None: ...
    def interrupt(self, turn: int, heard_samples: int) -> None: ...
    def clear_input(self, keep_frames: int) -> None: ...
    def configure(self, sampling: Sampling) -> None: ...
    def mark(self, name: str) -> None: ...
    def unmark(self, name: str) -> None: ...
    def go_back(self, name: str) -> None: ...
    def keep(self) -> None: ...


class EngineCommands:
    """Commands in the order in which they were given: what comes behind a frame that waits, waits with it.

    behind_frames: how many frames the engine has taken and not heard yet. Each command raises as the engine does.
    """

    def __init__(self, engine: SessionCommands) -> None:
        self.behind_frames = 0
        self._engine = engine
        self._waiting: deque[Callable[[], bool]] = deque()

    @property
    def waiting(self) -> bool:
        """Return whether something waits for room."""
        return bool(self._waiting)

    def listen(self, frame: NDArray[np.float32], *, patient: bool) -> bool:
        """Have a frame heard, at once or, if `patient`, when there is room. Return whether it is or will be."""
        if not self._waiting and self._take(frame):
            return True
        if patient:
            self._waiting.append(partial(self._take, frame))
        return patient

    def configure(self, sampling: Sampling) -> None:
        """Draw tokens differently from here on."""
        self._give(partial(self._engine.configure, sampling))

    def speak(self, turn: int, max_frames: int, lead_frames: int) -> None:
        """Speak this turn."""

        def speak() -> None:
            spoken = self._engine.speak(max_frames, lead_frames)
            assert spoken == turn, (spoken, turn)

        self._give(speak)

    def interrupt(self, turn: int, heard_samples: int) -> None:
        """End a turn, of which so much was heard."""
        self._give(partial(self._engine.interrupt, turn, heard_samples))

    def clear_input(self, keep_frames: int) -> None:
        """Take back all but the first frames of the prompt."""
        self._give(partial(self._engine.clear_input, keep_frames))

    def mark(self, name: str) -> None:
        """Remember this moment."""
        self._give(partial(self._engine.mark, name))

    def unmark(self, name: str) -> None:
        """Forget a moment."""
        self._give(partial(self._engine.unmark, name))

    def go_back(self, name: str) -> None:
        """Go on from a moment."""
        self._give(partial(self._engine.go_back, name))

    def keep(self) -> None:
        """Copy the session out as it is now."""
        self._give(self._engine.keep)

    def release(self, turn: int, frames: int) -> None:
        """Tell how far the listener is, which needs no order."""
        self._engine.release(turn, frames)

    def heard(self) -> None:
        """Note that the engine has heard a frame, so that there is room for another."""
        self.behind_frames -= 1
        self._go_on()

    def clear(self) -> None:
        """Drop all commands that wait."""
        self._waiting.clear()

    def _give(self, command: Callable[[], None]) -> None:
        def done() -> bool:
            command()
            return True

        self._waiting.append(done)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._waiting[0]():
            self._waiting.popleft()

    def _take(self, frame: NDArray[np.float32]) -> bool:
        taken = self._engine.listen(frame)
        self.behind_frames += taken
        return taken
