"""Dialing: from a server's URL to an open session, or to why there is none."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response

from streaming.addresses import names_this_machine
from streaming.audio import FRAME, SAMPLE_RATE
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import (
    MAX_MESSAGE_BYTES,
    PATH,
    Error,
    Message,
    SessionQueued,
    SessionRefused,
    SessionStart,
    SessionStarted,
    decode_server,
    encode,
    encode_piece,
    pieces,
)

CLOSE_TIMEOUT_S = 2.0
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+", re.ASCII)  # RFC 6750, section 2.1
_REFUSAL = re.compile(r"([a-z_]{1,40}): ([ -~]{1,300})\n?", re.ASCII)
_MAX_REFUSAL_BYTES = 1_000
_LOOKS = f"it looks like ws://HOST:PORT{PATH}, http://HOST:PORT or HOST:PORT"
_ERRNO = re.compile(r"\[Errno (\d+)\]")
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
class ServerAddress:
    """A server's address, and the token that it wants to see."""

    url: str
    host: str
    token: str | None

    @classmethod
    def parse(cls, url: str, token: str | None) -> Self:
        """Return the address: of a WebSocket, of the server's page (`http://`, `https://`), or `HOST:PORT` alone. Where
        the URL has no path, the protocol's is taken. Raises `ContinuationError`.
        """
        try:
            parts = urlsplit(url if "://" in url else f"ws://{url}")
            parts = parts._replace(scheme={"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme))
            host = parts.hostname
            _ = parts.port  # raises `ValueError` if it is no port
        except ValueError as error:
            raise ContinuationError(f"{url}: not a server's address ({error}); {_LOOKS}") from None
        if parts.scheme not in ("ws", "wss") or not host:
            raise ContinuationError(f"{url}: not a server's address; {_LOOKS}")
        if token is not None and not _TOKEN.fullmatch(token):
            raise ContinuationError("the token holds a character that no token may have, perhaps a space or a line end")
        return cls(urlunsplit(parts._replace(path=PATH) if parts.path in ("", "/") else parts), host, token)


def leads_to_this_machine(url: str) -> bool:
    """Return whether `url` leads to this machine. Raises `ContinuationError` where it leads nowhere."""
    return names_this_machine(ServerAddress.parse(url, None).host)


class Socket(ClientConnection):
    """A WebSocket that knows when it last heard of its server, in the time of its event loop."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.heard_at = self.loop.time()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)


async def dial(address: ServerAddress, timeout_s: float) -> Socket:
    """Return a socket whose handshake is done. Raises `RefusedError`, `ContinuationError`."""
    url = address.url
    try:
        async with asyncio.timeout(timeout_s):
            socket = await _Connect(
                url,
                create_connection=Socket,
                additional_headers=None if address.token is None else {"Authorization": f"Bearer {address.token}"},
                compression=None,
                max_size=MAX_MESSAGE_BYTES,
                open_timeout=None,
                close_timeout=CLOSE_TIMEOUT_S,
                proxy=None if names_this_machine(address.host) else True,
            )
            assert isinstance(socket, Socket)
            return socket
    except TimeoutError:
        raise ContinuationError(f"{url} did not answer in {timeout_s:g} s") from None
    except InvalidStatus as error:
        raise _refused(error.response, url, address.token) from None
    except ssl.SSLError as error:
        reason = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason
        raise ContinuationError(f"no trusted TLS connection to {url}: {reason}") from None
    except (InvalidURI, ValueError) as error:
        raise ContinuationError(f"{url}: not a server's address ({error}); {_LOOKS}") from None
    except OSError as error:
        question = "is the server running, and with TLS?" if url.startswith("wss:") else "is the server running?"
        raise ContinuationError(f"nothing answers at {url} ({_reason(error)}); {question}") from None
    except WebSocketException as error:
        raise ContinuationError(f"{url} does not speak WebSocket ({error})") from None


class _Connect(connect_socket):
    """A connection that follows no redirects: a token is for one server alone."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _reason(error: OSError) -> str:
    """Return what the system says of an error. asyncio has words of its own, which name a call and a tuple; where a
    name has several addresses, one behind the other.
    """
    several = _ERRNO.search(str(error))
    number = error.errno or (int(several[1]) if several else 0)
    return os.strerror(number) if number in errno.errorcode else error.strerror or str(error) or "connection lost"


def _refused(response: Response, url: str, token: str | None) -> ContinuationError:
    """Return what an HTTP answer instead of a WebSocket means: one line, with the server's own if it sent one."""
    status = response.status_code
    if status not in (401, 403, 429):
        return ContinuationError(f"{url} answered HTTP {status}; is it a continuation server, and its path {PATH}?")
    said = _REFUSAL.fullmatch((response.body or b"")[:_MAX_REFUSAL_BYTES].decode("ascii", errors="replace"))
    code, message = (said[1], said[2]) if said else ("http", f"{url} answered HTTP {status}")
    if status == 401 and token is None:
        message = "it asks for a token; put yours into the environment variable STREAMING_TOKEN"
    elif status == 401:
        message = "the token is not valid there, or no longer"
    wait = response.headers.get_all("Retry-After")[:1]
    retry_s = int(wait[0]) if wait and _DIGITS.fullmatch(wait[0]) else 0
    return RefusedError(SessionRefused(code=code, message=message, retry_after_ms=1000 * retry_s))


async def open_session(socket: ClientConnection, start: SessionStart, saved: bytes = b"") -> SessionStarted:
    """Return the server's answer to `start`, after a wait in line where there is one. saved: the session to go on with.

    Raises `RefusedError`, `ContinuationError`, `ProtocolError`.
    """
    try:
        await socket.send(encode(start))
        with suppress(ConnectionClosed):  # the server says why it takes no saved session
            for piece in pieces(saved):
                await socket.send(encode_piece(piece))
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


def closed_error(closed: ConnectionClosed) -> ContinuationError:
    """Return what it means that a socket was closed: by the server, with a reason, or by nobody in form."""
    frame = closed.rcvd
    if frame is None:
        return SessionLostError("the connection to the server broke")
    reason = f": {frame.reason}" if frame.reason else ""
    return ContinuationError(f"the server closed the connection ({frame.code}){reason}")
