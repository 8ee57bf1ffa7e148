"""The server's own secret: what it signs saved sessions with.

As with tokens, it never comes from a flag, and no message repeats it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from streaming.errors import SnapshotError, StreamingError
from streaming.files import AnyBytes

ENVIRONMENT = "STREAMING_SESSION_KEY"
MIN_CHARACTERS = 32
MAX_CHARACTERS = 1_024
SIGNATURE_BYTES = 32
_MAKE_ONE = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


class SessionKeyError(StreamingError):
    """The key that the operator gave cannot be used."""

    code = "bad_session_key"


class SessionKey:
    """A secret that servers share whose sessions may move between them."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def derive(self, purpose: str) -> bytes:
        """Return the key of 32 bytes for one purpose; none tells anything of another."""
        return hmac.digest(self._secret, purpose.encode(), "sha256")

    def sign(self, data: memoryview | bytearray) -> None:
        """Put a saved session's signature in its place, the last 32 bytes."""
        data[-SIGNATURE_BYTES:] = self._signature(data)

    def check(self, data: AnyBytes) -> None:
        """Raise `SnapshotError` unless `sign` has made these bytes with this key."""
        if not hmac.compare_digest(data[-SIGNATURE_BYTES:], self._signature(data)):
            raise SnapshotError("the saved session was signed with another key, or has been altered")

    def _signature(self, data: AnyBytes) -> bytes:
        signing = hmac.new(self.derive("saved session"), digestmod="sha256")
        signing.update(memoryview(data)[:-SIGNATURE_BYTES])
        return signing.digest()


def load_session_key(environment: Mapping[str, str], path: str | None) -> SessionKey | None:
    """Return the key in the environment or in a file, None where there is neither. Raises `SessionKeyError`."""
    where = ENVIRONMENT
    text = environment.get(ENVIRONMENT, "").strip()
    if path is not None:
        if text:
            raise SessionKeyError(f"--session-key and {ENVIRONMENT} are both given; give one")
        where = path
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(MAX_CHARACTERS + 2).strip()
        except OSError as error:
            raise SessionKeyError(f"cannot read the key in {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SessionKeyError(f"{path} is no text") from None
    elif not text:
        return None
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        raise SessionKeyError(
            f"the key in {where} has {len(text)} characters, must have from {MIN_CHARACTERS} to {MAX_CHARACTERS}; "
            f"{_MAKE_ONE}"
        )
    return SessionKey(text)
