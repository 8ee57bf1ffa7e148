"""Where sessions wait that no server has just now, and where each session's last finished turn is kept in case its
server dies.

An entry's name is a hash of its session's resume token. Two servers that want one session: whoever makes its claim, a
file that can be made once, has it. A server that lives writes a file again and again; one whose file is gone, or has
not changed for so long while another server looked, is dead. Nothing here believes a clock of another machine: an entry
has expired when this server has seen it for so long.

    sessions/NAME      a session that its server has put down
    claims/NAME        a server is taking it up
    turns/NAME.MARK    the last finished turn of a session that the server MARK has, - once that has put it down; empty
                       before there is one
    owners/MARK        the server MARK lives
    lost/NAME.MARK     another server has taken it up from there: MARK was taken for dead
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from streaming.errors import SnapshotError, StreamingError
from streaming.files import AnyBytes
from streaming.server.door.session_key import SessionKey
from streaming.server.store_files import StoreError, StoreFiles

BEAT_S = 1.0
"""How often a server says that it lives."""
DEAD_S = 6.0
"""A server that has not said so for so long is dead."""
_FOLDERS = ("sessions", "claims", "turns", "owners", "lost")
_MARK = re.compile(r"[0-9a-f]{8}")
_NOBODY = "-"

__all__ = ["ClaimedEntry", "SessionLostError", "SessionMovingError", "SessionStore", "StoreError"]


class SessionMovingError(StreamingError):
    """Another server has a session's entry just now."""

    code = "session_moving"
    passes = True


class SessionLostError(StreamingError):
    """This server was taken for dead, and another one has gone on with the session."""

    code = "session_lost"


@dataclass(frozen=True)
class ClaimedEntry:
    """An entry that this server has claimed. Delete it once its session runs, or give it back.

    owner: the mark of the server that died with it, where this is the last finished turn; None where it was put down.
    """

    name: str
    data: bytes
    owner: str | None = None


class SessionStore:
    """The store at a URL of `fsspec`'s. mark: this server's own. key: entries are encrypted, and none is taken that is
    not. Raises `StoreError` where there is no such place.
    """

    def __init__(self, url: str, key: SessionKey | None) -> None:
        self.mark = secrets.token_hex(4)
        self._files = StoreFiles(url, key)
        self._files.make(_FOLDERS)
        self._seen: dict[str, tuple[tuple[str, ...], float]] = {}
        self._beats: dict[str, tuple[bytes, float]] = {}  # of other servers, and since when

    # Sessions that are put down

    async def put(self, name: str, data: AnyBytes) -> None:
        """Keep a session, in the place of an earlier entry of it. Raises `StoreError`, `SessionLostError`."""

        def put(wanted: Callable[[], bool]) -> None:
            self._files.write(f"sessions/{name}", data, name, wanted)
            # Looked for last: whoever writes it reads the entry after that.
            if self._files.exists(f"lost/{name}.{self.mark}"):
                self._files.remove(f"sessions/{name}")
                raise SessionLostError("this server was taken for dead, and another has the session")
            with suppress(FileNotFoundError):
                self._files.move(f"turns/{name}.{self.mark}", f"turns/{name}.{_NOBODY}")

        await self._write(put)

    async def take(self, name: str) -> ClaimedEntry | None:
        """Claim a session for this server and return it, None where there is none.

        Raises `StoreError`; `SessionMovingError` where another server has claimed it or lives and has it;
        `SnapshotError` for an entry that was not encrypted with this key.
        """
        return await self._files.call(lambda: self._take(name))

    async def give_back(self, name: str) -> None:
        """Let others have what this server has claimed. Raises `StoreError`."""
        await self._files.call(lambda: self._files.remove(f"claims/{name}"))

    async def delete(self, name: str, *, went_back: bool = False) -> None:
        """Delete an entry that runs here now, and the claim on it. Raises `StoreError`.

        went_back: it goes on from its last finished turn, which this server puts there anew itself.
        """

        def delete() -> None:
            self._adopt(name, went_back)
            self._files.remove(f"sessions/{name}")
            self._files.remove(f"claims/{name}")

        await self._files.call(delete)

    # Finished turns of sessions that run

    async def put_turn(self, name: str, data: AnyBytes) -> None:
        """Keep the last finished turn of a session that runs here. Raises `StoreError`, `SessionLostError`."""

        def put(wanted: Callable[[], bool]) -> None:
            if self._files.exists(f"lost/{name}.{self.mark}"):
                raise SessionLostError("this server was taken for dead, and another has the session")
            self._files.write(f"turns/{name}.{self.mark}", data, name, wanted)

        await self._write(put)

    async def forget_turn(self, name: str) -> None:
        """Delete the last finished turn of a session that is over. Raises `StoreError`."""
        await self._files.call(lambda: self._files.remove(f"turns/{name}.{self.mark}"))

    # Servers

    async def beat(self) -> None:
        """Say that this server lives. Raises `StoreError`."""
        beat = secrets.token_bytes(8)
        await self._files.call(lambda: self._files.put_plain(f"owners/{self.mark}", beat), urgent=True)

    async def leave(self) -> None:
        """Say that this server ends. Raises `StoreError`."""
        await self._files.call(lambda: self._files.remove(f"owners/{self.mark}"))

    async def lives(self, mark: str) -> bool:
        """Return whether there is a server with this mark, as far as this one knows. Raises `StoreError`."""
        return await self._files.call(lambda: self._lives(mark))

    async def sweep(self, keep_s: float, now: float) -> None:
        """Delete what this server has seen unchanged for so long. Raises `StoreError`."""
        await self._files.call(lambda: self._sweep(keep_s, now))

    async def _write(self, put: Callable[[Callable[[], bool]], None]) -> None:
        """Do this, which is given whether it is still waited for."""
        waiting = True
        try:
            await self._files.call(lambda: put(lambda: waiting))
        finally:
            waiting = False

    # In a thread

    def _take(self, name: str) -> ClaimedEntry | None:
        owner = None
        if not self._files.exists(f"sessions/{name}"):
            owner = self._dead_owner(name)
            if owner is None:
                return None
        if not self._files.create(f"claims/{name}"):
            raise SessionMovingError("another server has this session just now; come again in a moment")
        try:
            if owner is None:
                return ClaimedEntry(name, self._files.read(f"sessions/{name}", name))
            self._files.create(f"lost/{name}.{owner}")
            if self._files.exists(f"sessions/{name}"):  # its server did put it down, at the last moment
                return ClaimedEntry(name, self._files.read(f"sessions/{name}", name))
            return ClaimedEntry(name, self._files.read(f"turns/{name}.{owner}", name), owner)
        except FileNotFoundError:
            self._files.remove(f"claims/{name}")
            return None
        except SnapshotError:
            self._files.remove(f"claims/{name}")
            raise

    def _dead_owner(self, name: str) -> str | None:
        """Return the mark of the server that died and left a finished turn, None where no turn was finished.

        Raises `SessionMovingError` where it lives.
        """
        left = None
        for mark in self._owners(name):
            if mark != self.mark and self._lives(mark):
                raise SessionMovingError("the server that has this session has not put it down; come again in a moment")
            if mark != self.mark and self._files.plain(f"turns/{name}.{mark}"):
                left = mark
        return left

    def _owners(self, name: str) -> list[str]:
        found = (file.removeprefix(f"{name}.") for file in self._files.list("turns") if file.startswith(f"{name}."))
        return [mark for mark in found if mark == _NOBODY or _MARK.fullmatch(mark)]

    def _lives(self, mark: str) -> bool:
        if not _MARK.fullmatch(mark):
            return False
        try:
            beat = self._files.plain(f"owners/{mark}")
        except FileNotFoundError:
            self._beats.pop(mark, None)
            return False
        now = time.monotonic()
        before, since = self._beats.get(mark, (beat, now))
        self._beats[mark] = (beat, since if before == beat else now)
        return before != beat or now - since < DEAD_S

    def _adopt(self, name: str, went_back: bool) -> None:
        """Make the last finished turn that another server left this one's own."""
        mine = f"{name}.{self.mark}"
        for mark in self._owners(name):
            if mark != self.mark and (went_back or self._files.exists(f"turns/{mine}")):
                self._files.remove(f"turns/{name}.{mark}")
            elif mark != self.mark:
                self._files.move(f"turns/{name}.{mark}", f"turns/{mine}")
        if not went_back and not self._files.exists(f"turns/{mine}"):
            self._files.put_plain(f"turns/{mine}", b"")
        self._files.remove(f"lost/{mine}")  # where this server was taken for dead, and has it again

    def _sweep(self, keep_s: float, now: float) -> None:
        seen: dict[str, tuple[tuple[str, ...], float]] = {}
        living: set[str] = set()
        for folder in ("owners", "sessions", "claims", "lost", "turns"):
            for name, mark in self._files.list(folder).items():
                path = f"{folder}/{name}"
                before = self._seen.get(path)
                seen[path] = before if before is not None and before[0] == mark else (mark, now)
                if folder == "turns" and name.rpartition(".")[2] in living:
                    seen[path] = mark, now
                if now - seen[path][1] >= keep_s:
                    self._files.remove(path)
                elif folder == "owners":
                    living.add(name)
        self._seen = seen
