"""Put each finished turn of a session into the session store, so that the session outlives a server that dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from streaming.errors import StreamingError
from streaming.protocol.messages import Codec
from streaming.protocol.replay import BookState
from streaming.server.handover import Handover
from streaming.server.session_bytes import SessionState
from streaming.server.session_store import SessionLostError

_LOG = logging.getLogger(__name__)


class TurnBackup:
    """The backup of one session. A turn is put into the store once the engine has copied it and its `turn.done` was
    said: one at a time, and the latest in the place of one that waits.

    lost: called where another server has gone on with the session, because this one was taken for dead.
    """

    def __init__(
        self, handover: Handover, name: str, codec: Codec, holder: bytes | None, lost: Callable[[], None]
    ) -> None:
        self._handover, self._name, self._codec, self._holder, self._lost = handover, name, codec, holder, lost
        self._said: tuple[int, BookState] | None = None
        self._copied: SessionState | None = None
        self._putting: asyncio.Task[None] | None = None
        self._over = False

    def said(self, turn: int, book: BookState) -> None:
        """Note that all of this turn is given to the socket. book: what is kept for the client's return."""
        self._said = turn, book
        self._look()

    def copied(self, state: SessionState) -> None:
        """Note the session as it is at the end of its latest turn."""
        self._copied = state
        self._look()

    async def quiet(self) -> None:
        """Wait until no turn is on its way."""
        if self._putting is not None:
            await asyncio.wait((self._putting,))

    async def leave(self, *, forget: bool) -> None:
        """Put no more turns there, and delete the last one unless another server goes on with the session."""
        self._over = True
        await self.quiet()
        if forget:
            try:
                await self._handover.forget_turn(self._name)
            except StreamingError as error:
                _LOG.warning("a session's last turn could not be deleted from the session store: %s", error)

    def _look(self) -> None:
        if self._putting is None and not self._over and self._next() is not None:
            self._putting = asyncio.create_task(self._put())

    def _next(self) -> tuple[SessionState, BookState] | None:
        if self._copied is None or self._said is None or self._said[0] < self._copied.books.turn - 1:
            return None
        return self._copied, self._said[1]

    async def _put(self) -> None:
        try:
            while (found := self._next()) is not None and not self._over:
                self._copied = None
                await self._handover.put_turn(self._name, *found, self._codec, self._holder)
        except SessionLostError:
            self._lost()
        except StreamingError as error:
            _LOG.warning("a finished turn could not be put into the session store: %s", error)
        finally:
            self._putting = None
