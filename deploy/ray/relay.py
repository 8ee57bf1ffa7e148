"""One `server.py` as an ASGI application: it runs, unchanged, as a child on a free loopback port, and requests and
sockets are passed on to it.

So every limit, protocol and way to end is the server's own. ASGI has no word for a connection that breaks: uvicorn
tells it by a `websocket.disconnect` without a `reason`, and breaks one itself for an application that returns without
a `websocket.close`. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

SERVER = Path(__file__).resolve().parents[2] / "server.py"
_LISTENING = re.compile(r"listening on ws://127\.0\.0\.1:([0-9]+)/")
_END_S = 10.0
"""The time that a server has which is told to end at once; then it is killed."""
_ANSWER_S = 10.0
"""The time for an answer to a plain request or a handshake."""
_CONNECTION = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers that are of one connection (RFC 9110, section 7.6.1), or that each hop writes for itself."""
HEALTHZ = "/-/healthz"
"""Ray Serve's own health check, which HAProxy asks."""
_STOPPING = b"stopping: this server is about to stop; try again\n"


class Relay:
    """options: `server.py`'s, with the keys of its file; where it listens is not among them.

    environment: what else the child's should hold, its tokens for instance.
    """

    here: ClassVar[Relay | None] = None
    """The relay of this process, once it listens: `Forecourt` is made by Ray Serve, and finds it here."""

    def __init__(self, options: Mapping[str, object], environment: Mapping[str, str] = os.environ) -> None:
        flags = {f"STREAMING_{key.upper().replace('-', '_')}": _text(value) for key, value in options.items()}
        self._environment = {**environment, **flags}
        self._child: subprocess.Popen[str] | None = None
        self._port = 0
        self.started = asyncio.Event()
        self.stopping = False
        self.address: tuple[str, int] | None = None
        """Where this replica listens, known once HAProxy has asked after its health."""

    async def start(self) -> None:
        """Start the server, and return when it listens. Raises `RuntimeError` if it ends instead; it says why on
        standard error.
        """
        # --until-eof: the server ends with this process, however that ends
        command = [sys.executable, str(SERVER), "--host", "127.0.0.1", "--port", "0", "--until-eof"]
        self._child = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._child.stdout is not None
        line = await asyncio.to_thread(self._child.stdout.readline)
        match = _LISTENING.match(line)
        if match is None:
            raise RuntimeError(f"server.py did not start (status {await self.wait()}); its log says why")
        self._port = int(match[1])
        Relay.here = self
        self.started.set()

    async def wait(self) -> int:
        """Wait until the server has ended. Return its status."""
        assert self._child is not None
        return await asyncio.to_thread(_wait, self._child)

    def drain(self) -> None:
        """Let running turns finish, as `server.py` does when it is terminated."""
        assert self._child is not None
        self.stopping = True
        self._child.send_signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End the server at once."""
        assert self._child is not None and self._child.stdin is not None
        self.stopping = True
        self._child.stdin.close()
        try:
            await asyncio.to_thread(self._child.wait, _END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        await self.wait()

    async def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        """Return status and text of what the server itself answers. Raises `OSError`, `http.client.HTTPException`."""
        headers = [("Host", "127.0.0.1")] + ([] if token is None else [("Authorization", f"Bearer {token}")])
        status, _, body = await asyncio.to_thread(_request, self._port, "GET", path, headers)
        return status, body.decode()

    async def health(self) -> dict[str, Any]:
        """Return what `/health` tells, whatever its status. Raises `OSError`, `http.client.HTTPException`."""
        report: dict[str, Any] = json.loads((await self.get("/health"))[1])
        return report

    async def ready(self) -> bool:
        """Return whether a session that came now would get in."""
        try:
            return (await self.get("/health/ready"))[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] == "websocket":
            await self._pass_on(scope, receive, send)
        else:
            await self._answer(scope, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except RuntimeError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, send: Send) -> None:
        """Answer a plain request. The server has nothing that takes a body."""
        status, headers, body = 405, [("Allow", "GET, HEAD"), ("Content-Length", "0")], b""
        if scope["method"] in ("GET", "HEAD"):
            try:
                status, headers, body = await asyncio.to_thread(
                    _request, self._port, scope["method"], _target(scope), _headers(scope, host=True)
                )
            except http.client.InvalidURL:
                status, headers = 400, [("Content-Length", "0")]
            except (OSError, http.client.HTTPException):
                status, headers, body = 503, _stopping_headers(), _STOPPING
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        try:
            socket = await self._dial(scope)
        except InvalidStatus as refused:
            response = refused.response
            await _refuse(send, response.status_code, response.headers.raw_items(), bytes(response.body or b""))
            return
        except (InvalidURI, ValueError):
            await _refuse(send, 400, (), b"bad_request: the Host header is malformed\n")
            return
        except (OSError, InvalidHandshake, TimeoutError):
            await _refuse(send, 503, _stopping_headers(), _STOPPING)
            return
        try:
            await send({"type": "websocket.accept", "subprotocol": socket.subprotocol})
            await self._relay(socket, receive, send)
        finally:
            socket.transport.abort()  # a connection that broke; after a closing handshake it is closed already

    async def _dial(self, scope: Scope) -> ClientConnection:
        # The host of the URL is what the client asked for, since the server compares it with the page's origin; where
        # to connect is said beside it.
        (host,) = (value.decode("latin-1") for name, value in scope["headers"] if name == b"host")  # or ValueError
        return await connect(
            f"ws://{host}{_target(scope)}",
            host="127.0.0.1",
            port=self._port,
            additional_headers=_headers(scope, host=False),
            subprotocols=[Subprotocol(name) for name in scope["subprotocols"]] or None,
            compression=None,
            user_agent_header=None,
            proxy=None,
            open_timeout=_ANSWER_S,
            ping_interval=None,  # the server sends pings, and cuts a client that is silent
            max_size=None,  # the server's messages are its own affair
            max_queue=2,
        )

    async def _relay(self, socket: ClientConnection, receive: Receive, send: Send) -> None:
        """Pass messages on until either side is gone. Each direction waits for its reader: a client that does not read
        is not read for by this process, nor is one listened to faster than the server does.
        """
        up, down = asyncio.create_task(_up(socket, receive)), asyncio.create_task(_down(socket, send))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if down.done():
                down.result()
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)


async def _up(socket: ClientConnection, receive: Receive) -> None:
    with suppress(ConnectionClosed):
        while True:
            message = await receive()
            if message["type"] == "websocket.receive":
                text = message.get("text")
                await socket.send(message["bytes"] if text is None else text)
            elif "reason" in message:  # a closing handshake
                code = message["code"]
                await socket.close(CloseCode.NORMAL_CLOSURE if code == CloseCode.NO_STATUS_RCVD else code)
                return
            else:  # the connection broke, and the session may be come back to: no close frame
                return
    await asyncio.Event().wait()  # the server has closed, and its last messages are on their way to the client


async def _down(socket: ClientConnection, send: Send) -> None:
    with suppress(OSError):  # the client is gone
        async for data in _messages(socket):
            await send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})
        closed = socket.protocol.close_rcvd
        if closed is not None:
            await send({"type": "websocket.close", "code": closed.code, "reason": closed.reason})


async def _messages(socket: ClientConnection) -> AsyncIterator[str | bytes]:
    with suppress(ConnectionClosed):
        while True:
            yield await socket.recv()


def middlewares() -> list[Middleware]:
    """Return what `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` asks for."""
    return [Middleware(Forecourt)]


class Forecourt:
    """Before Ray Serve's own part of a replica, which otherwise reads sockets ahead, into a queue without bound, and
    knows nothing of slots.

    HAProxy counts sockets, but forgets them whenever it is told of other replicas: a full one would then have none, and
    get every newcomer. So a full one tells its health check not to send any; what it has goes on.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            name = b"x-request-disconnect-disabled"
            scope["headers"] = [header for header in scope["headers"] if header[0] != name] + [(name, b"?1")]
        elif scope["type"] == "http" and scope["path"] == HEALTHZ and Relay.here is not None:
            # In a request by way of Serve's own proxy this would be the proxy's address.
            Relay.here.address = scope["server"]
            await self._look(Relay.here, scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _look(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        """Give Serve's own answer, unless that is good and there is no slot."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, receive, keep)
        if answer[0]["status"] == 200 and not await relay.ready():
            answer = [
                {"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]},
                {"type": "http.response.body", "body": b"FULL"},
            ]
        for message in answer:
            await send(message)


def _wait(child: subprocess.Popen[str]) -> int:
    status = child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    return status


async def _refuse(send: Send, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
    """Refuse a handshake, by ASGI's extension for it."""
    raw = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in headers
        if name.lower() not in _CONNECTION
    ]
    await send({"type": "websocket.http.response.start", "status": status, "headers": raw})
    await send({"type": "websocket.http.response.body", "body": body})


def _request(
    port: int, method: str, target: str, headers: Iterable[tuple[str, str]]
) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        own = ("connection", "date", "server")  # each hop writes these itself
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in own]
        return response.status, kept, response.read()
    finally:
        connection.close()


def _headers(scope: Scope, *, host: bool) -> list[tuple[str, str]]:
    """Return the headers that are passed on, doubled ones too, so that the server can refuse them."""
    return [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in scope["headers"]
        if (host and name == b"host")
        or (name.decode("latin-1") not in _CONNECTION and not name.startswith(b"sec-websocket-"))
    ]


def _target(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    path = scope["raw_path"].decode("latin-1") if scope.get("raw_path") else scope["path"]
    return f"{path}?{query}" if query else path


def _stopping_headers() -> list[tuple[str, str]]:
    return [("Content-Type", "text/plain"), ("Content-Length", str(len(_STOPPING))), ("Retry-After", "1")]


def _text(value: object) -> str:
    """Return a value as an environment variable of `server.py` has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
