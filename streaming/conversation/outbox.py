"""What a session has to say and its socket has not taken yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from streaming.protocol.messages import AudioMessage, Message


@dataclass(frozen=True, slots=True)
class End:
    """The session is over: its last message, if the socket may still take one, and how the socket closes."""

    message: Message | None
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Echo:
    """Comes out among the replies once all that was given to the conversation before it has been handled.

    token: whatever the dialect that gave it wants back.
    """

    token: Any


Reply = Message | AudioMessage | Echo | End


class Outbox:
    """Replies in order. Its bound is kept by the conversation, which handles no message while too many wait."""

    def __init__(self) -> None:
        self._replies: deque[Reply] = deque()

    def __len__(self) -> int:
        return len(self._replies)

    def put(self, reply: Reply) -> None:
        """Add the last one."""
        self._replies.append(reply)

    def take(self) -> Reply | None:
        """Return the next one, or None if there is none."""
        return self._replies.popleft() if self._replies else None

    def drop_audio(self, turn: int) -> None:
        """Forget the audio of a turn that was interrupted: nobody will play it."""
        kept = [reply for reply in self._replies if not (isinstance(reply, AudioMessage) and reply.turn == turn)]
        if len(kept) < len(self._replies):
            self._replies = deque(kept)

    def clear(self) -> None:
        """Forget all: nobody will take them."""
        self._replies.clear()
