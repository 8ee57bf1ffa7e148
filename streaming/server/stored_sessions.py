"""Sessions of the native protocol in the session store: by their resume tokens, as bytes, and checked."""

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
from streaming.server.kept_session import PutDown, Talk, pack, unpack
from streaming.server.resumption import SessionExpiredError
from streaming.server.session_store import SessionMovingError, SessionStore


@dataclass(frozen=True)
class FoundSession:
    """A session that this server has claimed. went_back: its server died, and this is its last finished turn."""

    name: str
    down: PutDown
    talk: Talk
    went_back: bool


@dataclass(frozen=True)
class Moved:
    """How a session comes to this server. book: its connection's, to go on with. turn: the open one, where it went back
    to the end of the turn before; None where it goes on as it was. position: samples that its client has sent. heard:
    the latest packets of its stream of Opus, where that goes on.
    """

    down: PutDown
    book: ReplayBook
    turn: int | None
    position: int
    heard: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, found: FoundSession, asked: SessionResume) -> Moved:
        """Return it for a client that asks so. Raises `ProtocolError` where it cannot have received so many."""
        book = found.talk.book()
        if found.went_back:
            return cls(found.down, book.begun_anew(asked.received), found.down.books.turn, asked.position)
        book.acknowledge(asked.received)
        return cls(found.down, book, None, asked.position, tuple(found.talk.heard))


class StoredSessions:
    """The store, as the protocol's sockets see it. moved: called with the token of a session that has left.
    is_own: whether a token is of this server.
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
        self, name: str, down: PutDown, book: BookState, codec: Codec, holder: bytes | None, heard: tuple[bytes, ...]
    ) -> None:
        """Keep a session that this server has put down. Raises `StoreError`, `SessionLostError`."""
        await self._store.put(name, await asyncio.to_thread(pack, self._engine, down, book, codec, holder, heard))

    async def put_turn(self, name: str, down: PutDown, book: BookState, codec: Codec, holder: bytes | None) -> None:
        """Keep the last finished turn of a session that runs here. Raises `StoreError`, `SessionLostError`."""
        await self._store.put_turn(name, await asyncio.to_thread(pack, self._engine, down, book, codec, holder))

    async def forget_turn(self, name: str) -> None:
        """Delete that: the session is over. Raises `StoreError`."""
        await self._store.forget_turn(name)

    async def find(self, token: str, holder: bytes | None) -> FoundSession:
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
            down, talk = await asyncio.to_thread(unpack, self._engine, stored.data)
        except SnapshotError:
            await self.give_back(name)
            raise
        if not hmac.compare_digest(talk.holder or b"", holder or b""):
            await self.give_back(name)
            raise SessionExpiredError("this session is over, or was left alone for too long; start a new one")
        return FoundSession(name, down, talk, stored.owner is not None)

    async def give_back(self, name: str) -> None:
        """Let others have it. Raises `StoreError`."""
        await self._store.give_back(name)

    async def delete(self, name: str, *, went_back: bool = False) -> None:
        """Delete it: it runs here, perhaps from its last finished turn on. Raises `StoreError`."""
        await self._store.delete(name, went_back=went_back)
