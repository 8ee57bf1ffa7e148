"""The native protocol's words (`docs/protocol.md`), and what is kept of them for a client that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from msgspec import structs

from streaming.audio import Pcm16
from streaming.conversation.conversation import Received
from streaming.conversation.outbox import Echo, Saved
from streaming.errors import ProtocolError
from streaming.protocol import messages
from streaming.protocol.libopus import LibopusError
from streaming.protocol.messages import Ack, AudioMessage, Codec, Message, SessionStarted, TurnDone
from streaming.protocol.opus import OpusReceiver, OpusSender, heard
from streaming.protocol.replay import ReplayBook
from streaming.server.opus_threads import OpusThreads, Work
from streaming.server.saved_sessions import SavedSessions
from streaming.server.session_socket import Said
from streaming.server.turn_backup import TurnBackup


class NativeDialect:
    """The conversation's own words.

    book: of a session that can be resumed, None for others. saved: who makes a file of a session. heard: the
    latest packets of Opus of a client that another server had. backup: is told of the end of turns. answer: sends a
    message of the connection's own. threads: for Opus.

    What Opus remembers of the stream outlives a socket, as the messages that are kept do: encoded once, sent again as
    they are.
    """

    def __init__(
        self,
        answer: Callable[[Message], None],
        book: ReplayBook | None,
        codec: Codec = "pcm16",
        saved: SavedSessions | None = None,
        *,
        heard: Sequence[bytes] = (),
        backup: TurnBackup | None = None,
        threads: OpusThreads | None = None,
    ) -> None:
        self._answer, self._book, self._codec, self._saved, self._backup = answer, book, codec, saved, backup
        self._opus = (OpusSender(), OpusReceiver(heard)) if codec == "opus" else None
        self._threads = threads

    def decode(self, data: str | bytes) -> Sequence[Received | Work[Received]]:
        received: Received | Work[Received]
        try:
            received = self._decode_audio(data) if isinstance(data, bytes) else messages.decode_client(data)
            if self._book is None:
                return [received]
            if isinstance(received, Ack):
                self._book.acknowledge(received.received)
                return []
        except ProtocolError as error:
            return [error.with_traceback(None)]  # a traceback would keep the message in memory
        if isinstance(received, Work) or received.counted:
            answer = self._book.receive()
            if answer is not None:
                self._answer(answer)
        return [received]

    def _decode_audio(self, data: bytes) -> AudioMessage | Work[Received]:
        if self._codec == "float32":
            return messages.decode_float(data)
        if self._opus is None:
            return messages.decode_audio(data)
        message = messages.decode_opus(data)

        def said(decoded: Sequence[Pcm16 | LibopusError]) -> Received:
            try:
                return heard(message, decoded)
            except ProtocolError as error:
                return error.with_traceback(None)

        assert self._threads is not None
        return self._threads.decoder.start(self._opus[1].packets_of(message), said)

    def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Said | Awaitable[Said]:
        assert not isinstance(reply, Echo)
        if isinstance(reply, Saved):
            assert self._saved is not None
            return self._saved.messages(reply.snapshot, reply.turn)
        if self._opus is not None and isinstance(reply, AudioMessage | TurnDone):
            return self._encode_opus(self._opus[0], reply)
        said: Said
        if isinstance(reply, AudioMessage):
            said = [messages.encode_audio(reply)]
        elif isinstance(reply, SessionStarted):
            said = [messages.encode(structs.replace(reply, codec=self._codec))]
        else:
            said = [messages.encode(reply)]
        self._keep(reply, said)
        return said

    def _encode_opus(self, sender: OpusSender, reply: AudioMessage | TurnDone) -> Said | Work[Said]:
        """Have a thread call libopus: it takes longer than all else that the loop does for a frame, and needs no lock.

        A socket that is lost meanwhile does not lose what is being encoded: it is kept for the client's return.
        """

        def said(packets: Sequence[bytes | LibopusError]) -> Said:
            found: list[str | bytes] = [messages.encode_audio(message) for message in sender.sent(packets)]
            if isinstance(reply, TurnDone):
                found.append(messages.encode(reply))
            self._keep(reply, found)
            return found

        blocks = sender.cut(reply) if isinstance(reply, AudioMessage) else sender.cut_rest()
        if not blocks:
            return said([])
        assert self._threads is not None
        return self._threads.encoders.start(blocks, said)

    @property
    def heard(self) -> tuple[bytes, ...]:
        """The latest packets of Opus that came, without which another decoder does not go on as this one does."""
        return () if self._opus is None else self._opus[1].latest

    async def end_stream(self) -> Sequence[str | bytes]:
        """Return what is left of the stream of Opus that is being sent, which is over: another encoder goes on."""
        if self._opus is None:
            return []
        said: list[str | bytes] = [
            messages.encode_audio(message) for message in await asyncio.to_thread(self._opus[0].flush)
        ]
        if self._book is not None:
            for data in said:
                self._book.send(data)
        return said

    def _keep(self, reply: Message | AudioMessage, said: Said) -> None:
        """Keep what is said for a client that comes back."""
        if self._book is not None and reply.counted:
            for data in said:
                self._book.send(data)
            if self._backup is not None and isinstance(reply, TurnDone):
                self._backup.said(reply.turn, self._book.state())

    @property
    def ready(self) -> bool:
        most = 1 if self._opus is None else 2  # the rest of a stream, and what ends it
        return self._book is None or self._book.has_room(most)
