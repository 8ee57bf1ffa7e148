"""The files of the session store: any place that `fsspec` knows, encrypted where there is a key.

All calls run in threads of their own, few at a time and each for so long: a store that hangs holds up nobody.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from streaming.errors import SnapshotError, StreamingError
from streaming.files import AnyBytes, in_pieces
from streaming.server.door.session_key import SessionKey

_CALL_S = 5.0
"""How long a call may take, and may wait before it."""
_START_S = 20.0
"""How long the store may take to show that it can be used, when the server starts."""
_CALLS, _URGENT_CALLS = 8, 2
"""How many calls run at once. Those that hang count until they end."""
_NONCE_BYTES, _TAG_BYTES = 12, 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG = logging.getLogger(__name__)

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
                from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
            except ImportError:
                raise StoreError(
                    "--session-store with a session key needs a Python package: `pip install cryptography`"
                ) from None
            secret = algorithms.AES(key.derive("stored session"))
            self._cipher = lambda nonce, tag=None: Cipher(secret, modes.GCM(nonce, tag))
        try:
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)  # others write there, too
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"the session store {url} cannot be used: {error}") from None
        self._url = url
        self._calls, self._urgent_calls = asyncio.Semaphore(_CALLS), asyncio.Semaphore(_URGENT_CALLS)

    def make(self, folders: Sequence[str]) -> None:
        """Make folders that only this user can read, where the store has folders and users, and write a file there and
        delete it. Raises `StoreError` where that does not work, or takes too long.

        An object store has no folders. Its bucket must be there: one that is made because its name was mistyped would
        be a store that no other server shares.
        """
        failed: list[Exception] = []

        def make() -> None:
            try:
                if "file" in self._fs.protocol or self._root.startswith("/"):
                    for folder in folders:
                        self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)
                        if "file" in self._fs.protocol:
                            os.chmod(f"{self._root}/{folder}", 0o700)  # voices are in there
                trial = f"{folders[0]}/.{secrets.token_hex(4)}"
                self.put_plain(trial, b"trial")
                self.remove(trial)
            except Exception as error:  # of whatever library the store is reached by
                failed.append(error)

        thread = threading.Thread(target=make, name="session store", daemon=True)
        thread.start()
        thread.join(_START_S)
        if thread.is_alive():
            raise StoreError(f"the session store {self._url} cannot be used: it did not answer in {_START_S:g} s")
        if failed and isinstance(failed[0], OSError) and failed[0].errno in _FULL:
            _LOG.warning("the session store %s is full: sessions end with this server until there is room", self._url)
        elif failed:
            reason = str(failed[0]) or type(failed[0]).__name__
            raise StoreError(f"the session store {self._url} cannot be used: {reason}")

    def write(self, path: str, data: AnyBytes, name: str, wanted: Callable[[], bool]) -> None:
        """Write a file whole or not at all, encrypted, and bound to this name. wanted: asked when most is done; a store
        that was slow must not put something old in the place of something new.
        """
        if self._cipher is not None:
            data = self._encrypted(data, name)
        elif "file" not in self._fs.protocol:  # others' libraries want bytes; those that are joined hold up nobody
            data = b"".join([bytes(piece) for piece in in_pieces(data)])
        folder, _, file = path.rpartition("/")
        part = f"{self._root}/{folder}/.{file}.{secrets.token_hex(4)}"
        try:
            self._fs.pipe_file(part, data)
            if not wanted():
                raise StoreError("the session store was too slow")
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
        return self._decrypted(data, name)

    def _encrypted(self, data: AnyBytes, name: str) -> bytes:
        """Return the nonce, what AES-GCM (NIST SP 800-38D) makes of the data, and its tag."""
        nonce = os.urandom(_NONCE_BYTES)
        encryptor = self._cipher(nonce).encryptor()
        encryptor.authenticate_additional_data(name.encode())
        made = [encryptor.update(piece) for piece in in_pieces(data)]
        return b"".join([nonce, *made, encryptor.finalize(), encryptor.tag])

    def _decrypted(self, data: bytes, name: str) -> bytes:
        from cryptography.exceptions import InvalidTag

        nonce, made, tag = data[:_NONCE_BYTES], memoryview(data)[_NONCE_BYTES:-_TAG_BYTES], data[-_TAG_BYTES:]
        try:
            decryptor = self._cipher(nonce, tag).decryptor()
            decryptor.authenticate_additional_data(name.encode())
            return b"".join([*[decryptor.update(piece) for piece in in_pieces(made)], decryptor.finalize()])
        except (InvalidTag, ValueError):
            raise SnapshotError("the stored session was encrypted with another key, or has been altered") from None

    def plain(self, path: str) -> bytes:
        """Return a file as it is. Raises `FileNotFoundError`."""
        return bytes(self._fs.cat_file(f"{self._root}/{path}"))

    def put_plain(self, path: str, data: bytes) -> None:
        """Write a file as it is, in the place of an earlier one. In a folder one of the same size needs no more room: a
        server on a full disk must not be taken for dead.
        """
        if "file" in self._fs.protocol:
            with open(f"{self._root}/{path}", "wb", opener=_without_truncating) as file:
                file.write(data)
                file.truncate()
        else:
            self._fs.pipe_file(f"{self._root}/{path}", data)

    def create(self, path: str) -> bool:
        """Make a small file that nobody else can make. Return whether it was not there."""
        mine = secrets.token_bytes(8)
        try:
            if "file" in self._fs.protocol:  # there, fsspec looks first and writes then: two could both make it
                self._fs.open(f"{self._root}/{path}", "xb").close()  # empty: on a full disk nothing else would work
            else:
                self._fs.pipe_file(f"{self._root}/{path}", mine, mode="create")
        except FileExistsError:
            # A library that tries again after an answer that was lost finds the file that it has made itself.
            return "file" not in self._fs.protocol and self._holds(path, mine)
        return True

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self.plain(path) == data
        except FileNotFoundError:
            return False

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
        try:
            entries = self._fs.ls(f"{self._root}/{folder}", detail=True)
        except FileNotFoundError:  # in an object store a folder is there while there is something in it
            return {}
        return {
            str(entry["name"]).rpartition("/")[2]: tuple(str(entry.get(mark)) for mark in marks)
            for entry in entries
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
            raise StoreError(f"the session store failed: {_kind(error)}") from error


def _without_truncating(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o600)


def _kind(error: Exception) -> str:
    """Return what went wrong, without the names of places, which a client has no need to know."""
    return type(error).__name__ if not isinstance(error, OSError) or not error.errno else os.strerror(error.errno)
