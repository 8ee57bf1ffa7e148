"""The files of the session store: any place that `fsspec` knows, encrypted where there is a key.

All calls run in threads of their own, few at a time and each for so long: a store that hangs holds up nobody.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from streaming.errors import SnapshotError, StreamingError
from streaming.server.door.session_key import SessionKey

_CALL_S = 5.0
"""How long a call may take, and may wait before it."""
_CALLS, _URGENT_CALLS = 8, 2
"""How many calls run at once. Those that hang count until they end."""
_NONCE_BYTES = 12

T = TypeVar("T")


class StoreError(StreamingError):
    """The session store does not do what it is asked for."""

    code = "session_store"
    passes = True


class StoreFiles:
    """The place at a URL of `fsspec`'s. key: what `write` writes is encrypted, and nothing is read that is not.
    Raises `StoreError` where there is no such place.

    All but `call` is for the threads that `call` makes.
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
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)  # others write there, too
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"the session store {url} cannot be used: {error}") from None
        self._url = url
        self._calls, self._urgent_calls = asyncio.Semaphore(_CALLS), asyncio.Semaphore(_URGENT_CALLS)

    def make(self, folder: str) -> None:
        """Make a folder that only this user can read, where the store knows of users. Any thread may do so. Raises
        `StoreError`.
        """
        try:
            self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)
            if "file" in self._fs.protocol:
                os.chmod(f"{self._root}/{folder}", 0o700)  # voices are in there
        except (ValueError, OSError) as error:
            raise StoreError(f"the session store {self._url} cannot be used: {error}") from None

    def write(self, path: str, data: bytes, name: str) -> None:
        """Write a file whole or not at all, encrypted, and bound to this name."""
        if self._cipher is not None:
            nonce = os.urandom(_NONCE_BYTES)
            data = nonce + self._cipher.encrypt(nonce, data, name.encode())
        folder, _, file = path.rpartition("/")
        part = f"{self._root}/{folder}/.{file}.{secrets.token_hex(4)}"
        try:
            self._fs.pipe_file(part, data)
            self._fs.mv(part, f"{self._root}/{path}")
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(part)
            raise

    def read(self, path: str, name: str) -> bytes:
        """Return what `write` was given. Raises `FileNotFoundError`, `SnapshotError`."""
        data = self.plain(path)
        if self._cipher is None:
            return data
        from cryptography.exceptions import InvalidTag

        try:
            opened: bytes = self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise SnapshotError("the stored session was encrypted with another key, or has been altered") from None
        return opened

    def plain(self, path: str) -> bytes:
        """Return a file as it is. Raises `FileNotFoundError`."""
        return bytes(self._fs.cat_file(f"{self._root}/{path}"))

    def put_plain(self, path: str, data: bytes) -> None:
        """Write a file as it is, in the place of an earlier one."""
        self._fs.pipe_file(f"{self._root}/{path}", data)

    def create(self, path: str) -> bool:
        """Make an empty file that nobody else can make. Return whether it was not there."""
        try:
            if "file" in self._fs.protocol:  # there, fsspec looks first and writes then: two could both make it
                with self._fs.open(f"{self._root}/{path}", "xb") as file:
                    file.write(b"made")
            else:
                self._fs.pipe_file(f"{self._root}/{path}", b"made", mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return bool(self._fs.exists(f"{self._root}/{path}"))

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{path}")

    def move(self, path: str, to: str) -> None:
        """Give a file another name. Raises `FileNotFoundError`."""
        self._fs.mv(f"{self._root}/{path}", f"{self._root}/{to}")

    def list(self, folder: str) -> dict[str, tuple[str, ...]]:
        """Return the files of a folder by name, each with what changes when it does."""
        marks = ("size", "mtime", "created", "LastModified", "ETag")
        return {
            str(entry["name"]).rpartition("/")[2]: tuple(str(entry.get(mark)) for mark in marks)
            for entry in self._fs.ls(f"{self._root}/{folder}", detail=True)
            if entry["type"] == "file"
        }

    async def call(self, work: Callable[[], T], *, urgent: bool = False) -> T:
        """Call `work` in a daemon thread: one that hangs must not keep the process from ending. urgent: do not wait for
        calls that are not. Raises `StoreError`, and what of this project's errors `work` raises.
        """
        calls = self._urgent_calls if urgent else self._calls
        try:
            async with asyncio.timeout(_CALL_S):
                await calls.acquire()
        except TimeoutError:
            raise StoreError("the session store is busy, or hangs") from None
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: Exception | None) -> None:
            calls.release()
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
            except Exception as raised:  # whatever library reaches the store; whoever asked is told
                error = raised
            try:
                loop.call_soon_threadsafe(tell, result, error)
            except RuntimeError:  # the loop is closed, and nobody asks any more
                return

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
