"""A client's connection to its session, which outlives its sockets where the server allows that.

What was said while there was no connection is kept, in order, and said when there is one again; what the server said
meanwhile it keeps and says. Nothing is lost or doubled; `docs/protocol.md`, "Coming back", specifies it.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import (
    MAX_MESSAGE_BYTES,
    PATH,
    Ack,
    AudioMessage,
    Error,
    Interrupt,
    Message,
    Played,
    ServerMessage,
    SessionQueued,
    SessionRefused,
    SessionResume,
    SessionResumed,
    SessionStart,
    SessionStarted,
    Speak,
    UnknownTypeError,
    decode_audio,
    decode_opus,
    decode_server,
    encode,
    encode_audio,
)
from streaming.protocol.opus import WHOLE_FRAMES, OpusReceiver, OpusSender
from streaming.protocol.replay import ReplayBook

CLOSE_TIMEOUT_S = 2.0
_ATTEMPT_TIMEOUT_S = 5.0
_RETRY_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Before each attempt to come back; the last one again and again."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+", re.ASCII)  # RFC 6750, section 2.1
_REFUSAL = re.compile(r"([a-z_]{1,40}): ([ -~]{1,300})\n?", re.ASCII)
_MAX_REFUSAL_BYTES = 1_000
_DIGITS = re.compile(r"[0-9]{1,6}", re.ASCII)


class RefusedError(ContinuationError):
    """The server took no session: it is full, or does not let you in. Try again after `retry_after_ms`, if not 0."""

    def __init__(self, refusal: SessionRefused) -> None:
        wait = f"; try again in {refusal.retry_after_ms / 1000:.1f} s" if refusal.retry_after_ms > 0 else ""
        super().__init__(f"the server refused the session ({refusal.code}): {refusal.message}{wait}")
        self.refusal = refusal.code
        self.retry_after_ms = refusal.retry_after_ms


class SessionLostError(ContinuationError):
    """The connection broke and the session with it, through no fault of either side: a new one may be begun."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection broke without a word. What is sent now is kept, and the next `receive` tries to come back."""

    seconds: float
    """For how long the server keeps the session."""


@dataclass(frozen=True, slots=True)
class ConnectionRestored:
    """The session goes on, without a lost or doubled message."""

    after_ms: float


@dataclass(frozen=True, slots=True)
class _Address:
    """Where the server is, and what it wants to see."""

    url: str
    host: str | None
    token: str | None


class Line:
    """Made by `open`; one task calls `receive` all the time, any may `send`."""

    def __init__(
        self, address: _Address, socket: ClientConnection, start: SessionStart, started: SessionStarted
    ) -> None:
        self.started = started
        self.sent_bytes = self.received_bytes = 0
        """Of all messages so far, without what sockets add."""
        self._manual = start.turn_taking == "manual"
        self._opus = (OpusSender(WHOLE_FRAMES), OpusReceiver()) if started.codec == "opus" else None
        self._address, self._socket = address, socket
        self._book = None if started.resume is None else ReplayBook()
        self._acknowledged = asyncio.Event()
        self._position = 0  # samples sent so far
        self._played: str | None = None  # the latest report, which is not counted
        self._in_order = asyncio.Lock()  # what is encoded first is sent first
        self._connected = True
        self._lost_at: float | None = None
        self._ack: Ack | None = None
        self._ack_due = asyncio.Event()
        self._acking = asyncio.create_task(self._send_acks())

    @classmethod
    async def open(cls, url: str, start: SessionStart, token: str | None, timeout_s: float) -> Self:
        """Raises `RefusedError` where the server takes no session, `ContinuationError` for everything else amiss."""
        address = _complete(url, token)
        socket = await _dial(address, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return cls(address, socket, start, await _open_session(socket, start))
        except TimeoutError:
            await socket.close()
            raise ContinuationError(f"{url} did not open a session in {timeout_s:g} s") from None
        except BaseException:
            await socket.close()
            raise

    async def send(self, message: Message | AudioMessage) -> None:
        """Returns when the socket has taken it or, where there is none just now, when it is kept for later.

        Raises `ConnectionClosed` where there will be none.
        """
        if not isinstance(message, AudioMessage) and not message.counted:
            if isinstance(message, Played):
                self._played = encode(message)
            await self._say(encode(message))
            return
        async with self._in_order:
            if isinstance(message, AudioMessage):
                self._position = message.position_samples + len(message.pcm)
            for data in self._encoded(message):
                if self._book is not None:
                    await self._room(self._book)
                    self._book.send(data)
                await self._say(data)

    async def _room(self, book: ReplayBook) -> None:
        """Wait until the server has acknowledged enough for one more message."""
        while not book.has_room():
            self._acknowledged.clear()
            await self._acknowledged.wait()

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

    async def receive(self) -> ServerMessage | AudioMessage | ConnectionLost | ConnectionRestored:
        """The next message, in order. Raises `ContinuationError` at the end, `ProtocolError`."""
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

    def _take(self, data: str | bytes) -> ServerMessage | AudioMessage | None:
        message: ServerMessage | AudioMessage | None
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

    def _heard(self, data: bytes) -> AudioMessage:
        return decode_audio(data) if self._opus is None else self._opus[1].push(decode_opus(data))

    def give_up(self) -> None:
        """The session is over: nobody need wait to send."""
        self._connected = False
        self._acking.cancel()
        if self._book is not None:
            self._book.forget()
            self._acknowledged.set()

    async def close(self, goodbye: Message | None) -> None:
        """Says goodbye, waits for the answer a moment, closes the socket."""
        self._acking.cancel()
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
                assert self._ack is not None
                await self.send(self._ack)

    # Coming back

    def _may_return(self) -> bool:
        """Whether the server keeps the session: not if either side has closed it in form."""
        protocol = self._socket.protocol
        return self._book is not None and protocol.close_rcvd is None and protocol.close_sent is None

    async def _return(self, lost_at: float) -> ConnectionRestored:
        """Tries again and again for as long as the server keeps the session."""
        assert self.started.resume is not None
        assert self._book is not None
        deadline, attempt, reason = lost_at + self.started.resume.seconds, 0, "it does not answer"
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _RETRY_S[min(attempt, len(_RETRY_S) - 1)]))
            attempt += 1
            try:
                socket = await _dial(self._address, min(max(left, 0.1), _ATTEMPT_TIMEOUT_S))
                received = await self._resume(socket)
            except RefusedError as refused:
                if not refused.retry_after_ms:
                    raise SessionLostError(f"the connection broke, and could not be restored: {refused}") from None
                reason = str(refused)
            except ConnectionClosed as closed:
                reason = str(closed_error(closed))
            except (TimeoutError, ContinuationError) as error:
                reason = str(error) or reason
            else:
                self._book.acknowledge(received)
                self._acknowledged.set()
                self._socket, self._lost_at = socket, None
                self._resending = asyncio.create_task(self._resend(socket, received))
                return ConnectionRestored(1000 * (time.monotonic() - lost_at))
        seconds = self.started.resume.seconds
        raise SessionLostError(f"the connection broke, and could not be restored within {seconds:g} s: {reason}")

    async def _resume(self, socket: ClientConnection) -> int:
        """Returns how many of this side's messages have arrived."""
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
                    return answer.received
                case SessionRefused():
                    raise RefusedError(answer)
            raise ProtocolError("the server answered session.resume with something else than session.resumed")
        except BaseException:
            socket.transport.abort()
            raise

    async def _resend(self, socket: ClientConnection, received: int) -> None:
        """Sends what the server has not had, and what is said meanwhile; then whoever sends sends directly again."""
        assert self._book is not None
        played: str | None = None
        try:
            while True:
                if (data := self._book.after(received)) is not None:
                    await socket.send(data)
                    received += 1
                elif self._played != played:
                    played = self._played
                    assert played is not None
                    await socket.send(played)
                else:
                    break  # with nothing awaited since: whatever is said from here on is sent directly
        except ConnectionClosed:
            return  # `receive` notices too
        self._connected = True


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine. Raises `ContinuationError` where it leads nowhere."""
    return _complete(url, None).host in _LOOPBACK


async def _dial(address: _Address, timeout_s: float) -> ClientConnection:
    """A socket whose handshake is done. Raises `RefusedError`, `ContinuationError`."""
    url = address.url
    try:
        async with asyncio.timeout(timeout_s):
            return await _Connect(
                url,
                additional_headers=None if address.token is None else {"Authorization": f"Bearer {address.token}"},
                compression=None,
                max_size=MAX_MESSAGE_BYTES,
                open_timeout=None,
                close_timeout=CLOSE_TIMEOUT_S,
                proxy=None if address.host in _LOOPBACK else True,
            )
    except TimeoutError:
        raise ContinuationError(f"{url} did not answer in {timeout_s:g} s") from None
    except InvalidStatus as error:
        raise _not_let_in(error.response, url, address.token) from None
    except ssl.SSLError as error:
        reason = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        raise ContinuationError(f"no trusted TLS connection to {url}: {reason}") from None
    except (InvalidURI, ValueError) as error:
        raise ContinuationError(f"{url}: not a WebSocket address ({error})") from None
    except OSError as error:
        reason, tls = error.strerror or str(error) or "connection lost", url.startswith("wss:")
        question = "is it running, and with TLS?" if tls else "is it running?"
        raise ContinuationError(f"nothing answers at {url} ({reason}); {question}") from None
    except WebSocketException as error:
        raise ContinuationError(f"{url} does not speak WebSocket ({error})") from None


class _Connect(connect_socket):
    """Follows no redirects: a token is for the server that it was given for."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _not_let_in(response: Response, url: str, token: str | None) -> ContinuationError:
    """What an HTTP answer instead of a WebSocket means: one line, with the server's own if that is what it sent."""
    status = response.status_code
    if status not in (401, 403, 429):
        return ContinuationError(f"{url} answered HTTP {status}; is it a continuation server, and its path {PATH}?")
    said = _REFUSAL.fullmatch((response.body or b"")[:_MAX_REFUSAL_BYTES].decode("ascii", errors="replace"))
    code, message = (said[1], said[2]) if said else ("http", f"{url} answered HTTP {status}")
    if status == 401 and token is None:
        message = "it asks for a token; client.py takes it from the environment variable STREAMING_TOKEN"
    elif status == 401:
        message = "the token is not valid there, or no longer"
    wait = response.headers.get_all("Retry-After")[:1]
    retry_s = int(wait[0]) if wait and _DIGITS.fullmatch(wait[0]) else 0
    return RefusedError(SessionRefused(code=code, message=message, retry_after_ms=1000 * retry_s))


async def _open_session(socket: ClientConnection, start: SessionStart) -> SessionStarted:
    try:
        await socket.send(encode(start))
        while True:
            data = await socket.recv()
            answer: Message | None = decode_server(data) if isinstance(data, str) else None
            if not isinstance(answer, SessionQueued):
                break
    except ConnectionClosed as closed:
        raise closed_error(closed) from None
    match answer:
        case SessionStarted(sample_rate=rate, frame_samples=frame) if (rate, frame) != (SAMPLE_RATE, FRAME):
            raise ContinuationError(
                f"the server works at {rate} Hz in frames of {frame} samples, this client at {SAMPLE_RATE} in {FRAME}"
            )
        case SessionStarted():
            return answer
        case SessionRefused():
            raise RefusedError(answer)
        case Error():
            raise ContinuationError(f"the server did not open a session ({answer.code}): {answer.message}")
    raise ProtocolError("the server answered session.start with something else than session.started")


def _complete(url: str, token: str | None) -> _Address:
    """With the protocol's path where the URL has none."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise ContinuationError(f"{url}: not a WebSocket address ({error})") from None
    if parts.scheme not in ("ws", "wss") or not host:
        raise ContinuationError(f"{url}: not a WebSocket address; it looks like ws://HOST:PORT{PATH}")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ContinuationError("the token holds characters that no token has, a space or a line end perhaps")
    return _Address(urlunsplit(parts._replace(path=PATH)) if parts.path in ("", "/") else url, host, token)


def closed_error(closed: ConnectionClosed) -> ContinuationError:
    frame = closed.rcvd
    if frame is None:
        return SessionLostError("the connection to the server broke")
    reason = f": {frame.reason}" if frame.reason else ""
    return ContinuationError(f"the server closed the connection ({frame.code}){reason}")
