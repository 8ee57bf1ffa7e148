"""The client's reconnecting: a connection to a session that outlives its sockets, where the server allows that.

What was said while there was no connection is kept, in order, and said when there is one again; what the server said
meanwhile it keeps and says. Nothing is lost or doubled; `docs/protocol.md`, "Coming back", specifies it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from websockets.exceptions import ConnectionClosed

from streaming.client.dialing import (
    CLOSE_TIMEOUT_S,
    RefusedError,
    ServerAddress,
    SessionLostError,
    Socket,
    closed_error,
    dial,
    open_session,
)
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import (
    Ack,
    AudioMessage,
    Interrupt,
    Message,
    Played,
    SavedPiece,
    ServerMessage,
    SessionRefused,
    SessionResume,
    SessionResumed,
    SessionStart,
    SessionStarted,
    Speak,
    UnknownTypeError,
    decode_audio,
    decode_opus,
    decode_piece,
    decode_server,
    encode,
    encode_audio,
    is_piece,
)
from streaming.protocol.opus import WHOLE_FRAMES, OpusReceiver, OpusSender
from streaming.protocol.replay import ReplayBook

_ATTEMPT_TIMEOUT_S = 5.0
SILENCE_S = 6.0
"""A server that can be come back to is heard of every 2 s at the least. A connection of which nothing has come for so
long has broken without a word."""
_LOOK_S = 0.5
_RETRY_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
"""The wait before each attempt to come back; the last one holds for all further attempts."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection broke without a word. What is sent now is kept, and the next `receive` tries to come back."""

    seconds: float
    """The time for which the server keeps the session."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """The session goes on, without a lost or doubled message.

    turn: where its server died: the session is what it was at the end of the turn before this one, which is open. What
    was said and heard since is lost; what was not heard of the turn before comes still.
    """

    after_ms: float
    turn: int | None = None


class ResumableConnection:
    """A session's connection, made by `open`. One task calls `receive` all the time, any task may `send`."""

    def __init__(self, address: ServerAddress, socket: Socket, start: SessionStart, started: SessionStarted) -> None:
        self.started = started
        self.sent_bytes = self.received_bytes = 0
        """The bytes of all messages so far, without what sockets add."""
        self._manual = start.turn_taking == "manual"
        self._opus = (OpusSender(WHOLE_FRAMES), OpusReceiver()) if started.codec == "opus" else None
        self._address, self._socket = address, socket
        self._book = None if started.resume is None else ReplayBook()
        self._acknowledged = asyncio.Event()
        self._position = 0  # samples sent so far
        self._lives = 0  # how often the session went back to the end of a turn
        self._played: str | None = None  # the latest report, which is not counted
        self._in_order = asyncio.Lock()  # messages are sent in the order in which they are encoded
        self._connected = True
        self._lost_at: float | None = None
        self._ack: Ack | None = None
        self._ack_due = asyncio.Event()
        self._acking = asyncio.create_task(self._send_acks())
        self._looking = None if self._book is None else asyncio.create_task(self._look())

    @classmethod
    async def open(cls, url: str, start: SessionStart, token: str | None, timeout_s: float, saved: bytes = b"") -> Self:
        """Open a session. Raises `RefusedError` where the server takes none, `ContinuationError` for all else amiss."""
        address = ServerAddress.parse(url, token)
        socket = await dial(address, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return cls(address, socket, start, await open_session(socket, start, saved))
        except TimeoutError:
            await socket.close()
            raise ContinuationError(f"{url} did not open a session in {timeout_s:g} s") from None
        except BaseException:
            await socket.close()
            raise

    async def send(self, message: Message | AudioMessage) -> None:
        """Send a message: return once the socket has taken it or, where there is none now, once it is kept for later.

        Raises `ConnectionClosed` where there will be none.
        """
        if not isinstance(message, AudioMessage) and not message.counted:
            if isinstance(message, Played):
                self._played = encode(message)
            await self._say(encode(message))
            return
        said_in = self._lives
        async with self._in_order:
            if said_in != self._lives:
                return  # the message is lost, as the session's later part is
            if isinstance(message, AudioMessage):
                self._position = message.position_samples + len(message.pcm)
            for data in self._encoded(message):
                if not await self._room(said_in):
                    return
                if self._book is not None:
                    self._book.send(data)
                await self._say(data)

    async def _room(self, said_in: int) -> bool:
        """Wait until the server has acknowledged enough for one more message. Return whether it has not died since."""
        while said_in == self._lives and self._book is not None and not self._book.has_room():
            self._acknowledged.clear()
            await self._acknowledged.wait()
        return said_in == self._lives

    def _encoded(self, message: Message | AudioMessage) -> list[str | bytes]:
        if isinstance(message, AudioMessage):
            return list(map(encode_audio, [message] if self._opus is None else self._opus[0].push(message)))
        said: list[str | bytes] = []
        if self._opus is not None and self._manual and isinstance(message, Speak | Interrupt):
            said += map(encode_audio, self._opus[0].flush())  # what was said belongs to the turn that ends here
        return [*said, encode(message)]

    async def _say(self, data: str | bytes) -> None:
        if not self._connected:
            return
        self.sent_bytes += len(data)
        try:
            await self._socket.send(data)
        except ConnectionClosed:
            if not self._may_return():
                raise

    async def receive(self) -> ServerMessage | AudioMessage | SavedPiece | ConnectionLost | ConnectionRestored:
        """Return the next message, in order. Raises `ContinuationError` at the end, `ProtocolError`."""
        if self._lost_at is not None:
            return await self._return(self._lost_at)
        while True:
            try:
                data = await self._socket.recv()
            except ConnectionClosed as closed:
                self._connected = False
                if not self._may_return():
                    self.give_up()
                    raise closed_error(closed) from None
                assert self.started.resume is not None
                self._lost_at = time.monotonic()
                return ConnectionLost(self.started.resume.seconds)
            message = self._take(data)
            if message is not None:
                return message

    def _take(self, data: str | bytes) -> ServerMessage | AudioMessage | SavedPiece | None:
        message: ServerMessage | AudioMessage | SavedPiece | None
        self.received_bytes += len(data)
        try:
            message = self._heard(data) if isinstance(data, bytes) else decode_server(data)
        except UnknownTypeError:
            message = None  # a newer server may say more than this client knows
        if self._book is not None:
            if isinstance(message, Ack):
                self._book.acknowledge(message.received)
                self._acknowledged.set()
            elif message is None or message.counted:
                self._answer(self._book.receive())
        return None if isinstance(message, Ack) else message

    def _heard(self, data: bytes) -> AudioMessage | SavedPiece:
        if is_piece(data):
            return decode_piece(data)
        return decode_audio(data) if self._opus is None else self._opus[1].push(decode_opus(data))

    def give_up(self) -> None:
        """Note that the session is over, so that nobody waits to send."""
        self._connected = False
        self._acking.cancel()
        if self._looking is not None:
            self._looking.cancel()
        if self._book is not None:
            self._book.forget()
            self._acknowledged.set()

    async def close(self, goodbye: Message | None) -> None:
        """Say goodbye, wait for the answer a moment, and close the socket."""
        self._acking.cancel()
        if self._looking is not None:
            self._looking.cancel()
        if goodbye is not None and self._connected:
            with suppress(ConnectionClosed, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._socket.send(encode(goodbye))
                    while True:
                        await self._socket.recv()
        await self._socket.close()
        await asyncio.gather(self._acking, return_exceptions=True)

    # Answers, from a task of their own: whoever reads must never wait for the other side to read

    def _answer(self, ack: Ack | None) -> None:
        if ack is not None:
            self._ack = ack
            self._ack_due.set()

    async def _send_acks(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                await self._ack_due.wait()
                self._ack_due.clear()
                if self._ack is not None:
                    await self.send(self._ack)

    # Coming back

    async def _look(self) -> None:
        """Cut a connection that has fallen silent: `receive` notices."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            socket = self._socket
            if not socket.transport.is_reading():  # it is this side that does not listen
                socket.heard_at = loop.time()
            elif loop.time() - socket.heard_at >= SILENCE_S:
                socket.transport.abort()

    def _may_return(self) -> bool:
        """Return whether the server keeps the session: not if either side has closed it in form."""
        protocol = self._socket.protocol
        return self._book is not None and protocol.close_rcvd is None and protocol.close_sent is None

    async def _return(self, lost_at: float) -> ConnectionRestored:
        """Try to come back, again and again, for as long as the server keeps the session."""
        assert self.started.resume is not None
        assert self._book is not None
        deadline, attempt, reason = lost_at + self.started.resume.seconds, 0, "it does not answer"
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _RETRY_S[min(attempt, len(_RETRY_S) - 1)]))
            attempt += 1
            try:
                socket = await dial(self._address, min(max(left, 0.1), _ATTEMPT_TIMEOUT_S))
                resumed = await self._resume(socket)
            except RefusedError as refused:
                if not refused.retry_after_ms:
                    raise SessionLostError(f"the connection broke, and could not be restored: {refused}") from None
                reason = str(refused)
            except ConnectionClosed as closed:
                reason = str(closed_error(closed))
            except (TimeoutError, ContinuationError) as error:
                reason = str(error) or reason
            else:
                if resumed.turn is None:
                    self._book.acknowledge(resumed.received)
                else:
                    self._begin_anew()
                self._acknowledged.set()
                self._socket, self._lost_at = socket, None
                self._resending = asyncio.create_task(self._resend(socket, self._book, resumed.received))
                return ConnectionRestored(1000 * (time.monotonic() - lost_at), resumed.turn)
        seconds = self.started.resume.seconds
        raise SessionLostError(f"the connection broke, and could not be restored within {seconds:g} s: {reason}")

    def _begin_anew(self) -> None:
        """Forget what was said: the session went back to a time before that. Receiving goes on."""
        self._lives += 1
        self._book, self._played, self._ack = ReplayBook(), None, None
        if self._opus is not None:
            self._opus = OpusSender(WHOLE_FRAMES), self._opus[1]

    async def _resume(self, socket: Socket) -> SessionResumed:
        """Return the server's answer."""
        assert self.started.resume is not None
        assert self._book is not None
        token, received = self.started.resume.token, self._book.received
        try:
            async with asyncio.timeout(_ATTEMPT_TIMEOUT_S):
                await socket.send(encode(SessionResume(token=token, received=received, position=self._position)))
                data = await socket.recv()
            answer = decode_server(data) if isinstance(data, str) else None
            match answer:
                case SessionResumed():
                    return answer
                case SessionRefused():
                    raise RefusedError(answer)
            raise ProtocolError("the server answered session.resume with something else than session.resumed")
        except BaseException:
            socket.transport.abort()
            raise

    async def _resend(self, socket: Socket, book: ReplayBook, received: int) -> None:
        """Send what the server has not had, and what is said meanwhile; then whoever sends sends directly again."""
        played: str | None = None
        try:
            while True:
                if (data := book.after(received)) is not None:
                    await socket.send(data)
                    received += 1
                elif self._played != played:
                    played = self._played
                    assert played is not None
                    await socket.send(played)
                else:
                    break  # nothing was awaited since: whatever is said from here on is sent directly
        except ConnectionClosed:
            return  # `receive` notices it, too
        self._connected = True
