"""The replies that a session's socket has not taken yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from streaming.protocol.messages import AudioMessage, Message, TurnDone


@dataclass(frozen=True, slots=True)
class End:
    """The session is over: its last message, if the socket may still take one, and how the socket closes."""

    message: Message | None
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Echo:
    """A marker that comes out among the replies once all that was given before it has been handled.

    token: whatever the dialect that gave it wants back.
    """

    token: Any


@dataclass(frozen=True, slots=True)
class Saved:
    """The session as its holder asked for it. turn: the one that is open. snapshot: the engine's own."""

    turn: int
    snapshot: Any


Reply = Message | AudioMessage | Echo | Saved | End


class Outbox:
    """Replies in order. Its bound is kept by the conversation, which handles no message while too many wait."""

    def __init__(self) -> None:
        self._replies: deque[Reply] = deque()

    def __len__(self) -> int:
        return len(self._replies)

    def put(self, reply: Reply) -> None:
        """Add a reply behind the others."""
        self._replies.append(reply)

    def take(self) -> Reply | None:
        """Return the next reply, or None if there is none."""
        return self._replies.popleft() if self._replies else None

    @property
    def next(self) -> Reply | None:
        """Return what `take` would."""
        return self._replies[0] if self._replies else None

    def cut(self, turn: int, sent_samples: int) -> None:
        """Drop the audio of a turn that was interrupted: nobody will play it. Its end tells how much was sent."""
        waiting, self._replies = self._replies, deque()
        for reply in waiting:
            if isinstance(reply, TurnDone) and reply.turn == turn:
                self._replies.append(structs.replace(reply, samples=sent_samples))
            elif not (isinstance(reply, AudioMessage) and reply.turn == turn):
                self._replies.append(reply)

    def clear(self) -> None:
        """Drop all replies: nobody will take them."""
        self._replies.clear()
