"""The client's events of OpenAI's Realtime protocol (GA), as far as a model without words takes part in it.

Fields that are not used here are not named: whatever a client says in them is read over, as the protocol's own clients
send much that is meant for other models. Source: the types of the `openai` package, version 3.54 (`types/realtime`).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from streaming.protocol.messages import type_of
from streaming.server.openai.realtime_events import EventError, Limit

MAX_AUDIO_BYTES = 15 * 2**20
"""Most audio in one `input_audio_buffer.append`, in bytes."""
MAX_EVENT_BYTES = MAX_AUDIO_BYTES * 4 // 3 + 2**16
"""The largest event that is read: that much audio in base64, and what surrounds it."""


class ClientEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    event_id: str | None = None

    @property
    def type(self) -> str:
        """As on the wire."""
        return str(self.__struct_config__.tag)


class FormatOption(msgspec.Struct, frozen=True):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: float | None = None


class TurnDetection(msgspec.Struct, frozen=True, kw_only=True):
    """eagerness: of `semantic_vad`."""

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: float | None = None
    prefix_padding_ms: float | None = None
    silence_duration_ms: float | None = None
    create_response: bool | None = None
    interrupt_response: bool | None = None
    eagerness: Literal["low", "medium", "high", "auto"] | None = None


class InputOption(msgspec.Struct, frozen=True, kw_only=True):
    """turn_detection: null and false mean none."""

    format: FormatOption | None = None
    turn_detection: TurnDetection | bool | UnsetType | None = UNSET


class OutputOption(msgspec.Struct, frozen=True, kw_only=True):
    format: FormatOption | None = None
    voice: Any = None


class AudioOption(msgspec.Struct, frozen=True, kw_only=True):
    input: InputOption | None = None
    output: OutputOption | None = None


class SessionOption(msgspec.Struct, frozen=True, kw_only=True):
    audio: AudioOption | None = None
    output_modalities: list[str] | None = None
    max_output_tokens: Limit | None = None
    temperature: float | None = None


class SessionUpdate(ClientEvent, kw_only=True, tag="session.update", frozen=True):
    session: SessionOption


class Append(ClientEvent, kw_only=True, tag="input_audio_buffer.append", frozen=True):
    audio: bytes  # base64 on the wire


class Commit(ClientEvent, kw_only=True, tag="input_audio_buffer.commit", frozen=True):
    pass


class Clear(ClientEvent, kw_only=True, tag="input_audio_buffer.clear", frozen=True):
    pass


class ResponseOption(msgspec.Struct, frozen=True, kw_only=True):
    conversation: str | None = None
    input: list[Any] | None = None
    output_modalities: list[str] | None = None
    max_output_tokens: Limit | None = None
    temperature: float | None = None
    metadata: dict[str, str] | None = None


class ResponseCreate(ClientEvent, kw_only=True, tag="response.create", frozen=True):
    response: ResponseOption | None = None


class ResponseCancel(ClientEvent, kw_only=True, tag="response.cancel", frozen=True):
    response_id: str | None = None


class ItemTruncate(ClientEvent, kw_only=True, tag="conversation.item.truncate", frozen=True):
    item_id: str
    audio_end_ms: float
    content_index: int = 0


class ItemOption(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    id: str | None = None
    role: str | None = None
    content: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class ItemCreate(ClientEvent, kw_only=True, tag="conversation.item.create", frozen=True):
    item: ItemOption
    previous_item_id: str | None = None


class ItemDelete(ClientEvent, kw_only=True, tag="conversation.item.delete", frozen=True):
    item_id: str


class ItemRetrieve(ClientEvent, kw_only=True, tag="conversation.item.retrieve", frozen=True):
    item_id: str


class OutputClear(ClientEvent, kw_only=True, tag="output_audio_buffer.clear", frozen=True):
    """An event for WebRTC, which means nothing here."""


AnyClientEvent = (
    SessionUpdate
    | Append
    | Commit
    | Clear
    | ResponseCreate
    | ResponseCancel
    | ItemTruncate
    | ItemCreate
    | ItemDelete
    | ItemRetrieve
    | OutputClear
)

_decoder: msgspec.json.Decoder[AnyClientEvent] = msgspec.json.Decoder(AnyClientEvent)


class _Identified(msgspec.Struct, frozen=True):
    event_id: str | None = None


def decode(text: str | bytes) -> AnyClientEvent:
    """Return what a client said. Raises `EventError`."""
    try:
        return _decoder.decode(text)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise EventError("invalid_json", f"not JSON: {error}") from None
    kind = type_of(text)
    if kind is None:
        raise EventError("missing_required_parameter", "an event is an object with a type", "type")
    raise EventError("invalid_value", f"{kind[:64]}: {message}", param)


def event_id_of(text: str | bytes) -> str | None:
    """Return the client's id of an event, whatever else is wrong with it."""
    try:
        return msgspec.json.decode(text, type=_Identified).event_id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
