"""Who may come back to which session: resume tokens, and the sessions that they lead to."""

from __future__ import annotations

import hashlib
import secrets
from typing import Generic, TypeVar

from streaming.errors import StreamingError
from streaming.server.door.gatekeeper import Visitor
from streaming.server.sessions import ServerSession

Resumed = TypeVar("Resumed", bound=ServerSession)


class SessionExpiredError(StreamingError):
    """There is no session to come back to."""

    code = "session_expired"


class SessionElsewhereError(StreamingError):
    """The session to come back to is another server's."""

    code = "session_elsewhere"


class ResumableSessions(Generic[Resumed]):
    """The sessions that a client may come back to, by their resume tokens.

    A resume token is this server's own mark and 192 random bits; of these only a hash is kept. mark: 8 hexadecimal
    digits, drawn when the server starts.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._sessions: dict[bytes, Resumed] = {}

    def new_token(self) -> str:
        """Return a token that no session has yet."""
        return f"{self._mark}.{secrets.token_urlsafe(24)}"

    def is_own(self, token: str) -> bool:
        """Return whether a token is of this server, since it was started."""
        return token.partition(".")[0] == self._mark

    def add(self, token: str, session: Resumed) -> None:
        """Let `token` lead to this session from here on."""
        self._sessions[_digest(token)] = session

    def remove(self, token: str) -> None:
        """Let `token` lead nowhere from here on."""
        self._sessions.pop(_digest(token), None)

    def holding(self, token: str) -> Resumed | None:
        """Return the session that this token leads to here, if any, whoever asks."""
        return self._sessions.get(_digest(token))

    def find(self, token: str, visitor: Visitor) -> Resumed:
        """Return the session to come back to: only for the holder of the access token that opened it.

        Raises `SessionElsewhereError` for another server's token, otherwise `SessionExpiredError` where there is none.
        """
        session = self._sessions.get(_digest(token))
        if session is not None and session.visitor.holder == visitor.holder:
            return session
        if not self.is_own(token):
            raise SessionElsewhereError(
                "this session belongs to another server, or to one that was restarted; start a new one"
            )
        raise SessionExpiredError("this session is over, or was left alone for too long; start a new one")


def _digest(token: str) -> bytes:
    """Return what is looked up instead of the token, so that the time taken tells nothing of it."""
    return hashlib.sha256(token.encode()).digest()
