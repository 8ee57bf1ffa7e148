"""Hand sessions of the native protocol to another server, by way of the session store, and take them over."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from streaming.engine.engine import Engine
from streaming.errors import SnapshotError
from streaming.protocol.messages import Codec, SessionResume
from streaming.protocol.replay import BookState, ReplayBook
from streaming.server.resumption import SessionExpiredError
from streaming.server.session_bytes import SessionHeader, SessionState, pack, unpack
from streaming.server.session_store import SessionMovingError, SessionStore


@dataclass(frozen=True)
class ClaimedSession:
    """A session that this server has claimed. went_back: its server died, and this is its last finished turn."""

    name: str
    state: SessionState
    header: SessionHeader
    went_back: bool


@dataclass(frozen=True)
class Takeover:
    """How this server goes on with a session. book: its connection's. turn: the open one, where the session went back
    to the end of the turn before; None where it goes on as it was. position: samples that its client has sent. heard:
    the latest packets of its stream of Opus, where that goes on.
    """

    state: SessionState
    book: ReplayBook
    turn: int | None
    position: int
    heard: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, found: ClaimedSession, asked: SessionResume) -> Takeover:
        """Return the takeover of a session that a client asks for so. Raises `ProtocolError` where it cannot have
        received so many.
        """
        book = found.header.book()
        if found.went_back:
            return cls(found.state, book.begun_anew(asked.received), found.state.books.turn, asked.position)
        book.acknowledge(asked.received)
        return cls(found.state, book, None, asked.position, tuple(found.header.heard))


class Handover:
    """The store by resume tokens: sessions go there as bytes, and are checked when they come back.

    moved: called with the token of a session that has left. is_own: whether a token is of this server.
    """

    def __init__(
        self, store: SessionStore, engine: Engine, moved: Callable[[str], None], is_own: Callable[[str], bool]
    ) -> None:
        self._store, self._engine, self.moved, self._is_own = store, engine, moved, is_own

    @staticmethod
    def name_of(token: str) -> str:
        """Return the name of a session's entry, which tells nothing of its token."""
        return sha256(f"stored session {token}".encode()).hexdigest()

    async def put(
        self,
        name: str,
        state: SessionState,
        book: BookState,
        codec: Codec,
        holder: bytes | None,
        heard: tuple[bytes, ...],
    ) -> None:
        """Keep a session that this server has put down. Raises `StoreError`, `SessionLostError`."""
        await self._store.put(name, await asyncio.to_thread(pack, self._engine, state, book, codec, holder, heard))

    async def put_turn(
        self, name: str, state: SessionState, book: BookState, codec: Codec, holder: bytes | None
    ) -> None:
        """Keep the last finished turn of a session that runs here. Raises `StoreError`, `SessionLostError`."""
        await self._store.put_turn(name, await asyncio.to_thread(pack, self._engine, state, book, codec, holder))

    async def forget_turn(self, name: str) -> None:
        """Delete the last finished turn of a session that is over. Raises `StoreError`."""
        await self._store.forget_turn(name)

    async def find(self, token: str, holder: bytes | None) -> ClaimedSession:
        """Claim a session for this server. holder: the digest of the access token of who asks.

        Raises `SessionExpiredError` where there is none that this holder opened; `StoreError`, `SessionMovingError`,
        `SnapshotError`.
        """
        name = self.name_of(token)
        stored = await self._store.take(name)
        if stored is None and not self._is_own(token) and await self._store.lives(token.partition(".")[0]):
            raise SessionMovingError("no server has put this session into the store yet; come again in a moment")
        if stored is None:
            raise SessionExpiredError(
                "this session is over, was left alone for too long, or its server died before a turn was finished; "
                "start a new one"
            )
        try:
            state, header = await asyncio.to_thread(unpack, self._engine, stored.data)
        except SnapshotError:
            await self.give_back(name)
            raise
        if not hmac.compare_digest(header.holder or b"", holder or b""):
            await self.give_back(name)
            raise SessionExpiredError("this session is over, or was left alone for too long; start a new one")
        return ClaimedSession(name, state, header, stored.owner is not None)

    async def give_back(self, name: str) -> None:
        """Let other servers have a session that this one has claimed. Raises `StoreError`."""
        await self._store.give_back(name)

    async def delete(self, name: str, *, went_back: bool = False) -> None:
        """Delete the entry of a session that runs here now. went_back: it runs from its last finished turn on. Raises
        `StoreError`.
        """
        await self._store.delete(name, went_back=went_back)
