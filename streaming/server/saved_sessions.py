"""Sessions as files that their holders keep: given out signed, and taken back only with this server's signature."""

from __future__ import annotations

import asyncio
from itertools import count

from websockets.asyncio.server import ServerConnection

from streaming.engine.engine import Engine
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import EngineFullError, ProtocolError, SavingUnavailableError, SnapshotError
from streaming.files import in_pieces
from streaming.protocol import messages
from streaming.protocol.messages import MAX_PIECE_BYTES, SavedPiece, SessionSaved
from streaming.server.door.session_key import SIGNATURE_BYTES, SessionKey

_AT_ONCE = 2
"""Most files that are taken in at a time. Each is held in memory until its signature can be checked."""
_TIMEOUT_S = 60.0


class SavedSessions:
    """Give sessions out as signed files, and take them back. key: None where the operator does not allow it."""

    def __init__(self, engine: Engine, key: SessionKey | None) -> None:
        self._engine, self._key = engine, key
        self._taking = 0

    @property
    def allowed(self) -> bool:
        return self._key is not None

    async def messages(self, snapshot: SessionSnapshot, turn: int) -> list[str | bytes]:
        """Return what a session's holder is sent: that it is saved, and all of it in pieces."""
        assert self._key is not None
        return await asyncio.to_thread(self._signed, self._key, snapshot, turn)

    def _signed(self, key: SessionKey, snapshot: SessionSnapshot, turn: int) -> list[str | bytes]:
        data = self._engine.pack(snapshot)
        key.sign(data)
        saved: list[str | bytes] = [messages.encode(SessionSaved(turn=turn, bytes=len(data)))]
        for offset, piece in zip(count(0, MAX_PIECE_BYTES), in_pieces(data, MAX_PIECE_BYTES)):
            saved.append(messages.encode_piece(SavedPiece(offset, bytes(piece))))
        return saved

    async def receive(self, socket: ServerConnection, size: int) -> SessionSnapshot:
        """Return the session that a client sends after its `session.start`.

        No more is read than a session of this model can have, and nothing of it is looked at before its signature is.
        Raises `SavingUnavailableError`, `EngineFullError`, `SnapshotError`, `ProtocolError`.
        """
        key = self._key
        if key is None:
            raise SavingUnavailableError("this server takes no saved sessions; it would have to run with --allow-save")
        most = self._engine.most_packed_bytes
        if not SIGNATURE_BYTES < size <= most:
            raise SnapshotError(f"a saved session of this model has {SIGNATURE_BYTES + 1} to {most} bytes, not {size}")
        if self._taking >= _AT_ONCE:
            raise EngineFullError("other saved sessions are being taken in; try again in a moment")
        self._taking += 1
        try:
            data = await _all_of(socket, size)
            return await asyncio.to_thread(self._opened, key, data)
        finally:
            self._taking -= 1

    def _opened(self, key: SessionKey, data: bytearray) -> SessionSnapshot:
        key.check(data)
        snapshot, _ = self._engine.unpack(data)
        if snapshot.books.speaking:
            raise SnapshotError("the saved session was speaking")  # and this server gives out none that is
        return snapshot


async def _all_of(socket: ServerConnection, size: int) -> bytearray:
    data = bytearray()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while len(data) < size:
                piece = await socket.recv()
                if isinstance(piece, str):
                    raise ProtocolError("a saved session follows session.start in binary messages")
                take_piece(data, messages.decode_piece(piece), size)
    except TimeoutError:
        raise ProtocolError(f"the saved session did not come within {_TIMEOUT_S:g} s") from None
    return data


def take_piece(data: bytearray, piece: SavedPiece, size: int) -> None:
    """Add a piece to what has come before it. Raises `ProtocolError` for one that is out of place."""
    if piece.offset != len(data) or len(data) + len(piece.data) > size:
        raise ProtocolError(f"a piece of a saved session at byte {piece.offset}, but {len(data)} of {size} came before")
    data += piece.data
