"""Check where the server may listen: on loopback as it is, elsewhere only with tokens and TLS."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streaming.addresses import is_loopback
from streaming.errors import StreamingError
from streaming.server.door.tokens import ENVIRONMENT, Tokens


class BindError(StreamingError):
    """The server will not listen there as things are. The message says what to add."""

    code = "bad_bind"


class AddressError(StreamingError):
    """The address to listen on is taken, or not this machine's."""

    code = "bad_address"


@dataclass(frozen=True, slots=True)
class Bind:
    """The addresses to listen on. The name is not used again, since it might mean others by then.

    loopback: nobody outside this machine can connect; tls: the server itself speaks TLS.
    """

    host: str
    addresses: tuple[str, ...]
    loopback: bool
    tls: bool


def addresses_of(host: str) -> tuple[str, ...]:
    """Return all addresses of a name, or the address itself. Raises `OSError` where there are none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def check_bind(
    host: str,
    tokens: Tokens | None,
    *,
    tls: bool,
    insecure_plaintext: bool,
    resolve: Callable[[str], Sequence[str]] = addresses_of,
) -> Bind:
    """Return where to listen. Loopback is fine as it is; elsewhere tokens are needed, and TLS unless it is waived.

    A name counts as loopback only if all its addresses do. Raises `BindError`.
    """
    if not host:
        raise BindError("--host is empty; name an address, 0.0.0.0 or :: for all of them")
    try:
        addresses = tuple(resolve(host))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "the port goes into --port" if re.search(r"[^:]:\d+$", host) else "name one of this machine's"
        raise BindError(f"--host {host} has no address ({reason}); {hint}") from None
    if not addresses:
        raise BindError(f"--host {host} has no address; name one of this machine's")
    loopback = all(map(is_loopback, addresses))
    if not loopback and tokens is None:
        raise BindError(
            f"--host {host} can be reached from other machines, and anyone there could open a session; put name:token "
            f"into the environment variable {ENVIRONMENT}, or into a file named by --tokens, or leave out --host"
        )
    if not loopback and not tls and not insecure_plaintext:
        raise BindError(
            f"--host {host} can be reached from other machines, and speech and tokens would cross the network in the "
            "clear; add --tls-cert FILE --tls-key FILE, or --insecure-plaintext if something else encrypts them"
        )
    return Bind(host, addresses, loopback, tls)


def check_address(bind: Bind, port: int) -> None:
    """Raise `AddressError` if the address cannot be had now: better before a model is loaded than after."""
    for address in bind.addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
                probe.bind((address, port))
        except OSError as error:
            raise address_taken(bind, port, error) from error


def address_taken(bind: Bind, port: int, error: OSError) -> AddressError:
    """Return the error to raise where the system did not give this address."""
    hints = {
        errno.EADDRINUSE: "; take another port with --port N, or any free one with --port 0",
        errno.EACCES: "; ports below 1024 are for the system: take another with --port N",
        errno.EADDRNOTAVAIL: "; --host must be an address of this machine",
    }
    hint = hints.get(error.errno or 0, "")
    return AddressError(f"cannot listen on {bind.host}:{port} ({error.strerror or error}){hint}")
