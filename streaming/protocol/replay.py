"""Count and keep messages between two peers that may lose each other, so that none is lost or doubled afterwards.

Each side counts the session's messages that it receives, says so now and then, and keeps what it sent until the other
has it. At most `WINDOW` messages are on their way at a time, so that what is kept is always enough. Both sides use it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from streaming.errors import ProtocolError
from streaming.protocol.messages import Ack

WINDOW = 256
"""Most counted messages without an answer: 20 s of audio."""
ACK_EVERY = 64


@dataclass(frozen=True)
class BookState:
    """What a book knows at one moment. received: how many messages came; answered: how many of these the other side
    knows to have arrived. kept: what was sent after the messages that were acknowledged.
    """

    received: int
    answered: int
    acknowledged: int
    kept: tuple[str | bytes, ...]


class ReplayBook:
    """One side's book of what it received and sent."""

    def __init__(
        self, received: int = 0, answered: int = 0, acknowledged: int = 0, kept: Sequence[str | bytes] = ()
    ) -> None:
        self.received = received
        self._answered = answered  # how many of these the other side knows to have arrived
        self._acknowledged = acknowledged
        self._kept: deque[str | bytes] = deque(kept)  # sent after what was acknowledged

    def state(self) -> BookState:
        """Return what another book needs to go on with this one."""
        return BookState(self.received, self._answered, self._acknowledged, tuple(self._kept))

    def begun_anew(self, received: int) -> ReplayBook:
        """Return a book that counts from 0, for a client that has received so many: what it lacks is kept. It may have
        received more than this book knows of. Raises `ProtocolError` for fewer than it has acknowledged.
        """
        lacks = ReplayBook(0, 0, self._acknowledged, self._kept)
        lacks.acknowledge(min(received, self._acknowledged + len(self._kept)))
        return ReplayBook(kept=lacks.unanswered())

    def receive(self) -> Ack | None:
        """Count a message that has come and will be handled. Return the answer when one is due."""
        self.received += 1
        if self.received - self._answered < ACK_EVERY:
            return None
        self._answered = self.received
        return Ack(received=self.received)

    def has_room(self, count: int = 1) -> bool:
        """Return whether so many more may be sent."""
        return len(self._kept) + count <= WINDOW

    def send(self, data: str | bytes) -> None:
        """Count and keep a message that is about to be given to the socket."""
        self._kept.append(data)

    def acknowledge(self, received: int) -> None:
        """Forget what has arrived: so many messages. Raise `ProtocolError` if that cannot be."""
        sent = self._acknowledged + len(self._kept)
        if not self._acknowledged <= received <= sent:
            raise ProtocolError(f"{received} messages received, but {self._acknowledged} were before, of {sent} sent")
        for _ in range(received - self._acknowledged):
            self._kept.popleft()
        self._acknowledged = received

    def after(self, received: int) -> str | bytes | None:
        """Return the message that was sent after so many, or None if there is none."""
        index = received - self._acknowledged
        return self._kept[index] if index < len(self._kept) else None

    def forget(self) -> None:
        """Forget all that is kept: nobody will ask for it."""
        self._acknowledged += len(self._kept)
        self._kept.clear()

    def unanswered(self) -> list[str | bytes]:
        """Return what is to be sent again, in order, after the other side has said what it has."""
        return list(self._kept)
