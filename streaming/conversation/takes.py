"""Takes: which moments of a session are kept to go on from anew, and when they are given up.

Of each of the latest turns two moments are kept: the end of its prompt, from which another continuation can be made,
and the end of its continuation, to which the conversation can return. The engine holds them as marks, by name; here is
only which there are. Takes of the same prompt share its mark.
"""

from __future__ import annotations

from collections.abc import Iterator

from streaming.errors import TakeGoneError

SESSION_BYTES = 256 << 20
"""Most bytes that the marks of one session may hold: four windows of a 1.3B model."""
SERVER_BYTES = 2 << 30
"""Most bytes that the marks of all sessions may hold together."""


class TakesMemory:
    """The bytes that the marks of all sessions hold.

    turns: how many of its latest turns a session keeps; 0: there are no takes.
    session_bytes, server_bytes: what the marks of one session, and of all, may hold.
    """

    def __init__(self, turns: int, session_bytes: int = SESSION_BYTES, server_bytes: int = SERVER_BYTES) -> None:
        self.turns, self.session_bytes, self.server_bytes = turns, session_bytes, server_bytes
        self.held_bytes = 0


class Takes:
    """One session's turns that can be gone back to; the oldest are given up first.

    turns: how many there are at most, at most those that the memory allows; None: as many. ends: whether one can return
    to the end of a continuation, too.
    """

    def __init__(self, memory: TakesMemory, turns: int | None = None, *, ends: bool = True) -> None:
        self.turns = memory.turns if turns is None else min(turns, memory.turns)
        self._memory, self._wants_ends = memory, ends
        self._prompts: dict[int, str] = {}  # the mark at the end of each turn's prompt
        self._ends: dict[int, str] = {}  # the mark at the end of its continuation
        self._held_bytes = 0

    def __contains__(self, turn: int) -> bool:
        """Return whether the end of a turn's prompt is kept."""
        return turn in self._prompts

    def prompt(self, turn: int) -> str:
        """Return the mark at the end of a turn's prompt. Raises `TakeGoneError`."""
        return self._find(self._prompts, turn)

    def end(self, turn: int) -> str:
        """Return the mark at the end of a turn's continuation. Raises `TakeGoneError`."""
        return self._find(self._ends, turn)

    def wants_end(self, turn: int) -> bool:
        """Return whether the end of a turn is to be kept, and is not yet."""
        return self._wants_ends and turn in self._prompts and turn not in self._ends

    def keep_prompt(self, turn: int, mark: str) -> Iterator[str]:
        """Keep the end of a turn's prompt by this mark. Return the marks that are to be given up for it."""
        self._prompts[turn] = mark
        return self._beyond(self.turns)

    def keep_end(self, turn: int, mark: str) -> None:
        """Keep the end of a turn's continuation by this mark."""
        self._ends[turn] = mark

    def hold(self, held_bytes: int) -> Iterator[str]:
        """Note what this session's marks hold. Return the marks that are to be given up, so that it becomes less."""
        memory = self._memory
        memory.held_bytes += held_bytes - self._held_bytes
        self._held_bytes = held_bytes
        if held_bytes > memory.session_bytes or memory.held_bytes > memory.server_bytes:
            return self._beyond(len(self._prompts) - 1)
        return iter(())

    def clear(self) -> None:
        """Give up all marks: the session is over."""
        self._memory.held_bytes -= self._held_bytes
        self._held_bytes = 0
        self._prompts.clear()
        self._ends.clear()

    def _find(self, marks: dict[int, str], turn: int) -> str:
        if turn not in marks:
            kept = ", ".join(map(str, marks)) or "none"
            raise TakeGoneError(f"turn {turn} is not kept any more, or never was; there are: {kept}")
        return marks[turn]

    def _beyond(self, turns: int) -> Iterator[str]:
        """Give up the oldest turns beyond so many; return the marks that none is left to use."""
        before = {*self._prompts.values(), *self._ends.values()}
        for turn in list(self._prompts)[: max(0, len(self._prompts) - turns)]:
            del self._prompts[turn]
            self._ends.pop(turn, None)
        return iter(sorted(before - {*self._prompts.values(), *self._ends.values()}))
