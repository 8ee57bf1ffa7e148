"""Odd requests to the port: the answer is well-formed HTTP or a close, and the server stays ready."""

from __future__ import annotations

import os
import re
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming.protocol import messages
from streaming.server.door.handshakes import ListeningSocket
from streaming.server.door.limits import Limits
from tests.faults.harness import (
    FAST,
    SPEECH,
    Watched,
    beside_a_healthy_session,
    collected_descriptors,
    count_descriptors,
    resident_mib,
    wait_for,
    watched,
)
from tests.faults.raw_client import RawClient, audio, handshake, text

HANDSHAKE_S = 1.0
CONNECTIONS = int(os.environ.get("FAULT_CONNECTIONS", "10000"))
MOST_GROWTH_MIB = 20.0


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


_token = st.text("abcABC-_!~:\x00\x1b\xff ", max_size=12).map(lambda value: value.encode("latin-1"))
_target = st.sampled_from(
    [b"/", b"/health", b"/v1/continue", b"/%2e%2e/x", b"*", b"http://x/health", b"/" + b"a" * 9000]
)
_HEADERS = [
    *(b"Host", b"Origin", b"Authorization", b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"Connection"),
    *(b"Sec-WebSocket-Key", b"Sec-WebSocket-Version", b"Sec-WebSocket-Extensions", b"Sec-WebSocket-Protocol"),
]
_request = st.builds(
    lambda method, target, version, headers, end: b"".join(
        [method, b" ", target, b" ", version, b"\r\n", *(n + b":" + v + b"\r\n" for n, v in headers), end]
    ),
    st.sampled_from([b"GET", b"GET", b"HEAD", b"POST", b"OPTIONS", b"get", b""]) | _token,
    _target | _token,
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/1.1 "]) | _token,
    st.lists(
        st.tuples(
            st.sampled_from(_HEADERS) | _token,
            st.sampled_from([b" localhost", b" websocket", b" Upgrade", b" 13", b" -1", b" " + b"9" * 30]) | _token,
        ),
        max_size=8,
    ),
    st.sampled_from([b"\r\n", b"\r\n", b"\n", b"", b"\r\n\x00\xff" * 50]),
)


@given(_request | st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_request_gets_a_well_formed_answer_or_a_close(server: Watched, request_bytes: bytes) -> None:
    """Nor does anything of it come back in a header."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as connection, suppress(ConnectionError):
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(2**16):
            answer += data
    assert _status(answer, request_bytes.split(b" ")[0]) != 500
    assert b"\x1b" not in answer


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


_CROWD = r"""
import selectors, socket, sys

port, count = int(sys.argv[1]), int(sys.argv[2])
crowd = []
for index in range(count):
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(b"GET /v1/continue HTTP/1.1\r\nHost: x\r\n" if index % 2 else b"")
    connection.setblocking(False)
    crowd.append(connection)
print("here", flush=True)
sys.stdin.readline()
hung_up = 0
for connection in crowd:
    try:
        hung_up += not connection.recv(1)
    except BlockingIOError:
        pass
    except OSError:
        hung_up += 1
print(hung_up, flush=True)
"""
"""Connects and never finishes a request: half of them are silent, half begin one. Then says how many were
hung up on.
"""


@contextmanager
def _crowd(port: int, count: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _CROWD, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _most_taken_at_once() -> Iterator[list[int]]:
    """The most connections that the event loop took one after another before it turned to anything else, in a list."""
    accept, most, taken = ListeningSocket.accept, [0], 0

    def counted(listening: ListeningSocket) -> tuple[socket.socket, Any]:
        nonlocal taken
        try:
            accepted = accept(listening)
        except OSError:  # there are no more, or no more for now
            taken = 0
            raise
        taken += 1
        most[0] = max(most[0], taken)
        return accepted

    with mock.patch.object(ListeningSocket, "accept", counted):
        yield most


def test_ten_thousand_connections_without_a_handshake_keep_nobody_out() -> None:
    """They took all file descriptors, for as long as somebody renewed them; and each time that the loop looked, as many
    connections as the backlog holds came before everybody's audio.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(CONNECTIONS, soft - 200)
    memory = []
    with (
        _most_taken_at_once() as most,
        watched() as server,
    ):  # with the default time for a handshake: none of them is over by itself
        for part in (count // 5, count - count // 5):  # the first fills what is filled once
            with beside_a_healthy_session(server, held_s=None) as healthy, _crowd(server.port, part) as crowd:
                assert crowd.stdin is not None and crowd.stdout is not None
                longest_s, begun = 0.0, time.monotonic()
                while not select.select([crowd.stdout], [], [], 0)[0]:
                    asked = time.monotonic()
                    assert server.health()["status"] == "ready"
                    longest_s = max(longest_s, time.monotonic() - asked)
                    assert count_descriptors() < server.descriptors + Limits().handshakes + 100
                    time.sleep(0.2)
                assert crowd.stdout.readline() == "here\n"
                took_s = time.monotonic() - begun
                with RawClient(server.port) as newcomer:
                    newcomer.start(FAST).send(audio(SPEECH) + text(messages.Speak(turn=1)))
                    newcomer.expect(b'"turn.done"')
                healthy.waits_for_turns(2)
                crowd.stdin.write("\n")
                crowd.stdin.flush()
                hung_up = int(crowd.stdout.readline())
                assert hung_up >= part - Limits().handshakes - 10
                print(f"{part} in {took_s:.1f} s, {hung_up} hung up on; /health took {longest_s:.2f} s at most")
                print(f"{most[0]} connections taken at once, at most")
                assert 1 <= most[0] <= 16
            server.assert_clean()
            collected_descriptors()
            memory.append(resident_mib())
    print(f"memory: {memory} MiB")
    assert memory[1] - memory[0] < MOST_GROWTH_MIB


def test_running_out_of_descriptors_harms_no_session_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio asked for the same connection a hundred times over, with a traceback in the log each time."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with watched() as server, beside_a_healthy_session(server) as healthy:
        with _crowd(server.port, 100) as crowd:
            assert crowd.stdout is not None
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, limits[1]))
            try:
                assert crowd.stdout.readline() == "here\n"  # the kernel has them
                wait_for("the descriptors to run out", lambda: "out of system resource" in caplog.text)
                healthy.waits_for_turns(3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        begun = time.monotonic()
        assert server.health()["status"] == "ready"
        print(f"health {time.monotonic() - begun:.2f} s after there were descriptors again")
        complaints = [record for record in caplog.records if record.name == "asyncio"]
        assert 1 <= len(complaints) < 20, len(complaints)
