"""What a client is told at the end, and how its socket closes."""

from __future__ import annotations

import pytest

from streaming.conversation import ends
from streaming.conversation.outbox import End
from streaming.errors import EngineFullError, PromptTooLongError, ProtocolError, StepFailedError, StreamingError
from streaming.protocol import messages
from streaming.protocol.close_codes import CloseCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProtocolError("x"), CloseCode.INVALID_DATA),
        (PromptTooLongError("x"), CloseCode.POLICY_VIOLATION),
        (StepFailedError("x"), CloseCode.INTERNAL_ERROR),
    ],
)
def test_an_error_says_whose_fault_the_end_is(error: StreamingError, code: CloseCode) -> None:
    assert ends.fatal(error) == End(messages.Error(code=error.code, message="x", fatal=True), code, "x")


def test_a_reason_fits_a_close_frame() -> None:
    """A close frame holds 123 bytes: a longer reason failed the closing of the socket, and nobody was told."""
    end = ends.fatal(ProtocolError("é" * 500))
    assert len(end.reason.encode()) <= 123
    assert isinstance(end.message, messages.Error)
    assert end.message.message == "é" * 500


@pytest.mark.parametrize(("error", "retry_after_ms"), [(EngineFullError("x"), 1000), (StepFailedError("x"), 0)])
def test_a_refusal_says_whether_to_try_again(error: StreamingError, retry_after_ms: int) -> None:
    refused = messages.SessionRefused(code=error.code, message="x", retry_after_ms=retry_after_ms)
    assert ends.refusal(error) == End(refused, CloseCode.TRY_AGAIN_LATER, "x")


def test_who_did_not_keep_to_the_protocol_is_not_asked_to_try_again() -> None:
    end = ends.refusal(ProtocolError("x"))
    assert end == End(messages.Error(code="bad_message", message="x", fatal=True), CloseCode.POLICY_VIOLATION, "x")


def test_an_answer_names_a_type_of_bounded_length() -> None:
    """A client's word of a megabyte came back whole."""
    error = ends.error_message(ProtocolError("x"), in_reply_to="y" * 1000)
    assert (error.fatal, error.in_reply_to) == (False, "y" * 64)
