"""What one peer may have, and what it is counted under."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.server.door.limits import Limits, Usage, address_key


def test_addresses_are_counted_as_one_host_has_them() -> None:
    """One IPv6 host has 2^64 addresses of its own, and a limit for each of them is none."""
    assert address_key("192.0.2.1") == address_key("::ffff:192.0.2.1") == "192.0.2.1"
    assert address_key("2001:db8::1") == address_key("2001:db8::ffff:2%eth0") == "2001:db8::/64"
    assert address_key("2001:db8:0:1::1") != address_key("2001:db8::1")
    for local in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "", None):
        assert address_key(local) is None
    assert address_key("what?") == "unknown"


def test_connections_drain_a_bucket_that_fills_again() -> None:
    usage = Usage(Limits(connections_per_s=2.0, connection_burst=3))
    assert [usage.connect("a", 10.0) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert usage.connect("b", 10.0) == 0
    assert usage.connect("a", 10.25) == pytest.approx(0.25)
    assert usage.connect("a", 10.5) == 0
    assert usage.connect("a", 10.5) == pytest.approx(0.5)
    assert usage.connect("a", 9.0) == pytest.approx(0.5)  # a clock that went back gives nothing
    assert [usage.connect("a", 1e6) for _ in range(4)] == [0, 0, 0, 0.5]


def test_the_table_is_bounded_and_the_longest_unseen_goes_first() -> None:
    """A table of everyone who ever connected is memory that strangers fill."""
    usage = Usage(Limits(connections_per_s=1.0, connection_burst=1, addresses=3))
    for address in "abcadaeafa":
        assert (usage.connect(address, 0.0) == 0) == (address != "a" or len(usage) == 1)  # a is seen all along
        assert len(usage) <= 3
    assert usage.connect("b", 0.0) == 0  # forgotten
    large = Usage(Limits())
    for number in range(10_100):
        large.connect(str(number), number)
    assert len(large) == 10_000


@given(st.text(max_size=50))
def test_no_text_breaks_the_key(text: str) -> None:
    address_key(text)


@given(st.lists(st.integers(0, 9), max_size=60))
def test_counts_return_to_nothing_in_whatever_order_sessions_end(order: list[int]) -> None:
    """A count that leaks by one an error locks an address out for good."""
    limits = Limits(sessions_per_token=4, sessions_per_address=4)
    usage, open_sessions = Usage(limits), dict[int, contextlib.ExitStack]()
    for number in order:
        if number in open_sessions:
            open_sessions.pop(number).close()
        elif usage.has_room("a", "ann"):
            open_sessions[number] = contextlib.ExitStack()
            open_sessions[number].enter_context(usage.session("a", "ann"))
        assert len(open_sessions) <= 4
    for stack in open_sessions.values():
        with contextlib.suppress(ZeroDivisionError), stack:
            raise ZeroDivisionError
    assert not usage._sessions
