"""The server's events of OpenAI's Realtime protocol (GA), as far as a model without words takes part in it: values.

Source: the types of the `openai` package, version 3.54 (`types/realtime`). `realtime_client_events` has the other way.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from streaming.errors import ProtocolError

Limit = int | Literal["inf"]


class EventError(ProtocolError):
    """An event that cannot be taken; answered with an `error`, and nothing else happens."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.event_code, self.param = code, param


class ServerEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    """event_id: set when it is sent."""

    event_id: str = ""


class SessionCreated(ServerEvent, kw_only=True, tag="session.created"):
    session: dict[str, Any]


class SessionUpdated(ServerEvent, kw_only=True, tag="session.updated"):
    session: dict[str, Any]


class SessionQueued(ServerEvent, kw_only=True, tag="session.queued"):
    """The place in line, where the server lets clients wait for a slot. OpenAI has no such event."""

    place: int


class SpeechStarted(ServerEvent, kw_only=True, tag="input_audio_buffer.speech_started"):
    audio_start_ms: int
    item_id: str


class SpeechStopped(ServerEvent, kw_only=True, tag="input_audio_buffer.speech_stopped"):
    audio_end_ms: int
    item_id: str


class Committed(ServerEvent, kw_only=True, tag="input_audio_buffer.committed"):
    item_id: str
    previous_item_id: str | None


class Cleared(ServerEvent, kw_only=True, tag="input_audio_buffer.cleared"):
    pass


class Part(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A part of an item's content, without its audio."""

    type: str
    text: str | None = None
    transcript: str | None = None


class Item(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str
    type: str
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "in_progress", "incomplete"] | None = None
    role: str | None = None
    content: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class ItemAdded(ServerEvent, kw_only=True, tag="conversation.item.added"):
    item: Item
    previous_item_id: str | None


class ItemDone(ServerEvent, kw_only=True, tag="conversation.item.done"):
    item: Item
    previous_item_id: str | None


class ItemDeleted(ServerEvent, kw_only=True, tag="conversation.item.deleted"):
    item_id: str


class ItemRetrieved(ServerEvent, kw_only=True, tag="conversation.item.retrieved"):
    item: Item


class ItemTruncated(ServerEvent, kw_only=True, tag="conversation.item.truncated"):
    item_id: str
    content_index: int
    audio_end_ms: int


class Failure(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    type: str
    code: str
    message: str


class StatusDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    type: Literal["completed", "cancelled", "failed", "incomplete", "in_progress"]
    reason: str | None = None
    error: Failure | None = None


class TokenDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    audio_tokens: int | None = None
    text_tokens: int | None = None
    image_tokens: int | None = None
    cached_tokens: int | None = None
    cached_tokens_details: TokenDetails | None = None


class Usage(msgspec.Struct, kw_only=True):
    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_token_details: TokenDetails
    output_token_details: TokenDetails


class Response(msgspec.Struct, kw_only=True):
    id: str
    status: Literal["completed", "cancelled", "failed", "incomplete", "in_progress"]
    status_details: StatusDetails | None
    output: list[Item]
    conversation_id: str
    output_modalities: list[str]
    max_output_tokens: Limit
    audio: dict[str, Any]
    usage: Usage | None
    metadata: dict[str, str] | None
    object: Literal["realtime.response"] = "realtime.response"


class ResponseCreated(ServerEvent, kw_only=True, tag="response.created"):
    response: Response


class ResponseDone(ServerEvent, kw_only=True, tag="response.done"):
    response: Response


class OutputItemAdded(ServerEvent, kw_only=True, tag="response.output_item.added"):
    response_id: str
    output_index: int
    item: Item


class OutputItemDone(ServerEvent, kw_only=True, tag="response.output_item.done"):
    response_id: str
    output_index: int
    item: Item


class PartEvent(ServerEvent, kw_only=True):
    """Base of what is about the one part of the one item of a response."""

    response_id: str
    item_id: str
    output_index: int = 0
    content_index: int = 0


class PartAdded(PartEvent, kw_only=True, tag="response.content_part.added"):
    part: Part


class PartDone(PartEvent, kw_only=True, tag="response.content_part.done"):
    part: Part


class AudioDelta(PartEvent, kw_only=True, tag="response.output_audio.delta"):
    delta: bytes  # base64 on the wire


class AudioDone(PartEvent, kw_only=True, tag="response.output_audio.done"):
    pass


class ErrorDetails(msgspec.Struct, kw_only=True):
    """retry_after_ms: not OpenAI's; when it is worth trying again."""

    type: Literal["invalid_request_error", "server_error"]
    code: str
    message: str
    param: str | None = None
    event_id: str | None = None
    retry_after_ms: int | UnsetType = UNSET


class Error(ServerEvent, kw_only=True, tag="error"):
    error: ErrorDetails


_encoder = msgspec.json.Encoder()


def encode(event: ServerEvent) -> str:
    """Return an event as the text to send."""
    return _encoder.encode(event).decode()


def rejection(error: ProtocolError, event_id: str | None) -> Error:
    """Return what a client is told of an event of its own that cannot be taken. event_id: the client's."""
    code, param = (error.event_code, error.param) if isinstance(error, EventError) else ("invalid_value", None)
    return Error(
        error=ErrorDetails(
            type="invalid_request_error", code=code, message=str(error)[:1000], param=param, event_id=event_id
        )
    )


def server_error(code: str, message: str, retry_after_ms: int = 0) -> Error:
    """Return what a client is told of an error that is not its own. retry_after_ms: 0 where it is no use."""
    details = ErrorDetails(type="server_error", code=code, message=message)
    if retry_after_ms:
        details.retry_after_ms = retry_after_ms
    return Error(error=details)
