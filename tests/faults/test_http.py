"""Odd requests to the port: the answer is well-formed HTTP or a close, and the server stays ready."""

from __future__ import annotations

import logging
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.faults.harness import Watched, beside_a_healthy_session, wait_for, watched
from tests.faults.raw_client import handshake

HANDSHAKE_S = 1.0
CONNECTIONS = 1000


@pytest.fixture(scope="module")
def shared() -> Iterator[Watched]:
    with watched(handshake_s=HANDSHAKE_S) as it:
        yield it


@pytest.fixture
def server(shared: Watched) -> Iterator[Watched]:
    """One for all; after each test it must be as it was."""
    yield shared
    shared.assert_clean()


def _ask(port: int, request: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection, suppress(ConnectionError):
        connection.sendall(request)
        while data := connection.recv(2**16):
            answer += data
    return answer


def _status(answer: bytes, method: bytes = b"GET") -> int | None:
    """The status of a well-formed answer, None for a close without one. Fails for anything else."""
    if not answer:
        return None
    head, blank, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    assert blank and re.fullmatch(rb"HTTP/1\.1 [2-5]\d\d [ -~]+", status), answer[:200]
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b": ")
        assert colon and re.fullmatch(rb"[A-Za-z-]+", name) and re.fullmatch(rb"[ -~]*", value), line
        assert name.lower() not in headers, f"{name!r} twice"
        headers[name.lower()] = value
    if method == b"HEAD":
        assert not body, "an answer to HEAD has no body (RFC 9110, section 9.3.2)"
    elif b"content-length" in headers:
        assert int(headers[b"content-length"]) == len(body)
    return int(status.split()[1])


def _get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((b"GET " + path + b" HTTP/1.1", b"Host: 127.0.0.1", *headers, b"", b""))


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (b"\r\n\r\n", {None, 400}),
        (b"\0" * 1000 + b"\r\n\r\n", {None, 400}),
        (bytes(range(256)) * 40, {None, 400, 414}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 8, {None, 400}),  # TLS on a plain port
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {None, 400, 505}),
        (b"GET /health HTTP/1.0\r\n\r\n", {None, 200, 400, 505}),
        (b"GET /health\r\n\r\n", {None, 400}),
        (b"GET  /health  HTTP/1.1\r\n\r\n", {None, 400}),
        (b"GET /health HTTP/1.1\n\n", {None, 200, 400}),
        (b"POST /health HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", {None, 400, 405}),
        (b"HEAD /health HTTP/1.1\r\n\r\n", {None, 200, 400, 405}),
        (b"GET /health HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", {None, 200, 400, 413}),
        (b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n", {None, 200, 400, 501}),
        (_get(b"/" + b"a" * 20_000), {None, 414}),
        (_get(b"/health", b"X: " + b"a" * 20_000), {None, 431}),
        (_get(b"/health", *[b"X-%d: y" % number for number in range(500)]), {None, 431}),
        (_get(b"/health", b"X : y"), {None, 400}),
        (_get(b"/health", b"X: a\x00b"), {None, 400}),
        (_get(b"/health", b" folded: yes"), {None, 400}),
        (_get(b"/../../../../etc/passwd"), {400, 404}),
        (_get(b"/..%2f..%2f..%2fetc%2fpasswd"), {400, 404}),
        (_get(b"/%2e%2e/%2e%2e/etc/passwd"), {400, 404}),
        (_get(b"/..\\..\\etc\\passwd"), {400, 404}),
        (_get(b"//etc/passwd"), {400, 404}),
        (_get(b"/%00"), {400, 404}),
        (_get(b"/%c0%ae%c0%ae/"), {400, 404}),
        (_get(b"/%"), {400, 404}),
        (_get(b"/\xff\xfe"), {None, 400, 404}),
        (_get(b"http://elsewhere/health"), {200, 400, 404}),
        (_get(b"/x%0d%0aSet-Cookie:%20a=b"), {400, 404}),
        (b"GET /x\r\nSet-Cookie: a=b HTTP/1.1\r\n\r\n", {None, 400}),
        (b"GET /x\rSet-Cookie:a=b HTTP/1.1\r\n\r\n", {None, 400, 404}),
        (_get(b"/app.js/../app.js"), {400, 404}),
        (_get(b"/./app.js"), {400, 404}),
        (_get(b"//app.js"), {400, 404}),
        (_get(b"/app%2ejs"), {400, 404}),
        (_get(b"/APP.JS"), {400, 404}),
        (_get(b"/app.js%00.html"), {400, 404}),
        (_get(b"/app.js;x"), {400, 404}),
        (_get(b"/web/app.js"), {400, 404}),
        (_get(b"/package.json"), {400, 404}),
        (_get(b"/..;/app.js"), {400, 404}),
        (_get(b"/%252e%252e/app.js"), {400, 404}),
        (_get(b"/?file=../../etc/passwd"), {200}),
        (_get(b"/app.js", b"Range: bytes=0-1"), {200}),  # RFC 9110, section 14.2: may be ignored
        (_get(b"/app.js", b"If-None-Match: " + b'"x",' * 1000), {200}),
        (_get(b"/app.js", b"If-None-Match: \xff"), {200, 400}),
        (b"HEAD /app.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {200}),
        (b"HEAD /v1/continue HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {405}),
        (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {405}),
        (b"GET /\x1b[31m HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {404}),
        (_get(b"/v1/continue"), {400, 426}),
        (_get(b"/v1/continue/../../x"), {400, 404}),
        (_get(b"/v1/continue", b"Upgrade: websocket", b"Connection: Upgrade"), {400}),
        (handshake().replace(b"Version: 13", b"Version: 8"), {400, 426}),
        (handshake().replace(b"Key: ", b"Key: !"), {400}),
        (handshake().replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n\r\n"), {400}),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_an_odd_request_gets_a_well_formed_answer_or_a_close(
    server: Watched, request_bytes: bytes, statuses: set[int | None]
) -> None:
    answer = _ask(server.port, request_bytes)
    assert _status(answer, request_bytes.split(b" ")[0]) in statuses, answer[:300]
    assert b"set-cookie" not in answer.partition(b"\r\n\r\n")[0].lower(), "a header was injected"
    assert b"root:" not in answer


@pytest.mark.parametrize("origin", [b"http://elsewhere", b"null", b"http://127.0.0.1:1", b"file://"])
def test_a_page_of_another_origin_opens_no_socket(server: Watched, origin: bytes) -> None:
    """The handshake itself is refused: a page cannot hold a slot, not even for the time of a first message."""
    request = handshake().replace(b"\r\n\r\n", b"\r\nOrigin: " + origin + b"\r\n\r\n")
    assert _status(_ask(server.port, request)) == 403


def test_nothing_of_a_request_reaches_the_log(server: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """A path or header with line ends or terminal codes in it would forge lines of the operator's log."""
    mark = b"forged-7f3a"
    with caplog.at_level(logging.DEBUG, "streaming"):
        for request in (
            _get(b"/" + mark),
            _get(b"/" + mark + b"\x1b[2J"),
            _get(b"/" + mark + b"%0d%0aERROR"),
            _get(b"/", b"User-Agent: " + mark, b"Origin: " + mark),
            _get(b"/v1/continue", b"Authorization: Bearer " + mark, b"Sec-WebSocket-Protocol: bearer." + mark),
            mark + b" / HTTP/1.1\r\n\r\n",
        ):
            answer = _ask(server.port, request)
            assert mark not in answer, "repeated to whoever reads the answer"
    own = [record.getMessage() for record in caplog.records if record.name.startswith("streaming")]
    assert not any(mark.decode() in message for message in own)


def test_pipelined_requests_get_one_answer_or_a_close(server: Watched) -> None:
    """What follows a request is taken for WebSocket frames, never for another request."""
    assert _status(_ask(server.port, _get(b"/health") * 50)) in {None, 200}


def test_headers_that_come_slowly_are_not_waited_for(server: Watched) -> None:
    """One byte every 50 ms would hold a connection for a minute."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as connection:
        begun = time.monotonic()

        def closed() -> bool:
            try:
                connection.sendall(b"x")
                return not connection.recv(100)
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        wait_for("the server to hang up", closed, HANDSHAKE_S + 2.0)
        print(f"closed after {time.monotonic() - begun:.2f} s, handshake time-out {HANDSHAKE_S} s")


def test_a_thousand_connections_without_a_handshake_do_not_keep_others_out(server: Watched) -> None:
    """Half of them are silent, half begin a request."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(CONNECTIONS, (soft - 200) // 2)  # both ends are in this process
    assert count >= 100, f"the limit of file descriptors is too low for this test: {soft}"
    with beside_a_healthy_session(server) as healthy, ExitStack() as stack:
        begun = time.monotonic()
        for index in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5.0))
            connection.sendall(b"GET /v1/continue HTTP/1.1\r\nHost: x\r\n" if index % 2 else b"")
        print(f"{count} connections in {time.monotonic() - begun:.2f} s")
        assert server.health()["status"] == "ready"
        healthy.waits_for_turns(2)
