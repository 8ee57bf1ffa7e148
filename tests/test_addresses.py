"""Which addresses are this machine's own: one rule for the server and for clients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.addresses import is_loopback, names_this_machine, parse_address


@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.2", "127.255.0.1", "::1", "::ffff:127.0.0.1", "::1%lo"])
def test_all_of_the_loopback_network_is_this_machine(text: str) -> None:
    """Server and client had a rule each, which disagreed on 127.0.0.2."""
    assert is_loopback(text)
    assert names_this_machine(text)


@pytest.mark.parametrize(
    "text", ["", "128.0.0.1", "192.0.2.1", "::", "fe80::1%eth0", "localhost.example", "127.0.0.1.nip.io"]
)
def test_other_addresses_and_names_are_not(text: str) -> None:
    assert not is_loopback(text)
    assert not names_this_machine(text)


@pytest.mark.parametrize("text", ["localhost", "LocalHost", "localhost."])
def test_localhost_is_this_machines_name_and_no_address(text: str) -> None:
    assert names_this_machine(text)
    assert not is_loopback(text)


def test_an_address_is_read_without_zone_and_mapping() -> None:
    assert str(parse_address("::ffff:192.0.2.1")) == "192.0.2.1"
    assert str(parse_address("fe80::1%eth0")) == "fe80::1"
    assert parse_address("what?") is None


@given(st.text(max_size=50))
def test_no_text_breaks_the_rule(text: str) -> None:
    assert not is_loopback("x" + text)
