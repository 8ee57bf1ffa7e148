"""Where sessions wait that no server has just now: any place that `fsspec` knows, shared by servers.

An entry's name is a hash of its session's resume token. Two servers that want one session: whoever makes its claim, a
file that can be made once, has it. Nothing here believes a clock of another machine: an entry has expired when this
server has seen it for so long.

All calls run in threads of their own, few at a time and each for so long: a store that hangs holds up nobody.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from streaming.errors import SnapshotError, StreamingError
from streaming.server.door.session_key import SessionKey

_CALL_S = 5.0
"""How long a call may take."""
_CALLS = 8
"""At once. Those that hang count until they end."""
_NONCE_BYTES = 12

T = TypeVar("T")


class StoreError(StreamingError):
    """The session store does not do what it is asked for."""

    code = "session_store"
    passes = True


class SessionMovingError(StreamingError):
    """Another server has a session's entry just now."""

    code = "session_moving"
    passes = True


@dataclass(frozen=True)
class StoredSession:
    """An entry that this server has claimed. Delete it once its session runs, or give it back."""

    name: str
    data: bytes


class SessionStore:
    """The store at a URL of `fsspec`'s. key: entries are encrypted, and none is taken that is not. Raises `StoreError`
    where there is no such place.
    """

    def __init__(self, url: str, key: SessionKey | None) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise StoreError("--session-store needs a Python package: `pip install fsspec`") from None
        self._cipher: Any = None
        if key is not None:
            try:
                from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            except ImportError:
                raise StoreError(
                    "--session-store with a session key needs a Python package: `pip install cryptography`"
                ) from None
            self._cipher = AESGCM(key.derive("stored session"))
        try:
            self._fs, root = url_to_fs(url)
            self._sessions, self._claims = f"{root}/sessions", f"{root}/claims"
            for folder in (self._sessions, self._claims):
                self._fs.makedirs(folder, exist_ok=True)
                if "file" in self._fs.protocol:
                    os.chmod(folder, 0o700)  # voices are in there
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"the session store {url} cannot be used: {error}") from None
        self._calls = 0
        self._seen: dict[str, tuple[object, float]] = {}

    async def put(self, name: str, data: bytes) -> None:
        """Keep a session, in the place of an earlier entry of it. Raises `StoreError`."""
        await self._call(lambda: self._put(name, data))

    async def take(self, name: str) -> StoredSession | None:
        """Claim a session for this server and return it, None where there is none.

        Raises `StoreError`; `SessionMovingError` where another server has claimed it; `SnapshotError` for an entry that
        was not encrypted with this key.
        """
        return await self._call(lambda: self._take(name))

    async def give_back(self, name: str) -> None:
        """Let others have what this server has claimed. Raises `StoreError`."""
        await self._call(lambda: self._remove(f"{self._claims}/{name}"))

    async def delete(self, name: str) -> None:
        """Delete an entry, and the claim on it. Raises `StoreError`."""

        def delete() -> None:
            self._remove(f"{self._sessions}/{name}")
            self._remove(f"{self._claims}/{name}")

        await self._call(delete)

    async def sweep(self, keep_s: float, now: float) -> None:
        """Delete what this server has seen unchanged for so long. Raises `StoreError`."""
        await self._call(lambda: self._sweep(keep_s, now))

    # In a thread

    def _put(self, name: str, data: bytes) -> None:
        if self._cipher is not None:
            nonce = os.urandom(_NONCE_BYTES)
            data = nonce + self._cipher.encrypt(nonce, data, name.encode())
        part = f"{self._sessions}/.{name}.{secrets.token_hex(4)}"
        try:
            self._fs.pipe_file(part, data)
            self._fs.mv(part, f"{self._sessions}/{name}")  # whole or not at all
        except BaseException:
            self._remove(part)
            raise

    def _take(self, name: str) -> StoredSession | None:
        if not self._fs.exists(f"{self._sessions}/{name}"):
            return None
        claim = f"{self._claims}/{name}"
        try:
            self._fs.pipe_file(claim, b"claimed", mode="create")
        except FileExistsError:
            raise SessionMovingError("another server has this session just now; come again in a moment") from None
        try:
            data = self._fs.cat_file(f"{self._sessions}/{name}")
        except FileNotFoundError:
            self._remove(claim)
            return None
        if self._cipher is not None:
            from cryptography.exceptions import InvalidTag

            try:
                data = self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], name.encode())
            except (InvalidTag, ValueError):
                self._remove(claim)
                raise SnapshotError("the stored session was encrypted with another key, or has been altered") from None
        return StoredSession(name, data)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _sweep(self, keep_s: float, now: float) -> None:
        seen: dict[str, tuple[object, float]] = {}
        for folder in (self._sessions, self._claims):
            self._fs.invalidate_cache(folder)
            for entry in self._fs.ls(folder, detail=True):
                path = str(entry["name"])
                mark = tuple(str(entry.get(what)) for what in ("size", "mtime", "created", "LastModified", "ETag"))
                before = self._seen.get(path)
                seen[path] = before if before is not None and before[0] == mark else (mark, now)
                if now - seen[path][1] >= keep_s:
                    self._remove(path)
        self._seen = seen

    async def _call(self, work: Callable[[], T]) -> T:
        """Do this in a daemon thread: one that hangs must not keep the process from ending."""
        if self._calls >= _CALLS:
            raise StoreError("the session store is busy, or hangs")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: Exception | None) -> None:
            self._calls -= 1
            if done.cancelled():
                return
            if error is None:
                done.set_result(result)  # type: ignore[arg-type]
            else:
                done.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as raised:  # of whatever library the store is reached by; told to whoever asked
                error = raised
            try:
                loop.call_soon_threadsafe(tell, result, error)
            except RuntimeError:  # the loop is closed, and nobody asks any more
                return

        self._calls += 1
        threading.Thread(target=run, name="session store", daemon=True).start()
        try:
            async with asyncio.timeout(_CALL_S):
                return await done
        except TimeoutError:
            raise StoreError(f"the session store did not answer in {_CALL_S:g} s") from None
        except StreamingError:
            raise
        except Exception as error:
            raise StoreError(f"the session store failed: {type(error).__name__}") from error
