"""The server's certificate and key."""

from __future__ import annotations

import ssl
from pathlib import Path

from streaming.errors import StreamingError


class TlsError(StreamingError):
    """A certificate or key that cannot be used."""

    code = "bad_tls"


def load_tls(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return a server's context for this certificate chain and key, PEM files; None for neither. Raises `TlsError`."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise TlsError("--tls-cert and --tls-key go together")
    chain = _pem("--tls-cert", certificate, "CERTIFICATE-----", "a certificate")
    private = _pem("--tls-key", key, "PRIVATE KEY-----", "a private key")
    if "ENCRYPTED" in private:
        raise TlsError(f"--tls-key {key} is encrypted: decrypt it first (openssl pkey -in {key} -out KEY)")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # so that OpenSSL does not ask at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"--tls-key {key} is not the key of the first certificate in --tls-cert {certificate}"
        elif _is_certificate(chain):
            why = f"--tls-key {key} is damaged, or of a kind that cannot be used: {error.reason or error}"
        else:
            why = f"--tls-cert {certificate} is damaged: {error.reason or error}"
        raise TlsError(why) from error
    return context


def _pem(flag: str, path: str, mark: str, what: str) -> str:
    """Return a file's text, which has to hold `mark`. Raises `TlsError`."""
    try:
        text = Path(path).read_bytes().decode("ascii", "replace")
    except OSError as error:
        raise TlsError(f"cannot read {flag} {path}: {error.strerror or error}") from error
    if mark not in text:
        raise TlsError(f"{flag} {path} holds no {what.removeprefix('a ')} in PEM form")
    return text


def _is_certificate(chain: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=chain)
    except ssl.SSLError:
        return False
    return True
