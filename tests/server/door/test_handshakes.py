"""Connections that have not said what they want: who goes when there are too many."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from streaming.server.door.handshakes import PendingHandshakes, listen
from streaming.server.door.limits import Limits

FAR, NEAR = "192.0.2.1", "127.0.0.1"


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connections, both ends."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(8)]
        for ends in made:
            for end in ends:
                stack.enter_context(end)
                end.settimeout(0.0)
        yield made


def _hung_up(pairs: list[tuple[socket.socket, socket.socket]]) -> list[int]:
    """The numbers of those that were hung up on."""
    found = []
    for number, (_, far) in enumerate(pairs):
        try:
            if far.recv(1) == b"":
                found.append(number)
        except BlockingIOError:
            pass
    return found


def test_the_one_that_has_waited_for_longest_goes(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Refusing the newcomer instead would keep everybody out for as long as the others stay."""
    pending = PendingHandshakes(Limits(handshakes=3))
    for near, _ in pairs[:3]:
        pending.enter(near, NEAR)
    pending.leave(pairs[0][0].fileno())  # has sent its request
    pending.enter(pairs[3][0], NEAR)
    assert _hung_up(pairs) == []
    pending.enter(pairs[4][0], NEAR)
    assert _hung_up(pairs) == [1]
    assert len(pending) == 3


def test_an_address_that_has_too_many_loses_its_own(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Nobody else loses one. Loopback is not counted by address: a proxy has everybody's connections there."""
    pending = PendingHandshakes(Limits(handshakes_per_address=2))
    for (near, _), peer in zip(pairs, [NEAR, NEAR, NEAR, FAR, FAR, "198.51.100.1", FAR, FAR], strict=True):
        pending.enter(near, peer)
    assert _hung_up(pairs) == [3, 4]


def test_hosts_of_one_ipv6_network_are_one_address(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    pending = PendingHandshakes(Limits(handshakes_per_address=1))
    for (near, _), peer in zip(pairs, ["2001:db8::1", "2001:db8::2", "2001:db8:1::1"], strict=False):
        pending.enter(near, peer)
    assert _hung_up(pairs) == [0]


def test_a_connection_that_was_closed_is_not_missed() -> None:
    """The number of its descriptor is given to the next connection, which must not be thrown out in its place."""
    pending = PendingHandshakes(Limits(handshakes=2))
    first, far = socket.socketpair()
    number = first.fileno()
    pending.enter(first, FAR)
    first.close()
    with far, ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        assert ends[0].fileno() == number
        pending.enter(ends[0], FAR)
        assert len(pending) == 1
        pending.leave(number)
        assert len(pending) == 0


def test_half_of_the_descriptors_are_for_those_who_are_in(
    pairs: list[tuple[socket.socket, socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.server.door.handshakes._descriptors", lambda: 4)
    pending = PendingHandshakes(Limits())
    for near, _ in pairs:
        pending.enter(near, NEAR)
    assert _hung_up(pairs) == [0, 1, 2, 3, 4, 5]


def test_all_addresses_get_one_port_and_a_part_of_the_backlog_at_once() -> None:
    """`localhost` has two addresses: with port 0 each had a port of its own, and only one was told."""
    pending = PendingHandshakes(Limits())
    addresses = ["127.0.0.1", "127.0.0.2"]
    with ExitStack() as stack:
        sockets = [stack.enter_context(opened) for opened in listen(addresses, 0, pending)]
        port = sockets[0].getsockname()[1]
        assert [opened.getsockname() for opened in sockets] == [(address, port) for address in addresses]
        sockets[0].setblocking(False)
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        for part in (16, 16, 8):
            for _ in range(part):
                stack.enter_context(sockets[0].accept()[0])
            with pytest.raises(BlockingIOError):
                sockets[0].accept()
        assert len(pending) == 40
        with pytest.raises(OSError, match="in use"):
            listen(["127.0.0.3", "127.0.0.1"], port, pending)


def test_running_out_of_descriptors_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio asked again a hundred times, and logged each."""

    def exhausted(self: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    with listen(["127.0.0.1"], 0, PendingHandshakes(Limits()))[0] as opened:
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                opened.accept()
            with pytest.raises(BlockingIOError):
                opened.accept()


def test_what_is_accepted_sends_small_messages_at_once() -> None:
    """asyncio switches Nagle's algorithm off by the socket's protocol number, which was not set: every other first
    frame of a continuation came 40 ms late, after its peer's delayed acknowledgement.
    """

    async def accepted() -> int:
        chosen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            end: socket.socket = writer.get_extra_info("socket")
            chosen.set_result(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (listening,) = listen([NEAR], 0, PendingHandshakes(Limits()))
        async with await asyncio.start_server(connected, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await chosen
            finally:
                writer.close()
                await writer.wait_closed()

    assert asyncio.run(accepted())
