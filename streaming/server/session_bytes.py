"""A session of the native protocol as bytes: what its engine, its conversation and its connection know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from streaming.conversation.books import ConversationBooks
from streaming.engine.engine import Engine
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import ProtocolError, SnapshotError
from streaming.files import AnyBytes
from streaming.models.voice_activity import MAX_STREAM_BYTES
from streaming.protocol.messages import MAX_OPUS_PACKET_BYTES, MAX_OPUS_SAMPLES, Codec, NonNegative
from streaming.protocol.opus import packet_samples
from streaming.protocol.replay import BookState, ReplayBook

_HEADER = "talk"
_MAX_KEPT = 1024
_Packet = Annotated[bytes, msgspec.Meta(max_length=MAX_OPUS_PACKET_BYTES)]


class SessionHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the snapshot's header says beside the engine's own.

    session: its id. holder: the digest of the access token that opened it. speech: what voice activity remembers.
    received, answered, acknowledged: the counts of messages; kept: those that were sent and not acknowledged, and
    whether they are text. heard: the latest packets of Opus.
    """

    version: Literal[1] = 1
    session: Annotated[str, msgspec.Meta(max_length=64)]
    holder: Annotated[bytes, msgspec.Meta(max_length=64)] | None
    codec: Codec
    books: ConversationBooks
    speech: Annotated[bytes, msgspec.Meta(max_length=MAX_STREAM_BYTES)] | None
    received: NonNegative
    answered: NonNegative
    acknowledged: NonNegative
    kept: Annotated[list[tuple[bool, bytes]], msgspec.Meta(max_length=_MAX_KEPT)]
    heard: Annotated[list[_Packet], msgspec.Meta(max_length=48)]

    def book(self) -> ReplayBook:
        """Return the connection's own book."""
        kept = [data.decode() if text else data for text, data in self.kept]
        return ReplayBook(self.received, self.answered, self.acknowledged, kept)


@dataclass(frozen=True)
class SessionState:
    """A session as it was at one moment, without its connection."""

    session: str
    snapshot: SessionSnapshot
    books: ConversationBooks
    speech: bytes | None


def pack(
    engine: Engine,
    state: SessionState,
    book: BookState,
    codec: Codec,
    holder: bytes | None,
    heard: Sequence[bytes] = (),
) -> memoryview:
    """Return a session as bytes. It takes as long as some megabytes take."""
    header = SessionHeader(
        session=state.session,
        holder=holder,
        codec=codec,
        books=state.books,
        speech=state.speech,
        received=book.received,
        answered=book.answered,
        acknowledged=book.acknowledged,
        kept=[(isinstance(data, str), data.encode() if isinstance(data, str) else data) for data in book.kept],
        heard=list(heard),
    )
    return engine.pack(state.snapshot, {_HEADER: msgspec.json.encode(header).decode()})


def unpack(engine: Engine, data: AnyBytes) -> tuple[SessionState, SessionHeader]:
    """Return what `pack` was given. Raises `SnapshotError`."""
    snapshot, said = engine.unpack(data)
    try:
        header = msgspec.json.decode(said.get(_HEADER, ""), type=SessionHeader)
        header.book()
        if sum(map(packet_samples, header.heard)) > MAX_OPUS_SAMPLES:
            raise SnapshotError("the stored session is damaged: it has too much of Opus")
    except (msgspec.DecodeError, ProtocolError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"this is no stored session: {error}") from None
    header.books.check(snapshot.books.turn, snapshot.books.speaking)
    if not header.answered <= header.received:
        raise SnapshotError("the stored session is damaged: its counts contradict each other")
    return SessionState(header.session, snapshot, header.books, header.speech), header
