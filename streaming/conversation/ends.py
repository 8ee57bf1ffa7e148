"""The ends of sessions, and the refusals of others: what the client is told, and the code that closes its socket."""

from __future__ import annotations

from streaming.conversation.outbox import End
from streaming.errors import PromptTooLongError, ProtocolError, StreamingError
from streaming.protocol import messages
from streaming.protocol.close_codes import CloseCode, close_reason

_RETRY_AFTER_S = 1.0

GONE = End(None, CloseCode.NORMAL, "")
"""The end of a session whose client has left and can be told nothing."""
MOVED = End(None, CloseCode.NORMAL, "the session goes on at another server")
"""The end here of a session that is in the store. Its client comes back to whichever server it reaches."""
CLIENT_LEFT = End(messages.SessionClosed(reason="client"), CloseCode.NORMAL, "")
"""The end of a session whose client said goodbye."""
INTERNAL = End(
    messages.Error(code="internal", message="the server failed; this is its fault, try again", fatal=True),
    CloseCode.INTERNAL_ERROR,
    "the server failed; this is its fault, try again",
)


def stopped() -> End:
    """Return the end of a session whose server stops."""
    return End(messages.SessionClosed(reason="stopping"), CloseCode.GOING_AWAY, "the server stops")


def idle(seconds: float) -> End:
    """Return the end of a session whose client did nothing for so long."""
    return End(messages.SessionClosed(reason="idle"), CloseCode.NORMAL, f"nothing was said for {seconds:g} s")


def revoked() -> End:
    """Return the end of a session whose token is no longer valid."""
    message = "the token was revoked"
    return End(messages.Error(code="unauthorized", message=message, fatal=True), CloseCode.POLICY_VIOLATION, message)


def fatal(error: StreamingError) -> End:
    """Return the end that an error brings about."""
    code = CloseCode.INTERNAL_ERROR
    if isinstance(error, ProtocolError):
        code = CloseCode.INVALID_DATA
    elif isinstance(error, PromptTooLongError):
        code = CloseCode.POLICY_VIOLATION
    return End(error_message(error, fatal=True), code, close_reason(str(error)))


def refusal(error: StreamingError) -> End:
    """Return the `session.refused` for an error that keeps a session from beginning."""
    if isinstance(error, ProtocolError):
        return End(error_message(error, fatal=True), CloseCode.POLICY_VIOLATION, close_reason(str(error)))
    return refused(error.code, str(error), _RETRY_AFTER_S if error.passes else 0)


def refused(code: str, message: str, retry_after_s: float) -> End:
    """Return a `session.refused`. retry_after_s: 0 where there is no use in trying again."""
    refused = messages.SessionRefused(code=code, message=message, retry_after_ms=round(1e3 * retry_after_s))
    return End(refused, CloseCode.TRY_AGAIN_LATER, close_reason(message))


def error_message(error: StreamingError, *, fatal: bool = False, in_reply_to: str | None = None) -> messages.Error:
    """Return what a client is told of an error. in_reply_to: the type of the message that it answers."""
    kind = None if in_reply_to is None else in_reply_to[:64]
    return messages.Error(code=error.code, message=str(error), fatal=fatal, in_reply_to=kind)
