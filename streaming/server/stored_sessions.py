"""Sessions of the native protocol in the session store: by their resume tokens, as bytes, and checked."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from streaming.engine.engine import Engine
from streaming.errors import SnapshotError
from streaming.protocol.messages import Codec
from streaming.protocol.replay import ReplayBook
from streaming.server.kept_session import PutDown, Talk, pack, unpack
from streaming.server.resumption import SessionExpiredError
from streaming.server.session_store import SessionMovingError, SessionStore


@dataclass(frozen=True)
class FoundSession:
    """A session that this server has claimed."""

    name: str
    down: PutDown
    talk: Talk


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

    async def put(self, name: str, down: PutDown, book: ReplayBook, codec: Codec, holder: bytes | None) -> None:
        """Keep a session. Raises `StoreError`."""
        await self._store.put(name, await asyncio.to_thread(pack, self._engine, down, book, codec, holder))

    async def find(self, token: str, holder: bytes | None) -> FoundSession:
        """Claim a session for this server. holder: the digest of the access token of who asks.

        Raises `SessionExpiredError` where there is none that this holder opened; `StoreError`, `SessionMovingError`,
        `SnapshotError`.
        """
        name = self.name_of(token)
        stored = await self._store.take(name)
        if stored is None and self._is_own(token):
            raise SessionExpiredError("this session is over, or was left alone for too long; start a new one")
        if stored is None:
            raise SessionMovingError("no server has put this session into the store yet; come again in a moment")
        try:
            down, talk = await asyncio.to_thread(unpack, self._engine, stored.data)
        except SnapshotError:
            await self.give_back(name)
            raise
        if not hmac.compare_digest(talk.holder or b"", holder or b""):
            await self.give_back(name)
            raise SessionExpiredError("this session is over, or was left alone for too long; start a new one")
        return FoundSession(name, down, talk)

    async def give_back(self, name: str) -> None:
        """Let others have it. Raises `StoreError`."""
        await self._store.give_back(name)

    async def delete(self, name: str) -> None:
        """Delete it: it runs. Raises `StoreError`."""
        await self._store.delete(name)
