"""The codes with which a WebSocket of this project closes (RFC 6455, section 7.4.1)."""

from __future__ import annotations

from enum import IntEnum

MAX_REASON_BYTES = 123
"""Most bytes of a reason in UTF-8: a control frame holds 125, and the code takes two (RFC 6455, section 5.5)."""


class CloseCode(IntEnum):
    """normal: the client's own wish, or idle. going_away: the server stops. invalid_data: a malformed message.

    policy_violation: a first message that starts nothing, a prompt that is too long, a revoked token. internal_error:
    the server's fault. try_again_later: refused.
    """

    NORMAL = 1000
    GOING_AWAY = 1001
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013


def close_reason(text: str) -> str:
    """Return as much of the text as a close frame holds, whole characters only."""
    return text.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
