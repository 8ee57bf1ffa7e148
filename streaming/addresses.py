"""Network addresses as text: reading them, and the one rule for which of them are this machine's own."""

from __future__ import annotations

import ipaddress


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that `text` is, or None for what is no address.

    A zone (`fe80::1%eth0`) is left out. An IPv4 address written as IPv6 (`::ffff:192.0.2.1`, RFC 4291, section
    2.5.5.2) is returned as IPv4.
    """
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def is_loopback(address: str) -> bool:
    """Return whether this is an address of 127.0.0.0/8, ::1, or one of the former written as IPv6. Names are not."""
    parsed = parse_address(address)
    return parsed is not None and parsed.is_loopback


def names_this_machine(host: str) -> bool:
    """Return whether a URL's host is `localhost` (RFC 6761, section 6.3) or a loopback address."""
    return host.lower().removesuffix(".") == "localhost" or is_loopback(host)
