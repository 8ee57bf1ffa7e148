"""Requests to a gatekeeper, and what they are answered."""

from __future__ import annotations

from websockets.datastructures import Headers

from streaming.server.door.bind import Bind
from streaming.server.door.gatekeeper import Gatekeeper, Visitor
from streaming.server.door.refusals import Refusal
from streaming.server.door.tokens import Tokens

ANN, BOB = "ann-0123456789abcdef", "bob-0123456789abcdef"
TOKENS = Tokens.from_text(f"ann:{ANN},bob:{BOB}")
LOOPBACK = Bind("127.0.0.1", ("127.0.0.1",), loopback=True, tls=False)
PUBLIC = Bind("0.0.0.0", ("0.0.0.0",), loopback=False, tls=True)  # noqa: S104
PATH = "/v1/continue"
PEER = "203.0.113.7"


def ask(
    keeper: Gatekeeper, *headers: tuple[str, str], path: str = PATH, peer: str = PEER, now: float = 0.0
) -> Visitor | Refusal:
    """A request with these headers, and a Host if they have none."""
    given = Headers(headers)
    if "Host" not in given:
        given["Host"] = "localhost:8765"
    return keeper.admit(given, path, peer, now)


def code(answer: Visitor | Refusal | None) -> str | None:
    return answer.code if isinstance(answer, Refusal) else None
