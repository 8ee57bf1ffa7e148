"""The server's certificate and key."""

from __future__ import annotations

import ssl

from streaming.errors import StreamingError


class TlsError(StreamingError):
    """A certificate or key that cannot be used."""

    code = "bad_tls"


def load_tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return the context of a server with this certificate chain and key, PEM files; None where neither is given.

    Raises `TlsError`.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise TlsError("--tls-cert and --tls-key go together")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # never ask at the terminal
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"cannot use --tls-cert {certificate} with --tls-key {key}: {error}") from error
    return context
